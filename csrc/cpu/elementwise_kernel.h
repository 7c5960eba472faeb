// Norms, rotary embedding with KV append, and gated activations, in float32 arithmetic. The floor is one read of the
// inputs and one write of the outputs; a norm's further passes over a row hit the cache.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/simd.h"
#include "cpu/with_dtype.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// f(i, count) for each vector of [begin, end); count is kLanes except in the last one.
template <class F>
FLASHDECPP_INLINE void for_each_vector(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, static_cast<int>(end - i));
}

template <class T>
FLASHDECPP_INLINE Vec load_n(const T* p, int n) {
  return n == kLanes ? load(p) : load(p, n);
}
template <class T>
FLASHDECPP_INLINE void store_n(T* p, Vec x, int n) {
  n == kLanes ? store(p, x) : store(p, x, n);
}

template <class T>
void add_typed(void* to, const void* from, int64_t begin, int64_t end) {
  T* const sum = static_cast<T*>(to);
  const T* const term = static_cast<const T*>(from);
  for_each_vector(begin, end, [&](int64_t i, int n) { store_n(sum + i, load_n(sum + i, n) + load_n(term + i, n), n); });
}

static void add(void* to, const void* from, DType dtype, int64_t begin, int64_t end) {
  with_dtype(dtype, [&]<class T>() { add_typed<T>(to, from, begin, end); });
}

// --- rms_norm, layer_norm

template <class T, class W>
void norm_typed(const NormParams& p, int64_t row_begin, int64_t row_end) {
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
  const float count = static_cast<float>(p.cols);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row / p.inner_rows * p.outer_stride + row % p.inner_rows * p.x_stride;
    T* out = static_cast<T*>(p.out) + row * p.cols;
    const T* h = x;  // the row to normalize
    if (p.residual) {
      T* residual = static_cast<T*>(p.residual) + row * p.cols;
      for_each_vector(0, p.cols,
                      [&](int64_t i, int n) { store_n(residual + i, load_n(residual + i, n) + load_n(x + i, n), n); });
      h = residual;
    }
    // If |mean| >> std, the float mean is off by a noticeable part of std; mean(x - mean) corrects it.
    float mean = 0.0f, correction = 0.0f;
    if (p.subtract_mean) {
      Vec total = set1(0.0f);
      for_each_vector(0, p.cols, [&](int64_t i, int n) { total = total + load_n(h + i, n); });
      mean = sum(total) / count;
      total = set1(0.0f);
      int64_t i = 0;
      for (; i + kLanes <= p.cols; i += kLanes) total = total + (load(h + i) - set1(mean));
      correction = sum(total);
      for (; i < p.cols; ++i) correction += to_float(h[i]) - mean;
      correction /= count;
    }
    const auto center = [&](Vec y) __attribute__((always_inline)) { return (y - set1(mean)) - set1(correction); };
    Vec squares[2] = {set1(0.0f), set1(0.0f)};
    int64_t i = 0;
    for (; i + 2 * kLanes <= p.cols; i += 2 * kLanes) {
      const Vec a = center(load(h + i)), b = center(load(h + i + kLanes));
      squares[0] = fma(a, a, squares[0]);
      squares[1] = fma(b, b, squares[1]);
    }
    float total = sum(squares[0] + squares[1]);
    for (; i < p.cols; ++i) {
      const float d = (to_float(h[i]) - mean) - correction;
      total += d * d;
    }
    const Vec scale = set1(1.0f / __builtin_sqrtf(total / count + p.eps));
    for_each_vector(0, p.cols, [&](int64_t j, int n) {
      Vec y = center(load_n(h + j, n)) * scale;
      if (weight) y = y * load_n(weight + j, n);
      if (bias) y = y + load_n(bias + j, n);
      store_n(out + j, y, n);
    });
  }
}

static void norm(const NormParams& p, int64_t begin, int64_t end) {
  const bool wide = p.weight_dtype == DType::kFloat32;
  switch (p.dtype) {
    case DType::kFloat32: return norm_typed<float, float>(p, begin, end);
    case DType::kFloat16: return wide ? norm_typed<fp16, float>(p, begin, end) : norm_typed<fp16, fp16>(p, begin, end);
    case DType::kBFloat16: return wide ? norm_typed<bf16, float>(p, begin, end) : norm_typed<bf16, bf16>(p, begin, end);
    default: return;
  }
}

// --- rotary_append

template <class T>
FLASHDECPP_INLINE void rotate_head(T* head, const float* cosine, const float* sine, int half, bool interleaved) {
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = to_float(head[2 * i]), b = to_float(head[2 * i + 1]);
      from_float(a * cosine[i] - b * sine[i], head + 2 * i);
      from_float(b * cosine[i] + a * sine[i], head + 2 * i + 1);
    }
    return;
  }
  for_each_vector(0, half, [&](int64_t i, int n) {
    const Vec a = load_n(head + i, n), b = load_n(head + half + i, n);
    const Vec c = load_n(cosine + i, n), s = load_n(sine + i, n);
    store_n(head + i, a * c - b * s, n);
    store_n(head + half + i, fma(b, c, a * s), n);
  });
}

