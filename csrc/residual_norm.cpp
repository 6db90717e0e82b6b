#include "residual_norm.h"

#include <pybind11/pybind11.h>

#include "rows.h"

namespace dualparal {

void residual_norm_cpu(const ResidualNormParams& p, int threads) {
    const int64_t row_bytes = p.dim * element_size(p.dtype);
    for_rows(p.rows, p.dim, 2 * p.dim, threads, [&](int64_t row, float* x) {
        load_row(p.dtype, static_cast<const char*>(p.x) + row * row_bytes, p.dim, x);
        if (p.y) {
            float* y = x + p.dim;
            char* x_new = static_cast<char*>(p.x_new) + row * row_bytes;
            load_row(p.dtype, static_cast<const char*>(p.y) + row * row_bytes, p.dim, y);
            add_gated(x, y, p.gate, p.dim);
            store_row(p.dtype, x, p.dim, x_new);
            if (p.h) load_row(p.dtype, x_new, p.dim, x);  // the norm sees x_new as it was stored, rounded
        }
        if (p.h) {
            const float mean = sum(x, p.dim) / float(p.dim);
            const float variance = sum_of_squares(x, mean, p.dim) / float(p.dim);
            normalise(x, mean, 1.0f / std::sqrt(variance + p.eps), p.weight, p.bias, p.dim);
            store_row(p.dtype, x, p.dim, static_cast<char*>(p.h) + row * row_bytes);
        }
    });
}

static void residual_norm(uintptr_t x, uintptr_t y, uintptr_t gate, uintptr_t weight, uintptr_t bias, uintptr_t x_new,
                          uintptr_t h, int64_t rows, int64_t dim, double eps, int dtype, int device, uintptr_t stream,
                          int threads) {
    check_where({device, stream, threads});
    check_sizes(rows, dim);
    check_eps(eps);
    const int64_t bytes = element_size(to_dtype(dtype));
    check_pointer("x", x, rows, bytes);
    check_aligned("y", y, bytes);
    check_aligned("x_new", x_new, bytes);
    check_aligned("h", h, bytes);
    check_aligned("gate", gate, sizeof(float));
    check_aligned("weight", weight, sizeof(float));
    check_aligned("bias", bias, sizeof(float));
    DP_CHECK((y == 0) == (x_new == 0) || rows == 0, "y and x_new come together, got y=", y, ", x_new=", x_new);
    DP_CHECK(y != 0 || h != 0 || rows == 0, "neither y nor h is given: nothing to do");
    const ResidualNormParams p{as<const void>(x), as<const void>(y),  as<const float>(gate), as<const float>(weight),
                               as<const float>(bias), as<void>(x_new), as<void>(h), rows, dim, float(eps),
                               to_dtype(dtype)};
    if (rows == 0) return;
#ifdef DUALPARAL_WITH_CUDA
    if (device >= 0) return residual_norm_cuda(p, device, stream);
#endif
    residual_norm_cpu(p, threads);
}

void register_residual_norm(pybind11::module_& m) {
    namespace py = pybind11;
    using namespace py::literals;
    m.def("residual_norm", &residual_norm, py::kw_only(), "x"_a, "y"_a, "gate"_a, "weight"_a, "bias"_a, "x_new"_a, "h"_a,
          "rows"_a, "dim"_a, "eps"_a, "dtype"_a, "device"_a, "stream"_a, "threads"_a,
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace dualparal
