// Attention on Hopper, as one thread block sees it: 128 queries of one head, all keys.
//
// The instructions are behind `Gpu`: PTX in attention_hopper.cu, a model of the hardware in
// tests/csrc/emulate_hopper.cpp, which runs this very code on a CPU. docs/kernels.md explains the design.
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

#ifdef __CUDACC__
#define DP_DEVICE __device__ __forceinline__
#define DP_CONSTANT __host__ __device__ constexpr
#define DP_UNROLL _Pragma("unroll")
#define DP_ROLLED _Pragma("unroll 1")
#else
#define DP_DEVICE inline
#define DP_CONSTANT constexpr
#define DP_UNROLL
#define DP_ROLLED
#endif

namespace dualparal {
namespace hopper {

constexpr int kWarp = 32;
constexpr int kGroup = 128;     // threads of a warpgroup, which issues wgmma together
constexpr int kConsumers = 2;   // warpgroups that compute; a third, the first in number, loads
constexpr int kThreads = (1 + kConsumers) * kGroup;
constexpr int kGroupRows = 64;  // queries of a consumer: the M of wgmma
constexpr int kBlockM = kConsumers * kGroupRows;
constexpr int kBlockN = 128;    // keys of a tile
constexpr int kStepK = 16;      // the K of wgmma for 16-bit elements
constexpr int kBox = 64;        // columns of a TMA box: 128 bytes, the most that the swizzle takes
constexpr int kRowBytes = 128;  // of a box
constexpr int kEightRows = 8 * kRowBytes;  // the swizzle repeats: every operand starts at a multiple of this

// setmaxnreg: 24 * 128 + 2 * 240 * 128 registers are 168 for each of 384 threads, what the launch has.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;

DP_CONSTANT int tiles(int rows, int block) { return (rows + block - 1) / block; }

// Where a byte of a box lies: TMA and wgmma exclusive-or the number of its 16 bytes with the row, modulo 8.
DP_CONSTANT uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// A shared memory operand of wgmma, swizzled by 128 bytes. `stride`: bytes from eight rows to the next eight;
// `leading`: from a box to the next, for an operand that is wider than one along its contiguous dimension.
DP_CONSTANT uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t{1} << 62;
}
DP_CONSTANT uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Q and K along head_dim: 16 columns are 32 bytes, four steps fill a box of `rows`.
DP_CONSTANT uint32_t step_in_columns(int step, int rows) {
    return uint32_t(step / 4 * rows * kRowBytes + step % 4 * kStepK * 2);
}
// V along its keys.
DP_CONSTANT uint32_t step_in_rows(int step) { return uint32_t(step * kStepK * kRowBytes); }

// Where element i of a thread's accumulator lies in the 64 rows of its warpgroup.
DP_CONSTANT int accumulator_row(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8; }
DP_CONSTANT int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
// A thread holds two rows of an accumulator: which of them element i is of.
DP_CONSTANT int half_of(int i) { return i / 2 % 2; }
// The accumulator's layout is that of the left operand in registers: register r of a step takes elements 2r, 2r + 1
// of the eight that the thread has in these 16 columns.
DP_CONSTANT int first_of_pair(int step, int r) { return step * 8 + r * 2; }

// A ring of kStages buffers; n counts the tiles that went through it. A barrier's phases alternate in parity.
template <int kStages>
struct Ring {
    static DP_CONSTANT int stage(int n) { return n % kStages; }
    static DP_CONSTANT uint32_t filled(int n) { return uint32_t(n / kStages & 1); }
    static DP_CONSTANT uint32_t emptied(int n) { return filled(n) ^ 1; }  // a new barrier passes for parity 1
};

// Offsets into shared memory.
template <int kHeadDim>
struct Shared {
    static constexpr int kStages = 256 / kHeadDim;  // 128 KiB of keys and values
    static constexpr int kBoxes = kHeadDim / kBox;
    static constexpr uint32_t kQueryBytes = kGroupRows * kHeadDim * 2;  // of one consumer
    static constexpr uint32_t kTileBytes = kBlockN * kHeadDim * 2;
    static constexpr uint32_t kKeys = kConsumers * kQueryBytes;
    static constexpr uint32_t kValues = kKeys + kStages * kTileBytes;
    static constexpr uint32_t kQueriesFull = kValues + kStages * kTileBytes;  // barriers of 8 bytes from here
    static constexpr uint32_t kKeysFull = kQueriesFull + 8;
    static constexpr uint32_t kKeysEmpty = kKeysFull + 8 * kStages;
    static constexpr uint32_t kValuesFull = kKeysEmpty + 8 * kStages;
    static constexpr uint32_t kValuesEmpty = kValuesFull + 8 * kStages;
    static constexpr uint32_t kBytes = kValuesEmpty + 8 * kStages;
    static_assert(kQueryBytes % kEightRows == 0 && kTileBytes % kEightRows == 0, "the swizzle goes by addresses");
};

struct Problem {
    float* lse;  // may be null
    int q_rows, k_rows;
    float scale;  // log2(e) / sqrt(head_dim)
};

// The first tile is the last, ragged one: so a mask is needed before the loop only.
DP_CONSTANT int first_key(int n, int k_rows) { return (tiles(k_rows, kBlockN) - 1 - n) * kBlockN; }

template <class Gpu, int kHeadDim>
DP_DEVICE void produce(const Problem& p, uint32_t shared, typename Gpu::Map q, typename Gpu::Map k, typename Gpu::Map v,
                       int first_query, int column) {
    using At = Shared<kHeadDim>;
    using Ring = Ring<At::kStages>;
    Gpu::expect(shared + At::kQueriesFull, kConsumers * At::kQueryBytes);
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
        for (int box = 0; box < At::kBoxes; ++box) {
            Gpu::load(shared + consumer * At::kQueryBytes + box * kGroupRows * kRowBytes, q, column + box * kBox,
                      first_query + consumer * kGroupRows, shared + At::kQueriesFull);
        }
    }
    const auto load_tile = [&](typename Gpu::Map map, uint32_t data, uint32_t full, uint32_t empty, int n) {
        const int stage = Ring::stage(n);
        Gpu::wait(shared + empty + 8 * stage, Ring::emptied(n));
        Gpu::expect(shared + full + 8 * stage, At::kTileBytes);
        for (int box = 0; box < At::kBoxes; ++box) {
            Gpu::load(shared + data + stage * At::kTileBytes + box * kBlockN * kRowBytes, map, column + box * kBox,
                      first_key(n, p.k_rows), shared + full + 8 * stage);
        }
    };
    const int count = tiles(p.k_rows, kBlockN);
    DP_ROLLED
    for (int n = 0; n <= count; ++n) {  // in the order of use: the keys of a tile before the values of the last one
        if (n < count) load_tile(k, At::kKeys, At::kKeysFull, At::kKeysEmpty, n);
        if (n > 0) load_tile(v, At::kValues, At::kValuesFull, At::kValuesEmpty, n - 1);
    }
}

