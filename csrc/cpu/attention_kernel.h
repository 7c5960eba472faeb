// Decode attention of all query heads of one KV head over a range of its keys: each key and value is loaded once.
//
// Block by block: the logits of every row, then its softmax state, then the weighted values. Rows of different tokens
// see different keys; a row only ever works on its own range, so that a key it does not see cannot reach it, not even
// as 0 * NaN. While the keys of a block are worked on its values are fetched, and meanwhile the next block's keys.
#pragma once

#include "kernels.h"
#include "products.h"
#include "simd.h"
#include "softmax.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kMaxBlockKeys = 128;
inline constexpr int64_t kBlockBytes = 16384;  // of keys, and of values: both fit into the nearest cache
inline constexpr int kRowChunk = 16;           // rows worked on together
inline constexpr int kMaxHeadDim = 256;        // the op's contract
inline constexpr int kRowTile = kManyRegisters ? 4 : 2;
inline constexpr int kLogitStride = kMaxBlockKeys + kLanes;  // a last vector may run past the block

// How head_dim divides into what Products reads at once.
struct HeadShape {
  int full, rest;
};

template <class KV>
struct RowChunk {
  alignas(64) typename Products<KV>::Packed q[kRowChunk][kMaxHeadDim];
  alignas(64) float acc[kRowChunk][kMaxHeadDim];  // sum of weights * values, in the order of load_pair<KV>
  alignas(64) float logits[kRowChunk][kLogitStride];
  SoftmaxState state[kRowChunk];
  float rescale[kRowChunk];  // of acc, in this block
  int64_t first[kRowChunk];  // the keys that a row sees: [first, last)
  int64_t last[kRowChunk];
  int begin[kRowChunk], end[kRowChunk];  // the same within this block
};

// One pointer a key; the last is repeated to a whole vector of keys.
template <class KV>
struct KeyBlock {
  int count;
  const KV *k[kMaxBlockKeys], *v[kMaxBlockKeys];
};

template <class KV>
void locate(const AttentionParams& p, const AttentionTask& task, int64_t key, int count, KeyBlock<KV>& block) {
  const KV* k = static_cast<const KV*>(p.k_cache) + task.h * p.k.head_stride;
  const KV* v = static_cast<const KV*>(p.v_cache) + task.h * p.v.head_stride;
  int64_t table_slot = key / p.block_size;
  int64_t offset = key - table_slot * p.block_size;
  int j = 0;
  for (; j < count; ++table_slot, offset = 0) {
    int64_t id = task.b;
    if (p.block_table) {
      id = p.block_table[task.b * p.table_stride + table_slot];
      id = max(int64_t{0}, min(id, int64_t{p.num_blocks} - 1));
    }
    const KV* k_token = k + id * p.k.block_stride + offset * p.k.token_stride;
    const KV* v_token = v + id * p.v.block_stride + offset * p.v.token_stride;
    for (; offset < p.block_size && j < count; ++offset, ++j) {
      block.k[j] = k_token;
      block.v[j] = v_token;
      k_token += p.k.token_stride;
      v_token += p.v.token_stride;
    }
  }
  for (; j % kLanes != 0; ++j) {
    block.k[j] = block.k[count - 1];
    block.v[j] = block.v[count - 1];
  }
  block.count = count;
}

FLASHDECPP_INLINE void prefetch(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// logits[r][0 .. kLanes) = q[r] . k[0 .. kLanes), four keys at a time; fetches v of the same keys.
template <int kRows, class KV>
FLASHDECPP_INLINE void logits_tile(RowChunk<KV>& rows, int row, const KV* const* k, const KV* const* v, HeadShape shape,
                                   int column) {
  using P = Products<KV>;
  constexpr int kKeys = 4;
  Vec dots[kRows][kLanes];
  for (int j = 0; j < kLanes; j += kKeys) {
    Vec acc[kRows][kKeys];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kKeys; ++i) acc[r][i] = set1(0.0f);
    }
    auto step = [&](int d, auto&& load_key) __attribute__((always_inline)) {
      typename P::Operand key[kKeys];
      for (int i = 0; i < kKeys; ++i) {
        prefetch(v[j + i] + d, P::kStep * sizeof(KV));
        key[i] = load_key(k[j + i] + d);
      }
      for (int r = 0; r < kRows; ++r) {
        const typename P::Operand query = P::load_packed(rows.q[row + r] + d);
        for (int i = 0; i < kKeys; ++i) P::add(acc[r][i], key[i], query);
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
      for (int i = 0; i < kKeys; ++i) dots[r][j + i] = acc[r][i];
    }
  }
  for (int r = 0; r < kRows; ++r) store(rows.logits[row + r] + column, sum_each(dots[r]));
}

