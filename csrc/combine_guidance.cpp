#include "combine_guidance.h"

#include <pybind11/pybind11.h>

#include <algorithm>

#include "rows.h"

namespace dualparal {

void combine_guidance_cpu(const CombineGuidanceParams& p, int threads) {
    constexpr int64_t kChunk = 2048;  // two float copies of a chunk fit the first-level cache
    const int64_t chunks = (p.size + kChunk - 1) / kChunk;
    for_rows(chunks, kChunk, 2 * kChunk, threads, [&](int64_t chunk, float* cond) {
        float* uncond = cond + kChunk;
        const int64_t n = std::min(kChunk, p.size - chunk * kChunk);
        const int64_t offset = chunk * kChunk * element_size(p.dtype);
        load_row(p.dtype, static_cast<const char*>(p.cond) + offset, n, cond);
        load_row(p.dtype, static_cast<const char*>(p.uncond) + offset, n, uncond);
        extrapolate(uncond, cond, p.scale, n);
        store_row(p.dtype, cond, n, static_cast<char*>(p.out) + offset);
    });
}

static void combine_guidance(uintptr_t cond, uintptr_t uncond, uintptr_t out, int64_t size, double scale, int dtype,
                             int device, uintptr_t stream, int threads) {
    check_where({device, stream, threads});
    DP_CHECK(size >= 0 && size < (int64_t{1} << 40), "size=", size, ": 0 to 2^40 - 1 elements expected");
    DP_CHECK(std::isfinite(scale), "scale=", scale, ": a finite number expected");
    const int64_t bytes = element_size(to_dtype(dtype));
    check_pointer("cond", cond, size, bytes);
    check_pointer("uncond", uncond, size, bytes);
    check_pointer("out", out, size, bytes);
    const CombineGuidanceParams p{as<const void>(cond), as<const void>(uncond), as<void>(out), size, float(scale),
                                  to_dtype(dtype)};
    if (size == 0) return;
#ifdef DUALPARAL_WITH_CUDA
    if (device >= 0) return combine_guidance_cuda(p, device, stream);
#endif
    combine_guidance_cpu(p, threads);
}

void register_combine_guidance(pybind11::module_& m) {
    namespace py = pybind11;
    using namespace py::literals;
    m.def("combine_guidance", &combine_guidance, py::kw_only(), "cond"_a, "uncond"_a, "out"_a, "size"_a, "scale"_a,
          "dtype"_a, "device"_a, "stream"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
}

}  // namespace dualparal
