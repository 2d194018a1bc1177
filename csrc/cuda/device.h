// What the kernels of this folder are written against: the part of CUDA that they use, and no more. The same source
// compiles two ways. nvcc makes device code of it; any other C++17 compiler makes host code that runs on the emulator
// (emulator.h), one CUDA thread after the other, so that kernels run in tests and under sanitizers without a GPU.
//
// A kernel takes one trivially copyable struct by value, has dynamic shared memory only (shared_memory<S>()), and is
// started by launch():
//
//     struct Params { const float* from; float* to; std::int64_t size; };
//     struct Shared { float tile[256]; };
//
//     __global__ void __launch_bounds__(256) kernel(const __grid_constant__ Params p) {
//         Shared& shared = shared_memory<Shared>();
//         ...
//     }
//
//     launch("copy", kernel, LaunchShape{blocks, 256, sizeof(Shared)}, stream, p);
//
// Blocks and threads are counted in x alone. Threads of a block are a multiple of 32.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace sparsekern::cuda {

// A cudaStream_t; the emulator ignores it.
using Stream = void*;

// A failed call of the CUDA runtime, or what the emulator found wrong with a kernel. The text names kernel and call.
struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct LaunchShape {
    std::int64_t blocks;
    int threads;
    std::size_t shared_bytes = 0;
    int cluster = 1;  // blocks that run together; divides `blocks`
};

struct alignas(16) Pack16 {
    std::uint32_t word[4];
};

struct Launch {
    std::string name;
    LaunchShape shape;
};

// Where launches go instead of to a device, while this is set: what a call would ask of one can then be read where there
// is none, and nothing is read or written. The functions that describe the device answer for an H100.
inline std::vector<Launch>* recorded_launches = nullptr;

}  // namespace sparsekern::cuda

#if defined(__CUDACC__)

namespace sparsekern::cuda {

// On the host.

inline void check(cudaError_t status, const std::string& call) {
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();  // the next call is not to report it again
    throw CudaError(call + ": " + cudaGetErrorString(status));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

inline int multiprocessors() {
    return recorded_launches ? 132 : device_attribute(cudaDevAttrMultiProcessorCount);
}

// Bytes that a block can have.
inline std::size_t shared_memory_limit() {
    if (recorded_launches) return 227 * 1024;
    return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// 80 for compute capability 8.0.
inline int compute_capability() {
    if (recorded_launches) return 90;
    return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

inline void set_bytes(void* to, int byte, std::size_t bytes, Stream stream) {
    if (recorded_launches) return;
    check(cudaMemsetAsync(to, byte, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, Stream stream, const Params& params) {
    static_assert(std::is_trivially_copyable_v<Params>);
    if (shape.blocks == 0) return;
    if (recorded_launches) return recorded_launches->push_back({name, shape});
    const auto call = [name](const char* function) { return std::string("kernel ") + name + ": " + function; };
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shape.shared_bytes > 48 * 1024)  // more must be asked for
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shape.shared_bytes)),
              call("cudaFuncSetAttribute"));
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
    void* arguments[] = {const_cast<Params*>(&params)};
    check(cudaLaunchKernelExC(&config, function, arguments), call("cudaLaunchKernelExC"));
}

// On the device.

// The block's dynamic shared memory. The same memory for every S.
template <class S>
__device__ __forceinline__ S& shared_memory() {
    extern __shared__ __align__(1024) unsigned char sparsekern_shared[];
    return *reinterpret_cast<S*>(sparsekern_shared);
}

// Barriers 1 to 15 of a block, each for `threads` threads (a multiple of 32) in all that wait or only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Of flags that blocks pass to each other through global memory. T: int, unsigned, unsigned long long.
template <class T>
__device__ __forceinline__ T load_acquire(const T* from) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    if constexpr (sizeof(T) == 4) {
        unsigned value;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
        return static_cast<T>(value);
    } else {
        unsigned long long value;
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
        return static_cast<T>(value);
    }
}

template <class T>
__device__ __forceinline__ void store_release(T* to, std::common_type_t<T> value) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    if constexpr (sizeof(T) == 4)
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(static_cast<unsigned>(value)) : "memory");
    else
        asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(static_cast<unsigned long long>(value))
                     : "memory");
}

// 16 bytes of global memory that no thread writes during the kernel, at a multiple of 16.
__device__ __forceinline__ Pack16 load16(const void* from) {
    Pack16 pack;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(pack.word[0]), "=r"(pack.word[1]), "=r"(pack.word[2]), "=r"(pack.word[3])
        : "l"(from));
    return pack;
}

// The same, of what is read once: it takes no room in L1.
__device__ __forceinline__ Pack16 load16_streaming(const void* from) {
    Pack16 pack;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(pack.word[0]), "=r"(pack.word[1]), "=r"(pack.word[2]), "=r"(pack.word[3])
        : "l"(from));
    return pack;
}

__device__ __forceinline__ void store16(void* to, const Pack16& pack) {
    *static_cast<uint4*>(to) = make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]);
}

// The same, of what is not soon read again.
__device__ __forceinline__ void store16_streaming(void* to, const Pack16& pack) {
    __stcs(static_cast<uint4*>(to), make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]));
}