template <class T>
FLASHDECPP_INLINE void append_head(const T* head, void* cache, int64_t offset, int head_dim, DType cache_dtype,
                                   float scale) {
  if (cache_dtype == DType::kFloat8E4M3) {
    fp8* out = static_cast<fp8*>(cache) + offset;
    for (int i = 0; i < head_dim; ++i) from_float(to_float(head[i]) / scale, out + i);
  } else {
    __builtin_memcpy(static_cast<T*>(cache) + offset, head, sizeof(T) * head_dim);
  }
}

template <class T>
void rotary_typed(const RotaryParams& p, int64_t token_begin, int64_t token_end) {
  const int half = p.rotary_dim / 2;
  const int64_t capacity = int64_t{p.max_blocks} * p.block_size;
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t b = token / p.q_len, i = token % p.q_len;
    const int64_t position = int64_t{p.seq_lens[b]} - p.q_len + i;
    if (position < 0) continue;
    T* q = static_cast<T*>(p.q) + b * p.q_batch_stride + i * p.q_token_stride;
    T* k = static_cast<T*>(p.k) + b * p.k_batch_stride + i * p.k_token_stride;
    const T* v = static_cast<const T*>(p.v) + b * p.v_batch_stride + i * p.v_token_stride;
    if (p.cos_sin && position < p.max_positions) {
      const float* cosine = p.cos_sin + position * p.cos_sin_stride;
      for (int h = 0; h < p.q_heads; ++h)
        rotate_head(q + h * p.q_head_stride, cosine, cosine + half, half, p.interleaved);
      for (int h = 0; h < p.kv_heads; ++h)
        rotate_head(k + h * p.k_head_stride, cosine, cosine + half, half, p.interleaved);
    }
    if (position >= capacity) continue;
    const int64_t block = p.block_table ? p.block_table[b * p.table_stride + position / p.block_size] : b;
    if (block < 0 || block >= p.num_blocks) continue;
    const int64_t slot = position % p.block_size;
    for (int h = 0; h < p.kv_heads; ++h) {
      append_head(k + h * p.k_head_stride, p.k_cache,
                  block * p.kc.block_stride + slot * p.kc.token_stride + h * p.kc.head_stride, p.head_dim, p.kv_dtype,
                  p.k_scale ? p.k_scale[h] : 1.0f);
      append_head(v + h * p.v_head_stride, p.v_cache,
                  block * p.vc.block_stride + slot * p.vc.token_stride + h * p.vc.head_stride, p.head_dim, p.kv_dtype,
                  p.v_scale ? p.v_scale[h] : 1.0f);
    }
  }
}

static void rotary(const RotaryParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&]<class T>() { rotary_typed<T>(p, begin, end); });
}

// --- activations

FLASHDECPP_INLINE Vec sigmoid(Vec x) { return set1(1.0f) / (set1(1.0f) + exp(set1(0.0f) - x)); }

template <Activation kActivation>
FLASHDECPP_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kSilu) {
    return x / (set1(1.0f) + exp(set1(0.0f) - x));
  } else if constexpr (kActivation == Activation::kGelu) {
    const Vec tail = set1(0.5f) * erfc_positive(abs(x) * set1(0.70710678f));  // P(X > |x|) for a standard normal X
    return x * where_less(x, set1(0.0f), tail, set1(1.0f) - tail);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const Vec u = x * fma(x * x, set1(0.044715f), set1(1.0f));
    return x * sigmoid(u * set1(1.59576912f));
  } else {
    return max(set1(0.0f), x);
  }
}

template <class T, Activation kActivation>
void activate_row(const ActivationParams& p, int64_t row, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x) + row * p.cols * (p.gated ? 2 : 1);
  T* out = static_cast<T*>(p.out) + row * p.cols;
  for_each_vector(begin, end, [&](int64_t i, int n) {
    const Vec value = activate<kActivation>(load_n(x + i, n));
    store_n(out + i, p.gated ? value * load_n(x + p.cols + i, n) : value, n);
  });
}

template <class T>
void activate_typed(const ActivationParams& p, int64_t row, int64_t begin, int64_t end) {
  switch (p.activation) {
    case Activation::kSilu: return activate_row<T, Activation::kSilu>(p, row, begin, end);
    case Activation::kGelu: return activate_row<T, Activation::kGelu>(p, row, begin, end);
    case Activation::kGeluTanh: return activate_row<T, Activation::kGeluTanh>(p, row, begin, end);
    case Activation::kRelu: return activate_row<T, Activation::kRelu>(p, row, begin, end);
  }
}

static void activation(const ActivationParams& p, int64_t row, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&]<class T>() { activate_typed<T>(p, row, begin, end); });
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
