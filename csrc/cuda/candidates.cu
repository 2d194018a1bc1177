#include "cuda/candidates.h"

namespace sparsekern::cuda {

namespace {

// Beyond every score, and finite: the bits of an infinity with a number in them would be a NaN.
constexpr float kLowest = -3.0e38f, kHighest = 3.0e38f;
constexpr std::int32_t kNoLatent = 0x7fffffff;
constexpr std::uint64_t kNothing = 0;  // below every score packed with its latent
constexpr int kMostParts = 128;        // of a row that is repaired
constexpr unsigned kWarp = 0xffffffff;

// Calls f with a value of the type that operands can have.
template <class F>
void with_type(ElementType type, F f) {
    if (type == ElementType::float32) return f(float{});
    if (type == ElementType::float16) return f(f16{});
    if (type == ElementType::bfloat16) return f(bf16{});
    throw std::invalid_argument("operands must be float32, float16 or bfloat16");
}

std::size_t size_of(ElementType type) {
    return type == ElementType::float32 ? 4 : type == ElementType::float8_e4m3 ? 1 : 2;
}

int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

// Whether numbers can be read 16 bytes at a time.
bool aligned(const void* numbers) { return reinterpret_cast<std::uintptr_t>(numbers) % 16 == 0; }

bool aligned(const Rows& rows, int d, ElementType type) {
    const std::size_t size = size_of(type);
    return aligned(rows.data) && rows.stride * size % 16 == 0 && d * size % 16 == 0;
}

// Numbers in order

// The bits of a float as an unsigned number in the same order.
__device__ __forceinline__ std::uint32_t sortable(float value) {
    const std::uint32_t bits = __float_as_uint(value);
    return bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float from_sortable(std::uint32_t number) {
    return __uint_as_float(number ^ (number & 0x80000000u ? 0x80000000u : 0xffffffffu));
}

// Score above, latent below: one comparison orders by score and sends ties to the lower latent. By size the sign of the
// score is the lowest bit: no latent is there twice, so it never decides.
__device__ __forceinline__ std::uint64_t packed(float score, std::int32_t latent, bool absolute) {
    score += 0.0f;  // -0 is 0
    std::uint32_t low = latent ^ kNoLatent;
    if (absolute) low = low << 1 | (score < 0);
    return std::uint64_t(sortable(absolute ? fabsf(score) : score)) << 32 | low;
}

__device__ __forceinline__ std::int32_t latent_of(std::uint64_t entry, bool absolute) {
    const auto low = static_cast<std::uint32_t>(entry);
    return static_cast<std::int32_t>(absolute ? low >> 1 : low) ^ kNoLatent;
}

__device__ __forceinline__ float score_of(std::uint64_t entry, bool absolute) {
    const float score = from_sortable(static_cast<std::uint32_t>(entry >> 32));
    return absolute && (entry & 1) ? -score : score;
}

// Not below `least`; a NaN becomes it.
__device__ __forceinline__ float at_least(float value, float least) { return value > least ? value : least; }

// Products of rows. A warp takes a slice of both rows at a time, each lane 16-byte vectors of it.

constexpr int kVectors = 4;

template <class T>
constexpr int kInVector = 16 / sizeof(T);

template <class T>
constexpr int kSlice = 32 * kVectors * kInVector<T>;

// What one lane has of a slice.
struct Part {
    Pack16 vector[kVectors];
};

// The elements of a row from `column` on, zeros beyond its end.
template <class T, bool Aligned>
__device__ __forceinline__ Pack16 load_vector(const T* row, int column, int d) {
    if (Aligned) return column < d ? load16(row + column) : Pack16{};
    T elements[kInVector<T>] = {};
#pragma unroll
    for (int e = 0; e < kInVector<T>; ++e)
        if (column + e < d) elements[e] = row[column + e];
    Pack16 pack;
    memcpy(&pack, elements, sizeof pack);
    return pack;
}

template <class T, bool Aligned>
__device__ __forceinline__ Part load_part(const T* row, int slice, int d) {
    const int lane = threadIdx.x % 32;
    Part part;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        part.vector[v] = load_vector<T, Aligned>(row, slice * kSlice<T> + (v * 32 + lane) * kInVector<T>, d);
    return part;
}

template <class T>
__device__ __forceinline__ float multiply(const Pack16& a, const Pack16& b) {
    T left[kInVector<T>], right[kInVector<T>];
    memcpy(left, &a, sizeof a);
    memcpy(right, &b, sizeof b);
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kInVector<T>; ++e) sum = fmaf(to_float(left[e]), to_float(right[e]), sum);
    return sum;
}

template <class T>
__device__ __forceinline__ float warp_sum(T value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
    return value;
}

// The product of two slices. The slices of a row are then added up from the first on: the only order there is.
template <class T>
__device__ __forceinline__ float multiply(const Part& a, const Part& b) {
    static_assert(kVectors == 4);
    return warp_sum((multiply<T>(a.vector[0], b.vector[0]) + multiply<T>(a.vector[1], b.vector[1])) +
                    (multiply<T>(a.vector[2], b.vector[2]) + multiply<T>(a.vector[3], b.vector[3])));
}

// 16-byte vectors of a row in shared memory, which is filled up to whole slices.
template <class T>
__host__ __device__ __forceinline__ int staged_vectors(int d) {
    return ceil_div(d, kSlice<T>) * (kSlice<T> / kInVector<T>);
}

template <class T, bool Aligned>
__device__ __forceinline__ void stage(Pack16* to, const T* row, int d) {
    for (int i = threadIdx.x; i < staged_vectors<T>(d); i += blockDim.x)
        to[i] = load_vector<T, Aligned>(row, i * kInVector<T>, d);
}

// Products of one row in shared memory with some rows of the weight, by a warp.
template <class T, bool Aligned, int Some>
__device__ __forceinline__ void multiply_rows(float (&total)[Some], const Pack16* staged, const Operands& p,
                                              const std::int32_t (&latent)[Some]) {
    const T* weight = static_cast<const T*>(p.weight.data);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < Some; ++c) total[c] = 0;
    for (int slice = 0; slice < ceil_div(p.d, kSlice<T>); ++slice) {
        Part x, rows[Some];
#pragma unroll
        for (int c = 0; c < Some; ++c) rows[c] = load_part<T, Aligned>(weight + latent[c] * p.weight.stride, slice, p.d);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) x.vector[v] = staged[(slice * kVectors + v) * 32 + lane];
#pragma unroll
        for (int c = 0; c < Some; ++c) total[c] += multiply<T>(x, rows[c]);
    }
}

