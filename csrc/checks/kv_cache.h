// Checks of the KV cache arguments that decode_attention and rotary_append have in common.
#pragma once

#include "checks/checker.h"

namespace flashdecpp::checks {

// The checked cache arguments, ready for AttentionParams or RotaryParams.
struct Cache {
  const void *k, *v;
  CacheLayout k_layout, v_layout;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t table_stride;
  int32_t num_blocks, block_size, max_blocks, kv_heads;
  const float *k_scale, *v_scale;
  DType dtype;
};

// `written`: whether the op writes to the caches.
inline Cache cache(Checker& check, const Backend& backend, DType compute_dtype, int64_t batch, int64_t head_dim,
                   const Tensor& k_cache, const Tensor& v_cache, bool written, const Tensor& seq_lens,
                   const OptionalTensor& block_table, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const auto take = [&](const char* arg, const Tensor& tensor) {
    return written ? check.take_written(arg, tensor) : check.take(arg, tensor);
  };
  const View k = take("k_cache", k_cache), v = take("v_cache", v_cache);
  const char* shape =
      block_table ? "[num_blocks, block_size, kv_heads, head_dim]" : "[batch, max_len, kv_heads, head_dim]";
  const char* names[] = {"k_cache", "v_cache"};
  const View* views[] = {&k, &v};
  for (int i = 0; i < 2; ++i) {
    const View& t = *views[i];
    check.rank(names[i], t, 4, shape);
    FLASHDECPP_REQUIRE(t.dtype == compute_dtype || t.dtype == DType::kFloat8E4M3, check.op, names[i], " must be ",
                       name(compute_dtype), " as ", check.first, " or float8_e4m3fn, got ", t.dtype_name());
    FLASHDECPP_REQUIRE(t.sizes[3] == head_dim, check.op, names[i], " must have head_dim ", head_dim, " as ",
                       check.first, ", got shape ", t.shape());
    check.last_contiguous(names[i], t);
    check.aligned(names[i], t, backend.alignment == 1 ? 1 : 8 * element_size(t.dtype));
  }
  check.dtype("v_cache", v, k.dtype);
  check.shape("v_cache", v, {k.sizes[0], k.sizes[1], k.sizes[2], k.sizes[3]});

  const View lens = check.take("seq_lens", seq_lens);
  check.dtype("seq_lens", lens, DType::kInt32);
  check.shape("seq_lens", lens, {batch});
  check.contiguous("seq_lens", lens);

  Cache c{};
  c.k = k.data;
  c.v = v.data;
  c.k_layout = {k.strides[0], k.strides[1], k.strides[2]};
  c.v_layout = {v.strides[0], v.strides[1], v.strides[2]};
  c.seq_lens = static_cast<const int32_t*>(lens.data);
  c.num_blocks = to_int32(check, "k_cache", k.sizes[0]);
  c.block_size = to_int32(check, "k_cache", k.sizes[1]);
  c.kv_heads = to_int32(check, "k_cache", k.sizes[2]);
  c.dtype = k.dtype;
  if (block_table) {
    const View table = check.take("block_table", *block_table);
    check.dtype("block_table", table, DType::kInt32);
    check.rank("block_table", table, 2, "[batch, max_blocks]");
    FLASHDECPP_REQUIRE(table.sizes[0] == batch, check.op, "block_table must have ", batch, " rows as ", check.first,
                       " has sequences, got shape ", table.shape());
    check.last_contiguous("block_table", table);
    FLASHDECPP_REQUIRE(c.block_size == 1 || (c.block_size > 0 && c.block_size % 8 == 0), check.op,
                       "k_cache must have a block_size of 1 or a multiple of 8, got ", c.block_size);
    c.block_table = static_cast<const int32_t*>(table.data);
    c.table_stride = table.strides[0];
    c.max_blocks = to_int32(check, "block_table", table.sizes[1]);
  } else {
    FLASHDECPP_REQUIRE(k.sizes[0] == batch, check.op, "k_cache without a block_table must have ", batch,
                       " sequences as ", check.first, ", got shape ", k.shape());
    c.max_blocks = 1;
  }
  FLASHDECPP_REQUIRE(int64_t{c.max_blocks} * c.block_size <= INT32_MAX, check.op,
                     "block_table must address fewer than 2^31 tokens per sequence, got ",
                     int64_t{c.max_blocks} * c.block_size);
  FLASHDECPP_REQUIRE(c.dtype == DType::kFloat8E4M3 || (!k_scale && !v_scale), check.op, k_scale ? "k_scale" : "v_scale",
                     " must be None unless the cache is float8_e4m3fn, got a ", name(c.dtype), " cache");
  c.k_scale = check.parameter<float>("k_scale", k_scale, DType::kFloat32, {c.kv_heads});
  c.v_scale = check.parameter<float>("v_scale", v_scale, DType::kFloat32, {c.kv_heads});
  return c;
}

// The fields that AttentionParams and RotaryParams call the same.
template <class Params>
void set_cache(Params& p, const Cache& c) {
  p.seq_lens = c.seq_lens;
  p.block_table = c.block_table;
  p.k_scale = c.k_scale;
  p.v_scale = c.v_scale;
  p.table_stride = c.table_stride;
  p.num_blocks = c.num_blocks;
  p.block_size = c.block_size;
  p.max_blocks = c.max_blocks;
  p.kv_heads = c.kv_heads;
  p.kv_dtype = c.dtype;
}

}  // namespace flashdecpp::checks
