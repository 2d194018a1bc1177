// What sm_90 has beyond device.h, as thin wrappers of PTX: barriers in shared memory that count bytes, copies of tensor
// tiles by hardware (TMA), clusters of blocks, and matrix products by groups of four warps (wgmma). Under the emulator
// the same names come from hopper_emulated.h.
//
// Products and the handing over of registers exist for sm_90a alone. A kernel that uses them has its body under
// `#if SPARSEKERN_HOPPER` and traps otherwise; its host function calls require_hopper() before it launches.
//
// Tiles in shared memory are rows of 128 bytes with the 128-byte swizzle, at a multiple of 1024 bytes.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/device.h"

#if defined(__CUDACC__)

#include <cuda.h>
#include <cudaTypedefs.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPARSEKERN_HOPPER 1
#else
#define SPARSEKERN_HOPPER 0
#endif

namespace sparsekern::cuda {

// Tensor maps, on the host.

struct TensorMap {
    CUtensorMap map;
};

namespace detail {

// The driver's function, looked up when first used, so that nothing is linked with the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
        const char* call = "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)";
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
              call);
        if (found != cudaDriverEntryPointSuccess) throw CudaError(std::string(call) + ": the driver does not have it");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    return encoder;
}

inline CUtensorMapDataType tensor_map_type(ElementType type) {
    switch (type) {
        case ElementType::float16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case ElementType::bfloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case ElementType::float8_e4m3: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
        default: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    }
}

}  // namespace detail

// A tensor of `rank` dimensions, the innermost first and contiguous, that is read in boxes of `box` elements: 128 bytes
// of the innermost dimension. `base` and the strides are multiples of 16 bytes. What is outside `dims` reads as zero.
inline TensorMap tensor_map(int rank, ElementType type, const void* base, const std::uint64_t* dims,
                            const std::uint64_t* byte_strides, const std::uint32_t* box) {
    TensorMap result{};
    if (recorded_launches) return result;
    const std::uint32_t every[5] = {1, 1, 1, 1, 1};
    const CUresult status = detail::tensor_map_encoder()(
        &result.map, detail::tensor_map_type(type), static_cast<cuuint32_t>(rank), const_cast<void*>(base),
        reinterpret_cast<const cuuint64_t*>(dims), reinterpret_cast<const cuuint64_t*>(byte_strides), box, every,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw CudaError("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
    return result;
}

// Throws where the current device cannot run code for sm_90a.
inline void require_hopper(const char* kernel) {
    const int capability = compute_capability();
    if (capability != 90)
        throw CudaError(std::string("kernel ") + kernel + ": needs a device of compute capability 9.0, not " +
                        std::to_string(capability / 10) + "." + std::to_string(capability % 10));
}

// How many clusters of a kernel the device runs at one time. Some of its multiprocessors may be left over.
template <class Params>
int clusters_at_once(const char* name, void (*kernel)(Params), const LaunchShape& shape) {
    if (recorded_launches) return multiprocessors() / shape.cluster;
    const auto call = [name](const char* function) { return std::string("kernel ") + name + ": " + function; };
    const void* function = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          call("cudaFuncSetAttribute"));
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.cluster));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, function, &config), call("cudaOccupancyMaxActiveClusters"));
    if (clusters == 0) throw CudaError(call("the device has no room for a cluster of ") + std::to_string(shape.cluster));
    return clusters;
}

namespace detail {

__device__ __forceinline__ unsigned shared_address(const void* generic) {
    return static_cast<unsigned>(__cvta_generic_to_shared(generic));
}

}  // namespace detail

// Clusters.

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ unsigned cluster_size() {
    unsigned size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Barriers in shared memory.

// A phase is complete when `count` arrivals have come and as many bytes as they announced. The first has parity 0.
struct alignas(8) Mbarrier {
    std::uint64_t state;
};

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(count)
                 : "memory");
}

// Shows initial barriers to the cluster and to the copy engine; a barrier of the threads has to follow.
__device__ __forceinline__ void mbarrier_fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(Mbarrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(detail::shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// At the barrier that lies at this place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(Mbarrier* barrier, unsigned rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(detail::shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// Until the phase of this parity is complete. Before the first one is, that of parity 1 counts as complete.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred complete;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@!complete bra again;\n}" ::"r"(detail::shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Copies of tiles.

// From global memory, asynchronously; the barrier gets all bytes of the box. c0 is the innermost coordinate.
__device__ __forceinline__ void tensor_load_2d(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            detail::shared_address(to)),
        "l"(&map), "r"(detail::shared_address(barrier)), "r"(c0), "r"(c1)
        : "memory");
}

