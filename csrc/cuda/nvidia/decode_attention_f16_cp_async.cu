#include "cuda/attention/decode_attention_launch.cuh"

namespace flashdecpp {

template void launch_decode_attention<arch::half, arch::half, LoadPath::kCpAsync>(const Launcher&,
                                                                                  const AttentionLaunch&,
                                                                                  const AttentionConfig&);

}  // namespace flashdecpp
