// gated_activation on a GPU: check, guard, allocate, launch.
#include "boxing.h"
#include "checks/activation.h"
#include "cuda/elementwise/gated_activation_kernel.cuh"
#include "cuda/elementwise/vectors.h"
#include "cuda/launch.h"
#include "linear_unfused.h"

namespace flashdecpp {
namespace {

template <class T>
void launch_gated(const Launcher& launcher, const GatedParams& p) {
  const auto start = [&](auto* kernel, int vector) {
    const int64_t parts = (p.cols + kGatedThreads * vector - 1) / (kGatedThreads * vector);
    check_grid_y("gated_activation", "gate_up", parts);
    launcher.overlapping(kernel, dim3(static_cast<unsigned>(p.rows), static_cast<unsigned>(parts)), kGatedThreads, 0,
                         p);
  };
  constexpr int vector = kVector<T>;
  vectors_fit(p.gate_up, sizeof(T), vector, {p.cols}) ? start(gated_activation_kernel<T, vector>, vector)
                                                      : start(gated_activation_kernel<T, 1>, 1);
}

}  // namespace

Tensor gated_activation(Tensor gate_up, std::string activation) {
  GatedParams p = checks::gated_activation(gate_up, activation);
  const View view(gate_up);
  const Launcher launcher("gated_activation", view.device);
  Tensor result = checks::new_like_rows(view, p.cols);
  if (p.rows == 0 || p.cols == 0) return result;
  FLASHDECPP_REQUIRE(p.rows <= INT32_MAX, "gated_activation", "gate_up must have fewer than 2^31 rows, got ", p.rows);
  p.out = View(result).data;
  arch::with_float_type(p.dtype, [&](auto* type) { launch_gated<std::remove_pointer_t<decltype(type)>>(launcher, p); });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("gated_activation", boxed<&gated_activation>);
}

}  // namespace flashdecpp
