// Rotation of pairs, and the place of a new token in the cache: what rotary_append and attention's append share.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

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

// Stores `values` of a key or value of `head` as the cache holds them: as they are, or in float8 over the head's scale.
template <class KV, int vector>
__device__ __forceinline__ void store_cached(KV* to, const float (&values)[vector], const float* scales, int head) {
  if constexpr (sizeof(KV) == 1) {
    const float scale = scales ? scales[head] : 1.f;
    float scaled[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i) scaled[i] = values[i] / scale;
    arch::store_vector(to, scaled);
  } else {
    arch::store_vector(to, values);
  }
}

// Writes `values` of `head`, from element d on, to a cache of T or float8.
template <class T, int vector>
__device__ __forceinline__ void append(const RotaryParams& p, void* cache, const CacheLayout& layout,
                                       const float* scales, const CacheSlot& at, int head, int d,
                                       const float (&values)[vector]) {
  const int64_t offset = at.block * layout.block_stride + at.slot * layout.token_stride + head * layout.head_stride + d;
  if (p.kv_dtype == DType::kFloat8E4M3) {
    store_cached(static_cast<arch::float8*>(cache) + offset, values, scales, head);
  } else {
    store_cached(static_cast<T*>(cache) + offset, values, scales, head);
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

}  // namespace flashdecpp
