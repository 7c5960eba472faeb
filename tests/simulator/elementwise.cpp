// Norms, gated activations, rotary embedding and sampling on the simulated GPU, compared with their definitions in
// double. The last line of the output counts the failed cases.
#include <algorithm>

#include "checks.h"
#include "cuda/elementwise/gated_activation_kernel.cuh"
#include "cuda/elementwise/norm_kernel.cuh"
#include "cuda/elementwise/rotary_append_kernel.cuh"
#include "cuda/sampling/sample_kernel.cuh"

using namespace flashdecpp;
using simulated::Tensor;

namespace {

Checks check(5);

bool near(double expected, double got) { return std::fabs(expected - got) <= 4e-3 * (1 + std::fabs(expected)); }

void norm(int rows, int cols, bool layer, bool with_residual) {
  using T = arch::half;
  Tensor<T> x(size_t(rows) * cols), residual(x.size()), out(x.size()), weight(cols), bias(cols);
  for (const auto* tensor : {&x, &residual, &weight, &bias}) check.fill(*tensor);
  std::vector<double> h(x.size());
  for (size_t i = 0; i < h.size(); ++i) {
    h[i] = arch::to_float(x[i]);
    if (with_residual)
      h[i] = arch::to_float(arch::from_float<T>(static_cast<float>(h[i]) + arch::to_float(residual[i])));
  }
  NormParams p{};
  p.x = x.data();
  p.weight = weight.data();
  p.bias = layer ? bias.data() : nullptr;
  p.residual = with_residual ? residual.data() : nullptr;
  p.out = out.data();
  p.rows = rows;
  p.cols = p.x_stride = cols;
  p.inner_rows = rows;
  p.outer_stride = int64_t{rows} * cols;
  p.eps = 1e-5f;
  p.subtract_mean = layer;
  simulated::gpu().launch({static_cast<unsigned>(rows)}, 128, 0, [&] { norm_kernel<T, T, 8>(p); });
  bool good = true;
  for (int r = 0; r < rows; ++r) {
    double mean = 0, square = 0;
    for (int c = 0; c < cols; ++c) mean += layer ? h[r * cols + c] / cols : 0;
    for (int c = 0; c < cols; ++c) square += (h[r * cols + c] - mean) * (h[r * cols + c] - mean) / cols;
    for (int c = 0; c < cols; ++c) {
      const double normal = (h[r * cols + c] - mean) / std::sqrt(square + 1e-5);
      const double expected = normal * arch::to_float(weight[c]) + (layer ? arch::to_float(bias[c]) : 0);
      good &= near(expected, arch::to_float(out[r * cols + c]));
      if (with_residual) good &= arch::to_float(residual[r * cols + c]) == static_cast<float>(h[r * cols + c]);
    }
  }
  check(good, layer ? "layer norm" : "RMS norm");
}

void gated(int rows, int cols) {
  using T = arch::bfloat16;
  Tensor<T> gate_up(size_t(rows) * 2 * cols), out(size_t(rows) * cols);
  check.fill(gate_up);
  ActivationParams p{gate_up.data(), out.data(), rows, cols, Activation::kSilu, true, DType::kBFloat16};
  const unsigned ctas_per_row = (cols + kActivationThreads * 8 - 1) / (kActivationThreads * 8);
  simulated::gpu().launch({static_cast<unsigned>(rows), ctas_per_row}, kActivationThreads, 0,
                          [&] { activation_kernel<T, 8>(p); });
  bool good = true;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) {
      const double gate = arch::to_float(gate_up[r * 2 * cols + c]),
                   up = arch::to_float(gate_up[(r * 2 + 1) * cols + c]);
      const double expected = gate / (1 + std::exp(-gate)) * up, got = arch::to_float(out[r * cols + c]);
      good &= std::fabs(expected - got) <= 8e-3 * (1 + std::fabs(expected));
    }
  }
  check(good, "gated activation");
}

