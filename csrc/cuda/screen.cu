// A persistent matmul with a filter for an epilogue.
//
// Work. A block has 128 tokens and two consumer groups of four warps. A unit of work is those tokens by 16 neighbouring
// buckets with all their members: each group has 8 of the buckets, and goes through 16 members at a time, a tile of 128
// tokens by 128 latents in 128 registers. The tile's latents come through a tensor map of the weight as (d, bucket,
// member), so that row 8·j + r of it is member j of bucket r: in the layout of the accumulators all members of a bucket
// are then in one thread, and the filter exchanges nothing. The best keys stay in registers until the unit is done.
//
// Overlap. Both groups multiply the same chunks of x, each with rows of the weight of its own. The chunks of x repeat
// with every tile, so the groups need not begin a tile together: the second one begins up to three chunks later, and
// sums each tile from there, around. While one group filters, the other one has the tensor cores to itself, and runs
// ahead in the ring of chunks, which is somewhat deeper than a filter is long. Two groups in plain turns, which share
// nothing, would want 64 bytes a cycle at full speed, all that a multiprocessor can take in. These want 48.
//
// Clusters. The blocks of a cluster have different tokens and the same buckets. Each loads its part of the weight's
// rows and sends it to all. Of the L2 cache a block then wants 48, 32 or 24 bytes a cycle for clusters of 1, 2 or 4:
// for a whole H100 at 900 TFLOP/s 10, 6.7 or 5 TB/s, and its L2 has 5 to 7.
//
// Order. screen_tile_of() has as many tokens go down the buckets together as are 16 MiB of x, which stay in the cache;
// the weight is read from memory once for all of them. At 8192 tokens and 131072 latents in two bytes: with d = 768
// once, 201 MB; with d = 4096 four times 1.07 GB, 1.4 ms of memory's time beside 11 ms of products.
#include "cuda/screen.h"

#include <cmath>

#include "cuda/hopper.h"

#pragma nv_diag_suppress 177  // functions that are not used: where the kernel traps, those that it is made of

namespace sparsekern::cuda {
namespace {

constexpr int kTokens = 128, kBuckets = 8, kMembers = 16, kLatents = kBuckets * kMembers;
constexpr int kGroups = 2, kGroupThreads = 128, kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kStages = 4;
constexpr int kMostStagger = 3;  // chunks; a filter takes as long as two or three chunks of one group's products
constexpr int kChunkBytes = 128;  // of a row
constexpr int kTileBytes = 128 * kChunkBytes;
constexpr int kSteps = kChunkBytes / 32;  // products to a chunk
constexpr float kLowest = -3.0e38f;  // beyond every score, and finite: an infinity with a number in its bits is a NaN
constexpr std::int64_t kCachedBytes = 16 << 20;
static_assert(kTokens == 128 && kLatents == 128, "tiles of both operands are alike");

struct Stage {
    unsigned char x[kTileBytes];
    unsigned char weight[kGroups][kTileBytes];
};

struct alignas(16) FactorPair {
    float scale[2], bias[2];  // of two neighbouring buckets
};

struct alignas(1024) Shared {
    Stage stages[kStages];
    FactorPair factors[kGroups][2][kLatents / 2];
    Mbarrier full[kStages], empty[kStages];
};

struct ScreenParams {
    TensorMap x, weight;
    const float* x_scale;
    const float* weight_scale;
    const void* bias;
    ElementType bias_type;
    float* keys;
    const std::int32_t* order;  // nullptr: no slots
    const std::int32_t* offsets;
    const std::int32_t* first_tile;
    const std::int32_t* tile_expert;
    std::int32_t n_active, n_experts;
    std::int32_t rows, chunks, stagger;
    std::int32_t n_buckets, n_members, tiles;  // tiles: of a group in a unit
    std::int32_t whole_members, longer_buckets;  // members that all buckets have; how many buckets have one more
    std::int32_t token_tiles, bucket_tiles, group, units;
    std::int32_t keep;
    std::uint32_t score_bits;  // those of a key that are the score's
    int cluster;
};

// The ring of stages: the one that is next, and the parity of its round.
struct Ring {
    int stage = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage < kStages) return;
        stage = 0;
        parity ^= 1;
    }
};

