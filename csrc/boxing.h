// How a function becomes a kernel of torch's dispatcher: m.impl("op", boxed<&op>).
//
// This is what TORCH_BOX does, but for two things: its conversion of a str copies the string into memory that nobody
// frees, and memory that the C++ library does not have is said to be what is missing.
#pragma once

#include <new>
#include <tuple>
#include <utility>

#include "torch_api.h"

namespace flashdecpp {
namespace boxing {

// An argument, which the stack gives up.
template <class T>
struct Argument {
  static T take(StableIValue value) { return torch::stable::detail::to<T>(value); }
};

template <>
struct Argument<std::string> {
  static std::string take(StableIValue value) { return take(torch::stable::detail::to<StringHandle>(value)); }
  static std::string take(StringHandle handle) {
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
  static std::optional<std::string> take(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<StringHandle>>(value);
    return handle ? std::optional(Argument<std::string>::take(*handle)) : std::nullopt;
  }
};

template <class T>
void put(StableIValue* stack, const T& result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class... T>
void put(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... result) { ((*stack++ = torch::stable::detail::from(result)), ...); }, results);
}

template <class Result, class... Args, size_t... index>
void call(Result (*function)(Args...), StableIValue* stack, std::index_sequence<index...>) {
  std::tuple<Args...> arguments{Argument<Args>::take(stack[index])...};  // in this order
  if constexpr (std::is_void_v<Result>) {
    std::apply(function, std::move(arguments));
  } else {
    put(stack, std::apply(function, std::move(arguments)));
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
    out_of_memory("what the call needs to work in could not be had on the CPU");
  }
}

}  // namespace flashdecpp
