#include "flat_gemm_kernel.cuh"
#include "linear.h"

namespace flashdecpp {
namespace {

template <class T, int tile_index>
void launch(const Launcher& launcher, const LinearParams& p, Device device) {
  using G = FlatGemm<T, tile_index>;
  const int64_t tiles = (p.m + G::kBlockM - 1) / G::kBlockM * ((p.n + G::kBlockN - 1) / G::kBlockN);
  const int64_t k_tiles = (p.k + G::kBlockK - 1) / G::kBlockK;
  const int64_t wanted = choose_k_splits(launcher.properties(), G::kTile, tiles, k_tiles);

  SplitK split{};
  split.k_tiles_per_split = static_cast<int32_t>((k_tiles + wanted - 1) / wanted);
  split.splits = static_cast<int32_t>((k_tiles + split.k_tiles_per_split - 1) / split.k_tiles_per_split);
  OptionalTensor workspace;  // the parts, then the counters; lives until the launch is in the stream
  if (split.splits > 1) {
    const int64_t parts = tiles * split.splits * G::kBlockM * G::kBlockN;
    workspace = new_tensor({parts + tiles}, DType::kFloat32, device);
    split.parts = static_cast<float*>(View(*workspace).data);
    split.arrived = reinterpret_cast<unsigned int*>(split.parts + parts);
    launcher.zero(split.arrived, tiles * sizeof(unsigned int));
  }
  const auto kernel = flat_gemm_kernel<T, tile_index>;
  launcher.allow_shared_memory(kernel, G::kSharedBytes);
  const dim3 grid(static_cast<unsigned>(tiles), split.splits);
  const int waves = G::kTile.waves_m * G::kTile.waves_n;
  launcher(kernel, grid, waves * launcher.wave_size(), G::kSharedBytes, p, split);
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
  contract::Linear call = contract::linear("flat_gemm", x, weight, bias);
  require_vector_rows("flat_gemm", call);
  return run_flat_gemm(Launcher("flat_gemm", call.x_view.device), call);
}

}  // namespace

Tensor run_flat_gemm(const Launcher& launcher, const contract::Linear& call) {
  LinearParams p = call.params;
  Tensor result = contract::new_like_rows(call.x_view, p.n);
  if (p.m == 0 || p.n == 0) return result;
  p.out = View(result).data;

  if constexpr (arch::kHasHopperKernels) {
    if (launcher.hopper_kernels() && launch_flat_gemm_sm90(launcher, p)) return result;
  }
  const int32_t shared_bytes = std::min(arch::kBlockSharedBytes, launcher.shared_bytes());
  const int32_t tile = choose_flat_tile(p.m, shared_bytes, arch::kTileN);
  arch::with_half_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch<T>(launcher, p, call.x_view.device, tile);
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("flat_gemm", TORCH_BOX(&flat_gemm));
}

}  // namespace flashdecpp
