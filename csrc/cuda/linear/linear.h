// The two hand-written linear kernels, for their own ops and for the switch in linear.cu.
#pragma once

#include "checks/linear.h"
#include "cuda/launch.h"
#include "cuda/numeric.cuh"
#include "heuristics/linear.h"

namespace flashdecpp {

// True where every row starts on a 16-byte boundary, as the kernels' vector loads need.
inline bool rows_are_aligned(const void* data, int64_t rows, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride * checks::element_size(dtype) % 16 == 0);
}

// Rows of x that vector loads cannot start on are copied: x is small. A weight is not.
template <class Params>
void align_rows(checks::LinearCall<Params>& call) {
  const Params& p = call.params;
  if (rows_are_aligned(p.x, p.m, p.x_stride, p.dtype)) return;
  call.take(packed_copy(call.x));
}

// What gemv and flat_gemm ask of a call beyond the contract that the CPU shares.
inline void require_vector_rows(const char* op, checks::Linear& call) {
  const LinearParams& p = call.params;
  FLASHDECPP_REQUIRE(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16, op,
                     "x must be float16 or bfloat16 on this device, got ", call.x_view.dtype_name());
  FLASHDECPP_REQUIRE(p.k % 8 == 0, op, "x must have a K that is a multiple of 8 on this device, got ", p.k);
  FLASHDECPP_REQUIRE(rows_are_aligned(p.weight, p.weight_rows(), p.weight_stride, p.dtype), op,
                     "weight must have rows that start on multiples of 16 bytes, got address remainder ",
                     reinterpret_cast<uintptr_t>(p.weight) % 16, " and a row stride of ", p.weight_stride, " elements");
  align_rows(call);
}

inline LinearProblem linear_problem(const LinearParams& p, bool vectors = true) {
  return {.m = p.m, .n = p.weight_rows(), .k = p.k, .vectors = vectors, .residual = p.fusion.add};
}

// Launches an implementation for as many rows of x at a time as it takes.
template <class Kernels, class Params, class... Config>
void launch_parts(const Launcher& launcher, const Params& p, const Config&... config) {
  arch::with_half_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t first = 0; first < p.m; first += Kernels::kMaxRows) {
      Params part = p;
      part.m = std::min<int64_t>(Kernels::kMaxRows, p.m - first);
      part.x = static_cast<const T*>(p.x) + first * p.x_stride;
      part.out = static_cast<T*>(p.out) + first * p.n;
      Kernels::template launch<T>(launcher, part, config...);
    }
  });
}

// What each vendor does on its matrix units in its own way: cuda/nvidia/gemv_mma.cu, quantized_gemv.cu and
// flat_gemm_wgmma.cu, or hip/stream_gemv.hip. The heuristics say which GPUs and calls they serve.
void launch_matrix_gemv(const Launcher& launcher, const LinearParams& p);
void launch_quantized_gemv(const Launcher& launcher, const QuantizedLinearParams& p,
                           const QuantizedLinearConfig& config);

// NVIDIA's alone.
void launch_flat_gemm_wgmma(const Launcher& launcher, const LinearParams& p, const FlatGemmConfig& config);
bool wgmma_can_load(const LinearParams& p);  // tensor maps can describe x and the weight

// Memory for the call's result.
template <class Params>
Tensor allocate(checks::LinearCall<Params>& call) {
  Tensor out = checks::new_like_rows(call.x_view, call.params.n);
  call.params.out = View(out).data;
  return out;
}

// Whether the GEMV takes x through the call's norm: where that pays on Hopper, and where its weight can be loaded in
// vectors, there as x's dtype.
inline bool norm_fits(const Launcher& launcher, const LinearParams& p) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.fusion.norm_weight) % 16 == 0;
  if (!launcher.properties().prefers_mma_gemv) return aligned;
  return aligned && p.fusion.norm_dtype == p.dtype && gemv_takes_norm(p.m, p.k);
}
inline bool residual_fits(const LinearParams& p) {
  return p.n % 8 != 0 || reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

// out += rows, for a product that came from elsewhere.
void add_rows(const Launcher& launcher, const LinearParams& p, const Tensor& rows);

// Write p.out; the call passed require_vector_rows. Only the GEMV has a norm.
void run_gemv(const Launcher& launcher, const LinearParams& p);
void run_flat_gemm(const Launcher& launcher, const LinearParams& p, Device device);

}  // namespace flashdecpp
