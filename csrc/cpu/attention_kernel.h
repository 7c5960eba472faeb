// Decode attention for the query heads of some KV heads over a range of keys. Each key and value is loaded once, so the
// floor is the time to read them: keys * kv_heads * head_dim * 2 * sizeof(KV) bytes.
//
// Work goes by chunks of up to kChunkRows rows and blocks of up to 128 keys (16 KiB of a head's keys): the logits of
// every row, then its softmax state, then the weighted values. The register tile is kRowTile rows by kKeyTile keys.
// Rows of different tokens see different keys; a row only ever touches its own range, so a key it does not see cannot
// reach it, not even as 0 * NaN. The heads of a token are adjacent in memory, and prefetches run through them in
// address order, ahead of the arithmetic: hardware prefetchers follow such a stream, but not the order of the
// arithmetic, which visits a few keys of one head at a time.
#pragma once

#include "cpu/kernels.h"
#include "cpu/products.h"
#include "cpu/simd/simd.h"
#include "cpu/softmax.h"
#include "op_limits.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kMaxBlockKeys = 128;
inline constexpr int64_t kBlockBytes = 16384;  // of a head's keys in a block; as many of its values
inline constexpr int kPrefetchBytes = 32768;   // prefetch distance
inline constexpr int kRowTile = kManyRegisters ? 4 : 2;
inline constexpr int kKeyTile = 4;
inline constexpr int kWeightStride = kMaxBlockKeys + kLanes;  // the last vector may run past the block

// head_dim in steps of Products: full steps, and the numbers left over.
struct HeadShape {
  int full, rest;
};

// What the softmax needs of the rows of one chunk, head by head.
struct SoftmaxRows {
  alignas(64) float weights[kChunkRows][kWeightStride];                           // logits at first
  alignas(64) float reference[kChunkRows], sum[kChunkRows], maximum[kChunkRows];  // SoftmaxState of each row
  alignas(64) float rescale[kChunkRows];                                          // of acc, for this block
  alignas(64) float phi[kChunkRows];
  float scale[kChunkRows], slope[kChunkRows];
  int64_t position[kChunkRows];  // of the row's token
  int64_t first[kChunkRows];     // a row sees the keys [first, last)
  int64_t last[kChunkRows];
  int begin[kChunkRows], end[kChunkRows];  // the same within this block
};

template <class KV>
struct RowChunk : SoftmaxRows {
  using Packed = typename Products<KV>::Packed;
  alignas(64) Packed q_[kChunkRows * kMaxHeadDim];
  alignas(64) float acc_[kChunkRows * kMaxHeadDim];
  Vec dots[kRowTile * kKeyTile] = {};  // of a register tile that does not fill a vector: see store_logits
  int stride;  // between rows of q and acc: head_dim, padded. Packed this tightly, rows spread evenly over L1's sets.

  Packed* q(int row) { return q_ + row * stride; }
  const Packed* q(int row) const { return q_ + row * stride; }
  float* acc(int row) { return acc_ + row * stride; }  // sum of weights * values, in the order of load_pair<KV>
};

// A pointer per key to the chunk's first head, for this block and the next: key i of the chunk is at i % (2 * block).
// The last pointer is repeated to fill its block.
template <class KV>
struct KeyRing {
  int block, located;  // keys per block; keys located so far
  const KV *k[2 * kMaxBlockKeys], *v[2 * kMaxBlockKeys];
};

// Adds keys [key, key + count).
template <class KV>
void locate(const AttentionParams& p, int32_t b, int32_t h, int64_t key, int count, KeyRing<KV>& ring) {
  const KV* k = static_cast<const KV*>(p.k_cache) + h * p.k.head_stride;
  const KV* v = static_cast<const KV*>(p.v_cache) + h * p.v.head_stride;
  const int start = ring.located % (2 * ring.block), stop = start + count;
  int64_t table_slot = key / p.block_size;
  int64_t offset = key - table_slot * p.block_size;
  int j = start;
  for (; j < stop; ++table_slot, offset = 0) {
    int64_t id = b;
    if (p.block_table) {
      id = p.block_table[b * p.table_stride + table_slot];
      id = max(int64_t{0}, min(id, int64_t{p.num_blocks} - 1));
    }
    const KV* k_token = k + id * p.k.block_stride + offset * p.k.token_stride;
    const KV* v_token = v + id * p.v.block_stride + offset * p.v.token_stride;
    for (; offset < p.block_size && j < stop; ++offset, ++j) {
      ring.k[j] = k_token;
      ring.v[j] = v_token;
      k_token += p.k.token_stride;
      v_token += p.v.token_stride;
    }
  }
  for (; j % ring.block != 0; ++j) {
    ring.k[j] = ring.k[j - 1];
    ring.v[j] = ring.v[j - 1];
  }
  ring.located += count;
}

