#include "attention_hopper.h"

#include <pybind11/pybind11.h>

namespace dualparal {
namespace {

// TMA reads rows of 16-bit elements that begin at multiples of 16 bytes.
void check_matrix(const char* name, uintptr_t pointer, int64_t rows, int64_t inner, int64_t stride) {
    DP_CHECK(pointer != 0, name, " is a null pointer, with rows=", rows);
    DP_CHECK(pointer % 16 == 0, name, " lies at address ", pointer, ": a multiple of 16 bytes expected");
    if (rows <= 1) return;  // a single row has no distance to a next one
    DP_CHECK(stride >= inner, name, "'s row stride ", stride, " is less than its row of ", inner);
    DP_CHECK(stride % 8 == 0, name, "'s row stride ", stride, ": a multiple of 8 elements (16 bytes) expected");
    DP_CHECK(stride < (int64_t{1} << 38), name, "'s row stride ", stride, ": less than 2^38 expected");
}

void attention_hopper(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int64_t q_rows,
                      int64_t k_rows, int64_t heads, int64_t head_dim, int64_t q_stride, int64_t k_stride,
                      int64_t v_stride, int dtype, int device, uintptr_t stream) {
    DP_CHECK(device >= 0, "device=", device, ": a CUDA device number expected, there is no such attention on the CPU");
    DP_CHECK(dtype == int(DType::bf16) || dtype == int(DType::f16), "dtype code ", dtype,
             " is none of 1 (bfloat16), 2 (float16)");
    DP_CHECK(head_dim == 64 || head_dim == 128, "head_dim=", head_dim, ": 64 or 128 expected");
    DP_CHECK(heads >= 1 && heads < (1 << 16), "heads=", heads, ": 1 to 2^16 - 1 expected");
    DP_CHECK(q_rows >= 1 && q_rows < (1 << 30), "q_rows=", q_rows, ": 1 to 2^30 - 1 expected");
    DP_CHECK(k_rows >= 1 && k_rows < (1 << 30), "k_rows=", k_rows, ": 1 to 2^30 - 1 expected");
    const int64_t inner = heads * head_dim;
    check_matrix("q", q, q_rows, inner, q_stride);
    check_matrix("k", k, k_rows, inner, k_stride);
    check_matrix("v", v, k_rows, inner, v_stride);
    check_matrix("out", out, q_rows, inner, inner);
    const AttentionHopperParams p{as<const void>(q), as<const void>(k), as<const void>(v), as<void>(out),
                                  as<float>(lse),    q_rows,            k_rows,            heads,
                                  head_dim,          q_stride,          k_stride,          v_stride,
                                  to_dtype(dtype)};
#ifdef DUALPARAL_WITH_SM90A
    attention_hopper_cuda(p, device, stream);
#else
    (void)p, (void)stream;
    fail<std::invalid_argument>("attention_hopper: this dualparal._C was built without sm_90a");
#endif
}

}  // namespace

void register_attention_hopper(pybind11::module_& m) {
    namespace py = pybind11;
    using namespace py::literals;
    m.def("attention_hopper", &attention_hopper, py::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "q_rows"_a,
          "k_rows"_a, "heads"_a, "head_dim"_a, "q_stride"_a, "k_stride"_a, "v_stride"_a, "dtype"_a, "device"_a,
          "stream"_a, py::call_guard<py::gil_scoped_release>());
}

}  // namespace dualparal
