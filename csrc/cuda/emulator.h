// The emulator: kernels on the host, thread by thread. device.h includes this where a plain C++ compiler reads a kernel.
//
// Every CUDA thread is a fiber. A fiber runs until it has to wait (for a barrier, for the other lanes of its warp) or
// touches an atomic; then the next one that can go on does. Blocks of a cluster run together, others one after the
// other. All fibers of a launch run on the thread that launches.
//
// A kernel that does wrong ends its launch with a CudaError that says what and where: threads that wait for each other
// (what each waits for), lanes that meet in different collectives, misaligned 16-byte accesses, too much shared memory.
// Shared memory starts as NaN, whatever the float type, and has the size that the launch gave, so that
// AddressSanitizer sees an access beyond it. ThreadSanitizer knows the fibers as threads that are ordered by barriers,
// atomics and fences only: a missing barrier is a race that it reports, in whatever order the fibers ran.
//
// SPARSEKERN_EMULATOR_ORDER=<number> lets fibers and blocks run in an order drawn from this seed, and fall behind;
// without it they take turns.
#pragma once

#if !defined(__CUDACC__)

#include <array>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace sparsekern::cuda {

struct Index {
    unsigned x;
};

// Of the thread that runs.
extern Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Why a thread does not go on. It lies on the stack of the thread that waits.
struct Wait {
    virtual bool over() const = 0;
    virtual std::string text() const = 0;  // goes on from "threads 0 to 31 wait "

protected:
    ~Wait() = default;
};

// Lanes of a warp that exchange a value, as one collective of one mask.
struct Meeting {
    const char* kind = nullptr;  // null: not in use
    unsigned mask = 0, arrived = 0, left = 0;
    std::uint64_t value[32] = {};
};

struct Barrier {
    unsigned threads = 0, arrived = 0;
    std::uint64_t generation = 0;
    char ordered_by[2] = {};  // for ThreadSanitizer, one for even generations and one for odd
};

struct Hopper;  // hopper_emulated.h

struct Block {
    unsigned index = 0, rank = 0;  // in the grid, in the cluster
    unsigned threads = 0, ended = 0;
    unsigned char* shared = nullptr;
    std::size_t shared_bytes = 0;
    Barrier barriers[16];
    std::vector<std::array<Meeting, 32>> warps;
    std::shared_ptr<Hopper> hopper;
};

// Of the thread that runs. A kernel's cluster, in the order of ranks.
Block& block();
std::vector<Block>& cluster();

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what);

// Lets other threads run until `wait` is over, or for a turn.
void wait_for(const Wait& wait);
void yield();

// Has `action` carried out by the scheduler a few turns later, drawn at random: what hardware does on its own. What it
// reads and writes there it says by reads() and writes(). `what` names it if the launch ends before.
void later(std::string what, std::function<void()> action);

// Lanes of `mask` wait for each other; answers the value of each. `orders`: and their accesses to memory.
Meeting meet(const char* kind, unsigned mask, std::uint64_t value, bool orders = false);

// Arrives at a barrier for `threads` threads; waits there too if asked.
void barrier(int id, unsigned threads, bool waits);
void cluster_barrier();

unsigned char* shared(std::size_t bytes);

// What ThreadSanitizer is told: what happens before release(tag) happens before what follows acquire(tag); an action
// reads or writes a range. Nothing without it.
void acquire(const void* tag);
void release(const void* tag);
void reads(const void* from, std::size_t bytes);
void writes(void* to, std::size_t bytes);

// While one exists, ThreadSanitizer does not look: the emulator's own memory is shared by all fibers.
struct Unseen {
    Unseen();
    ~Unseen();
    Unseen(const Unseen&) = delete;
    Unseen& operator=(const Unseen&) = delete;
};

// Before and after an atomic access, with a turn for others: who waits for a flag must let its owner run. `polls`: the
// access changed nothing and will be repeated, so that threads that do only this are in a deadlock.
void atomic_begins(const void* address, std::size_t bytes);
void atomic_ends(const void* address, bool polls);

