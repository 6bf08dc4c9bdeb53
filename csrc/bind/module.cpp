// The module onepass._C: a table of contents. The entries are described at their declarations.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "bind/layers.hpp"
#include "bind/plan.hpp"
#include "cpu/threads.hpp"

namespace onepass {
namespace {

#if defined(__x86_64__)
// Everything that -march=x86-64-v3 lets the compiler use, not only the vectors: a virtual machine may mask any of it.
bool has_v3() {
  unsigned eax, ebx, ecx = 0, edx, extended = 0;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  __get_cpuid(0x80000001, &eax, &ebx, &extended, &edx);
  constexpr unsigned of_leaf_1 = bit_FMA | bit_MOVBE | bit_F16C | bit_OSXSAVE, of_extended = bit_LZCNT;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         (ecx & of_leaf_1) == of_leaf_1 && (extended & of_extended) == of_extended;
}

bool cpu_has(const std::string& isa) {
  if (isa == "v3") return has_v3();
  if (isa == "v4")
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  return true;
}
#else
bool cpu_has(const std::string&) { return true; }
#endif

// The instruction sets that are in this build and that this processor supports, best last.
std::vector<std::string> isas() {
  std::vector<std::string> out;
  for (const std::string& isa : isa_names)
    if (cpu_has(isa)) out.push_back(isa);
  return out;
}

void use_isa(const std::string& name) {
  for (std::size_t i = 0; i < isa_names.size(); ++i)
    if (isa_names[i] == name && cpu_has(name)) {
      current_isa = static_cast<int>(i);
      return;
    }
  throw py::value_error("instruction set '" + name + "' is not in this build or not on this processor");
}

py::list list_rules() {
  py::list out;
  for (const RuleVariant& v : rule_variants())
    out.append(py::make_tuple(v.rule, py::tuple(py::cast(v.hyper_names)), py::tuple(py::cast(v.state_names)),
                              py::tuple(py::cast(v.state_kinds)), py::tuple(py::cast(v.carried_names)), v.reads_grad,
                              v.takes_rows));
  return out;
}

}  // namespace
}  // namespace onepass

PYBIND11_MODULE(_C, m) {
  using namespace onepass;
  m.doc() = "Native kernels of onepass; use onepass._native, which checks the arguments.";

  m.def("set_reader", [](const py::object& exchange_api, py::object describe) {
    reader = new TensorReader(exchange_api, std::move(describe));
    return reader->uses_exchange_api();
  });
  m.def("rules", &list_rules,
        "(rule, hyper names, state names, state kinds, carried numbers, reads gradients, takes rows) per "
        "variant; gather() takes the index.");
  m.attr("scale_group") = static_cast<int>(scale_group);
  m.def("isas", &isas);
  m.def("isa", [] { return isa_names[current_isa]; });
  m.def("use_isa", &use_isa);
  m.def("thread_runtime", &cpu::thread_runtime);

  py::class_<Plan>(m, "Plan")
      .def(py::init([](py::tuple types) { return std::make_unique<Plan>(*reader, std::move(types)); }))
      .def("gather", &Plan::gather)
      .def("cpu_total", &Plan::cpu_total)
      .def("has_subclasses", &Plan::has_subclasses)
      .def("has_run", &Plan::has_run)
      .def("has_cpu", &Plan::has_cpu)
      .def("cuda_devices", &Plan::cuda_devices)
      .def("cuda_partials", &Plan::cuda_partials)
      .def("cuda_total", &Plan::cuda_total)
      .def("cuda_workspace", &Plan::cuda_workspace)
      .def("run", &Plan::run)
      .def("updated", &Plan::updated);

  m.def("dropout", &bind_dropout);
  m.def("try_row_norm", &try_row_norm);
  m.def("row_norm", &bind_row_norm);
  m.def("row_norm_backward", &bind_row_norm_backward);
  m.def("batch_norm", &bind_batch_norm);
  m.def("batch_norm_backward", &bind_batch_norm_backward);

#if defined(ONEPASS_HAS_CUDA)
  m.attr("cuda_archs") = ONEPASS_CUDA_ARCHS_BUILT;
  m.def("cuda_device_count", &cuda::device_count);
  m.def("cuda_versions", [] {
    const cuda::Versions versions = cuda::versions();
    return std::make_pair(versions.built, versions.driver);
  });
#else
  m.attr("cuda_archs") = "";
  m.def("cuda_device_count", [] { return 0; });
  m.def("cuda_versions", [] { return std::make_pair(0, 0); });
#endif
#if defined(ONEPASS_CUDA_ON_HOST)
  m.attr("cuda_on_host") = true;
#else
  m.attr("cuda_on_host") = false;
#endif
  m.attr("compiler") = ONEPASS_COMPILER;
}