struct Unit {
    bool exists;
    std::int32_t row, end;  // rows of this block's tokens: 128 of them, as far as below `end`
    std::int32_t bucket;    // the first of 16
    std::int32_t expert;
};

__device__ __forceinline__ Unit unit_of(const ScreenParams& p, std::int32_t number) {
    const ScreenTile tile = screen_tile_of(number, p.token_tiles, p.bucket_tiles, p.group);
    const std::int32_t bucket = tile.buckets * (kGroups * kBuckets), height = p.cluster * kTokens;
    const std::int32_t mine = static_cast<std::int32_t>(cluster_rank()) * kTokens;
    if (!p.order) return {true, tile.tokens * height + mine, p.rows, bucket, 0};
    const std::int32_t expert = p.tile_expert[tile.tokens];
    if (expert >= p.n_experts) return {false, 0, 0, 0, 0};
    const std::int32_t row = p.offsets[expert] + (tile.tokens - p.first_tile[expert]) * height + mine;
    return {true, row, p.offsets[expert + 1], bucket, expert};
}

// One thread loads everything, as stages become free in all blocks that get a part of it.
template <class T>
__device__ __forceinline__ void load(const ScreenParams& p, Shared& shared, std::int32_t first, std::int32_t step) {
    constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
    const int rank = static_cast<int>(cluster_rank()), part = kMembers / p.cluster;
    const auto everyone = static_cast<std::uint16_t>((1 << p.cluster) - 1);
    const std::int32_t own = p.tiles * p.chunks;  // chunks that a group multiplies in a unit
    Ring ring;
    for (std::int32_t number = first; number < p.units; number += step) {
        const Unit unit = unit_of(p, number);
        if (!unit.exists) continue;
        const std::int32_t members = unit.expert * p.n_members + rank * part;
        std::int32_t chunk = 0, tile[kGroups] = {0, 0}, since[kGroups] = {0, 0};
        for (std::int32_t position = 0; position < own + p.stagger; ++position) {
            Stage& stage = shared.stages[ring.stage];
            Mbarrier* full = &shared.full[ring.stage];
            const bool wanted[kGroups] = {position < own, position >= p.stagger};
            mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
            mbarrier_arrive_expect_tx(full, kTileBytes * (1 + wanted[0] + wanted[1]));
            tensor_load_2d(stage.x, p.x, full, chunk * kChunk, unit.row);
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                if (!wanted[group]) continue;
                void* to = stage.weight[group] + rank * part * kBuckets * kChunkBytes;
                const std::int32_t bucket = unit.bucket + group * kBuckets, member = members + tile[group] * kMembers;
                if (p.cluster == 1) tensor_load_3d(to, p.weight, full, chunk * kChunk, bucket, member);
                else tensor_load_3d_multicast(to, p.weight, full, chunk * kChunk, bucket, member, everyone);
                if (++since[group] == p.chunks) {
                    since[group] = 0;
                    ++tile[group];
                }
            }
            if (++chunk == p.chunks) chunk = 0;
            ring.advance();
        }
    }
}

__device__ __forceinline__ float number_at(const void* numbers, ElementType type, std::int64_t place) {
    switch (type) {
        case ElementType::float16: return to_float(static_cast<const f16*>(numbers)[place]);
        case ElementType::bfloat16: return to_float(static_cast<const bf16*>(numbers)[place]);
        default: return static_cast<const float*>(numbers)[place];
    }
}

// The three largest keys of one token and bucket, of members that come in fours.
struct Best {
    float top[3];  // falling
    // The smaller one of two is among the three largest of all only if no other smaller one is above it: that one and
    // both larger ones would be three. So of all smaller ones, of pairs and then of the larger ones of two pairs, the
    // largest is enough. A four then takes 14 operations instead of 20.
    float smaller[2];