template <class T>
__device__ __forceinline__ float with_bias(float score, const void* bias, std::int32_t latent) {
    return bias ? score + to_float(static_cast<const T*>(bias)[latent]) : score;
}

// Blocks

// The sum of `value` over all threads before this one, and over all. `warps` is shared, one for each warp.
__device__ __forceinline__ unsigned sum_before(unsigned value, unsigned* warps, unsigned* all) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned sum = value;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
        const unsigned before = __shfl_up_sync(kWarp, sum, step);
        if (lane >= step) sum += before;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    unsigned before = sum - value;
    *all = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) {
        if (w < warp) before += warps[w];
        *all += warps[w];
    }
    return before;
}

// Sorts `size` numbers in shared memory, falling; a power of two.
__device__ __forceinline__ void sort_falling(std::uint64_t* numbers, int size) {
    for (int run = 2; run <= size; run *= 2) {
        for (int stride = run / 2; stride > 0; stride /= 2) {
            for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
                const int i = 2 * pair - (pair & (stride - 1)), j = i + stride;
                const std::uint64_t a = numbers[i], b = numbers[j];
                if ((a < b) == ((i & run) == 0)) {
                    numbers[i] = b;
                    numbers[j] = a;
                }
            }
            __syncthreads();
        }
    }
}

// The `top` largest of `total` numbers, falling and followed by kNothing, at `best` in shared memory with room for
// `space`, a power of two and at least twice `top`. fill(first, count, to) is to write numbers first … first + count − 1
// there, with all threads of the block.
template <class Fill>
__device__ __forceinline__ void keep_largest(std::uint64_t* best, int top, int space, int total, Fill fill) {
    int filled = 0;
    for (int done = 0; done < total || filled == 0;) {
        const int more = min_of(space - filled, total - done);
        fill(done, more, best + filled);
        done += more;
        filled += more;
        int size = 2;
        while (size < filled || size < top) size *= 2;
        for (int i = filled + threadIdx.x; i < size; i += blockDim.x) best[i] = kNothing;
        __syncthreads();
        sort_falling(best, size);
        filled = top;
    }
}

// A row to be repaired, asked for by one thread or several.
__device__ __forceinline__ void ask_for_repair(const Candidates& out, std::int64_t row) {
    if (atomicCAS(&out.repaired[row], 0, -1) != 0) return;
    const int place = atomicAdd(out.waiting, 1);
    out.waiting[1 + place] = static_cast<std::int32_t>(row);
    atomicExch(&out.repaired[row], place + 1);
}

// Of every row that waits. There are no more of all rows than `slots`.
__device__ __forceinline__ int parts_of(std::int64_t slots, int waiting) {
    return static_cast<int>(min_of<std::int64_t>(kMostParts, slots / waiting));
}

// Rows in the precision of the screen

struct CastParams {
    Rows rows;
    std::int64_t n;
    int d;
    Cast out;
};

__device__ __forceinline__ float block_sum(float value, float* warps) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += warps[w];
    return sum;
}

struct alignas(16) CastShared {
    float largest[4], squares[4], errors[4];
};

// Elements that are stored together.
template <class T, int Count>
struct alignas(Count * sizeof(T) < 16 ? Count * sizeof(T) : 16) Group {
    T element[Count];
};

