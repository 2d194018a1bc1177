// A radix sort of entry numbers by latent, 8 bits at a time from the lowest, each pass stable:
//
//     count_digits   how many entries of each tile have each digit
//     exclusive_scan these counts, digit by digit and tile by tile within a digit: where each tile's entries go
//     place          each tile's entries, in the order in which they come
//
// The latents are not moved along: they are read where they were, by entry number, which costs a gather in the
// second-level cache and spares two arrays. Whatever the codes, the work is the same; sorting each latent's entries by
// themselves would have to cope with a latent that has them all. Where a latent begins is then found by bisection.
//
// Integers throughout and no order that depends on timing, so every run gives the same result.
#include "cuda/by_latent.h"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 16;  // of each thread
constexpr int kTile = kThreads * kItems;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kDigits == kThreads, "a thread has a digit");
constexpr unsigned kAllLanes = 0xffffffffu;

std::int64_t tiles_of(std::int64_t items) { return ceil_div(items, kTile); }

int passes_for(std::int64_t d_sae) {
    int passes = 1;
    while (passes * kDigitBits < 31 && (std::int64_t{1} << (passes * kDigitBits)) < d_sae) ++passes;
    return passes;
}

struct SortPass {
    const std::int32_t* latent;
    const std::int32_t* from;  // entries in the order of the pass before; nullptr for that of their numbers
    std::int32_t* to;
    std::int32_t* counts;  // [kDigits, tiles]: how many, and after the scan where
    std::int32_t entries;
    std::int32_t tiles;
    int shift;

    __device__ std::int32_t entry_at(std::int32_t position) const { return from ? from[position] : position; }
    __device__ int digit_of(std::int32_t entry) const { return latent[entry] >> shift & (kDigits - 1); }
};

struct DigitCounts {
    int of[kDigits];
};

__global__ void __launch_bounds__(kThreads) count_digits(const __grid_constant__ SortPass p) {
    DigitCounts& counts = shared_memory<DigitCounts>();
    const int thread = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x);
    counts.of[thread] = 0;
    __syncthreads();
    for (int item = 0; item < kItems; ++item) {
        const std::int64_t position = std::int64_t{tile} * kTile + item * kThreads + thread;
        if (position < p.entries) atomicAdd(&counts.of[p.digit_of(p.entry_at(static_cast<std::int32_t>(position)))], 1);
    }
    __syncthreads();
    p.counts[thread * p.tiles + tile] = counts.of[thread];
}

struct Scan {
    std::int32_t* items;  // replaced by the sums of all items before
    std::int64_t count;
    // What the tiles tell each other: in the upper half 0 for nothing yet, 1 for the tile's own sum, 2 for the sum up
    // to its end; in the lower half the sum. All zero at first, as the ticket.
    unsigned long long* cells;
    unsigned* ticket;
};

constexpr unsigned long long kOwnSum = 1ull << 32;
constexpr unsigned kWholeSum = 2;

struct ScanMemory {
    int tile;
    int before_tile;
    int warp_sum[kWarps];
};

// Called by a warp: the sum of all tiles before, from what they have told; tells the sum up to this tile's end.
__device__ int sum_before_tile(const Scan& p, int tile, int own) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane == 0) atomicAdd(p.cells + tile, kOwnSum | static_cast<unsigned>(own));
    unsigned before = 0;
    for (int last = tile - 1; last >= 0; last -= 32) {
        unsigned long long cell = kOwnSum * kWholeSum;  // of what lies before the first tile, which is nothing
        if (last - lane >= 0) {
            do cell = load_acquire(p.cells + (last - lane));
            while (cell == 0);
        }
        const unsigned whole = __ballot_sync(kAllLanes, cell >> 32 == kWholeSum);
        const int nearest = whole ? __ffs(static_cast<int>(whole)) - 1 : 31;
        before += __reduce_add_sync(kAllLanes, lane <= nearest ? static_cast<unsigned>(cell) : 0u);
        if (whole) break;
    }
    if (lane == 0) atomicAdd(p.cells + tile, kOwnSum + before);
    return static_cast<int>(before);
}