template <int kRows, class KV>
void logits_rows(RowChunk<KV>& rows, int row, const KeyBlock<KV>& block, HeadShape shape) {
  for (int j = 0; j < block.count; j += kLanes) logits_tile<kRows>(rows, row, block.k + j, block.v + j, shape, j);
}

// acc[r][d ...] += sum over keys [begin, end) of weight[r][key] * v[key][d ...], for kPairs pairs of vectors, or for
// the `rest` numbers of a part of one; fetches the same part of the next block's keys.
template <int kRows, int kPairs, bool kPart, class KV>
FLASHDECPP_INLINE void values_tile(RowChunk<KV>& rows, int row, const KeyBlock<KV>& block, const KeyBlock<KV>& next,
                                   int begin, int end, int d, int rest, bool rescale) {
  constexpr int kStep = Products<KV>::kStep;
  Vec acc[kRows][2 * kPairs];
  for (int r = 0; r < kRows; ++r) {
    const Vec factor = set1(rescale ? rows.rescale[row + r] : 1.0f);
    for (int i = 0; i < 2 * kPairs; ++i) acc[r][i] = factor * load(rows.acc[row + r] + d + i * kLanes);
  }
  for (int j = begin; j < end; ++j) {
    prefetch(next.k[j] + d, kPairs * kStep * sizeof(KV));
    Pair value[kPairs];
    for (int i = 0; i < kPairs; ++i) {
      value[i] = kPart ? load_pair(block.v[j] + d, rest) : load_pair(block.v[j] + d + i * kStep);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = set1(rows.logits[row + r][j]);
      for (int i = 0; i < kPairs; ++i) {
        acc[r][2 * i] = fma(weight, value[i].first, acc[r][2 * i]);
        acc[r][2 * i + 1] = fma(weight, value[i].second, acc[r][2 * i + 1]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < 2 * kPairs; ++i) store(rows.acc[row + r] + d + i * kLanes, acc[r][i]);
  }
}

template <int kRows, class KV>
void values_rows(RowChunk<KV>& rows, int row, const KeyBlock<KV>& block, const KeyBlock<KV>& next, int begin, int end,
                 HeadShape shape, bool rescale) {
  constexpr int kStep = Products<KV>::kStep;
  int i = 0;
  for (; i + 2 <= shape.full; i += 2) {
    values_tile<kRows, 2, false>(rows, row, block, next, begin, end, i * kStep, 0, rescale);
  }
  if (i < shape.full) values_tile<kRows, 1, false>(rows, row, block, next, begin, end, i++ * kStep, 0, rescale);
  if (shape.rest) values_tile<kRows, 1, true>(rows, row, block, next, begin, end, i * kStep, shape.rest, rescale);
}

// The weighted values of kRows rows: together over the keys that all of them see, each alone over the rest of its own.
template <int kRows, class KV>
void accumulate_rows(RowChunk<KV>& rows, int row, const KeyBlock<KV>& block, const KeyBlock<KV>& next,
                     HeadShape shape) {
  int begin = 0, end = block.count;
  for (int r = row; r < row + kRows; ++r) {
    begin = max(rows.begin[r], begin);
    end = min(rows.end[r], end);
  }
  end = max(begin, end);
  values_rows<kRows>(rows, row, block, next, begin, end, shape, true);
  for (int r = row; r < row + kRows; ++r) {
    const int before = min(rows.end[r], begin), after = max(rows.begin[r], end);
    if (rows.begin[r] < before) values_rows<1>(rows, r, block, next, rows.begin[r], before, shape, false);
    if (after < rows.end[r]) values_rows<1>(rows, r, block, next, after, rows.end[r], shape, false);
  }
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

// logits -> weights over the row's own keys of this block, and its softmax state.
template <class KV, class Policy>
void softmax_row(const AttentionParams& p, RowChunk<KV>& rows, int r, int64_t key, int64_t position, float scale,
                 float slope, Policy policy) {
  static constexpr float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec lane = load(kIota);
  float* x = rows.logits[r];
  const int begin = rows.begin[r], end = rows.end[r];
  rows.rescale[r] = 1.0f;
  if (begin >= end) return;

  Vec largest = set1(-kInf), not_finite = set1(0.0f);
  for (int j = begin; j < end; j += kLanes) {
    Vec y = load(x + j) * set1(scale);
    if (p.softcap > 0) y = set1(p.softcap) * tanh(y / set1(p.softcap));
    if (p.alibi_slopes) {
      const Vec distance = set1(static_cast<float>(position - key - j)) - lane;
      y = y - set1(slope) * distance;
    }
    if (end - j < kLanes) y = where_less(lane, set1(static_cast<float>(end - j)), y, set1(-kInf));
    // inf * 0 and NaN * 0 are NaN, anything else is 0; the lanes behind the row's last key do not count.
    const Vec seen = end - j < kLanes ? where_less(lane, set1(static_cast<float>(end - j)), y, set1(0.0f)) : y;
    not_finite = fma(seen, set1(0.0f), not_finite);
    largest = max(largest, y);
    store(x + j, y);
  }
  SoftmaxState& state = rows.state[r];
  if (const float poison = sum(not_finite); poison != 0.0f || poison != poison) {
    state.sum = __builtin_nanf("");
    for (int j = begin; j < end; ++j) x[j] = 0.0f;
    return;
  }
  rows.rescale[r] = state.admit(max_lane(largest), policy);
  const Vec reference = set1(state.reference);
  Vec total = set1(0.0f);
  for (int j = begin; j < end; j += kLanes) {
    const Vec weight = exp_difference(load(x + j), reference);
    total = total + weight;
    store(x + j, weight);
  }
  state.sum += sum(total);
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

// The end of a row: normalises acc into out, lse, and the row's maximum. Returns 1 if phi did not serve this row.
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
  const bool served = UnifiedMax{p.phi[b * p.phi_batch_stride + head]}.serves(state.maximum);
  // A head's last token is the last of its rows to be worked on: nothing reads phi after this.
  if (p.row_max && token == p.q_len - 1) p.row_max[b * p.row_max_batch_stride + head] = state.maximum;
  return served ? 0 : 1;
}

template <class KV>
int32_t attend_typed(const AttentionParams& p, const AttentionTask& task) {
  constexpr int kStep = Products<KV>::kStep;
  constexpr float kUnit = sizeof(KV) == 1 ? kFp8Unit : 1.0f;
  const int group = p.q_heads / p.kv_heads, total_rows = p.q_len * group;
  const HeadShape shape = {p.head_dim / kStep, p.head_dim % kStep};
  const int padded = (p.head_dim + kStep - 1) / kStep * kStep;
  const float scale = p.scale * kUnit * (p.k_scale ? p.k_scale[task.h] : 1.0f);
  const int64_t row_bytes = p.head_dim * static_cast<int64_t>(sizeof(KV));
  const int64_t block_keys = max(int64_t{32}, min(kBlockBytes / row_bytes, int64_t{kMaxBlockKeys}) / 16 * 16);
  int32_t fallbacks = 0;
  RowChunk<KV> rows;
  KeyBlock<KV> blocks[2];

  for (int row0 = 0; row0 < total_rows; row0 += kRowChunk) {
    const int count = min(kRowChunk, total_rows - row0);
    int64_t first = task.key_end, last = task.key_begin;  // what any of these rows sees
    for (int r = 0; r < count; ++r) {
      const int token = (row0 + r) / group, head = task.h * group + (row0 + r) % group;
      const int64_t position = task.length - p.q_len + token;
      const int64_t offset = task.b * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
      pack_query<KV>(rows.q[r], p.q, offset, p.head_dim, p.q_dtype);
      for (int i = 0; i < padded; i += kLanes) store(rows.acc[r] + i, set1(0.0f));
      rows.state[r] = SoftmaxState{};
      const int64_t begin = p.window > 0 ? position - p.window + 1 : 0;
      rows.first[r] = max(begin, task.key_begin);
      rows.last[r] = min(position + 1, task.key_end);
      if (rows.first[r] < rows.last[r]) {
        first = min(first, rows.first[r]);
        last = max(last, rows.last[r]);
      }
    }

    const auto keys_at = [&](int64_t key) { return static_cast<int>(max(int64_t{0}, min(block_keys, last - key))); };
    if (first < last) {
      locate(p, task, first, keys_at(first), blocks[0]);
      for (int j = 0; j < blocks[0].count; ++j) prefetch(blocks[0].k[j], static_cast<int>(row_bytes));
    }
    int current = 0;
    for (int64_t key = first; key < last; key += block_keys, current ^= 1) {
      const KeyBlock<KV>& block = blocks[current];
      const int64_t next_key = key + block_keys;
      KeyBlock<KV>& next = next_key < last ? blocks[current ^ 1] : blocks[current];
      if (next_key < last) {
        locate(p, task, next_key, keys_at(next_key), next);
        for (int j = next.count; j < block.count; ++j) next.k[j] = next.k[next.count - 1];
      }
      for_row_tiles(count, [&](auto tile, int row) { logits_rows<tile.value>(rows, row, block, shape); });
      for (int r = 0; r < count; ++r) {
        rows.begin[r] = static_cast<int>(max(rows.first[r] - key, int64_t{0}));
        rows.end[r] = static_cast<int>(max(int64_t{0}, min(rows.last[r] - key, int64_t{block.count})));
        const int token = (row0 + r) / group, head = task.h * group + (row0 + r) % group;
        const int64_t position = task.length - p.q_len + token;
        const float slope = p.alibi_slopes ? p.alibi_slopes[head] : 0.0f;
        if (p.phi) {
          const UnifiedMax policy = {p.phi[task.b * p.phi_batch_stride + head]};
          softmax_row(p, rows, r, key, position, scale, slope, policy);
        } else {
          softmax_row(p, rows, r, key, position, scale, slope, OnlineMax{});
        }
      }
      for_row_tiles(count, [&](auto tile, int row) { accumulate_rows<tile.value>(rows, row, block, next, shape); });
    }

    for (int r = 0; r < count; ++r) {
      float* acc = rows.acc[r];
      for (int i = 0; i < padded; i += kStep) {
        const Vec unit = set1(kUnit);
        store_in_order(acc + i, Pair{load(acc + i) * unit, load(acc + i + kLanes) * unit}, KV{});
      }
      if (!task.partial) {
        fallbacks += finish_row(p, task.b, task.h, row0 + r, rows.state[r], acc);
        continue;
      }
      float* partial = task.partial + (row0 + r) * (kStateHeader + p.head_dim);
      partial[0] = rows.state[r].reference;
      partial[1] = rows.state[r].sum;
      partial[2] = rows.state[r].maximum;
      write_row(partial + kStateHeader, acc, p.head_dim, 1.0f);
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

static int32_t merge(const AttentionParams& p, int32_t b, int32_t h, const float* partials, int64_t splits) {
  const int rows = p.q_len * (p.q_heads / p.kv_heads);
  const int64_t row_stride = kStateHeader + p.head_dim, split_stride = rows * row_stride;
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
    fallbacks += finish_row(p, b, h, row, state, acc);
  }
  return fallbacks;
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
