// The switch: which of the three implementations of a linear layer runs.
#include "linear.h"

namespace flashdecpp {
namespace {

// The choice of impl="auto": blas wherever the hand-written kernels cannot run, else by the inflection points.
LinearImpl choose(const Launcher& launcher, const LinearParams& p) {
  const bool half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  if (!half || !rows_are_aligned(p.weight, p.n, p.weight_stride, p.dtype)) return LinearImpl::kBlas;
  return choose_linear(default_inflection_points(launcher.properties()), p.m, p.k);
}

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias, std::string impl) {
  contract::Linear call = contract::linear("linear", x, weight, bias);
  const Launcher launcher("linear", call.x_view.device);
  LinearImpl chosen;
  if (impl == "auto") {
    chosen = choose(launcher, call.params);
  } else if (impl == "gemv") {
    chosen = LinearImpl::kGemv;
  } else if (impl == "flat_gemm") {
    chosen = LinearImpl::kFlatGemm;
  } else if (impl == "blas") {
    chosen = LinearImpl::kBlas;
  } else {
    fail("linear", "impl must be auto, gemv, flat_gemm or blas, got ", impl);
  }
  if (chosen == LinearImpl::kBlas) return blas_linear(x, weight, bias);
  require_vector_rows("linear", call);
  return chosen == LinearImpl::kGemv ? run_gemv(launcher, call) : run_flat_gemm(launcher, call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace flashdecpp
