#include "attention_hopper.h"

#include <cuda.h>  // types of the driver; nothing links it, so that the extension loads where there is none
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_hopper_kernel.h"

namespace dualparal {
namespace {

using namespace hopper;

// Eight accumulators as operands, and the names of 32 and 64 operands in PTX.
#define DP_F8(d, i)                                                                                            \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define DP_F32(d, i) DP_F8(d, i), DP_F8(d, i + 8), DP_F8(d, i + 16), DP_F8(d, i + 24)
#define DP_F64(d) DP_F32(d, 0), DP_F32(d, 32)
#define DP_NAMES32                                                                                       \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
    "%27,%28,%29,%30,%31"
#define DP_NAMES64                                                                                             \
    DP_NAMES32                                                                                                 \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
    "%58,%59,%60,%61,%62,%63"

// Both operands in shared memory with contiguous K; `fresh` products do not add to what is there.
#define DP_MULTIPLY_SHARED(type)                                                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" DP_NAMES64                  \
                 "}, %64, %65, p, 1, 1, 0, 0;\n}"                                                              \
                 : DP_F64(d)                                                                                   \
                 : "l"(a), "l"(b), "r"(int(add)))
// The left operand in registers, the right one with contiguous N (transposed).
#define DP_MULTIPLY_REGISTERS_64(type)                                                                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" DP_NAMES32                   \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                   \
                 : DP_F32(d, 0)                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define DP_MULTIPLY_REGISTERS_128(type)                                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" DP_NAMES64                  \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                   \
                 : DP_F64(d)                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

struct Gpu {
    using Map = const CUtensorMap*;

    static DP_DEVICE int thread() { return int(threadIdx.x); }
    static DP_DEVICE int block_x() { return int(blockIdx.x); }
    static DP_DEVICE int block_y() { return int(blockIdx.y); }
    // By a shuffle, so that the compiler knows it to be the same in a warp.
    static DP_DEVICE int group() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / kGroup, 0); }

    template <int kRegisters>
    static DP_DEVICE void shrink_registers() {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
    }
    template <int kRegisters>
    static DP_DEVICE void grow_registers() {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
    }

    // Barriers: 0 is __syncthreads, 1 and 2 the consumers' turns, 3 and 4 one for each consumer alone.
    static DP_DEVICE void sync_block() { __syncthreads(); }
    static DP_DEVICE void wait_turn(int consumer) {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + consumer), "n"(2 * kGroup) : "memory");
    }
    static DP_DEVICE void pass_turn(int consumer) {
        asm volatile("bar.arrive %0, %1;" ::"r"(1 + consumer), "n"(2 * kGroup) : "memory");
    }
    static DP_DEVICE void sync_group(int consumer) {
        asm volatile("bar.sync %0, %1;" ::"r"(3 + consumer), "n"(kGroup) : "memory");
    }

    // mbarrier
    static DP_DEVICE void init(uint32_t barrier, int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
    }
    static DP_DEVICE void publish_barriers() {
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    static DP_DEVICE void expect(uint32_t barrier, uint32_t bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    }
    static DP_DEVICE void arrive(uint32_t barrier) {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
    }
    static DP_DEVICE void wait(uint32_t barrier, uint32_t parity) {
        asm volatile(
            "{\n.reg .pred done;\nAGAIN:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra AGAIN;\n}" ::"r"(barrier),
            "r"(parity)
            : "memory");
    }

    // TMA
    static DP_DEVICE void load(uint32_t to, Map map, int column, int row, uint32_t barrier) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                to),
            "l"(map), "r"(column), "r"(row), "r"(barrier)
            : "memory");
    }
    static DP_DEVICE void store(Map map, int column, int row, uint32_t from) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                     "r"(column), "r"(row), "r"(from)
                     : "memory");
    }
    static DP_DEVICE void wait_stores() {  // until they have read shared memory, which goes with the thread block
        asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    static DP_DEVICE void write(uint32_t to, uint32_t value) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
    }
    static DP_DEVICE void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

    // wgmma. The compiler sees an asm statement as finished when it is issued: these keep every use of the registers
    // on the right side of a fence or a wait.
    static DP_DEVICE void hold(float& x) { asm volatile("" : "+f"(x)::"memory"); }
    static DP_DEVICE void hold(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
    template <class T, int N>
    static DP_DEVICE void hold(T (&values)[N]) {
        DP_UNROLL
        for (int i = 0; i < N; ++i) hold(values[i]);
    }
    template <class... Arrays>
    static DP_DEVICE void fence(Arrays&... arrays) {
        (hold(arrays), ...);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    }
    static DP_DEVICE void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
    template <int kPending, class... Arrays>
    static DP_DEVICE void wait_products(Arrays&... arrays) {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
        (hold(arrays), ...);
    }
    template <DType kType>
    static DP_DEVICE void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
        if constexpr (kType == DType::bf16) {
            DP_MULTIPLY_SHARED("bf16");
        } else {
            DP_MULTIPLY_SHARED("f16");
        }
    }
    template <DType kType>
    static DP_DEVICE void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
        if constexpr (kType == DType::bf16) {
            DP_MULTIPLY_REGISTERS_64("bf16");
        } else {
            DP_MULTIPLY_REGISTERS_64("f16");
        }
    }
    template <DType kType>
    static DP_DEVICE void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
        if constexpr (kType == DType::bf16) {
            DP_MULTIPLY_REGISTERS_128("bf16");
        } else {
            DP_MULTIPLY_REGISTERS_128("f16");
        }
    }

    template <int kMask>
    static DP_DEVICE float shuffle(float x) {
        return __shfl_xor_sync(0xffffffffu, x, kMask);
    }
    static DP_DEVICE float exp2(float x) {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
    template <DType kType>
    static DP_DEVICE uint32_t pack(float low, float high) {
        uint32_t both;
        if constexpr (kType == DType::bf16) {
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        } else {
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        }
        return both;
    }
};

