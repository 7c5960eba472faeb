// Rotary embedding of q and k in place, and the append of k and v to the cache.
//
// A CTA processes items of one token, one per thread: `vector` pairs of a head of q or k to rotate, or `vector`
// elements of v or of k's unrotated columns to copy. Every element of q and k belongs to one thread, so rotating in
// place needs no barrier. No shared memory. Floor: the bytes of q, k and v, each read and written once, over the memory
// bandwidth; in decode, latency.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

inline constexpr int kRotaryThreads = 256;

// The slot of the cache that a token's key and value are written to.
struct CacheSlot {
  int64_t block, slot;
  bool exists;
};

__device__ __forceinline__ CacheSlot find_slot(const RotaryParams& p, int64_t sequence, int64_t position) {
  if (position < 0 || position >= p.capacity()) return {0, 0, false};
  const int64_t index = position / p.block_size;
  const int64_t block = p.block_table ? p.block_table[sequence * p.table_stride + index] : sequence;
  return {block, position % p.block_size, block >= 0 && block < p.num_blocks};
}

// Writes `values` of `head`, from element d on, to a cache of T or fp8.
template <class T, int vector>
__device__ __forceinline__ void append(const RotaryParams& p, void* cache, const CacheLayout& layout,
                                       const float* scales, const CacheSlot& at, int head, int d,
                                       float (&values)[vector]) {
  using namespace arch;
  const int64_t offset = at.block * layout.block_stride + at.slot * layout.token_stride + head * layout.head_stride + d;
  if (p.kv_dtype == DType::kFloat8E4M3) {
    const float scale = scales ? scales[head] : 1.f;
    float scaled[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i) scaled[i] = values[i] / scale;
    store_vector(static_cast<float8*>(cache) + offset, scaled);
  } else {
    store_vector(static_cast<T*>(cache) + offset, values);
  }
}

// The pairs [pair, pair + vector) of a head: rotated in float32, rounded to T.
template <class T, int vector>
struct Pairs {
  float first[vector], second[vector];  // in memory order: two runs of contiguous elements
  int first_at, second_at;              // where the runs start in the head

  __device__ __forceinline__ Pairs(const RotaryParams& p, const T* head, int pair)
      : first_at(p.interleaved ? 2 * pair : pair),
        second_at(p.interleaved ? 2 * pair + vector : pair + p.rotary_dim / 2) {
    arch::load_vector(first, head + first_at);
    arch::load_vector(second, head + second_at);
  }

  __device__ __forceinline__ void rotate(const RotaryParams& p, int64_t position, int pair) {
    float cosine[vector], sine[vector];
    const float* const angles = p.cos_sin + position * p.cos_sin_stride + pair;
    arch::load_vector(cosine, angles);
    arch::load_vector(sine, angles + p.rotary_dim / 2);
    if (!p.interleaved || vector == 1) {
#pragma unroll
      for (int i = 0; i < vector; ++i) rotate_pair(first[i], second[i], cosine[i], sine[i]);
    } else {
#pragma unroll
      for (int i = 0; i < vector; i += 2) {  // pairs are neighbors
        rotate_pair(first[i], first[i + 1], cosine[i / 2], sine[i / 2]);
        rotate_pair(second[i], second[i + 1], cosine[(vector + i) / 2], sine[(vector + i) / 2]);
      }
    }
  }

  __device__ __forceinline__ void store(T* head) const {
    arch::store_vector(head + first_at, first);
    arch::store_vector(head + second_at, second);
  }

 private:
  static __device__ __forceinline__ void rotate_pair(float& a, float& b, float cosine, float sine) {
    const float rotated_a = a * cosine - b * sine, rotated_b = b * cosine + a * sine;
    a = arch::to_float(arch::from_float<T>(rotated_a));
    b = arch::to_float(arch::from_float<T>(rotated_b));
  }
};

