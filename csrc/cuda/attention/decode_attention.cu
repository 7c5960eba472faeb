// decode_attention on a GPU, the host's side: check, guard, choose, allocate, launch.
#include "cuda/attention/decode_attention.h"

#include <bit>

#include "boxing.h"
#include "checks/decode_attention.h"
#include "choice_log.h"
#include "cuda/attention/tile.cuh"
#include "cuda/nonce.h"
#include "cuda/numeric.cuh"

namespace flashdecpp {
namespace {

constexpr const char* kOp = "decode_attention";
static_assert(sizeof(SoftmaxState) == kSoftmaxStateBytes);

// Whether tensor maps can describe the cache: rows aligned to 16 bytes, which the contract does not promise for fp8.
bool suits_tma(const AttentionParams& p) {
  const int64_t element = p.kv_dtype == DType::kFloat8E4M3 ? 1 : 2;
  const auto suits = [&](const void* data, const CacheLayout& layout) {
    const auto step = [&](int64_t size, int64_t stride) {
      return size <= 1 || (stride > 0 && stride * element % 16 == 0 && stride * element < int64_t{1} << 40);
    };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && step(p.num_blocks, layout.block_stride) &&
           step(p.block_size, layout.token_stride) && step(p.kv_heads, layout.head_stride);
  };
  return p.num_blocks > 0 && suits(p.k_cache, p.k) && suits(p.v_cache, p.v);
}

AttentionProblem problem_of(const AttentionParams& p) {
  return {.batch = p.batch,
          .q_len = p.q_len,
          .q_heads = p.q_heads,
          .kv_heads = p.kv_heads,
          .head_dim = p.head_dim,
          .capacity = p.num_blocks > 0 ? p.capacity() : 0,
          .block_size = p.block_table ? p.block_size : 0,
          .num_splits = p.num_splits,
          .kv_bytes = p.kv_dtype == DType::kFloat8E4M3 ? 1 : 2,
          .suits_tma = suits_tma(p)};
}

// CTAs and KV tiles are numbered in 32 bits.
void check_size(const AttentionProblem& problem, const AttentionConfig& config) {
  const int64_t work_tiles = config.work_tiles;
  FLASHDECPP_REQUIRE(work_tiles <= INT32_MAX, kOp, "q must have a batch of at most ",
                     INT32_MAX / (work_tiles / problem.batch), " with its heads and q_len, got ", problem.batch);
  FLASHDECPP_REQUIRE(problem.kv_tiles() <= INT32_MAX / work_tiles, kOp,
                     problem.block_size > 0 ? "block_table" : "k_cache", " must have room for at most ",
                     INT32_MAX / work_tiles * kKvTile, " keys per sequence with q's batch, heads and q_len, got ",
                     problem.capacity);
  FLASHDECPP_REQUIRE(config.ctas() <= INT32_MAX, kOp, "num_splits must be at most ", INT32_MAX / work_tiles,
                     " with q's batch, heads and q_len, got ", problem.num_splits);
}

// The launch's share of the configuration, and the workspace that it returns, which must live until the launch.
Tensor prepare(AttentionLaunch& launch, const AttentionProblem& problem, const AttentionConfig& config, Device device) {
  launch.set_query_tiles(kQueryTileRows);
  launch.cluster_size_log2 = std::bit_width(static_cast<uint64_t>(config.cluster)) - 1;
  launch.min_kv_tiles_log2 = std::bit_width(static_cast<uint64_t>(config.min_tiles_per_cluster)) - 1;
  launch.uniform_splits = static_cast<int32_t>(config.grid.uniform_splits);
  launch.streams = static_cast<uint32_t>(config.grid.streams);
  launch.max_streams = static_cast<uint32_t>(config.grid.max_streams);
  launch.min_uniform_keys = static_cast<float>(config.grid.min_uniform_tiles) * kKvTile;
  const int64_t slots = config.grid.slots;
  if (slots == 0) return {};
  Tensor workspace = new_tensor({(slots * problem.slot_bytes() + 16 + 3) / 4}, DType::kFloat32, device);
  launch.ready = static_cast<uint64_t*>(View(workspace).data);
  launch.partial_out = reinterpret_cast<float*>(launch.ready + (slots + 1) / 2 * 2);  // 16-byte aligned
  launch.partial_states =
      reinterpret_cast<SoftmaxState*>(launch.partial_out + slots * launch.slot_rows * launch.p.head_dim);
  launch.nonce = new_nonce(launch.ready);
  return workspace;
}

template <class Phi>  // as in checks::decode_attention
std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,
                                            OptionalTensor block_table, std::optional<double> scale, Phi phi,
                                            double softcap, int64_t window, OptionalTensor alibi_slopes,
                                            OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale,
                                            int64_t num_splits, OptionalTensor fallback_count) {
  AttentionLaunch launch{};
  AttentionParams& p = launch.p;
  p = checks::decode_attention(checks::kGpu, q, k_cache, v_cache, seq_lens, block_table, scale, phi, softcap, window,
                               alibi_slopes, sinks, k_scale, v_scale, num_splits, fallback_count);
  const Device device = View(q).device;
  const Launcher launcher(kOp, device);
  Tensor out = new_tensor({p.batch, p.q_len, p.q_heads, p.head_dim}, p.q_dtype, device);
  Tensor lse = new_tensor({p.batch, p.q_heads, p.q_len}, DType::kFloat32, device);
  if (p.batch == 0) return {out, lse};
  p.out = View(out).data;
  p.lse = static_cast<float*>(View(lse).data);
  const AttentionProblem problem = problem_of(p);
  const AttentionConfig config = choose_attention(problem, launcher.properties());
  check_size(problem, config);
  log_choice(kOp, name(p.q_dtype), problem, config);
  const Tensor workspace = prepare(launch, problem, config, device);
  arch::with_half_type(p.q_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_bool(p.kv_dtype == DType::kFloat8E4M3, [&](auto fp8) {
      using KV = std::conditional_t<fp8.value, arch::float8, T>;
      if constexpr (arch::kAmd) {
        launch_decode_attention<T, KV, LoadPath::kRegister>(launcher, launch, config);
      } else if (config.path == LoadPath::kTma) {
        launch_decode_attention<T, KV, LoadPath::kTma>(launcher, launch, config);
      } else {
        launch_decode_attention<T, KV, LoadPath::kCpAsync>(launcher, launch, config);
      }
    });
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("decode_attention", boxed<&decode_attention<OptionalTensor>>);
  m.impl("decode_attention.carry", boxed<&decode_attention<Tensor>>);
}

}  // namespace flashdecpp