template <class T, class Out, bool Aligned>
__global__ void __launch_bounds__(128) cast_kernel(const __grid_constant__ CastParams p) {
    CastShared& shared = shared_memory<CastShared>();
    Pack16* row = reinterpret_cast<Pack16*>(&shared + 1);
    const std::int64_t at = blockIdx.x;
    const int vectors = ceil_div(p.d, kInVector<T>);
    const bool real = at < p.n;
    float largest = 0;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        const T* from = static_cast<const T*>(p.rows.data) + at * p.rows.stride;
        row[i] = real ? load_vector<T, Aligned>(from, i * kInVector<T>, p.d) : Pack16{};
        T elements[kInVector<T>];
        memcpy(elements, &row[i], sizeof elements);
        for (const T& element : elements) largest = at_least(fabsf(to_float(element)), largest);
    }
    float factor = 1;
    if (p.out.limit > 0) {
        for (int step = 16; step > 0; step /= 2)
            largest = at_least(__shfl_xor_sync(kWarp, largest, step), largest);
        if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = largest;
        __syncthreads();
        for (unsigned w = 0; w < blockDim.x / 32; ++w) largest = at_least(shared.largest[w], largest);
        factor = at_least(largest / p.out.limit, 1e-30f);
    }
    Out* out = static_cast<Out*>(p.out.rows) + at * p.d;
    float squares = 0, errors = 0;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {  // what this thread has loaded
        T elements[kInVector<T>];
        memcpy(elements, &row[i], sizeof elements);
        Group<Out, kInVector<T>> rounded;
#pragma unroll
        for (int e = 0; e < kInVector<T>; ++e) {
            const float value = to_float(elements[e]);
            rounded.element[e] = rounded_to<Out>(value / factor);
            const float off = value - to_float(rounded.element[e]) * factor;
            squares += value * value;
            errors += off * off;
        }
        if (Aligned) {
            *reinterpret_cast<Group<Out, kInVector<T>>*>(out + i * kInVector<T>) = rounded;
        } else {
#pragma unroll
            for (int e = 0; e < kInVector<T>; ++e)
                if (i * kInVector<T> + e < p.d) out[i * kInVector<T> + e] = rounded.element[e];
        }
    }
    squares = block_sum(squares, shared.squares);
    errors = block_sum(errors, shared.errors);
    if (threadIdx.x > 0) return;
    if (p.out.limit > 0) p.out.scale[at] = factor;
    p.out.norm[at] = sqrtf(squares);
    p.out.error[at] = sqrtf(errors);
}

// Keys from scores in memory

struct PanelParams {
    Panel panel;
    Keys keys;
    float* out;
};

__device__ __forceinline__ float key_of(float score, int member, int member_bits) {
    return __uint_as_float((__float_as_uint(score) & ~0u << member_bits) | static_cast<unsigned>(member));
}

// Of `Count` neighbouring numbers the first `real`, which are all but at the end.
template <class N, int Count>
__device__ __forceinline__ void load_numbers(float (&to)[Count], const void* from, std::int64_t real) {
    Group<N, Count> group{};
    if (real >= Count) {
        group = *static_cast<const Group<N, Count>*>(from);
    } else {
#pragma unroll
        for (int c = 0; c < Count; ++c)
            if (c < real) group.element[c] = static_cast<const N*>(from)[c];
    }
#pragma unroll
    for (int c = 0; c < Count; ++c) to[c] = to_float(group.element[c]);
}

// A thread has `Wide` neighbouring buckets of one row, so that it reads 16 bytes at a time where it can.
template <class T, int Keep, int Wide>
__global__ void __launch_bounds__(128, 6) bucket_kernel(const __grid_constant__ PanelParams p) {
    const Panel& panel = p.panel;
    const int n_buckets = p.keys.n_buckets, groups = ceil_div(n_buckets, Wide);
    const std::int64_t place = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const std::int64_t row = place / groups;
    const int bucket = static_cast<int>(place % groups) * Wide;
    if (row >= panel.rows) return;
    float* out = p.out + row * Keep * n_buckets + bucket;
    Group<float, Wide> best[Keep];
#pragma unroll
    for (int turn = 0; turn < Keep; ++turn) {
        if (panel.first_member) best[turn] = *reinterpret_cast<const Group<float, Wide>*>(out + turn * n_buckets);
#pragma unroll
        for (int b = 0; b < Wide; ++b)
            if (!panel.first_member) best[turn].element[b] = kLowest;
    }
    const float by_row = panel.weight_scale ? panel.x_scale[row] : 1.0f;
    const T* source = static_cast<const T*>(panel.scores.data) + row * panel.scores.stride + bucket;
    for (int member = 0; member < panel.members; ++member, source += n_buckets) {
        // The last members need not have all buckets, nor the panel's rows room for them.
        const std::int64_t latent = std::int64_t(panel.first_member + member) * n_buckets + bucket;
        const std::int64_t real = panel.n - latent;
        if (real <= 0) break;
        float scores[Wide], scales[Wide], biases[Wide];
        load_numbers<T>(scores, source, real);
        if (panel.weight_scale) load_numbers<float>(scales, panel.weight_scale + latent, real);
        if (panel.bias && panel.bias_type == ElementType::float32)
            load_numbers<float>(biases, static_cast<const float*>(panel.bias) + latent, real);
        else if (panel.bias)  // of the type of the scores
            load_numbers<T>(biases, static_cast<const T*>(panel.bias) + latent, real);
#pragma unroll
        for (int b = 0; b < Wide; ++b) {
            float score = min_of(at_least(scores[b], kLowest), kHighest);  // float16 overflows
            if (panel.weight_scale) score *= by_row * scales[b];
            if (panel.bias) score += at_least(biases[b], kLowest);
            if (panel.absolute) score = fabsf(score);
            float key = b < real ? key_of(score, panel.first_member + member, p.keys.member_bits) : kLowest;
#pragma unroll
            for (int turn = 0; turn < Keep; ++turn) {
                float& held = best[turn].element[b];
                const float larger = max_of(key, held);
                key = min_of(key, held);
                held = larger;
            }
        }
    }
#pragma unroll
    for (int turn = 0; turn < Keep; ++turn)
        *reinterpret_cast<Group<float, Wide>*>(out + turn * n_buckets) = best[turn];
}

