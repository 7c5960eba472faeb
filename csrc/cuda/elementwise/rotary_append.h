// rotary_append's launch, for its own op and for attention that cannot append by itself.
#pragma once

#include "cuda/launch.h"
#include "params.h"

namespace flashdecpp {

// Whether every pointer and stride is aligned for accesses of 16 bytes of q's type.
bool rotary_vectors_fit(const RotaryParams& p);

void launch_rotary_append(const char* op, const Launcher& launcher, const RotaryParams& p);

}  // namespace flashdecpp
