// The kernels behind row_adam.h.
//
// A block has a latent and keeps its row in registers: 16 numbers a thread, one warp up to 512 columns. What it waits
// for is asked for early: the weight before the gradient is summed, the moments before the first sum over the row, 32
// entries at a time, and the vectors of several entries together. Latents without an entry only stream.
//
// Slices. A step reads and writes 24 bytes for each of n * d parameters and reads 4 d for each entry. The entries'
// vectors come from the second-level cache if they fit into it. Where they do not, blocks go through a slice of the
// columns of all latents before the next slice, and a slice of the vectors stays in the cache. Against it stands what
// needs whole rows. The scale of a copy does: the copy is then made in a pass of its own, for 4 bytes a parameter more.
// So do the projection and the norm of unit rows: their gradient is then made in slices, a lot of latents at a time, and
// read whole, for 8 bytes a parameter and the vectors once more for each lot. (Blocks of a cluster, with a slice each,
// could share sums over a row, but run together: all slices would be in the cache at once again.)
//
// GB for one weight on an H100, whose cache of 50 MB may hold as little as 25 MB of what all multiprocessors read, for
// (B, d, n, k) of A = (8192, 4096, 131072, 64), B = (8192, 768, 2^20, 32), F = (8192, 768, 131072, 32),
// G = (16384, 2304, 65536, 64), E = (65536, 2048, 65536, 64), in lots of 256 MB:
//
//                                       A             B             F            G            E
//     vectors                           0.134         0.025         0.025        0.151        0.537
//     gathered, 4 B k d                 8.6           0.8           0.8          9.7          34.4
//     of that past the cache            5.4 to 7.0    <= 0.1        <= 0.1       6.5 to 8.1   31 to 33
//     parameters and moments            12.9          19.3          2.4          3.6          3.2
//     rows of any norm: whole           18.3 to 19.9  19.4          2.5          10.1 to 11.7 34 to 36
//                       slices          13.0          19.3          2.4          3.8          3.8
//         with a copy:  whole           19.3 to 20.9  21.0          2.7          10.4 to 12.0 34 to 36
//                       slices          16.2          24.2          3.0          4.7          4.6
//     unit rows:        whole           18.3 to 19.9  19.4          2.5          10.1 to 11.7 34 to 36
//                       slices          18.2          25.8          3.2          5.3          5.4
//
// So the vectors' bytes beyond the cache decide, against those that slices cost; the caller counts them. At A slices are
// for the encoder alone, 16 to 35% less; at G and E, for both weights, half and a seventh are left.
#include "cuda/row_adam.h"

namespace sparsekern::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// How a row is spread over a block: of chunk c, thread t has the `Width` columns from (c * Threads + t) * Width on.
// Of vectors, `Flight` are asked for together.
template <int Threads, int Numbers, int Width, int Flight>
struct RowShape {
    static constexpr int kThreads = Threads;
    static constexpr int kNumbers = Numbers;
    static constexpr int kWidth = Width;  // 4 where rows begin at multiples of 16 bytes, else 1
    static constexpr int kChunks = Numbers / Width;
    static constexpr int kFlight = Flight;
    static constexpr int kBlocks = 512 / Threads;  // on a multiprocessor, at least: 128 registers a thread
    static constexpr bool kEarlyMoments = Numbers <= 16;  // there is room for them beside the gradient and the weight
};

template <class S>
struct Columns {
    std::int32_t first, end;

    __device__ std::int32_t operator[](int chunk) const {
        return first + (chunk * S::kThreads + static_cast<int>(threadIdx.x)) * S::kWidth;
    }

    // f(chunk) for those that have columns of the row, and f(i) for each number of these. Unrolled, so that numbers can
    // be in registers.
    template <class F>
    __device__ __forceinline__ void each_chunk(F f) const {
#pragma unroll
        for (int chunk = 0; chunk < S::kChunks; ++chunk)
            if ((*this)[chunk] < end) f(chunk);
    }
    template <class F>
    __device__ __forceinline__ void each_number(F f) const {
        each_chunk([&](int chunk) {
#pragma unroll
            for (int i = 0; i < S::kWidth; ++i) f(chunk * S::kWidth + i);
        });
    }
};

