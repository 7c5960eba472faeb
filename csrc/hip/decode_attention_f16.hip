#include "decode_attention_amd.h"

namespace flashdecpp {

template void launch_decode_attention<arch::half, CopyKind::kRegisters>(const Launcher&, const AttentionLaunch&,
                                                                        Device);

}  // namespace flashdecpp
