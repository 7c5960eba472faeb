// Decode attention of the query heads of some KV heads over a range of keys: each key and value is loaded once.
//
// Block by block: the logits of every row, then its softmax state, then the weighted values. Rows of different tokens
// see different keys; a row only ever works on its own range, so that a key it does not see cannot reach it, not even
// as 0 * NaN. Memory is fetched in the order of its addresses, a little ahead of the work, for the heads of one token
// lie side by side: what the processor fetches by itself follows such a stream, and not the few keys at a time, head by
// head, that the arithmetic wants.
#pragma once

#include "kernels.h"
#include "products.h"
#include "simd.h"
#include "softmax.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kMaxBlockKeys = 128;
inline constexpr int64_t kBlockBytes = 8192;  // of a head's keys in a block, and of its values
inline constexpr int kFetchBytes = 32768;     // how far memory is fetched ahead of the work
inline constexpr int kMaxHeadDim = 256;       // the op's contract
inline constexpr int kRowTile = kManyRegisters ? 4 : 2;
inline constexpr int kKeyTile = 4;

// How head_dim divides into what Products reads at once.
struct HeadShape {
  int full, rest;
  int bytes;  // of a row
};

// The rows that are worked on together, head by head. Rows are lanes in all that the softmax does.
template <class KV>
struct RowChunk {
  using Packed = typename Products<KV>::Packed;
  alignas(64) Packed q_[kTaskRows * kMaxHeadDim];
  alignas(64) float acc_[kTaskRows * kMaxHeadDim];
  alignas(64) float weights[kMaxBlockKeys][kTaskRows];                         // first the logits
  alignas(64) float reference[kTaskRows], sum[kTaskRows], maximum[kTaskRows];  // SoftmaxState of each row
  alignas(64) float rescale[kTaskRows];                                        // of acc, in this block
  alignas(64) float begin[kTaskRows], end[kTaskRows];  // the keys of this block that a row sees: [begin, end)
  alignas(64) float distance[kTaskRows];               // from the row's token back to the first key of this block
  alignas(64) float scale[kTaskRows], slope[kTaskRows], phi[kTaskRows];
  Vec dots[kRowTile * kKeyTile] = {};  // of a tile: see dot_tile
  int64_t position[kTaskRows];         // of its token
  int64_t first[kTaskRows];            // the keys that a row sees: [first, last)
  int64_t last[kTaskRows];
  int stride;     // of a row of q and acc: head_dim, padded. Close together they share the nearest cache evenly.
  bool all_seen;  // every row sees every key of this block

  Packed* q(int row) { return q_ + row * stride; }
  const Packed* q(int row) const { return q_ + row * stride; }
  float* acc(int row) { return acc_ + row * stride; }  // sum of weights * values, in the order of load_pair<KV>
};

// One pointer a key, to the first head of a chunk, for this block and the next in turn: key i of the chunk is at
// i % (2 * block). A block's last is repeated to a whole tile of keys.
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
  for (; j % kKeyTile != 0; ++j) {
    ring.k[j] = ring.k[j - 1];
    ring.v[j] = ring.v[j - 1];
  }
  ring.located += count;
}

// Walks over the keys or values of a chunk in the order of memory, kFetchBytes ahead of the work.
template <class KV>
class Fetcher {
 public:
  // Heads that lie one behind the other are fetched as one row.
  Fetcher(const KV* const* rows, const KeyRing<KV>& ring, int heads, int64_t head_stride, int head_dim)
      : rows_(rows), ring_(ring), heads_(heads), head_stride_(head_stride), run_(head_dim * sizeof(KV)) {
    if (head_stride == head_dim) {
      heads_ = 1;
      run_ *= heads;
    }
  }

