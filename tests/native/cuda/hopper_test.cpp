// The emulation of what sm_90 adds: copies, barriers that count bytes, clusters and products, against plain loops.
#include "cuda_test.h"
#include "cuda/hopper_emulated.h"

using namespace sparsekern::cuda;
using namespace sparsekern::test;

namespace {

template <class T>
constexpr ElementType kElement = std::is_same_v<T, float>  ? ElementType::float32
                                 : std::is_same_v<T, f16>  ? ElementType::float16
                                 : std::is_same_v<T, bf16> ? ElementType::bfloat16
                                                           : ElementType::float8_e4m3;

// Where the byte b of row r of a tile lies.
constexpr std::size_t swizzled_place(std::size_t r, std::size_t b) { return 128 * r + (b / 16 ^ r % 8) * 16 + b % 16; }

// Copies.

struct Boxes {
    TensorMap map;
    unsigned char* to;  // [box][rows of the box][128]
    const int* corners; // [box][4]
    int rank, count, rows;
};

constexpr int kStages = 3;

template <int Rows>
struct BoxesShared {
    struct alignas(1024) Tile {
        unsigned char bytes[Rows * 128];
    } tile[kStages];
    Mbarrier full[kStages], empty[kStages];
};

// A warp loads boxes into a ring of stages; another copies them out, the swizzle undone.
template <int Rows>
__global__ void __launch_bounds__(64) load_boxes(const __grid_constant__ Boxes p) {
    auto& shared = shared_memory<BoxesShared<Rows>>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(&shared.full[i], 1);
            mbarrier_init(&shared.empty[i], 32);
        }
        mbarrier_fence_init();
    }
    __syncthreads();
    for (int i = 0; i < p.count; ++i) {
        const int stage = i % kStages;
        const unsigned parity = i / kStages % 2;
        const int* c = p.corners + 4 * i;
        unsigned char* tile = shared.tile[stage].bytes;
        if (threadIdx.x == 0) {
            mbarrier_wait(&shared.empty[stage], parity ^ 1);
            mbarrier_arrive_expect_tx(&shared.full[stage], Rows * 128);
            if (p.rank == 2) tensor_load_2d(tile, p.map, &shared.full[stage], c[0], c[1]);
            if (p.rank == 3) tensor_load_3d(tile, p.map, &shared.full[stage], c[0], c[1], c[2]);
            if (p.rank == 4) tensor_load_4d(tile, p.map, &shared.full[stage], c[0], c[1], c[2], c[3]);
        } else if (threadIdx.x >= 32) {
            mbarrier_wait(&shared.full[stage], parity);
            for (int b = static_cast<int>(threadIdx.x) - 32; b < Rows * 128; b += 32)
                p.to[(i * Rows + b / 128) * 128 + b % 128] = tile[swizzled_place(b / 128, b % 128)];
            mbarrier_arrive(&shared.empty[stage]);
        }
    }
}