// What to prefetch while a tile is computed. Prefetches are spread over the arithmetic because the core has a limited
// number of outstanding requests and drops the excess.
//
// For one head: its values while its keys are used, and the next block's keys while its values are used.
template <class KV>
struct BlockPrefetcher {
  const KV* const* rows;
  const KV* const* next(int keys) {
    const KV* const* tile = rows;
    rows += keys;
    return tile;
  }
};

// For several heads, which are adjacent within a token: their keys, or their values, in memory order, kPrefetchBytes
// ahead. Past the last located key it repeats that key.
template <class KV>
class StreamPrefetcher {
 public:
  StreamPrefetcher(const KV* const* rows, const KeyRing<KV>& ring, int heads, int64_t head_stride)
      : rows_(rows), ring_(ring), heads_(heads), head_stride_(head_stride) {}

  const KV* const* next(int) {
    for (const KV*& row : tile_) {
      row = rows_[slot_] + head_ * head_stride_;
      if (++head_ < heads_) continue;
      head_ = 0;
      if (key_ + 1 == ring_.located) continue;
      ++key_;
      if (++slot_ == 2 * ring_.block) slot_ = 0;
    }
    return tile_;
  }

 private:
  const KV* const* rows_;
  const KeyRing<KV>& ring_;
  int heads_;
  int64_t head_stride_;
  int key_ = 0, slot_ = 0, head_ = 0;
  const KV* tile_[kKeyTile];
};

FLASHDECPP_INLINE void prefetch(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// f(Count<n>, first row) for rows [0, count), in tiles of kRowTile and one smaller tile for the remainder.
template <class F>
FLASHDECPP_INLINE void for_row_tiles(int count, F&& f) {
  int row = 0;
  for (; row + kRowTile <= count; row += kRowTile) f(Count<kRowTile>{}, row);
  if constexpr (kRowTile == 4) {
    if (count - row == 3) f(Count<3>{}, row);
    if (count - row == 2) f(Count<2>{}, row);
  }
  if (count - row == 1) f(Count<1>{}, row);
}

// Adds the products of the last `rest` numbers of a head, which few head_dims have, to the dots of dot_tile.
template <int kRows, class KV>
FLASHDECPP_OUTLINE void dot_rest(const RowChunk<KV>& rows, int row, const KV* const* k, int64_t k_head, HeadShape shape,
                                 Vec* dots, int stride, const KV* const* ahead) {
  using P = Products<KV>;
  const int d = shape.full * P::kStep;
  for (int i = 0; i < kKeyTile; ++i) {
    prefetch(ahead[i] + d, P::kStep * sizeof(KV));
    const typename P::Operand key = P::load_once(k[i] + k_head + d, shape.rest);
    for (int r = 0; r < kRows; ++r) P::add(dots[r * stride + i], key, P::load_packed(rows.q(row + r) + d));
  }
}

// Products of kRows rows with kKeyTile keys of their head, not yet summed over lanes: dots[row * stride + key].
template <int kRows, class KV>
FLASHDECPP_INLINE void dot_tile(const RowChunk<KV>& rows, int row, const KV* const* k, int64_t k_head, HeadShape shape,
                                Vec* dots, int stride, const KV* const* ahead) {
  using P = Products<KV>;
  Vec acc[kRows][kKeyTile];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kKeyTile; ++i) acc[r][i] = set1(0.0f);
  }
  for (int d = 0; d < shape.full * P::kStep; d += P::kStep) {
    typename P::Operand key[kKeyTile];
    for (int i = 0; i < kKeyTile; ++i) {
      prefetch(ahead[i] + d, P::kStep * sizeof(KV));
      key[i] = P::load_once(k[i] + k_head + d);
    }
    for (int r = 0; r < kRows; ++r) {
      const typename P::Operand query = P::load_packed(rows.q(row + r) + d);
      for (int i = 0; i < kKeyTile; ++i) P::add(acc[r][i], key[i], query);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kKeyTile; ++i) dots[r * stride + i] = acc[r][i];
  }
  if (shape.rest) dot_rest<kRows>(rows, row, k, k_head, shape, dots, stride, ahead);
}