  // What to fetch while `bytes` are worked on, spread over the work: memory has only so many requests under way, and
  // drops what comes too fast. Where that is not in one piece it is fetched here, and the result is `otherwise`.
  const char* take(int bytes, const void* otherwise) {
    if (left_ == 0) start_row();
    if (left_ >= bytes) {
      const char* piece = at_;
      at_ += bytes;
      left_ -= bytes;
      return piece;
    }
    while (bytes > 0 && left_ > 0) {
      const int count = min(bytes, left_);
      for (int i = 0; i < count; i += 64) __builtin_prefetch(at_ + i);
      at_ += count;
      left_ -= count;
      bytes -= count;
      if (left_ == 0) start_row();
    }
    return static_cast<const char*>(otherwise);
  }

 private:
  void start_row() {
    if (key_ >= ring_.located) return;
    at_ = reinterpret_cast<const char*>(rows_[key_ % (2 * ring_.block)] + head_ * head_stride_);
    left_ = run_;
    if (++head_ == heads_) {
      head_ = 0;
      ++key_;
    }
  }

  const KV* const* rows_;
  const KeyRing<KV>& ring_;
  int heads_;
  int64_t head_stride_;
  int run_, key_ = 0, head_ = 0, left_ = 0;
  const char* at_ = nullptr;
};

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

// What take() gave for kKeyTile rows of head_dim numbers: the part of a step from number d on.
template <int kKeys, class KV>
FLASHDECPP_INLINE void fetch(const char* piece, int d) {
  constexpr int kBytes = kKeys * Products<KV>::kStep * static_cast<int>(sizeof(KV));
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(piece + kKeys * d * static_cast<int>(sizeof(KV)) + i);
}

// Products of kRows rows with kKeyTile keys of their head, one lane of a sum in every lane: dots[key * kRowTile + row].
template <int kRows, class KV>
FLASHDECPP_INLINE void dot_tile(const RowChunk<KV>& rows, int row, const KV* const* k, int64_t k_head, HeadShape shape,
                                Vec* dots, const char* piece) {
  using P = Products<KV>;
  Vec acc[kRows][kKeyTile];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kKeyTile; ++i) acc[r][i] = set1(0.0f);
  }
  const KV* keys[kKeyTile];
  for (int i = 0; i < kKeyTile; ++i) keys[i] = k[i] + k_head;
  auto step = [&](int d, auto&& load_key) __attribute__((always_inline)) {
    fetch<kKeyTile, KV>(piece, d);
    typename P::Operand key[kKeyTile];
    for (int i = 0; i < kKeyTile; ++i) key[i] = load_key(keys[i] + d);
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
    for (int i = 0; i < kKeyTile; ++i) dots[i * kRowTile + r] = acc[r][i];
  }
}

// The logits of kRows rows from their dot_tile, without their scale.
template <int kRows, class KV>
FLASHDECPP_INLINE void store_logits(RowChunk<KV>& rows, int row, int column, const Vec* dots) {
  alignas(64) float sums[kRowTile * kKeyTile];
  for (int i = 0; i < kRowTile * kKeyTile; i += kLanes) {
    Vec group[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) group[lane] = dots[i + lane];
    store(sums + i, sum_each(group));
  }
  for (int i = 0; i < kKeyTile; ++i) {
    __builtin_memcpy(rows.weights[column + i] + row, sums + i * kRowTile, kRows * sizeof(float));
  }
}

// The logits of a chunk's rows for a tile of keys.
template <class KV>
void logits(RowChunk<KV>& rows, const KV* const* k, int64_t head_stride, int heads, int head_rows, HeadShape shape,
            int column, Fetcher<KV>& fetcher) {
  auto& dots = rows.dots;
  if (head_rows == 1) {  // a tile's rows are of as many heads
    for_row_tiles(heads, [&](auto tile, int row) __attribute__((always_inline)) {
      for (int r = 0; r < tile.value; ++r) {
        const char* piece = fetcher.take(kKeyTile * shape.bytes, k[0]);
        dot_tile<1>(rows, row + r, k, (row + r) * head_stride, shape, dots + r, piece);
      }
      store_logits<tile.value>(rows, row, column, dots);
    });
    return;
  }
  for (int i = 0; i < heads; ++i) {
    const char* piece = fetcher.take(kKeyTile * shape.bytes, k[0]);
    for_row_tiles(head_rows, [&](auto tile, int in_head) __attribute__((always_inline)) {
      const int row = i * head_rows + in_head;
      dot_tile<tile.value>(rows, row, k, i * head_stride, shape, dots, piece);
      store_logits<tile.value>(rows, row, column, dots);
    });
  }
}