template <class T, int Rows>
void check_boxes(int rank, std::array<std::uint64_t, 4> dims, std::array<std::uint32_t, 4> box, std::uint64_t gap) {
    Random random(7);
    std::array<std::uint64_t, 3> strides{};
    std::uint64_t bytes = (dims[0] * sizeof(T) + 15) / 16 * 16 + gap;
    for (int i = 1; i < rank; ++i) {
        strides[i - 1] = bytes;
        bytes = bytes * dims[i] + gap;
    }
    Buffer<Pack16> memory(static_cast<std::int64_t>(bytes / 16));
    auto* base = reinterpret_cast<unsigned char*>(memory.data());
    for (std::uint64_t i = 0; i < bytes; ++i) base[i] = static_cast<unsigned char>(random.next());
    const TensorMap map = tensor_map(rank, kElement<T>, base, dims.data(), strides.data(), box.data());

    constexpr int kCount = 11;
    Buffer<int> corners(4 * kCount);
    for (int i = 0; i < 4 * kCount; ++i)  // inside, and partly or wholly outside
        corners[i] = i % 4 < rank ? static_cast<int>(random.below(dims[i % 4] + box[i % 4] + 9) - box[i % 4] - 4) : 0;
    Buffer<unsigned char> to(kCount * Rows * 128);
    in_several_orders([&] {
        launch("load_boxes", load_boxes<Rows>, LaunchShape{1, 64, sizeof(BoxesShared<Rows>)}, nullptr,
               Boxes{map, to.data(), corners.data(), rank, kCount, Rows});
        for (int i = 0; i < kCount; ++i)
            for (std::uint32_t row = 0; row < static_cast<std::uint32_t>(Rows); ++row)
                for (std::uint32_t b = 0; b < 128; ++b) {
                    std::int64_t at[4] = {corners[4 * i] + static_cast<std::int64_t>(b / sizeof(T)), 0, 0, 0};
                    bool inside = at[0] >= 0 && at[0] < static_cast<std::int64_t>(dims[0]);
                    std::int64_t from = at[0] * static_cast<std::int64_t>(sizeof(T)) + b % sizeof(T);
                    for (std::uint32_t axis = 1, rest = row; axis < static_cast<std::uint32_t>(rank); ++axis) {
                        at[axis] = corners[4 * i + axis] + static_cast<std::int64_t>(rest % box[axis]);
                        rest /= box[axis];
                        inside = inside && at[axis] >= 0 && at[axis] < static_cast<std::int64_t>(dims[axis]);
                        from += at[axis] * static_cast<std::int64_t>(strides[axis - 1]);
                    }
                    const int expected = inside ? base[from] : 0, got = to[(i * Rows + row) * 128 + b];
                    CHECK(got == expected, "box " << i << ", row " << row << ", byte " << b << ": " << got);
                }
    });
}

// Clusters.

struct Shares {
    TensorMap map;
    unsigned char* to;  // [block][32 * 128]
    unsigned* heard;    // [block]
};

struct SharesShared {
    unsigned char tile[32 * 128];
    Mbarrier full, heard;
};

// Each block of a cluster loads its part of a tile for all, and tells all that it has seen the whole.
__global__ void load_shares(const __grid_constant__ Shares p) {
    auto& shared = shared_memory<SharesShared>();
    const unsigned rank = cluster_rank(), blocks = cluster_size(), rows = 32 / blocks;
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.full, 1);
        mbarrier_init(&shared.heard, blocks);
        mbarrier_fence_init();
    }
    cluster_sync();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(&shared.full, sizeof shared.tile);
        tensor_load_2d_multicast(shared.tile + rank * rows * 128, p.map, &shared.full, 0,
                                 static_cast<int>(blockIdx.x / blocks * 32 + rank * rows),
                                 static_cast<std::uint16_t>((1u << blocks) - 1));
    }
    mbarrier_wait(&shared.full, 0);
    for (unsigned b = threadIdx.x; b < sizeof shared.tile; b += blockDim.x)
        p.to[blockIdx.x * sizeof shared.tile + b] = shared.tile[swizzled_place(b / 128, b % 128)];
    if (threadIdx.x < blocks) mbarrier_arrive_remote(&shared.heard, threadIdx.x);
    mbarrier_wait(&shared.heard, 0);
    if (threadIdx.x == 0) p.heard[blockIdx.x] = 1;
    cluster_sync();
}

// Products.

struct Product {
    TensorMap a, b;
    float* to;  // [128][128]: two accumulators below each other
    int steps;  // of 128 bytes of k
    float start;
    int keep;  // 0: start from `start`, 1: overwrite it
};

struct ProductShared {
    unsigned char a[2][128 * 128], b[2][128 * 128];
    Mbarrier full[2], empty[2];
};

