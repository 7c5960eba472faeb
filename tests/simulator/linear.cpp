// The portable GEMV and flat GEMM on the simulated GPU, compared with sums in double. The last line of the output
// counts the failed cases.
#include "cuda/linear/flat_gemm_kernel.cuh"
#include "cuda/linear/gemv_kernel.cuh"
#include "linear_calls.h"

using namespace flashdecpp;

namespace {

template <class T, int m>
void gemv(int n, int k, Fusion fusion) {
  for (const int warps : {1, 2}) {
    Call<T> call(m, n, k, fusion);
    const int cta_rows = kGemvThreads / arch::kWarpSize / warps * kGemvRows;
    const auto blocks = static_cast<unsigned>((call.p.weight_rows() + cta_rows - 1) / cta_rows);
    simulated::gpu().launch({blocks}, kGemvThreads, 0, [&] {
      call.p.fusion.any() ? gemv_kernel<T, m, true>(call.p, warps) : gemv_kernel<T, m, false>(call.p, warps);
    });
    call.compare("gemv, " + std::to_string(warps) + " warps");
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
  const size_t flags = size_t(tiles) * (split.splits - 1);
  simulated::Tensor<float> partials(flags * G::kBlockM * G::kBlockN);
  simulated::Tensor<uint64_t> ready(flags);
  if (split.splits > 1) {
    split.partials = partials.data();
    split.ready = ready.data();
    split.nonce = 77;
  }
  for (int replay = 0; replay < 2; ++replay) {  // a launch leaves the flags ready for the next one
    call.restore();
    simulated::gpu().launch({static_cast<unsigned>(tiles), static_cast<unsigned>(split.splits)}, G::kThreads,
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
  gemv<T, 1>(33, 1032, {.bias = true, .add = true});
  gemv<T, 3>(19, 264, {.bias = true, .gated = true});
  gemv<T, 2>(21, 264, {.bias = true, .activated = true});
  gemv<T, 8>(16, 136, {.gated = true});
  if constexpr (kFlatTiles[0].block_m % arch::kTileN == 0) {
    flat_gemm<T, 0>(5, 40, 520, 1, {.bias = true});
    flat_gemm<T, 0>(5, 40, 520, 2, {.bias = true, .gated = true});
  }
  flat_gemm<T, 1>(16, 33, 264, 2, {});
  flat_gemm<T, 1>(13, 37, 264, 2, {.bias = true, .add = true});
  flat_gemm<T, 1>(13, 37, 264, 2, {.bias = true, .activated = true});
  flat_gemm<T, 2>(40, 72, 648, 3, {});
  flat_gemm<T, 2>(40, 48, 136, 1, {.gated = true});
  flat_gemm<T, 2>(40, 48, 136, 1, {.activated = true});
  flat_gemm<T, 3>(70, 130, 136, 1, {.bias = true});
}

}  // namespace

int main() {
  run<arch::half>();
  run<arch::bfloat16>();
  return check.report();
}