// Unscaled logits of rows [row, row + kRows) for kKeyTile keys, from their dots.
template <int kRows, class KV>
FLASHDECPP_INLINE void store_logits(RowChunk<KV>& rows, int row, int column) {
  alignas(64) float sums[kRowTile * kKeyTile];
  for (int i = 0; i < kRows * kKeyTile; i += kLanes) {
    Vec dots[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) dots[lane] = rows.dots[i + lane];
    store(sums + i, sum_each(dots));
  }
  for (int r = 0; r < kRows; ++r) {
    __builtin_memcpy(rows.weights[row + r] + column, sums + r * kKeyTile, kKeyTile * sizeof(float));
  }
}

// The logits of one head's rows over a block of keys, a vector or a tile of keys at a time, whichever is larger.
template <class KV>
void logits(RowChunk<KV>& rows, const KV* const* k, int count, int keys, HeadShape shape,
            BlockPrefetcher<KV> prefetcher) {
  constexpr int kKeys = kLanes > kKeyTile ? kLanes : kKeyTile;
  for (int column = 0; column < keys; column += kKeys) {
    const KV* const* ahead = prefetcher.next(kKeys);
    for_row_tiles(count, [&](auto tile, int row) __attribute__((always_inline)) {
      Vec dots[tile.value][kKeys];
      for (int j = 0; j < kKeys; j += kKeyTile) {
        dot_tile<tile.value>(rows, row, k + column + j, 0, shape, &dots[0][j], kKeys, ahead + j);
      }
      for (int r = 0; r < tile.value; ++r) store(rows.weights[row + r] + column, sum_each(dots[r]));
    });
  }
}

// The logits of several heads' rows for a tile of keys.
template <class KV>
void logits(RowChunk<KV>& rows, const KV* const* k, int64_t head_stride, int heads, int head_rows, HeadShape shape,
            int column, StreamPrefetcher<KV>& prefetcher) {
  if (head_rows == 1) {  // each row of a tile belongs to a head of its own
    for_row_tiles(heads, [&](auto tile, int row) __attribute__((always_inline)) {
      for (int r = 0; r < tile.value; ++r) {
        const KV* const* ahead = prefetcher.next(kKeyTile);
        dot_tile<1>(rows, row + r, k, (row + r) * head_stride, shape, rows.dots + r * kKeyTile, kKeyTile, ahead);
      }
      store_logits<tile.value>(rows, row, column);
    });
    return;
  }
  for (int i = 0; i < heads; ++i) {
    const KV* const* ahead = prefetcher.next(kKeyTile);
    for_row_tiles(head_rows, [&](auto tile, int in_head) __attribute__((always_inline)) {
      const int row = i * head_rows + in_head;
      dot_tile<tile.value>(rows, row, k, i * head_stride, shape, rows.dots, kKeyTile, ahead);
      store_logits<tile.value>(rows, row, column);
    });
  }
}

