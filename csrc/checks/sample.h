// Checks sample's arguments and fills in its SampleParams.
#pragma once

#include "checks/checker.h"

namespace flashdecpp::checks {

inline SampleParams sample(const Tensor& logits, const OptionalTensor& temperature, const OptionalTensor& top_k,
                           const OptionalTensor& top_p, const OptionalTensor& min_p, const OptionalTensor& seed,
                           const OptionalTensor& position, const OptionalTensor& repetition_penalty,
                           const OptionalTensor& seen) {
  Checker check("sample", "logits");
  const View a = check.take("logits", logits);
  check.rank("logits", a, 2, "[batch, vocab]");
  check.float_dtype("logits", a);
  check.last_contiguous("logits", a);
  const int64_t batch = a.sizes[0], vocab = a.sizes[1];
  FLASHDECPP_REQUIRE(vocab > 0 && vocab <= INT32_MAX, check.op, "logits must have a vocabulary of 1 to 2^31, got ",
                     vocab);
  SampleParams p{};
  p.logits = a.data;
  p.logits_stride = a.strides[0];
  p.batch = batch;
  p.vocab = vocab;
  p.dtype = a.dtype;
  p.temperature = check.parameter<float>("temperature", temperature, DType::kFloat32, {batch});
  p.top_k = check.parameter<int32_t>("top_k", top_k, DType::kInt32, {batch});
  p.top_p = check.parameter<float>("top_p", top_p, DType::kFloat32, {batch});
  p.min_p = check.parameter<float>("min_p", min_p, DType::kFloat32, {batch});
  p.seed = check.parameter<int64_t>("seed", seed, DType::kInt64, {batch});
  p.position = check.parameter<int64_t>("position", position, DType::kInt64, {batch});
  p.repetition_penalty = check.parameter<float>("repetition_penalty", repetition_penalty, DType::kFloat32, {batch});
  p.seen = check.written_parameter<bool>("seen", seen, DType::kBool, {batch, vocab});
  check.written_apart();
  return p;
}

}  // namespace flashdecpp::checks
