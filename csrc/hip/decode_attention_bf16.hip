#include "hip/decode_attention_amd.h"

namespace flashdecpp {

template void launch_decode_attention<arch::bfloat16, arch::bfloat16, LoadPath::kRegister>(const Launcher&,
                                                                                           const AttentionLaunch&,
                                                                                           const AttentionConfig&);

}  // namespace flashdecpp
