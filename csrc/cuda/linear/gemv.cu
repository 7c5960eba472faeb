#include "boxing.h"
#include "cuda/linear/gemv_kernel.cuh"
#include "cuda/linear/linear.h"

namespace flashdecpp {
namespace {

template <class T, int m>
void launch_generic(const Launcher& launcher, const LinearParams& p) {
  const int64_t groups = (p.weight_rows() + kGemvRows - 1) / kGemvRows;
  const int32_t warp_size = launcher.warp_size();
  const int64_t loads_per_lane = (p.k / 8 + warp_size - 1) / warp_size;
  const int32_t warps = choose_gemv_warps(launcher.properties(), m, groups, loads_per_lane);
  const int64_t groups_per_block = kGemvThreads / warp_size / warps;
  const int64_t blocks = std::min<int64_t>((groups + groups_per_block - 1) / groups_per_block, INT32_MAX);
  const auto kernel = p.fusion.any() ? gemv_kernel<T, m, true> : gemv_kernel<T, m, false>;
  launcher(kernel, static_cast<unsigned>(blocks), kGemvThreads, 0, p, static_cast<int>(warps));
}

// The CUDA cores, up to 8 rows of x.
struct GenericGemv {
  static constexpr int kMaxRows = 8;

  template <class T>
  static void launch(const Launcher& launcher, const LinearParams& p) {
    switch (p.m) {
      case 1: return launch_generic<T, 1>(launcher, p);
      case 2: return launch_generic<T, 2>(launcher, p);
      case 3: return launch_generic<T, 3>(launcher, p);
      case 4: return launch_generic<T, 4>(launcher, p);
      case 5: return launch_generic<T, 5>(launcher, p);
      case 6: return launch_generic<T, 6>(launcher, p);
      case 7: return launch_generic<T, 7>(launcher, p);
      default: return launch_generic<T, 8>(launcher, p);
    }
  }
};

Tensor gemv(Tensor x, Tensor weight, OptionalTensor bias) {
  checks::Linear call = checks::linear("gemv", x, weight, bias);
  require_vector_rows("gemv", call);
  const Launcher launcher("gemv", call.x_view.device);
  align_rows(call);
  Tensor out = allocate(call);
  run_gemv(launcher, call.params);
  return out;
}

}  // namespace

void run_gemv(const Launcher& launcher, const LinearParams& p) {
  if (p.m == 0 || p.n == 0) return;
  if (!launch_matrix_gemv(launcher, p)) launch_row_chunks<GenericGemv>(launcher, p);
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("gemv", boxed<&gemv>);
}

}  // namespace flashdecpp
