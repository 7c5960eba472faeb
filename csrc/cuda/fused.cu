// The small ops between the matrix products: norms, rotary embedding with KV append, gated activation.
#include "../boxing.h"
#include "../linear_parts.h"
#include "gated_activation_kernel.cuh"
#include "launch.h"
#include "norm_kernel.cuh"
#include "rotary_append_kernel.cuh"

namespace flashdecpp {
namespace {

// Elements of a 16-byte access.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Whether accesses of `vector` elements fit: the pointer (which may be null) and every stride.
bool vectors_fit(const void* data, int64_t bytes, int vector, std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(data) % std::min<int64_t>(16, bytes * vector) != 0) return false;
  return std::all_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride % vector == 0; });
}

void check_grid_y(const char* op, const char* arg, int64_t blocks) {
  FLASHDECPP_REQUIRE(blocks <= 65535, op, arg, " must have rows that 65535 blocks can hold, got ", blocks, " blocks");
}

// ---- norms

template <class T, class W>
void launch_norm(const Launcher& launcher, const NormParams& p) {
  const auto start = [&](auto* kernel, int vector) {
    const int64_t wave_size = launcher.wave_size();
    const int64_t wanted = (p.cols + vector - 1) / vector;
    const int64_t threads = std::min<int64_t>((wanted + wave_size - 1) / wave_size * wave_size, kNormMaxThreads);
    launcher.overlapping(kernel, static_cast<unsigned>(p.rows), static_cast<unsigned>(threads), 0, p);
  };
  constexpr int vector = kVector<T>;
  const bool fits = vectors_fit(p.x, sizeof(T), vector, {p.cols, p.x_stride, p.outer_stride}) &&
                    vectors_fit(p.residual, sizeof(T), vector, {}) && vectors_fit(p.weight, sizeof(W), vector, {}) &&
                    vectors_fit(p.bias, sizeof(W), vector, {});
  fits ? start(norm_kernel<T, W, vector>, vector) : start(norm_kernel<T, W, 1>, 1);
}

Tensor run_norm(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& residual, double eps, bool subtract_mean) {
  NormParams p = contract::norm(op, x, weight, bias, residual, eps, subtract_mean);
  const View view(x);
  const Launcher launcher(op, view.device);
  Tensor result = contract::new_like_rows(view, p.cols);
  if (p.rows == 0) return result;
  FLASHDECPP_REQUIRE(p.rows <= INT32_MAX, op, "x must have fewer than 2^31 rows, got ", p.rows);
  p.out = View(result).data;
  arch::with_float_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    p.weight_dtype == p.dtype ? launch_norm<T, T>(launcher, p) : launch_norm<T, float>(launcher, p);
  });
  return result;
}

Tensor rms_norm_residual(Tensor x, Tensor weight, Tensor residual, double eps) {
  return run_norm("rms_norm", x, weight, std::nullopt, residual, eps, false);
}

Tensor layer_norm(Tensor x, OptionalTensor weight, OptionalTensor bias, double eps) {
  return run_norm("layer_norm", x, weight, bias, std::nullopt, eps, true);
}

Tensor layer_norm_residual(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor residual, double eps) {
  return run_norm("layer_norm", x, weight, bias, residual, eps, true);
}

// ---- rotary embedding and append

template <class T>
void launch_rotary(const Launcher& launcher, const RotaryParams& p) {
  const auto start = [&](auto* kernel, int64_t items) {
    const int64_t parts = (items + kRotaryThreads - 1) / kRotaryThreads;
    check_grid_y("rotary_append", "q", parts);
    const dim3 grid(static_cast<unsigned>(int64_t{p.batch} * p.q_len), static_cast<unsigned>(parts));
    if (parts > 0) launcher.overlapping(kernel, grid, kRotaryThreads, 0, p);
  };
  constexpr int vector = kVector<T>;
  const int64_t kv_bytes = contract::element_size(p.kv_dtype);
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
      contract::rotary_append(q, k, v, k_cache, v_cache, seq_lens, block_table, cos_sin, interleaved, k_scale, v_scale);
  const Launcher launcher("rotary_append", View(q).device);
  const int64_t tokens = int64_t{p.batch} * p.q_len;
  FLASHDECPP_REQUIRE(tokens <= INT32_MAX, "rotary_append", "q must have fewer than 2^31 tokens, got ", tokens);
  if (tokens == 0) return;
  arch::with_float_type(p.dtype,
                        [&](auto* type) { launch_rotary<std::remove_pointer_t<decltype(type)>>(launcher, p); });
}

// ---- gated activation

template <class T>
void launch_gated(const Launcher& launcher, const GatedParams& p) {
  const auto start = [&](auto* kernel, int vector) {
    const int64_t parts = (p.cols + kGatedThreads * vector - 1) / (kGatedThreads * vector);
    check_grid_y("gated_activation", "gate_up", parts);
    launcher.overlapping(kernel, dim3(static_cast<unsigned>(p.rows), static_cast<unsigned>(parts)), kGatedThreads, 0,
                         p);
  };
  constexpr int vector = kVector<T>;
  vectors_fit(p.gate_up, sizeof(T), vector, {p.cols}) ? start(gated_activation_kernel<T, vector>, vector)
                                                      : start(gated_activation_kernel<T, 1>, 1);
}

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  return run_norm("rms_norm", x, weight, std::nullopt, std::nullopt, eps, false);
}

Tensor gated_activation(Tensor gate_up, std::string activation) {
  GatedParams p = contract::gated_activation(gate_up, activation);
  const View view(gate_up);
  const Launcher launcher("gated_activation", view.device);
  Tensor result = contract::new_like_rows(view, p.cols);
  if (p.rows == 0 || p.cols == 0) return result;
  FLASHDECPP_REQUIRE(p.rows <= INT32_MAX, "gated_activation", "gate_up must have fewer than 2^31 rows, got ", p.rows);
  p.out = View(result).data;
  arch::with_float_type(p.dtype, [&](auto* type) { launch_gated<std::remove_pointer_t<decltype(type)>>(launcher, p); });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("rms_norm", boxed<&rms_norm>);
  m.impl("rms_norm.residual", boxed<&rms_norm_residual>);
  m.impl("layer_norm", boxed<&layer_norm>);
  m.impl("layer_norm.residual", boxed<&layer_norm_residual>);
  m.impl("rotary_append", boxed<&rotary_append>);
  m.impl("gated_activation", boxed<&gated_activation>);
}

}  // namespace flashdecpp
