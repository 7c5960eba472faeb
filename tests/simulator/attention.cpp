// The decode attention kernel on the simulated GPU, against the definition in double. The last line of output counts
// the failed cases.
#include <algorithm>
#include <bit>

#include "checks.h"
#include "cuda/attention/decode_attention_kernel.cuh"
#if defined(USE_ROCM)
#include "hip/attention_pipeline_amd.h"
#endif
#include "heuristics/attention.h"

using namespace flashdecpp;

namespace {

#if defined(USE_ROCM)
using Shape = CtaShape<4, 1, 1, 4>;
template <class Tile>
using SeamStages = RegisterStages<Tile>;
#else
using Shape = CtaShape<4, 2, 1, 4>;
template <class Tile>
using SeamStages = CpAsyncStages<Tile>;
#endif

template <class Tile>
struct ClusterStages : SeamStages<Tile> {
  using SeamStages<Tile>::SeamStages;
  static constexpr bool kUsesClusters = true;
};

struct Case {
  std::vector<int> lengths;
  int q_heads = 4, kv_heads = 2, head_dim = 64, q_len = 1, block_size = 16;
  int window = 0, num_splits = 0, resident = 12, cluster = 1;
  float softcap = 0.f, phi = 1.f;
  bool paged = true, alibi = false, sinks = false, graph = false;
};

Checks check(7);

// Compares every row with its definition, the softmax over the keys that it sees.
template <class T, class KV>
void compare(const Case& c, const AttentionParams& p, const simulated::Tensor<T>& out,
             const simulated::Tensor<float>& lse, const simulated::Tensor<int32_t>& table, const std::string& name) {
  const auto* q = static_cast<const T*>(p.q);
  const auto at = [&](const void* cache, const CacheLayout& layout, int batch, int key, int head, int dim) {
    const int block = p.block_table ? table[batch * p.table_stride + key / p.block_size] : batch;
    const int within = p.block_table ? key % p.block_size : key;
    return arch::to_float(static_cast<const KV*>(
        cache)[block * layout.block_stride + within * layout.token_stride + head * layout.head_stride + dim]);
  };
  double worst = 0, worst_lse = 0;
  for (int b = 0; b < p.batch; ++b) {
    for (int t = 0; t < p.q_len; ++t) {
      for (int h = 0; h < p.q_heads; ++h) {
        const int position = c.lengths[b] - p.q_len + t, kv = h / p.group();
        std::vector<double> logits;
        const int begin = p.window > 0 ? std::max(position - p.window + 1, 0) : 0;
        double top = p.sinks ? p.sinks[h] : -INFINITY;
        for (int key = begin; key <= position; ++key) {
          double x = 0;
          for (int d = 0; d < p.head_dim; ++d) {
            x += arch::to_float(q[b * p.q_batch_stride + t * p.q_token_stride + h * p.q_head_stride + d]) *
                 at(p.k_cache, p.k, b, key, kv, d);
          }
          x *= p.scale;
          if (p.softcap > 0) x = p.softcap * std::tanh(x / p.softcap);
          if (p.alibi_slopes) x -= p.alibi_slopes[h] * (position - key);
          logits.push_back(x);
          top = std::max(top, x);
        }
        double sum = p.sinks ? std::exp(p.sinks[h] - top) : 0;
        for (const double x : logits) sum += std::exp(x - top);
        const bool empty = logits.empty() && !p.sinks;
        const double expected_lse = empty ? -INFINITY : top + std::log(sum);
        const double got_lse = lse[(int64_t{b} * p.q_heads + h) * p.q_len + t];
        if (!(expected_lse == got_lse)) worst_lse = std::max(worst_lse, std::fabs(expected_lse - got_lse));
        if (std::isnan(got_lse)) worst_lse = INFINITY;
        for (int d = 0; d < p.head_dim; ++d) {
          double expected = 0;
          for (size_t i = 0; i < logits.size(); ++i) {
            expected += std::exp(logits[i] - top) / sum * at(p.v_cache, p.v, b, begin + static_cast<int>(i), kv, d);
          }
          const double got = arch::to_float(out[((int64_t{b} * p.q_len + t) * p.q_heads + h) * p.head_dim + d]);
          const double error = std::fabs(expected - got);
          worst = std::isnan(got) ? INFINITY : std::max(worst, error);
        }
      }
    }
  }
  const double allowed = std::is_same_v<T, arch::half> ? 4e-3 : 3e-2;
  check(worst <= allowed && worst_lse <= 1e-3,
        name + ": off by " + std::to_string(worst) + ", lse by " + std::to_string(worst_lse));
}

template <class T, class KV, int dims, class Policy, template <class> class StagesOf = SeamStages>
void run(const Case& c, const std::string& name) {
  using Tile = AttentionTile<T, KV, dims, Shape>;
  using Stages = StagesOf<Tile>;
  const int batch = static_cast<int>(c.lengths.size());
  const int longest = std::max(*std::max_element(c.lengths.begin(), c.lengths.end()), 1);
  const int max_blocks = c.paged ? (longest + c.block_size - 1) / c.block_size : 1;
  const int block_size = c.paged ? c.block_size : longest, num_blocks = batch * max_blocks;
  const size_t kv_elements = size_t(num_blocks) * block_size * c.kv_heads * c.head_dim;
  simulated::Tensor<T> q(size_t(batch) * c.q_len * c.q_heads * c.head_dim), out(q.size());
  simulated::Tensor<KV> k(kv_elements), v(kv_elements);
  simulated::Tensor<float> lse(size_t(batch) * c.q_heads * c.q_len), phi(c.q_heads), slopes(c.q_heads),
      sinks(c.q_heads);
  simulated::Tensor<int32_t> seq_lens(batch), table(size_t(batch) * max_blocks), fallbacks(1);
  check.fill(q);
  check.fill(v);
  check.fill(k);
  std::vector<int32_t> order(num_blocks);
  for (int i = 0; i < num_blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), check.random);
  for (int i = 0; i < num_blocks; ++i) table[i] = order[i];
  for (int b = 0; b < batch; ++b) seq_lens[b] = c.lengths[b];
  for (int h = 0; h < c.q_heads; ++h) {
    phi[h] = c.phi;
    slopes[h] = 0.01f * static_cast<float>(h + 1);
    sinks[h] = 0.5f * static_cast<float>(h);
  }
  fallbacks[0] = 0;

