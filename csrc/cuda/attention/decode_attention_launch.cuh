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

template <class Tile, class Policy, LoadPath path, bool latency>
void launch_kernel(const Launcher& launcher, const AttentionLaunch& launch, const AttentionConfig& config) {
  using Path = AttentionPath<path>;
  using Stages = typename Path::template Stages<Tile>;
  using Shared = SharedMemory<Tile, Stages>;
  // The heuristics know the kernel's numbers without its headers.
  constexpr AttentionShape shape = attention_shape(path, sizeof(typename Tile::KV), Tile::kDims, latency);
  constexpr int64_t bytes = attention_shared_bytes(path, sizeof(typename Tile::KV), Tile::kDims, shape);
  static_assert(Shared::kBytes + sizeof(CombineMemory<Tile, Stages>) + Stages::kBarrierBytes + 1024 == bytes);
  static_assert(shape.clusters == Stages::kUsesClusters && Tile::kRows == kQueryTileRows);
  static_assert(shape.ctas_per_sm * (bytes + 1024) <= Path::kSharedBytesPerSm);
  static_assert(kMaxClusterSize * Tile::kWarps <= kMinKvTilesPerCluster);  // so that every warp has a KV tile

  constexpr auto kernel = decode_attention_kernel<Tile, Policy, Stages>;
  launcher.allow_shared_memory<kernel>(Shared::kBytes);
  launcher.overlapping_clusters(kernel, static_cast<int>(config.cluster), dim3(static_cast<unsigned>(config.ctas())),
                                dim3(Tile::kWarps * launcher.warp_size()), Shared::kBytes, launch,
                                Path::template source<Tile>(launch.p));
}

template <class T, class KV, int dims, LoadPath path, bool latency>
void launch_shape(const Launcher& launcher, const AttentionLaunch& launch, const AttentionConfig& config) {
  constexpr AttentionShape shape = attention_shape(path, sizeof(KV), dims, latency);
  using Tile = AttentionTile<T, KV, dims, CtaShape<shape.warps, shape.stages, shape.ctas_per_sm, shape.merge_rows>>;
  launch.p.phi ? launch_kernel<Tile, UnifiedMax<T>, path, latency>(launcher, launch, config)
               : launch_kernel<Tile, OnlineMax, path, latency>(launcher, launch, config);
}

template <class T, class KV, LoadPath path, int dims = 64>
void launch_dims(const Launcher& launcher, const AttentionLaunch& launch, const AttentionConfig& config) {
  if constexpr (dims < attention_dims(kMaxHeadDim)) {
    if (config.dims > dims) return launch_dims<T, KV, path, attention_dims(dims + 1)>(launcher, launch, config);
  }
  if constexpr (attention_shape(path, sizeof(KV), dims, true) != attention_shape(path, sizeof(KV), dims, false)) {
    if (config.latency) return launch_shape<T, KV, dims, path, true>(launcher, launch, config);
  }
  launch_shape<T, KV, dims, path, false>(launcher, launch, config);
}

template <class T, LoadPath path>
void launch_decode_attention(const Launcher& launcher, const AttentionLaunch& launch, const AttentionConfig& config) {
  launch.p.kv_dtype == DType::kFloat8E4M3 ? launch_dims<T, arch::float8, path>(launcher, launch, config)
                                          : launch_dims<T, T, path>(launcher, launch, config);
}

}  // namespace flashdecpp
