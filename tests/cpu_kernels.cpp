// The CPU kernels of one instruction set, without torch, against double precision: conversions, functions, decode
// attention, linear. It needs only a compiler for the target and a machine or emulator to run the program.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#define FLASHDECPP_ISA under_test
#include "cpu/kernel_table.h"

using namespace flashdecpp;
using namespace flashdecpp::cpu;
using namespace flashdecpp::cpu::under_test;

namespace {

int failures = 0;

void check(bool ok, const char* what, double got, double want) {
  if (ok) return;
  if (++failures <= 20) std::printf("%s: got %.9g, expected %.9g\n", what, got, want);
}

bool same(float a, float b) { return a == b || (a != a && b != b); }
bool near(double got, double want, double relative, double absolute = 0) {
  return std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= relative * std::fabs(want) + absolute;
}

// Every bit pattern of T through the vector loads, and floats across the whole range through the vector store.
template <class T, class Bits>
void conversions(const char* what) {
  constexpr int kAll = 1 << (8 * sizeof(T)), kStep = 2 * kLanes;
  std::vector<T> x(kAll);
  for (int i = 0; i < kAll; ++i) {
    const Bits bits = static_cast<Bits>(i);
    std::memcpy(&x[i], &bits, sizeof(T));
  }
  constexpr float kLoadScale = sizeof(T) == 1 ? kFp8LoadScale : 1.0f;
  float out[kStep];
  for (int i = 0; i < kAll; i += kStep) {
    const Pair pair = load_pair(&x[i]);
    store_in_order(out, pair, T{});
    for (int j = 0; j < kStep; ++j)
      check(same(out[j] * kLoadScale, to_float(x[i + j])), what, out[j], to_float(x[i + j]));
  }
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 65521) {
    float values[kLanes];
    T stored[kLanes];
    for (int j = 0; j < kLanes; ++j) values[j] = as_float(static_cast<uint32_t>(bits) ^ (j << 12));
    if constexpr (sizeof(T) == 2) {
      store(stored, load(values));
      for (int j = 0; j < kLanes; ++j) {
        T scalar;
        from_float(values[j], &scalar);
        check(same(to_float(stored[j]), to_float(scalar)), what, to_float(stored[j]), to_float(scalar));
      }
    }
  }
}

void functions() {
  float in[kLanes], out[kLanes];
  const auto each = [&](const char* what, auto vector, auto scalar, double low, double high, double relative) {
    for (int i = 0; i < 20000; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) in[j] = static_cast<float>(low + (high - low) * (i + j) / 20000);
      store(out, vector(load(in)));
      for (int j = 0; j < kLanes; ++j) check(near(out[j], scalar(in[j]), relative), what, out[j], scalar(in[j]));
    }
  };
  each("exp", [](Vec x) { return exp(x); }, [](double x) { return std::exp(x); }, -87, 88, 3e-7);
  each("tanh", [](Vec x) { return tanh(x); }, [](double x) { return std::tanh(x); }, -12, 12, 5e-7);
  each("erfc", [](Vec x) { return erfc_positive(x); }, [](double x) { return std::erfc(x); }, 0, 5, 5e-6);
  each("round", [](Vec x) { return round(x); }, [](double x) { return std::nearbyint(x); }, -999, 999, 0);
  Vec x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = set1(static_cast<float>(i + 1));
  store(out, sum_each(x));
  for (int i = 0; i < kLanes; ++i) check(out[i] == (i + 1) * kLanes, "sum_each", out[i], (i + 1) * kLanes);
  const float nan = std::nanf("");
  store(out, max(set1(nan), set1(1.0f)));
  check(out[0] == 1.0f, "max(NaN, 1)", out[0], 1);
  store(out, min(set1(nan), set1(1.0f)));
  check(out[0] == 1.0f, "min(NaN, 1)", out[0], 1);
}

std::mt19937 generator(1);

