// Chooses one token per row: the largest logit, or a sample from what top-k, top-p and min-p leave.
//
// One CTA per row. Nothing is sorted: a threshold is found digit by digit of an order-preserving integer key; for each
// digit, one pass over the row histograms how many values (top-k) or how much probability (top-p) each digit has.
// Probabilities are summed as integers, in units of 2^-31 of the largest, so every sum is exact and the token depends
// on the row, seed and position alone, not on the order in which threads run.
//
// Shared memory: 16.5 KiB of sums. Floor: the row is read once for greedy; with all filters, about eight times, from L2
// after the first.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

inline constexpr int kSampleThreads = 1024;

// One row of logits, with the repetition penalty applied as they are read.
template <class T>
struct SampleRow {
  const T* logits;        // [vocab]
  const bool* penalized;  // [vocab] or null
  float penalty;
  uint32_t vocab;

  // Calls f(i, value) for i = begin, begin + step, ... below end. Loads are issued in batches: a single CTA has no
  // other way to hide their latency.
  template <class F>
  __device__ __forceinline__ void for_each(uint32_t begin, uint32_t end, uint32_t step, F f) const {
    constexpr uint32_t batch = 8;
    for (; begin + (batch - 1) * step < end; begin += batch * step) {
      T x[batch];
#pragma unroll
      for (uint32_t j = 0; j < batch; ++j) x[j] = logits[begin + j * step];
#pragma unroll
      for (uint32_t j = 0; j < batch; ++j) f(begin + j * step, value(x[j], begin + j * step));
    }
    for (; begin < end; begin += step) f(begin, value(logits[begin], begin));
  }

 private:
  __device__ __forceinline__ float value(T logit, uint32_t i) const {
    float x = arch::to_float(logit);
    if (penalized && penalized[i]) x = x > 0.f ? x / penalty : x * penalty;
    return x == x ? x + 0.f : -INFINITY;  // NaN is never chosen; + 0 turns -0 into 0
  }
};

// Maps floats to unsigned integers in the same order, and back.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The first word of Philox-4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ uint32_t philox(uint64_t key, uint64_t counter) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c0;
}

// 64-bit sums by digit, accumulated by all threads of a CTA. Two 32-bit words each: shared memory has native 32-bit
// atomic adds.
struct DigitSums {
  static constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits, kChunks = 32;
  uint32_t low[kDigits], high[kDigits];
  uint64_t chunk[kChunks];  // sums of kDigits / kChunks neighboring digits

  __device__ void clear() {
    for (int i = threadIdx.x; i < kDigits; i += kSampleThreads) low[i] = high[i] = 0;
  }

  __device__ __forceinline__ void add(int digit, uint32_t amount) {
    if (atomicAdd(&low[digit], amount) + amount < amount) atomicAdd(&high[digit], 1u);  // carry
  }

  __device__ __forceinline__ uint64_t sum(int digit) const { return uint64_t{high[digit]} << 32 | low[digit]; }

  __device__ void sum_chunks() {
    using namespace arch;
    for (int c = warp(); c < kChunks; c += kSampleThreads / kWarpSize) {
      uint64_t total = 0;
      for (int i = lane(); i < kDigits / kChunks; i += kWarpSize) total += sum(c * (kDigits / kChunks) + i);
      total = warp_reduce(total, [](uint64_t a, uint64_t b) { return a + b; });
      if (lane() == 0) chunk[c] = total;
    }
  }
};

// Index of the first of `count` amounts at which the running sum exceeds `wanted`; subtracts the sum before it from
// `wanted`.
template <class Amount>
__device__ __forceinline__ int find_first(int count, uint64_t& wanted, Amount amount) {
  uint64_t before = 0;
  int found = -1;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const uint64_t next = amount(i);
    if (found < 0) {
      if (before + next > wanted) {
        found = i;
      } else {
        before += next;
      }
    }
  }
  wanted -= before;
  return found;
}

// The smallest key >= min_key such that the amounts of all larger keys sum to less than the target; min_key if the
// amounts of all keys together do not reach it. target_of(total) maps the sum of all amounts to the target.
template <class T, class Amount, class Target>
__device__ uint32_t find_threshold(const SampleRow<T>& row, DigitSums& sums, uint32_t min_key, Amount amount,
                                   Target target_of) {
  constexpr int chunk_digits = DigitSums::kDigits / DigitSums::kChunks;
  uint32_t prefix = 0;  // the digits found so far
  uint64_t wanted = 0;
  for (int above = 32, at; above > 0; above = at) {  // the digit is bits [at, above): 11, 11 and 10 of them
    at = max(above - DigitSums::kDigitBits, 0);
    const bool first = above == 32;
    const uint32_t mask = (1u << (above - at)) - 1;
    __syncthreads();  // no thread still reads the sums of the previous digit
    sums.clear();
    __syncthreads();
    row.for_each(threadIdx.x, row.vocab, kSampleThreads, [&](uint32_t, float x) {
      const uint32_t key = key_of(x);
      const bool same = first || key >> above == prefix >> above;
      const uint32_t mine = same && key >= min_key ? amount(x) : 0;
      if (mine) sums.add(key >> at & mask, mine);
    });
    __syncthreads();
    sums.sum_chunks();
    __syncthreads();
    if (first) {
      uint64_t total = 0;
      for (int c = 0; c < DigitSums::kChunks; ++c) total += sums.chunk[c];
      wanted = target_of(total);
      if (wanted > total) return min_key;
      wanted -= 1;  // find_first looks for a sum that exceeds it
    }
    const int chunk = DigitSums::kChunks - 1 - find_first(DigitSums::kChunks, wanted, [&](int i) {
                        return sums.chunk[DigitSums::kChunks - 1 - i];
                      });
    const int top = chunk * chunk_digits + chunk_digits - 1;
    const int digit = top - find_first(chunk_digits, wanted, [&](int i) { return sums.sum(top - i); });
    prefix |= static_cast<uint32_t>(digit) << at;
  }
  return prefix;
}

