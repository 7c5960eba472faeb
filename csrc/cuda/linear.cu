// The switch: which of the three implementations of a linear layer runs.
#include <string>

#include "../linear_table.h"
#include "linear.h"

namespace flashdecpp {
namespace {

// The choice of impl="auto": blas wherever the hand-written kernels cannot run, else by the inflection points that were
// measured on this device, else by those of the rule.
LinearImpl choose(const Launcher& launcher, const contract::Linear& call) {
  const LinearParams& p = call.params;
  const bool half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  if (!half || !rows_are_aligned(p.weight, p.n, p.weight_stride, p.dtype)) return LinearImpl::kBlas;
  const auto measured = linear_tables().find(arch::name_in_tables(call.x_view.device.index), p.dtype, p.n, p.k, p.m);
  return choose_linear(measured ? *measured : default_inflection_points(launcher.properties()), p.m, p.k);
}

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias, std::string impl) {
  contract::Linear call = contract::linear("linear", x, weight, bias);
  const Launcher launcher("linear", call.x_view.device);
  const LinearImpl chosen = impl == "auto" ? choose(launcher, call) : contract::linear_impl("linear", impl);
  if (chosen == LinearImpl::kBlas) return blas_linear(x, weight, bias);
  require_vector_rows("linear", call);
  return chosen == LinearImpl::kGemv ? run_gemv(launcher, call) : run_flat_gemm(launcher, call);
}

std::string linear_choice(Tensor x, Tensor weight) {
  const contract::Linear call = contract::linear("linear_choice", x, weight, std::nullopt);
  return name(choose(Launcher("linear_choice", call.x_view.device), call));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_choice", TORCH_BOX(&linear_choice));
}

}  // namespace flashdecpp

// For Python, which calls it through ctypes.
extern "C" __attribute__((visibility("default"))) void flashdecpp_install_linear_table(
    const char* device, const flashdecpp::LinearRow* rows, int64_t count) {
  flashdecpp::linear_tables().install(device, {rows, rows + count});
}
