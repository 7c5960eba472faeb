// What _install_linear_table refuses, and the rows that it installs.
#pragma once

#include <vector>

#include "checks/checker.h"
#include "heuristics/linear_table.h"

namespace flashdecpp::checks {

inline std::vector<LinearRow> linear_rows(const Tensor& tensor) {
  static_assert(sizeof(LinearRow) == 6 * sizeof(int64_t));
  Checker check("_install_linear_table", "rows");
  const View t = check.take("rows", tensor);
  check.dtype("rows", t, DType::kInt64);
  check.rank("rows", t, 2, "[rows, 6]");
  check.shape("rows", t, {t.sizes[0], 6});
  check.contiguous("rows", t);
  const auto* rows = static_cast<const LinearRow*>(t.data);
  return {rows, rows + t.sizes[0]};
}

}  // namespace flashdecpp::checks
