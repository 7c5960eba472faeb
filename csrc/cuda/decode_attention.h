// The kernels of decode attention by compute type and by the way of their loads: each compiled in a file of its own.
#pragma once

#include "launch.h"

namespace flashdecpp {

struct AttentionLaunch;

enum class CopyKind : int8_t { kStaged, kTensor, kRegisters };

// What every device of the library can do.
inline constexpr CopyKind kGenericCopies = arch::kCopiesGoThroughRegisters ? CopyKind::kRegisters : CopyKind::kStaged;

// Allocates the workspace, cuts the work and launches.
template <class T, CopyKind kind>
void launch_decode_attention(const Launcher& launcher, const AttentionLaunch& launch, Device device);

}  // namespace flashdecpp