    __device__ __forceinline__ void clear() { top[0] = top[1] = top[2] = smaller[0] = smaller[1] = kLowest; }

    __device__ __forceinline__ void insert(float key) {
        top[2] = fmaxf(top[2], fminf(top[1], key));
        top[1] = fmaxf(top[1], fminf(top[0], key));
        top[0] = fmaxf(top[0], key);
    }

    __device__ __forceinline__ void add(const float (&key)[4]) {
        const float first = fmaxf(key[0], key[1]), second = fmaxf(key[2], key[3]);
        smaller[0] = fmaxf(smaller[0], fmaxf(fminf(key[0], key[1]), fminf(key[2], key[3])));
        smaller[1] = fmaxf(smaller[1], fminf(first, second));
        insert(fmaxf(first, second));
    }

    __device__ __forceinline__ void finish() {
        insert(smaller[0]);
        insert(smaller[1]);
    }
};

// The scores of a tile among the best keys. Its first member has the number `member`; unless kAllReal, the thread's two
// buckets have `end` members.
template <bool kAllReal>
__device__ __forceinline__ void filter(Best (&best)[8], const float (&acc)[2][64], const FactorPair* factors,
                                       const float (&row_scale)[4], std::uint32_t score_bits, std::int32_t member,
                                       const std::int32_t (&end)[2]) {
#pragma unroll
    for (int j = 0; j < kMembers; j += 4) {
        FactorPair factor[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) factor[i] = factors[(j + i) * (kBuckets / 2)];
#pragma unroll
        for (int place = 0; place < 8; ++place) {
            const int m = place / 4, h = place / 2 % 2, c = place % 2;
            float key[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float scale = row_scale[2 * m + h] * factor[i].scale[c];
                const float score = fmaf(acc[m][4 * (j + i) + 2 * h + c], scale, factor[i].bias[c]);
                const std::int32_t number = member + j + i;
                key[i] = __uint_as_float((__float_as_uint(score) & score_bits) | static_cast<std::uint32_t>(number));
                if (!kAllReal && number >= end[c]) key[i] = kLowest;
            }
            best[place].add(key);
        }
    }
}

// Members of a bucket that exist.
__device__ __forceinline__ std::int32_t members_of(const ScreenParams& p, std::int32_t bucket) {
    return bucket < p.n_buckets ? p.whole_members + (bucket < p.longer_buckets) : 0;
}

struct alignas(8) Pair {
    float first, second;
};

// To buckets `bucket`, which is even, and the next one, if there is one.
__device__ __forceinline__ void store_pair(float* to, float first, float second, std::int32_t n_buckets,
                                           std::int32_t bucket) {
    if (n_buckets % 2 == 0) {
        *reinterpret_cast<Pair*>(to) = {first, second};
    } else {
        to[0] = first;
        if (bucket + 1 < n_buckets) to[1] = second;
    }
}