// In one pass: a tile waits for those before it, which have drawn their tickets and so are running or done.
__global__ void __launch_bounds__(kThreads) exclusive_scan(const __grid_constant__ Scan p) {
    ScanMemory& memory = shared_memory<ScanMemory>();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    if (thread == 0) memory.tile = static_cast<int>(atomicAdd(p.ticket, 1u));
    __syncthreads();
    const int tile = memory.tile;
    const std::int64_t first = std::int64_t{tile} * kTile + thread * kItems;
    int items[kItems], own = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        items[i] = first + i < p.count ? p.items[first + i] : 0;
        own += items[i];
    }
    int upto = own;  // the sum of this lane and those below
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(kAllLanes, upto, step);
        if (lane >= step) upto += below;
    }
    if (lane == 31) memory.warp_sum[warp] = upto;
    __syncthreads();
    int before = upto - own, total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += memory.warp_sum[w];
        total += memory.warp_sum[w];
    }
    if (warp == 0) {
        const int before_tile = sum_before_tile(p, tile, total);
        if (lane == 0) memory.before_tile = before_tile;
    }
    __syncthreads();
    before += memory.before_tile;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (first + i < p.count) p.items[first + i] = before;
        before += items[i];
    }
}

struct Places {
    int of[kWarps][kDigits];  // how many entries of this digit a warp has met, and later where its first goes
};

__global__ void __launch_bounds__(kThreads) place(const __grid_constant__ SortPass p) {
    Places& places = shared_memory<Places>();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int tile = static_cast<int>(blockIdx.x);
    for (int w = 0; w < kWarps; ++w) places.of[w][thread] = 0;
    __syncthreads();
    // A warp has neighbouring entries and takes them 32 at a time, so that ranks follow their order.
    const std::int64_t first = std::int64_t{tile} * kTile + warp * (kTile / kWarps) + lane;
    std::int32_t entry[kItems];
    int digit[kItems], rank[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const bool inside = first + 32 * i < p.entries;
        entry[i] = inside ? p.entry_at(static_cast<std::int32_t>(first + 32 * i)) : 0;
        digit[i] = inside ? p.digit_of(entry[i]) : kDigits;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const unsigned same = __match_any_sync(kAllLanes, static_cast<unsigned>(digit[i]));
        const int below = __popc(same & ((1u << lane) - 1));
        const int met = digit[i] < kDigits ? places.of[warp][digit[i]] : 0;
        rank[i] = met + below;
        __syncwarp(kAllLanes);
        if (below == 0 && digit[i] < kDigits) places.of[warp][digit[i]] = met + __popc(same);
        __syncwarp(kAllLanes);
    }
    __syncthreads();
    int next = p.counts[thread * p.tiles + tile];
    for (int w = 0; w < kWarps; ++w) {
        const int met = places.of[w][thread];
        places.of[w][thread] = next;
        next += met;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i)
        if (digit[i] < kDigits) p.to[places.of[warp][digit[i]] + rank[i]] = entry[i];
}

struct Segments {
    const std::int32_t* latent;
    EntriesByLatent out;
    std::int32_t entries;
    std::int32_t d_sae;
    std::int32_t split;
    std::int32_t most_pieces;

    __device__ std::int32_t pieces(std::int32_t i) const {
        const std::int32_t length = out.start[i + 1] - out.start[i];
        return length > split ? (length + split - 1) / split : 0;
    }
};

// The least number in [0, size] from which `reached` holds.
template <class F>
__device__ std::int32_t bisect(std::int32_t size, F reached) {
    std::int32_t low = 0, high = size;
    while (low < high) {
        const std::int32_t middle = low + (high - low) / 2;
        if (reached(middle)) high = middle;
        else low = middle + 1;
    }
    return low;
}

