#include "cuda/nvidia/decode_attention_tma.cuh"

namespace flashdecpp {

template void launch_decode_attention<arch::bfloat16, arch::float8, LoadPath::kTma>(const Launcher&,
                                                                                    const AttentionLaunch&,
                                                                                    const AttentionConfig&);

}  // namespace flashdecpp
