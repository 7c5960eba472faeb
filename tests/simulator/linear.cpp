// The GEMV and the flat GEMM for every GPU on the simulated one, against sums in double. The last line says how many
// cases failed.
#include <algorithm>

#include "checks.h"
#include "flat_gemm_kernel.cuh"
#include "gemv_kernel.cuh"

using namespace flashdecpp;

namespace {

Checks check(11);

template <class T>
struct Call {
  simulated::Tensor<T> x, weight, bias, out;
  LinearParams p{};

  Call(int m, int n, int k, bool with_bias) : x(size_t(m) * k), weight(size_t(n) * k), bias(n), out(size_t(m) * n) {
    for (const auto* tensor : {&x, &weight, &bias}) check.fill(*tensor);
    p.x = x.data();
    p.weight = weight.data();
    p.bias = with_bias ? bias.data() : nullptr;
    p.out = out.data();
    p.m = m;
    p.n = n;
    p.k = p.x_stride = p.weight_stride = k;
  }

  void compare(const std::string& what) const {
    double worst = 0;
    for (int m = 0; m < p.m; ++m) {
      for (int n = 0; n < p.n; ++n) {
        double sum = p.bias ? arch::to_float(bias[n]) : 0;
        for (int k = 0; k < p.k; ++k) {
          sum += double{arch::to_float(x[m * p.k + k])} * arch::to_float(weight[n * p.k + k]);
        }
        const double got = arch::to_float(out[m * p.n + n]);
        worst = std::isnan(got) ? INFINITY : std::max(worst, std::fabs(sum - got) / (1 + std::fabs(sum)));
      }
    }
    const double allowed = std::is_same_v<T, arch::half> ? 1e-3 : 8e-3;
    const auto number = [](int64_t x) { return std::to_string(x); };
    check(worst <= allowed, what + ", m " + number(p.m) + ", n " + number(p.n) + ", k " + number(p.k) + ": off by " +
                                std::to_string(worst));
  }
};

template <class T, int m>
void gemv(int n, int k, bool bias) {
  for (const int waves : {1, 2}) {
    Call<T> call(m, n, k, bias);
    const int groups = kGemvThreads / arch::kWaveSize / waves * kGemvRows;
    simulated::machine().launch({static_cast<unsigned>((n + groups - 1) / groups)}, kGemvThreads, 0,
                                [&] { gemv_kernel<T, m>(call.p, waves); });
    call.compare("gemv, " + std::to_string(waves) + " waves");
  }
}

template <class T, int tile_index>
void flat_gemm(int m, int n, int k, int splits, bool bias) {
  using G = FlatGemm<T, tile_index>;
  Call<T> call(m, n, k, bias);
  const int tiles = (m + G::kBlockM - 1) / G::kBlockM * ((n + G::kBlockN - 1) / G::kBlockN);
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
    simulated::machine().launch({static_cast<unsigned>(tiles), static_cast<unsigned>(split.splits)}, G::kThreads,
                                G::kSharedBytes, [&] { flat_gemm_kernel<T, tile_index>(call.p, split); });
    call.compare("flat GEMM, tile " + std::to_string(tile_index) + ", " + std::to_string(splits) + " splits");
  }
}

template <class T>
void run() {
  gemv<T, 1>(37, 264, true);
  gemv<T, 3>(16, 520, false);
  gemv<T, 8>(9, 72, true);
  if constexpr (kFlatTiles[0].block_m % arch::kTileN == 0) flat_gemm<T, 0>(5, 40, 520, 1, true);
  flat_gemm<T, 1>(16, 33, 264, 2, false);
  flat_gemm<T, 2>(40, 72, 648, 3, true);
  flat_gemm<T, 3>(70, 130, 136, 1, true);
}

}  // namespace

int main() {
  run<arch::half>();
  run<arch::bfloat16>();
  return check.report();
}
