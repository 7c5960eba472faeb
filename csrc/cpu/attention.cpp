// decode_attention on a CPU: tasks of (sequence, KV head, range of keys), and a merge where a sequence was split.
#include <atomic>
#include <memory>
#include <tuple>

#include "contract.h"
#include "kernels.h"
#include "scratch.h"

namespace flashdecpp::cpu {
namespace {

// A split is a fixed number of keys, so that a sequence gives the same bits alone and in any batch.
constexpr int64_t kSplitKeys = 512;
constexpr int64_t kMinSplitKeys = 16;  // of splits that the caller counts
constexpr int64_t kMinBytesPerThread = 64 * 1024;

struct Keys {
  int64_t length, begin, end, split;  // the sequence, what any of its rows sees of it, and that in splits
  int64_t splits() const { return end > begin ? (end - begin + split - 1) / split : 1; }
};

Keys keys_of(const AttentionParams& p, int32_t b) {
  const int64_t capacity = p.num_blocks > 0 ? p.capacity() : 0;
  Keys keys{};
  keys.length = std::clamp<int64_t>(p.seq_lens[b], 0, capacity);
  keys.end = keys.length;
  if (p.window > 0) keys.begin = std::max<int64_t>(0, std::max<int64_t>(0, keys.length - p.q_len) - p.window + 1);
  const int64_t span = keys.end - keys.begin;
  keys.split = p.num_splits > 0 ? std::max((span + p.num_splits - 1) / p.num_splits, kMinSplitKeys) : kSplitKeys;
  return keys;
}

void run(const AttentionParams& p) {
  const Kernels& kernel = kernels();
  int64_t most_splits = 1, total_keys = 0;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Keys keys = keys_of(p, b);
    most_splits = std::max(most_splits, keys.splits());
    total_keys += keys.end - keys.begin;
  }
  const int64_t pairs = int64_t{p.batch} * p.kv_heads;
  const int64_t split_floats = int64_t{p.q_len} * p.group() * (kStateHeader + p.head_dim);
  Scratch<float, 4096> partials(most_splits > 1 ? static_cast<size_t>(pairs * most_splits * split_floats) : 0);
  // How many splits of a pair are still to come: whoever finishes the last one merges.
  Scratch<std::atomic<int32_t>, 64> pending(most_splits > 1 ? static_cast<size_t>(pairs) : 0);
  if (most_splits > 1) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t splits = keys_of(p, static_cast<int32_t>(pair / p.kv_heads)).splits();
      new (pending.data() + pair) std::atomic<int32_t>(static_cast<int32_t>(splits));
    }
  }
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> fallbacks{0};

  auto work = [&] {
    int32_t count = 0;
    for (;;) {
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= pairs * most_splits) break;
      const int64_t pair = index / most_splits, split = index % most_splits;
      const int32_t b = static_cast<int32_t>(pair / p.kv_heads), h = static_cast<int32_t>(pair % p.kv_heads);
      const Keys keys = keys_of(p, b);
      const int64_t splits = keys.splits();
      if (split >= splits) continue;
      AttentionTask task{b,
                         h,
                         keys.length,
                         keys.begin + split * keys.split,
                         std::min(keys.begin + (split + 1) * keys.split, keys.end),
                         nullptr};
      float* pair_partials = partials.data() + pair * most_splits * split_floats;
      if (splits > 1) task.partial = pair_partials + split * split_floats;
      count += kernel.attend(p, task);
      if (splits > 1 && pending.data()[pair].fetch_sub(1, std::memory_order_acq_rel) == 1) {
        count += kernel.merge(p, b, h, pair_partials, splits);
      }
    }
    if (count) fallbacks.fetch_add(count, std::memory_order_relaxed);
  };

  const int64_t bytes = total_keys * p.kv_heads * p.head_dim * 2 * contract::element_size(p.kv_dtype);
  const int64_t threads = std::min<int64_t>(
      {static_cast<int64_t>(torch::stable::get_num_threads()), pairs * most_splits, 1 + bytes / kMinBytesPerThread});
  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work();
    });
  } else {
    work();
  }
  if (p.fallback_count) *p.fallback_count += fallbacks.load();
}

template <class Phi>  // as in contract::decode_attention
std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,
                                            OptionalTensor block_table, std::optional<double> scale, Phi phi,
                                            double softcap, int64_t window, OptionalTensor alibi_slopes,
                                            OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale,
                                            int64_t num_splits, OptionalTensor fallback_count) {
  AttentionParams p =
      contract::decode_attention(contract::kCpu, q, k_cache, v_cache, seq_lens, block_table, scale, phi, softcap,
                                 window, alibi_slopes, sinks, k_scale, v_scale, num_splits, fallback_count);
  Tensor out = new_tensor({p.batch, p.q_len, p.q_heads, p.head_dim}, p.q_dtype, View(q).device);
  Tensor lse = new_tensor({p.batch, p.q_heads, p.q_len}, DType::kFloat32, View(q).device);
  p.out = View(out).data;
  p.lse = static_cast<float*>(View(lse).data);
  if (p.batch > 0) run(p);
  return {out, lse};
}

}  // namespace
}  // namespace flashdecpp::cpu

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)
{
  using namespace flashdecpp;
  m.impl("decode_attention", TORCH_BOX(&cpu::decode_attention<OptionalTensor>));
  m.impl("decode_attention.carry", TORCH_BOX(&cpu::decode_attention<Tensor>));
}
