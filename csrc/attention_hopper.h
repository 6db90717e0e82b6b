// Attention without a mask on Hopper (sm_90a): what the host passes to the kernel.
#pragma once

#include "common.h"

namespace dualparal {

struct AttentionHopperParams {
    const void* q;  // [q_rows, inner], q_stride elements from row to row; inner = heads * head_dim
    const void* k;  // [k_rows, inner], k_stride elements from row to row
    const void* v;  // [k_rows, inner], v_stride elements from row to row
    void* out;      // [q_rows, inner]
    float* lse;     // [heads, q_rows], log(sum(exp(logits))); may be null
    int64_t q_rows, k_rows, heads, head_dim, q_stride, k_stride, v_stride;
    DType dtype;  // of q, k, v, out: bf16 or f16
};

void attention_hopper_cuda(const AttentionHopperParams& p, int device, uintptr_t stream);

}  // namespace dualparal