void run(const char* name, const LaunchShape& shape, const std::function<void()>& thread);

template <class T>
std::uint64_t packed(T value) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a 32-bit or 64-bit number");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T unpacked(std::uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The value that the lane `from` brought.
template <class T>
T brought(const Meeting& meeting, unsigned from) {
    if (!(meeting.mask >> from & 1))
        fail(std::string(meeting.kind) + " reads lane " + std::to_string(from) + ", which is not in the mask");
    return unpacked<T>(meeting.value[from]);
}

inline unsigned lane() { return threadIdx.x % 32; }

template <class T, class F>
T reduced(const char* kind, unsigned mask, T value, F f) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "int or unsigned");
    const Meeting meeting = meet(kind, mask, packed(value));
    bool first = true;
    T all{};
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1) {
            const T next = unpacked<T>(meeting.value[i]);
            all = first ? next : f(all, next);
            first = false;
        }
    return all;
}

// *address = f(*address), and the value before.
template <class T, class F>
T updated(T* address, F f) {
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    auto* bits = reinterpret_cast<Bits*>(address);
    atomic_begins(address, sizeof(T));
    const T before = unpacked<T>(__atomic_load_n(bits, __ATOMIC_RELAXED));
    const T after = f(before);
    const bool same = packed(after) == packed(before);
    __atomic_store_n(bits, static_cast<Bits>(packed(after)), __ATOMIC_RELAXED);
    atomic_ends(address, same);
    return before;
}

template <class T>
constexpr bool is_atomic_integer =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

}  // namespace emulator

// On the host.

inline int multiprocessors() { return recorded_launches ? 132 : 4; }
inline std::size_t shared_memory_limit() { return 227 * 1024; }
inline int compute_capability() { return 90; }
inline void set_bytes(void* to, int byte, std::size_t bytes, Stream) {
    if (bytes && !recorded_launches) std::memset(to, byte, bytes);
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, Stream, const Params& params) {
    static_assert(std::is_trivially_copyable_v<Params>);
    if (shape.blocks == 0) return;
    if (recorded_launches) return recorded_launches->push_back({name, shape});
    emulator::run(name, shape, [&] { kernel(params); });
}

// Memory, barriers and errors.

template <class S>
S& shared_memory() {
    return *reinterpret_cast<S*>(emulator::shared(sizeof(S)));
}

inline void __syncthreads() { emulator::barrier(0, blockDim.x, true); }
inline void named_barrier_sync(int id, int threads) { emulator::barrier(id, static_cast<unsigned>(threads), true); }
inline void named_barrier_arrive(int id, int threads) { emulator::barrier(id, static_cast<unsigned>(threads), false); }

[[noreturn]] inline void trap(const char* why) { emulator::fail(std::string("trap: ") + why); }

inline Pack16 load16(const void* from) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16) emulator::fail("a 16-byte load at no multiple of 16");
    return *static_cast<const Pack16*>(from);
}
inline Pack16 load16_streaming(const void* from) { return load16(from); }

inline void store16(void* to, const Pack16& pack) {
    if (reinterpret_cast<std::uintptr_t>(to) % 16) emulator::fail("a 16-byte store at no multiple of 16");
    *static_cast<Pack16*>(to) = pack;
}
inline void store16_streaming(void* to, const Pack16& pack) { store16(to, pack); }

// Lanes of a warp.

