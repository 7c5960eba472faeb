// sample on a CPU: vector passes over the logits, then thresholds that only look at what matters.
#include <algorithm>
#include <bit>
#include <memory>
#include <numeric>
#include <vector>

#include "contract.h"
#include "kernels.h"
#include "scratch.h"

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

// Whole numbers in the order of the floats (no NaN).
uint32_t ordered(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);  // -0 -> 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr int kBucketBits = 12;
constexpr int kBuckets = 1 << kBucketBits;

// The k-th largest of x[0, n), 1 <= k <= n: a histogram of leading bits finds its bucket, and few are left to order.
float kth_largest(const float* x, int64_t n, int64_t k, std::vector<float>& few) {
  int32_t counts[kBuckets] = {};
  for (int64_t i = 0; i < n; ++i) ++counts[ordered(x[i]) >> (32 - kBucketBits)];
  int bucket = kBuckets - 1;
  for (; counts[bucket] < k; --bucket) k -= counts[bucket];
  few.clear();
  for (int64_t i = 0; i < n; ++i) {
    if (static_cast<int>(ordered(x[i]) >> (32 - kBucketBits)) == bucket) few.push_back(x[i]);
  }
  std::nth_element(few.begin(), few.begin() + (k - 1), few.end(), std::greater<float>());
  return few[k - 1];
}

// The smallest weight that is kept when the largest weights are taken until `share` of the total is reached.
float top_p_threshold(const float* w, int64_t n, float share, std::vector<float>& few) {
  constexpr int kShift = 31 - kBucketBits;  // weights are not negative: their sign bit says nothing
  std::vector<double> sums(kBuckets, 0.0);
  for (int64_t i = 0; i < n; ++i) sums[std::bit_cast<uint32_t>(w[i]) >> kShift] += w[i];
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  const double wanted = static_cast<double>(share) * total;
  double before = 0.0;
  int bucket = kBuckets - 1, last = bucket;  // last: of those that hold anything
  for (; bucket >= 0; --bucket) {
    if (sums[bucket] == 0.0) continue;
    last = bucket;
    if (before + sums[bucket] >= wanted) break;
    before += sums[bucket];
  }
  bucket = last;
  few.clear();
  for (int64_t i = 0; i < n; ++i) {
    if (static_cast<int>(std::bit_cast<uint32_t>(w[i]) >> kShift) == bucket && w[i] > 0) few.push_back(w[i]);
  }
  std::sort(few.begin(), few.end(), std::greater<float>());
  size_t kept = 0;
  while (kept + 1 < few.size() && before + few[kept] < wanted) before += few[kept++];
  return few[kept];
}

// The first index whose cumulative weight exceeds u * total; the last one with a weight where rounding leaves none.
int64_t draw(const Kernels& kernel, const float* w, int64_t n, float u) {
  const int64_t blocks = (n + kSumBlock - 1) / kSumBlock;
  Scratch<double, 1024> scratch(static_cast<size_t>(blocks));
  double* sums = scratch.data();
  kernel.block_sums(w, sums, n);
  double total = 0.0;
  for (int64_t i = 0; i < blocks; ++i) total += sums[i];
  const double wanted = u * total;
  double before = 0.0;
  int64_t block = 0;
  while (block + 1 < blocks && before + sums[block] <= wanted) before += sums[block++];
  int64_t last = 0;
  for (int64_t i = block * kSumBlock; i < n; ++i) {
    if (w[i] > 0) {
      before += w[i];
      last = i;
      if (before > wanted) return i;
    }
  }
  if (w[last] > 0) return last;
  last = n - 1;
  while (last > 0 && !(w[last] > 0)) --last;
  return last;
}

int64_t choose(const SampleParams& p, const Kernels& kernel, int64_t row) {
  const int64_t n = p.vocab;
  const bool greedy = !p.temperature || !(p.temperature[row] > 0);
  if (greedy && !p.repetition_penalty) {
    const auto* logits = static_cast<const char*>(p.logits);
    return kernel.argmax(logits + row * p.logits_stride * contract::element_size(p.dtype), p.dtype, n);
  }
  const auto x = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(n));
  const float largest = kernel.scores(p, row, x.get());
  if (greedy) return kernel.argmax(x.get(), DType::kFloat32, n);
  if (largest == -std::numeric_limits<float>::infinity()) return 0;

  const int64_t k = p.top_k ? p.top_k[row] : 0;
  const float top_p = p.top_p ? p.top_p[row] : 1.0f, min_p = p.min_p ? p.min_p[row] : 0.0f;
  std::vector<float> few;
  if (k > 0 && k < n) {
    const float threshold = kth_largest(x.get(), n, k, few);
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] < threshold) x[i] = -std::numeric_limits<float>::infinity();
    }
  }
  float* w = x.get();
  kernel.weights(x.get(), largest, w, n);
  float threshold = min_p;
  if (top_p < 1.0f) threshold = std::max(threshold, top_p_threshold(w, n, top_p, few));
  if (threshold > 0.0f) {
    for (int64_t i = 0; i < n; ++i) {
      if (w[i] < threshold) w[i] = 0.0f;
    }
  }
  const uint64_t seed = p.seed ? static_cast<uint64_t>(p.seed[row]) : 0;
  const uint64_t position = p.position ? static_cast<uint64_t>(p.position[row]) : 0;
  return draw(kernel, w, n, static_cast<float>(philox(seed, position) >> 8) * 0x1p-24f);
}

Tensor run_sample(const Tensor& logits, SampleParams p) {
  Tensor out = new_tensor({p.batch}, DType::kInt64, View(logits).device);
  p.out = static_cast<int64_t*>(View(out).data);
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = choose(p, kernel, row);
      p.out[row] = token;
      if (p.seen) p.seen[row * p.vocab + token] = true;
    }
  });
  return out;
}

Tensor sample(Tensor logits, OptionalTensor temperature, OptionalTensor top_k, OptionalTensor top_p,
              OptionalTensor min_p, OptionalTensor seed, OptionalTensor position) {
  return run_sample(
      logits, contract::sample(logits, temperature, top_k, top_p, min_p, seed, position, std::nullopt, std::nullopt));
}

Tensor sample_seen(Tensor logits, Tensor seen, OptionalTensor repetition_penalty, OptionalTensor temperature,
                   OptionalTensor top_k, OptionalTensor top_p, OptionalTensor min_p, OptionalTensor seed,
                   OptionalTensor position) {
  return run_sample(
      logits, contract::sample(logits, temperature, top_k, top_p, min_p, seed, position, repetition_penalty, seen));
}

}  // namespace
}  // namespace flashdecpp::cpu

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)
{
  m.impl("sample", TORCH_BOX(&flashdecpp::cpu::sample));
  m.impl("sample.seen", TORCH_BOX(&flashdecpp::cpu::sample_seen));
}
