// What the test programs of the simulated GPU share: random tensors, cases that are counted, the last line.
#pragma once

#include <cstdio>
#include <random>
#include <string>

#include "cuda/numeric.cuh"

class Checks {
 public:
  explicit Checks(unsigned seed) : random(seed) {}

  void operator()(bool good, const std::string& what) {
    ++cases_;
    if (good) return;
    ++failures_;
    std::printf("FAILED %s\n", what.c_str());
  }

  template <class T>
  void fill(const simulated::Tensor<T>& tensor) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < tensor.size(); ++i) tensor[i] = flashdecpp::arch::from_float<T>(normal(random));
  }

  // The exit status.
  int report() {
    (*this)(simulated::margins_are_untouched(), "nothing is written outside of a tensor");
    std::printf("%d cases, %d failures\n", cases_, failures_);
    return failures_ > 0;
  }

  std::mt19937 random;

 private:
  int cases_ = 0, failures_ = 0;
};
