// gemv, flat_gemm and linear on a CPU: one kernel that streams the weight, or torch's BLAS for many rows. A norm, a
// gate or an activation is a pass of its own; a residual is added as outputs are stored.
#include <string>

#include "boxing.h"
#include "cpu/add_rows.h"
#include "cpu/kernels.h"
#include "cpu/linear_rule.h"
#include "cpu/linear_split.h"
#include "cpu/scratch.h"
#include "heuristics/linear_table.h"
#include "linear_unfused.h"

namespace flashdecpp::cpu {
namespace {

void run(const LinearParams& p) {
  const Kernels& kernel = kernels();
  const int64_t packed_stride = ceil_div(p.k, kPackAlign) * kPackAlign;
  Scratch<float, 16384> packed(static_cast<size_t>(p.m * packed_stride));
  float* x = packed.data();
  split_linear(
      p, p.k * checks::element_size(p.dtype),
      [&](int64_t begin, int64_t end) { kernel.pack(p, x, packed_stride, begin, end); },
      [&](const LinearPart& part) { kernel.linear(p, x, packed_stride, part); });
}

Tensor own_linear(checks::Linear& call) {
  Tensor out = checks::new_like_rows(call.x_view, call.params.n);
  call.params.out = View(out).data;
  run(call.params);
  return out;
}

Tensor gemv(Tensor x, Tensor weight, OptionalTensor bias) {
  checks::Linear call = checks::linear("gemv", x, weight, bias);
  return own_linear(call);
}

Tensor flat_gemm(Tensor x, Tensor weight, OptionalTensor bias) {
  checks::Linear call = checks::linear("flat_gemm", x, weight, bias);
  return own_linear(call);
}

// impl="auto": by the inflection points measured on this CPU, else by the rule. gemv and flat_gemm are one kernel here.
LinearImpl choose(const LinearParams& p) {
  if (const auto points = linear_tables().find("cpu", p.dtype, p.n, p.k, p.m)) return points->choose(p.m);
  const bool blas = linear_prefers_blas(p.dtype, p.m, p.k, kernels().bfloat16_dot);
  return blas ? LinearImpl::kBlas : LinearImpl::kGemv;
}

LinearImpl choose(const char* op, const std::string& impl, const LinearParams& p) {
  return impl == "auto" ? choose(p) : checks::linear_impl(op, impl);
}

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, double norm_eps,
              std::optional<std::string> gate, std::optional<std::string> activation, std::string impl) {
  checks::Linear call = checks::linear("linear", x, weight, bias);
  checks::check_norm(call, norm_weight, norm_eps);
  checks::check_activation(call, gate, activation);
  const LinearFusion fusion = call.params.fusion;
  call.params = unfused(call.params);
  const LinearImpl chosen = choose("linear", impl, call.params);
  apply_norm(call, norm_weight, norm_eps);
  Tensor y = chosen == LinearImpl::kBlas ? blas_linear(call, weight, bias) : own_linear(call);
  return apply_activation("linear", std::move(y), fusion);
}

Tensor linear_plain(Tensor x, Tensor weight, OptionalTensor bias) {
  return linear(std::move(x), std::move(weight), std::move(bias), std::nullopt, 0, std::nullopt, std::nullopt, "auto");
}

void linear_residual(Tensor x, Tensor weight, OptionalTensor bias, Tensor residual, OptionalTensor norm_weight,
                     double norm_eps, std::string impl) {
  checks::Linear call = checks::linear("linear", x, weight, bias);
  checks::check_norm(call, norm_weight, norm_eps);
  checks::check_residual(call, x, residual);
  const LinearImpl chosen = choose("linear", impl, call.params);
  apply_norm(call, norm_weight, norm_eps);
  chosen == LinearImpl::kBlas ? add_rows(call.params, blas_linear(call, weight, bias)) : run(call.params);
}

int64_t linear_choice_index(Tensor x, Tensor weight) {
  return static_cast<int64_t>(choose(checks::linear("linear_choice", x, weight, std::nullopt).params));
}

}  // namespace
}  // namespace flashdecpp::cpu

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)
{
  m.impl("gemv", flashdecpp::boxed<&flashdecpp::cpu::gemv>);
  m.impl("flat_gemm", flashdecpp::boxed<&flashdecpp::cpu::flat_gemm>);
  m.impl("linear", flashdecpp::boxed<&flashdecpp::cpu::linear>);
  m.impl("linear.plain", flashdecpp::boxed<&flashdecpp::cpu::linear_plain>);
  m.impl("linear.residual", flashdecpp::boxed<&flashdecpp::cpu::linear_residual>);
  m.impl("linear_choice_index", flashdecpp::boxed<&flashdecpp::cpu::linear_choice_index>);
}

// Called from Python through ctypes; the only device of this library is "cpu".
extern "C" __attribute__((visibility("default"))) void flashdecpp_install_linear_table(
    const char* device, const flashdecpp::LinearRow* rows, int64_t count) {
  flashdecpp::linear_tables().install(device, {rows, rows + count});
}