// acc[r][d ...] += sum over keys [begin, end) of weight[r][key] * v[key][d ...], for kPairs pairs of vectors, or, if
// kPartial, for the first `rest` numbers of one pair.
template <int kRows, int kPairs, bool kPartial, class KV>
FLASHDECPP_INLINE void values_tile(RowChunk<KV>& rows, int row, const KV* const* v, int64_t offset, int column,
                                   int begin, int end, int d, int rest, const KV* const* ahead) {
  constexpr int kStep = Products<KV>::kStep;
  Pair acc[kRows][kPairs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kPairs; ++i) {
      const float* from = rows.acc(row + r) + d + i * kStep;
      acc[r][i] = {load(from), load(from + kLanes)};
    }
  }
  for (int j = begin; j < end; ++j) {
    prefetch(ahead[j - column] + d, kPairs * kStep * sizeof(KV));
    const KV* from = v[j - column] + offset + d;
    Pair value[kPairs];
    for (int i = 0; i < kPairs; ++i) {
      value[i] = kPartial ? load_pair(from, rest) : load_pair(from + i * kStep);
      if constexpr (kRows > 1) keep_in_register(value[i]);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = set1(rows.weights[row + r][j]);
      for (int i = 0; i < kPairs; ++i) {
        acc[r][i].first = fma(weight, value[i].first, acc[r][i].first);
        acc[r][i].second = fma(weight, value[i].second, acc[r][i].second);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kPairs; ++i) store_pair(rows.acc(row + r) + d + i * kStep, acc[r][i]);
  }
}

// The numbers of a head after its last whole step, which few head_dims have.
template <int kRows, class KV>
FLASHDECPP_OUTLINE void values_rest(RowChunk<KV>& rows, int row, const KV* const* v, int64_t offset, int column,
                                    int begin, int end, HeadShape shape, const KV* const* ahead) {
  const int d = shape.full * Products<KV>::kStep;
  values_tile<kRows, 1, true>(rows, row, v, offset, column, begin, end, d, shape.rest, ahead);
}

template <int kRows, class KV>
FLASHDECPP_INLINE void values_rows(RowChunk<KV>& rows, int row, const KV* const* v, int64_t offset, int column,
                                   int begin, int end, HeadShape shape, const KV* const* ahead) {
  constexpr int kStep = Products<KV>::kStep;
  int i = 0;
  for (; i + 2 <= shape.full; i += 2) {
    values_tile<kRows, 2, false>(rows, row, v, offset, column, begin, end, i * kStep, 0, ahead);
  }
  if (i < shape.full) values_tile<kRows, 1, false>(rows, row, v, offset, column, begin, end, i * kStep, 0, ahead);
  if (shape.rest) values_rest<kRows>(rows, row, v, offset, column, begin, end, shape, ahead);
}

// accumulate_rows where not all rows see all keys: jointly over the keys [begin, end) that they all see, then row by
// row over the others.
template <int kRows, class KV>
FLASHDECPP_OUTLINE void accumulate_edges(RowChunk<KV>& rows, int row, const KV* const* v, int64_t offset, int column,
                                         int stop, int begin, int end, HeadShape shape, const KV* const* ahead) {
  values_rows<kRows>(rows, row, v, offset, column, begin, end, shape, ahead);
  for (int r = row; r < row + kRows; ++r) {
    const int own = max(rows.begin[r], column), last = min(rows.end[r], stop);
    const int edges[2][2] = {{own, min(last, begin)}, {max(own, end), last}};
    for (const auto& [from, to] : edges) {
      if (from < to) values_rows<1>(rows, r, v, offset, column, from, to, shape, ahead);
    }
  }
}

// Adds the weighted values of kRows rows of one head over the keys of [column, stop) that each row sees.
template <int kRows, class KV>
FLASHDECPP_INLINE void accumulate_rows(RowChunk<KV>& rows, int row, const KV* const* v, int64_t offset, int column,
                                       int stop, HeadShape shape, const KV* const* ahead) {
  int begin = column, end = stop;
  for (int r = row; r < row + kRows; ++r) {
    begin = max(rows.begin[r], begin);
    end = min(rows.end[r], end);
  }
  if (begin == column && end == stop) {
    values_rows<kRows>(rows, row, v, offset, column, column, stop, shape, ahead);
  } else {
    accumulate_edges<kRows>(rows, row, v, offset, column, stop, begin, max(begin, end), shape, ahead);
  }
}

