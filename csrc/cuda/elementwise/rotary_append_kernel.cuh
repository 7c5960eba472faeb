// Rotary embedding of q and k in place, and the append of k and v to the cache.
//
// A CTA processes items of one token, one per thread: `vector` pairs of a head of q or k to rotate, or `vector`
// elements of v or of k's unrotated columns to copy. Every element of q and k belongs to one thread, so rotating in
// place needs no barrier. No shared memory. Floor: the bytes of q, k and v, each read and written once, over the memory
// bandwidth; in decode, latency.
//
// It lets the next kernel start only by ending: attention may read the cache before it waits (attention/append.cuh).
#pragma once

#include "cuda/elementwise/rotary.cuh"

namespace flashdecpp {

inline constexpr int kRotaryThreads = 256;

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
