// Decode attention on a GPU, the host's side: check, guard, allocate, launch.
#include "../contract.h"
#include "decode_attention_kernel.cuh"
#include "launch.h"

namespace flashdecpp {
namespace {

constexpr const char* kOp = "decode_attention";
constexpr int64_t kWorkspaceBytes =
    16 << 20;                          // what the choice of splits stays below; an explicit number may exceed it
constexpr int64_t kMaxSplits = 65535;  // blocks of a grid in y

// Whether 16-byte copies of an fp8 row are aligned and inside the row: the contract promises 8.
bool aligned16(const AttentionParams& p) {
  const auto even = [&](const void* data, const CacheLayout& layout) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (p.num_blocks <= 1 || layout.block_stride % 16 == 0) &&
           (p.block_size <= 1 || layout.token_stride % 16 == 0) && (p.kv_heads <= 1 || layout.head_stride % 16 == 0);
  };
  return p.head_dim % 16 == 0 && even(p.k_cache, p.k) && even(p.v_cache, p.v);
}

template <class Tile, class Policy>
void launch_kernel(const Launcher& launcher, AttentionLaunch launch, Device device) {
  const AttentionParams& p = launch.p;
  const int64_t row_count = int64_t{p.q_len} * p.group();
  launch.row_tiles = static_cast<int32_t>((row_count + kTileRows - 1) / kTileRows);
  launch.aligned16 = aligned16(p);
  const int64_t units = int64_t{p.batch} * p.kv_heads * launch.row_tiles;
  FLASHDECPP_REQUIRE(units <= INT32_MAX, kOp, "q must have batch * kv_heads below 2^31 / ", launch.row_tiles, ", got ",
                     p.batch, " * ", p.kv_heads);

  // More splits than key tiles would not change a bit of the result.
  const int64_t tiles = p.num_blocks > 0 ? (p.capacity() + Tile::kKeys - 1) / Tile::kKeys : 0;
  const int64_t arrivals = (units + 3) / 4 * 4;  // what follows stays aligned
  const int64_t split_elements = int64_t{p.batch} * p.q_heads * p.q_len * (p.head_dim + 2);
  int64_t splits = p.num_splits;
  if (splits == 0) {
    splits = std::min<int64_t>(choose_num_splits(launcher.properties(), units, p.capacity()),
                               (kWorkspaceBytes / 4 - arrivals) / split_elements);
  }
  splits = std::clamp<int64_t>(splits, 1, std::clamp<int64_t>(tiles, 1, kMaxSplits));

  Tensor workspace;
  if (splits > 1) {
    workspace = new_tensor({arrivals + splits * split_elements}, DType::kFloat32, device);
    float* data = static_cast<float*>(View(workspace).data);
    launch.arrivals = reinterpret_cast<unsigned int*>(data);
    launch.part_out = data + arrivals;
    launch.part_state =
        reinterpret_cast<SoftmaxPart*>(launch.part_out + splits * split_elements / (p.head_dim + 2) * p.head_dim);
    launcher.zero(launch.arrivals, units * sizeof(unsigned int));
  }
  const auto kernel = decode_attention_kernel<Tile, Policy>;
  launcher.allow_shared_memory(kernel, Tile::kSharedBytes);
  launcher(kernel, dim3(static_cast<unsigned>(units), static_cast<unsigned>(splits)), dim3(Tile::kThreads),
           Tile::kSharedBytes, launch);
}

template <class T, class KV, int kDims>
void launch_policy(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  using Tile = AttentionTile<T, KV, kDims>;
  if (launch.p.phi) {
    launch_kernel<Tile, UnifiedMax<T>>(launcher, launch, device);
  } else {
    launch_kernel<Tile, OnlineMax>(launcher, launch, device);
  }
}

template <class T, class KV>
void launch_dims(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  const int dims = launch.p.head_dim;
  if (dims <= 64) return launch_policy<T, KV, 64>(launcher, launch, device);
  if (dims <= 96) return launch_policy<T, KV, 96>(launcher, launch, device);
  if (dims <= 128) return launch_policy<T, KV, 128>(launcher, launch, device);
  if (dims <= 192) return launch_policy<T, KV, 192>(launcher, launch, device);
  return launch_policy<T, KV, 256>(launcher, launch, device);
}

template <class T>
void launch_cache(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  if (launch.p.kv_dtype == DType::kFloat8E4M3) return launch_dims<T, arch::float8>(launcher, launch, device);
  return launch_dims<T, T>(launcher, launch, device);
}

template <class Phi>  // as in contract::decode_attention
std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,
                                            OptionalTensor block_table, std::optional<double> scale, Phi phi,
                                            double softcap, int64_t window, OptionalTensor alibi_slopes,
                                            OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale,
                                            int64_t num_splits, OptionalTensor fallback_count) {
  AttentionLaunch launch{};
  AttentionParams& p = launch.p;
  p = contract::decode_attention(contract::kGpu, q, k_cache, v_cache, seq_lens, block_table, scale, phi, softcap,
                                 window, alibi_slopes, sinks, k_scale, v_scale, num_splits, fallback_count);
  const Device device = View(q).device;
  const Launcher launcher(kOp, device);
  Tensor out = new_tensor({p.batch, p.q_len, p.q_heads, p.head_dim}, p.q_dtype, device);
  Tensor lse = new_tensor({p.batch, p.q_heads, p.q_len}, DType::kFloat32, device);
  if (p.batch == 0) return {out, lse};
  p.out = View(out).data;
  p.lse = static_cast<float*>(View(lse).data);
  if (p.q_dtype == DType::kFloat16) {
    launch_cache<arch::half>(launcher, launch, device);
  } else {
    launch_cache<arch::bfloat16>(launcher, launch, device);
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("decode_attention", TORCH_BOX(&decode_attention<OptionalTensor>));
  m.impl("decode_attention.carry", TORCH_BOX(&decode_attention<Tensor>));
}

}  // namespace flashdecpp
