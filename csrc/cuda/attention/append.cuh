// Decode attention that appends: q, k and v of the new tokens come as a projection wrote them, and one launch rotates q
// and k, stores k and v in the cache, and attends. The bits are those of rotary_append and decode_attention.
//
// Every warp rotates its queries on their way to shared memory. Keys and values of new tokens are stored in the cache
// by the last warp of each CTA, some by each, and nobody waits for that: the warp that processes their KV tile puts
// them into its stage itself, after the copies from the cache, whose rows for them may hold anything.
//
// All other keys were in the cache before, so copies of the first KV tiles start before the preceding kernel, which
// only computes q, k and v, has finished. What makes that safe is that no kernel of this library which writes to a cache
// lets its successor start before it has: then any kernel's writes to a cache are done when a later one starts.
#pragma once

#include "cuda/attention/scheduler.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/elementwise/rotary.cuh"

namespace flashdecpp {

inline constexpr int kAppendVector = 8;  // elements that a lane handles at a time; append_fits() is the condition

// Requests the angles of a sequence's new tokens, which the weights may have evicted from L2.
__device__ __forceinline__ void prefetch_angles(const RotaryParams& p, int first_position) {
  constexpr int line = 32;  // elements
  const int lines = (p.rotary_dim + line - 1) / line;
  for (int i = arch::lane(); i < lines * p.q_len; i += arch::kWarpSize) {
    const int position = first_position + i / lines;
    if (position < 0 || position >= p.max_positions) continue;
    arch::prefetch(p.cos_sin + position * p.cos_sin_stride + i % lines * line);
  }
}

// Writes eight columns of a query from column `dim` on; for a float8 cache in the permuted order of widened K.
template <class Tile>
__device__ __forceinline__ void store_query(typename Tile::T* row, int dim, const float (&values)[kAppendVector]) {
  if constexpr (!Tile::kWiden || arch::kWidenedInOrder) {
    arch::store_vector(row + dim, values);
  } else {
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int column = arch::widened_k(k) - dim % 16;
#pragma unroll
      for (int i = 0; i < kAppendVector; ++i) {
        if (column == i) row[dim / 16 * 16 + k] = arch::from_float<typename Tile::T>(values[i]);
      }
    }
  }
}

// Loads the queries of one work tile, rotated, zero-padded to kDims columns.
template <class Tile>
__device__ __forceinline__ void load_rotated_queries(const AttentionLaunch& launch, const QueryTile& queries,
                                                     typename Tile::T* q) {
  using T = typename Tile::T;
  const RotaryParams& p = launch.rotary;
  const int rotations = p.rotary_dim / 2 / kAppendVector,
            items = rotations + (Tile::kDims - p.rotary_dim) / kAppendVector;
#pragma unroll 1
  for (int index = arch::lane(); index < queries.count * items; index += arch::kWarpSize) {
    const int row = index / items, item = index - row * items;
    const T* from = static_cast<const T*>(p.q) + queries.batch * p.q_batch_stride +
                    queries.token(launch, row) * p.q_token_stride + queries.head(launch, row) * p.q_head_stride;
    T* to = q + row * Tile::kQStride;
    if (item < rotations) {
      const int position = queries.position(launch, row), pair = item * kAppendVector;
      Pairs<T, kAppendVector> pairs(p, from, pair);
      if (position >= 0 && position < p.max_positions) pairs.rotate(p, position, pair);
      store_query<Tile>(to, pairs.first_at, pairs.first);
      store_query<Tile>(to, pairs.second_at, pairs.second);
    } else {
      const int dim = p.rotary_dim + (item - rotations) * kAppendVector;
      float values[kAppendVector] = {};
      if (dim < p.head_dim) arch::load_vector(values, from + dim);
      store_query<Tile>(to, dim, values);
    }
  }
}

// The key and the value of a new token for one KV head, in items of eight pairs or elements.
__device__ __forceinline__ int new_token_items(const RotaryParams& p) {
  return (p.rotary_dim / 2 + (p.head_dim - p.rotary_dim) + p.head_dim) / kAppendVector;
}

