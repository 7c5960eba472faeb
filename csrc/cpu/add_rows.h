// out += rows: the residual of a linear whose product the BLAS computed.
#pragma once

#include "cpu/kernels.h"
#include "torch_api.h"

namespace flashdecpp::cpu {

inline void add_rows(const LinearParams& p, const Tensor& rows) {
  constexpr int64_t grain = 32 * 1024;  // elements per thread below which waking it does not pay
  const void* from = View(rows).data;
  torch::stable::parallel_for(0, p.m * p.n, grain,
                              [&](int64_t begin, int64_t end) { kernels().add(p.out, from, p.dtype, begin, end); });
}

}  // namespace flashdecpp::cpu
