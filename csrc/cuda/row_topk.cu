#include "cuda/row_topk.h"

#include <algorithm>
#include <stdexcept>

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// On a multiprocessor: while one block selects, the others stream.
constexpr int kResidentBlocks = 4;
constexpr int kPacksInFlight = 4;  // of a thread
constexpr int kTile = kPacksInFlight * kThreads;
constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr int kOwnBins = kBins / kThreads;
constexpr unsigned kWarp = 0xffffffffu;

struct Params {
    const void* keys;
    std::int64_t stride;
    int n, k;
    int cell_bits, rank;  // rank 0: no sample
    int parts;
    unsigned list_room;    // 0: no lists
    std::uint64_t* lists;  // [rows, list_room], of candidates
    unsigned* counters;    // [rows, 2]: candidates in the list, and parts that are done
    void* values;
    std::int32_t* indices;
    std::int32_t* passes;
};

struct Shared {
    std::uint64_t candidates[kRowTopkRoom];  // and before them the orders of the sample
    union {
        unsigned histogram[kBins];
        std::uint64_t chosen[kRowTopkMostK];  // after the last histogram
    };
    std::uint64_t least[kWarps], most[kWarps];
    unsigned sums[kWarps];
    Bound bound;
    unsigned count, chosen_count;
    unsigned last_part;
    struct {
        unsigned bin, above, inside;
    } found;
};
// So that the resident blocks of a Hopper multiprocessor, with 1 KiB more each, leave 60 of its 256 KiB to L1, where
// the loads in flight are kept.
static_assert(kResidentBlocks * (sizeof(Shared) + 1024) <= 196 * 1024);

// Word i of registers, which have no addresses: a tree of choices.
template <int kWords>
__device__ __forceinline__ std::uint32_t word_of(const std::uint32_t (&words)[kWords], int i) {
    if constexpr (kWords == 1) {
        return words[0];
    } else {
        std::uint32_t chosen[kWords / 2];
#pragma unroll
        for (int j = 0; j < kWords / 2; ++j) chosen[j] = i & kWords / 2 ? words[j + kWords / 2] : words[j];
        return word_of(chosen, i);
    }
}

// What a thread has in flight.
using InFlight = Pack16[kPacksInFlight];

__device__ __forceinline__ std::uint32_t word_of(const InFlight& packs, int i) {
    std::uint32_t words[4 * kPacksInFlight];
#pragma unroll
    for (int j = 0; j < 4 * kPacksInFlight; ++j) words[j] = packs[j / 4].word[j % 4];
    return word_of(words, i);
}

// Where candidates come from: a row, or the list of those that were found in it by several blocks. Both are whole packs
// of 16 bytes, and *loose* keys before and after them.

template <class T>
struct Row {
    using Key = T;
    static constexpr int kKeys = 16 / sizeof(T);  // of a pack

    const T* keys;
    int n, head, packs;

