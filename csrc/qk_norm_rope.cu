#include "common.cuh"
#include "qk_norm_rope.h"

namespace dualparal {
namespace {

constexpr int kThreads = 256;

// Three thread blocks per row: q, k, v. N is even, and divides head_dim: a pack holds whole pairs of one head.
// Without kLends nothing of the lends remains.
template <class T, int N, bool kAligned, bool kLends>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_kernel(const QkNormRopeParams p) {
    extern __shared__ float values[];  // [inner]
    using Packed = Pack<T, N>;
    const int head_dim = int(p.head_dim);
    const int inner = int(p.heads) * head_dim;
    const int part = blockIdx.y;
    const int64_t row = blockIdx.x;
    const T* from = static_cast<const T*>(p.qkv) + (row * 3 + part) * inner;
    T* to = part == 0   ? static_cast<T*>(p.q) + row * inner
            : part == 1 ? static_cast<T*>(p.k) + row * p.k_stride
                        : static_cast<T*>(p.v) + row * p.v_stride;
    const auto load = [](const T* source) {
        Packed pack;
        if constexpr (kAligned) {
            pack = *reinterpret_cast<const Packed*>(source);
        } else {
            for (int j = 0; j < N; ++j) pack.at[j] = source[j];
        }
        return pack;
    };
    const auto store = [](T* target, const Packed& pack) {
        if constexpr (kAligned) {
            *reinterpret_cast<Packed*>(target) = pack;
        } else {
            for (int j = 0; j < N; ++j) target[j] = pack.at[j];
        }
    };

    // Where the row goes besides; null where it is not lent.
    T* lent[kMaxLends] = {};
    const auto aim = [&] {
        if constexpr (kLends) {
            for (int side = 0; side < kMaxLends; ++side) {
                const QkNormRopeLend& lend = p.lends[side];
                const int64_t at = row - lend.first;
                if (part == 0 || at < 0 || at >= lend.tokens) continue;
                const int64_t slot = *lend.slot;
                if (slot < 0 || slot >= lend.slots) __trap();  // the first place that knows; better than a wrong video
                lent[side] = static_cast<T*>(part == 1 ? lend.keys : lend.values) + (slot * lend.tokens + at) * inner;
            }
        }
    };
    const auto write = [&](int i, const Packed& pack) {
        store(to + i, pack);
        if constexpr (kLends) {
            for (T* other : lent) {
                if (other) store(other + i, pack);
            }
        }
    };

    if (part == 2) {
        aim();
        for (int i = threadIdx.x * N; i < inner; i += kThreads * N) write(i, load(from + i));
        return;
    }

    float local = 0.0f;
    for (int i = threadIdx.x * N; i < inner; i += kThreads * N) {
        const Packed a = load(from + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float value = to_float(a.at[j]);
            values[i + j] = value;
            local += value * value;
        }
    }
    const float factor = 1.0f / sqrtf(block_sum(local) / float(inner) + p.eps);

    aim();
    const float* weight = part == 0 ? p.norm_q : p.norm_k;
    for (int i = threadIdx.x * N; i < inner; i += kThreads * N) {
        const int64_t angle = row * (head_dim / 2) + i % head_dim / 2;
        Packed out;
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            const float cos = p.cos[angle + j / 2];
            const float sin = p.sin[angle + j / 2];
            const float a = values[i + j] * factor * weight[i + j];
            const float b = values[i + j + 1] * factor * weight[i + j + 1];
            out.at[j] = from_float<T>(a * cos - b * sin);
            out.at[j + 1] = from_float<T>(a * sin + b * cos);
        }
        write(i, out);
    }
}

}  // namespace

void qk_norm_rope_cuda(const QkNormRopeParams& p, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const size_t shared = row_bytes_in_shared(p.heads * p.head_dim);
    with_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = kPack<T>;
        bool aligned = aligned16(p.qkv) && aligned16(p.q) && aligned16(p.k) && aligned16(p.v) &&
                       p.head_dim % N == 0 && p.k_stride % N == 0 && p.v_stride % N == 0;
        bool lends = false;
        for (const QkNormRopeLend& lend : p.lends) {
            aligned = aligned && aligned16(lend.keys) && aligned16(lend.values);
            lends = lends || lend.tokens > 0;
        }
        const auto kernel = lends ? (aligned ? qk_norm_rope_kernel<T, N, true, true> : qk_norm_rope_kernel<T, 2, false, true>)
                                  : (aligned ? qk_norm_rope_kernel<T, N, true, false> : qk_norm_rope_kernel<T, 2, false, false>);
        kernel<<<dim3(unsigned(p.rows), 3), kThreads, shared, as<CUstream_st>(stream)>>>(p);
    });
    check_cuda(cudaGetLastError(), "qk_norm_rope launch");
}

}  // namespace dualparal