template <class T>
__global__ void multiply(const __grid_constant__ Product p) {
    auto& shared = shared_memory<ProductShared>();
    constexpr int kElements = 128 / sizeof(T);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(&shared.full[i], 1);
            mbarrier_init(&shared.empty[i], 128);
        }
        mbarrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        registers_shrink<40>();
        if (threadIdx.x != 128) return;
        for (int i = 0; i < p.steps; ++i) {
            mbarrier_wait(&shared.empty[i % 2], i / 2 % 2 ^ 1);
            mbarrier_arrive_expect_tx(&shared.full[i % 2], 2 * 128 * 128);
            tensor_load_2d(shared.a[i % 2], p.a, &shared.full[i % 2], i * kElements, 0);
            tensor_load_2d(shared.b[i % 2], p.b, &shared.full[i % 2], i * kElements, 0);
        }
        return;
    }
    registers_grow<232>();
    float acc[2][64];
    for (auto& half : acc)
        for (float& sum : half) sum = p.start;
    wgmma_fence();
    for (int i = 0; i < p.steps; ++i) {
        mbarrier_wait(&shared.full[i % 2], i / 2 % 2);
        const std::uint64_t a = matrix_descriptor(shared.a[i % 2]), b = matrix_descriptor(shared.b[i % 2]);
        for (int k = 0; k < 4; ++k)
            for (int half = 0; half < 2; ++half)
                wgmma_64x128<T>(acc[half], a + half * (64 * 128 >> 4) + 2 * k, b + 2 * k, i > 0 || k > 0 || !p.keep);
        wgmma_commit();
        if (i > 0) {
            wgmma_wait<1>();
            mbarrier_arrive(&shared.empty[(i - 1) % 2]);
        }
    }
    wgmma_wait<0>();
    const int t = static_cast<int>(threadIdx.x);
    for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 64; ++i) {
            const int row = 64 * half + 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), col = 8 * (i / 4) + 2 * (t % 4) + i % 2;
            p.to[128 * row + col] = acc[half][i];
        }
}

template <class T>
void check_product(int steps, bool keep) {
    Random random(3);
    const int k = steps * 128 / static_cast<int>(sizeof(T));
    Buffer<T> a(128 * k), b(128 * k);
    for (auto* matrix : {&a, &b})
        for (int i = 0; i < 128 * k; ++i) (*matrix)[i] = rounded_to<T>(static_cast<float>(random.below(17) - 8));
    const std::array<std::uint64_t, 2> dims = {static_cast<std::uint64_t>(k), 128};
    const std::array<std::uint64_t, 1> strides = {k * sizeof(T)};
    const std::array<std::uint32_t, 2> box = {128 / sizeof(T), 128};
    const auto map = [&](const T* base) {
        return tensor_map(2, kElement<T>, base, dims.data(), strides.data(), box.data());
    };
    Buffer<float> to(128 * 128);
    in_several_orders(
        [&] {
            launch("multiply", multiply<T>, LaunchShape{1, 160, sizeof(ProductShared)}, nullptr,
                   Product{map(a.data()), map(b.data()), to.data(), steps, 5.0f, keep});
            for (int row = 0; row < 128; ++row)
                for (int col = 0; col < 128; ++col) {
                    double expected = keep ? 0 : 5;
                    for (int i = 0; i < k; ++i) expected += to_float(a[row * k + i]) * to_float(b[col * k + i]);
                    CHECK(to[128 * row + col] == expected, row << ", " << col << ": " << to[128 * row + col]);
                }
        },
        1);
}

// Wrong uses.

struct Wrong {
    TensorMap map;
    int what;
    float* to;
};

struct WrongShared {
    unsigned char tile[128 * 128];
    Mbarrier full, other;
};