// Which item, and which of its columns, a block has. Slices change slowest, so that blocks that run together read the
// same columns.
template <class S>
__device__ __forceinline__ Columns<S> columns_of_block(std::int64_t items, std::int32_t d, std::int32_t slice,
                                                       std::int64_t& item, std::int64_t& number) {
    number = blockIdx.x / static_cast<unsigned>(items);
    item = blockIdx.x - number * items;
    const std::int32_t first = static_cast<std::int32_t>(number) * slice;
    return {first, min_of(d, first + slice)};
}

// Reads a row that this kernel does not write.
template <class S>
__device__ __forceinline__ void load_row(float (&to)[S::kNumbers], const float* row, const Columns<S>& columns) {
    columns.each_chunk([&](int chunk) {
        const float* from = row + columns[chunk];
        if constexpr (S::kWidth == 4) {
            const Pack16 pack = load16(from);
#pragma unroll
            for (int i = 0; i < 4; ++i) to[4 * chunk + i] = __uint_as_float(pack.word[i]);
        } else {
            to[chunk] = *from;
        }
    });
}

// Reads a chunk of a row that this block may replace, so not through the read-only path. It is marked to leave the
// second-level cache first, as is what replaces it: vectors are to stay there.
template <class S>
__device__ __forceinline__ void load_own_chunk(float (&to)[S::kNumbers], const float* row, const Columns<S>& columns,
                                               int chunk) {
    const float* from = row + columns[chunk];
    if constexpr (S::kWidth == 4) {
#if defined(__CUDACC__)
        const float4 four = __ldcs(reinterpret_cast<const float4*>(from));
        to[4 * chunk] = four.x, to[4 * chunk + 1] = four.y, to[4 * chunk + 2] = four.z, to[4 * chunk + 3] = four.w;
#else
        std::memcpy(&to[4 * chunk], from, 16);
#endif
    } else {
        to[chunk] = *from;
    }
}

template <class S>
__device__ __forceinline__ void load_own_row(float (&to)[S::kNumbers], const float* row, const Columns<S>& columns) {
    columns.each_chunk([&](int chunk) { load_own_chunk<S>(to, row, columns, chunk); });
}

template <class S>
__device__ __forceinline__ void store_chunk(float* row, const float (&from)[S::kNumbers], const Columns<S>& columns,
                                            int chunk) {
    float* to = row + columns[chunk];
    if constexpr (S::kWidth == 4) {
        Pack16 pack;
#pragma unroll
        for (int i = 0; i < 4; ++i) pack.word[i] = __float_as_uint(from[4 * chunk + i]);
        store16_streaming(to, pack);
    } else {
        *to = from[chunk];
    }
}

template <class S>
__device__ __forceinline__ void store_row(float* row, const float (&from)[S::kNumbers], const Columns<S>& columns) {
    columns.each_chunk([&](int chunk) { store_chunk<S>(row, from, columns, chunk); });
}

// To within 2 units in the last place. Correctly rounded ones call functions for rare cases, which costs registers.
__device__ __forceinline__ float quotient(float a, float b) {
#if defined(__CUDACC__)
    float result;
    asm("div.full.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a / b;
#endif
}

__device__ __forceinline__ float root(float a) {
#if defined(__CUDACC__)
    float result;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(a));
    return result;
#else
    return sqrtf(a);
#endif
}

// total += sum of factor[f] * row[f], where a row may be nullptr. The same rows for all threads of a warp.
template <class S>
__device__ __forceinline__ void add_rows(float (&total)[S::kNumbers], const float* const (&row)[S::kFlight],
                                         const float (&factor)[S::kFlight], const Columns<S>& columns) {
    float number[S::kFlight][S::kNumbers];
#pragma unroll
    for (int f = 0; f < S::kFlight; ++f)
        if (row[f]) load_row<S>(number[f], row[f], columns);
#pragma unroll
    for (int f = 0; f < S::kFlight; ++f)
        if (row[f]) columns.each_number([&](int i) { total[i] = fmaf(factor[f], number[f][i], total[i]); });
}

