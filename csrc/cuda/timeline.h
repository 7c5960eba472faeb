// Time stamps of every CTA, for bench/timeline.py: what overlaps with what, and where a step waits. Only in CUDA builds
// with -DFLASHDECPP_TIMELINE=ON; in all others a Timeline is nothing.
#pragma once

namespace flashdecpp {

// Which kernel a record is of; bench/timeline.py has the same list.
enum class TimelineOf : int { kNorm, kGemv, kRotary, kAttention };

}  // namespace flashdecpp

#if defined(FLASHDECPP_TIMELINE)
#include "cuda/nvidia/timeline.h"
#else

namespace flashdecpp {

struct Timeline {
  explicit constexpr Timeline(TimelineOf) {}
  __device__ __forceinline__ void mark() const {}
};

}  // namespace flashdecpp

#endif
