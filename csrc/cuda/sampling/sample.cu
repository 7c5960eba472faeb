// sample on a GPU: check, guard, allocate, launch.
#include "boxing.h"
#include "checks/sample.h"
#include "cuda/launch.h"
#include "cuda/sampling/sample_kernel.cuh"

namespace flashdecpp {
namespace {

Tensor run_sample(const Tensor& logits, SampleParams p) {
  const Device device = View(logits).device;
  const Launcher launcher("sample", device);
  Tensor result = new_tensor({p.batch}, DType::kInt64, device);
  if (p.batch == 0) return result;
  FLASHDECPP_REQUIRE(p.batch <= INT32_MAX, "sample", "logits must have fewer than 2^31 rows, got ", p.batch);
  p.out = static_cast<int64_t*>(View(result).data);
  arch::with_float_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launcher.overlapping(sample_kernel<T>, static_cast<unsigned>(p.batch), kSampleThreads, 0, p);
  });
  return result;
}

Tensor sample(Tensor logits, OptionalTensor temperature, OptionalTensor top_k, OptionalTensor top_p,
              OptionalTensor min_p, OptionalTensor seed, OptionalTensor position) {
  return run_sample(
      logits, checks::sample(logits, temperature, top_k, top_p, min_p, seed, position, std::nullopt, std::nullopt));
}

Tensor sample_seen(Tensor logits, Tensor seen, OptionalTensor repetition_penalty, OptionalTensor temperature,
                   OptionalTensor top_k, OptionalTensor top_p, OptionalTensor min_p, OptionalTensor seed,
                   OptionalTensor position) {
  return run_sample(logits,
                    checks::sample(logits, temperature, top_k, top_p, min_p, seed, position, repetition_penalty, seen));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("sample", boxed<&sample>);
  m.impl("sample.seen", boxed<&sample_seen>);
}

}  // namespace flashdecpp