template <class T>
std::vector<T> normal(size_t n) {
  std::normal_distribution<float> distribution;
  std::vector<T> x(n);
  for (T& value : x) from_float(distribution(generator), &value);
  return x;
}

// One sequence, with its blocks in reverse order; each split is one task for all heads.
template <class KV, class Q>
void attention(DType kv_dtype, DType q_dtype, int q_heads, int kv_heads, int head_dim, int q_len, int length,
               int block_size, int splits, const float* phi, float tolerance) {
  const int blocks = (length + block_size - 1) / block_size, group = q_heads / kv_heads;
  const size_t cache_size = static_cast<size_t>(blocks) * block_size * kv_heads * head_dim;
  const std::vector<KV> k = normal<KV>(cache_size), v = normal<KV>(cache_size);
  const std::vector<Q> q = normal<Q>(static_cast<size_t>(q_len) * q_heads * head_dim);
  std::vector<Q> out(q.size());
  std::vector<float> lse(static_cast<size_t>(q_heads) * q_len), phis(q_heads, phi ? *phi : 0.0f);
  std::vector<int32_t> table(blocks);
  for (int i = 0; i < blocks; ++i) table[i] = blocks - 1 - i;

  AttentionParams p{};
  p.q = q.data();
  p.k_cache = k.data();
  p.v_cache = v.data();
  p.out = out.data();
  p.lse = lse.data();
  p.seq_lens = &length;
  p.block_table = table.data();
  p.phi = phi ? phis.data() : nullptr;
  p.q_batch_stride = static_cast<int64_t>(q.size());
  p.q_token_stride = int64_t{q_heads} * head_dim;
  p.q_head_stride = head_dim;
  p.k = p.v = {int64_t{block_size} * kv_heads * head_dim, int64_t{kv_heads} * head_dim, head_dim};
  p.table_stride = p.max_blocks = p.num_blocks = blocks;
  p.batch = 1;
  p.q_len = q_len;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.block_size = block_size;
  p.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  p.q_dtype = q_dtype;
  p.kv_dtype = kv_dtype;

  const Kernels kernel = kernel_table("under test");
  const int64_t split_floats = int64_t{q_len} * q_heads * (kPartialHeader + head_dim);
  std::vector<float> partials(static_cast<size_t>(splits * split_floats));
  AttentionTask task{0, 0, kv_heads, length, 0, length, nullptr};
  const int step = (length + splits - 1) / splits;
  for (int s = 0; s < splits; ++s) {
    task.key_begin = int64_t{s} * step;
    task.key_end = std::min(int64_t{s + 1} * step, int64_t{length});
    task.partial = splits > 1 ? partials.data() + s * split_floats : nullptr;
    kernel.attend(p, task);
  }
  if (splits > 1) kernel.combine(p, task, partials.data(), splits);

  for (int token = 0; token < q_len; ++token) {
    for (int head = 0; head < q_heads; ++head) {
      const Q* query = &q[(static_cast<size_t>(token) * q_heads + head) * head_dim];
      const int visible = length - q_len + token + 1;
      const auto row = [&](const std::vector<KV>& cache, int key) {
        const int64_t block = table[key / block_size];
        return &cache[((block * block_size + key % block_size) * kv_heads + head / group) * head_dim];
      };
      std::vector<double> logits(visible), expected(head_dim);
      double largest = -INFINITY, sum = 0;
      for (int key = 0; key < visible; ++key) {
        for (int d = 0; d < head_dim; ++d) logits[key] += double{to_float(query[d])} * to_float(row(k, key)[d]);
        logits[key] *= p.scale;
        largest = std::max(largest, logits[key]);
      }
      for (int key = 0; key < visible; ++key) {
        const double weight = std::exp(logits[key] - largest);
        sum += weight;
        for (int d = 0; d < head_dim; ++d) expected[d] += weight * to_float(row(v, key)[d]);
      }
      const Q* result = &out[(static_cast<size_t>(token) * q_heads + head) * head_dim];
      for (int d = 0; d < head_dim; ++d) {
        check(near(to_float(result[d]), expected[d] / sum, tolerance, tolerance), "attention", to_float(result[d]),
              expected[d] / sum);
      }
      const double expected_lse = largest + std::log(sum), got = lse[static_cast<size_t>(head) * q_len + token];
      check(near(got, expected_lse, 1e-5, 1e-5), "lse", got, expected_lse);
    }
  }
}

