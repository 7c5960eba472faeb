#include "cuda/attention/decode_attention_launch.cuh"

namespace flashdecpp {

template void launch_decode_attention<arch::bfloat16, arch::bfloat16, LoadPath::kCpAsync>(const Launcher&,
                                                                                          const AttentionLaunch&,
                                                                                          const AttentionConfig&);

}  // namespace flashdecpp