// Logits become weights in place; top and total are the running maximum of the logits and sum of the weights, the
// sum of this thread's own columns only. What was summed before has to shrink by `shrink`.
template <class Gpu>
DP_DEVICE void softmax(float (&s)[kBlockN / 2], float (&top)[2], float (&total)[2], float (&shrink)[2], float scale) {
    DP_UNROLL
    for (int half = 0; half < 2; ++half) {
        float most = top[half];
        DP_UNROLL
        for (int i = 0; i < kBlockN / 2; ++i) {
            if (half_of(i) == half) most = fmaxf(most, s[i]);
        }
        most = fmaxf(most, Gpu::template shuffle<1>(most));  // four threads share a row
        most = fmaxf(most, Gpu::template shuffle<2>(most));
        shrink[half] = Gpu::exp2((top[half] - most) * scale);  // 0 at the first tile, where top is -inf
        top[half] = most;
        const float shift = most * scale;
        float sum = 0.0f;
        DP_UNROLL
        for (int i = 0; i < kBlockN / 2; ++i) {
            if (half_of(i) == half) {
                s[i] = Gpu::exp2(fmaf(s[i], scale, -shift));
                sum += s[i];
            }
        }
        total[half] = total[half] * shrink[half] + sum;
    }
}

template <class Gpu, DType kType, int kHeadDim>
DP_DEVICE void consume(const Problem& p, uint32_t shared, typename Gpu::Map out, int consumer, int first_query, int head) {
    using At = Shared<kHeadDim>;
    using Ring = Ring<At::kStages>;
    const int thread = Gpu::thread() % kGroup;
    const uint32_t queries = shared + consumer * At::kQueryBytes;
    float s[kBlockN / 2];                 // logits, then weights: 64 x kBlockN over the warpgroup
    uint32_t weights[kBlockN / kStepK][4];  // the same in 16 bits, two to a register
    float o[kHeadDim / 2];                // 64 x kHeadDim
    float top[2] = {-INFINITY, -INFINITY};
    float total[2] = {0.0f, 0.0f};
    float shrink[2];
    DP_UNROLL
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;

    const auto multiply_keys = [&](int n) {
        const uint64_t a = descriptor(queries, 0, kEightRows);
        const uint64_t b = descriptor(shared + At::kKeys + Ring::stage(n) * At::kTileBytes, 0, kEightRows);
        DP_UNROLL
        for (int step = 0; step < kHeadDim / kStepK; ++step) {
            Gpu::template multiply<kType>(s, advanced(a, step_in_columns(step, kGroupRows)),
                                          advanced(b, step_in_columns(step, kBlockN)), step > 0);
        }
        Gpu::commit();
    };
    const auto multiply_values = [&](int n) {
        const uint64_t b =
            descriptor(shared + At::kValues + Ring::stage(n) * At::kTileBytes, kBlockN * kRowBytes, kEightRows);
        DP_UNROLL
        for (int step = 0; step < kBlockN / kStepK; ++step) {
            Gpu::template multiply<kType>(o, weights[step], advanced(b, step_in_rows(step)));
        }
        Gpu::commit();
    };
    const auto wait_full = [&](uint32_t full, int n) { Gpu::wait(shared + full + 8 * Ring::stage(n), Ring::filled(n)); };
    // One arrival per warp: a warp knows of its own wgmma only that they have read the tile.
    const auto release = [&](uint32_t empty, int n) {
        if (thread % kWarp == 0) Gpu::arrive(shared + empty + 8 * Ring::stage(n));
    };
    const auto pack_weights = [&] {
        DP_UNROLL
        for (int step = 0; step < kBlockN / kStepK; ++step) {
            DP_UNROLL
            for (int r = 0; r < 4; ++r) {
                const int i = first_of_pair(step, r);
                weights[step][r] = Gpu::template pack<kType>(s[i], s[i + 1]);
            }
        }
    };

    Gpu::wait(shared + At::kQueriesFull, 0);
    wait_full(At::kKeysFull, 0);
    Gpu::fence(s, o, weights);
    multiply_keys(0);
    Gpu::template wait_products<0>(s);
    release(At::kKeysEmpty, 0);
    const int valid = p.k_rows - first_key(0, p.k_rows);
    DP_UNROLL
    for (int i = 0; i < kBlockN / 2; ++i) {
        if (accumulator_column(thread, i) >= valid) s[i] = -INFINITY;
    }
    softmax<Gpu>(s, top, total, shrink, p.scale);
    pack_weights();

    // Ping-pong: the consumers take turns in issuing their products, so that the softmax of one runs under the
    // products of the other. The first to go is consumer 0.
    if (consumer == 1) Gpu::pass_turn(0);
    const int count = tiles(p.k_rows, kBlockN);
    DP_ROLLED
    for (int n = 1; n < count; ++n) {
        wait_full(At::kKeysFull, n);
        wait_full(At::kValuesFull, n - 1);
        Gpu::wait_turn(consumer);
        Gpu::fence(s, o, weights);
        multiply_keys(n);
        multiply_values(n - 1);
        Gpu::pass_turn(1 - consumer);
        Gpu::template wait_products<1>(s);
        release(At::kKeysEmpty, n);
        softmax<Gpu>(s, top, total, shrink, p.scale);
        Gpu::template wait_products<0>(o, weights);
        release(At::kValuesEmpty, n - 1);
        DP_UNROLL
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= shrink[half_of(i)];
        pack_weights();
    }
    wait_full(At::kValuesFull, count - 1);
    if (consumer == 0) Gpu::wait_turn(0);  // takes what consumer 1 passed last: no barrier is left half full
    Gpu::fence(s, o, weights);
    multiply_values(count - 1);
    Gpu::template wait_products<0>(o, weights);

    DP_UNROLL
    for (int half = 0; half < 2; ++half) {
        total[half] += Gpu::template shuffle<1>(total[half]);
        total[half] += Gpu::template shuffle<2>(total[half]);
        const int row = first_query + consumer * kGroupRows + accumulator_row(thread, 2 * half);
        if (p.lse != nullptr && thread % 4 == 0 && row < p.q_rows) {
            p.lse[int64_t(head) * p.q_rows + row] = (top[half] * p.scale + log2f(total[half])) * 0.6931471805599453f;
        }
        total[half] = 1.0f / total[half];
    }

    // The result goes where the queries were, once every warp's products have read them.
    Gpu::sync_group(consumer);
    DP_UNROLL
    for (int i = 0; i < kHeadDim / 2; i += 2) {
        const int row = accumulator_row(thread, i);
        const int column = accumulator_column(thread, i);
        const uint32_t in_box = swizzled(uint32_t(row * kRowBytes + column % kBox * 2));
        const float factor = total[half_of(i)];
        Gpu::write(queries + column / kBox * kGroupRows * kRowBytes + in_box,
                   Gpu::template pack<kType>(o[i] * factor, o[i + 1] * factor));
    }
    Gpu::publish_writes();
    Gpu::sync_group(consumer);
    if (thread == 0) {
        for (int box = 0; box < At::kBoxes; ++box) {
            Gpu::store(out, head * kHeadDim + box * kBox, first_query + consumer * kGroupRows,
                       queries + box * kGroupRows * kRowBytes);
        }
        Gpu::wait_stores();
    }
}