template <class KV, class Q>
void attention_shapes(DType kv_dtype, DType q_dtype, float tolerance) {
  const float served = 4.0f, unsafe = 1000.0f;
  for (const float* phi : {static_cast<const float*>(nullptr), &served, &unsafe}) {
    for (int splits : {1, 3}) {
      attention<KV, Q>(kv_dtype, q_dtype, 8, 2, 64, 1, 200, 200, splits, phi, tolerance);
      attention<KV, Q>(kv_dtype, q_dtype, 9, 9, 128, 1, 77, 16, splits, phi, tolerance);
      attention<KV, Q>(kv_dtype, q_dtype, 6, 2, 40, 3, 131, 16, splits, phi, tolerance);
      attention<KV, Q>(kv_dtype, q_dtype, 4, 1, 256, 12, 50, 1, splits, phi, tolerance);
    }
  }
}

template <class T>
void linear_shapes(DType dtype, float tolerance) {
  for (int m : {1, 3, 9, 20, 50}) {
    const int n = 37, k = 264;
    const bool add = m == 20;
    const std::vector<T> x = normal<T>(static_cast<size_t>(m) * k), weight = normal<T>(static_cast<size_t>(n) * k);
    const std::vector<T> bias = normal<T>(n), before = normal<T>(static_cast<size_t>(m) * n);
    std::vector<T> out = before;
    LinearParams p{};
    p.bias = m == 9 ? bias.data() : nullptr;
    p.fusion.kind = add ? LinearFusion::kResidual : LinearFusion::kNone;
    p.x = x.data();
    p.weight = weight.data();
    p.out = out.data();
    p.m = m;
    p.n = n;
    p.k = k;
    p.x_stride = p.weight_stride = k;
    p.dtype = dtype;
    const Kernels kernel = kernel_table("under test");
    const int64_t stride = (k + kPackAlign - 1) / kPackAlign * kPackAlign;
    std::vector<float> packed(static_cast<size_t>(m * stride));
    kernel.pack(p, packed.data(), stride, 0, m);
    for (const LinearTask& task : {LinearTask{0, m, 0, 16}, LinearTask{0, m, 16, n}}) {
      kernel.linear(p, packed.data(), stride, task);
    }
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        double expected = (p.bias ? to_float(bias[j]) : 0.f) + (add ? to_float(before[i * n + j]) : 0.f);
        for (int c = 0; c < k; ++c) expected += double{to_float(x[i * k + c])} * to_float(weight[j * k + c]);
        check(near(to_float(out[i * n + j]), expected, tolerance, 16 * tolerance), "linear", to_float(out[i * n + j]),
              expected);
      }
    }
  }
}

}  // namespace

int main() {
  conversions<bf16, uint16_t>("bfloat16");
  conversions<fp16, uint16_t>("float16");
  conversions<fp8, uint8_t>("float8");
  functions();
  attention_shapes<float, float>(DType::kFloat32, DType::kFloat32, 2e-6f);
  attention_shapes<fp16, fp16>(DType::kFloat16, DType::kFloat16, 1e-3f);
  attention_shapes<bf16, bf16>(DType::kBFloat16, DType::kBFloat16, 8e-3f);
  attention_shapes<fp8, bf16>(DType::kFloat8E4M3, DType::kBFloat16, 8e-3f);
  linear_shapes<float>(DType::kFloat32, 2e-6f);
  linear_shapes<fp16>(DType::kFloat16, 1e-3f);
  linear_shapes<bf16>(DType::kBFloat16, 8e-3f);
  std::printf("%d lanes, %d failures\n", kLanes, failures);
  return failures != 0;
}