// total += the sum over order[first .. end).
template <class S>
__device__ __forceinline__ void add_entries(float (&total)[S::kNumbers], const OuterProducts& product,
                                            std::int32_t first, std::int32_t end, const Columns<S>& columns) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const auto entry_at = [&](std::int32_t position) { return position < end ? product.order[position] : -1; };
    std::int32_t entry = entry_at(first + lane);
    for (std::int32_t staged = first; staged < end; staged += 32) {  // a lane stages an entry for its warp
        const float value = entry < 0 ? 0.0f : product.values[entry];
        const std::int32_t owner = entry < 0 ? 0 : product.row_of ? product.row_of[entry] : entry / product.k;
        entry = entry_at(staged + 32 + lane);
        // An entry of value zero has nothing to add, whatever its vector holds.
        for (unsigned left = __ballot_sync(kAllLanes, value != 0); left;) {
            const float* row[S::kFlight];
            float factor[S::kFlight];
#pragma unroll
            for (int f = 0; f < S::kFlight; ++f) {
                const int source = left ? __ffs(static_cast<int>(left)) - 1 : 0;
                const std::int32_t number = __shfl_sync(kAllLanes, owner, source);
                factor[f] = __shfl_sync(kAllLanes, value, source);
                row[f] = left ? product.vectors + number * product.stride : nullptr;
                left &= left - 1;
            }
            add_rows<S>(total, row, factor, columns);
        }
    }
}

// total += the row of a latent, whose pieces are summed already where it has more than `split` entries.
template <class S>
__device__ __forceinline__ void add_latent(float (&total)[S::kNumbers], const OuterProducts& product,
                                           std::int64_t latent, std::int32_t split, std::int32_t d,
                                           const Columns<S>& columns) {
    const std::int32_t first = product.start[latent], end = product.start[latent + 1];
    if (end - first <= split) {
        add_entries<S>(total, product, first, end, columns);
    } else {
        const float* pieces = product.pieces + std::int64_t{product.piece_start[latent]} * d;
        const std::int32_t count = ceil_div(end - first, split);
        for (std::int32_t piece = 0; piece < count; piece += S::kFlight) {
            const float* row[S::kFlight];
            float factor[S::kFlight];
#pragma unroll
            for (int f = 0; f < S::kFlight; ++f) {
                row[f] = piece + f < count ? pieces + std::int64_t{piece + f} * d : nullptr;
                factor[f] = 1;
            }
            add_rows<S>(total, row, factor, columns);
        }
    }
}

struct PieceSums {
    OuterProducts product;
    const std::int32_t* piece_latent;
    std::int64_t pieces;
    std::int64_t n;
    std::int32_t d, split, slice;
    float* sums;
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) sum_piece(const __grid_constant__ PieceSums p) {
    std::int64_t piece, number;
    const Columns<S> columns = columns_of_block<S>(p.pieces, p.d, p.slice, piece, number);
    const std::int32_t latent = p.piece_latent[piece];
    if (latent >= p.n) return;
    const std::int32_t first =
        p.product.start[latent] + (static_cast<std::int32_t>(piece) - p.product.piece_start[latent]) * p.split;
    const std::int32_t end = p.product.start[latent + 1];
    float total[S::kNumbers] = {};
    add_entries<S>(total, p.product, first, end - first < p.split ? end : first + p.split, columns);
    store_row<S>(p.sums + piece * p.d, total, columns);
}

// What the warps of a block tell each other. One alone has nothing to tell.
template <int Threads>
struct Partial {
    float of[3][Threads / 32];
};

// Over the block the sums of the first numbers of `x` and the largest of the others. Each use within a kernel has a
// memory of its own, so that no barrier is needed after it.
template <class S, int Sums, int Maxima>
__device__ __forceinline__ void combine_over_block(float (&x)[Sums + Maxima], Partial<S::kThreads>& memory) {
    const auto combine = [](int i, float a, float b) { return i < Sums ? a + b : fmaxf(a, b); };
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
#pragma unroll
        for (int i = 0; i < Sums + Maxima; ++i) x[i] = combine(i, x[i], __shfl_xor_sync(kAllLanes, x[i], step));
    if constexpr (S::kThreads > 32) {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread % 32 == 0)
#pragma unroll
            for (int i = 0; i < Sums + Maxima; ++i) memory.of[i][thread / 32] = x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Sums + Maxima; ++i) {
            x[i] = memory.of[i][0];
#pragma unroll
            for (int warp = 1; warp < S::kThreads / 32; ++warp) x[i] = combine(i, x[i], memory.of[i][warp]);
        }
    }
}

