// Checks rotary_append's arguments and fills in its RotaryParams.
#pragma once

#include "checks/kv_cache.h"

namespace flashdecpp::checks {

inline RotaryParams rotary_append(const Tensor& q_tensor, const Tensor& k_tensor, const Tensor& v_tensor,
                                  const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                                  const OptionalTensor& block_table, const OptionalTensor& cos_sin, bool interleaved,
                                  const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  Checker check("rotary_append", "q");
  const View q = check.take_written("q", q_tensor);
  check.rank("q", q, 4, "[batch, q_len, q_heads, head_dim]");
  check.float_dtype("q", q);
  check.last_contiguous("q", q);
  const int64_t batch = q.sizes[0], q_len = q.sizes[1], q_heads = q.sizes[2], head_dim = q.sizes[3];
  const View k = check.take_written("k", k_tensor), v = check.take("v", v_tensor);
  const Cache c =
      cache(check, kCpu, q.dtype, batch, head_dim, k_cache, v_cache, true, seq_lens, block_table, k_scale, v_scale);
  const char* names[] = {"k", "v"};
  const View* views[] = {&k, &v};
  for (int i = 0; i < 2; ++i) {
    check.dtype(names[i], *views[i], q.dtype);
    check.shape(names[i], *views[i], {batch, q_len, c.kv_heads, head_dim});
    check.last_contiguous(names[i], *views[i]);
  }

  RotaryParams p{};
  p.q = q.data;
  p.k = k.data;
  p.v = v.data;
  p.k_cache = const_cast<void*>(c.k);
  p.v_cache = const_cast<void*>(c.v);
  p.kc = c.k_layout;
  p.vc = c.v_layout;
  set_cache(p, c);
  p.dtype = q.dtype;
  p.q_batch_stride = q.strides[0];
  p.q_token_stride = q.strides[1];
  p.q_head_stride = q.strides[2];
  p.k_batch_stride = k.strides[0];
  p.k_token_stride = k.strides[1];
  p.k_head_stride = k.strides[2];
  p.v_batch_stride = v.strides[0];
  p.v_token_stride = v.strides[1];
  p.v_head_stride = v.strides[2];
  p.batch = to_int32(check, "q", batch);
  p.q_len = to_int32(check, "q", q_len);
  p.q_heads = to_int32(check, "q", q_heads);
  p.head_dim = to_int32(check, "q", head_dim);
  p.interleaved = interleaved;
  if (cos_sin) {
    const View t = check.take("cos_sin", *cos_sin);
    check.dtype("cos_sin", t, DType::kFloat32);
    check.rank("cos_sin", t, 2, "[max_positions, rotary_dim]");
    check.last_contiguous("cos_sin", t);
    FLASHDECPP_REQUIRE(t.sizes[1] % 2 == 0 && t.sizes[1] <= head_dim, check.op,
                       "cos_sin must have an even rotary_dim of at most head_dim ", head_dim, ", got shape ",
                       t.shape());
    p.cos_sin = static_cast<const float*>(t.data);
    p.cos_sin_stride = t.strides[0];
    p.max_positions = to_int32(check, "cos_sin", t.sizes[0]);
    p.rotary_dim = static_cast<int32_t>(t.sizes[1]);
  }
  check.written_apart();
  return p;
}

}  // namespace flashdecpp::checks
