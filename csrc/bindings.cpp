// The one pybind11 module. One register call per op, no logic.
#include <pybind11/pybind11.h>

#include <string>

namespace dualparal {

namespace py = pybind11;

void register_residual_norm(py::module_& m);
void register_qk_norm_rope(py::module_& m);
void register_combine_guidance(py::module_& m);
void register_attention_hopper(py::module_& m);

#ifdef DUALPARAL_WITH_CUDA
constexpr bool kCuda = true;
std::string cuda_problem(int device);
#else
constexpr bool kCuda = false;
static std::string cuda_problem(int) { return "this dualparal._C was built without CUDA"; }
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

static py::dict build_info() {
    using namespace py::literals;
    return py::dict("compiler"_a = kCompiler, "cuda"_a = kCuda, "archs"_a = py::str(DUALPARAL_ARCHS).attr("split")(),
                    "openmp"_a = kOpenMP);
}

}  // namespace dualparal

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native ops of dualparal on raw pointers; call them through dualparal.kernels.";
    m.def("build_info", &dualparal::build_info, "What this extension was built with.");
    m.def("cuda_problem", &dualparal::cuda_problem, pybind11::arg("device"),
          "Why the CUDA kernels cannot run on that device; empty when they can.");
    dualparal::register_residual_norm(m);
    dualparal::register_qk_norm_rope(m);
    dualparal::register_combine_guidance(m);
    dualparal::register_attention_hopper(m);
}
