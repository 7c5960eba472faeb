#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flashdecpp::cpu {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const struct {
    const Kernels& kernels;
    bool supported;
  } choices[] = {{kAvx512Bf16Kernels, bf16}, {kAvx512Kernels, avx512}, {kAvx2Kernels, avx2}, {kBaselineKernels, true}};
#elif defined(__aarch64__)
  const struct {
    const Kernels& kernels;
    bool supported;
  } choices[] = {{kNeonKernels, true}, {kBaselineKernels, true}};
#else
  const struct {
    const Kernels& kernels;
    bool supported;
  } choices[] = {{kBaselineKernels, true}};
#endif
  const char* forced = std::getenv("FLASHDECPP_CPU_ISA");
  for (const auto& choice : choices) {
    if (choice.supported && (!forced || !*forced || std::strcmp(forced, choice.kernels.name) == 0)) {
      return choice.kernels;
    }
  }
  std::string supported;
  for (const auto& choice : choices) {
    if (choice.supported) supported += std::string(supported.empty() ? "" : ", ") + choice.kernels.name;
  }
  throw std::runtime_error("flashdecpp: FLASHDECPP_CPU_ISA must be one that this CPU has (" + supported + "), got " +
                           forced);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace flashdecpp::cpu

// For `flashdecpp info`, which reads it through ctypes.
extern "C" __attribute__((visibility("default"))) const char* flashdecpp_cpu_isa() {
  try {
    return flashdecpp::cpu::kernels().name;
  } catch (const std::exception&) {
    return "unsupported FLASHDECPP_CPU_ISA";
  }
}
