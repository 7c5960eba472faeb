// Decode attention of the query heads of some KV heads over a range of keys: each key and value is loaded once.
//
// Block by block: the logits of every row, then its softmax state, then the weighted values. Rows of different tokens
// see different keys; a row only ever works on its own range, so that a key it does not see cannot reach it, not even
// as 0 * NaN. Memory is fetched in the order of its addresses, a little ahead of the work, for the heads of one token
// lie side by side: what the processor fetches by itself follows such a stream, and not the few keys at a time, head by
// head, that the arithmetic wants.
#pragma once

#include "cpu/kernels.h"
#include "cpu/products.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kMaxBlockKeys = 128;
inline constexpr int64_t kBlockBytes = 16384;  // of a head's keys in a block, and of its values
inline constexpr int kFetchBytes = 32768;      // how far memory is fetched ahead of the work
inline constexpr int kMaxHeadDim = 256;        // the op's contract
inline constexpr int kRowTile = kManyRegisters ? 4 : 2;
inline constexpr int kKeyTile = 4;
inline constexpr int kWeightStride = kMaxBlockKeys + kLanes;  // a last vector may run past the block

// How head_dim divides into what Products reads at once.
struct HeadShape {
  int full, rest;
};

// The rows that are worked on together, head by head.
template <class KV>
struct RowChunk {
  using Packed = typename Products<KV>::Packed;
  alignas(64) Packed q_[kTaskRows * kMaxHeadDim];
  alignas(64) float acc_[kTaskRows * kMaxHeadDim];
  alignas(64) float weights[kTaskRows][kWeightStride];                         // first the logits
  alignas(64) float reference[kTaskRows], sum[kTaskRows], maximum[kTaskRows];  // SoftmaxState of each row
  alignas(64) float rescale[kTaskRows];                                        // of acc, in this block
  alignas(64) float phi[kTaskRows];
  float scale[kTaskRows], slope[kTaskRows];
  Vec dots[kRowTile * kKeyTile] = {};  // of a tile whose rows are no whole vectors: see store_logits
  int64_t position[kTaskRows];         // of its token
  int64_t first[kTaskRows];            // the keys that a row sees: [first, last)
  int64_t last[kTaskRows];
  int begin[kTaskRows], end[kTaskRows];  // the same within this block
  int stride;  // of a row of q and acc: head_dim, padded. Close together they share the nearest cache evenly.

  Packed* q(int row) { return q_ + row * stride; }
  const Packed* q(int row) const { return q_ + row * stride; }
  float* acc(int row) { return acc_ + row * stride; }  // sum of weights * values, in the order of load_pair<KV>
};

// One pointer a key, to the first head of a chunk, for this block and the next in turn: key i of the chunk is at
// i % (2 * block). The last one is repeated to a whole block.
template <class KV>
struct KeyRing {
  int block, located;  // keys of a block, and in all so far
  const KV *k[2 * kMaxBlockKeys], *v[2 * kMaxBlockKeys];
};

// Adds the `count` keys from `key` on.
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

// What to fetch while a tile is worked on, spread over the work, for memory has only so many requests under way and
// drops what comes too fast. Of one head: the values while their keys are worked on, and then the next block's keys.
template <class KV>
struct OtherBlock {
  const KV* const* rows;
  const KV* const* next(int keys) {
    const KV* const* tile = rows;
    rows += keys;
    return tile;
  }
};

// Of the heads of a token, which lie side by side: their keys, or their values, in the order of memory, kFetchBytes
// ahead of the work; the last key again where no more are located.
template <class KV>
class Stream {
 public:
  Stream(const KV* const* rows, const KeyRing<KV>& ring, int heads, int64_t head_stride)
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

// f(Count<n>, first row) for the rows [0, count) in tiles of kRowTile and one of what is left.
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

// Products of kRows rows with kKeyTile keys of their head, one lane of a sum in every lane: dots[row * stride + key].
template <int kRows, class KV>
FLASHDECPP_INLINE void dot_tile(const RowChunk<KV>& rows, int row, const KV* const* k, int64_t k_head, HeadShape shape,
                                Vec* dots, int stride, const KV* const* ahead) {
  using P = Products<KV>;
  Vec acc[kRows][kKeyTile];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kKeyTile; ++i) acc[r][i] = set1(0.0f);
  }
  auto step = [&](int d, auto&& load_key) __attribute__((always_inline)) {
    typename P::Operand key[kKeyTile];
    for (int i = 0; i < kKeyTile; ++i) {
      prefetch(ahead[i] + d, P::kStep * sizeof(KV));
      key[i] = load_key(k[i] + k_head + d);
    }
    for (int r = 0; r < kRows; ++r) {
      const typename P::Operand query = P::load_packed(rows.q(row + r) + d);
      for (int i = 0; i < kKeyTile; ++i) P::add(acc[r][i], key[i], query);
    }
  };
  for (int i = 0; i < shape.full; ++i) {
    step(i * P::kStep, [](const KV* x) __attribute__((always_inline)) { return P::load_once(x); });
  }
  if (shape.rest) {
    step(shape.full * P::kStep,
         [&](const KV* x) __attribute__((always_inline)) { return P::load_once(x, shape.rest); });
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kKeyTile; ++i) dots[r * stride + i] = acc[r][i];
  }
}

