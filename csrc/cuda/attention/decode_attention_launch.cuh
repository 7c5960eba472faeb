// From an AttentionConfig to the one kernel that it names.
#pragma once

#include <type_traits>

#include "cuda/attention/decode_attention.h"
#include "cuda/attention/decode_attention_kernel.cuh"

namespace flashdecpp {

// What belongs to a load path: Stages<Tile>; source(), what the launch passes to them; and the shared memory per SM
// that its shapes are written for, in which the hardware reserves 1 KiB per CTA. This one is cp.async's, with the 99
// KiB per CTA of the smallest NVIDIA GPUs since Ampere; decode_attention_tma.cuh and csrc/hip/decode_attention_amd.h
// have the others.
template <LoadPath path>
struct AttentionPath;

template <>
struct AttentionPath<LoadPath::kCpAsync> {
  template <class Tile>
  using Stages = CpAsyncStages<Tile>;
  static constexpr int kSharedBytesPerSm = 100 * 1024;

  template <class Tile>
  static typename CpAsyncStages<Tile>::Source source(const AttentionParams&) {
    return {};
  }
};

template <LoadPath path, class Tile, class Policy>
void launch_kernel(const Launcher& launcher, const AttentionLaunch& launch, const AttentionConfig& config) {
  using Path = AttentionPath<path>;
  using Stages = typename Path::template Stages<Tile>;
  using Shared = SharedMemory<Tile, Stages>;
  // The heuristics know the kernel's numbers without its headers.
  constexpr AttentionShape shape{Tile::kWarps, Tile::kStages, Tile::kCtasPerSm, Tile::kScratchRows,
                                 Stages::kUsesClusters};
  constexpr int64_t bytes = attention_shared_bytes(path, sizeof(typename Tile::KV), Tile::kDims, shape);
  static_assert(Shared::kBytes + sizeof(CombineMemory<Tile, Stages>) + Stages::kBarrierBytes + 1024 == bytes);
  static_assert(shape.ctas_per_sm * (bytes + 1024) <= Path::kSharedBytesPerSm && Tile::kRows == kQueryTileRows);
  static_assert(kMaxClusterSize * Tile::kWarps <= kMinKvTilesPerCluster);  // so that every warp has a KV tile

  constexpr auto kernel = decode_attention_kernel<Tile, Policy, Stages>;
  launcher.allow_shared_memory<kernel>(Shared::kBytes);
  launcher.overlapping_clusters(kernel, static_cast<int>(config.cluster), dim3(static_cast<unsigned>(config.ctas())),
                                dim3(Tile::kWarps * launcher.warp_size()), Shared::kBytes, launch,
                                Path::template source<Tile>(launch.p));
}

// f(std::integral_constant<int, dims>) for the head_dim that kernels are compiled for.
template <int dims = attention_dims(1), class F>
void with_dims(int chosen, F f) {
  if constexpr (dims < attention_dims(kMaxHeadDim)) {
    if (chosen > dims) return with_dims<attention_dims(dims + 1)>(chosen, f);
  }
  f(std::integral_constant<int, dims>());
}

template <class T, class KV, LoadPath path>
void launch_decode_attention(const Launcher& launcher, const AttentionLaunch& launch, const AttentionConfig& config) {
  with_dims(config.dims, [&](auto dims) {
    with_bool(config.latency, [&](auto latency) {
      with_bool(launch.p.phi != nullptr, [&](auto unified) {
        using Policy = std::conditional_t<unified.value, UnifiedMax<T>, OnlineMax>;
        constexpr AttentionShape s = attention_shape(path, sizeof(KV), dims.value, latency.value);
        using Shape = CtaShape<s.warps, s.stages, s.ctas_per_sm, s.scratch_rows>;
        launch_kernel<path, AttentionTile<T, KV, dims.value, Shape>, Policy>(launcher, launch, config);
      });
    });
  });
}

}  // namespace flashdecpp