// Adds the weighted values of a chunk's rows over keys [column, column + keys) of the block.
template <class KV, class Prefetcher>
FLASHDECPP_INLINE void accumulate(RowChunk<KV>& rows, const KV* const* v, int64_t head_stride, int heads, int head_rows,
                                  HeadShape shape, int column, int keys, Prefetcher&& prefetcher) {
  for (int i = 0; i < heads; ++i) {
    const KV* const* ahead = prefetcher.next(keys);
    for_row_tiles(head_rows, [&](auto tile, int in_head) __attribute__((always_inline)) {
      accumulate_rows<tile.value>(rows, i * head_rows + in_head, v, i * head_stride, column, column + keys, shape,
                                  ahead);
    });
  }
}

// Turns the logits of rows [row_begin, row_end), at most kLanes of them, into weights over the block's keys that each
// row sees, and updates their softmax states. Logits have keys as lanes; states have rows as lanes.
template <class Reference>
void softmax_rows(const AttentionParams& p, SoftmaxRows& rows, int row_begin, int row_end, int64_t key,
                  Reference reference_of) {
  static constexpr float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec lane = load(kIota), zero = set1(0.0f), hidden = set1(-kInf);
  alignas(64) float largest[kLanes], subtracted[kLanes];
  Vec totals[kLanes];
  store(largest, hidden);
  for (Vec& total : totals) total = zero;
  for (int r = row_begin; r < row_end; ++r) {
    float* x = rows.weights[r];
    const Vec scale = set1(rows.scale[r]), slope = set1(rows.slope[r]);
    Vec top = hidden, not_finite = zero;
    for (int j = rows.begin[r]; j < rows.end[r]; j += kLanes) {
      Vec y = load(x + j) * scale;
      if (p.softcap > 0) y = set1(p.softcap) * tanh(y / set1(p.softcap));
      if (p.alibi_slopes) y = y - slope * (set1(static_cast<float>(rows.position[r] - key - j)) - lane);
      Vec seen = y;
      if (rows.end[r] - j < kLanes) {
        const Vec count = set1(static_cast<float>(rows.end[r] - j));
        seen = where_less(lane, count, y, zero);
        y = where_less(lane, count, y, hidden);
      }
      not_finite = fma(seen, zero, not_finite);  // inf * 0 and NaN * 0 are NaN, all else gives 0
      top = max(top, y);
      store(x + j, y);
    }
    largest[r - row_begin] = max_lane(top);
    totals[r - row_begin] = not_finite;  // a non-finite logit makes the row's sum NaN for good
  }

  const Vec old = load(rows.reference + row_begin), maximum = max(load(rows.maximum + row_begin), load(largest));
  const Vec reference = reference_of(maximum);
  const Vec rescale =
      where_equal(old, reference, set1(1.0f), where_equal(old, hidden, zero, exp_difference(old, reference)));
  store(subtracted, where_equal(reference, hidden, zero, reference));  // -inf - -inf would be NaN
  for (int r = row_begin; r < row_end; ++r) {
    float* x = rows.weights[r];
    const Vec from = set1(subtracted[r - row_begin]);
    Vec total = totals[r - row_begin];
    for (int j = rows.begin[r]; j < rows.end[r]; j += kLanes) {
      const Vec weight = exp_difference(load(x + j), from);
      total = total + weight;
      store(x + j, weight);
    }
    totals[r - row_begin] = total;
  }
  store(rows.maximum + row_begin, maximum);
  store(rows.reference + row_begin, reference);
  store(rows.rescale + row_begin, rescale);
  store(rows.sum + row_begin, fma(load(rows.sum + row_begin), rescale, sum_each(totals)));
}

// Packs a query of n numbers for products with keys of type KV and pads it with zeros. Its dtype is KV unless KV is
// fp8.
template <class KV>
void pack_query(typename Products<KV>::Packed* out, const void* q, int64_t offset, int n, DType dtype) {
  using P = Products<KV>;
  if constexpr (sizeof(KV) > 1) {
    const KV* x = static_cast<const KV*>(q) + offset;
    int i = 0;
    for (; i + P::kStep <= n; i += P::kStep) P::pack(out + i, x + i);
    if (i < n) P::pack(out + i, x + i, n - i);
  } else {
    const auto widen = [&](const auto* x) {
      for (int i = 0; i < n; i += kLanes) store(out + i, i + kLanes <= n ? load(x + i) : load(x + i, n - i));
      for (int i = (n + kLanes - 1) / kLanes * kLanes; i % P::kStep != 0; i += kLanes) store(out + i, set1(0.0f));
    };
    switch (dtype) {
      case DType::kFloat32: return widen(static_cast<const float*>(q) + offset);
      case DType::kFloat16: return widen(static_cast<const fp16*>(q) + offset);
      default: return widen(static_cast<const bf16*>(q) + offset);
    }
  }
}

