#include "decode_attention_tensor.cuh"

namespace flashdecpp {

template void launch_decode_attention<arch::bfloat16, CopyKind::kTensor>(const Launcher&, const AttentionLaunch&,
                                                                         Device);

}  // namespace flashdecpp
