#include "rows.h"

#include <cstring>

// Function multi-versioning needs the loader's ifunc, which glibc has. Elsewhere the baseline is what there is;
// on aarch64 that baseline already has vectors.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define DP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__clang__) && __clang_major__ >= 14
#define DP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DP_CLONES
#endif

namespace dualparal {
namespace {

constexpr int kLanes = 16;

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Written without branches, so that the loops around them vectorise.

inline uint16_t to_bf16(float value) {  // round to nearest, ties to even
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_f16(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fffu) << 13;
    // The exponent moves from bias 15 to bias 127 by a multiplication, which brings subnormals along.
    const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    const uint32_t bits = (half & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : finite;
    return float_of(bits | (uint32_t(half & 0x8000u) << 16));
}

inline uint16_t to_f16(float value) {  // round to nearest, ties to even
    const uint32_t bits = bits_of(value);
    const uint32_t twice = bits + bits;  // without the sign
    // Too large becomes infinite, then a float is added whose last place is the half's last place: the sum rounds.
    const float clamped = (float_of(bits & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
    uint32_t bias = twice & 0xff000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    const uint32_t sum = bits_of(float_of((bias >> 1) + 0x07800000u) + clamped);
    const uint32_t finite = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
    return uint16_t(((bits >> 16) & 0x8000u) | (twice > 0xff000000u ? 0x7e00u : finite));
}

inline float join_lanes(float* lanes) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

}  // namespace

DP_CLONES void load_row(DType dtype, const void* from, int64_t n, float* to) {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    switch (dtype) {
        case DType::f32:
            std::memcpy(to, from, size_t(n) * sizeof(float));
            break;
        case DType::bf16:
            for (int64_t i = 0; i < n; ++i) to[i] = float_of(uint32_t(half[i]) << 16);
            break;
        case DType::f16:
            for (int64_t i = 0; i < n; ++i) to[i] = from_f16(half[i]);
            break;
    }
}

DP_CLONES void store_row(DType dtype, const float* from, int64_t n, void* to) {
    uint16_t* half = static_cast<uint16_t*>(to);
    switch (dtype) {
        case DType::f32:
            std::memcpy(to, from, size_t(n) * sizeof(float));
            break;
        case DType::bf16:
            for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(from[i]);
            break;
        case DType::f16:
            for (int64_t i = 0; i < n; ++i) half[i] = to_f16(from[i]);
            break;
    }
}

DP_CLONES float sum(const float* x, int64_t n) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
    }
    for (int lane = 0; i + lane < n; ++lane) lanes[lane] += x[i + lane];
    return join_lanes(lanes);
}

DP_CLONES float sum_of_squares(const float* x, float centre, int64_t n) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float d = x[i + lane] - centre;
            lanes[lane] += d * d;
        }
    }
    for (int lane = 0; i + lane < n; ++lane) {
        const float d = x[i + lane] - centre;
        lanes[lane] += d * d;
    }
    return join_lanes(lanes);
}

DP_CLONES void add_gated(float* x, const float* y, const float* gate, int64_t n) {
    if (gate) {
        for (int64_t i = 0; i < n; ++i) x[i] += y[i] * gate[i];
    } else {
        for (int64_t i = 0; i < n; ++i) x[i] += y[i];
    }
}

DP_CLONES void normalise(float* x, float centre, float factor, const float* weight, const float* bias, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - centre) * factor;
    if (weight) {
        for (int64_t i = 0; i < n; ++i) x[i] *= weight[i];
    }
    if (bias) {
        for (int64_t i = 0; i < n; ++i) x[i] += bias[i];
    }
}

DP_CLONES void rotate_pairs(float* x, const float* cos, const float* sin, int64_t heads, int64_t half) {
    for (int64_t head = 0; head < heads; ++head, x += 2 * half) {
        for (int64_t i = 0; i < half; ++i) {
            const float a = x[2 * i];
            const float b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = a * sin[i] + b * cos[i];
        }
    }
}

DP_CLONES void extrapolate(const float* from, float* to, float scale, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] + scale * (to[i] - from[i]);
}

}  // namespace dualparal
