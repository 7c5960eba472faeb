// FLASHDECPP_LOG=choices: the first choice for every distinct problem, on stderr. No torch.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace flashdecpp {

class ChoiceLog {
 public:
  // Read once per process.
  static bool enabled() {
    static const bool on = [] {
      const char* asked = std::getenv("FLASHDECPP_LOG");
      return asked && std::strcmp(asked, "choices") == 0;
    }();
    return on;
  }

  static void print(const std::string& problem, const std::string& config) {
    static ChoiceLog& log = *new ChoiceLog;  // never destroyed: threads may outlive the end of main
    const std::lock_guard lock(log.mutex_);
    if (log.seen_.insert(problem).second) {
      std::fprintf(stderr, "flashdecpp: %s -> %s\n", problem.c_str(), config.c_str());
    }
  }

 private:
  std::mutex mutex_;
  std::set<std::string> seen_;
};

// Such as "flashdecpp: gemv float16 [1 x 4096 by [4096, 4096]] -> tensor cores, up to 16 rows per launch".
template <class Problem, class Config>
void log_choice(const char* op, const char* dtype, const Problem& problem, const Config& config) {
  if (!ChoiceLog::enabled()) return;
  ChoiceLog::print(std::string(op) + " " + dtype + " [" + problem.str() + "]", config.str());
}

}  // namespace flashdecpp
