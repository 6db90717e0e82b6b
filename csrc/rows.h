// Row arithmetic of the CPU ops. A row is converted to float once, worked on in the first-level cache and
// converted back once; each function exists for AVX-512, AVX2 and plain x86-64, chosen when the library loads.
#pragma once

#include <cstdint>
#include <vector>

#include "common.h"

namespace dualparal {

constexpr int64_t kMinParallelElements = 1 << 15;  // below, waking threads costs more than the work

void load_row(DType dtype, const void* from, int64_t n, float* to);
void store_row(DType dtype, const float* from, int64_t n, void* to);

// Sums run in 16 fixed lanes, joined in a fixed order: the result depends neither on threads nor on vector width.
float sum(const float* x, int64_t n);
float sum_of_squares(const float* x, float centre, int64_t n);  // of x - centre

void add_gated(float* x, const float* y, const float* gate, int64_t n);  // x += y * gate; gate may be null
// x = (x - centre) * factor * weight + bias; weight and bias may be null
void normalise(float* x, float centre, float factor, const float* weight, const float* bias, int64_t n);
void rotate_pairs(float* x, const float* cos, const float* sin, int64_t heads, int64_t half);
void extrapolate(const float* from, float* to, float scale, int64_t n);  // to = from + scale * (to - from)

// Calls body(row, scratch) for every row; scratch holds `floats` floats of the calling thread's own.
template <class Body>
void for_rows(int64_t rows, int64_t elements_per_row, int64_t floats, int threads, Body body) {
    if (rows * elements_per_row < kMinParallelElements) threads = 1;
    if (threads > rows) threads = rows > 0 ? int(rows) : 1;
    std::vector<float> scratch(size_t(threads) * floats);  // here: an exception must not leave a parallel region
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int slice = 0; slice < threads; ++slice) {
        for (int64_t row = rows * slice / threads; row < rows * (slice + 1) / threads; ++row) {
            body(row, scratch.data() + slice * floats);
        }
    }
}

}  // namespace dualparal
