// sample on a CPU, rows split among threads: vector passes over the logits, then top-k and top-p thresholds that look
// only at the candidates above a cheap bound.
#include <algorithm>
#include <bit>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "boxing.h"
#include "checks/sample.h"
#include "cpu/kernels.h"

namespace flashdecpp::cpu {
namespace {

// Philox-4x32-10 (Salmon et al., SC 2011): the first of four words.
uint32_t philox(uint64_t key, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

// Maps floats other than NaN to integers in the same order.
uint32_t ordered(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);  // -0 -> 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float unordered(uint32_t x) { return std::bit_cast<float>(x & 0x80000000u ? x & 0x7fffffffu : ~x); }

constexpr int kBucketBits = 12;
constexpr int kBuckets = 1 << kBucketBits;

// The largest numbers of a row and their indices, in index order.
struct Candidates {
  std::vector<float> x;
  std::vector<int32_t> index;
};

// The k-th largest of x, 1 <= k <= x.size(). Reorders x.
float kth_largest(std::vector<float>& x, int64_t k) {
  std::nth_element(x.begin(), x.begin() + (k - 1), x.end(), std::greater<float>());
  return x[static_cast<size_t>(k - 1)];
}

// A lower bound of the k-th largest of x[0, n), close to it.
float bound_of_largest(const Kernels& kernel, const float* x, int64_t n, int64_t k, std::vector<float>& maxima) {
  maxima.resize(static_cast<size_t>((n + kMaxBlock - 1) / kMaxBlock));
  kernel.block_maxima(x, maxima.data(), n);
  if (k <= static_cast<int64_t>(maxima.size())) {
    // The k blocks with the largest maxima each have a number that is at least the k-th of them.
    std::vector<float> order = maxima;
    return kth_largest(order, k);
  }
  int32_t counts[kBuckets] = {};
  for (int64_t i = 0; i < n; ++i) ++counts[ordered(x[i]) >> (32 - kBucketBits)];
  int bucket = kBuckets - 1;
  for (; counts[bucket] < k; --bucket) k -= counts[bucket];
  return unordered(static_cast<uint32_t>(bucket) << (32 - kBucketBits));
}

// The numbers above -inf of x[0, n) that are at least its k-th largest: more than k if several equal it, fewer if fewer
// are above -inf. At least one must be.
Candidates largest(const Kernels& kernel, const float* x, int64_t n, int64_t k) {
  std::vector<float> maxima;
  // The bound may be -inf, or a NaN if it is the start of the bucket of -inf; max then returns the lowest finite
  // number.
  const float bound = std::max(std::numeric_limits<float>::lowest(), bound_of_largest(kernel, x, n, k, maxima));
  Candidates found;
  for (size_t block = 0; block < maxima.size(); ++block) {
    if (!(maxima[block] >= bound)) continue;
    const int64_t begin = static_cast<int64_t>(block) * kMaxBlock, end = std::min(begin + kMaxBlock, n);
    for (int64_t i = begin; i < end; ++i) {
      if (x[i] >= bound) {
        found.x.push_back(x[i]);
        found.index.push_back(static_cast<int32_t>(i));
      }
    }
  }
  std::vector<float> order = found.x;
  const float threshold = kth_largest(order, std::min(k, static_cast<int64_t>(order.size())));
  size_t kept = 0;
  for (size_t i = 0; i < found.x.size(); ++i) {
    if (found.x[i] < threshold) continue;
    found.x[kept] = found.x[i];
    found.index[kept++] = found.index[i];
  }
  found.x.resize(kept);
  found.index.resize(kept);
  return found;
}

double sum(const Kernels& kernel, const float* w, int64_t n, std::vector<double>& sums) {
  sums.resize(static_cast<size_t>((n + kSumBlock - 1) / kSumBlock));
  kernel.block_sums(w, sums.data(), n);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// The smallest weight kept if the largest weights are kept until they reach top_p of the total, 0 <= top_p < 1. The
// largest weight is 1.
float top_p_threshold(const Kernels& kernel, const float* w, int64_t n, float top_p) {
  constexpr int kShift = 31 - kBucketBits;  // weights are not negative, so the sign bit is left out
  std::vector<double> sums;
  const double total = sum(kernel, w, n, sums), wanted = static_cast<double>(top_p) * total;
  // All weights below min_weight add up to less than top_p leaves out, so the threshold is not among them.
  const float min_weight =
      static_cast<float>((1.0 - static_cast<double>(top_p)) * total / static_cast<double>(n) * 0.999);
  std::vector<float> candidates(static_cast<size_t>(n));
  size_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    candidates[count] = w[i];
    count += w[i] >= min_weight && w[i] > 0;
  }
  candidates.resize(count);

  double before = 0.0;
  if (count > 256) {  // keep only the candidates with the leading bits of the threshold
    sums.assign(kBuckets, 0.0);
    for (float x : candidates) sums[std::bit_cast<uint32_t>(x) >> kShift] += x;
    int bucket = kBuckets - 1, last = bucket;  // last: the lowest bucket reached that is not empty
    for (; bucket >= 0; --bucket) {
      if (sums[static_cast<size_t>(bucket)] == 0.0) continue;
      last = bucket;
      if (before + sums[static_cast<size_t>(bucket)] >= wanted) break;
      before += sums[static_cast<size_t>(bucket)];
    }
    std::erase_if(candidates, [&](float x) { return static_cast<int>(std::bit_cast<uint32_t>(x) >> kShift) != last; });
  }
  std::sort(candidates.begin(), candidates.end(), std::greater<float>());
  size_t kept = 0;
  while (kept + 1 < candidates.size() && before + candidates[kept] < wanted) before += candidates[kept++];
  return candidates[kept];
}

// The first index whose cumulative weight exceeds u * total, or, if rounding leaves none, the last index with a weight.
int64_t draw(const Kernels& kernel, const float* w, int64_t n, float u) {
  std::vector<double> sums;
  const double wanted = u * sum(kernel, w, n, sums);
  double before = 0.0;
  size_t block = 0;
  while (block + 1 < sums.size() && before + sums[block] <= wanted) before += sums[block++];
  for (int64_t i = static_cast<int64_t>(block) * kSumBlock; i < n; ++i) {
    before += w[i];
    if (w[i] > 0 && before > wanted) return i;
  }
  int64_t last = n - 1;
  while (last > 0 && !(w[last] > 0)) --last;
  return last;
}

// The row's token, or -1 if it has no logit above -inf.
int64_t choose(const SampleParams& p, const Kernels& kernel, int64_t row) {
  const int64_t n = p.vocab;
  const float temperature = p.temperature ? p.temperature[row] : 0.0f;
  const bool greedy = !(temperature > 0);
  if (greedy && !p.repetition_penalty) {
    const auto* logits = static_cast<const char*>(p.logits);
    return kernel.argmax(logits + row * p.logits_stride * checks::element_size(p.dtype), p.dtype, n);
  }
  const auto x = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(n));
  const float top = kernel.scores(p, row, x.get());
  if (greedy) return kernel.argmax(x.get(), DType::kFloat32, n);
  if (top == -std::numeric_limits<float>::infinity()) return -1;

  const int64_t k = p.top_k ? p.top_k[row] : 0;
  Candidates candidates;
  float* w = x.get();
  int64_t count = n;
  if (k > 0 && k < n) {
    candidates = largest(kernel, x.get(), n, k);
    w = candidates.x.data();
    count = static_cast<int64_t>(candidates.x.size());
  }
  kernel.weights(w, top, temperature, w, count);
  // The most likely token passes every filter. A comparison with NaN is false, so a NaN filter is off.
  float threshold = p.min_p && p.min_p[row] > 0.0f ? std::min(p.min_p[row], 1.0f) : 0.0f;
  if (p.top_p && p.top_p[row] < 1.0f) {
    threshold = std::max(threshold, top_p_threshold(kernel, w, count, std::max(p.top_p[row], 0.0f)));
  }
  if (threshold > 0.0f) {
    for (int64_t i = 0; i < count; ++i) w[i] = w[i] < threshold ? 0.0f : w[i];
  }
  const uint64_t seed = p.seed ? static_cast<uint64_t>(p.seed[row]) : 0;
  const uint64_t position = p.position ? static_cast<uint64_t>(p.position[row]) : 0;
  const int64_t drawn = draw(kernel, w, count, static_cast<float>(philox(seed, position) >> 8) * 0x1p-24f);
  return candidates.index.empty() ? drawn : candidates.index[static_cast<size_t>(drawn)];
}

Tensor run_sample(const Tensor& logits, SampleParams p) {
  Tensor out = new_tensor({p.batch}, DType::kInt64, View(logits).device);
  p.out = static_cast<int64_t*>(View(out).data);
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = choose(p, kernel, row);
      p.out[row] = token;
      if (p.seen && token >= 0) p.seen[row * p.vocab + token] = true;
    }
  });
  return out;
}

Tensor sample(Tensor logits, OptionalTensor temperature, OptionalTensor top_k, OptionalTensor top_p,
              OptionalTensor min_p, OptionalTensor seed, OptionalTensor position) {
  return run_sample(
      logits, checks::sample(logits, temperature, top_k, top_p, min_p, seed, position, std::nullopt, std::nullopt));
}

Tensor sample_seen(Tensor logits, Tensor seen, OptionalTensor repetition_penalty, OptionalTensor temperature,
                   OptionalTensor top_k, OptionalTensor top_p, OptionalTensor min_p, OptionalTensor seed,
                   OptionalTensor position) {
  return run_sample(logits,
                    checks::sample(logits, temperature, top_k, top_p, min_p, seed, position, repetition_penalty, seen));
}

}  // namespace
}  // namespace flashdecpp::cpu

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)
{
  m.impl("sample", flashdecpp::boxed<&flashdecpp::cpu::sample>);
  m.impl("sample.seen", flashdecpp::boxed<&flashdecpp::cpu::sample_seen>);
}
