// The module _C, the host side for Python: what was built, the limits of the ops, and what the heuristics choose.
// Includes no torch, so it imports anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "build_info.h"
#include "heuristics/attention.h"
#include "heuristics/cpu.h"
#include "heuristics/linear.h"
#include "heuristics/linear_table.h"
#include "op_limits.h"

namespace py = pybind11;
using namespace flashdecpp;

namespace {

void define_devices(py::module_& m) {
  py::class_<DeviceProperties>(m, "DeviceProperties", "What the heuristics know about a GPU.")
      .def_readonly("name", &DeviceProperties::name)
      .def_readonly("arch", &DeviceProperties::arch)
      .def_readonly("num_sms", &DeviceProperties::num_sms)
      .def_readonly("warp_size", &DeviceProperties::warp_size)
      .def_readonly("shared_bytes_per_cta", &DeviceProperties::shared_bytes_per_cta)
      .def_readonly("shared_bytes_per_sm", &DeviceProperties::shared_bytes_per_sm)
      .def_readonly("has_tma", &DeviceProperties::has_tma)
      .def_readonly("has_clusters", &DeviceProperties::has_clusters)
      .def_readonly("has_wgmma", &DeviceProperties::has_wgmma)
      .def_readonly("has_pdl", &DeviceProperties::has_pdl)
      .def("__str__", &DeviceProperties::str);
  m.def(
      "nvidia_device",
      [](std::string name, int32_t arch, int32_t num_sms, int32_t shared_bytes_per_sm, bool generic, bool sm_90,
         bool sm_90a) {
        constexpr int32_t reserved = 1024;  // by the hardware, per CTA
        return nvidia_device(std::move(name), arch, num_sms, shared_bytes_per_sm - reserved, shared_bytes_per_sm,
                             generic, {sm_90, sm_90a});
      },
      py::arg("name"), py::arg("arch"), py::arg("num_sms"), py::arg("shared_bytes_per_sm"), py::kw_only(),
      py::arg("generic") = false, py::arg("sm_90") = true, py::arg("sm_90a") = true,
      "An NVIDIA GPU of compute capability arch / 10, and what the library was compiled for.");
  m.def("amd_device", &amd_device, py::arg("name"), py::arg("target"), py::arg("num_cus"), py::arg("warp_size"),
        "An AMD GPU; target is 0x90a for gfx90a.");
}

void define_attention(py::module_& m) {
  py::class_<AttentionProblem>(m, "AttentionProblem", "The shapes of a call to decode_attention.")
      .def(py::init([](int64_t batch, int64_t q_len, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                       int64_t capacity, int64_t block_size, int64_t num_splits, int64_t kv_bytes, bool suits_tma) {
             return AttentionProblem{batch,    q_len,      q_heads,    kv_heads, head_dim,
                                     capacity, block_size, num_splits, kv_bytes, suits_tma};
           }),
           py::kw_only(), py::arg("batch"), py::arg("q_len"), py::arg("q_heads"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("capacity"), py::arg("block_size") = 0, py::arg("num_splits") = 0,
           py::arg("kv_bytes") = 2, py::arg("suits_tma") = true)
      .def("__str__", &AttentionProblem::str);
  py::class_<AttentionGridProblem>(m, "AttentionGridProblem", "What is to be split; all counts are of clusters.")
      .def(py::init([](int64_t resident, int64_t batch, int64_t work_tiles_per_sequence, int64_t num_splits,
                       int64_t kv_tiles, int64_t min_kv_tiles, int64_t min_ctas, int64_t max_slots) {
             return AttentionGridProblem{
                 resident, batch, work_tiles_per_sequence, num_splits, kv_tiles, min_kv_tiles, min_ctas, max_slots};
           }),
           py::kw_only(), py::arg("resident"), py::arg("batch"), py::arg("work_tiles_per_sequence"),
           py::arg("num_splits"), py::arg("kv_tiles"), py::arg("min_kv_tiles"), py::arg("min_ctas"),
           py::arg("max_slots"));
  py::class_<AttentionGrid>(m, "AttentionGrid", "How decode_attention splits its work on a GPU.")
      .def_readonly("uniform_splits", &AttentionGrid::uniform_splits)
      .def_readonly("min_uniform_tiles", &AttentionGrid::min_uniform_tiles)
      .def_readonly("streams", &AttentionGrid::streams)
      .def_readonly("max_streams", &AttentionGrid::max_streams)
      .def_readonly("blocks", &AttentionGrid::blocks)
      .def_readonly("slots", &AttentionGrid::slots)
      .def("__str__", &AttentionGrid::str);
  py::class_<AttentionConfig>(m, "AttentionConfig", "Everything that is chosen for a call to decode_attention.")
      .def_property_readonly("path", [](const AttentionConfig& config) { return name(config.path); })
      .def_readonly("dims", &AttentionConfig::dims)
      .def_readonly("latency", &AttentionConfig::latency)
      .def_property_readonly("warps", [](const AttentionConfig& config) { return config.shape.warps; })
      .def_property_readonly("stages", [](const AttentionConfig& config) { return config.shape.stages; })
      .def_property_readonly("ctas_per_sm", [](const AttentionConfig& config) { return config.shape.ctas_per_sm; })
      .def_readonly("work_tiles", &AttentionConfig::work_tiles)
      .def_readonly("cluster", &AttentionConfig::cluster)
      .def_readonly("min_tiles_per_cluster", &AttentionConfig::min_tiles_per_cluster)
      .def_readonly("grid", &AttentionConfig::grid)
      .def_property_readonly("ctas", &AttentionConfig::ctas)
      .def("__str__", &AttentionConfig::str);
  m.def("choose_attention", &choose_attention, py::arg("problem"), py::arg("device"));
  m.def("choose_attention_cluster", &choose_attention_cluster, py::arg("resident"), py::arg("work_tiles"),
        py::arg("num_splits"), py::arg("max_cluster"), py::arg("long_cache"),
        "CTAs per cluster, where there are clusters.");
  m.def("choose_attention_grid", &choose_attention_grid, py::arg("problem"));
}

void define_linear(py::module_& m) {
  py::class_<InflectionPoints>(m, "InflectionPoints", "gemv below m1, flat_gemm from m1 to m2, blas from m2 on.")
      .def(py::init<int64_t, int64_t>(), py::arg("m1"), py::arg("m2"))
      .def_readonly("m1", &InflectionPoints::m1)
      .def_readonly("m2", &InflectionPoints::m2);
  m.def("default_inflection_points", &default_inflection_points, py::arg("device"));

  py::class_<LinearProblem>(m, "LinearProblem", "x [m, k] times weight [n, k]; `vectors`: 16-byte loads can be used.")
      .def(py::init([](int64_t rows, int64_t n, int64_t k, bool vectors, bool residual) {
             return LinearProblem{rows, n, k, vectors, residual};
           }),
           py::kw_only(), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("vectors") = true,
           py::arg("residual") = false)
      .def("__str__", &LinearProblem::str);
  py::class_<LinearConfig>(m, "LinearConfig", "Which implementation linear(impl='auto') runs on a GPU.")
      .def_property_readonly("impl", [](const LinearConfig& config) { return name(config.impl); })
      .def("__str__", &LinearConfig::str);
  py::class_<GemvConfig>(m, "GemvConfig", "Which kernel gemv runs on a GPU.")
      .def_property_readonly("kernel", [](const GemvConfig& config) { return name(config.kernel); })
      .def_readonly("max_rows", &GemvConfig::max_rows)
      .def("__str__", &GemvConfig::str);
  py::class_<FlatGemmConfig>(m, "FlatGemmConfig", "Which kernel flat_gemm runs on a GPU, and its splits.")
      .def_readonly("wgmma", &FlatGemmConfig::wgmma)
      .def_readonly("cluster", &FlatGemmConfig::cluster)
      .def_readonly("late_stages", &FlatGemmConfig::late_stages)
      .def_readonly("tile", &FlatGemmConfig::tile)
      .def_readonly("k_splits", &FlatGemmConfig::k_splits)
      .def_readonly("k_tiles_per_split", &FlatGemmConfig::k_tiles_per_split)
      .def("__str__", &FlatGemmConfig::str);
  py::class_<QuantizedLinearConfig>(m, "QuantizedLinearConfig", "How quantized_linear runs on a GPU.")
      .def_readonly("streams", &QuantizedLinearConfig::streams)
      .def_readonly("tiles", &QuantizedLinearConfig::tiles)
      .def("__str__", &QuantizedLinearConfig::str);

  m.def("choose_linear", &choose_linear, py::arg("problem"), py::arg("device"), py::arg("measured") = py::none());
  m.def("choose_gemv", &choose_gemv, py::arg("device"), py::arg("m"), py::arg("fused") = false);
  m.def("choose_gemv_warps", &choose_gemv_warps, py::arg("device"), py::arg("m"), py::arg("row_groups"),
        py::arg("loads_per_lane"), "Warps that share a row of the weight in the generic GEMV.");
  m.def("choose_flat_gemm", &choose_flat_gemm, py::arg("problem"), py::arg("device"), py::arg("suits_tma") = true);
  m.def("choose_flat_cluster", &choose_flat_cluster, py::arg("device"), py::arg("n"), py::arg("k"),
        "CTAs of a cluster that share a tile of flat_gemm along K with wgmma.");
  m.def("choose_quantized_linear", &choose_quantized_linear, py::arg("problem"), py::arg("device"),
        py::arg("fused") = false);
}

void define_tables(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  py::class_<LinearRow>(m, "LinearRow", "The points of one shape; dtype is the number of a DType.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(), py::arg("dtype"), py::arg("n"),
           py::arg("k"), py::arg("m1"), py::arg("m2"), py::arg("max_m"));
  py::class_<LinearTables>(m, "LinearTables", "Measured inflection points as linear(impl='auto') looks them up.")
      .def(py::init<>())
      .def("install", &LinearTables::install, py::arg("device"), py::arg("rows"))
      .def("find", &LinearTables::find, py::arg("device"), py::arg("dtype"), py::arg("n"), py::arg("k"), py::arg("m"));
}

// The choices on a CPU.
void define_cpu(py::module_& m) {
  m.def(
      "choose_cpu_linear",
      [](DType dtype, int64_t rows, int64_t k, bool bfloat16_dot, std::optional<InflectionPoints> measured) {
        return name(cpu::choose_linear(dtype, rows, k, bfloat16_dot, measured).impl);
      },
      py::arg("dtype"), py::arg("m"), py::arg("k"), py::arg("bfloat16_dot"), py::arg("measured") = py::none());
  m.def(
      "choose_cpu_quantized_linear",
      [](DType dtype, int64_t rows, int64_t k, bool bfloat16_dot) {
        return cpu::choose_quantized_linear(dtype, rows, k, bfloat16_dot).str();
      },
      py::arg("dtype"), py::arg("m"), py::arg("k"), py::arg("bfloat16_dot"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, limits and host-side heuristics of flashdecpp.";
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"cxx", build_info::kCxx},
            {"cpu_isas", build_info::kCpuIsas},
            {"cuda_compiler", build_info::kCudaCompiler},
            {"cuda_architectures", build_info::kCudaArchitectures},
            {"hip_architectures", build_info::kHipArchitectures},
            {"reasons", build_info::kReasons},
        };
      },
      "Compilers, CPU instruction sets, GPU architectures and the reason for each, as fixed when the package was "
      "built.");
  m.attr("MAX_NEW_TOKENS") = kMaxNewTokens;
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.attr("MAX_QUERY_GROUP") = kMaxQueryGroup;
  m.attr("MAX_STREAMED_ROWS") = kMaxStreamedRows;
  define_devices(m);
  define_attention(m);
  define_tables(m);
  define_linear(m);
  define_cpu(m);
}
