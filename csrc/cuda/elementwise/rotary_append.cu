// rotary_append on a GPU: check, guard, launch.
#include "boxing.h"
#include "checks/rotary_append.h"
#include "cuda/elementwise/rotary_append_kernel.cuh"
#include "cuda/elementwise/vectors.h"
#include "cuda/launch.h"

namespace flashdecpp {
namespace {

template <class T>
void launch_rotary(const Launcher& launcher, const RotaryParams& p) {
  const auto start = [&](auto* kernel, int64_t items) {
    const int64_t ctas_per_token = (items + kRotaryThreads - 1) / kRotaryThreads;
    check_grid_y("rotary_append", "q", ctas_per_token);
    const dim3 grid(static_cast<unsigned>(int64_t{p.batch} * p.q_len), static_cast<unsigned>(ctas_per_token));
    if (ctas_per_token > 0) launcher.overlapping(kernel, grid, kRotaryThreads, 0, p);
  };
  constexpr int vector = kVector<T>;
  const int64_t kv_bytes = checks::element_size(p.kv_dtype);
  const auto cache_fits = [&](const void* data, const CacheLayout& c) {
    return vectors_fit(data, kv_bytes, vector, {c.block_stride, c.token_stride, c.head_stride});
  };
  const bool fits =
      vectors_fit(p.q, sizeof(T), vector, {p.q_batch_stride, p.q_token_stride, p.q_head_stride, p.head_dim}) &&
      vectors_fit(p.k, sizeof(T), vector, {p.k_batch_stride, p.k_token_stride, p.k_head_stride, p.rotary_dim / 2}) &&
      vectors_fit(p.v, sizeof(T), vector, {p.v_batch_stride, p.v_token_stride, p.v_head_stride}) &&
      vectors_fit(p.cos_sin, sizeof(float), 4, {p.cos_sin_stride}) && cache_fits(p.k_cache, p.kc) &&
      cache_fits(p.v_cache, p.vc);
  fits ? start(rotary_append_kernel<T, vector>, rotary_items<vector>(p))
       : start(rotary_append_kernel<T, 1>, rotary_items<1>(p));
}

void rotary_append(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor seq_lens,
                   OptionalTensor block_table, OptionalTensor cos_sin, bool interleaved, OptionalTensor k_scale,
                   OptionalTensor v_scale) {
  const RotaryParams p =
      checks::rotary_append(q, k, v, k_cache, v_cache, seq_lens, block_table, cos_sin, interleaved, k_scale, v_scale);
  const Launcher launcher("rotary_append", View(q).device);
  const int64_t tokens = int64_t{p.batch} * p.q_len;
  FLASHDECPP_REQUIRE(tokens <= INT32_MAX, "rotary_append", "q must have fewer than 2^31 tokens, got ", tokens);
  if (tokens == 0) return;
  arch::with_float_type(p.dtype,
                        [&](auto* type) { launch_rotary<std::remove_pointer_t<decltype(type)>>(launcher, p); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("rotary_append", boxed<&rotary_append>);
}

}  // namespace flashdecpp
