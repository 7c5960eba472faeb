// Working memory for one call: up to kInline elements on the stack, more on the heap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace flashdecpp::cpu {

template <class T, size_t kInline>
class Scratch {
 public:
  explicit Scratch(size_t count) {
    if (count > kInline) heap_ = static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  ~Scratch() {
    if (heap_) ::operator delete(heap_, std::align_val_t{64});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return heap_ ? heap_ : inline_; }

 private:
  T* heap_ = nullptr;
  alignas(64) T inline_[kInline];
};

}  // namespace flashdecpp::cpu