template <class T>
FLASHDECPP_INLINE void write_row(T* out, const float* x, int n, float scale) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * set1(scale));
  if (i < n) store(out + i, load(x + i, n - i) * set1(scale), n - i);
}

// Finishes a row: normalizes acc into out, and writes lse and the row maximum. Returns 1 if the row fell back from phi.
inline int32_t finish_row(const AttentionParams& p, int b, int h, int row, const SoftmaxState& state,
                          const float* acc) {
  const int group = p.q_heads / p.kv_heads, token = row / group, head = h * group + row % group;
  const float sink = p.sinks ? p.sinks[head] : -kInf;
  float scale = 0.0f, lse = sink;
  if (!state.empty()) {
    const float top = max(state.maximum, sink);
    const float kept = exp_difference(state.reference, top);
    const float total = state.sum * kept + (p.sinks ? exp_difference(sink, top) : 0.0f);
    scale = kept / total * (p.v_scale ? p.v_scale[h] : 1.0f);
    lse = top + __builtin_logf(total);
  }
  const int64_t index = (int64_t{b} * p.q_len + token) * p.q_heads + head;
  switch (p.q_dtype) {
    case DType::kFloat32: write_row(static_cast<float*>(p.out) + index * p.head_dim, acc, p.head_dim, scale); break;
    case DType::kFloat16: write_row(static_cast<fp16*>(p.out) + index * p.head_dim, acc, p.head_dim, scale); break;
    default: write_row(static_cast<bf16*>(p.out) + index * p.head_dim, acc, p.head_dim, scale); break;
  }
  p.lse[(int64_t{b} * p.q_heads + head) * p.q_len + token] = lse;
  if (!p.phi || state.empty() || state.sum != state.sum) return 0;
  const bool fits = PhiReference::fits(p.phi[b * p.phi_batch_stride + head], state.maximum);
  // A head's last token is its last row to be finished, so nothing reads phi after this.
  if (p.row_max && token == p.q_len - 1) p.row_max[b * p.row_max_batch_stride + head] = state.maximum;
  return fits ? 0 : 1;
}

// Keys per block: the same for every task, so that a row's bits do not depend on the rest of its task.
template <class KV>
int block_keys(int head_dim) {
  const int64_t row_bytes = head_dim * static_cast<int64_t>(sizeof(KV));
  return static_cast<int>(max(int64_t{16}, min(kBlockBytes / row_bytes, int64_t{kMaxBlockKeys}) / 16 * 16));
}

