// Registers a function as a kernel of torch's dispatcher: m.impl("op", boxed<&op>).
//
// It does what TORCH_BOX does, with two differences: TORCH_BOX leaks the copy it makes of every str argument, and
// std::bad_alloc becomes an out-of-memory error here.
#pragma once

#include <new>
#include <tuple>
#include <utility>

#include "torch_api.h"

namespace flashdecpp {
namespace boxing {

// Converts an argument and takes ownership of it from the stack.
template <class T>
struct Argument {
  static T unbox(StableIValue value) { return torch::stable::detail::to<T>(value); }
};

template <>
struct Argument<std::string> {
  static std::string unbox(StableIValue value) { return unbox(torch::stable::detail::to<StringHandle>(value)); }
  static std::string unbox(StringHandle handle) {
    size_t length = 0;
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    std::string copy(text, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return copy;
  }
};

template <>
struct Argument<std::optional<std::string>> {
  static std::optional<std::string> unbox(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<StringHandle>>(value);
    return handle ? std::optional(Argument<std::string>::unbox(*handle)) : std::nullopt;
  }
};

template <class T>
void box(StableIValue* stack, const T& result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class... T>
void box(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... result) { ((*stack++ = torch::stable::detail::from(result)), ...); }, results);
}

template <class Result, class... Args, size_t... index>
void call(Result (*function)(Args...), StableIValue* stack, std::index_sequence<index...>) {
  std::tuple<Args...> arguments{Argument<Args>::unbox(stack[index])...};  // braces evaluate in order
  if constexpr (std::is_void_v<Result>) {
    std::apply(function, std::move(arguments));
  } else {
    box(stack, std::apply(function, std::move(arguments)));
  }
}

template <class Result, class... Args>
void call(Result (*function)(Args...), StableIValue* stack) {
  call(function, stack, std::index_sequence_for<Args...>());
}

}  // namespace boxing

template <auto function>
void boxed(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  try {
    boxing::call(function, stack);
  } catch (const std::bad_alloc&) {
    out_of_memory("the call's working memory could not be allocated on the CPU");
  }
}

}  // namespace flashdecpp