template <class S>
struct RowMemory {
    Partial<S::kThreads> along, totals, rounded;
};

template <class T, int Count>
struct alignas(sizeof(T) * Count) Pack {
    T of[Count];
};

template <class S, class T>
__device__ __forceinline__ void store_rounded(const float (&row)[S::kNumbers], float scale, T* to,
                                              const Columns<S>& columns, float& error) {
    columns.each_chunk([&](int chunk) {
        Pack<T, S::kWidth> pack;
#pragma unroll
        for (int i = 0; i < S::kWidth; ++i) {
            const float number = row[chunk * S::kWidth + i];
            pack.of[i] = rounded_to<T>(quotient(number, scale));
            const float off = number - to_float(pack.of[i]) * scale;
            error = fmaf(off, off, error);
        }
        *reinterpret_cast<Pack<T, S::kWidth>*>(to + columns[chunk]) = pack;
    });
}

// Writes row `latent` of the copy, from the whole row and its largest magnitude.
template <class S>
__device__ __forceinline__ void refresh_copy(const RoundedRows& copy, std::int64_t latent, std::int32_t d,
                                             const float (&row)[S::kNumbers], float largest, const Columns<S>& columns,
                                             RowMemory<S>& memory) {
    const float scale = copy.limit > 0 ? fmaxf(quotient(largest, copy.limit), 1e-30f) : 1.0f;
    float sums[2] = {0, 0};  // of the squares of the row, and of what rounding changes
    columns.each_number([&](int i) { sums[0] = fmaf(row[i], row[i], sums[0]); });
    const std::int64_t place = latent * d;
    if (copy.type == ElementType::float16)
        store_rounded<S>(row, scale, static_cast<f16*>(copy.rows) + place, columns, sums[1]);
    else if (copy.type == ElementType::bfloat16)
        store_rounded<S>(row, scale, static_cast<bf16*>(copy.rows) + place, columns, sums[1]);
    else
        store_rounded<S>(row, scale, static_cast<e4m3*>(copy.rows) + place, columns, sums[1]);
    combine_over_block<S, 2, 0>(sums, memory.rounded);
    if (threadIdx.x == 0) {
        if (copy.limit > 0) copy.scale[latent] = scale;
        copy.norm[latent] = root(sums[0]);
        copy.error[latent] = root(sums[1]);
    }
}