    __device__ Row(const T* keys, int n) : keys(keys), n(n) {
        const auto misplaced = static_cast<int>(reinterpret_cast<std::uintptr_t>(keys) % 16 / sizeof(T));
        head = min_of(n, (kKeys - misplaced) % kKeys);
        packs = (n - head) / kKeys;
    }
    __device__ int first(int pack) const { return head + pack * kKeys; }
    __device__ int loose() const { return n - packs * kKeys; }
    __device__ std::uint64_t loose_candidate(int i) const {
        const int index = i < head ? i : i + packs * kKeys;
        return candidate_of(keys[index], index);
    }
    __device__ Pack16 load(int pack) const { return load16_streaming(keys + first(pack)); }
    __device__ T key(const Pack16& keys, int j) const {
        T key;
        std::memcpy(&key, reinterpret_cast<const char*>(&keys) + j * sizeof(T), sizeof(T));
        return key;
    }
    __device__ std::uint64_t candidate(const Pack16& keys, int pack, int j) const {
        return candidate_of(key(keys, j), first(pack) + j);
    }
    // That of a bit of the hits of several packs, a tile's stride from `pack` on.
    __device__ std::uint64_t candidate_of_bit(const InFlight& packs, int pack, int bit) const {
        const std::uint32_t word = word_of(packs, bit * static_cast<int>(sizeof(T)) / 4);
        const std::uint32_t key = sizeof(T) == 4 ? word : word >> bit % 2 * 16 & 0xffffu;
        const int index = first(pack + bit / kKeys * kThreads) + bit % kKeys;
        return std::uint64_t{key} << 32 | static_cast<std::uint32_t>(index);
    }
    // A bit for each key of a pack: those that reach the bound, and in the pack where it is also those that equal it.
    __device__ unsigned hits(const Pack16& keys, int pack, const Bound& bound) const {
        const float below = bound.below(first(pack));
        unsigned hits = 0;
#pragma unroll
        for (int j = 0; j < kKeys; ++j) hits |= static_cast<unsigned>(!(to_float(key(keys, j)) <= below)) << j;
        return hits;
    }
    // No float is below NaN and above everything else, to keep later NaN from passing: the stream ends before them.
    __device__ int end(const Bound& bound, int end) const {
        if (bound.order >> 32 != kNanCode) return end;
        const auto start = static_cast<std::uint32_t>(head);
        return bound.last < start ? 0 : min_of(end, static_cast<int>((bound.last - start) / kKeys) + 1);
    }
};

template <class T>
struct List {
    using Key = T;
    static constexpr int kKeys = 2;

    const std::uint64_t* candidates;
    int n, packs;

    __device__ List(const std::uint64_t* candidates, int n) : candidates(candidates), n(n), packs(n / kKeys) {}
    __device__ int loose() const { return n - packs * kKeys; }
    __device__ std::uint64_t loose_candidate(int i) const { return candidates[packs * kKeys + i]; }
    // Other blocks wrote them during this kernel: no read-only load.
    __device__ Pack16 load(int pack) const { return *reinterpret_cast<const Pack16*>(candidates + pack * kKeys); }
    __device__ std::uint64_t candidate(const Pack16& pair, int, int j) const {
        return std::uint64_t{pair.word[2 * j + 1]} << 32 | pair.word[2 * j];
    }
    __device__ std::uint64_t candidate_of_bit(const InFlight& packs, int, int bit) const {
        return std::uint64_t{word_of(packs, 2 * bit + 1)} << 32 | word_of(packs, 2 * bit);
    }
    __device__ unsigned hits(const Pack16& pair, int, const Bound& bound) const {
        return unsigned{order_of<T>(candidate(pair, 0, 0)) >= bound.order} |
               unsigned{order_of<T>(candidate(pair, 0, 1)) >= bound.order} << 1;
    }
    __device__ int end(const Bound&, int end) const { return end; }
};

// Candidates kept. `count` goes on when there is no more room.
struct Sink {
    std::uint64_t* list;
    unsigned* count;
    unsigned room;
};

// Of the values of the warp's lanes, this one included.
__device__ __forceinline__ unsigned sum_up_to_lane(unsigned value) {
#pragma unroll
    for (unsigned distance = 1; distance < 32; distance *= 2) {
        const unsigned before = __shfl_up_sync(kWarp, value, distance);
        if (threadIdx.x % 32 >= distance) value += before;
    }
    return value;
}

// Appends what the bits of `hits` stand for, in no certain order. For a whole warp.
template <class Candidate>
__device__ __forceinline__ void append(const Sink& sink, unsigned hits, Candidate candidate) {
    if (!__any_sync(kWarp, hits != 0)) return;
    const unsigned mine = __popc(hits);
    const unsigned end = sum_up_to_lane(mine);
    unsigned at = 0;
    if (threadIdx.x % 32 == 31) at = atomicAdd(sink.count, end);
    at = __shfl_sync(kWarp, at, 31) + end - mine;
    if (at + mine > sink.room) return;  // nobody will use the list
    for (; hits; hits &= hits - 1) sink.list[at++] = candidate(__ffs(static_cast<int>(hits)) - 1);
}