// Selection

constexpr int kDigitBits = 8, kBins = 1 << kDigitBits;

struct SelectParams {
    Keys keys;
    Slack slack;
    int k;
    Owners owners;
    Candidates out;
};

struct alignas(16) SelectShared {
    unsigned bins[kBins];
    unsigned warps[8];
    std::uint32_t prefix;
    int wanted;
};

// The bin that holds the `wanted`-th largest, by one warp; and which of its own it is.
__device__ __forceinline__ void find_bin(const unsigned* bins, int wanted, int* bin, int* rest) {
    constexpr int kEach = kBins / 32;
    const int lane = threadIdx.x % 32;
    int sum = 0;
    for (int b = 0; b < kEach; ++b) sum += bins[lane * kEach + b];
    int reached = sum;  // with those of higher bins
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int above = __shfl_down_sync(kWarp, reached, step);
        if (lane + step < 32) reached += above;
    }
    *bin = -1;
    if (reached < wanted || reached - sum >= wanted) return;
    int above = reached - sum, b = kEach - 1;
    for (; above + static_cast<int>(bins[lane * kEach + b]) < wanted; --b) above += bins[lane * kEach + b];
    *bin = lane * kEach + b;
    *rest = wanted - above;
}

// The k-th largest of the numbers in shared memory, its lowest bits zero: the least score it can stand for.
__device__ __forceinline__ std::uint32_t kth_largest(const std::uint32_t* numbers, int count, int k, int low_bits, SelectShared& shared) {
    std::uint32_t prefix = 0;
    int wanted = k;
    for (int decided = 0; decided < 32 - low_bits;) {
        const int width = min_of(kDigitBits, 32 - low_bits - decided), shift = 32 - decided - width;
        const std::uint32_t known = decided == 0 ? 0 : ~0u << (32 - decided), digit = (1u << width) - 1;
        for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) shared.bins[bin] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x)
            if ((numbers[i] & known) == prefix) atomicAdd(&shared.bins[numbers[i] >> shift & digit], 1u);
        __syncthreads();
        if (threadIdx.x < 32) {
            int bin, rest;
            find_bin(shared.bins, wanted, &bin, &rest);
            if (bin >= 0) {
                shared.prefix = prefix | static_cast<std::uint32_t>(bin) << shift;
                shared.wanted = rest;
            }
        }
        __syncthreads();
        prefix = shared.prefix;
        wanted = shared.wanted;
        decided += width;
    }
    return prefix;
}

// A key in order. The -0 of a product with zero is 0, with which it ties.
__device__ __forceinline__ std::uint32_t key_number(float key, std::uint32_t low) {
    const std::uint32_t bits = __float_as_uint(key);
    return sortable((bits & ~low) == 0x80000000u ? __uint_as_float(bits & low) : key);
}

// -1 where a bucket has no such member; else the number among all latents, of which `before` are others'.
__device__ __forceinline__ std::int32_t real_latent(int latent, int n, int before) {
    return latent < n ? before + latent : -1;
}

