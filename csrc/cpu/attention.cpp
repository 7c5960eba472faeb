// decode_attention on a CPU: threads draw tasks of (sequence, split of its keys, KV heads) from one counter; whoever
// finishes the last split of a sequence's heads combines their partials.
#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>

#include "boxing.h"
#include "checks/decode_attention.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace flashdecpp::cpu {
namespace {

// A split has a fixed number of keys, so that a sequence gives the same bits alone and in any batch.
constexpr int64_t kSplitKeys = 512;
constexpr int64_t kMinSplitKeys = 16;  // if the caller sets num_splits
constexpr int64_t kMinBytesPerThread = 64 * 1024;
constexpr int64_t kNearBytes = 2 * 1024 * 1024;  // keys and values of this size may stay in a near cache
constexpr int64_t kTasksPerThread = 4;           // so that no thread waits long for the last task

// The sequence's length, the keys [begin, end) that any of its rows sees, and the keys per split.
struct Keys {
  int64_t length, begin, end, split;
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

struct Sequence {
  Keys keys;
  int64_t first_split, first_partial;  // its first split among all splits, and among those that write partials
};

void run(const AttentionParams& p) {
  const Kernels& kernel = kernels();
  Scratch<Sequence, 64> sequences(static_cast<size_t>(p.batch));
  int64_t splits = 0, partial_splits = 0, total_keys = 0;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Keys keys = keys_of(p, b);
    new (sequences.data() + b) Sequence{keys, splits, partial_splits};
    splits += keys.splits();
    if (keys.splits() > 1) partial_splits += keys.splits();
    total_keys += keys.end - keys.begin;
  }
  const int64_t bytes = total_keys * p.kv_heads * p.head_dim * 2 * checks::element_size(p.kv_dtype);
  const int64_t threads = std::min<int64_t>(
      {static_cast<int64_t>(torch::stable::get_num_threads()), splits * p.kv_heads, 1 + bytes / kMinBytesPerThread});
  // More heads per task read memory in longer runs, so a task has as many as leave kTasksPerThread tasks per thread.
  // Keys and values in a near cache are faster one head at a time, unless a head has a single row.
  int32_t task_heads = bytes <= kNearBytes && p.q_len * p.group() > 1 ? 1 : p.kv_heads;
  while (task_heads > 1 && splits * (p.kv_heads / task_heads) < kTasksPerThread * threads) task_heads /= 2;
  const int32_t head_chunks = (p.kv_heads + task_heads - 1) / task_heads;

  const int64_t head_floats = int64_t{p.q_len} * p.group() * (kPartialHeader + p.head_dim);
  const int64_t split_floats = p.kv_heads * head_floats;
  Scratch<float, 4096> partials(static_cast<size_t>(partial_splits * split_floats));
  // Unfinished splits of each sequence and head chunk.
  Scratch<std::atomic<int32_t>, 64> pending(static_cast<size_t>(p.batch) * head_chunks);
  for (int64_t i = 0; i < int64_t{p.batch} * head_chunks; ++i) {
    const Keys& keys = sequences.data()[i / head_chunks].keys;
    new (pending.data() + i) std::atomic<int32_t>(static_cast<int32_t>(keys.splits()));
  }
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> fallbacks{0};

  auto work = [&] {
    int32_t count = 0;
    const Sequence *const first = sequences.data(), *const last = first + p.batch;
    for (;;) {
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= splits * head_chunks) break;
      const int64_t global_split = index / head_chunks;
      const int32_t head_begin = static_cast<int32_t>(index % head_chunks) * task_heads;
      const int32_t head_end = std::min(head_begin + task_heads, p.kv_heads);
      const Sequence* sequence =
          std::upper_bound(first, last, global_split,
                           [](int64_t split, const Sequence& other) { return split < other.first_split; }) -
          1;
      const int32_t b = static_cast<int32_t>(sequence - first);
      const Keys& keys = sequence->keys;
      const int64_t split = global_split - sequence->first_split, num_splits = keys.splits();
      AttentionTask task{b,
                         head_begin,
                         head_end,
                         keys.length,
                         keys.begin + split * keys.split,
                         std::min(keys.begin + (split + 1) * keys.split, keys.end),
                         nullptr};
      float* first_partial = partials.data() + sequence->first_partial * split_floats + head_begin * head_floats;
      if (num_splits > 1) task.partial = first_partial + split * split_floats;
      count += kernel.attend(p, task);
      auto& remaining = pending.data()[int64_t{b} * head_chunks + index % head_chunks];
      if (num_splits > 1 && remaining.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        count += kernel.combine(p, task, first_partial, num_splits);
      }
    }
    if (count) fallbacks.fetch_add(count, std::memory_order_relaxed);
  };

  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work();
    });
  } else {
    work();
  }
  if (p.fallback_count) *p.fallback_count += fallbacks.load();
}

template <class Phi>  // see checks::decode_attention
std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,
                                            OptionalTensor block_table, std::optional<double> scale, Phi phi,
                                            double softcap, int64_t window, OptionalTensor alibi_slopes,
                                            OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale,
                                            int64_t num_splits, OptionalTensor fallback_count) {
  AttentionParams p =
      checks::decode_attention(checks::kCpu, q, k_cache, v_cache, seq_lens, block_table, scale, phi, softcap, window,
                               alibi_slopes, sinks, k_scale, v_scale, num_splits, fallback_count);
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
  m.impl("decode_attention", boxed<&cpu::decode_attention<OptionalTensor>>);
  m.impl("decode_attention.carry", boxed<&cpu::decode_attention<Tensor>>);
}