// Appends the keys of packs [begin, end) that reach the bound.
template <class Source>
__device__ __forceinline__ void stream(const Source& source, int begin, int end, const Bound& bound, const Sink& sink) {
    constexpr int kKeys = Source::kKeys;
    end = source.end(bound, end);
    for (int tile = begin; tile < end; tile += kTile) {
        const int first = tile + static_cast<int>(threadIdx.x);
        InFlight packs;
#pragma unroll
        for (int i = 0; i < kPacksInFlight; ++i) packs[i] = source.load(min_of(first + i * kThreads, end - 1));
        unsigned hits = 0;
#pragma unroll
        for (int i = 0; i < kPacksInFlight; ++i) {
            const int pack = first + i * kThreads;
            const unsigned of_pack = source.hits(packs[i], pack, bound);
            if (pack < end) hits |= of_pack << (i * kKeys);
        }
        append(sink, hits, [&](int bit) { return source.candidate_of_bit(packs, first, bit); });
    }
}

template <class Source>
__device__ __forceinline__ void stream_loose(const Source& source, const Bound& bound, const Sink& sink) {
    if (threadIdx.x >= 32) return;
    const int i = static_cast<int>(threadIdx.x);  // there are fewer of them than lanes
    const std::uint64_t candidate = i < source.loose() ? source.loose_candidate(i) : 0;
    const bool hit = i < source.loose() && order_of<typename Source::Key>(candidate) >= bound.order;
    append(sink, hit, [=](int) { return candidate; });
}

// Selection. All of it is for a whole block.

// Orders from `low` on, 2^width of them.
struct Interval {
    std::uint64_t low;
    int width;
};

// What holds the orders of which every thread knows the extremes of some; there are at least two.
__device__ Interval interval_of(Shared& s, std::uint64_t least, std::uint64_t most) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        least = min_of(least, __shfl_xor_sync(kWarp, least, distance));
        most = max_of(most, __shfl_xor_sync(kWarp, most, distance));
    }
    if (threadIdx.x % 32 == 0) {
        s.least[threadIdx.x / 32] = least;
        s.most[threadIdx.x / 32] = most;
    }
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) {
        least = min_of(least, s.least[warp]);
        most = max_of(most, s.most[warp]);
    }
    return {least, 64 - __clzll(static_cast<long long>(most - least))};
}

struct Found {
    std::uint64_t bound;
    int passes;
};

// A bound that at least `wanted` and at most `most` orders reach: each pass makes a histogram of the interval, and goes
// on in the bin where the wanted-th largest order lies. `visit` calls its argument with all orders, all of them in
// `interval`. Ends because orders differ.
template <class Visit>
__device__ __forceinline__ Found bound_for(Shared& s, Interval interval, unsigned wanted, unsigned most, Visit visit) {
    const unsigned thread = threadIdx.x;
    unsigned above = 0;  // orders beyond the interval
    for (int passes = 1;; ++passes) {
        const int shift = max_of(interval.width - kBinBits, 0);
        const std::uint64_t bins = std::uint64_t{1} << (interval.width - shift);
#pragma unroll
        for (int i = 0; i < kOwnBins; ++i) s.histogram[thread + i * kThreads] = 0;
        __syncthreads();
        visit([&](std::uint64_t order) {
            const std::uint64_t bin = (order - interval.low) >> shift;
            if (order >= interval.low && bin < bins) atomicAdd(&s.histogram[bin], 1u);
        });
        __syncthreads();

        // A thread's bins, from the highest down, and how many orders are above them.
        unsigned own[kOwnBins], sum = 0;
#pragma unroll
        for (int i = 0; i < kOwnBins; ++i) sum += own[i] = s.histogram[kBins - 1 - (thread * kOwnBins + i)];
        const unsigned end = sum_up_to_lane(sum);
        if (thread % 32 == 31) s.sums[thread / 32] = end;
        __syncthreads();
        unsigned before = above + end - sum;
        for (unsigned warp = 0; warp < thread / 32; ++warp) before += s.sums[warp];
#pragma unroll
        for (int i = 0; i < kOwnBins; ++i) {
            if (before < wanted && wanted <= before + own[i])
                s.found = {kBins - 1 - (thread * kOwnBins + i), before, own[i]};
            before += own[i];
        }
        __syncthreads();
        interval = {interval.low + (std::uint64_t{s.found.bin} << shift), shift};
        above = s.found.above;
        if (above + s.found.inside <= most) return {interval.low, passes};
    }
}