// The logits of rows [row, row + kRows) for kKeyTile keys from their dots, without their scale.
template <int kRows, class KV>
FLASHDECPP_INLINE void store_logits(RowChunk<KV>& rows, int row, int column) {
  alignas(64) float sums[kRowTile * kKeyTile];
  for (int i = 0; i < kRows * kKeyTile; i += kLanes) {
    Vec group[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) group[lane] = rows.dots[i + lane];
    store(sums + i, sum_each(group));
  }
  for (int r = 0; r < kRows; ++r) {
    __builtin_memcpy(rows.weights[row + r] + column, sums + r * kKeyTile, kKeyTile * sizeof(float));
  }
}

// The logits of one head's rows over a block of keys, as many at a time as a vector holds, or the tile.
template <class KV>
void logits(RowChunk<KV>& rows, const KV* const* k, int count, int keys, HeadShape shape, OtherBlock<KV> fetcher) {
  constexpr int kKeys = kLanes > kKeyTile ? kLanes : kKeyTile;
  for (int column = 0; column < keys; column += kKeys) {
    const KV* const* ahead = fetcher.next(kKeys);
    for_row_tiles(count, [&](auto tile, int row) __attribute__((always_inline)) {
      Vec dots[tile.value][kKeys];
      for (int j = 0; j < kKeys; j += kKeyTile) {
        dot_tile<tile.value>(rows, row, k + column + j, 0, shape, &dots[0][j], kKeys, ahead + j);
      }
      for (int r = 0; r < tile.value; ++r) store(rows.weights[row + r] + column, sum_each(dots[r]));
    });
  }
}

// The logits of the rows of some heads for a tile of keys.
template <class KV>
void logits(RowChunk<KV>& rows, const KV* const* k, int64_t head_stride, int heads, int head_rows, HeadShape shape,
            int column, Stream<KV>& fetcher) {
  if (head_rows == 1) {  // a tile's rows are of as many heads
    for_row_tiles(heads, [&](auto tile, int row) __attribute__((always_inline)) {
      for (int r = 0; r < tile.value; ++r) {
        const KV* const* ahead = fetcher.next(kKeyTile);
        dot_tile<1>(rows, row + r, k, (row + r) * head_stride, shape, rows.dots + r * kKeyTile, kKeyTile, ahead);
      }
      store_logits<tile.value>(rows, row, column);
    });
    return;
  }
  for (int i = 0; i < heads; ++i) {
    const KV* const* ahead = fetcher.next(kKeyTile);
    for_row_tiles(head_rows, [&](auto tile, int in_head) __attribute__((always_inline)) {
      const int row = i * head_rows + in_head;
      dot_tile<tile.value>(rows, row, k, i * head_stride, shape, rows.dots, kKeyTile, ahead);
      store_logits<tile.value>(rows, row, column);
    });
  }
}

// acc[r][d ...] += sum over keys [begin, end) of weight[r][key] * v[key][d ...], for kPairs pairs of vectors, or for
// the `rest` numbers of a part of one.
template <int kRows, int kPairs, bool kPart, class KV>
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
      value[i] = kPart ? load_pair(from, rest) : load_pair(from + i * kStep);
      if constexpr (kRows > 1) keep_in_registers(value[i]);
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

template <int kRows, class KV>
FLASHDECPP_INLINE void values_rows(RowChunk<KV>& rows, int row, const KV* const* v, int64_t offset, int column,
                                   int begin, int end, HeadShape shape, const KV* const* ahead) {
  constexpr int kStep = Products<KV>::kStep;
  int i = 0;
  for (; i + 2 <= shape.full; i += 2) {
    values_tile<kRows, 2, false>(rows, row, v, offset, column, begin, end, i * kStep, 0, ahead);
  }
  if (i < shape.full) values_tile<kRows, 1, false>(rows, row, v, offset, column, begin, end, i++ * kStep, 0, ahead);
  if (shape.rest) values_tile<kRows, 1, true>(rows, row, v, offset, column, begin, end, i * kStep, shape.rest, ahead);
}

