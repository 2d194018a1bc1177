// The k largest keys of each row of a matrix, sorted, in one pass over memory.
//
//   sample   some hundreds or thousands of the row's keys, from all over it, give a bound: their rank-th largest
//   stream   the row is read once; the keys that reach the bound are its candidates, kept in shared memory
//   take     the k largest candidates are found by radix descent, and sorted
//
// The answer never depends on the sample. Where fewer than k keys reach the bound, or more than there is room for, the
// block finds another bound from histograms of the whole row and streams it again; row_topk_plan says how seldom.
//
// Keys are compared as numbers: NaN is larger than all others, -0 equals 0, and ties go to the lower index. To that end
// every key has an *order*, a whole number that no other key of its row has: the key's code above the complement of its
// index. A bound is an order, so that rows with many equal keys (all of them, even) need nothing special.
//
// Cost. The keys are read once, and 32 bytes more for every four keys of a sample: at k = 64 1.6% of a float32 row of
// 2^17 keys, 3% of a 16-bit one. A warp's instructions for each 16-byte load of its lanes, counted in the machine code
// for sm_90a: float32 24, float16 42, bfloat16 47 where no lane has a candidate, 47, 67 and 72 where none has two of
// four loads, and 8 more for every further one of the lane that has most. An H100 (132 multiprocessors of 4 schedulers,
// 1.7 GHz) can issue 137 in the time in which its memory delivers those 512 bytes at 3.35 TB/s. A block that samples or
// selects reads next to nothing; the three others of its multiprocessor stream meanwhile. No device has run it yet.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device.h"