// The rank-th largest order of the sample, or a little below it: no other of the sample is between.
template <class T>
__device__ std::uint64_t sampled_bound(Shared& s, const Row<T>& row, int cell_bits, unsigned rank) {
    const int cells = 1 << cell_bits;
    std::uint64_t least = ~std::uint64_t{0}, most = 0;
#pragma unroll 4
    for (int cell = static_cast<int>(threadIdx.x); cell < cells; cell += kThreads) {
        const int pack = sampled_pack(cell, cell_bits, row.packs);
        const Pack16 keys = row.load(pack);
#pragma unroll
        for (int j = 0; j < kRowTopkCellKeys; ++j) {
            const std::uint64_t order = order_of<T>(row.candidate(keys, pack, j * (Row<T>::kKeys / kRowTopkCellKeys)));
            s.candidates[j * cells + cell] = order;
            least = min_of(least, order);
            most = max_of(most, order);
        }
    }
    const auto each = [&](auto&& visitor) {
        for (int i = static_cast<int>(threadIdx.x); i < cells * kRowTopkCellKeys; i += kThreads)
            visitor(s.candidates[i]);
    };
    return bound_for(s, interval_of(s, least, most), rank, rank, each).bound;
}

// Candidates in shared memory start anew, at another bound. Every thread gets it from there, so that the compiler keeps
// it in registers, instead of making it again for each tile.
__device__ Bound begin(Shared& s, std::uint64_t order) {
    __syncthreads();  // all have seen the last count
    if (threadIdx.x == 0) {
        s.count = 0;
        s.bound = bound_at(order);
    }
    __syncthreads();
    return s.bound;
}

// Puts from k to kRowTopkRoom candidates of the source into shared memory, the k largest among them, whatever it holds.
// Returns how often the source was read.
template <class Source>
__device__ int gather(Shared& s, const Source& source, unsigned k) {
    Found found{0, 0};
    if (source.n > kRowTopkRoom) {
        using Key = typename Source::Key;
        const auto each = [&](auto&& visitor) {
            for (int pack = static_cast<int>(threadIdx.x); pack < source.packs; pack += kThreads) {
                const Pack16 keys = source.load(pack);
#pragma unroll
                for (int j = 0; j < Source::kKeys; ++j) visitor(order_of<Key>(source.candidate(keys, pack, j)));
            }
            const int i = static_cast<int>(threadIdx.x);
            if (i < source.loose()) visitor(order_of<Key>(source.loose_candidate(i)));
        };
        // Row::hits lets through a few that equal the bound.
        found = bound_for(s, {0, 64}, k, kRowTopkRoom - Source::kKeys, each);
    }
    const Bound bound = begin(s, found.bound);
    const Sink kept{s.candidates, &s.count, kRowTopkRoom};
    stream(source, 0, source.packs, bound, kept);
    stream_loose(source, bound, kept);
    __syncthreads();
    return found.passes + 1;
}