// The weighted values of kRows rows of one head over the keys [column, stop): together over those that all of them see,
// each alone over the rest of its own.
template <int kRows, class KV>
FLASHDECPP_INLINE void accumulate_rows(RowChunk<KV>& rows, int row, const KV* const* v, int64_t offset, int column,
                                       int stop, HeadShape shape, const KV* const* ahead) {
  int begin = column, end = stop;
  for (int r = row; r < row + kRows; ++r) {
    begin = max(rows.begin[r], begin);
    end = min(rows.end[r], end);
  }
  if (begin == column && end == stop) {
    return values_rows<kRows>(rows, row, v, offset, column, column, stop, shape, ahead);
  }
  end = max(begin, end);
  values_rows<kRows>(rows, row, v, offset, column, begin, end, shape, ahead);
  for (int r = row; r < row + kRows; ++r) {
    const int own = max(rows.begin[r], column), last = min(rows.end[r], stop);
    if (own < min(last, begin)) values_rows<1>(rows, r, v, offset, column, own, min(last, begin), shape, ahead);
    if (max(own, end) < last) values_rows<1>(rows, r, v, offset, column, max(own, end), last, shape, ahead);
  }
}

// The weighted values of a chunk's rows over the next `keys` keys.
template <class KV, class Fetcher>
FLASHDECPP_INLINE void accumulate(RowChunk<KV>& rows, const KV* const* v, int64_t head_stride, int heads, int head_rows,
                                  HeadShape shape, int column, int keys, Fetcher&& fetcher) {
  for (int i = 0; i < heads; ++i) {
    const KV* const* ahead = fetcher.next(keys);
    for_row_tiles(head_rows, [&](auto tile, int in_head) __attribute__((always_inline)) {
      accumulate_rows<tile.value>(rows, i * head_rows + in_head, v, i * head_stride, column, column + keys, shape,
                                  ahead);
    });
  }
}

// Logits -> weights of rows [row_begin, row_end), at most kLanes of them, over the keys of a block that each sees, and
// their softmax state. Keys are lanes, but in the state rows are.
template <class Policy, class KV>
void softmax_rows(const AttentionParams& p, RowChunk<KV>& rows, int row_begin, int row_end, int64_t key,
                  Policy policy) {
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
      not_finite = fma(seen, zero, not_finite);  // inf * 0 and NaN * 0 are NaN, anything else is 0
      top = max(top, y);
      store(x + j, y);
    }
    largest[r - row_begin] = max_lane(top);
    totals[r - row_begin] = not_finite;  // a row that saw such a logit is lost: its sum is NaN and stays so
  }

  const Vec old = load(rows.reference + row_begin), maximum = max(load(rows.maximum + row_begin), load(largest));
  const Vec reference = policy.reference(maximum);
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

// A query of n numbers, packed for products with keys of type KV; zeros behind it. They share a type unless KV is fp8.
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

// The end of a row: normalizes acc into out, lse, and the row's maximum. Returns 1 if phi did not serve this row.
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
  const bool served = UnifiedMax::serves(p.phi[b * p.phi_batch_stride + head], state.maximum);
  // A head's last token is the last of its rows to be worked on: nothing reads phi after this.
  if (p.row_max && token == p.q_len - 1) p.row_max[b * p.row_max_batch_stride + head] = state.maximum;
  return served ? 0 : 1;
}

// How many keys a block has: the same for every task, so that a row's bits don't depend on what else is in its task.
template <class KV>
int block_keys(int head_dim) {
  const int64_t row_bytes = head_dim * static_cast<int64_t>(sizeof(KV));
  return static_cast<int>(max(int64_t{16}, min(kBlockBytes / row_bytes, int64_t{kMaxBlockKeys}) / 16 * 16));
}

