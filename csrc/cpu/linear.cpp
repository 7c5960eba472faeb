// gemv, flat_gemm and linear on a CPU: one kernel that streams the weights, and torch's BLAS for many rows.
#include <string>

#include "contract.h"
#include "kernels.h"
#include "linear_rule.h"
#include "linear_split.h"
#include "scratch.h"

namespace flashdecpp::cpu {
namespace {

void run(const LinearParams& p) {
  const Kernels& kernel = kernels();
  const int64_t packed_stride = ceil_div(p.k, kPackAlign) * kPackAlign;
  Scratch<float, 16384> packed(static_cast<size_t>(p.m * packed_stride));
  float* x = packed.data();
  split_linear(
      p, p.k * contract::element_size(p.dtype),
      [&](int64_t begin, int64_t end) { kernel.pack(p, x, packed_stride, begin, end); },
      [&](const LinearPart& part) { kernel.linear(p, x, packed_stride, part); });
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
    blas = linear_prefers_blas(call.params.dtype, call.params.m, call.params.k, kernels().bfloat16_dot);
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
