// RMSNorm of q and k over all heads, rotation of pairs, and k and v written where attention will read them, and
// where a neighbour will.
#pragma once

#include "common.h"

namespace dualparal {

// Rows [first, first + tokens) of k and v go to a slot of a store as well.
struct QkNormRopeLend {
    void* keys;           // [slots, tokens, inner]
    void* values;         // [slots, tokens, inner]
    const int64_t* slot;  // where k and v are: on a GPU the host does not know it, so that a graph can be replayed
    int64_t slots, tokens, first;
};

constexpr int kMaxLends = 2;  // a block has two neighbours

struct QkNormRopeParams {
    const void* qkv;      // [rows, 3 * inner]: q | k | v
    const float* norm_q;  // [inner]
    const float* norm_k;  // [inner]
    const float* cos;     // [rows, head_dim / 2]
    const float* sin;     // [rows, head_dim / 2]
    void* q;              // [rows, inner]
    void* k;              // [rows, inner], k_stride elements from row to row
    void* v;              // [rows, inner], v_stride elements from row to row
    int64_t rows, heads, head_dim, k_stride, v_stride;
    float eps;
    DType dtype;                      // of qkv, q, k, v, and stores
    QkNormRopeLend lends[kMaxLends];  // those that are absent have no tokens
};

void qk_norm_rope_cpu(const QkNormRopeParams& p, int threads);
void qk_norm_rope_cuda(const QkNormRopeParams& p, int device, uintptr_t stream);

}  // namespace dualparal
