// The measured inflection points of linear by device, dtype and shape, which impl="auto" consults before the default
// rule. No torch, no CUDA. Each op library has its own table; Python fills them when the package is imported
// (flashdecpp/tuning), a C++ program by flashdecpp_install_linear_table.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "heuristics/linear.h"
#include "params.h"

namespace flashdecpp {

struct LinearRow {
  int64_t dtype, n, k;  // dtype: a DType
  int64_t m1, m2;
  int64_t max_m;  // the most rows of x that were measured; the points hold up to there

  auto key() const { return std::tie(dtype, n, k); }
};

// Calls only read an immutable snapshot through one atomic pointer.
class LinearTables {
 public:
  // Replaces the table of a device.
  void install(std::string device, std::vector<LinearRow> rows) {
    std::sort(rows.begin(), rows.end(), [](const LinearRow& a, const LinearRow& b) { return a.key() < b.key(); });
    const std::lock_guard lock(mutex_);
    auto next = std::make_unique<Snapshot>(*current_.load(std::memory_order_relaxed));
    std::erase_if(*next, [&](const Table& table) { return table.device == device; });
    next->push_back({std::move(device), std::move(rows)});
    current_.store(next.get(), std::memory_order_release);
    snapshots_.push_back(std::move(next));  // the old ones stay: another thread may be reading them
  }

  // The points for m rows of x, if they were measured.
  std::optional<InflectionPoints> find(std::string_view device, DType dtype, int64_t n, int64_t k, int64_t m) const {
    const int64_t code = static_cast<int64_t>(dtype);
    const auto key = std::tie(code, n, k);
    for (const Table& table : *current_.load(std::memory_order_acquire)) {
      if (table.device != device) continue;
      const auto row = std::lower_bound(table.rows.begin(), table.rows.end(), key,
                                        [](const LinearRow& row, const auto& key) { return row.key() < key; });
      if (row == table.rows.end() || row->key() != key || m > row->max_m) return std::nullopt;
      return InflectionPoints{row->m1, row->m2};
    }
    return std::nullopt;
  }

 private:
  struct Table {
    std::string device;
    std::vector<LinearRow> rows;  // by key
  };
  using Snapshot = std::vector<Table>;

  std::mutex mutex_;  // of writers
  std::vector<std::unique_ptr<const Snapshot>> snapshots_;
  const Snapshot none_{};
  std::atomic<const Snapshot*> current_ = &none_;
};

// This library's. Never destroyed, since threads may outlive the end of main.
inline LinearTables& linear_tables() {
  static LinearTables& tables = *new LinearTables;
  return tables;
}

}  // namespace flashdecpp

// Exported by every op library, for C++ programs without Python: replaces what impl="auto" knows about a device, which
// is "cpu" in the CPU library, else the GPU's name as the driver has it, or its gfx target.
extern "C" __attribute__((visibility("default"))) void flashdecpp_install_linear_table(
    const char* device, const flashdecpp::LinearRow* rows, int64_t count);
