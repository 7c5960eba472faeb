// The pure host side for Python: what was built and what the heuristics choose. Includes no torch, so it imports
// anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "build_info.h"
#include "heuristics/attention.h"
#include "heuristics/linear.h"
#include "heuristics/linear_table.h"

namespace py = pybind11;
using namespace flashdecpp;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and host-side heuristics of flashdecpp.";

  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"cxx", build_info::kCxx},
            {"cuda_compiler", build_info::kCudaCompiler},
            {"cuda_architectures", build_info::kCudaArchitectures},
            {"reasons", build_info::kReasons},
        };
      },
      "Compilers, GPU architectures and the reason for each, as fixed when the package was built.");

  py::class_<DeviceProperties>(m, "DeviceProperties", "The device properties that heuristics read.")
      .def(py::init<int32_t, int32_t>(), py::arg("multiprocessors"), py::arg("arch"))
      .def_readonly("multiprocessors", &DeviceProperties::num_sms)
      .def_readonly("arch", &DeviceProperties::arch);

  py::class_<InflectionPoints>(m, "InflectionPoints", "gemv below m1, flat_gemm from m1 to m2, blas from m2 on.")
      .def(py::init<int64_t, int64_t>(), py::arg("m1"), py::arg("m2"))
      .def_readonly("m1", &InflectionPoints::m1)
      .def_readonly("m2", &InflectionPoints::m2);

  m.def("default_inflection_points", &default_inflection_points, py::arg("device"));
  m.def(
      "choose_linear",
      [](InflectionPoints points, int64_t m_rows, int64_t k) { return name(choose_linear(points, m_rows, k)); },
      py::arg("points"), py::arg("m"), py::arg("k"), "Which implementation linear(impl='auto') takes on a GPU.");
  m.def("choose_flat_cluster", &choose_flat_cluster, py::arg("device"), py::arg("n"), py::arg("k"),
        "How many blocks of a cluster share a tile of flat_gemm along K on Hopper.");
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
  m.def("choose_attention_cluster", &choose_attention_cluster, py::arg("resident"), py::arg("units"),
        py::arg("num_splits"), py::arg("most"),
        "Blocks of a cluster that share a unit of decode_attention where there are clusters.");
  m.def(
      "choose_attention_grid",
      [](int64_t resident, int64_t batch, int64_t work_tiles_per_sequence, int64_t num_splits, int64_t groups,
         int64_t min_kv_tiles, int64_t min_ctas, int64_t max_slots) {
        const AttentionGrid grid = choose_attention_grid(resident, batch, work_tiles_per_sequence, num_splits, groups,
                                                         min_kv_tiles, min_ctas, max_slots);
        return std::make_tuple(grid.uniform_splits, grid.min_uniform_tiles, grid.streams, grid.max_streams, grid.blocks,
                               grid.slots);
      },
      py::arg("resident"), py::arg("batch"), py::arg("work_tiles_per_sequence"), py::arg("num_splits"),
      py::arg("groups"), py::arg("min_kv_tiles"), py::arg("min_ctas"), py::arg("max_slots"),
      "Blocks and workspace slots of decode_attention on a GPU.");
}