__global__ void do_wrong(const __grid_constant__ Wrong p) {
    auto& shared = shared_memory<WrongShared>();
    const unsigned thread = threadIdx.x;
    float acc[64] = {};
    if (thread == 0) mbarrier_init(&shared.full, 1);
    for (unsigned i = thread; i < sizeof shared.tile; i += blockDim.x) shared.tile[i] = 0;
    cluster_sync();
    const std::uint64_t tile = matrix_descriptor(shared.tile);
    switch (p.what) {
        case 0: mbarrier_arrive(&shared.other); break;
        case 1:
            if (thread == 3) shared.full.state = 12;
            __syncthreads();
            mbarrier_wait(&shared.full, 0);
            break;
        case 2:  // of bytes too few
            if (thread == 0) mbarrier_arrive_expect_tx(&shared.full, 128 * 128 + 16);
            if (thread == 0) tensor_load_2d(shared.tile, p.map, &shared.full, 0, 0);
            mbarrier_wait(&shared.full, 0);
            break;
        case 3:  // of bytes too many
            if (thread == 0) mbarrier_arrive_expect_tx(&shared.full, 128);
            if (thread == 0) tensor_load_2d(shared.tile, p.map, &shared.full, 0, 0);
            mbarrier_wait(&shared.full, 0);
            break;
        case 4:
            if (thread == 0) tensor_load_2d(shared.tile, p.map, &shared.full, 0, 0);
            break;
        case 5:
            if (thread == 0) mbarrier_arrive_expect_tx(&shared.full, 16);
            if (thread == 0) mbarrier_arrive(&shared.full);
            break;
        case 6:
            if (thread == 0) tensor_load_2d(shared.tile + 64, p.map, &shared.full, 0, 0);
            break;
        case 7:
            if (thread == 0) tensor_load_2d(shared.tile + 128, p.map, &shared.full, 0, 0);
            break;
        case 8:
            if (thread == 0) tensor_load_3d(shared.tile, p.map, &shared.full, 0, 0, 0);
            break;
        case 9:
            if (cluster_rank() == 0 && thread == 0) {
                for (int i = 0; i < 1000; ++i) __nanosleep(1);
                mbarrier_arrive_remote(&shared.full, 1);
            }
            break;
        case 10: wgmma_64x128<f16>(acc, tile, tile, false); break;
        case 11:
            wgmma_fence();
            wgmma_64x128<f16>(acc, tile, thread == 77 ? tile + 2 : tile, false);
            break;
        case 12:  // the operand changes before the wait
            wgmma_fence();
            wgmma_64x128<f16>(acc, tile, tile, false);
            wgmma_commit();
            __syncthreads();
            if (thread == 0) shared.tile[4] = 1;
            __syncthreads();
            wgmma_wait<0>();
            break;
        case 13:
            wgmma_fence();
            if (thread != 100) wgmma_64x128<f16>(acc, tile, tile, false);
            wgmma_commit();
            wgmma_wait<0>();
            break;
        case 14:
            wgmma_fence();
            wgmma_64x128<f16>(acc, tile + 1, tile, false);
            break;
        case 15: matrix_descriptor(shared.tile + 512); break;
        case 16: mbarrier_arrive_remote(&shared.full, 2); break;
        case 17: {  // not wrong: what accumulators hold before the wait, and after
            wgmma_fence();
            wgmma_64x128<f16>(acc, tile, tile, false);
            wgmma_commit();
            float* to = p.to + 2 * (blockIdx.x * blockDim.x + thread);
            to[0] = acc[9];
            wgmma_wait<0>();
            to[1] = acc[9];
            break;
        }
        case 18:
            wgmma_fence();
            wgmma_64x128<f16>(acc, tile + 64, tile, false);
            wgmma_64x128<f16>(acc, tile + 9 * 64, tile, false);  // 64 rows end beyond it
            break;
    }
}

TensorMap some_map(const void* base) {
    const std::array<std::uint64_t, 2> dims = {64, 128};
    const std::array<std::uint64_t, 1> strides = {128};
    const std::array<std::uint32_t, 2> box = {64, 128};
    return tensor_map(2, ElementType::float16, base, dims.data(), strides.data(), box.data());
}

}  // namespace

