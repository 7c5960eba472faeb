// The instruction set of the CPU kernels, for Python.
#include <cstring>

#include "boxing.h"
#include "cpu/kernels.h"

namespace flashdecpp::cpu {
namespace {

Tensor isa() {
  const char* name = "unsupported FLASHDECPP_CPU_ISA";
  try {
    name = kernels().name;
  } catch (const std::runtime_error&) {  // every op says so; asking must not fail
  }
  const auto length = static_cast<int64_t>(std::strlen(name));
  const Tensor text = new_tensor({length}, DType::kUInt8, Device{aoti_torch_device_type_cpu(), 0});
  std::memcpy(View(text).data, name, static_cast<size_t>(length));
  return text;
}

}  // namespace
}  // namespace flashdecpp::cpu

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CompositeExplicitAutograd, m)
{
  m.impl("_cpu_isa", flashdecpp::boxed<&flashdecpp::cpu::isa>);
}