  AttentionLaunch launch{};
  AttentionParams& p = launch.p;
  p.q = q.data();
  p.k_cache = k.data();
  p.v_cache = v.data();
  p.out = out.data();
  p.lse = lse.data();
  p.seq_lens = seq_lens.data();
  p.block_table = c.paged ? table.data() : nullptr;
  p.phi = Policy::kUnified ? phi.data() : nullptr;
  p.alibi_slopes = c.alibi ? slopes.data() : nullptr;
  p.sinks = c.sinks ? sinks.data() : nullptr;
  p.fallback_count = fallbacks.data();
  p.q_head_stride = c.head_dim;
  p.q_token_stride = int64_t{c.q_heads} * c.head_dim;
  p.q_batch_stride = p.q_token_stride * c.q_len;
  p.k.head_stride = c.head_dim;
  p.k.token_stride = int64_t{c.kv_heads} * c.head_dim;
  p.k.block_stride = p.k.token_stride * block_size;
  p.v = p.k;
  p.table_stride = max_blocks;
  p.batch = batch;
  p.q_len = c.q_len;
  p.q_heads = c.q_heads;
  p.kv_heads = c.kv_heads;
  p.head_dim = c.head_dim;
  p.num_blocks = num_blocks;
  p.block_size = block_size;
  p.max_blocks = max_blocks;
  p.scale = 1.f / std::sqrt(static_cast<float>(c.head_dim));
  p.softcap = c.softcap;
  p.window = c.window;

  launch.set_query_tiles(Tile::kRows);
  const int64_t kv_tiles = std::max<int64_t>((p.capacity() + kKvTile - 1) / kKvTile, 1);
  const int64_t resident = std::max(c.resident / c.cluster, 1);
  const AttentionGrid grid = choose_attention_grid(resident, batch, launch.work_tiles_per_sequence(), c.num_splits,
                                                   kv_tiles, 2 * c.cluster, 1, int64_t{1} << 12);
  launch.cluster_size_log2 = std::bit_width(static_cast<unsigned>(c.cluster)) - 1;
  launch.min_kv_tiles_log2 = std::bit_width(static_cast<unsigned>(c.cluster * Tile::kWarps)) - 1;
  launch.uniform_splits = static_cast<int32_t>(grid.uniform_splits);
  launch.streams = static_cast<uint32_t>(grid.streams);
  launch.max_streams = static_cast<uint32_t>(grid.max_streams);
  launch.min_uniform_keys = static_cast<float>(grid.min_uniform_tiles) * kKvTile;
  const size_t slots = std::max<int64_t>(grid.slots, 1), rows = launch.slot_rows;
  simulated::Tensor<float> partial_out(slots * rows * c.head_dim);
  simulated::Tensor<SoftmaxState> partial_states(slots * rows);
  simulated::Tensor<uint64_t> ready(slots);
  launch.partial_out = partial_out.data();
  launch.partial_states = partial_states.data();
  launch.ready = ready.data();
  launch.nonce = 0x123456789abcdefull;

  for (int replay = 0; replay < (c.graph ? 2 : 1); ++replay) {
    simulated::gpu().launch(
        {static_cast<unsigned>(grid.blocks * c.cluster)}, Tile::kThreads, SharedMemory<Tile, Stages>::kBytes,
        [&] { decode_attention_kernel<Tile, Policy, Stages>(launch, {}); }, c.cluster);
    compare<T, KV>(c, p, out, lse, table, name);
  }
}

template <class T, class KV, int dims>
void run_policies(const Case& c, const std::string& name) {
  run<T, KV, dims, OnlineMax>(c, name + ", online");
  run<T, KV, dims, UnifiedMax<T>>(c, name + ", unified");
}