// The first index whose running sum of weights exceeds u24 / 2^24 times their total. The range is split into one
// segment per warp, repeatedly.
template <class T, class Weight>
__device__ uint32_t draw(const SampleRow<T>& row, uint64_t* scratch, uint32_t u24, Weight weight) {
  using namespace arch;
  constexpr int warps = kSampleThreads / kWarpSize;
  uint32_t begin = 0, end = row.vocab;
  uint64_t wanted = 0;
  for (bool first = true; end - begin > 1 || first; first = false) {
    const uint32_t length = (end - begin + warps - 1) / warps;
    const uint32_t stop = min(begin + (warp() + 1) * length, end);
    uint64_t sum = 0;
    row.for_each(begin + warp() * length + lane(), stop, kWarpSize, [&](uint32_t, float x) { sum += weight(x); });
    sum = warp_reduce(sum, [](uint64_t a, uint64_t b) { return a + b; });
    __syncthreads();
    if (lane() == 0) scratch[warp()] = sum;
    __syncthreads();
    if (first) {
      uint64_t total = 0;
      for (int w = 0; w < warps; ++w) total += scratch[w];
      wanted = (total >> 24) * u24 + ((total & 0xffffff) * u24 >> 24);  // floor(u * total)
    }
    begin += find_first(warps, wanted, [&](int i) { return scratch[i]; }) * length;
    end = min(begin + length, end);
  }
  return begin;
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SampleParams p) {
  using namespace arch;
  allow_next_kernel();
  wait_for_previous_kernel();
  __shared__ DigitSums sums;
  __shared__ uint64_t scratch[kSampleThreads / kWarpSize];
  const int64_t r = blockIdx.x;
  const float temperature = p.temperature ? p.temperature[r] : 0.f;
  SampleRow<T> row;
  row.logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
  row.penalized = p.repetition_penalty ? p.seen + r * p.vocab : nullptr;
  const float penalty = p.repetition_penalty ? p.repetition_penalty[r] : 1.f;
  row.penalty = penalty > 0.f && penalty < INFINITY ? penalty : 1.f;
  row.vocab = static_cast<uint32_t>(p.vocab);

  // The largest value; among equals, the lowest index.
  uint32_t token = threadIdx.x;
  float largest = -INFINITY;
  row.for_each(threadIdx.x, row.vocab, kSampleThreads, [&](uint32_t i, float x) {
    if (x > largest) {
      largest = x;
      token = i;
    }
  });
  uint64_t best = threadIdx.x < row.vocab ? uint64_t{key_of(largest)} << 32 | ~token : 0;
  best = block_reduce(best, 0, scratch, [](uint64_t a, uint64_t b) { return max(a, b); });
  token = ~static_cast<uint32_t>(best);
  largest = value_of(static_cast<uint32_t>(best >> 32));

  if (largest == -INFINITY) {  // no token can be chosen; uniform across the CTA
    if (threadIdx.x == 0) p.out[r] = -1;
    return;
  }
  if (temperature > 0.f) {
    // (x - largest) / temperature is computed as (x - largest) / 4 times 4 log2(e) / temperature. Quarters of finite
    // logits cannot overflow when subtracted, and the clamps keep the other factor a normal number; so the exponent can
    // overflow to -inf only, whose weight is 0. The largest has weight 1 by definition: inf - inf would be NaN.
    constexpr float max_float = 0x1.fffffep127f;
    const float quarter = 0.25f * largest, inverse = fminf(5.77078016f / fminf(temperature, max_float), max_float);
    const auto weight_of = [&](float x) { return x == largest ? 1.f : exp2_approx((0.25f * x - quarter) * inverse); };
    const auto units = [](float weight) { return __float2uint_rn(weight * 2147483648.f); };

    uint32_t min_key = 0;
    const int top_k = p.top_k ? p.top_k[r] : 0;
    if (top_k > 0 && static_cast<uint32_t>(top_k) < row.vocab) {
      min_key = find_threshold(
          row, sums, min_key, [](float x) { return x > -INFINITY ? 1u : 0u; },
          [&](uint64_t) { return static_cast<uint64_t>(top_k); });
    }
    // The most likely token passes every filter. A NaN disables its filter: comparisons with it are false.
    const float top_p = p.top_p ? p.top_p[r] : 1.f;
    if (top_p < 1.f) {
      min_key = find_threshold(
          row, sums, min_key, [&](float x) { return units(weight_of(x)); },
          [&](uint64_t total) {
            return max(uint64_t{1}, static_cast<uint64_t>(ceil(fmax(0., double{top_p}) * total)));
          });
    }
    const float min_p = p.min_p ? p.min_p[r] : 0.f;
    const uint32_t random = philox(p.seed ? p.seed[r] : 0, p.position ? p.position[r] : 0);
    token = draw(row, scratch, random >> 8, [&](float x) {
      const float weight = weight_of(x);
      return x == largest || (key_of(x) >= min_key && !(weight < min_p)) ? units(weight) : 0u;
    });
  }
  if (threadIdx.x == 0) {
    p.out[r] = token;
    if (p.seen) p.seen[r * p.vocab + token] = true;
  }
}

}  // namespace flashdecpp