// Rows [row_begin, row_begin + head_rows) of each of the KV heads [h_begin, h_begin + heads). Returns the number of
// fallbacks among the rows it finished.
template <bool kOneHead, class KV>
int32_t attend_chunk(const AttentionParams& p, const AttentionTask& task, int h_begin, int heads, int row_begin,
                     int head_rows, RowChunk<KV>& rows, KeyRing<KV>& ring) {
  constexpr int kStep = Products<KV>::kStep;
  constexpr float kLoadScale = sizeof(KV) == 1 ? kFp8LoadScale : 1.0f;
  const int group = p.group(), count = heads * head_rows, block = block_keys<KV>(p.head_dim);
  const HeadShape shape = {p.head_dim / kStep, p.head_dim % kStep};
  const int row_bytes = p.head_dim * static_cast<int>(sizeof(KV));
  const int padded = (p.head_dim + kStep - 1) / kStep * kStep;

  rows.stride = padded;
  int64_t first = task.key_end, last = task.key_begin;  // the union of the rows' ranges
  for (int r = 0; r < kChunkRows; r += kLanes) {        // unused lanes included
    store(rows.reference + r, set1(-kInf));
    store(rows.maximum + r, set1(-kInf));
    store(rows.sum + r, set1(0.0f));
    store(rows.phi + r, set1(0.0f));
  }
  for (int r = 0; r < count; ++r) {
    const int h = h_begin + r / head_rows, in_head = row_begin + r % head_rows;
    const int token = in_head / group, head = h * group + in_head % group;
    const int64_t offset = task.b * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
    pack_query<KV>(rows.q(r), p.q, offset, p.head_dim, p.q_dtype);
    for (int i = 0; i < padded; i += kLanes) store(rows.acc(r) + i, set1(0.0f));
    rows.scale[r] = p.scale * kLoadScale * (p.k_scale ? p.k_scale[h] : 1.0f);
    rows.slope[r] = p.alibi_slopes ? p.alibi_slopes[head] : 0.0f;
    if (p.phi) rows.phi[r] = p.phi[task.b * p.phi_batch_stride + head];
    rows.position[r] = task.length - p.q_len + token;
    rows.first[r] = max(p.window > 0 ? rows.position[r] - p.window + 1 : int64_t{0}, task.key_begin);
    rows.last[r] = min(rows.position[r] + 1, task.key_end);
    if (rows.first[r] < rows.last[r]) {
      first = min(first, rows.first[r]);
      last = max(last, rows.last[r]);
    }
  }

  const auto keys_at = [&](int64_t key) { return static_cast<int>(max(int64_t{0}, min(int64_t{block}, last - key))); };
  ring.block = block;
  ring.located = 0;
  StreamPrefetcher<KV> keys(ring.k, ring, heads, p.k.head_stride), values(ring.v, ring, heads, p.v.head_stride);
  if (first < last) {
    locate(p, task.b, h_begin, first, keys_at(first), ring);
    if constexpr (kOneHead) {
      for (int j = 0; j < ring.located; ++j) prefetch(ring.k[j], row_bytes);
    } else {
      for (int row = min(kPrefetchBytes / row_bytes, ring.located * heads); row > 0; row -= kKeyTile) {
        const KV *const *k = keys.next(kKeyTile), *const *v = values.next(kKeyTile);
        for (int i = 0; i < kKeyTile; ++i) {
          prefetch(k[i], row_bytes);
          prefetch(v[i], row_bytes);
        }
      }
    }
  }
  int base = 0;  // this block's start in the ring
  for (int64_t key = first; key < last; key += block, base ^= block) {
    const int here = keys_at(key);
    if (key + block < last) locate(p, task.b, h_begin, key + block, keys_at(key + block), ring);

    if constexpr (kOneHead) {
      logits(rows, ring.k + base, count, here, shape, BlockPrefetcher<KV>{ring.v + base});
    } else {
      for (int j = 0; j < here; j += kKeyTile) {
        logits(rows, ring.k + base + j, p.k.head_stride, heads, head_rows, shape, j, keys);
      }
    }

    for (int r = 0; r < count; ++r) {
      rows.begin[r] = static_cast<int>(max(int64_t{0}, min(rows.first[r] - key, int64_t{here})));
      rows.end[r] = static_cast<int>(max(int64_t{0}, min(rows.last[r] - key, int64_t{here})));
    }
    for (int r = 0; r < count; r += kLanes) {
      const int end = min(r + kLanes, count);
      if (p.phi) {
        softmax_rows(p, rows, r, end, key, PhiReference{load(rows.phi + r)});
      } else {
        softmax_rows(p, rows, r, end, key, MaxReference{});
      }
    }

    for (int r = 0; r < count; ++r) {
      if (rows.rescale[r] == 1.0f) continue;
      for (int i = 0; i < padded; i += kLanes) store(rows.acc(r) + i, set1(rows.rescale[r]) * load(rows.acc(r) + i));
    }
    if constexpr (kOneHead) {
      const KV* const* next = ring.k + (key + block < last ? base ^ block : base);
      accumulate(rows, ring.v + base, 0, 1, head_rows, shape, 0, here, BlockPrefetcher<KV>{next});
    } else {
      for (int j = 0; j < here; j += kKeyTile) {
        accumulate(rows, ring.v + base + j, p.v.head_stride, heads, head_rows, shape, j, kKeyTile, values);
      }
    }
  }

  int32_t fallbacks = 0;
  for (int r = 0; r < count; ++r) {
    float* acc = rows.acc(r);
    for (int i = 0; i < padded; i += kStep) {
      const Vec scale = set1(kLoadScale);
      store_in_order(acc + i, Pair{load(acc + i) * scale, load(acc + i + kLanes) * scale}, KV{});
    }
    const int h = h_begin + r / head_rows, in_head = row_begin + r % head_rows;
    const SoftmaxState state = {rows.reference[r], rows.sum[r], rows.maximum[r]};
    if (!task.partial) {
      fallbacks += finish_row(p, task.b, h, in_head, state, acc);
      continue;
    }
    const int64_t index = int64_t{h - task.head_begin} * p.q_len * group + in_head;
    float* partial = task.partial + index * (kPartialHeader + p.head_dim);
    partial[0] = state.reference;
    partial[1] = state.sum;
    partial[2] = state.maximum;
    write_row(partial + kPartialHeader, acc, p.head_dim, 1.0f);
  }
  return fallbacks;
}