NATIVE_TEST(tensor_copies) {
    check_boxes<float, 9>(2, {45, 23}, {32, 9}, 0);
    check_boxes<f16, 16>(2, {200, 33}, {64, 16}, 16);
    check_boxes<e4m3, 8>(2, {96, 5}, {128, 8}, 32);
    check_boxes<bf16, 128>(3, {72, 24, 19}, {64, 8, 16}, 0);
    check_boxes<f16, 48>(4, {64, 10, 7, 3}, {64, 8, 3, 2}, 48);
}

NATIVE_TEST(clusters_share_tiles) {
    Random random(5);
    for (const int blocks : {1, 2, 4}) {
        Buffer<Pack16> from(3 * 32 * 8);
        auto* bytes = reinterpret_cast<unsigned char*>(from.data());
        for (int i = 0; i < 3 * 32 * 128; ++i) bytes[i] = static_cast<unsigned char>(random.next());
        const std::array<std::uint64_t, 2> dims = {128, 3 * 32};
        const std::array<std::uint64_t, 1> strides = {128};
        const std::array<std::uint32_t, 2> box = {128, 32u / static_cast<std::uint32_t>(blocks)};
        const TensorMap map = tensor_map(2, ElementType::float8_e4m3, bytes, dims.data(), strides.data(), box.data());
        Buffer<unsigned char> to(3 * blocks * 32 * 128);
        Buffer<unsigned> heard(3 * blocks);
        in_several_orders([&] {
            for (int i = 0; i < 3 * blocks; ++i) heard[i] = 0;
            launch("load_shares", load_shares, LaunchShape{3 * blocks, 64, sizeof(SharesShared), blocks}, nullptr,
                   Shares{map, to.data(), heard.data()});
            for (int block = 0; block < 3 * blocks; ++block) {
                CHECK(heard[block] == 1, "block " << block);
                CHECK(std::memcmp(&to[block * 32 * 128], bytes + block / blocks * 32 * 128, 32 * 128) == 0,
                      "tile of block " << block << " in clusters of " << blocks);
            }
        });
    }
}

NATIVE_TEST(matrix_products) {
    for (const int steps : kThreadSanitizer ? std::vector<int>{3} : std::vector<int>{1, 2, 5}) {
        check_product<f16>(steps, steps % 2);
        check_product<bf16>(steps, steps % 2 == 0);
        check_product<e4m3>(steps, steps % 2);
    }
}

NATIVE_TEST(wrong_kernels_of_hopper) {
    Buffer<Pack16> tile(128 * 8);
    std::memset(tile.data(), 0, 128 * 128);
    Buffer<float> to(2 * 256);
    const auto run = [&](int what) {
        launch("do_wrong", do_wrong, LaunchShape{2, 128, sizeof(WrongShared), 2}, nullptr,
               Wrong{some_map(tile.data()), what, to.data()});
    };
    const std::vector<std::string> expected = {
        "an mbarrier without mbarrier_init",
        "an mbarrier that something else has overwritten",
        "wait for phase 0 of the mbarrier at byte 16384 of shared memory, which lacks 0 of 1 arrivals and 16 bytes",
        "an mbarrier got more bytes than it was told to expect",
        "the block ended before a tensor copy to it was done",
        "more arrivals at an mbarrier than its count of 1",
        "a tensor copy to no multiple of 128 bytes",
        "the target of a tensor copy is not in the shared memory of the block",
        "a tensor map of rank 2 in a copy of another",
        "an mbarrier of a block that has ended",
        "a wgmma on accumulators that no wgmma_fence has handed over",
        "a wgmma that differs between the threads of its warpgroup",
        "shared memory that a wgmma reads was written before the wait for it",
        "wait for a wgmma that 127 of 128 threads have issued",
        "an operand of wgmma that is no tile in shared memory",
        "a matrix at no multiple of 1024 bytes",
        "an mbarrier of block 2 of the cluster",
        "",
        "an operand of wgmma that is no tile in shared memory",
    };
    for (int what = 0; what < static_cast<int>(expected.size()); ++what) {
        if (expected[what].empty()) continue;
        const std::string error = error_of([&] { run(what); });
        CHECK(contains(error, "kernel do_wrong: ") && contains(error, expected[what]), "case " << what << ": " << error);
    }
    run(17);
    for (int i = 0; i < 256; ++i) CHECK(std::isnan(to[2 * i]) && to[2 * i + 1] == 0, "accumulator of thread " << i);
}

