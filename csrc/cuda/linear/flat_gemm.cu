#include "boxing.h"
#include "cuda/linear/flat_gemm_kernel.cuh"
#include "cuda/linear/linear.h"
#include "cuda/nonce.h"

namespace flashdecpp {
namespace {

template <class T, int tile_index>
void launch(const Launcher& launcher, const LinearParams& p, Device device) {
  using G = FlatGemm<T, tile_index>;
  const int64_t tiles = (p.m + G::kBlockM - 1) / G::kBlockM * ((p.weight_rows() + G::kBlockN - 1) / G::kBlockN);
  const int64_t k_tiles = (p.k + G::kBlockK - 1) / G::kBlockK;
  const int64_t wanted = choose_k_splits(launcher.properties(), G::kTile, tiles, k_tiles);

  SplitK split{};
  split.k_tiles_per_split = static_cast<int32_t>((k_tiles + wanted - 1) / wanted);
  split.splits = static_cast<int32_t>((k_tiles + split.k_tiles_per_split - 1) / split.k_tiles_per_split);
  OptionalTensor workspace;  // partials, then their flags; lives until the launch is enqueued
  if (split.splits > 1) {
    const int64_t flags = tiles * (split.splits - 1), elements = flags * G::kBlockM * G::kBlockN;
    workspace = new_tensor({elements + 2 * flags}, DType::kFloat32, device);
    split.partials = static_cast<float*>(View(*workspace).data);
    split.ready = reinterpret_cast<uint64_t*>(split.partials + elements);
    split.nonce = new_nonce(split.partials);
  }
  const auto kernel = p.fusion.any() ? flat_gemm_kernel<T, tile_index, true> : flat_gemm_kernel<T, tile_index, false>;
  launcher.allow_shared_memory(kernel, G::kSharedBytes);
  const dim3 grid(static_cast<unsigned>(tiles), split.splits);
  const int warps = G::kTile.warps_m * G::kTile.warps_n;
  launcher(kernel, grid, warps * launcher.warp_size(), G::kSharedBytes, p, split);
}

template <class T, int tile_index = 0>
void launch(const Launcher& launcher, const LinearParams& p, Device device, int chosen) {
  if constexpr (tile_index < kNumFlatTiles) {
    constexpr FlatTile tile = kFlatTiles[tile_index];
    if (chosen != tile_index) return launch<T, tile_index + 1>(launcher, p, device, chosen);
    if constexpr (tile.block_m % arch::kTileN == 0 && tile.stages_within(arch::kBlockSharedBytes) >= 2) {
      launch<T, tile_index>(launcher, p, device);
    }
  }
}

Tensor flat_gemm(Tensor x, Tensor weight, OptionalTensor bias) {
  checks::Linear call = checks::linear("flat_gemm", x, weight, bias);
  require_vector_rows("flat_gemm", call);
  const Launcher launcher("flat_gemm", call.x_view.device);
  align_rows(call);
  Tensor out = allocate(call);
  run_flat_gemm(launcher, call.params, call.x_view.device);
  return out;
}

}  // namespace

void run_flat_gemm(const Launcher& launcher, const LinearParams& p, Device device) {
  if (p.m == 0 || p.n == 0) return;
  if constexpr (arch::kHasHopperKernels) {
    if (launcher.hopper_kernels() && launch_flat_gemm_wgmma(launcher, p)) return;
  }
  const int32_t shared_bytes = std::min(arch::kBlockSharedBytes, launcher.shared_bytes());
  const int32_t tile = choose_flat_tile(p.m, shared_bytes, arch::kTileN);
  arch::with_half_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch<T>(launcher, p, device, tile);
  });
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("flat_gemm", boxed<&flat_gemm>);
}

}  // namespace flashdecpp
