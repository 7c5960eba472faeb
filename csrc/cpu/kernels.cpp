// Chooses the kernel table: the best instruction set of this CPU, unless FLASHDECPP_CPU_ISA names another.
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(FLASHDECPP_HAS_AVX512_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flashdecpp::cpu {
namespace {

#if defined(FLASHDECPP_HAS_AVX512_AMX)
// Whether this process may use AMX. CPUID alone does not say: tiles fault unless the process has asked the kernel for
// permission, which the kernel grants if it saves tile state across context switches.
bool may_use_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bfloat16) || !(d & tiles)) return false;
  constexpr long get_permission = 0x1022, request_permission = 0x1023, tile_data = 18;  // from <asm/prctl.h>
  uint64_t granted = 0;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 &&
         syscall(SYS_arch_prctl, get_permission, &granted) == 0 && (granted >> tile_data & 1);
}
#endif

#if defined(__x86_64__)
// Not by __builtin_cpu_supports, for which clang 14 has no such name.
bool supports_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                     __builtin_cpu_supports("bmi2") && supports_f16c();
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                       __builtin_cpu_supports("avx512dq");
  [[maybe_unused]] const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const struct {
    const Kernels& kernels;
    bool supported;
  } choices[] = {
#if defined(FLASHDECPP_HAS_AVX512_AMX)
      {kAvx512AmxKernels, bf16 && may_use_tiles()},
#endif
#if defined(FLASHDECPP_HAS_AVX512_BF16)
      {kAvx512Bf16Kernels, bf16},
#endif
#if defined(FLASHDECPP_HAS_AVX512)
      {kAvx512Kernels, avx512},
#endif
#if defined(FLASHDECPP_HAS_AVX2)
      {kAvx2Kernels, avx2},
#endif
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
