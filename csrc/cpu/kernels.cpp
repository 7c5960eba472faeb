#include "cpu/kernels.h"

#if defined(FLASHDECPP_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flashdecpp::cpu {
namespace {

#if defined(FLASHDECPP_HAS_AMX)
// Whether this process may use AMX. A processor, or a virtual machine, that advertises it is not enough: tiles fault
// unless the operating system has agreed to keep them when it switches threads, and it wants to be asked.
bool tiles_are_granted() {
  unsigned a, b, c, d;
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bfloat16) || !(d & tiles)) return false;
  constexpr long get_permission = 0x1022, request_permission = 0x1023, tile_data = 18;  // of <asm/prctl.h>
  uint64_t granted = 0;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 &&
         syscall(SYS_arch_prctl, get_permission, &granted) == 0 && (granted >> tile_data & 1);
}
#endif

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
  } choices[] = {
#if defined(FLASHDECPP_HAS_AMX)
      {kAvx512AmxKernels, bf16 && tiles_are_granted()},
#endif
      {kAvx512Bf16Kernels, bf16},
      {kAvx512Kernels, avx512},
      {kAvx2Kernels, avx2},
      {kBaselineKernels, true}};
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