// Calls store(is_value, d, values) for the runs of elements of one item, from element d on.
template <class T, class Store>
__device__ __forceinline__ void load_new_token(const RotaryParams& p, int64_t sequence, int token, int position,
                                               int head, int item, Store store) {
  const auto start = [&](const void* x, int64_t batch_stride, int64_t token_stride, int64_t head_stride) {
    return static_cast<const T*>(x) + sequence * batch_stride + token * token_stride + head * head_stride;
  };
  const T* k = start(p.k, p.k_batch_stride, p.k_token_stride, p.k_head_stride);
  const int rotations = p.rotary_dim / 2 / kAppendVector, key_items = new_token_items(p) - p.head_dim / kAppendVector;
  if (item < rotations) {
    const int pair = item * kAppendVector;
    Pairs<T, kAppendVector> pairs(p, k, pair);
    if (position < p.max_positions) pairs.rotate(p, position, pair);
    store(false, pairs.first_at, pairs.first);
    store(false, pairs.second_at, pairs.second);
    return;
  }
  const bool is_value = item >= key_items;
  const int d = is_value ? (item - key_items) * kAppendVector : p.rotary_dim + (item - rotations) * kAppendVector;
  float values[kAppendVector];
  arch::load_vector(values, (is_value ? start(p.v, p.v_batch_stride, p.v_token_stride, p.v_head_stride) : k) + d);
  store(is_value, d, values);
}

// Stores this CTA's share of the new keys and values in the cache. One warp calls it.
template <class T>
__device__ __forceinline__ void append_new_tokens(const AttentionLaunch& launch) {
  const RotaryParams& p = launch.rotary;
  const int items = new_token_items(p);
#pragma unroll 1
  for (int64_t i = blockIdx.x; i < int64_t{p.batch} * p.q_len * p.kv_heads; i += gridDim.x) {
    const int64_t row = i / p.kv_heads, sequence = row / p.q_len;
    const int head = static_cast<int>(i - row * p.kv_heads), token = static_cast<int>(row - sequence * p.q_len);
    const int position = Sequence::load(launch.p, static_cast<int>(sequence)).length - p.q_len + token;
    const CacheSlot at = find_slot(p, sequence, position);
    if (!at.exists) continue;
#pragma unroll 1
    for (int item = arch::lane(); item < items; item += arch::kWarpSize) {
      load_new_token<T>(p, sequence, token, position, head, item,
                        [&](bool is_value, int d, const float(&values)[kAppendVector]) {
                          if (is_value) {
                            append<T>(p, p.v_cache, p.vc, p.v_scale, at, head, d, values);
                          } else {
                            append<T>(p, p.k_cache, p.kc, p.k_scale, at, head, d, values);
                          }
                        });
    }
  }
}

// Puts the new keys and values of a KV tile that has arrived into its stage. `key_begin` is the tile's first key.
template <class Tile, class Stages>
__device__ __forceinline__ void insert_new_tokens(const AttentionLaunch& launch, const Segment& segment, int key_begin,
                                                  Stages& stages, int stage) {
  using KV = typename Tile::KV;
  const RotaryParams& p = launch.rotary;
  const int length = segment.sequence.length, first_position = length - p.q_len;
  const int begin = max(key_begin, first_position), end = min(key_begin + kKvTile, length);
  if (begin >= end) return;
  const auto keys = stages.keys(stage), values_of = stages.values(stage);
  const int items = new_token_items(p);
#pragma unroll 1
  for (int index = arch::lane(); index < (end - begin) * items; index += arch::kWarpSize) {
    const int within = index / items, position = begin + within, row = position - key_begin;
    load_new_token<typename Tile::T>(
        p, segment.batch, position - first_position, position, segment.kv_head, index - within * items,
        [&](bool is_value, int d, const float(&values)[kAppendVector]) {
          const auto& rows = is_value ? values_of : keys;
          const int byte = d * static_cast<int>(sizeof(KV));
          auto* chunk = const_cast<unsigned char*>(rows.moved(rows.chunk(row, 0), byte / 16)) + byte % 16;
          store_cached(reinterpret_cast<KV*>(chunk), values, is_value ? p.v_scale : p.k_scale, segment.kv_head);
        });
  }
  stages.release_writes();
}

}  // namespace flashdecpp
