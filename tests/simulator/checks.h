// Shared by the simulator's test programs: random tensors, a count of cases and failures, and the last line of output.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "cuda/numeric.cuh"

class Checks {
 public:
  explicit Checks(unsigned seed) : random(seed) {}

  void operator()(bool passed, const std::string& what) {
    ++cases_;
    if (passed) return;
    ++failures_;
    std::printf("FAILED %s\n", what.c_str());
#if defined(FLASHDECPP_SIMULATED_FEW)
    std::exit(1);  // one failure tells that a fault was noticed
#endif
  }

  template <class T>
  void fill(const simulated::Tensor<T>& tensor) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < tensor.size(); ++i) tensor[i] = flashdecpp::arch::from_float<T>(normal(random));
  }

  // Prints the last line and returns the exit status.
  int report() {
    (*this)(simulated::margins_are_untouched(), "nothing is written outside of a tensor");
    std::printf("%d cases, %d failures\n", cases_, failures_);
    return failures_ > 0;
  }

  std::mt19937 random;

 private:
  int cases_ = 0, failures_ = 0;
};
