#include "decode_attention_launch.cuh"

namespace flashdecpp {

template void launch_decode_attention<arch::half, CopyKind::kStaged>(const Launcher&, const AttentionLaunch&, Device);

}  // namespace flashdecpp
