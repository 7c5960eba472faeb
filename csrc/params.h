// The parameters of every kernel as plain structs, which the host code fills and a launch copies to the device.
// No torch here. Strides are in elements; every pointer has its shape next to it.
#pragma once

#include <cstdint>

namespace flashdecpp {

enum class DType : int8_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kInt8, kUInt8, kInt32, kInt64, kBool, kOther };

// Every cache is paged: a contiguous cache [batch, max_len, ...] has one block of max_len tokens per sequence.
struct CacheLayout {
  int64_t block_stride, token_stride, head_stride;  // the last dimension is contiguous
};

struct AttentionParams {
  const void* q;               // [batch, q_len, q_heads, head_dim], q strides below, last dimension contiguous
  const void* k_cache;         // [num_blocks, block_size, kv_heads, head_dim], layout k
  const void* v_cache;         // [num_blocks, block_size, kv_heads, head_dim], layout v
  void* out;                   // [batch, q_len, q_heads, head_dim], contiguous
  float* lse;                  // [batch, q_heads, q_len], natural logarithm
  const int32_t* seq_lens;     // [batch], keys of each sequence including the q_len new tokens
  const int32_t* block_table;  // [batch, max_blocks], rows table_stride apart; null: block b belongs to sequence b
  const float* phi;            // [q_heads] (phi_batch_stride 0) or [batch, q_heads]; null: online softmax
  const float* alibi_slopes;   // [q_heads] or null
  const float* sinks;          // [q_heads] or null
  const float* k_scale;        // [kv_heads] or null
  const float* v_scale;        // [kv_heads] or null
  int32_t* fallback_count;     // [1] or null: incremented by the number of rows that phi did not fit
  float* row_max;              // [batch, q_heads], rows row_max_batch_stride apart, or null: receives the last token's
                               // largest logit; may alias phi
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  CacheLayout k, v;
  int64_t table_stride, phi_batch_stride, row_max_batch_stride;
  int32_t batch, q_len, q_heads, kv_heads, head_dim;
  int32_t num_blocks, block_size, max_blocks;
  float scale, softcap;  // softcap 0: none
  int32_t window;        // <= 0: none
  int32_t num_splits;    // 0: the heuristic chooses
  DType q_dtype, kv_dtype;

  constexpr int32_t group() const { return q_heads / kv_heads; }
  constexpr int64_t capacity() const { return int64_t{max_blocks} * block_size; }
};

enum class Activation : int8_t { kSilu, kGelu, kGeluTanh, kRelu };

// How a linear's epilogue turns y = x weight^T + bias, in float32, into what it stores.
struct LinearFusion {
  enum Kind : int8_t {
    kNone,        // out = y
    kGate,        // out = activation(y[0, n)) * y[n, 2 n): the weight's rows are [gate; up]
    kActivation,  // out = activation(y)
    kResidual,    // out += y
  };
  Kind kind;
  Activation activation;  // of kGate and kActivation

  constexpr bool any() const { return kind != kNone; }
  constexpr bool gates() const { return kind == kGate; }
  constexpr bool activates() const { return kind == kGate || kind == kActivation; }
  constexpr bool adds() const { return kind == kResidual; }
};

struct LinearParams {
  const void* x;       // [m, k], rows x_stride apart
  const void* weight;  // [weight_rows(), k], rows weight_stride apart
  const void* bias;    // [weight_rows()] or null
  void* out;           // [m, n], contiguous
  int64_t m, n, k;
  int64_t x_stride, weight_stride;
  DType dtype;
  LinearFusion fusion;

  constexpr int64_t weight_rows() const { return fusion.gates() ? 2 * n : n; }
};

// A linear whose weights are w = scale * q + offset, with one scale and offset per group of `group` weights in a row.
// `weight` holds q, rows weight_stride bytes apart:
//   8 bit  int8 [weight_rows(), k]
//   4 bit  uint8 [weight_rows(), k / 2]: 16 bytes hold 32 consecutive q from 0 to 15, the first 16 in the low nibbles
//          and the last 16 in the high nibbles, both in order. Null `offsets` mean -8 * scale, so w = scale * (q - 8).
struct QuantizedLinearParams : LinearParams {
  const void* scales;   // [weight_rows(), k / group], rows scales_stride apart
  const void* offsets;  // [weight_rows(), k / group], rows offsets_stride apart, or null
  int64_t scales_stride, offsets_stride;
  int64_t group;  // k if a row has a single scale, else 32, 64 or 128
  int32_t bits;   // 8 or 4; 16 in AMD's stream GEMV, whose weight is then dense, without scales
  DType scales_dtype;

  constexpr int64_t groups() const { return k / group; }
};

struct NormParams {
  const void* x;       // [rows, cols], rows x_stride apart
  const void* weight;  // [cols] or null (layer_norm only)
  const void* bias;    // [cols] or null
  void* residual;      // [rows, cols] contiguous, updated in place, or null
  void* out;           // [rows, cols], contiguous
  int64_t rows, cols;
  // Row r of x starts at (r / inner_rows) * outer_stride + (r % inner_rows) * x_stride, for heads inside a packed
  // projection.
  int64_t inner_rows, x_stride, outer_stride;
  float eps;
  bool subtract_mean;  // layer norm
  DType dtype, weight_dtype;
};

struct RotaryParams {
  void* q;                     // [batch, q_len, q_heads, head_dim], rotated in place
  void* k;                     // [batch, q_len, kv_heads, head_dim], rotated in place
  const void* v;               // [batch, q_len, kv_heads, head_dim]
  void* k_cache;               // [num_blocks, block_size, kv_heads, head_dim], layout kc
  void* v_cache;               // [num_blocks, block_size, kv_heads, head_dim], layout vc
  const int32_t* seq_lens;     // [batch]
  const int32_t* block_table;  // [batch, max_blocks] or null
  const float* cos_sin;        // [max_positions, rotary_dim]: cosines, then sines; null: no rotation
  const float* k_scale;        // [kv_heads] or null
  const float* v_scale;        // [kv_heads] or null
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t k_batch_stride, k_token_stride, k_head_stride;
  int64_t v_batch_stride, v_token_stride, v_head_stride;
  CacheLayout kc, vc;
  int64_t table_stride, cos_sin_stride;
  int32_t batch, q_len, q_heads, kv_heads, head_dim;
  int32_t num_blocks, block_size, max_blocks;
  int32_t max_positions, rotary_dim;
  bool interleaved;
  DType dtype, kv_dtype;

  constexpr int64_t capacity() const { return int64_t{max_blocks} * block_size; }
};

struct ActivationParams {
  const void* x;  // contiguous; gated: [rows, 2 * cols], gate and up of each row, else [rows, cols]
  void* out;      // [rows, cols], contiguous: activation(gate) * up, or activation(x), which may alias x
  int64_t rows, cols;
  Activation activation;
  bool gated;
  DType dtype;
};

struct SampleParams {
  const void* logits;               // [batch, vocab], rows logits_stride apart
  int64_t* out;                     // [batch]
  const float* temperature;         // [batch] or null: greedy
  const int32_t* top_k;             // [batch] or null
  const float* top_p;               // [batch] or null
  const float* min_p;               // [batch] or null
  const int64_t* seed;              // [batch] or null: 0
  const int64_t* position;          // [batch] or null: 0
  const float* repetition_penalty;  // [batch] or null
  bool* seen;                       // [batch, vocab] contiguous, or null
  int64_t batch, vocab, logits_stride;
  DType dtype;
};

}  // namespace flashdecpp