// Ends the launch with an error. The emulator also says why.
__device__ __forceinline__ void trap(const char*) { __trap(); }

}  // namespace sparsekern::cuda

#else
#include "cuda/emulator.h"
#endif

// Numbers, on host and device.

namespace sparsekern::cuda {

template <class T>
__host__ __device__ __forceinline__ constexpr T min_of(T a, std::common_type_t<T> b) {
    return b < a ? b : a;
}

template <class T>
__host__ __device__ __forceinline__ constexpr T max_of(T a, std::common_type_t<T> b) {
    return a < b ? b : a;
}

template <class T>
__host__ __device__ __forceinline__ constexpr T ceil_div(T a, std::common_type_t<T> b) {
    return (a + b - 1) / b;
}

// Storage formats; arithmetic is in float.
struct f16 {
    std::uint16_t bits;
};
struct bf16 {
    std::uint16_t bits;
};
struct e4m3 {  // 1 sign, 4 exponent, 3 mantissa bits; largest 448, no infinity
    std::uint8_t bits;
};

enum class ElementType { float32, float16, bfloat16, float8_e4m3 };

namespace detail {

__host__ __device__ __forceinline__ float from_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

__host__ __device__ __forceinline__ std::uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

// Rounds to nearest even the magnitude `bits` of a float, normal in the narrow format too, after its bit `dropped`,
// and moves the exponent's bias down by `bias`.
__host__ __device__ __forceinline__ std::uint32_t narrowed(std::uint32_t bits, int dropped, std::uint32_t bias) {
    bits += (1u << (dropped - 1)) - 1 + ((bits >> dropped) & 1);
    return (bits - (bias << 23)) >> dropped;
}

}  // namespace detail

__host__ __device__ __forceinline__ float to_float(float value) { return value; }

__host__ __device__ __forceinline__ float to_float(f16 value) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00) return detail::from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    return detail::from_bits(sign | detail::bits_of(detail::from_bits(rest << 13) * 0x1p112f));
#endif
}

__host__ __device__ __forceinline__ float to_float(bf16 value) {
    return detail::from_bits(std::uint32_t(value.bits) << 16);
}

__host__ __device__ __forceinline__ float to_float(e4m3 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(std::uint16_t(value.bits)));
    return to_float(f16{std::uint16_t(halves)});
#else
    const std::uint32_t sign = std::uint32_t(value.bits & 0x80u) << 24, rest = value.bits & 0x7fu;
    if (rest == 0x7f) return detail::from_bits(0x7fffffffu);
    return detail::from_bits(sign | detail::bits_of(detail::from_bits(rest << 20) * 0x1p120f));
#endif
}

// To the nearest number of T, ties to even. Too large a number becomes infinity; for e4m3, 448.
template <class T>
__host__ __device__ T rounded_to(float value);

template <>
__host__ __device__ __forceinline__ float rounded_to<float>(float value) {
    return value;
}

template <>
__host__ __device__ __forceinline__ f16 rounded_to<f16>(float value) {
#if defined(__CUDA_ARCH__)
    std::uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return {bits};
#else
    const std::uint32_t sign = detail::bits_of(value) >> 16 & 0x8000u, rest = detail::bits_of(value) & 0x7fffffffu;
    std::uint32_t bits;
    if (rest > 0x7f800000u) return {0x7fff};
    if (rest >= detail::bits_of(65520.0f)) bits = 0x7c00;
    else if (rest < detail::bits_of(0x1p-14f))  // the last bit of 0.5f is the last one of small numbers of f16
        bits = detail::bits_of(detail::from_bits(rest) + 0.5f) - detail::bits_of(0.5f);
    else bits = detail::narrowed(rest, 13, 127 - 15);
    return {static_cast<std::uint16_t>(sign | bits)};
#endif
}

template <>
__host__ __device__ __forceinline__ bf16 rounded_to<bf16>(float value) {
#if defined(__CUDA_ARCH__)
    std::uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return {bits};
#else
    const std::uint32_t bits = detail::bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | detail::narrowed(bits & 0x7fffffffu, 16, 0))};
#endif
}

template <>
__host__ __device__ __forceinline__ e4m3 rounded_to<e4m3>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint16_t bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(0.0f), "f"(value));
    return {static_cast<std::uint8_t>(bits)};
#else
    const std::uint32_t sign = detail::bits_of(value) >> 24 & 0x80u, rest = detail::bits_of(value) & 0x7fffffffu;
    std::uint32_t bits;
    if (rest > 0x7f800000u) return {0x7f};
    if (rest >= detail::bits_of(448.0f)) bits = 0x7e;
    else if (rest < detail::bits_of(0x1p-6f))  // the last bit of 2^14 is the last one of small numbers of e4m3
        bits = detail::bits_of(detail::from_bits(rest) + 0x1p14f) - detail::bits_of(0x1p14f);
    else bits = detail::narrowed(rest, 20, 127 - 7);
    return {static_cast<std::uint8_t>(sign | bits)};
#endif
}

}  // namespace sparsekern::cuda
