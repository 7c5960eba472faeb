#include "cuda/nvidia/flat_gemm_wgmma.cuh"

#include "cuda/linear/linear.h"
#include "cuda/nvidia/weight_map.h"

namespace flashdecpp {
namespace {

template <class T, int m_rows>
void launch_wgmma(const Launcher& launcher, const LinearParams& p, const FlatGemmConfig& config) {
  using R = FlatGemmWgmma<m_rows>;
  const int64_t rows = p.weight_rows();
  const CUtensorMap weight_map =
      matrix_map("flat_gemm", p.weight, rows, p.k, p.weight_stride, R::kBlockN / (p.fusion.gates() ? 2 : 1),
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  const CUtensorMap x_map =
      matrix_map("flat_gemm", p.x, p.m, p.k, p.x_stride, static_cast<int>(p.m), CU_TENSOR_MAP_L2_PROMOTION_NONE);
  const FlatLaunch launch{config.cluster, config.late_stages};
  const auto blocks = static_cast<unsigned>((rows + R::kBlockN - 1) / R::kBlockN * config.cluster);
  with_bool(p.fusion.any(), [&](auto fused) {
    constexpr auto kernel = flat_gemm_wgmma_kernel<T, R, fused.value>;
    launcher.allow_shared_memory<kernel>(R::kSharedBytes);
    launcher.overlapping_clusters(kernel, config.cluster, blocks, R::kThreads, R::kSharedBytes, p, weight_map, x_map,
                                  launch);
  });
}

struct FlatGemmsWgmma {
  static constexpr int kMaxRows = 128;

  template <class T>
  static void launch(const Launcher& launcher, const LinearParams& p, const FlatGemmConfig& config) {
    if (p.m <= 8) {
      launch_wgmma<T, 8>(launcher, p, config);
    } else if (p.m <= 16) {
      launch_wgmma<T, 16>(launcher, p, config);
    } else if (p.m <= 32) {
      launch_wgmma<T, 32>(launcher, p, config);
    } else if (p.m <= 64) {
      launch_wgmma<T, 64>(launcher, p, config);
    } else {
      launch_wgmma<T, 128>(launcher, p, config);
    }
  }
};

}  // namespace

bool wgmma_can_load(const LinearParams& p) {
  return fits_matrix_map(p.weight, p.weight_rows(), p.k, p.weight_stride) && fits_matrix_map(p.x, p.m, p.k, p.x_stride);
}

void launch_flat_gemm_wgmma(const Launcher& launcher, const LinearParams& p, const FlatGemmConfig& config) {
  launch_row_chunks<FlatGemmsWgmma>(launcher, p, config);
}

}  // namespace flashdecpp
