// Checks append_attention's arguments and fills in the parameters of both of its parts.
#pragma once

#include "checks/decode_attention.h"
#include "checks/rotary_append.h"

namespace flashdecpp::checks {

struct AppendAttention {
  AttentionParams attention;
  RotaryParams rotary;
};

// Phi is as in attention_params().
template <class Phi>
AppendAttention append_attention(const Backend& backend, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                                 const OptionalTensor& block_table, const OptionalTensor& cos_sin, bool interleaved,
                                 std::optional<double> scale, const Phi& phi, double softcap, int64_t window,
                                 const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                 const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t num_splits,
                                 const OptionalTensor& fallback_count) {
  Checker check("append_attention", "q");
  const View q_view = check.take("q", q), k_view = check.take("k", k), v_view = check.take("v", v);
  AppendAttention both{};
  AttentionParams& a = both.attention;
  a = attention_params(check, backend, q_view, k_cache, v_cache, true, seq_lens, block_table, scale, phi, softcap,
                       window, alibi_slopes, sinks, k_scale, v_scale, num_splits, fallback_count);
  RotaryParams& r = both.rotary;
  r = rotary_params(check, q_view, k_view, v_view, a.kv_heads, cos_sin, interleaved);
  r.k_cache = const_cast<void*>(a.k_cache);
  r.v_cache = const_cast<void*>(a.v_cache);
  r.kc = a.k;
  r.vc = a.v;
  set_cache(r, a);
  check.written_apart();
  return both;
}

// Lets rotary_append work on copies, as this op leaves q and k as they are.
inline void rotate_copies(AppendAttention& both, const View& q, const View& k) {
  AttentionParams& a = both.attention;
  RotaryParams& r = both.rotary;
  a.q = r.q = q.data;
  a.q_batch_stride = r.q_batch_stride = q.strides[0];
  a.q_token_stride = r.q_token_stride = q.strides[1];
  a.q_head_stride = r.q_head_stride = q.strides[2];
  r.k = k.data;
  r.k_batch_stride = k.strides[0];
  r.k_token_stride = k.strides[1];
  r.k_head_stride = k.strides[2];
}

}  // namespace flashdecpp::checks
