// The pure host side for Python: what was built and what the heuristics choose. Includes no torch, so it imports
// anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "build_info.h"
#include "heuristics.h"

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
      .def_readonly("multiprocessors", &DeviceProperties::multiprocessors)
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
  m.def(
      "choose_attention_grid",
      [](const DeviceProperties& device, int64_t blocks_per_multiprocessor, int64_t units, int64_t num_splits,
         int64_t groups, int64_t min_groups, int64_t max_slots) {
        const AttentionGrid grid =
            choose_attention_grid(device, blocks_per_multiprocessor, units, num_splits, groups, min_groups, max_slots);
        return std::make_tuple(grid.blocks, grid.filling, grid.slots);
      },
      py::arg("device"), py::arg("blocks_per_multiprocessor"), py::arg("units"), py::arg("num_splits"),
      py::arg("groups"), py::arg("min_groups"), py::arg("max_slots"),
      "Blocks and workspace slots of decode_attention on a GPU.");
}