namespace sparsekern::cuda {

constexpr int kRowTopkMostK = 1024;
constexpr int kRowTopkRoom = 4864;        // candidates of a row in shared memory
constexpr int kRowTopkMostSample = 4096;  // keys
constexpr int kRowTopkCellKeys = 4;       // of the sample, from 16 bytes of the row
constexpr std::int64_t kRowTopkMostKeys = std::int64_t{1} << 30;

// How a call is carried out. Any plan that row_topk accepts gives the same answer.
struct RowTopkPlan {
    int sample;        // keys of the sample, a power of two; 0: no bound, every key is a candidate
    int rank;          // the bound is the sample's rank-th largest key
    int parts;         // blocks that share a row
    std::int64_t list;  // candidates of a row that global memory has room for; 0: one block keeps them
    std::int64_t rows_at_once;  // rows of one launch; what bounds the lists
    double expected;   // candidates of a row
    double failure;    // at most the probability that a row of keys in random places is read again
};

struct RowTopk {
    const void* keys;     // [rows, n], each row contiguous
    ElementType type;     // of keys and values: float32, bfloat16 or float16
    std::int64_t rows, n;
    std::int64_t stride;  // from row to row, in keys
    int k;                // from 1 to min(n, kRowTopkMostK)
    void* values;           // [rows, k], falling
    std::int32_t* indices;  // [rows, k]
    std::int32_t* passes;   // [rows]: how often each row was read, 1 where the bound was good; or nullptr
    void* workspace;        // row_topk_workspace() bytes, at a multiple of 16, of any content; nullptr for none
};

// Throws std::invalid_argument for a plan that does not fit the call.
void row_topk(const RowTopk& call, const RowTopkPlan& plan, Stream stream);

RowTopkPlan row_topk_plan(std::int64_t rows, std::int64_t n, int k, int key_bytes, int multiprocessors);

std::int64_t row_topk_workspace(const RowTopkPlan& plan);  // bytes

// Orders. They compile for the host too, where they are tested.

// A candidate is a key's bits above its index: no order yet, because most of them need none.
template <class T>
__host__ __device__ __forceinline__ std::uint64_t candidate_of(T key, int index) {
    std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t> bits;
    std::memcpy(&bits, &key, sizeof(T));
    return std::uint64_t{bits} << 32 | static_cast<std::uint32_t>(index);
}

constexpr std::uint32_t kInfinityCode = 0xff800000u;
constexpr std::uint32_t kNanCode = kInfinityCode + 1;
constexpr std::uint32_t kZeroCode = 0x80000000u;  // the code before it would be that of -0, which no key has

// Rises with the key.
__host__ __device__ __forceinline__ std::uint32_t code_of(float key) {
    const std::uint32_t bits = detail::bits_of(key + 0.0f);  // of -0 too this is 0
    if ((bits & 0x7fffffffu) > 0x7f800000u) return kNanCode;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// NaN for what is no number's code.
__host__ __device__ __forceinline__ float key_of(std::uint32_t code) {
    if (code > kInfinityCode) return detail::from_bits(0x7fc00000u);
    return detail::from_bits(code & 0x80000000u ? code ^ 0x80000000u : ~code);
}

template <class T>
__host__ __device__ __forceinline__ std::uint64_t order_of(std::uint64_t candidate) {
    const auto bits = static_cast<std::uint32_t>(candidate >> 32);
    T key;
    std::memcpy(&key, &bits, sizeof(T));
    return std::uint64_t{code_of(to_float(key))} << 32 | static_cast<std::uint32_t>(~candidate);
}

__host__ __device__ __forceinline__ std::uint32_t index_of(std::uint64_t order) {
    return ~static_cast<std::uint32_t>(order);
}

// A bound as a stream of keys uses it: one comparison of floats a key, `!(key <= below)`, which NaN passes, lets
// through those of at least its order.
struct Bound {
    std::uint64_t order;
    std::uint32_t last;  // up to this index a key that equals the bound's reaches it
    float below_tied;    // up to there
    float below_later;   // after it

    __host__ __device__ __forceinline__ float below(int index) const {
        return static_cast<std::uint32_t>(index) <= last ? below_tied : below_later;
    }
};

// The largest key of a lower code; NaN, which every key passes, where there is none.
__host__ __device__ __forceinline__ float key_below(std::uint32_t code) {
    const std::uint32_t before = code - 1;
    return key_of(before == kZeroCode - 1 ? before - 1 : before);
}

__host__ __device__ __forceinline__ Bound bound_at(std::uint64_t order) {
    const auto code = static_cast<std::uint32_t>(order >> 32);
    return {order, index_of(order), key_below(code), key_below(code + 1)};
}

// The sample. The row's `packs` (16 bytes of keys each) are divided into `cells` = 2^bits parts. In each cell some keys
// of one pack are taken, at a place that looks random, so that no period in the row meets a period of the sample.
__host__ __device__ __forceinline__ int sampled_pack(int cell, int bits, int packs) {
    const auto begin = static_cast<std::uint32_t>(static_cast<std::uint64_t>(packs) * cell >> bits);
    const auto end = static_cast<std::uint32_t>(static_cast<std::uint64_t>(packs) * (cell + 1) >> bits);
    std::uint32_t hash = static_cast<std::uint32_t>(cell) * 0x9e3779b1u;
    hash = (hash ^ hash >> 15) * 0x85ebca77u;
    hash ^= hash >> 13;
    return static_cast<int>(begin + (static_cast<std::uint64_t>(hash) * (end - begin) >> 32));
}

// Where part `part` of `parts` begins.
__host__ __device__ __forceinline__ int part_begin(int part, int parts, int packs) {
    return static_cast<int>(static_cast<std::int64_t>(packs) * part / parts);
}

// Of keys in random places, `drawn` without replacement from a row of which a share is marked: a bound, by Chernoff and
// Hoeffding, of the binomial tail P(X >= marked) where marked/drawn > share, and of P(X <= marked) where it is below.
//     exp(-drawn D(marked/drawn || share)),  D(a || p) = a log(a/p) + (1 - a) log((1 - a)/(1 - p))
// (Hoeffding, "Probability inequalities for sums of bounded random variables", 1963: theorem 1, and section 6 for
// sampling without replacement.)
inline double tail_bound(double drawn, double share, double marked) {
    const auto term = [](double a, double p) { return a > 0 ? a * std::log(a / p) : 0.0; };
    const double a = marked / drawn;
    return std::exp(-drawn * (term(a, share) + term(1 - a, 1 - share)));
}

// At most the probability that fewer than k of n keys reach the rank-th largest of the sample. They do when `rank` of
// the sample are among the k - 1 largest.
inline double too_few_probability(std::int64_t n, int k, int sample, int rank) {
    const double share = static_cast<double>(k - 1) / static_cast<double>(n);
    if (share == 0) return 0;
    return rank > share * sample ? tail_bound(sample, share, rank) : 1;
}

// At most the probability that more than `room` of n keys reach a bound that `rank` keys of the sample reach, and not
// one more. They do only when at most `rank` of the sample are among the `room` largest.
inline double too_many_probability(std::int64_t n, std::int64_t room, int sample, int rank) {
    if (room >= n) return 0;
    const double share = static_cast<double>(room) / static_cast<double>(n);
    return rank < share * sample ? tail_bound(sample, share, rank) : 1;
}

// Where the largest keys lie side by side, as in a sorted row and among equal keys, the cells and not chance say how
// many reach the bound: about so many keys, and at most one cell's more or less.
inline std::int64_t reached_side_by_side(std::int64_t n, int sample, int rank) {
    return ceil_div(rank, kRowTopkCellKeys) * (n * kRowTopkCellKeys / sample);
}

}  // namespace sparsekern::cuda