__global__ void __launch_bounds__(256) select_kernel(const __grid_constant__ SelectParams p) {
    SelectShared& shared = shared_memory<SelectShared>();
    std::uint32_t* numbers = reinterpret_cast<std::uint32_t*>(&shared + 1);
    const int keep = p.keys.keep, n_members = p.keys.n_members, n_keys = p.keys.n_buckets * keep;
    const int across = p.keys.n_buckets / p.owners.count, room = p.out.room;
    const std::int64_t row = blockIdx.x;
    const std::uint32_t low = (1u << p.keys.member_bits) - 1;
    const float* source = p.keys.keys + row * n_keys;
    if (n_keys % 4 == 0) {
        for (int i = 4 * threadIdx.x; i < n_keys; i += 4 * blockDim.x) {
            Pack16 pack = load16_streaming(source + i);
#pragma unroll
            for (std::uint32_t& word : pack.word) word = key_number(__uint_as_float(word), low);
            *reinterpret_cast<Pack16*>(numbers + i) = pack;
        }
    } else {
        for (int i = threadIdx.x; i < n_keys; i += blockDim.x) numbers[i] = key_number(source[i], low);
    }
    const std::uint32_t kth = kth_largest(numbers, n_keys, p.k, p.keys.member_bits, shared);
    const float least = at_least(from_sortable(kth), kLowest);
    const float off = p.slack.relative * fabsf(least) + 2 * p.slack.slack[row / p.out.share];
    const std::uint32_t threshold = sortable(at_least(least - off, kLowest)) & ~low;

    // A bucket whose last key is a candidate may hide more candidates: all its members become some.
    const auto first_key = [&](int bucket) { return bucket / across * across * (keep - 1) + bucket; };
    const auto hides = [&](int bucket) {
        return n_members > keep && numbers[first_key(bucket) + (keep - 1) * across] >= threshold;
    };
    const auto takes = [&](int bucket, int turn) {
        const std::uint32_t number = numbers[first_key(bucket) + turn * across];
        return number >= threshold && from_sortable(number) > kLowest;  // neither a bucket's void nor a NaN
    };
    unsigned mine = 0;  // candidates of their own, and 2^16 for each bucket to be opened
    for (int bucket = threadIdx.x; bucket < p.keys.n_buckets; bucket += blockDim.x) {
        if (hides(bucket)) {
            mine += 1u << 16;
        } else {
            for (int turn = 0; turn < keep; ++turn) mine += takes(bucket, turn);
        }
    }
    unsigned all;
    const unsigned before = sum_before(mine, shared.warps, &all);
    const int plain = static_cast<int>(all & 0xffff), total = plain + static_cast<int>(all >> 16) * n_members;
    // Latents switched off by a bias of -inf are no candidates. Where they are needed, all are looked at.
    const bool certain = p.k <= total && total <= room;
    if (threadIdx.x == 0) {
        p.out.count[row] = certain ? total : kNoLatent;
        p.out.repaired[row] = 0;
        if (!certain) ask_for_repair(p.out, row);
    }
    if (!certain) return;

    std::int32_t* latents = p.out.latents + row * room;
    float* scores = p.out.scores + row * room;
    int place = static_cast<int>(before & 0xffff), opened = plain + static_cast<int>(before >> 16) * n_members;
    for (int bucket = threadIdx.x; bucket < p.keys.n_buckets; bucket += blockDim.x) {
        const int owner = bucket / across, within = bucket % across;
        const int others = p.owners.experts ? p.owners.experts[row * p.owners.count + owner] * p.owners.n : 0;
        if (hides(bucket)) {
            for (int member = 0; member < n_members; ++member, ++opened) {
                latents[opened] = real_latent(member * across + within, p.owners.n, others);
                scores[opened] = __uint_as_float(0x7fc00000);
            }
            continue;
        }
        for (int turn = 0; turn < keep; ++turn) {
            if (!takes(bucket, turn)) continue;
            const float key = from_sortable(numbers[first_key(bucket) + turn * across]);
            const int member = static_cast<int>(__float_as_uint(key) & low);
            latents[place] = real_latent(member * across + within, p.owners.n, others);
            scores[place] = key;
            ++place;
        }
    }
}

// Exact scores

constexpr int kRescoreWarps = 4;
constexpr int kTogether = 2;  // candidates that a warp has at one time

struct RescoreParams {
    Operands operands;
    Candidates candidates;
    const float* check;
    int warps_of_row;
};

// The exact score of a candidate takes the place of the screen's. The slack of fp8 is an estimate: errors far beyond
// what it was estimated from discredit it.
template <class T>
__device__ __forceinline__ void finish_score(const Operands& operands, const Candidates& candidates, const float* check,
                                             std::int64_t place, std::int32_t latent, float score) {
    score = with_bias<T>(score, operands.bias, latent);
    if (check) {
        const std::int64_t row = place / candidates.room;
        const float compared = operands.absolute ? fabsf(score) : score;
        if (fabsf(compared - candidates.scores[place]) > 0.5f * check[row / candidates.share])
            ask_for_repair(candidates, row);
    }
    candidates.scores[place] = score;
}

