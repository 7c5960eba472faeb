#include <bit>

#include "cuda/linear/linear.h"
#include "cuda/nvidia/quantized_gemv.cuh"

namespace flashdecpp {
namespace {

// Whether the 128 weights that four lanes decode together share a scale.
bool steps_share_a_scale(const QuantizedLinearParams& p) { return p.group >= 128 || p.group == p.k; }

template <class T, int bits, int row_tiles, int tiles>
void launch_gemv(const Launcher& launcher, const QuantizedLinearParams& p) {
  const int32_t blocks_per_group = steps_share_a_scale(p) ? 4 : static_cast<int32_t>(p.group / 32);
  const QuantizedLaunch launch{p.group == p.k ? 31 : std::countr_zero(static_cast<uint64_t>(p.group)),
                               blocks_per_group};
  const auto blocks = static_cast<unsigned>((p.weight_rows() + 16 * tiles - 1) / (16 * tiles));
  const auto run = [&](auto* shape) {
    using G = std::remove_pointer_t<decltype(shape)>;
    const auto kernel = p.fusion.any() ? quantized_gemv_kernel<T, G, true> : quantized_gemv_kernel<T, G, false>;
    launcher.allow_shared_memory(kernel, G::kSharedBytes);
    launcher.keep_l1(kernel, 2 * (kWarpSumsBytes<G> + G::kSharedBytes));
    launcher.overlapping(kernel, blocks, G::kThreads, G::kSharedBytes, p, launch);
  };
  blocks_per_group < 4 ? run(static_cast<QuantizedGemv<bits, row_tiles, tiles, true>*>(nullptr))
                       : run(static_cast<QuantizedGemv<bits, row_tiles, tiles, false>*>(nullptr));
}

template <class T, int bits, int row_tiles>
void launch_tiles(const Launcher& launcher, const QuantizedLinearParams& p) {
  choose_quantized_tiles(launcher.properties(), p.weight_rows()) == 1 ? launch_gemv<T, bits, row_tiles, 1>(launcher, p)
                                                                      : launch_gemv<T, bits, row_tiles, 2>(launcher, p);
}

template <class T, int bits>
void launch_rows(const Launcher& launcher, const QuantizedLinearParams& p) {
  p.m <= 8 ? launch_tiles<T, bits, 1>(launcher, p) : launch_tiles<T, bits, 2>(launcher, p);
}

struct QuantizedGemvs {
  static constexpr int kMaxRows = 16;

  template <class T>
  static void launch(const Launcher& launcher, const QuantizedLinearParams& p) {
    p.bits == 4 ? launch_rows<T, 4>(launcher, p) : launch_rows<T, 8>(launcher, p);
  }
};

}  // namespace

bool launch_quantized_gemv(const Launcher& launcher, const QuantizedLinearParams& p) {
  launch_row_chunks<QuantizedGemvs>(launcher, p);
  return true;
}

}  // namespace flashdecpp
