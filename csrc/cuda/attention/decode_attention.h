// The kernels of decode attention by compute type and by the way of their loads: each compiled in a file of its own.
#pragma once

#include "cuda/launch.h"

namespace flashdecpp {

struct AttentionLaunch;

enum class LoadPath : int8_t { kCpAsync, kTma, kRegister };

// What every device of the library can do.
inline constexpr LoadPath kGenericLoadPath = arch::kCopiesGoThroughRegisters ? LoadPath::kRegister : LoadPath::kCpAsync;

// Allocates the workspace, cuts the work and launches.
template <class T, LoadPath kind>
void launch_decode_attention(const Launcher& launcher, const AttentionLaunch& launch, Device device);

}  // namespace flashdecpp