// By token: a block has one, its row in shared memory.
template <class T, bool Aligned>
__global__ void __launch_bounds__(32 * kRescoreWarps) rescore_kernel(const __grid_constant__ RescoreParams p) {
    Pack16* x = &shared_memory<Pack16>();
    const Candidates& out = p.candidates;
    const std::int64_t token = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    stage<T, Aligned>(x, static_cast<const T*>(p.operands.x.data) + token * p.operands.x.stride, p.operands.d);
    __syncthreads();
    for (int mine = warp / p.warps_of_row; mine < out.share; mine += kRescoreWarps / p.warps_of_row) {
        const std::int64_t row = token * out.share + mine;
        const int count = out.count[row];
        if (count > out.room) continue;
        for (int first = warp % p.warps_of_row * kTogether; first < count; first += p.warps_of_row * kTogether) {
            std::int32_t latent[kTogether], read[kTogether];
#pragma unroll
            for (int c = 0; c < kTogether; ++c) {
                latent[c] = first + c < count ? out.latents[row * out.room + first + c] : -1;
                read[c] = latent[c] >= 0 ? latent[c] : max_of(latent[0], 0);
            }
            float score[kTogether];
            multiply_rows<T, Aligned>(score, x, p.operands, read);
            // All lanes have all scores, each writes one.
#pragma unroll
            for (int c = 0; c < kTogether; ++c) {
                const std::int64_t place = row * out.room + first + c;
                if (lane != c || first + c >= count) continue;
                if (latent[c] >= 0) finish_score<T>(p.operands, out, p.check, place, latent[c], score[c]);
                else out.scores[place] = -INFINITY;
            }
        }
    }
}

// By latent: candidates are sorted by it, first counted, then placed.

struct PairParams {
    Candidates candidates;
    std::int32_t* starts;
    Pair* pairs;  // nullptr: to be counted
};

__global__ void __launch_bounds__(256) pair_kernel(const __grid_constant__ PairParams p) {
    const Candidates& from = p.candidates;
    const std::int64_t place = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = place / from.room;
    if (row >= from.rows) return;
    const int count = from.count[row];
    if (count > from.room || place % from.room >= count) return;
    const std::int32_t latent = from.latents[place];
    if (latent < 0) {
        from.scores[place] = -INFINITY;
    } else if (!p.pairs) {
        atomicAdd(&p.starts[latent], 1);
    } else {
        // From the last place of the latent down to its first. The order in it is left to chance; no sum depends on it.
        const int position = atomicAdd(&p.starts[latent], -1) - 1;
        p.pairs[position] = {static_cast<std::int32_t>(place), latent};
    }
}

constexpr int kRun = 16;  // neighbouring pairs that a warp has
constexpr int kRunWarps = 8;

struct SliceParams {
    Operands operands;
    Candidates candidates;
    const float* check;
    const Pair* pairs;
    const std::int32_t* total;
    float* sums;
    int slice, slices;
};

// One slice of the width. Slices are launched one after the other, so that the tokens' columns stay in L2.
template <class T, bool Aligned>
__global__ void __launch_bounds__(32 * kRunWarps) slice_kernel(const __grid_constant__ SliceParams p) {
    const int lane = threadIdx.x % 32, total = *p.total;
    const std::int64_t first = (std::int64_t(blockIdx.x) * kRunWarps + threadIdx.x / 32) * kRun;
    if (first >= total) return;
    const int count = static_cast<int>(min_of<std::int64_t>(kRun, total - first));
    const Operands& operands = p.operands;
    const Pair mine = p.pairs[first + min_of(lane, count - 1)];
    const std::int32_t my_token = mine.place / p.candidates.room / p.candidates.share;
    float sum = 0;
    Part weight{};
    std::int32_t held = -1;
    for (int i = 0; i < count; ++i) {
        const std::int32_t latent = __shfl_sync(kWarp, mine.latent, i);
        const std::int64_t token = __shfl_sync(kWarp, my_token, i);
        if (latent != held)
            weight = load_part<T, Aligned>(static_cast<const T*>(operands.weight.data) + latent * operands.weight.stride,
                                           p.slice, operands.d);
        held = latent;
        const Part x = load_part<T, Aligned>(static_cast<const T*>(operands.x.data) + token * operands.x.stride, p.slice,
                                             operands.d);
        const float product = multiply<T>(x, weight);
        if (lane == i) sum = product;
    }
    if (lane >= count) return;
    if (p.slice > 0) sum += p.sums[first + lane];
    if (p.slice + 1 < p.slices) p.sums[first + lane] = sum;
    else finish_score<T>(operands, p.candidates, p.check, mine.place, mine.latent, sum);
}

// Repair

struct RepairParams {
    Operands operands;
    Owners owners;
    Candidates candidates;
    int k, space;
    std::uint64_t* spare;
    std::int64_t slots;
};

