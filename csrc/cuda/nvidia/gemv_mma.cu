#include "cuda/nvidia/gemv_mma.cuh"

#include "cuda/linear/linear.h"

namespace flashdecpp {
namespace {

template <auto kernel, class G>
void launch_kernel(const Launcher& launcher, const LinearParams& p) {
  const auto blocks = static_cast<unsigned>((p.weight_rows() + G::kBlockN - 1) / G::kBlockN);
  launcher.keep_l1<kernel>(2 * kWarpSumsBytes<G>);
  launcher.overlapping(kernel, blocks, G::kThreads, 0, p);
}

template <class T, int row_tiles, int tiles, int loads>
void launch_mma(const Launcher& launcher, const LinearParams& p) {
  using G = MmaGemv<row_tiles, tiles, loads>;
  p.fusion.any() ? launch_kernel<mma_gemv_kernel<T, G, true>, G>(launcher, p)
                 : launch_kernel<mma_gemv_kernel<T, G, false>, G>(launcher, p);
}

struct MmaGemvs {
  static constexpr int kMaxRows = 16;

  template <class T>
  static void launch(const Launcher& launcher, const LinearParams& p) {
    launch_shape<T>(launcher, p, choose_mma_gemv_shape(p.m, p.k));
  }

 private:
  // The shapes that choose_mma_gemv_shape can name, one after another.
  template <class T, int index = 0>
  static void launch_shape(const Launcher& launcher, const LinearParams& p, const MmaGemvShape& chosen) {
    constexpr MmaGemvShape shape = kMmaGemvShapes[index];
    if constexpr (index + 1 < kNumMmaGemvShapes) {
      if (shape != chosen) return launch_shape<T, index + 1>(launcher, p, chosen);
    }
    launch_mma<T, shape.row_tiles, shape.tiles, shape.loads>(launcher, p);
  }
};

}  // namespace

void launch_matrix_gemv(const Launcher& launcher, const LinearParams& p) { launch_row_chunks<MmaGemvs>(launcher, p); }

}  // namespace flashdecpp