struct RowPass {
    RowGradient gradient;
    AdamStep step;       // `weight` is nullptr where the gradient is all that is wanted
    float* made;         // [n, d]: where the gradient goes, or nullptr
    const float* given;  // [n, d]: where it comes from, or nullptr
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) update_row(const __grid_constant__ RowPass p) {
    const RowGradient& g = p.gradient;
    const AdamStep& a = p.step;
    if (g.needed && !*g.needed) return;
    std::int64_t latent, number;
    const Columns<S> columns = columns_of_block<S>(g.n, g.d, g.slice, latent, number);
    const std::int64_t place = latent * g.d;
    const bool update = a.weight != nullptr;
    RowMemory<S>& memory = shared_memory<RowMemory<S>>();

    float row[S::kNumbers];
    if (update || g.unit_rows) load_own_row<S>(row, g.weight + place, columns);

    float gradient[S::kNumbers] = {};
    bool any = false;
    for (int sum = 0; sum < g.count; ++sum) {
        any |= g.sums[sum].start[latent] < g.sums[sum].start[latent + 1];
        if (!p.given) add_latent<S>(gradient, g.sums[sum], latent, g.split, g.d, columns);
    }
    if (p.given && any) load_own_row<S>(gradient, p.given + place, columns);

    float first[S::kNumbers], second[S::kNumbers];
    if (update && S::kEarlyMoments) {
        load_own_row<S>(first, a.first_moment + place, columns);
        load_own_row<S>(second, a.second_moment + place, columns);
    }

    if (g.unit_rows && any) {
        float along[1] = {0};
        columns.each_number([&](int i) { along[0] = fmaf(gradient[i], row[i], along[0]); });
        combine_over_block<S, 1, 0>(along, memory.along);
        columns.each_number([&](int i) { gradient[i] = fmaf(-along[0], row[i], gradient[i]); });
    }
    if (p.made) store_row<S>(p.made + place, gradient, columns);

    float totals[3] = {0, 0, 0};  // the squares of the gradient, those of the new row, and its largest magnitude
    columns.each_number([&](int i) { totals[0] = fmaf(gradient[i], gradient[i], totals[0]); });
    if (update) {
        const float rate = a.hyper[0], inverse_root = quotient(1, a.hyper[1]), clip = a.hyper[2];
        columns.each_chunk([&](int chunk) {
            if (!S::kEarlyMoments) {
                load_own_chunk<S>(first, a.first_moment + place, columns, chunk);
                load_own_chunk<S>(second, a.second_moment + place, columns, chunk);
            }
#pragma unroll
            for (int i = chunk * S::kWidth; i < (chunk + 1) * S::kWidth; ++i) {
                const float clipped = clip * gradient[i];
                first[i] = fmaf(a.first_rate, clipped - first[i], first[i]);
                second[i] = fmaf(a.second_rate, clipped * clipped - second[i], second[i]);
                row[i] -= quotient(rate * first[i], fmaf(root(second[i]), inverse_root, a.eps));
                totals[1] = fmaf(row[i], row[i], totals[1]);
                totals[2] = fmaxf(totals[2], fabsf(row[i]));
            }
            store_chunk<S>(a.first_moment + place, first, columns, chunk);
            store_chunk<S>(a.second_moment + place, second, columns, chunk);
        });
    }

    if (any || (update && (g.unit_rows || a.copy.limit > 0))) combine_over_block<S, 2, 1>(totals, memory.totals);
    if (any && g.squares && threadIdx.x == 0) g.squares[number * g.n + latent] = totals[0];
    if (!update) return;

    if (g.unit_rows) {
        const float inverse = quotient(1, fmaxf(root(totals[1]), 1.1754943508222875e-38f));
        columns.each_number([&](int i) { row[i] *= inverse; });
        totals[2] *= inverse;  // rounded as the number is whose magnitude it is
    }
    store_row<S>(a.weight + place, row, columns);
    if (a.copy.rows) refresh_copy<S>(a.copy, latent, g.d, row, totals[2], columns, memory);
}

// The copy alone, of rows that were updated slice by slice.
struct CopyPass {
    const std::uint8_t* needed;
    const float* weight;
    std::int64_t n;
    std::int32_t d;
    RoundedRows copy;
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) copy_row(const __grid_constant__ CopyPass p) {
    if (p.needed && !*p.needed) return;
    const std::int64_t latent = blockIdx.x;
    const Columns<S> columns{0, p.d};
    RowMemory<S>& memory = shared_memory<RowMemory<S>>();
    float row[S::kNumbers], largest[1] = {0};
    load_own_row<S>(row, p.weight + latent * p.d, columns);
    columns.each_number([&](int i) { largest[0] = fmaxf(largest[0], fabsf(row[i])); });
    if (p.copy.limit > 0) combine_over_block<S, 0, 1>(largest, memory.totals);
    refresh_copy<S>(p.copy, latent, p.d, row, largest[0], columns, memory);
}

struct Bounds {
    RowGradient gradient;
    const float* norms[kMostSums];
    float* bounds;
};

constexpr int kBoundThreads = 256;
constexpr int kBoundFlight = 4;  // entries of a lane that are asked for together