// One of the two groups that multiply and filter.
template <class T>
__device__ __forceinline__ void consume(const ScreenParams& p, Shared& shared, int group, std::int32_t first,
                                        std::int32_t step) {
    const int thread = static_cast<int>(threadIdx.x) % kGroupThreads, warp = thread / 32, lane = thread % 32;
    const int pair = lane % 4;  // of neighbouring buckets
    const auto release = [&](int stage) {
        if (lane < p.cluster) mbarrier_arrive_remote(&shared.empty[stage], static_cast<unsigned>(lane));
    };
    Ring ring;
    const auto pass = [&](std::int32_t positions) {
#pragma unroll 1
        for (std::int32_t i = 0; i < positions; ++i) {
            mbarrier_wait(&shared.full[ring.stage], ring.parity);
            release(ring.stage);
            ring.advance();
        }
    };
    float acc[2][64];
    int buffer = 0;
    for (std::int32_t number = first; number < p.units; number += step) {
        const Unit unit = unit_of(p, number);
        if (!unit.exists) continue;
        const std::int32_t row = unit.row + 16 * warp + lane / 4, bucket = unit.bucket + group * kBuckets;
        float row_scale[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::int32_t at = row + 64 * (i / 2) + 8 * (i % 2);
            row_scale[i] = 1.0f;
            if (p.x_scale && at < unit.end) row_scale[i] = p.x_scale[p.order ? p.order[at] / p.n_active : at];
        }
        Best best[8];  // [m][h][c] for rows 64 * m + 8 * h from `row`, buckets c from this thread's
#pragma unroll
        for (int place = 0; place < 8; ++place) best[place].clear();

        if (group == 1) pass(p.stagger);
        for (std::int32_t tile = 0; tile < p.tiles; ++tile) {
            // Scale and bias of the latent with this thread's number, under way while the tile is multiplied. Without a
            // bias it is the zero that changes nothing.
            float scale = 1.0f, bias = -0.0f;
            const std::int32_t member = tile * kMembers + thread / kBuckets, of = bucket + thread % kBuckets;
            if (member < members_of(p, of)) {
                const std::int64_t place = (unit.expert * p.n_members + member) * std::int64_t{p.n_buckets} + of;
                if (p.weight_scale) scale = p.weight_scale[place];
                if (p.bias) bias = fmaxf(number_at(p.bias, p.bias_type, place), kLowest);
            }
            int last = 0;
            for (std::int32_t chunk = 0; chunk < p.chunks; ++chunk) {
                const Stage& stage = shared.stages[ring.stage];
                mbarrier_wait(&shared.full[ring.stage], ring.parity);
                const std::uint64_t upper = matrix_descriptor(stage.x);
                const std::uint64_t lower = matrix_descriptor(stage.x + kTileBytes / 2);
                const std::uint64_t weight = matrix_descriptor(stage.weight[group]);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    wgmma_64x128<T>(acc[0], upper + 2 * k, weight + 2 * k, chunk > 0 || k > 0);
                    wgmma_64x128<T>(acc[1], lower + 2 * k, weight + 2 * k, chunk > 0 || k > 0);
                }
                wgmma_commit();
                wgmma_wait<1>();
                if (chunk > 0) release(last);
                last = ring.stage;
                ring.advance();
            }
            wgmma_wait<0>();
            wgmma_hold(acc[0]);
            wgmma_hold(acc[1]);
            release(last);

            FactorPair* factors = shared.factors[group][buffer];
            factors[thread / 2].scale[thread % 2] = scale;
            factors[thread / 2].bias[thread % 2] = bias;
            named_barrier_sync(1 + group, kGroupThreads);
            const std::int32_t begin = tile * kMembers;
            const std::int32_t end[2] = {members_of(p, bucket + 2 * pair), members_of(p, bucket + 2 * pair + 1)};
            if (begin + kMembers <= p.whole_members)
                filter<true>(best, acc, factors + pair, row_scale, p.score_bits, begin, end);
            else
                filter<false>(best, acc, factors + pair, row_scale, p.score_bits, begin, end);
            buffer ^= 1;  // the next barrier says that this one has been read
        }

#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Best &here = best[2 * i], &next = best[2 * i + 1];
            here.finish();
            next.finish();
            const std::int32_t at = row + 64 * (i / 2) + 8 * (i % 2), mine = bucket + 2 * pair;
            if (at >= unit.end || mine >= p.n_buckets) continue;
            const std::int64_t out = p.order ? p.order[at] : at;
            float* keys = p.keys + out * p.keep * p.n_buckets + mine;
#pragma unroll
            for (int k = 0; k < 3; ++k)
                if (k < p.keep) store_pair(keys + k * p.n_buckets, here.top[k], next.top[k], p.n_buckets, mine);
        }
        if (group == 0) pass(p.stagger);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) screen_kernel(const __grid_constant__ ScreenParams p) {
#if SPARSEKERN_HOPPER
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(&shared.full[stage], 1);
            mbarrier_init(&shared.empty[stage], static_cast<unsigned>(kGroups * kGroupThreads / 32 * p.cluster));
        }
        mbarrier_fence_init();
    }
    cluster_sync();
    const std::int32_t first = static_cast<std::int32_t>(blockIdx.x) / p.cluster;
    const std::int32_t step = static_cast<std::int32_t>(gridDim.x) / p.cluster;
    const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
    if (group == kGroups) {
        registers_shrink<40>();
        if (threadIdx.x == kGroups * kGroupThreads) load<T>(p, shared, first, step);
    } else {
        registers_grow<232>();
        consume<T>(p, shared, group, first, step);
    }
    cluster_sync();  // nothing arrives in the shared memory of a block that is gone
