// Decode attention on a GPU, the host's side: check, guard, allocate, choose the way of the loads.
#include "cuda/attention/decode_attention.h"

#include "boxing.h"
#include "checks/decode_attention.h"
#include "cuda/attention/tile.cuh"

namespace flashdecpp {
namespace {

constexpr const char* kOp = "decode_attention";

// Whether the cache can be described to tensor copies and its blocks hold whole groups: of 16-byte aligned rows, which
// the contract does not promise for float8.
[[maybe_unused]] bool fits_tma(const AttentionParams& p) {
  const int64_t element = p.kv_dtype == DType::kFloat8E4M3 ? 1 : 2;
  const auto fits = [&](const void* data, const CacheLayout& layout) {
    const auto step = [&](int64_t size, int64_t stride) {
      return size <= 1 || (stride > 0 && stride * element % 16 == 0 && stride * element < int64_t{1} << 40);
    };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && step(p.num_blocks, layout.block_stride) &&
           step(p.block_size, layout.token_stride) && step(p.kv_heads, layout.head_stride);
  };
  return p.num_blocks > 0 && (!p.block_table || p.block_size % kKvTile == 0) && fits(p.k_cache, p.k) &&
         fits(p.v_cache, p.v);
}

template <class T>
void launch_load_path(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  if constexpr (arch::kHasHopperKernels) {
    if (launcher.hopper_kernels() && fits_tma(launch.p)) {
      return launch_decode_attention<T, LoadPath::kTma>(launcher, launch, device);
    }
  }
  launch_decode_attention<T, kGenericLoadPath>(launcher, launch, device);
}

template <class Phi>  // as in checks::decode_attention
std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,
                                            OptionalTensor block_table, std::optional<double> scale, Phi phi,
                                            double softcap, int64_t window, OptionalTensor alibi_slopes,
                                            OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale,
                                            int64_t num_splits, OptionalTensor fallback_count) {
  AttentionLaunch launch{};
  AttentionParams& p = launch.p;
  p = checks::decode_attention(checks::kGpu, q, k_cache, v_cache, seq_lens, block_table, scale, phi, softcap, window,
                               alibi_slopes, sinks, k_scale, v_scale, num_splits, fallback_count);
  const Device device = View(q).device;
  const Launcher launcher(kOp, device);
  Tensor out = new_tensor({p.batch, p.q_len, p.q_heads, p.head_dim}, p.q_dtype, device);
  Tensor lse = new_tensor({p.batch, p.q_heads, p.q_len}, DType::kFloat32, device);
  if (p.batch == 0) return {out, lse};
  p.out = View(out).data;
  p.lse = static_cast<float*>(View(lse).data);
  if (p.q_dtype == DType::kFloat16) {
    launch_load_path<arch::half>(launcher, launch, device);
  } else {
    launch_load_path<arch::bfloat16>(launcher, launch, device);
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("decode_attention", boxed<&decode_attention<OptionalTensor>>);
  m.impl("decode_attention.carry", boxed<&decode_attention<Tensor>>);
}

}  // namespace flashdecpp
