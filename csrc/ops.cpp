// Every schema of the package. Each backend registers its implementations next to its kernels (csrc/cpu, csrc/cuda).
#include "torch_api.h"

STABLE_TORCH_LIBRARY(flashdecpp, m)
{
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor? block_table=None, *, "
      "float? scale=None, Tensor? phi=None, float softcap=0.0, int window=-1, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, int num_splits=0, "
      "Tensor(a!)? fallback_count=None) -> (Tensor out, Tensor lse)");
  m.def(
      "decode_attention.carry(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor? block_table=None, *, "
      "float? scale=None, Tensor(b!) carried_phi, float softcap=0.0, int window=-1, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, int num_splits=0, "
      "Tensor(a!)? fallback_count=None) -> (Tensor out, Tensor lse)");

  m.def("gemv(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("flat_gemm(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? norm_weight=None, float norm_eps=1e-6, "
      "str? gate=None, str? activation=None, str impl=\"auto\") -> Tensor");
  // Without keywords, as every argument of a schema costs the host 0.1 us per call.
  m.def("linear.plain(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear.residual(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor(a!) residual, Tensor? norm_weight=None, "
      "float norm_eps=1e-6, str impl=\"auto\") -> ()");
  // The first is implemented in Python by the second: torch leaks a str that a kernel of the stable ABI returns.
  m.def("linear_choice(Tensor x, Tensor weight) -> str");
  m.def("linear_choice_index(Tensor x, Tensor weight) -> int");
  m.def(
      "quantized_linear(Tensor x, Tensor weight, Tensor scales, Tensor? offsets=None, Tensor? bias=None, *, "
      "Tensor? norm_weight=None, float norm_eps=1e-6, str? gate=None, str? activation=None) -> Tensor");
  m.def(
      "quantized_linear.plain(Tensor x, Tensor weight, Tensor scales, Tensor? offsets=None, Tensor? bias=None) -> "
      "Tensor");
  m.def(
      "quantized_linear.residual(Tensor x, Tensor weight, Tensor scales, Tensor? offsets=None, Tensor? bias=None, *, "
      "Tensor(a!) residual, Tensor? norm_weight=None, float norm_eps=1e-6) -> ()");
  // Private to Python: tuning tables go to each op library (rows are a table's LinearRows, int64 [rows, 6] on the CPU),
  // and the CPU library names its instruction set, in ASCII, since it cannot return a str.
  m.def("_install_linear_table.cpu(Tensor rows) -> ()");
  m.def("_install_linear_table.gpu(str device, Tensor rows) -> ()");
  m.def("_cpu_isa() -> Tensor");

  // An argument that is updated in place makes an overload of its own: compilers cannot lower one that is optional.
  m.def("rms_norm(Tensor x, Tensor weight, *, float eps=1e-6) -> Tensor");
  m.def("rms_norm.residual(Tensor x, Tensor weight, Tensor(a!) residual, *, float eps=1e-6) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, *, float eps=1e-5) -> Tensor");
  m.def(
      "layer_norm.residual(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) residual, *, float eps=1e-5) -> Tensor");
  m.def(
      "rotary_append(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor seq_lens, "
      "Tensor? block_table=None, *, Tensor? cos_sin=None, bool interleaved=False, Tensor? k_scale=None, "
      "Tensor? v_scale=None) -> ()");
  m.def("gated_activation(Tensor gate_up, *, str activation=\"silu\") -> Tensor");
  m.def(
      "sample(Tensor logits, *, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, "
      "Tensor? min_p=None, Tensor? seed=None, Tensor? position=None) -> Tensor");
  m.def(
      "sample.seen(Tensor logits, *, Tensor(a!) seen, Tensor? repetition_penalty=None, Tensor? temperature=None, "
      "Tensor? top_k=None, Tensor? top_p=None, Tensor? min_p=None, Tensor? seed=None, Tensor? position=None) -> "
      "Tensor");
}
