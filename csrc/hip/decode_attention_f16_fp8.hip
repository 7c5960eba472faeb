#include "hip/decode_attention_amd.h"

namespace flashdecpp {

template void launch_decode_attention<arch::half, arch::float8, LoadPath::kRegister>(const Launcher&,
                                                                                     const AttentionLaunch&,
                                                                                     const AttentionConfig&);

}  // namespace flashdecpp
