// The Timeline of builds with -DFLASHDECPP_TIMELINE=ON: the first thread of every CTA writes the time at each mark.
#pragma once

#include <vector>

namespace flashdecpp {

struct TimelineRecord {
  static constexpr int kStamps = 7;
  unsigned kernel_and_sm, cta;     // kernel in the upper 16 bits
  unsigned long long ns[kStamps];  // start, marks, end; 0: not reached
};

struct TimelineBuffer {
  unsigned long long count, capacity;
  TimelineRecord records[];
};

// Every translation unit has a pointer of its own, which its kernels read, and whose setter the host knows.
static __device__ TimelineBuffer* timeline_buffer;

inline std::vector<cudaError_t (*)(TimelineBuffer*)>& timeline_setters() {
  static std::vector<cudaError_t (*)(TimelineBuffer*)> setters;
  return setters;
}

static const bool timeline_registered = [] {
  timeline_setters().push_back(
      [](TimelineBuffer* buffer) { return cudaMemcpyToSymbol(timeline_buffer, &buffer, sizeof(buffer)); });
  return true;
}();

class Timeline {
 public:
  __device__ __forceinline__ explicit Timeline(TimelineOf kernel) {
    if (threadIdx.x != 0 || !timeline_buffer) return;
    const unsigned long long index = atomicAdd(&timeline_buffer->count, 1ull);
    if (index >= timeline_buffer->capacity) return;
    record_ = timeline_buffer->records + index;
    unsigned sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    record_->kernel_and_sm = static_cast<unsigned>(kernel) << 16 | sm;
    record_->cta = blockIdx.x + gridDim.x * blockIdx.y;
    mark();
  }
  __device__ __forceinline__ ~Timeline() { stamp(TimelineRecord::kStamps - 1); }

  __device__ __forceinline__ void mark() {
    if (next_ < TimelineRecord::kStamps - 1) stamp(next_++);
  }

 private:
  __device__ __forceinline__ void stamp(int index) {
    if (!record_) return;
    unsigned long long ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
    record_->ns[index] = ns;
  }

  TimelineRecord* record_ = nullptr;
  int next_ = 0;
};

}  // namespace flashdecpp