// Items of one token, in this order: rotations of q, rotations of k, unrotated columns of k, v.
template <int vector>
__host__ __device__ __forceinline__ int64_t rotary_items(const RotaryParams& p) {
  const int64_t rotations = p.rotary_dim / 2 / vector, unrotated = (p.head_dim - p.rotary_dim) / vector;
  return rotations * p.q_heads + (rotations + unrotated + p.head_dim / vector) * p.kv_heads;
}

// Grid: (batch * q_len, items of a token / threads).
template <class T, int vector>
__global__ void __launch_bounds__(kRotaryThreads) rotary_append_kernel(RotaryParams p) {
  Timeline timeline(TimelineOf::kRotary);
  arch::allow_next_kernel();
  // Lengths and tables may be read before the wait: no kernel that this one can overlap writes them.
  const int64_t sequence = blockIdx.x / p.q_len, token = blockIdx.x % p.q_len;
  const int64_t position = int64_t{p.seq_lens[sequence]} - p.q_len + token;
  const CacheSlot at = find_slot(p, sequence, position);
  // Prefetch this sequence's table for attention, which runs next: the weights may have evicted it from L2.
  constexpr int line = 32;  // entries
  const int64_t entry = threadIdx.x * int64_t{line};
  if (p.block_table && blockIdx.y == 0 && token == 0 && entry < p.max_blocks && entry <= position / p.block_size) {
    arch::prefetch(p.block_table + sequence * p.table_stride + entry);
  }
  timeline.mark();
  arch::wait_for_previous_kernel();
  timeline.mark();
  if (position < 0) return;  // left padding
  const bool rotates = position < p.max_positions;

  const int rotations = p.rotary_dim / 2 / vector, unrotated = (p.head_dim - p.rotary_dim) / vector;
  int64_t item = blockIdx.y * int64_t{kRotaryThreads} + threadIdx.x;
  if (item < int64_t{rotations} * p.q_heads) {
    if (!rotates) return;
    const int head = static_cast<int>(item / rotations), pair = static_cast<int>(item % rotations) * vector;
    T* const q = static_cast<T*>(p.q) + sequence * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
    Pairs<T, vector> pairs(p, q, pair);
    pairs.rotate(p, position, pair);
    pairs.store(q);
    return;
  }
  item -= int64_t{rotations} * p.q_heads;
  if (item < int64_t{rotations} * p.kv_heads) {
    const int head = static_cast<int>(item / rotations), pair = static_cast<int>(item % rotations) * vector;
    T* const k = static_cast<T*>(p.k) + sequence * p.k_batch_stride + token * p.k_token_stride + head * p.k_head_stride;
    Pairs<T, vector> pairs(p, k, pair);
    if (rotates) {
      pairs.rotate(p, position, pair);
      pairs.store(k);
    }
    if (at.exists) {
      append<T>(p, p.k_cache, p.kc, p.k_scale, at, head, pairs.first_at, pairs.first);
      append<T>(p, p.k_cache, p.kc, p.k_scale, at, head, pairs.second_at, pairs.second);
    }
    return;
  }
  item -= int64_t{rotations} * p.kv_heads;
  if (!at.exists) return;
  float values[vector];
  if (item < int64_t{unrotated} * p.kv_heads) {
    const int head = static_cast<int>(item / unrotated), d = p.rotary_dim + static_cast<int>(item % unrotated) * vector;
    arch::load_vector(values, static_cast<const T*>(p.k) + sequence * p.k_batch_stride + token * p.k_token_stride +
                                  head * p.k_head_stride + d);
    append<T>(p, p.k_cache, p.kc, p.k_scale, at, head, d, values);
    return;
  }
  item -= int64_t{unrotated} * p.kv_heads;
  const int head_items = p.head_dim / vector;
  if (item < int64_t{head_items} * p.kv_heads) {
    const int head = static_cast<int>(item / head_items), d = static_cast<int>(item % head_items) * vector;
    arch::load_vector(values, static_cast<const T*>(p.v) + sequence * p.v_batch_stride + token * p.v_token_stride +
                                  head * p.v_head_stride + d);
    append<T>(p, p.v_cache, p.vc, p.v_scale, at, head, d, values);
  }
}

}  // namespace flashdecpp
