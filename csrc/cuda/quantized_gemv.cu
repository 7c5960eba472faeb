#include <bit>

#include "linear.h"
#include "quantized_linear_kernel.cuh"

namespace flashdecpp {
namespace {

// Whether the 128 weights that four lanes decode together share a scale.
bool steps_share_a_scale(const QuantizedLinearParams& p) { return p.group >= 128 || p.group == p.k; }

// Rows of x that one launch takes. 4 bit weights in large groups take so little time with 8 that reading them twice is
// faster than 16 at once (22016 x 4096 on an H100: 27 us each against 64).
int64_t rows_a_launch(const QuantizedLinearParams& p) { return p.bits == 4 && steps_share_a_scale(p) ? 8 : 16; }

template <class T, int bits, int row_tiles, int tiles>
void launch_gemv(const Launcher& launcher, const QuantizedLinearParams& p) {
  const int32_t blocks_a_group = steps_share_a_scale(p) ? 4 : static_cast<int32_t>(p.group / 32);
  const QuantizedLaunch launch{p.group == p.k ? 31 : std::countr_zero(static_cast<uint64_t>(p.group)), blocks_a_group};
  const auto blocks = static_cast<unsigned>((p.n + 16 * tiles - 1) / (16 * tiles));
  const auto run = [&](auto* shape) {
    using G = std::remove_pointer_t<decltype(shape)>;
    launcher.overlapping(quantized_gemv_kernel<T, G>, blocks, G::kThreads, 0, p, launch);
  };
  if (blocks_a_group < 4) {
    run(static_cast<QuantizedGemv<bits, row_tiles, tiles, true>*>(nullptr));
  } else if constexpr (bits == 8 || row_tiles == 1) {
    run(static_cast<QuantizedGemv<bits, row_tiles, tiles, false>*>(nullptr));
  }
}

template <class T, int bits>
void launch_rows(const Launcher& launcher, const QuantizedLinearParams& p) {
  if (p.m > 8) return launch_gemv<T, bits, 2, 1>(launcher, p);
  choose_quantized_tiles(launcher.properties(), p.n) == 1 ? launch_gemv<T, bits, 1, 1>(launcher, p)
                                                          : launch_gemv<T, bits, 1, 2>(launcher, p);
}

template <class T>
void launch_streamed(const Launcher& launcher, const QuantizedLinearParams& p) {
  const int64_t rows = rows_a_launch(p);
  for (int64_t first = 0; first < p.m; first += rows) {
    QuantizedLinearParams part = p;
    part.m = std::min(rows, p.m - first);
    part.x = static_cast<const T*>(p.x) + first * p.x_stride;
    part.out = static_cast<T*>(p.out) + first * p.n;
    p.bits == 4 ? launch_rows<T, 4>(launcher, part) : launch_rows<T, 8>(launcher, part);
  }
}

}  // namespace

void launch_quantized_gemv(const Launcher& launcher, const QuantizedLinearParams& p) {
  arch::with_half_type(p.dtype,
                       [&](auto* type) { launch_streamed<std::remove_pointer_t<decltype(type)>>(launcher, p); });
}

}  // namespace flashdecpp