// Sorts the first `size` (a power of two) of `chosen`, falling: a bitonic network. Where partners are at most 32 places
// apart, pairs of one warp stay among 64 places of their own.
__device__ void sort_chosen(Shared& s, int size) {
    bool was_wide = true;
    for (int run = 2; run <= size; run *= 2)
        for (int distance = run / 2; distance > 0; distance /= 2) {
            const bool wide = distance > 32;
            if (wide || was_wide)
                __syncthreads();
            else
                __syncwarp(kWarp);
            was_wide = wide;
            for (int pair = static_cast<int>(threadIdx.x); pair < size / 2; pair += kThreads) {
                const int i = 2 * pair - (pair & (distance - 1)), j = i + distance;
                const std::uint64_t a = s.chosen[i], b = s.chosen[j];
                const bool falling = (i & run) == 0;
                if ((a < b) == falling) {
                    s.chosen[i] = b;
                    s.chosen[j] = a;
                }
            }
        }
    __syncthreads();
}

// The k largest of the candidates in shared memory, to the answer.
template <class T>
__device__ void take(Shared& s, int k, T* values, std::int32_t* indices) {
    const unsigned count = s.count;
    const int thread = static_cast<int>(threadIdx.x);
    std::uint64_t least = ~std::uint64_t{0}, most = 0;
    for (unsigned i = threadIdx.x; i < count; i += kThreads) {
        const std::uint64_t order = order_of<T>(s.candidates[i]);
        s.candidates[i] = order;
        least = min_of(least, order);
        most = max_of(most, order);
    }
    if (thread == 0) s.chosen_count = 0;
    const Interval interval = interval_of(s, least, most);
    const auto each = [&](auto&& visitor) {
        for (unsigned i = threadIdx.x; i < count; i += kThreads) visitor(s.candidates[i]);
    };
    const auto wanted = static_cast<unsigned>(k);
    const std::uint64_t bound = count == wanted ? 0 : bound_for(s, interval, wanted, wanted, each).bound;
    const Sink chosen{s.chosen, &s.chosen_count, kRowTopkMostK};
    for (unsigned warp = threadIdx.x / 32 * 32; warp < count; warp += kThreads) {
        const unsigned i = warp + threadIdx.x % 32;
        const std::uint64_t order = i < count ? s.candidates[i] : 0;
        append(chosen, i < count && order >= bound, [=](int) { return order; });
    }
    int size = 1;
    while (size < k) size *= 2;
    for (int i = k + thread; i < size; i += kThreads) s.chosen[i] = 0;
    sort_chosen(s, size);
    for (int i = thread; i < k; i += kThreads) {
        values[i] = rounded_to<T>(key_of(static_cast<std::uint32_t>(s.chosen[i] >> 32)));
        indices[i] = static_cast<std::int32_t>(index_of(s.chosen[i]));
    }
}

// Whether all other parts of the row have written their candidates, so that this block goes on with them.
__device__ bool is_last_part(Shared& s, unsigned* done, int parts) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        s.last_part = atomicAdd(done, 1u) == static_cast<unsigned>(parts) - 1;
        __threadfence();
    }
    __syncthreads();
    return s.last_part;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) row_topk_kernel(const __grid_constant__ Params p) {
    Shared& s = shared_memory<Shared>();
    const std::int64_t row_number = blockIdx.x / static_cast<unsigned>(p.parts);
    const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.parts));
    const Row<T> row(static_cast<const T*>(p.keys) + row_number * p.stride, p.n);
    const auto k = static_cast<unsigned>(p.k);
    const Bound bound = begin(s, p.rank ? sampled_bound(s, row, p.cell_bits, p.rank) : 0);

    int passes = 1;
    bool gathered;
    if (!p.list_room) {
        const Sink kept{s.candidates, &s.count, kRowTopkRoom};
        stream(row, 0, row.packs, bound, kept);
        stream_loose(row, bound, kept);
        __syncthreads();
        gathered = s.count >= k && s.count <= kRowTopkRoom;
    } else {
        std::uint64_t* list = p.lists + row_number * p.list_room;
        unsigned* counters = p.counters + row_number * 2;
        const Sink listed{list, counters, p.list_room};
        stream(row, part_begin(part, p.parts, row.packs), part_begin(part + 1, p.parts, row.packs), bound, listed);
        if (part == 0) stream_loose(row, bound, listed);
        if (!is_last_part(s, counters + 1, p.parts)) return;
        const unsigned count = counters[0];
        gathered = count >= k && count <= p.list_room;
        if (gathered) gather(s, List<T>(list, static_cast<int>(count)), k);
    }
    if (!gathered) passes += gather(s, row, k);
    if (p.passes && threadIdx.x == 0) p.passes[row_number] = passes;
    take(s, p.k, static_cast<T*>(p.values) + row_number * p.k, p.indices + row_number * p.k);
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

