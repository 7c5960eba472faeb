// NVIDIA's tensor-core GEMVs, dense and quantized, with all of their fusions, on the simulated GPU. The last line of
// the output counts the failed cases.
#include "cuda/nvidia/gemv_mma.cuh"
#include "cuda/nvidia/quantized_gemv.cuh"
#include "linear_calls.h"

using namespace flashdecpp;

namespace {

template <class T, class G>
void gemv(int m, int n, int k, Fusion fusion) {
  Call<T> call(m, n, k, fusion);
  const auto blocks = static_cast<unsigned>((call.p.weight_rows() + G::kBlockN - 1) / G::kBlockN);
  simulated::gpu().launch({blocks}, G::kThreads, 0, [&] {
    call.p.fusion.any() ? mma_gemv_kernel<T, G, true>(call.p) : mma_gemv_kernel<T, G, false>(call.p);
  });
  call.compare("mma GEMV, loads of " + std::to_string(G::kLoads));
}

// A call whose exact weights are the values of random quantized ones.
template <class T, class G>
void quantized(int m, int n, int k, int group, Fusion fusion, bool with_offsets) {
  Call<T> call(m, n, k, fusion);
  const int rows = static_cast<int>(call.p.weight_rows()), groups = k / group, row_bytes = k * G::kBits / 8;
  simulated::Tensor<uint8_t> q(size_t(rows) * row_bytes);
  simulated::Tensor<float> scales(size_t(rows) * groups), offsets(size_t(rows) * groups);
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(check.random());
  for (const auto* tensor : {&scales, &offsets}) check.fill(*tensor);
  for (size_t i = 0; i < scales.size(); ++i) scales[i] /= 1 << G::kBits;
  call.exact.resize(size_t(rows) * k);
  for (int n_at = 0; n_at < rows; ++n_at) {
    for (int at = 0; at < k; ++at) {
      const int g = n_at * groups + at / group;
      const uint8_t* row = q.data() + n_at * row_bytes;
      int number = static_cast<int8_t>(row[G::kBits == 8 ? at : 0]);
      if (G::kBits == 4) number = row[at / 32 * 16 + at % 16] >> (at % 32 / 16 * 4) & 15;
      const float offset = with_offsets ? offsets[g] : G::kBits == 4 ? -8 * scales[g] : 0;
      call.exact[size_t(n_at) * k + at] = double{scales[g]} * number + offset;
    }
  }
  QuantizedLinearParams p{};
  static_cast<LinearParams&>(p) = call.p;
  p.weight = q.data();
  p.weight_stride = row_bytes;
  p.scales = scales.data();
  p.offsets = with_offsets ? offsets.data() : nullptr;
  p.scales_stride = p.offsets_stride = groups;
  p.group = group;
  p.bits = G::kBits;
  p.scales_dtype = DType::kFloat32;
  int shift = 31;
  if (groups > 1) {
    for (shift = 5; 1 << shift < group; ++shift) {
    }
  }
  const QuantizedLaunch launch{shift, G::kExchange ? group / 32 : 4};
  const auto blocks = static_cast<unsigned>((rows + G::kBlockN - 1) / G::kBlockN);
  simulated::gpu().launch({blocks}, G::kThreads, G::kSharedBytes, [&] {
    p.fusion.any() ? quantized_gemv_kernel<T, G, true>(p, launch) : quantized_gemv_kernel<T, G, false>(p, launch);
  });
  call.compare(std::to_string(G::kBits) + " bit, groups of " + std::to_string(group));
}

template <class T>
void run() {
  const Fusion gated{.bias = true, .gated = true}, added{.bias = true, .add = true};
  const Fusion activated{.bias = true, .activated = true};
  gemv<T, MmaGemv<1, 1, 8>>(3, 37, 2120, {.bias = true});
  gemv<T, MmaGemv<1, 1, 8>>(8, 21, 264, gated);
  gemv<T, MmaGemv<1, 2, 4>>(5, 45, 520, added);
  gemv<T, MmaGemv<2, 1, 8>>(13, 24, 520, gated);
  for (const int m : {1, 2, 3, 4, 5, 8}) gemv<T, MmaGemv<1, 1, 8>>(m, 19, 2120, {});
  gemv<T, MmaGemv<1, 2, 4>>(3, 40, 136, gated);
  gemv<T, MmaGemv<1, 2, 4>>(8, 21, 520, activated);
  gemv<T, MmaGemv<2, 2, 4>>(12, 21, 520, gated);
  gemv<T, MmaGemv<2, 1, 8>>(16, 21, 72, {.bias = true, .add = true});
  gemv<T, MmaGemv<2, 1, 8>>(11, 21, 264, activated);

  quantized<T, QuantizedGemv<4, 1, 1, false>>(3, 21, 384, 128, {.bias = true}, false);
  quantized<T, QuantizedGemv<4, 1, 2, true>>(8, 37, 1056, 32, gated, true);
  quantized<T, QuantizedGemv<8, 1, 1, false>>(2, 19, 400, 400, added, false);
  quantized<T, QuantizedGemv<4, 1, 1, true>>(3, 21, 384, 64, activated, false);
  quantized<T, QuantizedGemv<4, 2, 1, false>>(9, 21, 1280, 128, {.bias = true}, true);
  quantized<T, QuantizedGemv<4, 2, 2, false>>(16, 37, 2432, 128, gated, false);
  quantized<T, QuantizedGemv<4, 2, 2, true>>(13, 35, 1056, 32, added, true);
  quantized<T, QuantizedGemv<8, 2, 1, false>>(12, 21, 2064, 2064, {.bias = true}, true);
  quantized<T, QuantizedGemv<8, 2, 2, true>>(16, 37, 1344, 64, gated, false);
}

}  // namespace

int main() {
  run<arch::half>();
  run<arch::bfloat16>();
  return check.report();
}