#else
    trap("compiled for a device that is not of compute capability 9.0");
#endif
}

template <class T>
void screen_as(const ScreenArgs& args, Stream stream) {
    constexpr int kSize = static_cast<int>(sizeof(T)), kChunk = kChunkBytes / kSize;
    const auto count = [](std::int64_t n) { return static_cast<std::uint64_t>(n); };
    const auto narrow = [](std::int64_t n) { return static_cast<std::int32_t>(n); };
    const ScreenSlots slots = args.slots ? *args.slots : ScreenSlots{};

    const std::uint64_t x_shape[] = {count(args.d), count(args.rows)}, x_strides[] = {count(args.x_stride * kSize)};
    const std::uint32_t x_box[] = {kChunk, kTokens};
    const std::uint64_t weight_shape[] = {count(args.d), count(args.n_buckets),
                                          count(args.n_members * (args.slots ? slots.n_experts : 1))};
    const std::uint64_t weight_strides[] = {count(args.weight_stride * kSize),
                                            count(args.weight_stride * kSize * args.n_buckets)};
    const std::uint32_t weight_box[] = {kChunk, kBuckets, static_cast<std::uint32_t>(kMembers / args.cluster)};

    ScreenParams p{};
    p.x = tensor_map(2, args.type, args.x, x_shape, x_strides, x_box);
    p.weight = tensor_map(3, args.type, args.weight, weight_shape, weight_strides, weight_box);
    p.x_scale = args.x_scale;
    p.weight_scale = args.weight_scale;
    p.bias = args.bias;
    p.bias_type = args.bias_type;
    p.keys = args.keys;
    p.order = slots.order;
    p.offsets = slots.offsets;
    p.first_tile = slots.first_tile;
    p.tile_expert = slots.tile_expert;
    p.n_active = slots.n_active;
    p.n_experts = slots.n_experts;
    p.rows = narrow(args.rows);
    p.chunks = narrow(ceil_div(args.d, kChunk));
    p.whole_members = narrow(args.n_real / args.n_buckets);
    p.longer_buckets = narrow(args.n_real % args.n_buckets);
    p.n_buckets = narrow(args.n_buckets);
    p.n_members = narrow(args.n_members);
    p.tiles = narrow(ceil_div(args.n_members, kMembers));
    // At both ends of a unit so many chunks are loaded for one group alone, which short units feel.
    p.stagger = min_of(min_of(kMostStagger, p.tiles), p.chunks / 2);
    p.cluster = args.cluster;
    p.token_tiles = narrow(ceil_div(args.rows, kTokens * args.cluster)) + slots.n_experts;
    p.bucket_tiles = narrow(ceil_div(args.n_buckets, kGroups * kBuckets));
    const std::int64_t tile_bytes = kTokens * args.cluster * args.d * kSize;
    p.group = narrow(min_of(max_of(kCachedBytes / tile_bytes, 1), p.token_tiles));
    const std::int64_t units = std::int64_t{p.token_tiles} * p.bucket_tiles;
    if (units >= 1 << 30) throw std::invalid_argument("screen: too many rows and buckets for one call");
    p.units = narrow(units);
    p.keep = args.keep;
    int member_bits = 0;
    while (args.n_members > std::int64_t{1} << member_bits) ++member_bits;
    p.score_bits = ~0u << member_bits & (args.absolute ? 0x7fffffffu : ~0u);

    LaunchShape shape{args.cluster, kThreads, sizeof(Shared), args.cluster};
    shape.blocks *= min_of(p.units, clusters_at_once("screen", screen_kernel<T>, shape));
    launch("screen", screen_kernel<T>, shape, stream, p);
}

