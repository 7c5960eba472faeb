// The GEMV and the flat GEMM for every GPU on the simulated one, against sums in double. The last line says how many
// cases failed.
#include <algorithm>
#include <vector>

#include "checks.h"
#include "flat_gemm_kernel.cuh"
#include "gemv_kernel.cuh"

using namespace flashdecpp;

namespace {

Checks check(11);

struct Fusion {
  bool bias = false, norm = false, add = false, gated = false;
};

template <class T>
struct Call {
  simulated::Tensor<T> x, weight, bias, norm, out;
  std::vector<float> before;  // what out holds, where it is added to
  LinearParams p{};

  Call(int m, int n, int k, Fusion fusion)
      : x(size_t(m) * k), weight(size_t(n) * (fusion.gated ? 2 : 1) * k), bias(n * 2), norm(k), out(size_t(m) * n) {
    for (const auto* tensor : {&x, &weight, &bias, &norm}) check.fill(*tensor);
    p.x = x.data();
    p.weight = weight.data();
    p.bias = fusion.bias ? bias.data() : nullptr;
    p.out = out.data();
    p.m = m;
    p.n = n;
    p.k = p.x_stride = p.weight_stride = k;
    p.fusion.norm_weight = fusion.norm ? norm.data() : nullptr;
    p.fusion.norm_dtype = std::is_same_v<T, arch::half> ? DType::kFloat16 : DType::kBFloat16;
    p.fusion.norm_eps = 0.5f;
    p.fusion.add = fusion.add;
    p.fusion.gated = fusion.gated;
    p.fusion.activation = Activation::kSilu;
    before.assign(out.size(), 0.f);
    if (!fusion.add) return;
    check.fill(out);
    for (size_t i = 0; i < out.size(); ++i) before[i] = arch::to_float(out[i]);
  }

  // out as it was, for another launch.
  void restore() {
    if (!p.fusion.add) return;
    for (size_t i = 0; i < out.size(); ++i) out[i] = arch::from_float<T>(before[i]);
  }

  double sum(const std::vector<float>& h, int row) const {
    double sum = p.bias ? arch::to_float(bias[row]) : 0;
    for (int k = 0; k < p.k; ++k) sum += double{h[k]} * arch::to_float(weight[row * p.k + k]);
    return sum;
  }

  void compare(const std::string& what) const {
    double worst = 0;
    std::vector<float> h(p.k);
    for (int m = 0; m < p.m; ++m) {
      double squares = 0;
      for (int k = 0; k < p.k; ++k) {
        h[k] = arch::to_float(x[m * p.k + k]);
        squares += double{h[k]} * h[k];
      }
      const auto factor = static_cast<float>(1 / std::sqrt(squares / p.k + p.fusion.norm_eps));
      for (int k = 0; p.fusion.norm_weight && k < p.k; ++k) {
        h[k] = arch::to_float(arch::from_float<T>(h[k] * factor * arch::to_float(norm[k])));
      }
      for (int n = 0; n < p.n; ++n) {
        double expected = sum(h, n);
        if (p.fusion.gated) expected = expected / (1 + std::exp(-expected)) * sum(h, p.n + n);
        expected += before[m * p.n + n];
        const double got = arch::to_float(out[m * p.n + n]);
        worst = std::isnan(got) ? INFINITY : std::max(worst, std::fabs(expected - got) / (1 + std::fabs(expected)));
      }
    }
    // A gate multiplies what the numbers before it are off by.
    const double allowed = (std::is_same_v<T, arch::half> ? 1e-3 : 8e-3) * (p.fusion.gated ? 4 : 1);
    const auto number = [](int64_t x) { return std::to_string(x); };
    check(worst <= allowed, what + (p.fusion.any() ? ", fused" : "") + ", m " + number(p.m) + ", n " + number(p.n) +
                                ", k " + number(p.k) + ": off by " + std::to_string(worst));
  }
};

template <class T, int m>
void gemv(int n, int k, Fusion fusion) {
  for (const int waves : {1, 2}) {
    Call<T> call(m, n, k, fusion);
    const int groups = kGemvThreads / arch::kWaveSize / waves * kGemvRows;
    const auto blocks = static_cast<unsigned>((call.p.weight_rows() + groups - 1) / groups);
    simulated::machine().launch({blocks}, kGemvThreads, 0, [&] {
      call.p.fusion.any() ? gemv_kernel<T, m, true>(call.p, waves) : gemv_kernel<T, m, false>(call.p, waves);
    });
    call.compare("gemv, " + std::to_string(waves) + " waves");
  }
}

template <class T, int tile_index>
void flat_gemm(int m, int n, int k, int splits, Fusion fusion) {
  using G = FlatGemm<T, tile_index>;
  Call<T> call(m, n, k, fusion);
  const int rows = static_cast<int>(call.p.weight_rows());
  const int tiles = (m + G::kBlockM - 1) / G::kBlockM * ((rows + G::kBlockN - 1) / G::kBlockN);
  const int k_tiles = (k + G::kBlockK - 1) / G::kBlockK;
  SplitK split{};
  split.k_tiles_per_split = (k_tiles + splits - 1) / splits;
  split.splits = (k_tiles + split.k_tiles_per_split - 1) / split.k_tiles_per_split;
  simulated::Tensor<float> parts(size_t(tiles) * split.splits * G::kBlockM * G::kBlockN);
  simulated::Tensor<unsigned> arrived(tiles);
  for (int i = 0; i < tiles; ++i) arrived[i] = 0;
  if (split.splits > 1) {
    split.parts = parts.data();
    split.arrived = arrived.data();
  }
  for (int replay = 0; replay < 2; ++replay) {  // the counters are ready for the next launch
    call.restore();
    simulated::machine().launch({static_cast<unsigned>(tiles), static_cast<unsigned>(split.splits)}, G::kThreads,
                                G::kSharedBytes, [&] {
                                  call.p.fusion.any() ? flat_gemm_kernel<T, tile_index, true>(call.p, split)
                                                      : flat_gemm_kernel<T, tile_index, false>(call.p, split);
                                });
    call.compare("flat GEMM, tile " + std::to_string(tile_index) + ", " + std::to_string(splits) + " splits");
  }
}

template <class T>
void run() {
  gemv<T, 1>(37, 264, {.bias = true});
  gemv<T, 3>(16, 520, {});
  gemv<T, 8>(9, 72, {.bias = true});
  gemv<T, 1>(33, 1032, {.bias = true, .norm = true, .add = true});
  gemv<T, 3>(19, 264, {.bias = true, .norm = true, .gated = true});
  gemv<T, 8>(16, 136, {.gated = true});
  if constexpr (kFlatTiles[0].block_m % arch::kTileN == 0) {
    flat_gemm<T, 0>(5, 40, 520, 1, {.bias = true});
    flat_gemm<T, 0>(5, 40, 520, 2, {.bias = true, .gated = true});
  }
  flat_gemm<T, 1>(16, 33, 264, 2, {});
  flat_gemm<T, 1>(13, 37, 264, 2, {.bias = true, .add = true});
  flat_gemm<T, 2>(40, 72, 648, 3, {});
  flat_gemm<T, 2>(40, 48, 136, 1, {.gated = true});
  flat_gemm<T, 3>(70, 130, 136, 1, {.bias = true});
}

}  // namespace

int main() {
  run<arch::half>();
  run<arch::bfloat16>();
  return check.report();
}