int log2_of(int power) {
    int bits = 0;
    while (1 << bits < power) ++bits;
    return bits;
}

template <class T>
void launch_rows(const RowTopk& call, const RowTopkPlan& plan, Stream stream) {
    const int cells = plan.sample / kRowTopkCellKeys;
    // Row::packs is at least this, wherever the row begins.
    require(plan.sample == 0 || (cells >= 1 && cells <= (call.n - (Row<T>::kKeys - 1)) / Row<T>::kKeys),
            "row_topk: sample must be 0, or from 16 bytes of keys to what a row has");
    for (std::int64_t first = 0; first < call.rows; first += plan.rows_at_once) {
        const std::int64_t rows = std::min(plan.rows_at_once, call.rows - first);
        Params p{};
        p.keys = static_cast<const T*>(call.keys) + first * call.stride;
        p.stride = call.stride;
        p.n = static_cast<int>(call.n);
        p.k = call.k;
        p.cell_bits = log2_of(cells);
        p.rank = plan.sample ? plan.rank : 0;
        p.parts = plan.parts;
        p.list_room = static_cast<unsigned>(plan.list);
        p.values = static_cast<T*>(call.values) + first * call.k;
        p.indices = call.indices + first * call.k;
        p.passes = call.passes ? call.passes + first : nullptr;
        if (plan.list) {
            p.lists = static_cast<std::uint64_t*>(call.workspace);
            p.counters = reinterpret_cast<unsigned*>(p.lists + plan.rows_at_once * plan.list);
            set_bytes(p.counters, 0, rows * 2 * sizeof(unsigned), stream);
        }
        launch("row_topk", row_topk_kernel<T>, LaunchShape{rows * plan.parts, kThreads, sizeof(Shared)}, stream, p);
    }
}

}  // namespace

void row_topk(const RowTopk& call, const RowTopkPlan& plan, Stream stream) {
    require(call.n >= 1 && call.n <= kRowTopkMostKeys, "row_topk: n must be from 1 to 2^30");
    require(call.k >= 1 && call.k <= std::min<std::int64_t>(call.n, kRowTopkMostK),
            "row_topk: k must be from 1 to n, and at most 1024");
    require(plan.sample >= 0 && plan.sample <= kRowTopkMostSample && (plan.sample & (plan.sample - 1)) == 0,
            "row_topk: sample must be 0 or a power of two, at most 4096");
    require(plan.sample == 0 || (plan.rank >= 1 && plan.rank <= plan.sample), "row_topk: rank must be in the sample");
    require(plan.parts == 1 || (plan.parts > 1 && plan.list > 0), "row_topk: parts of a row need a list");
    require(plan.list >= 0 && plan.list <= kRowTopkMostKeys && plan.list % 2 == 0, "row_topk: list must be even");
    require(plan.list == 0 || call.workspace || recorded_launches, "row_topk: a list needs a workspace");
    require(plan.rows_at_once >= 1 && plan.rows_at_once <= INT32_MAX / plan.parts,
            "row_topk: rows_at_once must be positive, and its blocks at most 2^31 - 1");
    switch (call.type) {
        case ElementType::float32: return launch_rows<float>(call, plan, stream);
        case ElementType::bfloat16: return launch_rows<bf16>(call, plan, stream);
        case ElementType::float16: return launch_rows<f16>(call, plan, stream);
        default: throw std::invalid_argument("row_topk: keys must be float32, bfloat16 or float16");
    }
}