__global__ void __launch_bounds__(kThreads) find_starts(const __grid_constant__ Segments p) {
    const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i > p.d_sae) return;
    p.out.start[i] = bisect(p.entries, [&](std::int32_t position) { return p.latent[p.out.order[position]] >= i; });
}

__global__ void __launch_bounds__(kThreads) count_pieces(const __grid_constant__ Segments p) {
    const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i < p.d_sae) p.out.piece_start[i] = p.pieces(static_cast<std::int32_t>(i));
}

__global__ void __launch_bounds__(kThreads) name_pieces(const __grid_constant__ Segments p) {
    const std::int64_t piece = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (piece >= p.most_pieces) return;
    p.out.piece_latent[piece] =
        bisect(p.d_sae, [&](std::int32_t i) { return p.out.piece_start[i] + p.pieces(i) > piece; });
}

LaunchShape threads_for(std::int64_t items) { return {ceil_div(items, kThreads), kThreads}; }

template <class Memory>
LaunchShape tiles_for(std::int64_t items) {
    return {tiles_of(items), kThreads, sizeof(Memory)};
}

// The cells of a scan, and one for its ticket.
std::int64_t cells_for(std::int64_t items) { return tiles_of(items) + 1; }

std::int64_t sort_cells(std::int64_t entries, std::int64_t d_sae) {
    return passes_for(d_sae) * cells_for(kDigits * tiles_of(entries)) + cells_for(d_sae);
}

// Scans `items` in place and moves `cells` past what it used of it.
void scan(std::int32_t* items, std::int64_t count, unsigned long long*& cells, Stream stream) {
    const Scan p{items, count, cells, reinterpret_cast<unsigned*>(cells + tiles_of(count))};
    launch("exclusive_scan", exclusive_scan, tiles_for<ScanMemory>(count), stream, p);
    cells += cells_for(count);
}

}  // namespace

std::int64_t sort_workspace(std::int64_t entries, std::int64_t d_sae) {
    return 8 * sort_cells(entries, d_sae) + 4 * (kDigits * tiles_of(entries) + entries);
}

void sort_by_latent(const std::int32_t* latent, std::int64_t entries, std::int64_t d_sae, std::int64_t split,
                    const EntriesByLatent& out, void* workspace, Stream stream) {
    const std::int64_t tiles = tiles_of(entries);
    const int passes = passes_for(d_sae);
    auto* cells = static_cast<unsigned long long*>(workspace);
    auto* counts = reinterpret_cast<std::int32_t*>(cells + sort_cells(entries, d_sae));
    std::int32_t* other = counts + kDigits * tiles;
    set_bytes(workspace, 0, 8 * sort_cells(entries, d_sae), stream);

    // To and fro between two arrays, such that the last pass writes `order`.
    const std::int32_t* from = nullptr;
    for (int pass = 0; pass < passes; ++pass) {
        std::int32_t* to = (passes - pass) % 2 ? out.order : other;
        const SortPass p{latent, from, to, counts, static_cast<std::int32_t>(entries), static_cast<std::int32_t>(tiles),
                         pass * kDigitBits};
        launch("count_digits", count_digits, tiles_for<DigitCounts>(entries), stream, p);
        scan(counts, kDigits * tiles, cells, stream);
        launch("place", place, tiles_for<Places>(entries), stream, p);
        from = to;
    }
    const Segments segments{latent, out, static_cast<std::int32_t>(entries), static_cast<std::int32_t>(d_sae),
                            static_cast<std::int32_t>(split), static_cast<std::int32_t>(most_pieces(entries, split))};
    launch("find_starts", find_starts, threads_for(d_sae + 1), stream, segments);
    launch("count_pieces", count_pieces, threads_for(d_sae), stream, segments);
    scan(out.piece_start, d_sae, cells, stream);
    launch("name_pieces", name_pieces, threads_for(most_pieces(entries, split)), stream, segments);
}

}  // namespace sparsekern::cuda