// acc[r] += sum over kKeys keys of weight[key][r] * v[key], for kRows rows.
template <int kRows, int kKeys, class KV>
FLASHDECPP_INLINE void values_tile(RowChunk<KV>& rows, int row, const KV* const* v, int64_t v_head, int column,
                                   HeadShape shape, const char* piece) {
  constexpr int kStep = Products<KV>::kStep;
  Vec weights[kKeys][kRows];
  for (int i = 0; i < kKeys; ++i) {
    for (int r = 0; r < kRows; ++r) {
      weights[i][r] = set1(rows.weights[column + i][row + r]);
      keep_in_register(weights[i][r].v);
    }
  }
  auto step = [&](int d, auto&& load_value) __attribute__((always_inline)) {
    fetch<kKeys, KV>(piece, d);
    Pair acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = {load(rows.acc(row + r) + d), load(rows.acc(row + r) + d + kLanes)};
    for (int i = 0; i < kKeys; ++i) {
      Pair value = load_value(v[i] + v_head + d);
      if constexpr (kRows > 1) keep_in_registers(value);
      for (int r = 0; r < kRows; ++r) {
        acc[r].first = fma(weights[i][r], value.first, acc[r].first);
        acc[r].second = fma(weights[i][r], value.second, acc[r].second);
      }
    }
    for (int r = 0; r < kRows; ++r) store_pair(rows.acc(row + r) + d, acc[r]);
  };
  for (int i = 0; i < shape.full; ++i) {
    step(i * kStep, [](const KV* x) __attribute__((always_inline)) { return load_pair(x); });
  }
  if (shape.rest) {
    step(shape.full * kStep, [&](const KV* x) __attribute__((always_inline)) { return load_pair(x, shape.rest); });
  }
}

// The weighted values of kRows rows of one head over a tile of keys: together where all see all of these, else each row
// over the keys that it sees.
template <int kRows, class KV>
FLASHDECPP_INLINE void accumulate_rows(RowChunk<KV>& rows, int row, const KV* const* v, int64_t v_head, int column,
                                       HeadShape shape, const char* piece) {
  bool all_seen = rows.all_seen;
  if (!all_seen) {
    all_seen = true;
    for (int r = row; r < row + kRows; ++r) all_seen &= rows.begin[r] <= column && column + kKeyTile <= rows.end[r];
  }
  if (all_seen) return values_tile<kRows, kKeyTile>(rows, row, v, v_head, column, shape, piece);
  for (int r = row; r < row + kRows; ++r) {
    const int first = max(column, static_cast<int>(rows.begin[r]));
    const int last = min(column + kKeyTile, static_cast<int>(rows.end[r]));
    for (int j = first; j < last; ++j) values_tile<1, 1>(rows, r, v + (j - column), v_head, j, shape, piece);
  }
}

// The weighted values of a chunk's rows for a tile of keys.
template <class KV>
void accumulate(RowChunk<KV>& rows, const KV* const* v, int64_t head_stride, int heads, int head_rows, HeadShape shape,
                int column, Fetcher<KV>& fetcher) {
  for (int i = 0; i < heads; ++i) {
    const char* piece = fetcher.take(kKeyTile * shape.bytes, v[0]);
    for_row_tiles(head_rows, [&](auto tile, int in_head) __attribute__((always_inline)) {
      accumulate_rows<tile.value>(rows, i * head_rows + in_head, v, i * head_stride, column, shape, piece);
    });
  }
}

