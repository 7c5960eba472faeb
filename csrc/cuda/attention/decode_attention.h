// The kernels of decode attention by compute type, type of the cache, and load path, each compiled in a file of its
// own.
#pragma once

#include "cuda/launch.h"
#include "heuristics/attention.h"

namespace flashdecpp {

struct AttentionLaunch;

// Launches the kernel that the configuration names.
template <class T, class KV, LoadPath path>
void launch_decode_attention(const Launcher& launcher, const AttentionLaunch& launch, const AttentionConfig& config);

}  // namespace flashdecpp
