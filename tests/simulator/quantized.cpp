// Each vendor's own quantized GEMV on the simulated GPU, compared with sums in double; AMD's with 16-bit weights as
// well. The last line of the output counts the failed cases.
#include <algorithm>
#include <bit>

#include "checks.h"
#if defined(USE_ROCM)
#include "hip/stream_gemv_amd.h"
#else
#include "cuda/nvidia/quantized_gemv.cuh"
#endif

using namespace flashdecpp;

namespace {

Checks check(13);

struct Shape {
  int m, n, k, group;
  bool offsets, bias;
};

template <class T, int bits, int tiles>
void launch(const QuantizedLinearParams& p) {
  const auto blocks = static_cast<unsigned>((p.n + 16 * tiles - 1) / (16 * tiles));
#if defined(USE_ROCM)
  const auto run = [&](auto* shape) {
    using G = std::remove_pointer_t<decltype(shape)>;
    simulated::gpu().launch({blocks}, G::kThreads, 0, [&] { stream_gemv_kernel<T, G>(p); });
  };
  constexpr bool has_scales = bits < 16;
  if (has_scales && p.group < 128 && p.group < p.k) {
    run(static_cast<StreamGemv<bits, tiles, has_scales>*>(nullptr));
  } else {
    run(static_cast<StreamGemv<bits, tiles, false>*>(nullptr));
  }
#else
  const int blocks_per_group = p.group >= 128 || p.group == p.k ? 4 : static_cast<int>(p.group / 32);
  const QuantizedLaunch launch{p.group == p.k ? 31 : std::countr_zero(static_cast<uint64_t>(p.group)),
                               blocks_per_group};
  const auto run = [&](auto* shape) {
    using G = std::remove_pointer_t<decltype(shape)>;
    simulated::gpu().launch({blocks}, G::kThreads, G::kSharedBytes,
                            [&] { quantized_gemv_kernel<T, G, false>(p, launch); });
  };
  const auto rows = [&]<bool exchange>() {
    if (p.m <= 8) return run(static_cast<QuantizedGemv<bits, 1, tiles, exchange>*>(nullptr));
    if constexpr (tiles == 1) run(static_cast<QuantizedGemv<bits, 2, 1, exchange>*>(nullptr));
  };
  blocks_per_group < 4 ? rows.template operator()<true>() : rows.template operator()<false>();
#endif
}

template <class T, int bits, int tiles>
void run(const Shape& shape) {
  const int group = shape.group == 0 ? shape.k : shape.group, groups = shape.k / group;
  const int row_bytes = shape.k * bits / 8;
  simulated::Tensor<T> x(size_t(shape.m) * shape.k), bias(shape.n), out(size_t(shape.m) * shape.n);
  simulated::Tensor<unsigned char> weight(size_t(shape.n) * row_bytes);
  simulated::Tensor<float> scales(size_t(shape.n) * groups), offsets(size_t(shape.n) * groups);
  std::vector<double> exact(size_t(shape.n) * shape.k);
  check.fill(x);
  check.fill(bias);
  std::uniform_real_distribution<float> scale(0.01f, 0.1f), offset(-1.f, 1.f);
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = scale(check.random);
    offsets[i] = offset(check.random);
  }
  if constexpr (bits == 16) {
    const simulated::Tensor<T> plain(size_t(shape.n) * shape.k);
    check.fill(plain);
    std::memcpy(weight.data(), plain.data(), weight.size());
    for (size_t i = 0; i < exact.size(); ++i) exact[i] = arch::to_float(plain[i]);
  } else {
    std::uniform_int_distribution<int> byte(0, 255);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<unsigned char>(byte(check.random));
    for (int n = 0; n < shape.n; ++n) {
      for (int k = 0; k < shape.k; ++k) {
        const unsigned char* row = weight.data() + size_t(n) * row_bytes;
        const int q = bits == 8 ? static_cast<signed char>(row[k]) : row[k / 32 * 16 + k % 16] >> k % 32 / 16 * 4 & 15;
        const size_t at = size_t(n) * groups + k / group;
        const double zero = shape.offsets ? offsets[at] : bits == 4 ? -8.0 * scales[at] : 0.0;
        exact[size_t(n) * shape.k + k] = double{scales[at]} * q + zero;
      }
    }
  }

  QuantizedLinearParams p{};
  p.x = x.data();
  p.weight = weight.data();
  p.bias = shape.bias ? bias.data() : nullptr;
  p.out = out.data();
  p.m = shape.m;
  p.n = shape.n;
  p.k = p.x_stride = shape.k;
  p.weight_stride = bits == 16 ? shape.k : row_bytes;
  p.scales = scales.data();
  p.offsets = shape.offsets ? offsets.data() : nullptr;
  p.scales_stride = p.offsets_stride = groups;
  p.group = group;
  p.bits = bits;
  p.scales_dtype = DType::kFloat32;
  launch<T, bits, tiles>(p);

  double worst = 0;
  for (int m = 0; m < shape.m; ++m) {
    for (int n = 0; n < shape.n; ++n) {
      double sum = shape.bias ? arch::to_float(bias[n]) : 0, size = 0;
      for (int k = 0; k < shape.k; ++k) {
        const double product = double{arch::to_float(x[size_t(m) * shape.k + k])} * exact[size_t(n) * shape.k + k];
        sum += product;
        size += std::fabs(product);
      }
      const double got = arch::to_float(out[size_t(m) * shape.n + n]);
      const double rounding = (std::is_same_v<T, arch::half> ? 0x1p-11 : 0x1p-8) * std::fabs(sum) + 1e-5 * size;
      worst = std::isnan(got) ? INFINITY : std::max(worst, std::fabs(sum - got) / (rounding + 1e-6));
    }
  }
  const auto number = [](int value) { return std::to_string(value); };
  check(worst <= 1.5, number(bits) + " bits, m " + number(shape.m) + ", n " + number(shape.n) + ", k " +
                          number(shape.k) + ", groups of " + number(group) + (shape.offsets ? ", offsets" : "") + ", " +
                          number(tiles) + " tiles: off by " + std::to_string(worst) + " roundings");
}

template <class T, int bits>
void run_bits() {
  run<T, bits, 1>({1, 37, 256, 0, false, true});
  run<T, bits, 2>({5, 40, 1120, 0, false, false});
  run<T, bits, 1>({16, 16, 352, 0, false, true});
  if constexpr (bits < 16) {
    run<T, bits, 1>({2, 33, 1280, 128, true, true});
    run<T, bits, 1>({3, 20, 480, 32, false, false});
    run<T, bits, 2>({8, 70, 1184, 32, true, true});
    run<T, bits, 1>({9, 18, 320, 64, true, false});
    run<T, bits, 2>({1, 32, 512, 64, false, true});
  }
}

template <class T>
void run_type() {
  run_bits<T, 4>();
  run_bits<T, 8>();
#if defined(USE_ROCM)
  run_bits<T, 16>();
  run<T, 16, 1>({4, 24, 200, 0, false, true});  // K ends within a product
#endif
}

}  // namespace

int main() {
  run_type<arch::half>();
#if !defined(FLASHDECPP_SIMULATED_FEW)
  run_type<arch::bfloat16>();
#endif
  return check.report();
}