// Logits -> weights of kLanes rows over a block of keys, and their softmax state. Keys that a row does not see get
// weight 0.
template <class Policy, class KV>
void softmax_rows(const AttentionParams& p, RowChunk<KV>& rows, int row, int keys, Policy policy) {
  const Vec begin = load(rows.begin + row), end = load(rows.end + row), zero = set1(0.0f), hidden = set1(-kInf);
  const Vec scale = load(rows.scale + row), slope = load(rows.slope + row), distance = load(rows.distance + row);
  Vec largest = hidden, not_finite = zero;
  for (int j = 0; j < keys; ++j) {
    const Vec key = set1(static_cast<float>(j));
    Vec x = load(rows.weights[j] + row) * scale;
    if (p.softcap > 0) x = set1(p.softcap) * tanh(x / set1(p.softcap));
    if (p.alibi_slopes) x = x - slope * (distance - key);
    const auto where_seen = [&](Vec a, Vec b) __attribute__((always_inline)) {
      return where_less(key, begin, b, where_less(key, end, a, b));
    };
    not_finite = fma(where_seen(x, zero), zero, not_finite);  // inf * 0 and NaN * 0 are NaN, anything else is 0
    x = where_seen(x, hidden);
    largest = max(largest, x);
    store(rows.weights[j] + row, x);
  }
  Vec sum = load(rows.sum + row);
  alignas(64) float lanes[kLanes];
  store(lanes, not_finite);
  for (int i = 0; i < kLanes; ++i) {
    if (lanes[i] == 0.0f) continue;
    // This row is lost: it sees nothing from here on, and its sum stays NaN.
    rows.sum[row + i] = __builtin_nanf("");
    for (int j = 0; j < keys; ++j) rows.weights[j][row + i] = -kInf;
    sum = load(rows.sum + row);
    largest = hidden;
    for (int j = 0; j < keys; ++j) largest = max(largest, load(rows.weights[j] + row));
  }

  const Vec old = load(rows.reference + row), maximum = max(load(rows.maximum + row), largest);
  const Vec reference = policy.reference(maximum);
  const Vec rescale =
      where_equal(old, reference, set1(1.0f), where_equal(old, hidden, zero, exp_difference(old, reference)));
  const Vec subtracted = where_equal(reference, hidden, zero, reference);  // -inf - -inf would be NaN
  Vec total = zero;
  for (int j = 0; j < keys; ++j) {
    const Vec weight = exp_difference(load(rows.weights[j] + row), subtracted);
    total = total + weight;
    store(rows.weights[j] + row, weight);
  }
  store(rows.maximum + row, maximum);
  store(rows.reference + row, reference);
  store(rows.rescale + row, rescale);
  store(rows.sum + row, fma(sum, rescale, total));
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

// The end of a row: normalises acc into out, and lse. Returns 1 if phi did not serve this row.
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
  return UnifiedMax::serves(p.phi[b * p.phi_batch_stride + head], state.maximum) ? 0 : 1;
}

// How many keys a block has: the same for every task, so that a row's bits don't depend on what else is in its task.
template <class KV>
int block_keys(int head_dim) {
  const int64_t row_bytes = head_dim * static_cast<int64_t>(sizeof(KV));
  return static_cast<int>(max(int64_t{16}, min(kBlockBytes / row_bytes, int64_t{kMaxBlockKeys}) / 16 * 16));
}

