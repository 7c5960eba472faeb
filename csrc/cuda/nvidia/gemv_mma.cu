#include "cuda/nvidia/gemv_mma.cuh"

#include "cuda/linear/linear.h"

namespace flashdecpp {
namespace {

template <class T, class G>
void launch_mma(const Launcher& launcher, const LinearParams& p) {
  const auto blocks = static_cast<unsigned>((p.weight_rows() + G::kBlockN - 1) / G::kBlockN);
  const auto kernel = p.fusion.any() ? mma_gemv_kernel<T, G, true> : mma_gemv_kernel<T, G, false>;
  launcher.keep_l1(kernel, 2 * kWarpSumsBytes<G>);
  launcher.overlapping(kernel, blocks, G::kThreads, 0, p);
}

// The matrix units, up to 16 rows of x. The loads that a block has in flight hold 1024 or 2048 columns of K: no more
// than there are, else of more rows.
struct MmaGemvs {
  static constexpr int kMaxRows = 16;

  template <class T>
  static void launch(const Launcher& launcher, const LinearParams& p) {
    if (p.m <= 8) {
      return p.k <= 1024 ? launch_mma<T, MmaGemv<1, 2, 4>>(launcher, p) : launch_mma<T, MmaGemv<1, 1, 8>>(launcher, p);
    }
    return p.k <= 1024 ? launch_mma<T, MmaGemv<2, 2, 4>>(launcher, p) : launch_mma<T, MmaGemv<2, 1, 8>>(launcher, p);
  }
};

}  // namespace

bool launch_matrix_gemv(const Launcher& launcher, const LinearParams& p) {
  if (!launcher.hopper_kernels()) return false;
  launch_row_chunks<MmaGemvs>(launcher, p);
  return true;
}

}  // namespace flashdecpp
