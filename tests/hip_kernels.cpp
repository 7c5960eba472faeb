// Kernels as they are compiled for AMD machines, with nothing around them: for tests/test_hip_kernels.py, which looks
// at the machine code.
#include "decode_attention_kernel.cuh"
#include "flat_gemm_kernel.cuh"
#include "gated_activation_kernel.cuh"
#include "gemv_kernel.cuh"
#include "norm_kernel.cuh"
#include "rotary_append_kernel.cuh"
#include "sample_kernel.cuh"

namespace flashdecpp {

template <class T, class KV, int dims>
using Tile = AttentionTile<T, KV, dims, BlockShape<2, 2, 1, 4>>;
template <class T, class KV, int dims>
using Ring = StagedRing<Tile<T, KV, dims>>;
template <class T, class KV, int dims>
using Source = typename Ring<T, KV, dims>::Source;

template __global__ void
    decode_attention_kernel<Tile<arch::half, arch::half, 128>, OnlineMax, Ring<arch::half, arch::half, 128>>(
        AttentionLaunch, Source<arch::half, arch::half, 128>);
template __global__ void decode_attention_kernel<Tile<arch::bfloat16, arch::float8, 64>, UnifiedMax<arch::bfloat16>,
                                                 Ring<arch::bfloat16, arch::float8, 64>>(
    AttentionLaunch, Source<arch::bfloat16, arch::float8, 64>);
template __global__ void gemv_kernel<arch::half, 1>(LinearParams, int);
template __global__ void gemv_kernel<arch::bfloat16, 4>(LinearParams, int);
template __global__ void flat_gemm_kernel<arch::half, 1>(LinearParams, SplitK);
template __global__ void flat_gemm_kernel<arch::bfloat16, 3>(LinearParams, SplitK);
template __global__ void norm_kernel<arch::half, arch::half, 8>(NormParams);
template __global__ void gated_activation_kernel<arch::bfloat16, 8>(GatedParams);
template __global__ void rotary_append_kernel<arch::half, 8>(RotaryParams);
template __global__ void sample_kernel<float>(SampleParams);

}  // namespace flashdecpp