// Rows [row_begin, row_begin + head_rows) of each of the KV heads [h_begin, h_begin + heads). Returns how many of the
// rows that it finished phi did not serve.
template <bool kOneHead, class KV>
int32_t attend_chunk(const AttentionParams& p, const AttentionTask& task, int h_begin, int heads, int row_begin,
                     int head_rows, RowChunk<KV>& rows, KeyRing<KV>& ring) {
  constexpr int kStep = Products<KV>::kStep;
  constexpr float kUnit = sizeof(KV) == 1 ? kFp8Unit : 1.0f;
  const int group = p.group(), count = heads * head_rows, block = block_keys<KV>(p.head_dim);
  const HeadShape shape = {p.head_dim / kStep, p.head_dim % kStep};
  const int row_bytes = p.head_dim * static_cast<int>(sizeof(KV));
  const int padded = (p.head_dim + kStep - 1) / kStep * kStep;

  rows.stride = padded;
  int64_t first = task.key_end, last = task.key_begin;  // what any of these rows sees
  for (int r = 0; r < kTaskRows; r += kLanes) {         // of lanes that are no rows, too
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
    rows.scale[r] = p.scale * kUnit * (p.k_scale ? p.k_scale[h] : 1.0f);
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
  Stream<KV> keys(ring.k, ring, heads, p.k.head_stride), values(ring.v, ring, heads, p.v.head_stride);
  if (first < last) {
    locate(p, task.b, h_begin, first, keys_at(first), ring);
    if constexpr (kOneHead) {
      for (int j = 0; j < ring.located; ++j) prefetch(ring.k[j], row_bytes);
    } else {
      for (int row = min(kFetchBytes / row_bytes, ring.located * heads); row > 0; row -= kKeyTile) {
        const KV *const *k = keys.next(kKeyTile), *const *v = values.next(kKeyTile);
        for (int i = 0; i < kKeyTile; ++i) {
          prefetch(k[i], row_bytes);
          prefetch(v[i], row_bytes);
        }
      }
    }
  }
  int base = 0;  // of this block in the ring
  for (int64_t key = first; key < last; key += block, base ^= block) {
    const int here = keys_at(key);
    if (key + block < last) locate(p, task.b, h_begin, key + block, keys_at(key + block), ring);

    if constexpr (kOneHead) {
      logits(rows, ring.k + base, count, here, shape, OtherBlock<KV>{ring.v + base});
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
        softmax_rows(p, rows, r, end, key, UnifiedMax{load(rows.phi + r)});
      } else {
        softmax_rows(p, rows, r, end, key, OnlineMax{});
      }
    }

    for (int r = 0; r < count; ++r) {
      if (rows.rescale[r] == 1.0f) continue;
      for (int i = 0; i < padded; i += kLanes) store(rows.acc(r) + i, set1(rows.rescale[r]) * load(rows.acc(r) + i));
    }
    if constexpr (kOneHead) {
      const KV* const* next = ring.k + (key + block < last ? base ^ block : base);
      accumulate(rows, ring.v + base, 0, 1, head_rows, shape, 0, here, OtherBlock<KV>{next});
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
      const Vec unit = set1(kUnit);
      store_in_order(acc + i, Pair{load(acc + i) * unit, load(acc + i + kLanes) * unit}, KV{});
    }
    const int h = h_begin + r / head_rows, in_head = row_begin + r % head_rows;
    const SoftmaxState state = {rows.reference[r], rows.sum[r], rows.maximum[r]};
    if (!task.partial) {
      fallbacks += finish_row(p, task.b, h, in_head, state, acc);
      continue;
    }
    const int64_t index = int64_t{h - task.head_begin} * p.q_len * group + in_head;
    float* partial = task.partial + index * (kStateHeader + p.head_dim);
    partial[0] = state.reference;
    partial[1] = state.sum;
    partial[2] = state.maximum;
    write_row(partial + kStateHeader, acc, p.head_dim, 1.0f);
  }
  return fallbacks;
}

template <class KV>
int32_t attend_typed(const AttentionParams& p, const AttentionTask& task) {
  const int total_rows = p.q_len * p.group();
  const int chunk_heads = max(1, kTaskRows / total_rows);
  RowChunk<KV> rows;
  KeyRing<KV> ring;
  int32_t fallbacks = 0;
  for (int h = task.head_begin; h < task.head_end; h += chunk_heads) {
    const int heads = min(chunk_heads, task.head_end - h);
    for (int row = 0; row < total_rows; row += kTaskRows) {
      const auto attend = heads == 1 ? attend_chunk<true, KV> : attend_chunk<false, KV>;
      fallbacks += attend(p, task, h, heads, row, min(kTaskRows, total_rows - row), rows, ring);
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

static int32_t merge(const AttentionParams& p, const AttentionTask& task, const float* partials, int64_t splits) {
  const int head_rows = p.q_len * p.group(), rows = (task.head_end - task.head_begin) * head_rows;
  const int64_t row_stride = kStateHeader + p.head_dim, split_stride = p.kv_heads * head_rows * row_stride;
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
      const SoftmaxState part = {partial[0], partial[1], partial[2]};
      if (part.empty()) continue;
      const float factor = exp_difference(part.reference, state.reference);
      state.sum += part.sum * factor;
      int d = 0;
      for (; d + kLanes <= p.head_dim; d += kLanes) {
        store(acc + d, fma(set1(factor), load(partial + kStateHeader + d), load(acc + d)));
      }
      if (d < p.head_dim) {
        store(acc + d, fma(set1(factor), load(partial + kStateHeader + d, p.head_dim - d), load(acc + d)));
      }
    }
    fallbacks += finish_row(p, task.b, task.head_begin + row / head_rows, row % head_rows, state, acc);
  }
  return fallbacks;
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