// A warp has a latent.
__global__ void __launch_bounds__(kBoundThreads) bound_row(const __grid_constant__ Bounds p) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::int64_t latent = std::int64_t{blockIdx.x} * (kBoundThreads / 32) + threadIdx.x / 32;
    if (latent >= p.gradient.n) return;
    float bound = 0;
    for (int sum = 0; sum < p.gradient.count; ++sum) {
        const OuterProducts& product = p.gradient.sums[sum];
        const std::int32_t end = product.start[latent + 1];
        for (std::int32_t staged = product.start[latent] + lane; staged < end; staged += 32 * kBoundFlight) {
            std::int32_t entry[kBoundFlight];
#pragma unroll
            for (int f = 0; f < kBoundFlight; ++f)
                entry[f] = end - staged > 32 * f ? product.order[staged + 32 * f] : -1;
#pragma unroll
            for (int f = 0; f < kBoundFlight; ++f) {
                const float value = entry[f] < 0 ? 0.0f : product.values[entry[f]];
                if (value == 0) continue;
                const std::int32_t owner = product.row_of ? product.row_of[entry[f]] : entry[f] / product.k;
                bound = fmaf(fabsf(value), p.norms[sum][owner], bound);
            }
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) bound += __shfl_xor_sync(kAllLanes, bound, step);
    if (lane == 0) p.bounds[latent] = bound;
}

// Calls `run` with the shape for rows, or slices, of `columns` numbers. A warp if it can: it needs no barriers. Rows
// that cannot be read 16 bytes at a time have fewer shapes.
template <class Run>
void with_shape_for(std::int32_t columns, bool aligned, Run run) {
    if (columns > kWidest) throw std::invalid_argument("rows must have at most 16384 columns");
    if (aligned) {
        if (columns <= 512) run(RowShape<32, 16, 4, 4>{});
        else if (columns <= 1024) run(RowShape<64, 16, 4, 4>{});
        else if (columns <= 2048) run(RowShape<128, 16, 4, 4>{});
        else if (columns <= 4096) run(RowShape<256, 16, 4, 4>{});
        else if (columns <= 8192) run(RowShape<512, 16, 4, 4>{});
        else run(RowShape<512, 32, 4, 1>{});
    } else {
        if (columns <= 512) run(RowShape<32, 16, 1, 2>{});
        else if (columns <= 2048) run(RowShape<128, 16, 1, 2>{});
        else if (columns <= 8192) run(RowShape<512, 16, 1, 2>{});
        else run(RowShape<512, 32, 1, 1>{});
    }
}

LaunchShape blocks_for(std::int64_t items, std::int32_t d, std::int32_t slice, int threads, std::size_t shared_bytes) {
    const std::int64_t blocks = items * ceil_div(d, slice);
    if (blocks > INT32_MAX) throw std::invalid_argument("too many rows and slices for one launch");
    return {blocks, threads, shared_bytes};
}

bool whole_packs(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

std::int64_t size_of(ElementType type) { return type == ElementType::float8_e4m3 ? 1 : 2; }  // in a copy

// Four of its elements are written at once.
bool whole_packs(const RoundedRows& copy) {
    return reinterpret_cast<std::uintptr_t>(copy.rows) % (4 * size_of(copy.type)) == 0;
}

bool whole_packs(const OuterProducts& product) {
    return whole_packs(product.vectors) && whole_packs(product.pieces) && product.stride % 4 == 0;
}

// Whether all rows and slices begin where 16 bytes can be read at once.
bool whole_packs(const RowGradient& g) {
    bool aligned = g.d % 4 == 0 && g.slice % 4 == 0 && whole_packs(g.weight);
    for (int sum = 0; sum < g.count; ++sum) aligned = aligned && whole_packs(g.sums[sum]);
    return aligned;
}

void launch_rows(const char* name, const RowPass& pass, Stream stream) {
    const RowGradient& g = pass.gradient;
    const AdamStep& a = pass.step;
    const bool aligned = whole_packs(g) && whole_packs(pass.made) && whole_packs(pass.given) &&
                         whole_packs(a.weight) && whole_packs(a.first_moment) && whole_packs(a.second_moment) &&
                         whole_packs(a.copy);
    with_shape_for(min_of(g.d, g.slice), aligned, [&](auto shape) {
        using S = decltype(shape);
        launch(name, update_row<S>, blocks_for(g.n, g.d, g.slice, S::kThreads, sizeof(RowMemory<S>)), stream, pass);
    });
}

template <class T>
void advance(T*& pointer, std::int64_t by) {
    if (pointer) pointer += by;
}

// A pass over `count` latents from `first` on.
RowPass some_latents(RowPass pass, std::int64_t first, std::int64_t count) {
    RowGradient& g = pass.gradient;
    AdamStep& a = pass.step;
    const std::int64_t place = first * g.d;
    g.n = count;
    for (int sum = 0; sum < g.count; ++sum) {
        advance(g.sums[sum].start, first);
        advance(g.sums[sum].piece_start, first);
    }
    for (float** rows : {&a.weight, &a.first_moment, &a.second_moment}) advance(*rows, place);
    for (float** numbers : {&g.squares, &a.copy.scale, &a.copy.norm, &a.copy.error}) advance(*numbers, first);
    advance(g.weight, place);
    auto* copied = static_cast<std::uint8_t*>(a.copy.rows);
    advance(copied, place * size_of(a.copy.type));
    a.copy.rows = copied;
    return pass;
}

// In one go, but for unit rows in slices: their gradient is made first, and then used whole.
void launch_pass(const char* name, const RowPass& pass, const RowWorkspace& workspace, Stream stream) {
    const RowGradient& g = pass.gradient;
    if (!g.unit_rows || g.slice >= g.d) return launch_rows(name, pass, stream);
    if (workspace.count < 1) throw std::invalid_argument("unit rows in slices need a workspace");
    for (std::int64_t first = 0; first < g.n; first += workspace.count) {
        RowPass some = some_latents(pass, first, min_of(workspace.count, g.n - first));
        gradient_rows(some.gradient, workspace.rows, stream);
        some.gradient.slice = g.d;
        some.given = workspace.rows;
        launch_rows(name, some, stream);
    }
}

}  // namespace