// The k best of a part of all latents of each row that waits.
template <class T, bool Aligned>
__global__ void __launch_bounds__(256, 2) repair_kernel(const __grid_constant__ RepairParams p) {
    std::uint64_t* best = &shared_memory<std::uint64_t>();
    Pack16* x = reinterpret_cast<Pack16*>(best + p.space);
    const Operands& operands = p.operands;
    const int waiting = p.candidates.waiting[0];
    if (waiting == 0) return;
    const int parts = parts_of(p.slots, waiting), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int n = p.owners.count * p.owners.n, each = ceil_div(n, parts);
    for (int item = blockIdx.x; item < waiting * parts; item += gridDim.x) {
        const std::int64_t row = p.candidates.waiting[1 + item / parts], token = row / p.candidates.share;
        const int begin = min_of(n, item % parts * each), end = min_of(n, begin + each);
        stage<T, Aligned>(x, static_cast<const T*>(operands.x.data) + token * operands.x.stride, operands.d);
        __syncthreads();
        const auto latent_at = [&](int i) {
            if (!p.owners.experts) return i;
            return p.owners.experts[row * p.owners.count + i / p.owners.n] * p.owners.n + i % p.owners.n;
        };
        keep_largest(best, p.k, p.space, end - begin, [&](int first, int count, std::uint64_t* to) {
            for (int i = warp * kTogether; i < count; i += blockDim.x / 32 * kTogether) {
                std::int32_t latent[kTogether];
#pragma unroll
                for (int c = 0; c < kTogether; ++c)
                    latent[c] = latent_at(begin + first + min_of(i + c, count - 1));
                float score[kTogether];
                multiply_rows<T, Aligned>(score, x, operands, latent);
                if (lane > 0) continue;
#pragma unroll
                for (int c = 0; c < kTogether; ++c)
                    if (i + c < count)
                        to[i + c] = packed(with_bias<T>(score[c], operands.bias, latent[c]), latent[c], operands.absolute);
            }
        });
        for (int i = threadIdx.x; i < p.k; i += blockDim.x) p.spare[std::int64_t(item) * p.k + i] = best[i];
        __syncthreads();
    }
}

struct TakeParams {
    Candidates candidates;
    int k, space;
    bool absolute;
    const std::uint64_t* spare;
    std::int64_t slots;
    void* values;
    std::int32_t* indices;
};

template <class T>
__global__ void __launch_bounds__(256) take_kernel(const __grid_constant__ TakeParams p) {
    std::uint64_t* best = &shared_memory<std::uint64_t>();
    const Candidates& from = p.candidates;
    const std::int64_t row = blockIdx.x;
    const int repaired = from.repaired[row];
    if (repaired) {
        const int parts = parts_of(p.slots, from.waiting[0]);
        const std::uint64_t* source = p.spare + std::int64_t(repaired - 1) * parts * p.k;
        keep_largest(best, p.k, p.space, parts * p.k, [&](int first, int count, std::uint64_t* to) {
            for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = source[first + i];
        });
    } else {
        const std::int64_t begin = row * from.room;
        keep_largest(best, p.k, p.space, from.count[row], [&](int first, int count, std::uint64_t* to) {
            for (int i = threadIdx.x; i < count; i += blockDim.x) {
                const std::int32_t latent = from.latents[begin + first + i];
                to[i] = latent < 0 ? kNothing : packed(from.scores[begin + first + i], latent, p.absolute);
            }
        });
    }
    for (int i = threadIdx.x; i < p.k; i += blockDim.x) {
        float score = score_of(best[i], p.absolute);
        if (!p.absolute && score <= 0) score = 0;
        static_cast<T*>(p.values)[row * p.k + i] = rounded_to<T>(score);
        p.indices[row * p.k + i] = latent_of(best[i], p.absolute);
    }
}

// Numbers that are sorted at one time.
int sorting_space(int k, int usual) { return power_of_two(max_of(2 * k, usual)); }

}  // namespace

void cast_rows(ElementType type, const Rows& rows, std::int64_t n, int d, const Cast& out, Stream stream) {
    const bool vectors = aligned(rows, d, type);
    const auto run = [&](auto in, auto to) {
        using T = decltype(in);
        using Out = decltype(to);
        const auto kernel = vectors ? cast_kernel<T, Out, true> : cast_kernel<T, Out, false>;
        const std::size_t bytes = sizeof(CastShared) + sizeof(Pack16) * ceil_div(d, kInVector<T>);
        launch("cast_rows", kernel, {out.padded, 128, (bytes + 15) / 16 * 16}, stream, CastParams{rows, n, d, out});
    };
    with_type(type, [&](auto in) {
        if (out.type == ElementType::float8_e4m3) return run(in, e4m3{});
        if (out.type == ElementType::float16) return run(in, f16{});
        if (out.type == ElementType::bfloat16) return run(in, bf16{});
        throw std::invalid_argument("rows can be rounded to float16, bfloat16 and float8_e4m3");
    });
}