template <DType kType, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                            const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap out,
                            const Problem p) {
    extern __shared__ __align__(kEightRows) unsigned char memory[];
    const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
    if (shared % kEightRows != 0) __trap();  // descriptors would mean other bytes
    attend<Gpu, kType, kHeadDim>(p, shared, &q, &k, &v, &out);
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
               "cudaGetDriverEntryPoint(cuTensorMapEncodeTiled)");
#endif
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
        fail<std::runtime_error>("this driver has no cuTensorMapEncodeTiled (", int(result), "): it needs CUDA 12.0");
    }
    return reinterpret_cast<Encode>(found);
}

// A matrix that TMA moves in boxes of kBox columns; beyond `rows` it reads zeros and writes nothing.
CUtensorMap tensor_map(const char* name, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                       DType dtype) {
    static const Encode encode = find_encode();
    if (rows == 1) stride = columns;  // a single row has no distance to a next one, and torch may say anything
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)};
    const cuuint64_t strides[] = {cuuint64_t(stride) * 2};
    const cuuint32_t box[] = {kBox, cuuint32_t(box_rows)};
    const cuuint32_t steps[] = {1, 1};
    CUtensorMap map;
    const CUresult status =
        encode(&map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
               const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        fail<std::runtime_error>("cuTensorMapEncodeTiled of ", name, " at ", data, ", ", rows, " rows of ", columns,
                                 ", stride ", stride, ": CUDA driver error ", int(status));
    }
    return map;
}

template <DType kType, int kHeadDim>
void launch(const AttentionHopperParams& p, cudaStream_t stream) {
    const auto kernel = attention_hopper_kernel<kType, kHeadDim>;
    constexpr int bytes = int(Shared<kHeadDim>::kBytes);
    static_assert(bytes <= 227 * 1024, "what a thread block may have");
    // Per device and cheap, and no operation of a stream: allowed while a graph is captured.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "cudaFuncSetAttribute(attention_hopper, shared memory)");
    const int64_t inner = p.heads * kHeadDim;
    const CUtensorMap q = tensor_map("q", p.q, p.q_rows, inner, p.q_stride, kGroupRows, kType);
    const CUtensorMap k = tensor_map("k", p.k, p.k_rows, inner, p.k_stride, kBlockN, kType);
    const CUtensorMap v = tensor_map("v", p.v, p.k_rows, inner, p.v_stride, kBlockN, kType);
    const CUtensorMap out = tensor_map("out", p.out, p.q_rows, inner, inner, kGroupRows, kType);
    const Problem problem{p.lse, int(p.q_rows), int(p.k_rows), float(1.4426950408889634 / std::sqrt(double(kHeadDim)))};
    // Thread blocks of one head run together: they share its keys in the L2 cache.
    const dim3 grid(unsigned(tiles(int(p.q_rows), kBlockM)), unsigned(p.heads));
    kernel<<<grid, kThreads, bytes, stream>>>(q, k, v, out, problem);
    check_cuda(cudaGetLastError(), "attention_hopper launch");
}

}  // namespace

void attention_hopper_cuda(const AttentionHopperParams& p, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto run = p.dtype == DType::bf16
                         ? (p.head_dim == 64 ? launch<DType::bf16, 64> : launch<DType::bf16, 128>)
                         : (p.head_dim == 64 ? launch<DType::f16, 64> : launch<DType::f16, 128>);
    run(p, as<CUstream_st>(stream));
}

}  // namespace dualparal
