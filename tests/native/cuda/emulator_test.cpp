// The emulator and device.h: every primitive against a plain loop, and every wrong use against its error.
#include "cuda_test.h"

using namespace sparsekern::cuda;
using namespace sparsekern::test;

namespace {

// The numbers.

double value_of(int bits, int exponent_bits, int mantissa_bits, bool has_infinity) {
    const int sign = bits >> (exponent_bits + mantissa_bits) & 1, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
    const bool top = exponent == (1 << exponent_bits) - 1;
    double value = exponent ? std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                            : std::ldexp(mantissa, 1 - bias - mantissa_bits);
    if (top && has_infinity) value = mantissa ? std::nan("") : INFINITY;
    if (top && !has_infinity && mantissa == (1 << mantissa_bits) - 1) value = std::nan("");
    return sign ? -value : value;
}

template <class T>
using Bits = decltype(T::bits);

template <class T>
void check_numbers(int exponent_bits, int mantissa_bits, bool has_infinity) {
    const int magnitudes = 1 << (exponent_bits + mantissa_bits);
    const auto value = [=](int bits) { return value_of(bits, exponent_bits, mantissa_bits, has_infinity); };
    int largest = 0;
    for (int bits = 0; bits < 2 * magnitudes; ++bits) {
        const double exact = value(bits), got = to_float(T{static_cast<Bits<T>>(bits)});
        CHECK(std::isnan(exact) ? std::isnan(got) : got == exact && std::signbit(got) == std::signbit(exact),
              "bits " << bits << " are " << exact << ", not " << got);
        if (!std::isnan(exact) && std::isfinite(exact) && bits < magnitudes) largest = bits;
        if (std::isnan(exact)) continue;
        const int back = rounded_to<T>(static_cast<float>(exact)).bits;
        CHECK(std::isnan(exact) || back == bits, exact << " gives " << back << ", not " << bits);
    }
    // Between two neighbours: the nearer one, and at the middle the even one.
    for (int bits = 0; bits < largest; ++bits) {
        const float low = static_cast<float>(value(bits)), high = static_cast<float>(value(bits + 1));
        const float middle = low + (high - low) / 2;
        const int even = bits % 2 ? bits + 1 : bits;
        for (const float sign : {1.0f, -1.0f}) {
            const int flag = sign < 0 ? magnitudes : 0;
            CHECK(rounded_to<T>(sign * middle).bits == (flag | even), "middle above " << low);
            CHECK(rounded_to<T>(sign * std::nextafter(middle, low)).bits == (flag | bits), "below " << middle);
            CHECK(rounded_to<T>(sign * std::nextafter(middle, high)).bits == (flag | (bits + 1)), "above " << middle);
        }
    }
    CHECK(std::isnan(to_float(rounded_to<T>(NAN))), "NaN");
    CHECK(rounded_to<T>(INFINITY).bits == largest + (has_infinity ? 1 : 0), "infinity");
    CHECK(rounded_to<T>(std::numeric_limits<float>::max()).bits == largest + (has_infinity ? 1 : 0), "too large");
}

// Kernels.

struct Marks {
    int* seen;
};

__global__ void __launch_bounds__(64) mark(const __grid_constant__ Marks p) {
    p.seen[blockIdx.x * blockDim.x + threadIdx.x] += 1000 * static_cast<int>(gridDim.x) + 1;
}

struct Reverse {
    const int* from;
    int* to;
    bool barrier;
};

struct ReverseShared {
    int values[256];
};

__global__ void __launch_bounds__(256) reverse(const __grid_constant__ Reverse p) {
    ReverseShared& shared = shared_memory<ReverseShared>();
    const unsigned thread = threadIdx.x;
    for (int round = 0; round < 3; ++round) {
        shared.values[thread] = p.from[blockIdx.x * 256 + thread] + round;
        if (p.barrier) __syncthreads();
        p.to[blockIdx.x * 256 + thread] = shared.values[255 - thread];
        if (p.barrier) __syncthreads();
    }
}

struct Leaving {
    unsigned* total;
    int leaving;
};

// Whole warps leave early, and the others' barrier does not wait for them.
__global__ void leave_early(const __grid_constant__ Leaving p) {
    unsigned& sum = shared_memory<unsigned>();
    if (threadIdx.x == 96) sum = 0;
    if (threadIdx.x < static_cast<unsigned>(p.leaving)) return;
    __syncthreads();
    atomicAdd(&sum, threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 96) *p.total = sum;
}

struct Handing {
    int* got;
    int rounds;
    bool lacking;
};

struct HandingShared {
    int slot[32];
};

// One warp fills a slot that another one empties, by barriers 1 (full) and 2 (empty).
__global__ void hand_over(const __grid_constant__ Handing p) {
    HandingShared& shared = shared_memory<HandingShared>();
    const unsigned lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        for (int round = 0; round < p.rounds; ++round) {
            if (round > 0) named_barrier_sync(2, 64);
            shared.slot[31 - lane] = 100 * round + static_cast<int>(lane);
            named_barrier_arrive(1, 64);
        }
    } else {
        for (int round = 0; round < p.rounds + (p.lacking ? 1 : 0); ++round) {
            named_barrier_sync(1, 64);
            p.got[32 * round + lane] = shared.slot[lane];
            if (round + 1 < p.rounds) named_barrier_arrive(2, 64);
        }
    }
}