void __syncwarp(unsigned mask = 0xffffffffu);

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const emulator::Meeting meeting = emulator::meet("__shfl_sync", mask, emulator::packed(value));
    const unsigned group = emulator::lane() / width * width;
    return emulator::brought<T>(meeting, group + static_cast<unsigned>(from) % width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const emulator::Meeting meeting = emulator::meet("__shfl_xor_sync", mask, emulator::packed(value));
    const unsigned lane = emulator::lane(), from = lane ^ static_cast<unsigned>(bits);
    return from >= lane / width * width + width ? value : emulator::brought<T>(meeting, from);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const emulator::Meeting meeting = emulator::meet("__shfl_up_sync", mask, emulator::packed(value));
    const unsigned lane = emulator::lane();
    return lane % width < delta ? value : emulator::brought<T>(meeting, lane - delta);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const emulator::Meeting meeting = emulator::meet("__shfl_down_sync", mask, emulator::packed(value));
    const unsigned lane = emulator::lane();
    return lane % width + delta >= static_cast<unsigned>(width) ? value
                                                                : emulator::brought<T>(meeting, lane + delta);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const emulator::Meeting meeting = emulator::meet("__ballot_sync", mask, predicate != 0);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1 && meeting.value[i]) bits |= 1u << i;
    return bits;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
    return emulator::reduced("__reduce_add_sync", mask, value, [](T a, T b) {
        return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));  // wraps
    });
}

template <class T>
T __reduce_min_sync(unsigned mask, T value) {
    return emulator::reduced("__reduce_min_sync", mask, value, [](T a, T b) { return b < a ? b : a; });
}

template <class T>
T __reduce_max_sync(unsigned mask, T value) {
    return emulator::reduced("__reduce_max_sync", mask, value, [](T a, T b) { return a < b ? b : a; });
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    const emulator::Meeting meeting = emulator::meet("__match_any_sync", mask, emulator::packed(value));
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1 && meeting.value[i] == emulator::packed(value)) bits |= 1u << i;
    return bits;
}

// Atomics are relaxed, as in CUDA; __threadfence() before and after is what orders other memory.

void __threadfence();
inline void __threadfence_block() { __threadfence(); }
void __nanosleep(unsigned);

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    static_assert(emulator::is_atomic_integer<T> || std::is_same_v<T, float>);
    return emulator::updated(address, [value](T before) {
        if constexpr (std::is_same_v<T, int>)
            return static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(value));  // wraps
        else
            return static_cast<T>(before + value);
    });
}

template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
    static_assert(emulator::is_atomic_integer<T>);
    return emulator::updated(address, [value](T before) { return before < value ? value : before; });
}

template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
    static_assert(emulator::is_atomic_integer<T>);
    return emulator::updated(address, [value](T before) { return value < before ? value : before; });
}

template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
    static_assert(emulator::is_atomic_integer<T>);
    return emulator::updated(address, [value](T before) { return before | value; });
}

template <class T>
T atomicAnd(T* address, std::common_type_t<T> value) {
    static_assert(emulator::is_atomic_integer<T>);
    return emulator::updated(address, [value](T before) { return before & value; });
}

template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
    static_assert(emulator::is_atomic_integer<T> || std::is_same_v<T, float>);
    return emulator::updated(address, [value](T) { return value; });
}

template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    static_assert(emulator::is_atomic_integer<T>);
    return emulator::updated(address, [=](T before) { return before == expected ? value : before; });
}

template <class T>
T load_acquire(const T* from) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    emulator::atomic_begins(from, sizeof(T));
    const T value = __atomic_load_n(from, __ATOMIC_ACQUIRE);
    emulator::atomic_ends(from, true);
    return value;
}

template <class T>
void store_release(T* to, std::common_type_t<T> value) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    emulator::atomic_begins(to, sizeof(T));
    __atomic_store_n(to, value, __ATOMIC_RELEASE);
    emulator::atomic_ends(to, false);
}

// Arithmetic that is an intrinsic of CUDA.

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline int __clzll(long long bits) { return bits ? __builtin_clzll(static_cast<unsigned long long>(bits)) : 64; }
inline unsigned __brev(unsigned bits) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned __float_as_uint(float value) { return emulator::unpacked<unsigned>(emulator::packed(value)); }
inline int __float_as_int(float value) { return emulator::unpacked<int>(emulator::packed(value)); }
inline float __uint_as_float(unsigned bits) { return emulator::unpacked<float>(bits); }
inline float __int_as_float(int bits) { return emulator::unpacked<float>(emulator::packed(bits)); }
// One rounding each, never contracted.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }

}  // namespace sparsekern::cuda

#endif
