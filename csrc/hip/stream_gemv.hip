// Launches of stream_gemv_kernel: every quantized GEMV, and dense ones with enough rows of x that the arithmetic of the
// vector units, which grows with them, would be the bottleneck (docs/amd.md).
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
void launch_tiles(const Launcher& launcher, const QuantizedLinearParams& p) {
  choose_quantized_tiles(launcher.properties(), p.n) == 1 ? launch_tile<T, bits, 1, fine>(launcher, p)
                                                          : launch_tile<T, bits, 2, fine>(launcher, p);
}

struct QuantizedGemvs {
  static constexpr int kMaxRows = 16;

  template <class T>
  static void launch(const Launcher& launcher, const QuantizedLinearParams& p) {
    const bool fine = p.group < 128 && p.group < p.k;
    if (p.bits == 8) {
      fine ? launch_tiles<T, 8, true>(launcher, p) : launch_tiles<T, 8, false>(launcher, p);
    } else {
      fine ? launch_tiles<T, 4, true>(launcher, p) : launch_tiles<T, 4, false>(launcher, p);
    }
  }
};

struct DenseGemvs {
  static constexpr int kMaxRows = 16;

  template <class T>
  static void launch(const Launcher& launcher, const QuantizedLinearParams& p) {
    launch_tile<T, 16, 1, false>(launcher, p);
  }
};

}  // namespace

bool launch_quantized_gemv(const Launcher& launcher, const QuantizedLinearParams& p) {
  if (p.fusion.any()) return false;
  launch_row_chunks<QuantizedGemvs>(launcher, p);
  return true;
}

bool launch_matrix_gemv(const Launcher& launcher, const LinearParams& p) {
  constexpr int64_t min_rows = 3;
  if (p.m < min_rows || p.fusion.any()) return false;
  launch_row_chunks<DenseGemvs>(launcher, QuantizedLinearParams{p});
  return true;
}

}  // namespace flashdecpp