struct Lanes {
    const int* from;
    int* to;  // [what][lane]
    unsigned mask;
};

__global__ void exchange(const __grid_constant__ Lanes p) {
    const unsigned lane = threadIdx.x;
    if (!(p.mask >> lane & 1)) return;
    const int value = p.from[lane];
    int what = 0;
    const auto put = [&](int result) { p.to[32 * what++ + lane] = result; };
    put(__shfl_sync(p.mask, value, static_cast<int>(31 - lane)));
    put(__shfl_sync(p.mask, value, 5, 8));
    put(__shfl_xor_sync(p.mask, value, 31));
    put(__shfl_up_sync(p.mask, value, 0));
    put(static_cast<int>(__shfl_sync(p.mask, (1ll << 32) * value, static_cast<int>(31 - lane)) >> 32));
    put(static_cast<int>(__shfl_sync(p.mask, static_cast<float>(value), static_cast<int>(31 - lane))));
    put(static_cast<int>(__ballot_sync(p.mask, value > 0)));
    put(__any_sync(p.mask, value > 7) * 10 + __all_sync(p.mask, value > -100));
    put(__reduce_add_sync(p.mask, value));
    put(__reduce_min_sync(p.mask, value));
    put(__reduce_max_sync(p.mask, value));
    put(static_cast<int>(__reduce_max_sync(p.mask, static_cast<unsigned>(value))));
    put(static_cast<int>(__match_any_sync(p.mask, value)));
    if (p.mask != 0xffffffffu) return;
    put(__shfl_up_sync(p.mask, value, 3));
    put(__shfl_down_sync(p.mask, value, 3));
    put(__shfl_down_sync(p.mask, value, 3, 8));
    put(__shfl_xor_sync(p.mask, value, 4, 8));
}

// Odd and even lanes meet apart, several times, before all do.
__global__ void meet_apart(const __grid_constant__ Lanes p) {
    const unsigned lane = threadIdx.x % 32, mine = lane % 2 ? 0xaaaaaaaau : 0x55555555u;
    int sum = p.from[lane];
    for (int i = 0; i < (lane % 2 ? 5 : 2); ++i) sum = __reduce_add_sync(mine, sum) % 1000;
    p.to[threadIdx.x] = __reduce_add_sync(0xffffffffu, sum);
}

struct Nothing {
    int what;
};

