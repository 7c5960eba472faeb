// Launches of stream_gemv_kernel: quantized weights, and dense ones as choose_gemv has it.
#include "cuda/linear/linear.h"
#include "hip/stream_gemv_amd.h"

namespace flashdecpp {
namespace {

template <class T, int bits, int tiles, bool fine>
void launch_tile(const Launcher& launcher, const QuantizedLinearParams& p) {
  using G = StreamGemv<bits, tiles, fine>;
  const auto blocks = static_cast<unsigned>((p.n + G::kBlockN - 1) / G::kBlockN);
  launcher(stream_gemv_kernel<T, G>, blocks, G::kWarps * launcher.warp_size(), 0, p);
}

template <class T, int bits, bool fine>
void launch_tiles(const Launcher& launcher, const QuantizedLinearParams& p, int32_t tiles) {
  tiles == 1 ? launch_tile<T, bits, 1, fine>(launcher, p) : launch_tile<T, bits, 2, fine>(launcher, p);
}

struct DenseGemvs {
  static constexpr int kMaxRows = 16;

  template <class T>
  static void launch(const Launcher& launcher, const QuantizedLinearParams& p) {
    launch_tile<T, 16, 1, false>(launcher, p);
  }
};

struct QuantizedGemvs {
  static constexpr int kMaxRows = 16;

  template <class T>
  static void launch(const Launcher& launcher, const QuantizedLinearParams& p, int32_t tiles) {
    const bool fine = p.group < 128 && p.group < p.k;
    if (p.bits == 8) {
      fine ? launch_tiles<T, 8, true>(launcher, p, tiles) : launch_tiles<T, 8, false>(launcher, p, tiles);
    } else {
      fine ? launch_tiles<T, 4, true>(launcher, p, tiles) : launch_tiles<T, 4, false>(launcher, p, tiles);
    }
  }
};

}  // namespace

void launch_matrix_gemv(const Launcher& launcher, const LinearParams& p) {
  launch_row_chunks<DenseGemvs>(launcher, QuantizedLinearParams{p});
}

void launch_quantized_gemv(const Launcher& launcher, const QuantizedLinearParams& p,
                           const QuantizedLinearConfig& config) {
  launch_row_chunks<QuantizedGemvs>(launcher, p, config.tiles);
}

}  // namespace flashdecpp