template <class T, class KV, int dims>
void run_type(const std::string& type) {
  const auto go = [&](const char* what, const Case& c) { run_policies<T, KV, dims>(c, type + ", " + what); };
  go("one sequence, uniform split, graph replay", {.lengths = {300}, .head_dim = dims, .graph = true});
  go("ragged lengths, stream-K split, graph replay", {.lengths = {400, 3, 17, 0, 90}, .head_dim = dims, .graph = true});
  go("even lengths", {.lengths = {100, 100, 97}, .head_dim = dims});
  go("contiguous", {.lengths = {130, 7}, .head_dim = dims, .paged = false});
  go("fixed splits", {.lengths = {200, 33}, .head_dim = dims, .num_splits = 3});
  go("block size 1", {.lengths = {50, 21}, .q_heads = 3, .kv_heads = 1, .head_dim = dims, .block_size = 1});
  go("phi far off", {.lengths = {120}, .head_dim = dims, .phi = 500.f});
  go("window and ALiBi", {.lengths = {150, 40}, .head_dim = dims, .q_len = 2, .window = 37, .alibi = true});
  go("softcap and sinks, 3 new tokens",
     {.lengths = {70, 2}, .head_dim = dims, .q_len = 3, .softcap = 5.f, .sinks = true});
  go("head_dim below the kernel's", {.lengths = {64, 20}, .head_dim = dims - 16});
  go("40 sequences", {.lengths = std::vector<int>(40, 9), .q_heads = 2, .kv_heads = 2, .head_dim = dims});
}

// Clusters, which AMD GPUs do not have.
void run_clusters() {
#if !defined(USE_ROCM)
  const auto go = [](const char* what, const Case& c) {
    run<arch::half, arch::half, 64, OnlineMax, ClusterStages>(c, std::string("clusters ") + what + ", online");
    run<arch::half, arch::half, 64, UnifiedMax<arch::half>, ClusterStages>(
        c, std::string("clusters ") + what + ", unified");
  };
  go("of 2, uniform split, graph replay", {.lengths = {300}, .cluster = 2, .graph = true});
  go("of 4, several per work tile, graph replay",
     {.lengths = {400}, .q_heads = 16, .resident = 24, .cluster = 4, .graph = true});
  go("of 8, one key tile", {.lengths = {5}, .cluster = 8});
  go("of 2, stream-K split, graph replay", {.lengths = {400, 3, 17, 0, 90}, .cluster = 2, .graph = true});
  go("of 4, stream-K split", {.lengths = {30, 200, 1}, .q_heads = 6, .q_len = 3, .resident = 16, .cluster = 4});
  go("of 2, fixed splits", {.lengths = {200, 33}, .num_splits = 3, .cluster = 2});
  go("of 1", {.lengths = {70, 90}, .cluster = 1});
#endif
}

// Random shapes.
void run_random(int count) {
  const auto pick = [](int low, int high) { return std::uniform_int_distribution<int>(low, high)(check.random); };
  for (int i = 0; i < count; ++i) {
    Case c;
    const int longest = pick(1, 3) == 1 ? 20 : 260;
    c.q_len = pick(1, 4) == 1 ? pick(2, 4) : 1;
    c.lengths.resize(pick(1, 3) == 1 ? 1 : pick(2, 12));
    const int common = pick(c.q_len, longest);
    const bool even = pick(0, 1);
    for (int& length : c.lengths) length = even ? common : pick(0, longest);
    c.kv_heads = pick(1, 3);
    c.q_heads = c.kv_heads * pick(1, 16);
    c.head_dim = 8 * pick(2, 8);
    c.block_size = pick(0, 1) ? 16 << pick(0, 1) : pick(1, 7);
    c.resident = pick(1, 24);
    c.num_splits = pick(1, 4) == 1 ? pick(1, 5) : 0;
    c.window = pick(1, 4) == 1 ? pick(1, 100) : 0;
    c.paged = pick(1, 4) > 1;
    c.phi = pick(1, 4) == 1 ? 50.f : 1.f;
    c.graph = pick(1, 4) == 1;
    run_policies<arch::half, arch::half, 64>(c, "random shape " + std::to_string(i));
  }
}

}  // namespace

int main() {
  run_type<arch::half, arch::half, 64>("half");
  run_clusters();
#if !defined(FLASHDECPP_SIMULATED_FEW)
  run_type<arch::bfloat16, arch::bfloat16, 64>("bfloat16");
  run_type<arch::half, arch::float8, 64>("half with float8");
  run_policies<arch::half, arch::half, 64>({.lengths = {90, 33}, .q_heads = 32, .kv_heads = 1, .q_len = 2},
                                           "64 rows of a KV head");
  run_policies<arch::half, arch::half, 128>({.lengths = {60, 200}, .q_heads = 14, .head_dim = 128}, "head_dim 128");
  run_random(24);
#endif
  return check.report();
}