__global__ void do_wrong(const __grid_constant__ Nothing p) {
    const unsigned thread = threadIdx.x;
    alignas(16) char memory[32] = {};
    switch (p.what) {
        case 0:
            if (thread < 32) named_barrier_sync(3, 64);
            else __syncthreads();
            break;
        case 1:
            if (thread != 5) __syncwarp();
            break;
        case 2:
            if (thread % 32 < 16) __syncwarp();
            else __ballot_sync(0xffffffffu, 1);
            break;
        case 3:
            if (thread % 32 == 7) __ballot_sync(0x3, 1);
            break;
        case 4:
            if (thread % 32 < 16) __ballot_sync(0xffffffffu, 1);
            else __ballot_sync(0xfffffff0u, 1);
            break;
        case 5: __shfl_sync(0xfu << thread / 4 % 8 * 4, 1, 31); break;
        case 6: load16(memory + 8); break;
        case 7: store16(memory + 4, Pack16{}); break;
        case 8:
            if (thread == 33) trap("no such row");
            break;
        case 9: shared_memory<HandingShared>(); break;
        case 10: named_barrier_sync(1, thread < 32 ? 64 : 32); break;
        case 11:
            if (thread < 32) named_barrier_arrive(1, 64);
            else named_barrier_arrive(1, 96);
            break;
        case 12: atomicAdd(reinterpret_cast<unsigned*>(memory + 1), 1u); break;
        case 13: throw std::runtime_error("some exception");
    }
}

struct Peek {
    std::uint32_t* words;
};

__global__ void peek(const __grid_constant__ Peek p) {
    struct Shared {
        std::uint32_t words[64];
    };
    Shared& shared = shared_memory<Shared>();
    p.words[64 * blockIdx.x + threadIdx.x] = shared.words[threadIdx.x];
    __syncthreads();
    shared.words[threadIdx.x] = 1;
}

struct Last {
    const unsigned* values;
    unsigned* sums;
    unsigned* done;
    unsigned* total;
    bool fence;
};

// Every block sums its part; the last one to come adds up the sums.
__global__ void sum_in_last(const __grid_constant__ Last p) {
    struct Shared {
        unsigned sum, last;
    };
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x == 0) shared.sum = 0;
    __syncthreads();
    atomicAdd(&shared.sum, p.values[blockIdx.x * blockDim.x + threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == blockIdx.x) {  // another thread in every block: their order is no order of blocks
        p.sums[blockIdx.x] = shared.sum;
        if (p.fence) __threadfence();
        shared.last = atomicAdd(p.done, 1u) == gridDim.x - 1;
        if (p.fence) __threadfence();
        if (shared.last) {
            unsigned total = 0;
            for (unsigned i = 0; i < gridDim.x; ++i) total += p.sums[i];
            *p.total = total;
            *p.done = 0;
        }
    }
}

struct Flag {
    unsigned* flag;
    unsigned* value;
    bool raised;
};

__global__ void wait_for_flag(const __grid_constant__ Flag p) {
    if (threadIdx.x == 0) {
        while (load_acquire(p.flag) == 0) __nanosleep(20);
        *p.value += 1;
    } else if (threadIdx.x == 40 && p.raised) {
        *p.value = 41;
        store_release(p.flag, 1);
    }
}

struct Order {
    unsigned* next;
    unsigned* threads;
};