void rotary(bool interleaved) {
  using T = arch::half;
  constexpr int heads = 3, kv_heads = 1, dim = 32, rotary_dim = 16, block = 4, blocks = 5, length = 11;
  Tensor<T> q(heads * dim), k(kv_heads * dim), v(kv_heads * dim), k_cache(blocks * block * dim),
      v_cache(k_cache.size());
  Tensor<int32_t> seq_lens(1), table(3);
  Tensor<float> cos_sin(size_t(length) * rotary_dim);
  for (const auto* tensor : {&q, &k, &v}) check.fill(*tensor);
  check.fill(k_cache);
  check.fill(v_cache);
  std::vector<float> before_q(q.size()), before_k(k.size());
  for (size_t i = 0; i < q.size(); ++i) before_q[i] = arch::to_float(q[i]);
  for (size_t i = 0; i < k.size(); ++i) before_k[i] = arch::to_float(k[i]);
  seq_lens[0] = length;
  for (int i = 0; i < 3; ++i) table[i] = 4 - i;
  for (int position = 0; position < length; ++position) {
    for (int i = 0; i < rotary_dim / 2; ++i) {
      const double angle = position * std::pow(10000., -2. * i / rotary_dim);
      cos_sin[position * rotary_dim + i] = static_cast<float>(std::cos(angle));
      cos_sin[position * rotary_dim + rotary_dim / 2 + i] = static_cast<float>(std::sin(angle));
    }
  }
  RotaryParams p{};
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.k_cache = k_cache.data();
  p.v_cache = v_cache.data();
  p.seq_lens = seq_lens.data();
  p.block_table = table.data();
  p.cos_sin = cos_sin.data();
  p.q_batch_stride = p.q_token_stride = heads * dim;
  p.k_batch_stride = p.k_token_stride = p.v_batch_stride = p.v_token_stride = kv_heads * dim;
  p.q_head_stride = p.k_head_stride = p.v_head_stride = dim;
  p.kc = p.vc = {block * kv_heads * dim, kv_heads * dim, dim};
  p.table_stride = p.max_blocks = 3;
  p.cos_sin_stride = p.rotary_dim = rotary_dim;
  p.batch = p.q_len = 1;
  p.q_heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = dim;
  p.num_blocks = blocks;
  p.block_size = block;
  p.max_positions = length;
  p.interleaved = interleaved;
  p.dtype = p.kv_dtype = DType::kFloat16;
  const unsigned ctas_per_token = (rotary_items<8>(p) + kRotaryThreads - 1) / kRotaryThreads;
  simulated::gpu().launch({1, ctas_per_token}, kRotaryThreads, 0, [&] { rotary_append_kernel<T, 8>(p); });

  const auto expected = [&](const std::vector<float>& x, int head, int d) {
    if (d >= rotary_dim) return double{x[head * dim + d]};
    const int pair = interleaved ? d / 2 : d % (rotary_dim / 2);
    const bool second = interleaved ? d % 2 : d >= rotary_dim / 2;
    const double a = x[head * dim + (interleaved ? 2 * pair : pair)];
    const double b = x[head * dim + (interleaved ? 2 * pair + 1 : pair + rotary_dim / 2)];
    const double angle = (length - 1) * std::pow(10000., -2. * pair / rotary_dim);
    return second ? b * std::cos(angle) + a * std::sin(angle) : a * std::cos(angle) - b * std::sin(angle);
  };
  const int at = (table[(length - 1) / block] * block + (length - 1) % block) * dim;
  bool good = true;
  for (int d = 0; d < dim; ++d) {
    for (int head = 0; head < heads; ++head)
      good &= near(expected(before_q, head, d), arch::to_float(q[head * dim + d]));
    good &= near(expected(before_k, 0, d), arch::to_float(k_cache[at + d]));
    good &= arch::to_float(v_cache[at + d]) == arch::to_float(v[d]);
  }
  check(good, interleaved ? "rotary, neighbors" : "rotary, halves");
}

void sample(int vocab) {
  constexpr int batch = 3;
  Tensor<float> logits(size_t(batch) * vocab), temperature(batch);
  Tensor<int32_t> top_k(batch);
  Tensor<int64_t> out(batch), seed(batch);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = normal(check.random);
  const float temperatures[] = {0.f, 0.7f, 1.5f};
  for (int r = 0; r < batch; ++r) {
    temperature[r] = temperatures[r];
    top_k[r] = r == 1 ? 1 : 3;
    seed[r] = 100 + r;
  }
  SampleParams p{};
  p.logits = logits.data();
  p.out = out.data();
  p.temperature = temperature.data();
  p.top_k = top_k.data();
  p.seed = seed.data();
  p.batch = batch;
  p.vocab = p.logits_stride = vocab;
  p.dtype = DType::kFloat32;
  simulated::gpu().launch({batch}, kSampleThreads, 0, [&] { sample_kernel<float>(p); });
  for (int r = 0; r < batch; ++r) {
    int larger = 0;
    for (int i = 0; i < vocab; ++i) larger += logits[r * vocab + i] > logits[r * vocab + out[r]];
    check(out[r] >= 0 && out[r] < vocab && larger < (r == 2 ? 3 : 1), "sampling, row " + std::to_string(r));
  }
}

}  // namespace

int main() {
  norm(3, 264, false, true);
  norm(2, 1032, true, false);
  gated(3, 264);
  rotary(false);
  rotary(true);
  sample(1500);
  return check.report();
}