void sum_pieces(const OuterProducts& product, const std::int32_t* piece_latent, std::int64_t pieces, std::int64_t n,
                std::int32_t d, std::int32_t split, std::int32_t slice, float* sums, Stream stream) {
    const PieceSums pass{product, piece_latent, pieces, n, d, split, slice, sums};
    const bool aligned = d % 4 == 0 && slice % 4 == 0 && whole_packs(product) && whole_packs(sums);
    with_shape_for(min_of(d, slice), aligned, [&](auto shape) {
        using S = decltype(shape);
        launch("sum_piece", sum_piece<S>, blocks_for(pieces, d, slice, S::kThreads, 0), stream, pass);
    });
}

void bound_rows(const RowGradient& gradient, const float* const* norms, float* bounds, Stream stream) {
    Bounds p{gradient, {}, bounds};
    for (int sum = 0; sum < gradient.count; ++sum) p.norms[sum] = norms[sum];
    launch("bound_row", bound_row, {ceil_div(gradient.n, kBoundThreads / 32), kBoundThreads}, stream, p);
}

void gradient_rows(const RowGradient& gradient, float* rows, Stream stream) {
    RowPass pass{gradient, {}, rows, nullptr};
    pass.gradient.unit_rows = false;
    pass.gradient.squares = nullptr;
    launch_rows("gradient_rows", pass, stream);
}

void gradient_squares(const RowGradient& gradient, const RowWorkspace& workspace, Stream stream) {
    launch_pass("gradient_squares", {gradient, {}, nullptr, nullptr}, workspace, stream);
}

void row_adam(const RowGradient& gradient, const AdamStep& step, const RowWorkspace& workspace, Stream stream) {
    RowPass pass{gradient, step, nullptr, nullptr};
    const bool copy_apart = gradient.slice < gradient.d && !gradient.unit_rows && step.copy.rows;
    if (copy_apart) pass.step.copy = {};
    launch_pass("row_adam", pass, workspace, stream);
    if (!copy_apart) return;
    const CopyPass copy{gradient.needed, step.weight, gradient.n, gradient.d, step.copy};
    const bool aligned = gradient.d % 4 == 0 && whole_packs(step.weight) && whole_packs(step.copy);
    with_shape_for(gradient.d, aligned, [&](auto shape) {
        using S = decltype(shape);
        launch("copy_row", copy_row<S>, {gradient.n, S::kThreads, sizeof(RowMemory<S>)}, stream, copy);
    });
}

}  // namespace sparsekern::cuda