template <class Gpu, DType kType, int kHeadDim>
DP_DEVICE void attend(const Problem& p, uint32_t shared, typename Gpu::Map q, typename Gpu::Map k, typename Gpu::Map v,
                      typename Gpu::Map out) {
    using At = Shared<kHeadDim>;
    const int first_query = Gpu::block_x() * kBlockM;
    const int head = Gpu::block_y();
    if (Gpu::thread() == 0) {
        constexpr int kWarps = kConsumers * kGroup / kWarp;
        Gpu::init(shared + At::kQueriesFull, 1);
        for (int stage = 0; stage < At::kStages; ++stage) {
            Gpu::init(shared + At::kKeysFull + 8 * stage, 1);
            Gpu::init(shared + At::kKeysEmpty + 8 * stage, kWarps);
            Gpu::init(shared + At::kValuesFull + 8 * stage, 1);
            Gpu::init(shared + At::kValuesEmpty + 8 * stage, kWarps);
        }
        Gpu::publish_barriers();
    }
    Gpu::sync_block();
    const int group = Gpu::group();
    if (group == 0) {
        Gpu::template shrink_registers<kProducerRegisters>();
        if (Gpu::thread() == 0) produce<Gpu, kHeadDim>(p, shared, q, k, v, first_query, head * kHeadDim);
    } else {
        Gpu::template grow_registers<kConsumerRegisters>();
        consume<Gpu, kType, kHeadDim>(p, shared, out, group - 1, first_query, head);
    }
}

}  // namespace hopper
}  // namespace dualparal
