#include "cuda/nvidia/flat_gemm_wgmma.cuh"

#include "cuda/linear/linear.h"
#include "cuda/nvidia/weight_map.h"

namespace flashdecpp {
namespace {

// A norm comes behind a residual sum: a small kernel that should be there when its x is.
FlatLaunch flat_launch(const DeviceProperties& device, int64_t n, int64_t k, bool add) {
  constexpr int late_stages = 2;
  const int32_t cluster = choose_flat_cluster(device, n, k);
  const bool fills = (n + 63) / 64 * cluster > device.num_sms;
  return {cluster, fills || add ? INT32_MAX : late_stages};
}

template <class T, int m_rows>
void launch_wgmma(const Launcher& launcher, const LinearParams& p) {
  using R = FlatGemmWgmma<m_rows>;
  const int64_t rows = p.weight_rows();
  const CUtensorMap weight_map =
      matrix_map("flat_gemm", p.weight, rows, p.k, p.weight_stride, R::kBlockN / (p.fusion.gates() ? 2 : 1),
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  const CUtensorMap x_map =
      matrix_map("flat_gemm", p.x, p.m, p.k, p.x_stride, static_cast<int>(p.m), CU_TENSOR_MAP_L2_PROMOTION_NONE);
  const FlatLaunch launch = flat_launch(launcher.properties(), rows, p.k, p.fusion.adds());
  const auto kernel = p.fusion.any() ? flat_gemm_wgmma_kernel<T, R, true> : flat_gemm_wgmma_kernel<T, R, false>;
  launcher.allow_shared_memory(kernel, R::kSharedBytes);
  const auto blocks = static_cast<unsigned>((rows + R::kBlockN - 1) / R::kBlockN * launch.cluster);
  launcher.overlapping_clusters(kernel, launch.cluster, blocks, R::kThreads, R::kSharedBytes, p, weight_map, x_map,
                                launch);
}

struct FlatGemmsWgmma {
  static constexpr int kMaxRows = 128;

  template <class T>
  static void launch(const Launcher& launcher, const LinearParams& p) {
    if (p.m <= 8) {
      launch_wgmma<T, 8>(launcher, p);
    } else if (p.m <= 16) {
      launch_wgmma<T, 16>(launcher, p);
    } else if (p.m <= 32) {
      launch_wgmma<T, 32>(launcher, p);
    } else if (p.m <= 64) {
      launch_wgmma<T, 64>(launcher, p);
    } else {
      launch_wgmma<T, 128>(launcher, p);
    }
  }
};

}  // namespace

bool launch_flat_gemm_wgmma(const Launcher& launcher, const LinearParams& p) {
  if (!fits_matrix_map(p.weight, p.weight_rows(), p.k, p.weight_stride) || !fits_matrix_map(p.x, p.m, p.k, p.x_stride))
    return false;
  launch_row_chunks<FlatGemmsWgmma>(launcher, p);
  return true;
}

}  // namespace flashdecpp