void bucket_panel(const Panel& panel, const Keys& keys, float* out, Stream stream) {
    const std::size_t size = size_of(panel.type);
    const int width = static_cast<int>(16 / size);
    if (panel.bias && panel.bias_type != panel.type && panel.bias_type != ElementType::float32)
        throw std::invalid_argument("the bias of a panel is of its type or float32");
    const bool vectors = aligned(panel.scores, keys.n_buckets, panel.type) && aligned(panel.bias) &&
                         aligned(panel.weight_scale);
    const std::int64_t threads = panel.rows * ceil_div(keys.n_buckets, vectors ? width : 1);
    with_type(panel.type, [&](auto type) {
        using T = decltype(type);
        constexpr int kWide = kInVector<T>;
        const auto kernel = keys.keep == 1   ? (vectors ? bucket_kernel<T, 1, kWide> : bucket_kernel<T, 1, 1>)
                            : keys.keep == 2 ? (vectors ? bucket_kernel<T, 2, kWide> : bucket_kernel<T, 2, 1>)
                                             : (vectors ? bucket_kernel<T, 3, kWide> : bucket_kernel<T, 3, 1>);
        launch("bucket_panel", kernel, {ceil_div(threads, 128), 128}, stream, PanelParams{panel, keys, out});
    });
}

void select_candidates(const Keys& keys, const Slack& slack, int k, const Owners& owners, const Candidates& candidates,
                       Stream stream) {
    const int n_keys = keys.n_buckets * keys.keep, threads = min_of(256, max_of(32, n_keys / 8 / 32 * 32));
    const std::size_t bytes = sizeof(SelectShared) + (4 * n_keys + 15) / 16 * 16;
    launch("select_candidates", select_kernel, {candidates.rows, threads, bytes}, stream,
           SelectParams{keys, slack, k, owners, candidates});
}

void rescore(const Operands& operands, const Candidates& candidates, const float* check, Stream stream) {
    const bool vectors =
        aligned(operands.x, operands.d, operands.type) && aligned(operands.weight, operands.d, operands.type);
    with_type(operands.type, [&](auto type) {
        using T = decltype(type);
        const auto kernel = vectors ? rescore_kernel<T, true> : rescore_kernel<T, false>;
        // The rows of a token, where it has several, are for its warps to share out.
        const int warps = candidates.share == 1 ? kRescoreWarps : candidates.share == 2 ? kRescoreWarps / 2 : 1;
        launch("rescore", kernel,
               {candidates.rows / candidates.share, 32 * kRescoreWarps, staged_vectors<T>(operands.d) * sizeof(Pack16)},
               stream, RescoreParams{operands, candidates, check, warps});
    });
}

void count_by_latent(const Candidates& candidates, std::int32_t* starts, Stream stream) {
    launch("count_by_latent", pair_kernel, {ceil_div(candidates.rows * candidates.room, 256), 256}, stream,
           PairParams{candidates, starts, nullptr});
}

void rescore_by_latent(const Operands& operands, const Candidates& candidates, const float* check, std::int32_t* starts,
                       std::int64_t n, Pair* pairs, float* sums, Stream stream) {
    const std::int64_t places = candidates.rows * candidates.room;
    launch("place_by_latent", pair_kernel, {ceil_div(places, 256), 256}, stream, PairParams{candidates, starts, pairs});
    const bool vectors =
        aligned(operands.x, operands.d, operands.type) && aligned(operands.weight, operands.d, operands.type);
    with_type(operands.type, [&](auto type) {
        using T = decltype(type);
        const auto kernel = vectors ? slice_kernel<T, true> : slice_kernel<T, false>;
        const int slices = ceil_div(operands.d, kSlice<T>);
        for (int slice = 0; slice < slices; ++slice)
            launch("rescore_by_latent", kernel, {ceil_div(places, kRun * kRunWarps), 32 * kRunWarps}, stream,
                   SliceParams{operands, candidates, check, pairs, starts + n, sums, slice, slices});
    });
}

void repair(const Operands& operands, const Owners& owners, const Candidates& candidates, int k, std::uint64_t* spare,
            std::int64_t slots, Stream stream) {
    const bool vectors =
        aligned(operands.x, operands.d, operands.type) && aligned(operands.weight, operands.d, operands.type);
    with_type(operands.type, [&](auto type) {
        using T = decltype(type);
        const auto kernel = vectors ? repair_kernel<T, true> : repair_kernel<T, false>;
        const int space = sorting_space(k, 512);
        const std::size_t bytes = sizeof(std::uint64_t) * space + staged_vectors<T>(operands.d) * sizeof(Pack16);
        launch("repair", kernel, {2 * multiprocessors(), 256, bytes}, stream,
               RepairParams{operands, owners, candidates, k, space, spare, slots});
    });
}

void take_best(ElementType type, const Candidates& candidates, int k, bool absolute, const std::uint64_t* spare,
               std::int64_t slots, void* values, std::int32_t* indices, Stream stream) {
    with_type(type, [&](auto of) {
        const int space = sorting_space(k, min_of(256, candidates.room));
        launch("take_best", take_kernel<decltype(of)>,
               {candidates.rows, min_of(256, max_of(32, space / 2)), sizeof(std::uint64_t) * space}, stream,
               TakeParams{candidates, k, space, absolute, spare, slots, values, indices});
    });
}

}  // namespace sparsekern::cuda
