#include "decode_attention_tensor.cuh"

namespace flashdecpp {

template void launch_decode_attention<arch::half, CopyKind::kTensor>(const Launcher&, const AttentionLaunch&, Device);

}  // namespace flashdecpp
