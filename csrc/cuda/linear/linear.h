// The hand-written linear kernels, as their own ops and linear.cu's dispatch call them.
#pragma once

#include "checks/linear.h"
#include "cuda/launch.h"
#include "cuda/numeric.cuh"

namespace flashdecpp {

// Whether every row starts on a 16-byte boundary, as the kernels' vector loads need.
inline bool rows_are_aligned(const void* data, int64_t rows, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride * checks::element_size(dtype) % 16 == 0);
}

// Copies x if its rows do not start on 16-byte boundaries. x is small; a weight is never copied.
template <class Params>
void align_rows(checks::LinearCall<Params>& call) {
  const Params& p = call.params;
  if (!rows_are_aligned(p.x, p.m, p.x_stride, p.dtype)) call.replace_x(packed_copy(call.x));
}

// What gemv and flat_gemm require of a call beyond the contract that the CPU shares, x's alignment aside (align_rows).
inline void require_vector_rows(const char* op, const checks::Linear& call) {
  const LinearParams& p = call.params;
  FLASHDECPP_REQUIRE(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16, op,
                     "x must be float16 or bfloat16 on this device, got ", call.x_view.dtype_name());
  FLASHDECPP_REQUIRE(p.k % 8 == 0, op, "x must have a K that is a multiple of 8 on this device, got ", p.k);
  FLASHDECPP_REQUIRE(rows_are_aligned(p.weight, p.weight_rows(), p.weight_stride, p.dtype), op,
                     "weight must have rows that start on multiples of 16 bytes, got address remainder ",
                     reinterpret_cast<uintptr_t>(p.weight) % 16, " and a row stride of ", p.weight_stride, " elements");
}

// Launches a kernel for at most Kernels::kMaxRows rows of x at a time.
template <class Kernels, class Params>
void launch_row_chunks(const Launcher& launcher, const Params& p) {
  arch::with_half_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t first = 0; first < p.m; first += Kernels::kMaxRows) {
      Params chunk = p;
      chunk.m = std::min<int64_t>(Kernels::kMaxRows, p.m - first);
      chunk.x = static_cast<const T*>(p.x) + first * p.x_stride;
      chunk.out = static_cast<T*>(p.out) + first * p.n;
      Kernels::template launch<T>(launcher, chunk);
    }
  });
}

// Each vendor's kernels on its matrix units: gemv_mma.cu and quantized_gemv.cu on NVIDIA, csrc/hip/stream_gemv.hip on
// AMD, which takes no call with a fusion. They return false if they do not serve the call; GenericGemv then does, or
// the BLAS with a dequantized weight.
bool launch_matrix_gemv(const Launcher& launcher, const LinearParams& p);
bool launch_quantized_gemv(const Launcher& launcher, const QuantizedLinearParams& p);

// flat_gemm_wgmma.cu, compiled where arch::kHasHopperKernels; false if it does not serve the call.
bool launch_flat_gemm_wgmma(const Launcher& launcher, const LinearParams& p);

// Allocates the result of a call.
template <class Params>
Tensor allocate(checks::LinearCall<Params>& call) {
  Tensor out = checks::new_like_rows(call.x_view, call.params.n);
  call.params.out = View(out).data;
  return out;
}

// Whether vector accesses fit the residual, whose rows the epilogues store in vectors if N is a multiple of 8.
inline bool residual_fits(const LinearParams& p) {
  return p.n % 8 != 0 || reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

// out += rows: the residual of a product that another kernel computed.
void add_rows(const Launcher& launcher, const LinearParams& p, const Tensor& rows);

// Write p.out. The call passed require_vector_rows and align_rows.
void run_gemv(const Launcher& launcher, const LinearParams& p);
void run_flat_gemm(const Launcher& launcher, const LinearParams& p, Device device);

}  // namespace flashdecpp