__device__ __forceinline__ void tensor_load_3d(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1,
                                               int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(detail::shared_address(to)),
        "l"(&map), "r"(detail::shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// To the same place in every block of the cluster whose bit is set in `ranks`, and each one's barrier gets the bytes.
__device__ __forceinline__ void tensor_load_2d_multicast(void* to, const TensorMap& map, Mbarrier* barrier, int c0,
                                                         int c1, std::uint16_t ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(detail::shared_address(to)),
        "l"(&map), "r"(detail::shared_address(barrier)), "r"(c0), "r"(c1), "h"(ranks)
        : "memory");
}

__device__ __forceinline__ void tensor_load_3d_multicast(void* to, const TensorMap& map, Mbarrier* barrier, int c0,
                                                         int c1, int c2, std::uint16_t ranks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(detail::shared_address(to)),
        "l"(&map), "r"(detail::shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(ranks)
        : "memory");
}

// Matrix products.

// Of a tile whose rows go along the summed dimension. 32 bytes further along it: the descriptor plus 2.
__device__ __forceinline__ std::uint64_t matrix_descriptor(const void* tile) {
    constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62, kEightRows = std::uint64_t{1024 >> 4} << 32;
    constexpr std::uint64_t kUnused = std::uint64_t{1} << 16;  // the other stride, which this swizzle has no use for
    return kSwizzle128 | kEightRows | kUnused | (detail::shared_address(tile) & 0x3ffff) >> 4;
}

#define SPARSEKERN_8(i)                                                                                            \
    "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
        "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define SPARSEKERN_64                                                                                              \
    SPARSEKERN_8(0), SPARSEKERN_8(8), SPARSEKERN_8(16), SPARSEKERN_8(24), SPARSEKERN_8(32), SPARSEKERN_8(40), \
        SPARSEKERN_8(48), SPARSEKERN_8(56)
#define SPARSEKERN_WGMMA(kind, transposed)                                                                        \
    asm volatile(                                                                                                 \
        "{\n.reg .pred accumulate;\n"                                                                             \
        "setp.ne.b32 accumulate, %66, 0;\n"                                                                       \
        "wgmma.mma_async.sync.aligned." kind                                                                      \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "    \
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "    \
        "%62, %63}, %64, %65, accumulate, 1, 1" transposed ";\n}"                                                 \
        : SPARSEKERN_64                                                                                           \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// acc (+)= A·Bᵀ over 32 bytes of k: A 64 rows, B 128. Thread t of the group of 128 has in acc[4·j + 2·h + c] row
// 16·(t / 32) + t % 32 / 4 + 8·h, column 8·j + 2·(t % 4) + c. Asynchronous: nobody touches acc until wgmma_wait.
template <class T>
__device__ __forceinline__ void wgmma_64x128(float (&acc)[64], std::uint64_t a, std::uint64_t b, bool accumulate) {
    static_assert(std::is_same_v<T, f16> || std::is_same_v<T, bf16> || std::is_same_v<T, e4m3>);
    if constexpr (std::is_same_v<T, f16>) SPARSEKERN_WGMMA("m64n128k16.f32.f16.f16", ", 0, 0");
    if constexpr (std::is_same_v<T, bf16>) SPARSEKERN_WGMMA("m64n128k16.f32.bf16.bf16", ", 0, 0");
    if constexpr (std::is_same_v<T, e4m3>) SPARSEKERN_WGMMA("m64n128k32.f32.e4m3.e4m3", "");
}

// Keeps the compiler from moving uses of acc across this place.
__device__ __forceinline__ void wgmma_hold(float (&acc)[64]) { asm volatile("" : SPARSEKERN_64::"memory"); }

#undef SPARSEKERN_WGMMA
#undef SPARSEKERN_64
#undef SPARSEKERN_8

// Before the first product of accumulators that other instructions have touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` of the groups committed last are not done.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Registers.

// R registers a thread, for all warps of a warpgroup; a multiple of 8.
template <int R>
__device__ __forceinline__ void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}

template <int R>
__device__ __forceinline__ void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

}  // namespace sparsekern::cuda

#else

#define SPARSEKERN_HOPPER 1
#include "cuda/hopper_emulated.h"

namespace sparsekern::cuda {

inline void require_hopper(const char*) {}

template <class Params>
int clusters_at_once(const char*, void (*)(Params), const LaunchShape& shape) {
    return max_of(multiprocessors() / shape.cluster, 1);
}

inline void wgmma_hold(float (&)[64]) {}

}  // namespace sparsekern::cuda

#endif