__global__ void append(const __grid_constant__ Order p) {
    p.threads[atomicAdd(p.next, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

std::vector<unsigned> order_of(const char* seed) {
    setenv("SPARSEKERN_EMULATOR_ORDER", seed, 1);
    unsigned next = 0;
    Buffer<unsigned> threads(128);
    launch("append", append, LaunchShape{2, 64}, nullptr, Order{&next, threads.data()});
    unsetenv("SPARSEKERN_EMULATOR_ORDER");
    return std::vector<unsigned>(threads.data(), threads.data() + 128);
}

struct Words {
    unsigned* words;
};

__global__ void change(const __grid_constant__ Words p) {
    const unsigned thread = threadIdx.x;
    atomicMax(&p.words[0], thread);
    atomicMin(&p.words[1], thread);
    atomicOr(&p.words[2], 1u << thread % 32);
    atomicAnd(&p.words[3], ~(1u << thread % 32));
    atomicExch(&p.words[4], 7u);
    unsigned seen = load_acquire(&p.words[5]), before;  // a lock-free sum of squares
    do {
        before = seen;
        seen = atomicCAS(&p.words[5], before, before + thread * thread);
    } while (seen != before);
    atomicAdd(reinterpret_cast<float*>(&p.words[6]), 0.5f);
    atomicAdd(reinterpret_cast<unsigned long long*>(&p.words[8]), 1ull << 32);
}

}  // namespace

NATIVE_TEST(narrow_numbers) {
    check_numbers<f16>(5, 10, true);
    check_numbers<bf16>(8, 7, true);
    check_numbers<e4m3>(4, 3, false);
    CHECK(to_float(rounded_to<float>(0.1f)) == 0.1f, "float");
}

NATIVE_TEST(every_thread_runs_once) {
    Buffer<int> seen(5 * 64);
    for (int i = 0; i < 5 * 64; ++i) seen[i] = 0;
    launch("mark", mark, LaunchShape{5, 64}, nullptr, Marks{seen.data()});
    for (int i = 0; i < 5 * 64; ++i) CHECK(seen[i] == 5001, i << " has " << seen[i]);
    launch("mark", mark, LaunchShape{0, 64}, nullptr, Marks{nullptr});
}

NATIVE_TEST(block_barriers) {
    Buffer<int> from(3 * 256), to(3 * 256);
    for (int i = 0; i < 3 * 256; ++i) from[i] = 7 * i;
    in_several_orders([&] {
        launch("reverse", reverse, LaunchShape{3, 256, sizeof(ReverseShared)}, nullptr,
               Reverse{from.data(), to.data(), true});
        for (int i = 0; i < 3 * 256; ++i) CHECK(to[i] == 7 * (i / 256 * 256 + 255 - i % 256) + 2, i);
    });
    in_several_orders([&] {
        unsigned total = 0;
        launch("leave_early", leave_early, LaunchShape{1, 128, sizeof(unsigned)}, nullptr, Leaving{&total, 64});
        CHECK(total == (64 + 127) * 32, total);
    });
}

NATIVE_TEST(named_barriers) {
    Buffer<int> got(6 * 32);
    in_several_orders([&] {
        launch("hand_over", hand_over, LaunchShape{1, 64, sizeof(HandingShared)}, nullptr,
               Handing{got.data(), 5, false});
        for (int i = 0; i < 5 * 32; ++i) CHECK(got[i] == i / 32 * 100 + 31 - i % 32, i << " has " << got[i]);
    });
    const std::string error = error_of([&] {
        launch("hand_over", hand_over, LaunchShape{1, 64, sizeof(HandingShared)}, nullptr,
               Handing{got.data(), 5, true});
    });
    CHECK(contains(error, "kernel hand_over: deadlock"), error);
    CHECK(contains(error, "block 0, threads 0 to 31 have ended"), error);
    CHECK(contains(error, "threads 32 to 63 wait at barrier 1 for 64 threads, of which 32 have arrived"), error);
}

NATIVE_TEST(warp_collectives) {
    Random random(1);
    Buffer<int> from(32), to(20 * 32);
    for (int draw = 0; draw < 3; ++draw) {
        for (int i = 0; i < 32; ++i) from[i] = static_cast<int>(random.below(9)) - 4;
        in_several_orders([&] {
            launch("exchange", exchange, LaunchShape{1, 32}, nullptr, Lanes{from.data(), to.data(), ~0u});
            unsigned positive = 0;
            int sum = 0, least = 100, most = -100;
            unsigned most_unsigned = 0;
            bool any = false;
            for (int i = 0; i < 32; ++i) {
                positive |= static_cast<unsigned>(from[i] > 0) << i;
                sum += from[i];
                least = std::min(least, from[i]);
                most = std::max(most, from[i]);
                most_unsigned = std::max(most_unsigned, static_cast<unsigned>(from[i]));
                any |= from[i] > 7;
            }
            for (int i = 0; i < 32; ++i) {
                unsigned equal = 0;
                for (int j = 0; j < 32; ++j) equal |= static_cast<unsigned>(from[j] == from[i]) << j;
                const int expected[] = {from[31 - i],
                                        from[i / 8 * 8 + 5],
                                        from[i ^ 31],
                                        from[i],
                                        from[31 - i],
                                        from[31 - i],
                                        static_cast<int>(positive),
                                        any * 10 + 1,
                                        sum,
                                        least,
                                        most,
                                        static_cast<int>(most_unsigned),
                                        static_cast<int>(equal),
                                        i < 3 ? from[i] : from[i - 3],
                                        i > 28 ? from[i] : from[i + 3],
                                        i % 8 > 4 ? from[i] : from[i + 3],
                                        from[i ^ 4]};
                for (int what = 0; what < 17; ++what)
                    CHECK(to[32 * what + i] == expected[what], what << " of lane " << i << ": " << to[32 * what + i]);
            }
        });
    }
    // Lanes 8 to 23 alone.
    launch("exchange", exchange, LaunchShape{1, 32}, nullptr, Lanes{from.data(), to.data(), 0x00ffff00u});
    int sum = 0;
    for (int i = 8; i < 24; ++i) sum += from[i];
    for (int i = 8; i < 24; ++i) CHECK(to[8 * 32 + i] == sum && to[i] == from[31 - i], i);

    in_several_orders([&] {
        launch("meet_apart", meet_apart, LaunchShape{1, 64}, nullptr, Lanes{from.data(), to.data(), 0});
        int odd = 0, even = 0;
        for (int i = 0; i < 32; ++i) (i % 2 ? odd : even) += from[i];
        odd %= 1000, even %= 1000;
        for (int i = 1; i < 5; ++i) odd = odd * 16 % 1000;
        even = even * 16 % 1000;
        for (int i = 0; i < 64; ++i) CHECK(to[i] == 16 * (odd + even), i << ": " << to[i]);
    });
}

NATIVE_TEST(wrong_kernels) {
    const auto error_with = [](int what) {
        return error_of(
            [=] { launch("do_wrong", do_wrong, LaunchShape{2, 64, 64}, nullptr, Nothing{what}); });
    };
    const std::vector<std::vector<std::string>> expected = {
        {"kernel do_wrong: deadlock", "block 0, threads 0 to 31 wait at barrier 3 for 64 threads, of which 32",
         "threads 32 to 63 wait at __syncthreads for 64 threads, of which 32"},
        {"deadlock", "threads 0 to 4 wait in __syncwarp of lanes 0xffffffff, of which 0xffffffdf are there",
         "threads 5 to 5 have ended"},
        {"block 0, thread 16: __ballot_sync of mask 0xffffffff by lane 16, where lanes 0xffff wait in __syncwarp"},
        {"block 0, thread 7: __ballot_sync of mask 0x3 by lane 7"},
        {"thread 16: __ballot_sync of mask 0xfffffff0 by lane 16, where lanes 0xffff wait in __ballot_sync"},
        {"__shfl_sync reads lane 31, which is not in the mask"},
        {"a 16-byte load at no multiple of 16"},
        {"a 16-byte store at no multiple of 16"},
        {"block 0, thread 33: trap: no such row"},
        {"shared_memory of 128 bytes, of which the launch gave 64"},
        {"barrier 1 for 32 threads, where others wait for 64"},
        {"barrier 1 for 96 threads"},
        {"an atomic at no multiple of its size"},
        {"block 0, thread 0: some exception"},
    };
    for (std::size_t what = 0; what < expected.size(); ++what) {
        const std::string error = error_with(static_cast<int>(what));
        for (const std::string& part : expected[what]) CHECK(contains(error, part), "case " << what << ": " << error);
    }
    for (const auto& [shape, part] : std::vector<std::pair<LaunchShape, std::string>>{
             {{1, 33}, "a multiple of 32 threads up to 1024, not 33"},
             {{1, 2048}, "not 2048"},
             {{1, 32, 228 * 1024}, "bytes of shared memory; a block can have"},
             {{3, 32, 0, 2}, "clusters of 2 of 3 blocks"},
             {{-1, 32}, "blocks, not -1"}}) {
        const std::string error = error_of([&, shape = shape] { launch("mark", mark, shape, nullptr, Marks{nullptr}); });
        CHECK(contains(error, "kernel mark: ") && contains(error, part), error);
    }
    test_every_thread_runs_once();  // the emulator is as it was
}

NATIVE_TEST(shared_memory_starts_as_nan) {
    Buffer<std::uint32_t> words(3 * 64);
    launch("peek", peek, LaunchShape{3, 64, 64 * 4}, nullptr, Peek{words.data()});
    for (int i = 0; i < 3 * 64; ++i) {
        CHECK(std::isnan(__uint_as_float(words[i])), i << " is " << words[i]);
        CHECK(std::isnan(to_float(f16{static_cast<std::uint16_t>(words[i])})), i);
        CHECK(std::isnan(to_float(bf16{static_cast<std::uint16_t>(words[i])})), i);
    }
}

NATIVE_TEST(atomics) {
    in_several_orders([] {
        alignas(8) unsigned words[10] = {0, 99, 0, ~0u, 0, 0, 0, 0, 0, 0};
        launch("change", change, LaunchShape{1, 96}, nullptr, Words{words});
        CHECK(words[0] == 95 && words[1] == 0 && words[2] == ~0u && words[3] == 0 && words[4] == 7, "integers");
        CHECK(words[5] == 95 * 96 * 191 / 6, words[5]);
        CHECK(__uint_as_float(words[6]) == 48, __uint_as_float(words[6]));
        CHECK(words[8] == 0 && words[9] == 96, words[9]);
    });
}

NATIVE_TEST(blocks_that_hand_over) {
    Buffer<unsigned> values(4 * 64), sums(4);
    unsigned expected = 0;
    for (int i = 0; i < 4 * 64; ++i) expected += values[i] = static_cast<unsigned>(i * i);
    in_several_orders([&] {
        unsigned done = 0, total = 0;
        launch("sum_in_last", sum_in_last, LaunchShape{4, 64, 8}, nullptr,
               Last{values.data(), sums.data(), &done, &total, true});
        CHECK(total == expected && done == 0, total);
        unsigned flag = 0, value = 0;
        launch("wait_for_flag", wait_for_flag, LaunchShape{1, 64}, nullptr, Flag{&flag, &value, true});
        CHECK(value == 42, value);
    });
    unsigned flag = 0, value = 0;
    const std::string error = error_of(
        [&] { launch("wait_for_flag", wait_for_flag, LaunchShape{1, 64}, nullptr, Flag{&flag, &value, false}); });
    CHECK(contains(error, "deadlock") && contains(error, "threads 0 to 0 look at a flag that does not change"), error);
}

NATIVE_TEST(orders_of_threads) {
    const auto straight = order_of("");
    for (unsigned i = 0; i < 128; ++i) CHECK(straight[i] == i, i << " is " << straight[i]);
    const auto drawn = order_of("5");
    CHECK(drawn != straight && drawn != order_of("6") && drawn == order_of("5"), "the seed decides");
    auto sorted = drawn;
    std::sort(sorted.begin(), sorted.end());
    CHECK(sorted == straight, "every thread, once");
}

NATIVE_TEST(bits_of_integers) {
    for (const unsigned bits : {0u, 1u, 0x80000000u, 0x00f01000u, ~0u}) {
        int ones = 0, first = 0, leading = 32;
        unsigned reversed = 0;
        for (int i = 0; i < 32; ++i)
            if (bits >> i & 1) {
                ++ones;
                if (!first) first = i + 1;
                leading = 31 - i;
                reversed |= 0x80000000u >> i;
            }
        const int signed_bits = static_cast<int>(bits);
        CHECK(__popc(bits) == ones && __ffs(signed_bits) == first && __clz(signed_bits) == leading, bits);
        CHECK(__brev(bits) == reversed, bits);
    }
}

#if defined(__SANITIZE_THREAD__)
namespace {

struct WarpSum {
    int* to;
    bool barrier;
};

// Lanes pass a value on through shared memory; shuffles order no memory.
__global__ void pass_on(const __grid_constant__ WarpSum p) {
    HandingShared& shared = shared_memory<HandingShared>();
    shared.slot[threadIdx.x] = static_cast<int>(threadIdx.x);
    __shfl_sync(0xffffffffu, 1, 0);
    if (p.barrier) __syncwarp();
    p.to[threadIdx.x] = shared.slot[31 - threadIdx.x];
}

// What a sanitizer must report of a kernel that is wrong, and nothing of the right one.
void reverse_once(bool right) {
    Buffer<int> from(256), to(256);
    for (int i = 0; i < 256; ++i) from[i] = i;
    launch("reverse", reverse, LaunchShape{1, 256, sizeof(ReverseShared)}, nullptr,
           Reverse{from.data(), to.data(), right});
}

void pass_on_once(bool right) {
    Buffer<int> to(32);
    launch("pass_on", pass_on, LaunchShape{1, 32, sizeof(HandingShared)}, nullptr, WarpSum{to.data(), right});
}

void sum_once(bool right) {
    Buffer<unsigned> values(4 * 64), sums(4);
    for (int i = 0; i < 4 * 64; ++i) values[i] = 1;
    unsigned done = 0, total = 0;
    launch("sum_in_last", sum_in_last, LaunchShape{4, 64, 8}, nullptr,
           Last{values.data(), sums.data(), &done, &total, right});
}

}  // namespace

NATIVE_CASE(barrier) { reverse_once(true); }
NATIVE_CASE(no_barrier) { reverse_once(false); }
NATIVE_CASE(syncwarp) { pass_on_once(true); }
NATIVE_CASE(no_syncwarp) { pass_on_once(false); }
NATIVE_CASE(fence) { sum_once(true); }
NATIVE_CASE(no_fence) { sum_once(false); }

NATIVE_TEST(missing_barriers_are_races) {
    for (const std::string right : {"barrier", "syncwarp", "fence"}) {
        CHECK(report_of(right).empty(), right << " reports: " << report_of(right));
        CHECK(contains(report_of("no_" + right), "data race"), "no_" << right << " reports: " << report_of("no_" + right));
    }
}
#endif

#if defined(__SANITIZE_ADDRESS__)
namespace {

struct Beyond {
    int at;
};

__global__ void write_at(const __grid_constant__ Beyond p) {
    if (threadIdx.x == 0) shared_memory<HandingShared>().slot[p.at] = 1;
}

void write_once(int at) {
    launch("write_at", write_at, LaunchShape{1, 32, sizeof(HandingShared)}, nullptr, Beyond{at});
}

}  // namespace

NATIVE_CASE(within) { write_once(31); }
NATIVE_CASE(beyond) { write_once(32); }

NATIVE_TEST(shared_memory_ends) {
    CHECK(report_of("within").empty(), report_of("within"));
    // UndefinedBehaviorSanitizer sees the index, AddressSanitizer the address.
    CHECK(contains(report_of("beyond"), "write_at"), report_of("beyond"));
}
#endif
