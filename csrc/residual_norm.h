// x_new = x + y * gate;  h = LayerNorm(x_new) * weight + bias.  One row per token, float inside.
#pragma once

#include "common.h"

namespace dualparal {

struct ResidualNormParams {
    const void* x;        // [rows, dim]
    const void* y;        // [rows, dim]; null: nothing to add, x_new is x
    const float* gate;    // [dim]; null: 1
    const float* weight;  // [dim]; null: 1
    const float* bias;    // [dim]; null: 0
    void* x_new;          // [rows, dim]; null exactly when y is
    void* h;              // [rows, dim]; null: no norm
    int64_t rows, dim;
    float eps;
    DType dtype;  // of x, y, x_new, h
};

void residual_norm_cpu(const ResidualNormParams& p, int threads);
void residual_norm_cuda(const ResidualNormParams& p, int device, uintptr_t stream);

}  // namespace dualparal
