// gemv, flat_gemm and linear on a CPU: one kernel that streams the weights, and torch's BLAS for many rows.
#include <string>
#include <utility>

#include "contract.h"
#include "kernels.h"
#include "linear_rule.h"
#include "linear_table.h"
#include "scratch.h"

namespace flashdecpp::cpu {
namespace {

// A thread's share must be worth waking it: so many bytes of weights, for up to kMaxTileM rows of x.
constexpr int64_t kMinBytesPerThread = 64 * 1024;
constexpr int64_t kMinElementsPerThread = 32 * 1024;  // of x, to pack
constexpr int64_t kUnit = 16;   // weight rows that threads share out: whole tiles, and whole cache lines of the output
constexpr int64_t kBlock = 64;  // rows of x that threads share out where the weights have too few

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run(const LinearParams& p) {
  if (p.m == 0 || p.n == 0) return;
  const Kernels& kernel = kernels();
  const int64_t packed_stride = ceil_div(p.k, kPackAlign) * kPackAlign;
  Scratch<float, 16384> packed(static_cast<size_t>(p.m * packed_stride));
  float* x = packed.data();
  if (p.m * p.k <= kMinElementsPerThread) {
    kernel.pack(p, x, packed_stride, 0, p.m);
  } else {
    torch::stable::parallel_for(0, p.m, ceil_div(kMinElementsPerThread, p.k),
                                [&](int64_t begin, int64_t end) { kernel.pack(p, x, packed_stride, begin, end); });
  }

  // Outputs in blocks of rows of x, each in units of rows of the weights.
  const int64_t units = ceil_div(p.n, kUnit);
  const int64_t block =
      units >= 4 * static_cast<int64_t>(torch::stable::get_num_threads()) ? p.m : std::min(p.m, kBlock);
  const int64_t unit_bytes = kUnit * p.k * contract::element_size(p.dtype) * ceil_div(block, kMaxTileM);
  torch::stable::parallel_for(
      0, ceil_div(p.m, block) * units, ceil_div(kMinBytesPerThread, unit_bytes), [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t m = begin / units * block, first = begin % units;
          const int64_t last = std::min(units, first + end - begin);
          const LinearPart part = {m, std::min(m + block, p.m), first * kUnit, std::min(last * kUnit, p.n)};
          kernel.linear(p, x, packed_stride, part);
          begin += last - first;
        }
      });
}

Tensor own_linear(contract::Linear call) {
  Tensor out = contract::new_like_rows(call.x_view, call.params.n);
  call.params.out = View(out).data;
  run(call.params);
  return out;
}

Tensor gemv(Tensor x, Tensor weight, OptionalTensor bias) {
  return own_linear(contract::linear("gemv", x, weight, bias));
}

Tensor flat_gemm(Tensor x, Tensor weight, OptionalTensor bias) {
  return own_linear(contract::linear("flat_gemm", x, weight, bias));
}

// The choice of impl="auto": by what was measured on this CPU, else by the rule. gemv and flat_gemm are one kernel.
LinearImpl choose(const LinearParams& p) {
  if (const auto points = linear_tables().find("cpu", p.dtype, p.n, p.k, p.m)) return points->choose(p.m);
  const bool blas = linear_prefers_blas(p.dtype, p.m, p.k, kernels().bfloat16_dot);
  return blas ? LinearImpl::kBlas : LinearImpl::kGemv;
}

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias, std::string impl) {
  contract::Linear call = contract::linear("linear", x, weight, bias);
  const LinearImpl chosen = impl == "auto" ? choose(call.params) : contract::linear_impl("linear", impl);
  return chosen == LinearImpl::kBlas ? blas_linear(x, weight, bias) : own_linear(std::move(call));
}

std::string linear_choice(Tensor x, Tensor weight) {
  return name(choose(contract::linear("linear_choice", x, weight, std::nullopt).params));
}

}  // namespace
}  // namespace flashdecpp::cpu

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)
{
  m.impl("gemv", TORCH_BOX(&flashdecpp::cpu::gemv));
  m.impl("flat_gemm", TORCH_BOX(&flashdecpp::cpu::flat_gemm));
  m.impl("linear", TORCH_BOX(&flashdecpp::cpu::linear));
  m.impl("linear_choice", TORCH_BOX(&flashdecpp::cpu::linear_choice));
}

// For Python, which calls it through ctypes; the only device of this library is "cpu".
extern "C" __attribute__((visibility("default"))) void flashdecpp_install_linear_table(
    const char* device, const flashdecpp::LinearRow* rows, int64_t count) {
  flashdecpp::linear_tables().install(device, {rows, rows + count});
}
