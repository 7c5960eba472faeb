// gated_activation, and the activation of an unfused linear, on a GPU: check, guard, allocate, launch.
#include "boxing.h"
#include "checks/activation.h"
#include "cuda/elementwise/gated_activation_kernel.cuh"
#include "cuda/elementwise/vectors.h"
#include "cuda/launch.h"
#include "linear_unfused.h"

namespace flashdecpp {
namespace {

template <class T>
void launch_typed(const Launcher& launcher, const char* op, const char* arg, const ActivationParams& p) {
  const auto start = [&](auto* kernel, int vector) {
    const int64_t ctas_per_row = (p.cols + kActivationThreads * vector - 1) / (kActivationThreads * vector);
    check_grid_y(op, arg, ctas_per_row);
    launcher.overlapping(kernel, dim3(static_cast<unsigned>(p.rows), static_cast<unsigned>(ctas_per_row)),
                         kActivationThreads, 0, p);
  };
  constexpr int vector = kVector<T>;
  vectors_fit(p.x, sizeof(T), vector, {p.cols}) ? start(activation_kernel<T, vector>, vector)
                                                : start(activation_kernel<T, 1>, 1);
}

void launch(const Launcher& launcher, const char* op, const char* arg, const ActivationParams& p) {
  if (p.rows == 0 || p.cols == 0) return;
  FLASHDECPP_REQUIRE(p.rows <= INT32_MAX, op, arg, " must have fewer than 2^31 rows, got ", p.rows);
  arch::with_float_type(p.dtype,
                        [&](auto* type) { launch_typed<std::remove_pointer_t<decltype(type)>>(launcher, op, arg, p); });
}

Tensor gated_activation(Tensor gate_up, std::string activation) {
  ActivationParams p = checks::gated_activation(gate_up, activation);
  const View view(gate_up);
  const Launcher launcher("gated_activation", view.device);
  Tensor result = checks::new_like_rows(view, p.cols);
  p.out = View(result).data;
  launch(launcher, "gated_activation", "gate_up", p);
  return result;
}

}  // namespace

void run_activation(const char* op, Device device, const ActivationParams& p) {
  launch(Launcher(op, device), op, "x", p);
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("gated_activation", boxed<&gated_activation>);
}

}  // namespace flashdecpp
