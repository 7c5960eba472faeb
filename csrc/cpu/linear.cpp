// gemv, flat_gemm and linear on a CPU: one kernel that streams the weights, and torch's BLAS for many rows.
#include <string>

#include "contract.h"
#include "kernels.h"
#include "linear_rule.h"
#include "scratch.h"

namespace flashdecpp::cpu {
namespace {

// A thread's share must be worth waking it: so many bytes of weights, for up to 8 rows of x.
constexpr int64_t kMinBytesPerThread = 64 * 1024;
constexpr int64_t kUnit = 16;  // weight rows that threads share out: whole tiles, and whole cache lines of the output

void run(const LinearParams& p) {
  if (p.m == 0 || p.n == 0) return;
  const Kernels& kernel = kernels();
  const int64_t packed_stride = (p.k + kPackAlign - 1) / kPackAlign * kPackAlign;
  Scratch<float, 16384> packed(static_cast<size_t>(p.m * packed_stride));
  float* x = packed.data();
  kernel.pack(p, x, packed_stride);
  const int64_t unit_bytes = kUnit * p.k * contract::element_size(p.dtype) * ((p.m + 7) / 8);
  torch::stable::parallel_for(0, (p.n + kUnit - 1) / kUnit, (kMinBytesPerThread + unit_bytes - 1) / unit_bytes,
                              [&](int64_t begin, int64_t end) {
                                kernel.linear(p, x, packed_stride, begin * kUnit, std::min(end * kUnit, p.n));
                              });
}

Tensor own_linear(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  contract::Linear call = contract::linear(op, x, weight, bias);
  Tensor out = contract::new_like_rows(call.x_view, call.params.n);
  call.params.out = View(out).data;
  run(call.params);
  return out;
}

Tensor gemv(Tensor x, Tensor weight, OptionalTensor bias) { return own_linear("gemv", x, weight, bias); }

Tensor flat_gemm(Tensor x, Tensor weight, OptionalTensor bias) { return own_linear("flat_gemm", x, weight, bias); }

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias, std::string impl) {
  contract::Linear call = contract::linear("linear", x, weight, bias);
  bool blas = impl == "blas";
  if (impl == "auto") {
    blas = linear_prefers_blas(call.params.dtype, call.params.m, call.params.n, call.params.k);
  } else if (!blas && impl != "gemv" && impl != "flat_gemm") {
    fail("linear", "impl must be auto, gemv, flat_gemm or blas, got ", impl);
  }
  if (blas) return blas_linear(x, weight, bias);
  Tensor out = contract::new_like_rows(call.x_view, call.params.n);
  call.params.out = View(out).data;
  run(call.params);
  return out;
}

}  // namespace
}  // namespace flashdecpp::cpu

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)
{
  m.impl("gemv", TORCH_BOX(&flashdecpp::cpu::gemv));
  m.impl("flat_gemm", TORCH_BOX(&flashdecpp::cpu::flat_gemm));
  m.impl("linear", TORCH_BOX(&flashdecpp::cpu::linear));
}