RowTopkPlan row_topk_plan(std::int64_t rows, std::int64_t n, int k, int key_bytes, int multiprocessors) {
    // What a sample costs beside the reading of its keys, in candidates. An estimate; no device has measured it.
    constexpr double kSampleCost = 2048;
    constexpr double kMostFailure = 0x1p-21;  // of each of the two ways to fail
    constexpr std::int64_t kListBytes = 64 << 20;
    constexpr std::int64_t kLeastTiles = 4;                    // of a part
    constexpr std::int64_t kMostRows = std::int64_t{1} << 30;  // of a grid
    constexpr int kOfBoundsPack = 8;                           // Row::hits lets through some keys that equal the bound

    RowTopkPlan plan{0, 0, 1, 0, std::min(std::max<std::int64_t>(rows, 1), kMostRows), static_cast<double>(n), 0};
    const std::int64_t blocks = std::int64_t{kResidentBlocks} * multiprocessors;
    const std::int64_t most_parts = n * key_bytes / (kLeastTiles * kTile * 16);
    const auto parts = [&] {
        return static_cast<int>(std::max<std::int64_t>(std::min(blocks / plan.rows_at_once, most_parts), 1));
    };
    plan.parts = parts();

    // The sample that costs least, with its own keys and the candidates of its bound, among those that fit.
    const auto choose = [&](bool listed) {
        double least = listed || n > kRowTopkRoom ? INFINITY : static_cast<double>(n);
        for (int sample = 256; sample <= kRowTopkMostSample && sample <= n / 2; sample *= 2) {
            const std::int64_t cell = n * kRowTopkCellKeys / sample;
            // A bound two cells away from the end leaves room for a few of the sample elsewhere.
            const auto mean = static_cast<int>((k - 1.0) / static_cast<double>(n) * sample);
            int rank = 1 + std::max(2 * kRowTopkCellKeys, mean);
            while (rank <= sample && (too_few_probability(n, k, sample, rank) > kMostFailure ||
                                      reached_side_by_side(n, sample, rank) - 2 * cell < k))
                ++rank;
            if (rank > sample) continue;
            std::int64_t room = kRowTopkRoom;
            const auto too_many = [&] { return too_many_probability(n, room - kOfBoundsPack, sample, rank); };
            const auto fits = [&] {
                return too_many() <= kMostFailure && reached_side_by_side(n, sample, rank) + cell <= room;
            };
            while (listed && !fits()) room *= 2;
            const double expected = static_cast<double>(n) * (rank + 0.5) / sample;
            const double cost = kSampleCost + sample + expected;
            if (cost >= least || !fits()) continue;
            least = cost;
            plan.sample = sample;
            plan.rank = rank;
            plan.list = listed ? room : 0;
            plan.expected = expected;
            plan.failure = too_few_probability(n, k, sample, rank) + too_many();
        }
        return least < INFINITY;
    };
    if (plan.parts > 1 || !choose(false)) choose(true);
    if (plan.list) {
        const std::int64_t fit = kListBytes / (plan.list * static_cast<std::int64_t>(sizeof(std::uint64_t)));
        plan.rows_at_once = std::max<std::int64_t>(std::min(plan.rows_at_once, fit), 1);
        plan.parts = parts();
    }
    return plan;
}

std::int64_t row_topk_workspace(const RowTopkPlan& plan) {
    const std::int64_t row = plan.list * sizeof(std::uint64_t) + 2 * sizeof(unsigned);
    return plan.list ? plan.rows_at_once * row : 0;
}

}  // namespace sparsekern::cuda