// Rows [row_begin, row_begin + head_rows) of each of the KV heads [h_begin, h_begin + heads). Returns how many of the
// rows that it finished phi did not serve.
template <class KV>
int32_t attend_chunk(const AttentionParams& p, const AttentionTask& task, int h_begin, int heads, int row_begin,
                     int head_rows, RowChunk<KV>& rows, KeyRing<KV>& ring) {
  constexpr int kStep = Products<KV>::kStep;
  constexpr float kUnit = sizeof(KV) == 1 ? kFp8Unit : 1.0f;
  const int group = p.group(), count = heads * head_rows, block = block_keys<KV>(p.head_dim);
  const HeadShape shape = {p.head_dim / kStep, p.head_dim % kStep, static_cast<int>(p.head_dim * sizeof(KV))};
  const int padded = (p.head_dim + kStep - 1) / kStep * kStep;

  rows.stride = padded;
  int64_t first = task.key_end, last = task.key_begin;  // what any of these rows sees
  for (int r = 0; r < kTaskRows; ++r) {
    rows.reference[r] = rows.maximum[r] = -kInf;
    rows.sum[r] = rows.scale[r] = rows.slope[r] = rows.phi[r] = 0.0f;
    rows.first[r] = rows.last[r] = rows.position[r] = 0;
    if (r >= count) continue;  // a lane of no row
    const int h = h_begin + r / head_rows, in_head = row_begin + r % head_rows;
    const int token = in_head / group, head = h * group + in_head % group;
    const int64_t offset = task.b * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
    pack_query<KV>(rows.q(r), p.q, offset, p.head_dim, p.q_dtype);
    for (int i = 0; i < padded; i += kLanes) store(rows.acc(r) + i, set1(0.0f));
    rows.scale[r] = p.scale * kUnit * (p.k_scale ? p.k_scale[h] : 1.0f);
    if (p.alibi_slopes) rows.slope[r] = p.alibi_slopes[head];
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
  Fetcher<KV> keys(ring.k, ring, heads, p.k.head_stride, p.head_dim);
  Fetcher<KV> values(ring.v, ring, heads, p.v.head_stride, p.head_dim);
  if (first < last) {
    locate(p, task.b, h_begin, first, keys_at(first), ring);
    for (int i = 0; i < kFetchBytes; i += 64) {
      __builtin_prefetch(keys.take(64, nullptr));
      __builtin_prefetch(values.take(64, nullptr));
    }
  }
  int base = 0;  // of this block in the ring
  for (int64_t key = first; key < last; key += block, base ^= block) {
    const int here = keys_at(key);
    if (key + block < last) locate(p, task.b, h_begin, key + block, keys_at(key + block), ring);

    for (int j = 0; j < here; j += kKeyTile) {
      logits(rows, ring.k + base + j, p.k.head_stride, heads, head_rows, shape, j, keys);
    }

    rows.all_seen = here % kKeyTile == 0;
    for (int r = 0; r < kTaskRows; ++r) {
      const int64_t begin = max(int64_t{0}, min(rows.first[r] - key, int64_t{here}));
      const int64_t end = max(begin, min(rows.last[r] - key, int64_t{here}));
      rows.begin[r] = static_cast<float>(begin);
      rows.end[r] = static_cast<float>(end);
      rows.distance[r] = static_cast<float>(rows.position[r] - key);
      if (r < count) rows.all_seen &= begin == 0 && end == here;
    }
    for (int r = 0; r < count; r += kLanes) {
      if (p.phi) {
        softmax_rows(p, rows, r, here, UnifiedMax{load(rows.phi + r)});
      } else {
        softmax_rows(p, rows, r, here, OnlineMax{});
      }
    }

    for (int r = 0; r < count; ++r) {
      if (rows.rescale[r] == 1.0f) continue;
      for (int i = 0; i < padded; i += kLanes) store(rows.acc(r) + i, set1(rows.rescale[r]) * load(rows.acc(r) + i));
    }
    for (int j = 0; j < here; j += kKeyTile) {
      accumulate(rows, ring.v + base + j, p.v.head_stride, heads, head_rows, shape, j, values);
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
      fallbacks += attend_chunk(p, task, h, heads, row, min(kTaskRows, total_rows - row), rows, ring);
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
