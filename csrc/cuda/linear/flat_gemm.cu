// flat_gemm on a GPU, and the generic kernel's launch.
#include "boxing.h"
#include "choice_log.h"
#include "cuda/linear/flat_gemm_kernel.cuh"
#include "cuda/linear/linear.h"
#include "cuda/nonce.h"

namespace flashdecpp {
namespace {

// The heuristics know these without the kernel's headers.
static_assert(arch::kTileN == (arch::kAmd ? 16 : 8) && arch::kBlockSharedBytes == (arch::kAmd ? 64 : 160) * 1024);

template <class T, int tile_index>
void launch(const Launcher& launcher, const LinearParams& p, const FlatGemmConfig& config, Device device) {
  using G = FlatGemm<T, tile_index>;
  const int64_t tiles = (p.m + G::kBlockM - 1) / G::kBlockM * ((p.weight_rows() + G::kBlockN - 1) / G::kBlockN);
  SplitK split{};
  split.k_tiles_per_split = config.k_tiles_per_split;
  split.splits = config.k_splits;
  OptionalTensor workspace;  // partials, then their flags; lives until the launch is enqueued
  if (split.splits > 1) {
    const int64_t flags = tiles * (split.splits - 1), elements = flags * G::kBlockM * G::kBlockN;
    workspace = new_tensor({elements + 2 * flags}, DType::kFloat32, device);
    split.partials = static_cast<float*>(View(*workspace).data);
    split.ready = reinterpret_cast<uint64_t*>(split.partials + elements);
    split.nonce = new_nonce(split.partials);
  }
  const dim3 grid(static_cast<unsigned>(tiles), split.splits);
  const int threads = G::kTile.warps_m * G::kTile.warps_n * launcher.warp_size();
  with_bool(p.fusion.any(), [&](auto fused) {
    constexpr auto kernel = flat_gemm_kernel<T, tile_index, fused.value>;
    launcher.allow_shared_memory<kernel>(G::kSharedBytes);
    launcher(kernel, grid, threads, G::kSharedBytes, p, split);
  });
}

template <class T, int tile_index = 0>
void launch_tile(const Launcher& launcher, const LinearParams& p, const FlatGemmConfig& config, Device device) {
  if constexpr (tile_index < kNumFlatTiles) {
    constexpr FlatTile tile = kFlatTiles[tile_index];
    if (config.tile != tile_index) return launch_tile<T, tile_index + 1>(launcher, p, config, device);
    if constexpr (tile.block_m % arch::kTileN == 0 && tile.stages_within(arch::kBlockSharedBytes) >= 2) {
      launch<T, tile_index>(launcher, p, config, device);
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
  const LinearProblem problem = linear_problem(p);
  bool suits_tma = false;
  if constexpr (!arch::kAmd) suits_tma = wgmma_can_load(p);
  const FlatGemmConfig config = choose_flat_gemm(problem, launcher.properties(), suits_tma);
  log_choice("flat_gemm", name(p.dtype), problem, config);
  if constexpr (!arch::kAmd) {
    if (config.wgmma) return launch_flat_gemm_wgmma(launcher, p, config);
  }
  arch::with_half_type(
      p.dtype, [&](auto* type) { launch_tile<std::remove_pointer_t<decltype(type)>>(launcher, p, config, device); });
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("flat_gemm", boxed<&flat_gemm>);
}

}  // namespace flashdecpp