template <class KV>
int32_t attend_typed(const AttentionParams& p, const AttentionTask& task) {
  const int total_rows = p.q_len * p.group();
  const int chunk_heads = max(1, kChunkRows / total_rows);
  RowChunk<KV> rows;
  KeyRing<KV> ring;
  int32_t fallbacks = 0;
  for (int h = task.head_begin; h < task.head_end; h += chunk_heads) {
    const int heads = min(chunk_heads, task.head_end - h);
    for (int row = 0; row < total_rows; row += kChunkRows) {
      const auto attend = heads == 1 ? attend_chunk<true, KV> : attend_chunk<false, KV>;
      fallbacks += attend(p, task, h, heads, row, min(kChunkRows, total_rows - row), rows, ring);
    }
  }
  return fallbacks;
}

static int32_t attend(const AttentionParams& p, const AttentionTask& task) {
  switch (p.kv_dtype) {
    case DType::kFloat32: return attend_typed<float>(p, task);
    case DType::kFloat16: return attend_typed<fp16>(p, task);
    case DType::kBFloat16: return attend_typed<bf16>(p, task);
    case DType::kFloat8E4M3: return attend_typed<fp8>(p, task);
    default: return 0;
  }
}

static int32_t combine(const AttentionParams& p, const AttentionTask& task, const float* partials, int64_t splits) {
  const int head_rows = p.q_len * p.group(), rows = (task.head_end - task.head_begin) * head_rows;
  const int64_t row_stride = kPartialHeader + p.head_dim, split_stride = p.kv_heads * head_rows * row_stride;
  int32_t fallbacks = 0;
  alignas(64) float acc[kMaxHeadDim];
  for (int row = 0; row < rows; ++row) {
    const float* row_partials = partials + row * row_stride;
    SoftmaxState state;
    for (int64_t s = 0; s < splits; ++s) state.maximum = max(state.maximum, row_partials[s * split_stride + 2]);
    state.reference = state.maximum;
    for (int d = 0; d < p.head_dim; d += kLanes) store(acc + d, set1(0.0f));
    for (int64_t s = 0; s < splits; ++s) {
      const float* partial = row_partials + s * split_stride;
      const SoftmaxState split = {partial[0], partial[1], partial[2]};
      if (split.empty()) continue;
      const float rescale = exp_difference(split.reference, state.reference);
      state.sum += split.sum * rescale;
      int d = 0;
      for (; d + kLanes <= p.head_dim; d += kLanes) {
        store(acc + d, fma(set1(rescale), load(partial + kPartialHeader + d), load(acc + d)));
      }
      if (d < p.head_dim) {
        store(acc + d, fma(set1(rescale), load(partial + kPartialHeader + d, p.head_dim - d), load(acc + d)));
      }
    }
    fallbacks += finish_row(p, task.b, task.head_begin + row / head_rows, row % head_rows, state, acc);
  }
  return fallbacks;
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
