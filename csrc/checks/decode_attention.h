// Checks decode_attention's arguments and fills in its AttentionParams.
#pragma once

#include "checks/kv_cache.h"
#include "op_limits.h"

namespace flashdecpp::checks {

// A phi that is only read: [q_heads] or [batch, q_heads].
inline void unified_maximum(Checker& check, AttentionParams& p, const OptionalTensor& phi) {
  if (!phi) return;
  const View t = check.take("phi", *phi);
  check.dtype("phi", t, DType::kFloat32);
  if (t.dim == 2) {
    check.shape("phi", t, {p.batch, p.q_heads});
    p.phi_batch_stride = p.q_heads;
  } else {
    check.shape("phi", t, {p.q_heads});
  }
  check.contiguous("phi", t);
  p.phi = static_cast<const float*>(t.data);
}

// A phi carried from step to step: [batch, q_heads], overwritten with the row maxima.
inline void unified_maximum(Checker& check, AttentionParams& p, const Tensor& carried_phi) {
  const View t = check.take_written("carried_phi", carried_phi);
  check.dtype("carried_phi", t, DType::kFloat32);
  check.shape("carried_phi", t, {p.batch, p.q_heads});
  check.last_contiguous("carried_phi", t);
  p.row_max = static_cast<float*>(t.data);
  p.phi = p.row_max;
  p.phi_batch_stride = p.row_max_batch_stride = t.strides[0];
}

// Phi is OptionalTensor if phi is only read, Tensor if it is carried.
template <class Phi>
AttentionParams decode_attention(const Backend& backend, const Tensor& q_tensor, const Tensor& k_cache,
                                 const Tensor& v_cache, const Tensor& seq_lens, const OptionalTensor& block_table,
                                 std::optional<double> scale, const Phi& phi, double softcap, int64_t window,
                                 const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                 const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t num_splits,
                                 const OptionalTensor& fallback_count) {
  Checker check("decode_attention", "q");
  const View q = check.take("q", q_tensor);
  check.rank("q", q, 4, "[batch, q_len, q_heads, head_dim]");
  if (backend.attention_float32) {
    check.float_dtype("q", q);
  } else {
    FLASHDECPP_REQUIRE(q.dtype == DType::kFloat16 || q.dtype == DType::kBFloat16, check.op,
                       "q must be float16 or bfloat16 on this device, got ", q.dtype_name());
  }
  check.last_contiguous("q", q);
  check.aligned("q", q, backend.alignment);
  const int64_t batch = q.sizes[0], q_len = q.sizes[1], q_heads = q.sizes[2], head_dim = q.sizes[3];
  FLASHDECPP_REQUIRE(q_len >= 1 && q_len <= kMaxNewTokens, check.op, "q must have a q_len of 1 to ", kMaxNewTokens,
                     ", got ", q_len);
  FLASHDECPP_REQUIRE(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0, check.op,
                     "q must have a head_dim that is a multiple of 8 up to ", kMaxHeadDim, ", got ", head_dim);
  const Cache c =
      cache(check, backend, q.dtype, batch, head_dim, k_cache, v_cache, false, seq_lens, block_table, k_scale, v_scale);
  FLASHDECPP_REQUIRE(q_heads > 0 && c.kv_heads > 0 && q_heads % c.kv_heads == 0, check.op,
                     "q must have q_heads that are a multiple of kv_heads ", c.kv_heads, ", got ", q_heads);
  FLASHDECPP_REQUIRE(q_heads / c.kv_heads <= kMaxQueryGroup, check.op, "q must have at most ", kMaxQueryGroup,
                     " q_heads per kv_head, got ", q_heads, " for ", c.kv_heads);
  FLASHDECPP_REQUIRE(num_splits >= 0, check.op, "num_splits must be 0 (chosen) or positive, got ", num_splits);

  AttentionParams p{};
  p.q = q.data;
  p.k_cache = c.k;
  p.v_cache = c.v;
  p.k = c.k_layout;
  p.v = c.v_layout;
  set_cache(p, c);
  p.q_dtype = q.dtype;
  p.q_batch_stride = q.strides[0];
  p.q_token_stride = q.strides[1];
  p.q_head_stride = q.strides[2];
  p.batch = to_int32(check, "q", batch);
  p.q_len = static_cast<int32_t>(q_len);
  p.q_heads = to_int32(check, "q", q_heads);
  p.head_dim = static_cast<int32_t>(head_dim);
  p.scale = scale ? check.number("scale", *scale) : 1.0f / std::sqrt(static_cast<float>(head_dim));
  p.softcap = check.positive_or_zero("softcap", softcap);
  p.window = window > 0 ? static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX)) : 0;
  p.num_splits = static_cast<int32_t>(std::min<int64_t>(num_splits, INT32_MAX));
  unified_maximum(check, p, phi);
  p.alibi_slopes = check.parameter<float>("alibi_slopes", alibi_slopes, DType::kFloat32, {q_heads});
  p.sinks = check.parameter<float>("sinks", sinks, DType::kFloat32, {q_heads});
  p.fallback_count = check.written_parameter<int32_t>("fallback_count", fallback_count, DType::kInt32, {1});
  check.written_apart();
  return p;
}

}  // namespace flashdecpp::checks