struct GatherParams {
    const unsigned char* x;
    std::int64_t stride;
    const std::int32_t* order;
    std::int32_t n_active;
    unsigned char* out;
    std::int64_t rows, row_bytes;
};

constexpr int kGatherThreads = 256;

// A warp a row.
__global__ void __launch_bounds__(kGatherThreads) gather_rows_kernel(const __grid_constant__ GatherParams p) {
    const std::int64_t row = blockIdx.x * std::int64_t{kGatherThreads / 32} + threadIdx.x / 32;
    if (row >= p.rows) return;
    const unsigned char* from = p.x + p.order[row] / p.n_active * p.stride;
    unsigned char* to = p.out + row * p.row_bytes;
    for (std::int64_t byte = 16 * (threadIdx.x % 32); byte < p.row_bytes; byte += 16 * 32)
        store16(to + byte, load16(from + byte));
}

}  // namespace

void screen(const ScreenArgs& args, Stream stream) {
    const auto require = [](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument(std::string("screen: ") + what);
    };
    const bool narrow = args.type == ElementType::float8_e4m3;
    require(narrow || args.type == ElementType::float16 || args.type == ElementType::bfloat16,
            "operands must be float16, bfloat16 or float8_e4m3");
    const std::int64_t size = narrow ? 1 : 2;
    require(args.x_stride * size % 16 == 0 && args.weight_stride * size % 16 == 0,
            "rows of x and weight must begin at multiples of 16 bytes");
    require(args.d > 0 && args.n_buckets > 0 && args.n_members > 0 && args.rows >= 0, "sizes must be positive");
    constexpr std::int64_t kMost = std::int64_t{1} << 31;
    const std::int64_t experts = args.slots ? args.slots->n_experts : 1;
    require(args.rows <= kMost - 2048 && args.d <= kMost - 1024 &&
                (args.n_buckets + 16) * (args.n_members + 16) * experts < kMost,
            "rows, d and latents must be below 2^31");
    require(args.keep >= 1 && args.keep <= 3, "keep must be 1, 2 or 3");
    require(args.cluster == 1 || args.cluster == 2 || args.cluster == 4, "cluster must be 1, 2 or 4");
    require(!args.slots || args.n_real == args.n_buckets * args.n_members,
            "with slots n_real must be n_buckets * n_members");
    require(args.n_real >= 0 && args.n_real <= args.n_buckets * args.n_members,
            "n_real must be at most n_buckets * n_members");
    require_hopper("screen");
    if (args.rows == 0) return;
    if (narrow) screen_as<e4m3>(args, stream);
    else if (args.type == ElementType::float16) screen_as<f16>(args, stream);
    else screen_as<bf16>(args, stream);
}

void gather_rows(const void* x, std::int64_t stride_bytes, const std::int32_t* order, std::int32_t n_active, void* out,
                 std::int64_t rows, std::int64_t row_bytes, Stream stream) {
    if (stride_bytes % 16 != 0 || row_bytes % 16 != 0)
        throw std::invalid_argument("gather_rows: rows must begin at multiples of 16 bytes and be as long");
    const LaunchShape shape{ceil_div(rows, kGatherThreads / 32), kGatherThreads};
    const GatherParams p{static_cast<const unsigned char*>(x), stride_bytes, order, n_active,
                         static_cast<unsigned char*>(out), rows, row_bytes};
    launch("gather_rows", gather_rows_kernel, shape, stream, p);
}

}  // namespace sparsekern::cuda
