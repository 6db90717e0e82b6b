#include "qk_norm_rope.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "rows.h"

namespace dualparal {

void qk_norm_rope_cpu(const QkNormRopeParams& p, int threads) {
    const int64_t inner = p.heads * p.head_dim;
    const int64_t half = p.head_dim / 2;
    const int64_t size = element_size(p.dtype);
    for_rows(p.rows, 3 * inner, inner, threads, [&](int64_t row, float* scratch) {
        const char* from = static_cast<const char*>(p.qkv) + row * 3 * inner * size;
        const auto part = [&](const char* source, const float* weight, void* to) {
            load_row(p.dtype, source, inner, scratch);
            const float mean_square = sum_of_squares(scratch, 0.0f, inner) / float(inner);
            normalise(scratch, 0.0f, 1.0f / std::sqrt(mean_square + p.eps), weight, nullptr, inner);
            rotate_pairs(scratch, p.cos + row * half, p.sin + row * half, p.heads, half);
            store_row(p.dtype, scratch, inner, to);
        };
        part(from, p.norm_q, static_cast<char*>(p.q) + row * inner * size);
        char* k = static_cast<char*>(p.k) + row * p.k_stride * size;
        const char* v = from + 2 * inner * size;
        part(from + inner * size, p.norm_k, k);
        std::memcpy(static_cast<char*>(p.v) + row * p.v_stride * size, v, size_t(inner * size));
        for (const QkNormRopeLend& lend : p.lends) {
            if (row < lend.first || row >= lend.first + lend.tokens) continue;
            const int64_t at = (*lend.slot * lend.tokens + row - lend.first) * inner * size;
            std::memcpy(static_cast<char*>(lend.keys) + at, k, size_t(inner * size));  // k is still in the cache
            std::memcpy(static_cast<char*>(lend.values) + at, v, size_t(inner * size));
        }
    });
}

// As Python gives it: keys, values, slot, slots, tokens, first.
using LendArguments = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;

static QkNormRopeLend to_lend(const LendArguments& arguments, int64_t rows, int64_t bytes, int device) {
    const auto [keys, values, slot, slots, tokens, first] = arguments;
    DP_CHECK(slots >= 1 && slots < (int64_t{1} << 31), "a lend's slots=", slots, ": 1 to 2^31 - 1 expected");
    DP_CHECK(tokens >= 0 && tokens <= rows, "a lend's tokens=", tokens, ": 0 to rows=", rows, " expected");
    DP_CHECK(first >= 0 && first <= rows - tokens, "a lend's first=", first, ": 0 to ", rows - tokens,
             " expected, for tokens=", tokens, " of rows=", rows);
    check_pointer("a lend's keys", keys, tokens, bytes);
    check_pointer("a lend's values", values, tokens, bytes);
    check_pointer("a lend's slot", slot, tokens, sizeof(int64_t));
    const QkNormRopeLend lend{as<void>(keys), as<void>(values), as<const int64_t>(slot), slots, tokens, first};
    if (device < 0 && tokens > 0) {
        DP_CHECK(*lend.slot >= 0 && *lend.slot < slots, "a lend's slot is ", *lend.slot, ": 0 to ", slots - 1,
                 " expected, the store has no other");
    }
    return lend;
}

static void check_stride(const char* name, int64_t stride, int64_t rows, int64_t inner) {
    if (rows <= 1) return;  // a single row has no distance to a next one
    DP_CHECK(stride >= inner, name, "'s row stride ", stride, " is less than its row of ", inner);
    DP_CHECK(stride < (int64_t{1} << 31), name, "'s row stride ", stride, ": less than 2^31 expected");
}

static void qk_norm_rope(uintptr_t qkv, uintptr_t norm_q, uintptr_t norm_k, uintptr_t cos, uintptr_t sin, uintptr_t q,
                         uintptr_t k, uintptr_t v, int64_t rows, int64_t heads, int64_t head_dim, int64_t k_stride,
                         int64_t v_stride, const std::vector<LendArguments>& lends, double eps, int dtype, int device,
                         uintptr_t stream, int threads) {
    check_where({device, stream, threads});
    DP_CHECK(heads >= 1 && heads < (1 << 20), "heads=", heads, ": 1 to 2^20 - 1 expected");
    DP_CHECK(head_dim >= 2 && head_dim < (1 << 20) && head_dim % 2 == 0, "head_dim=", head_dim,
             ": an even number of 2 or more expected, a rotation takes pairs");
    const int64_t inner = heads * head_dim;
    check_sizes(rows, inner);
    check_eps(eps);
    check_stride("k_out", k_stride, rows, inner);
    check_stride("v_out", v_stride, rows, inner);
    const int64_t bytes = element_size(to_dtype(dtype));
    check_pointer("qkv", qkv, rows, bytes);
    check_pointer("norm_q", norm_q, rows, sizeof(float));
    check_pointer("norm_k", norm_k, rows, sizeof(float));
    check_pointer("cos", cos, rows, sizeof(float));
    check_pointer("sin", sin, rows, sizeof(float));
    check_pointer("q", q, rows, bytes);
    check_pointer("k_out", k, rows, bytes);
    check_pointer("v_out", v, rows, bytes);
    DP_CHECK(lends.size() <= kMaxLends, lends.size(), " lends: at most ", kMaxLends, " expected");
    QkNormRopeParams p{as<const void>(qkv), as<const float>(norm_q), as<const float>(norm_k), as<const float>(cos),
                       as<const float>(sin), as<void>(q), as<void>(k), as<void>(v), rows, heads, head_dim, k_stride,
                       v_stride, float(eps), to_dtype(dtype), {}};
    for (size_t i = 0; i < lends.size(); ++i) p.lends[i] = to_lend(lends[i], rows, bytes, device);
    if (rows == 0) return;
#ifdef DUALPARAL_WITH_CUDA
    if (device >= 0) return qk_norm_rope_cuda(p, device, stream);
#endif
    qk_norm_rope_cpu(p, threads);
}

void register_qk_norm_rope(pybind11::module_& m) {
    namespace py = pybind11;
    using namespace py::literals;
    m.def("qk_norm_rope", &qk_norm_rope, py::kw_only(), "qkv"_a, "norm_q"_a, "norm_k"_a, "cos"_a, "sin"_a, "q"_a, "k"_a,
          "v"_a, "rows"_a, "heads"_a, "head_dim"_a, "k_stride"_a, "v_stride"_a, "lends"_a, "eps"_a, "dtype"_a, "device"_a,
          "stream"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
}

}  // namespace dualparal