NATIVE_TEST(tensor_maps_that_cannot_be) {
    Buffer<Pack16> memory(64);
    const auto error_with = [&](int rank, std::ptrdiff_t shift, std::uint64_t rows, std::uint64_t stride,
                                std::uint32_t width, std::uint32_t height) {
        const std::array<std::uint64_t, 2> dims = {64, rows};
        const std::array<std::uint64_t, 1> strides = {stride};
        const std::array<std::uint32_t, 2> box = {width, height};
        const auto* base = reinterpret_cast<const unsigned char*>(memory.data()) + shift;
        return error_of([&] { tensor_map(rank, ElementType::float16, base, dims.data(), strides.data(), box.data()); });
    };
    CHECK(contains(error_with(1, 0, 8, 128, 64, 8), "rank 1"), "rank");
    CHECK(contains(error_with(2, 8, 8, 128, 64, 8), "base"), "base");
    CHECK(contains(error_with(2, 0, 0, 128, 64, 8), "size of dimension 1: 0"), "size");
    CHECK(contains(error_with(2, 0, 8, 136, 64, 8), "stride of dimension 1: 136"), "stride");
    CHECK(contains(error_with(2, 0, 8, 128, 32, 8), "128 bytes wide"), "width");
    CHECK(contains(error_with(2, 0, 8, 128, 64, 257), "box of dimension 1: 257"), "height");
}

#if defined(__SANITIZE_THREAD__)
namespace {

// A tile that is read with or without the wait for it; a stage that is filled again with or without waiting for its
// readers.
struct Careless {
    TensorMap map;
    unsigned char* to;
    bool waits_full, waits_empty;
};

__global__ void read_tile(const __grid_constant__ Careless p) {
    auto& shared = shared_memory<WrongShared>();
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.full, 1);
        mbarrier_init(&shared.other, 128);
        mbarrier_fence_init();
    }
    __syncthreads();
    for (unsigned i = 0; i < 2; ++i) {
        if (threadIdx.x == 0) {
            if (p.waits_empty) mbarrier_wait(&shared.other, i ^ 1);
            mbarrier_arrive_expect_tx(&shared.full, sizeof shared.tile);
            tensor_load_2d(shared.tile, p.map, &shared.full, 0, 0);
        }
        if (p.waits_full || threadIdx.x == 0) mbarrier_wait(&shared.full, i);
        p.to[threadIdx.x] = shared.tile[threadIdx.x];
        mbarrier_arrive(&shared.other);
    }
    mbarrier_wait(&shared.full, 1);
}

void read_once(bool full, bool empty) {
    Buffer<Pack16> tile(128 * 8);
    std::memset(tile.data(), 0, 128 * 128);
    Buffer<unsigned char> to(128);
    launch("read_tile", read_tile, LaunchShape{1, 128, sizeof(WrongShared)}, nullptr,
           Careless{some_map(tile.data()), to.data(), full, empty});
}

}  // namespace

NATIVE_CASE(waits) { read_once(true, true); }
NATIVE_CASE(no_wait_for_full) { read_once(false, true); }
NATIVE_CASE(no_wait_for_empty) { read_once(true, false); }

NATIVE_TEST(missing_waits_are_races) {
    CHECK(report_of("waits").empty(), report_of("waits"));
    CHECK(contains(report_of("no_wait_for_full"), "data race"), report_of("no_wait_for_full"));
    CHECK(contains(report_of("no_wait_for_empty"), "data race"), report_of("no_wait_for_empty"));
}
#endif
