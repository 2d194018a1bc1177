// What hopper.h has of sm_90, on the emulator: barriers that count bytes, tensor copies, clusters and matrix products.
//
// What hardware does by itself comes late here. A copy lands some turns after the call. A product is made when a thread
// waits for it; until then its accumulators hold NaN, and its operands must still be what they were when the last of
// the 128 threads issued it, or the launch ends with an error. To ThreadSanitizer, copies and products are threads of
// their own, which only barriers and waits order.
//
// Not modelled: fence.proxy.async between ordinary stores and what copies and products read; how many registers there
// are; that the threads of a warp come to an instruction together; how tensor cores round sums, coarsely for e4m3.
#pragma once

#include <algorithm>
#include <deque>
#include <limits>
#include <map>

#include "cuda/device.h"

namespace sparsekern::cuda {

struct alignas(8) Mbarrier {
    std::uint64_t state;
};

struct alignas(64) TensorMap {
    int rank;
    std::uint64_t element_bytes;
    const unsigned char* base;
    std::uint64_t dims[5], strides[5];  // strides in bytes
    std::uint32_t box[5];
};

namespace emulator {

// What an Mbarrier stands for.
struct Phases {
    unsigned count = 0, pending = 0;
    std::int64_t bytes = 0;  // announced and not yet there
    std::uint64_t phase = 0;
};

// One wgmma of a warpgroup.
struct Product {
    using Multiply = void (*)(const unsigned char* operands, bool accumulate, float* sums);

    std::uint64_t a = 0, b = 0;
    bool accumulate = false;
    Multiply multiply = nullptr;
    std::shared_ptr<Product> before;  // on the same accumulators, and not waited for when this one was issued
    unsigned issued = 0;              // by so many threads
    std::vector<unsigned char> operands;
    std::vector<float> sums;  // [64][128]
    bool asked_for = false, done = false;
};

constexpr int kProductRows = 64, kProductCols = 128, kProductBytes = 32;

// A thread of a warpgroup and the products that it has issued and not waited for.
struct Issuer {
    struct Pending {
        std::shared_ptr<Product> product;
        float* acc;
    };
    std::size_t issued = 0;
    bool fenced = false;
    std::vector<Pending> open;                   // not committed
    std::deque<std::vector<Pending>> committed;  // in groups

    // The last product on these accumulators, or null.
    std::shared_ptr<Product> last_on(const float* acc) const {
        for (auto pending = open.rbegin(); pending != open.rend(); ++pending)
            if (pending->acc == acc) return pending->product;
        for (auto group = committed.rbegin(); group != committed.rend(); ++group)
            for (auto pending = group->rbegin(); pending != group->rend(); ++pending)
                if (pending->acc == acc) return pending->product;
        return nullptr;
    }
};

struct Warpgroup {
    std::map<std::size_t, std::shared_ptr<Product>> issuing;  // by number; not yet issued by all threads
    Issuer issuers[128];
};

struct Hopper {
    std::map<const void*, Phases> barriers;
    std::map<unsigned, Warpgroup> warpgroups;
};

inline Hopper& hopper(Block& block) {
    if (!block.hopper) block.hopper = std::make_shared<Hopper>();
    return *block.hopper;
}

// Where an address lies in the shared memory of the thread's block; an error if it does not, with all its bytes.
inline std::size_t shared_offset(const void* address, std::size_t bytes, const char* what) {
    const Block& block = emulator::block();
    const auto offset = reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(block.shared);
    if (offset > block.shared_bytes || bytes > block.shared_bytes - offset)
        fail(std::string(what) + " is not in the shared memory of the block");
    return offset;
}

// The same place in the shared memory of another block of the cluster, which must be there to see it.
template <class T>
T* in_block(unsigned rank, std::size_t offset, const char* what) {
    if (rank >= cluster().size()) fail(std::string(what) + " of block " + std::to_string(rank) + " of the cluster");
    Block& other = cluster()[rank];
    if (other.ended == other.threads) fail(std::string(what) + " of a block that has ended");
    return reinterpret_cast<T*>(other.shared + offset);
}

constexpr std::uint64_t kMbarrier = 0x4d62'6172'7269'6572;

inline Phases& phases(Block& block, const Mbarrier* barrier) {
    const auto found = hopper(block).barriers.find(barrier);
    if (found == hopper(block).barriers.end()) fail("an mbarrier without mbarrier_init");
    if (barrier->state != kMbarrier) fail("an mbarrier that something else has overwritten");
    return found->second;
}

// For ThreadSanitizer: phases of either parity have a tag.
inline const char* tag(const Mbarrier* barrier, std::uint64_t phase) {
    return reinterpret_cast<const char*>(barrier) + 4 * (phase % 2);
}

inline void arrive(Block& block, Mbarrier* barrier, unsigned arrivals, std::int64_t announced, std::int64_t arrived) {
    Phases& p = phases(block, barrier);
    if (p.pending < arrivals) fail("more arrivals at an mbarrier than its count of " + std::to_string(p.count));
    release(tag(barrier, p.phase));
    p.pending -= arrivals;
    p.bytes += announced - arrived;
    if (p.pending == 0 && p.bytes < 0) fail("an mbarrier got more bytes than it was told to expect");
    if (p.pending == 0 && p.bytes == 0) {
        p.pending = p.count;
        ++p.phase;
    }
}

}  // namespace emulator

inline void mbarrier_init(Mbarrier* barrier, unsigned count) {
    using namespace emulator;
    Unseen unseen;
    if (shared_offset(barrier, sizeof *barrier, "an mbarrier") % 8) fail("an mbarrier at no multiple of 8");
    if (count < 1 || count >= 1u << 20) fail("an mbarrier for " + std::to_string(count) + " arrivals");
    barrier->state = kMbarrier;
    hopper(block()).barriers[barrier] = {count, count, 0, 0};
}

inline void mbarrier_fence_init() {}

inline void mbarrier_arrive(Mbarrier* barrier) {
    emulator::Unseen unseen;
    emulator::arrive(emulator::block(), barrier, 1, 0, 0);
}

inline void mbarrier_arrive_expect_tx(Mbarrier* barrier, unsigned bytes) {
    emulator::Unseen unseen;
    emulator::arrive(emulator::block(), barrier, 1, bytes, 0);
}

inline void mbarrier_arrive_remote(Mbarrier* barrier, unsigned rank) {
    using namespace emulator;
    Unseen unseen;
    const std::size_t offset = shared_offset(barrier, sizeof *barrier, "an mbarrier");
    auto* there = in_block<Mbarrier>(rank, offset, "an mbarrier");
    arrive(cluster()[rank], there, 1, 0, 0);
}

inline void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
    using namespace emulator;
    Unseen unseen;
    const Phases& of_barrier = phases(block(), barrier);
    if (parity > 1) fail("mbarrier_wait for parity " + std::to_string(parity));
    struct ForPhase final : Wait {
        const Phases& phases;
        const unsigned parity;
        const std::size_t offset;
        ForPhase(const Phases& phases, unsigned parity, std::size_t offset)
            : phases(phases), parity(parity), offset(offset) {}
        bool over() const override { return phases.phase % 2 != parity; }
        std::string text() const override {
            return "for phase " + std::to_string(phases.phase) + " of the mbarrier at byte " + std::to_string(offset) +
                   " of shared memory, which lacks " + std::to_string(phases.pending) + " of " +
                   std::to_string(phases.count) + " arrivals and " + std::to_string(phases.bytes) + " bytes";
        }
    };
    wait_for(ForPhase(of_barrier, parity, shared_offset(barrier, sizeof *barrier, "an mbarrier")));
    acquire(tag(barrier, parity));
}

// Tensor copies.

inline TensorMap tensor_map(int rank, ElementType type, const void* base, const std::uint64_t* dims,
                            const std::uint64_t* byte_strides, const std::uint32_t* box) {
    const auto require = [](bool holds, const std::string& what) {
        if (!holds) throw CudaError("cuTensorMapEncodeTiled: " + what);
    };
    TensorMap map{};
    require(rank >= 2 && rank <= 5, "rank " + std::to_string(rank));
    require(reinterpret_cast<std::uintptr_t>(base) % 16 == 0, "the base is no multiple of 16");
    map.rank = rank;
    map.element_bytes = type == ElementType::float32 ? 4 : type == ElementType::float8_e4m3 ? 1 : 2;
    map.base = static_cast<const unsigned char*>(base);
    for (int i = 0; i < rank; ++i) {
        map.dims[i] = dims[i];
        map.strides[i] = i ? byte_strides[i - 1] : map.element_bytes;
        map.box[i] = box[i];
        const std::string at = " of dimension " + std::to_string(i) + ": ";
        require(dims[i] >= 1 && dims[i] <= std::uint64_t{1} << 32, "size" + at + std::to_string(dims[i]));
        require(i == 0 || (map.strides[i] % 16 == 0 && map.strides[i] < std::uint64_t{1} << 40),
                "stride" + at + std::to_string(map.strides[i]));
        require(box[i] >= 1 && box[i] <= 256, "box" + at + std::to_string(box[i]));
    }
    require(box[0] * map.element_bytes == 128, "a box that is not 128 bytes wide");
    return map;
}

namespace emulator {

// Where the 128-byte swizzle puts an offset in shared memory: bits 7 to 9 flip bits 4 to 6.
inline std::size_t swizzled(std::size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// One box, into one block.
inline void copy_box(const TensorMap& map, const std::array<int, 5>& corner, Block& block, std::size_t offset,
                     Mbarrier* barrier) {
    std::uint32_t rows = 1;
    for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
    for (std::uint32_t row = 0; row < rows; ++row) {
        bool inside = true;
        const unsigned char* from = map.base;
        for (std::uint32_t i = 1, rest = row; i < static_cast<std::uint32_t>(map.rank); rest /= map.box[i++]) {
            const std::int64_t at = corner[i] + static_cast<std::int64_t>(rest % map.box[i]);
            inside = inside && at >= 0 && at < static_cast<std::int64_t>(map.dims[i]);
            if (inside) from += static_cast<std::uint64_t>(at) * map.strides[i];
        }
        const std::int64_t size = static_cast<std::int64_t>(map.dims[0]);
        const std::int64_t begin = std::clamp<std::int64_t>(corner[0], 0, size);
        const std::int64_t end = std::clamp<std::int64_t>(corner[0] + std::int64_t{map.box[0]}, 0, size);
        const std::size_t bytes = inside && begin < end ? (end - begin) * map.element_bytes : 0;
        unsigned char line[128] = {};
        const std::size_t start = offset + 128 * row;
        if (bytes) reads(from + begin * map.element_bytes, bytes);
        writes(block.shared + start, sizeof line);
        if (bytes)
            std::memcpy(line + (begin - corner[0]) * map.element_bytes, from + begin * map.element_bytes, bytes);
        for (std::size_t chunk = 0; chunk < sizeof line; chunk += 16)
            std::memcpy(block.shared + swizzled(start + chunk), line + chunk, 16);
    }
    arrive(block, barrier, 0, 0, std::int64_t{128} * rows);
}

inline void tensor_load(void* to, const TensorMap& map, Mbarrier* barrier, int rank, const std::array<int, 5>& corner,
                        unsigned ranks) {
    Unseen unseen;
    std::size_t bytes = 128;
    for (int i = 1; i < map.rank; ++i) bytes *= map.box[i];
    if (map.rank != rank) fail("a tensor map of rank " + std::to_string(map.rank) + " in a copy of another");
    if (ranks == 0) fail("a copy to no block");
    if (shared_offset(to, 1, "the target of a tensor copy") % 128) fail("a tensor copy to no multiple of 128 bytes");
    const std::size_t offset = shared_offset(to, bytes, "the target of a tensor copy");
    const std::size_t at = shared_offset(barrier, sizeof *barrier, "the mbarrier of a tensor copy");
    for (unsigned r = 0; r < 16; ++r) {
        if (!(ranks >> r & 1)) continue;
        const auto* there = in_block<Mbarrier>(r, at, "the mbarrier of a tensor copy");
        phases(cluster()[r], there);
        later("a tensor copy to it was done", [=] {
            auto* there = in_block<Mbarrier>(r, at, "the target of a tensor copy");
            copy_box(map, corner, cluster()[r], offset, there);
        });
    }
}

}  // namespace emulator

inline unsigned cluster_rank() { return emulator::block().rank; }
inline unsigned cluster_size() { return static_cast<unsigned>(emulator::cluster().size()); }
inline void cluster_sync() { emulator::cluster_barrier(); }

inline void tensor_load_2d(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1) {
    emulator::tensor_load(to, map, barrier, 2, {c0, c1}, 1u << cluster_rank());
}
inline void tensor_load_3d(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1, int c2) {
    emulator::tensor_load(to, map, barrier, 3, {c0, c1, c2}, 1u << cluster_rank());
}
inline void tensor_load_4d(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1, int c2, int c3) {
    emulator::tensor_load(to, map, barrier, 4, {c0, c1, c2, c3}, 1u << cluster_rank());
}
inline void tensor_load_2d_multicast(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1,
                                     std::uint16_t ranks) {
    emulator::tensor_load(to, map, barrier, 2, {c0, c1}, ranks);
}
inline void tensor_load_3d_multicast(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1, int c2,
                                     std::uint16_t ranks) {
    emulator::tensor_load(to, map, barrier, 3, {c0, c1, c2}, ranks);
}
inline void tensor_load_4d_multicast(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1, int c2, int c3,
                                     std::uint16_t ranks) {
    emulator::tensor_load(to, map, barrier, 4, {c0, c1, c2, c3}, ranks);
}

// Matrix products.

inline std::uint64_t matrix_descriptor(const void* tile) {
    const std::size_t offset = emulator::shared_offset(tile, 1024, "a matrix");
    if (offset % 1024) emulator::fail("a matrix at no multiple of 1024 bytes");
    return std::uint64_t{1} << 62 | std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 16 | offset >> 4;
}

namespace emulator {

// The tile behind a descriptor, in pieces of 16 bytes: 32 bytes of each row, wherever the swizzle has put them. Calls
// f(offset in shared memory, number of the piece).
template <class F>
void each_chunk(std::uint64_t descriptor, int rows, F f) {
    const std::size_t start = (descriptor & 0x3fff) << 4;
    for (int i = 0; i < 2 * rows; ++i) {
        const std::size_t at = start + static_cast<std::size_t>(i / 2) * 128 + static_cast<std::size_t>(i % 2) * 16;
        f(swizzled(at), i);
    }
}

inline void require_tile(const Block& block, std::uint64_t descriptor, int rows) {
    const std::size_t start = (descriptor & 0x3fff) << 4;
    if (start % kProductBytes || start % 1024 >= 128 || start / 1024 * 1024 + rows * 128u > block.shared_bytes)
        fail("an operand of wgmma that is no tile in shared memory");
}

inline std::vector<unsigned char> read_operands(const Block& block, const Product& product) {
    std::vector<unsigned char> operands((kProductRows + kProductCols) * kProductBytes);
    unsigned char* to = operands.data();
    const auto read = [&](std::size_t at, int piece) { std::memcpy(to + 16 * piece, block.shared + at, 16); };
    each_chunk(product.a, kProductRows, read);
    to += kProductRows * kProductBytes;
    each_chunk(product.b, kProductCols, read);
    return operands;
}

// sums = A·Bᵀ, on top of what they are with `accumulate`. Nothing here is shared, and sanitizers take time.
template <class T>
__attribute__((no_sanitize("thread"))) void multiply(const unsigned char* operands, bool accumulate, float* sums) {
    constexpr int kDepth = kProductBytes / sizeof(T);
    float a[kProductRows][kDepth], b[kDepth][kProductCols];
    for (int row = 0; row < kProductRows + kProductCols; ++row)
        for (int k = 0; k < kDepth; ++k) {
            T element;
            std::memcpy(&element, operands + row * kProductBytes + k * sizeof(T), sizeof(T));
            (row < kProductRows ? a[row][k] : b[k][row - kProductRows]) = to_float(element);
        }
    for (int row = 0; row < kProductRows; ++row) {
        float* sum = sums + row * kProductCols;
        if (!accumulate) std::fill(sum, sum + kProductCols, 0.0f);
        for (int k = 0; k < kDepth; ++k)
            for (int col = 0; col < kProductCols; ++col) sum[col] += a[row][k] * b[k][col];
    }
}

// In the matrix of a product, where the accumulator i of thread t of the warpgroup belongs.
inline int product_place(int t, int i) {
    const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), col = 8 * (i / 4) + 2 * (t % 4) + i % 2;
    return row * kProductCols + col;
}

inline void make(Product& product, Block& block) {
    each_chunk(product.a, kProductRows, [&](std::size_t at, int) { reads(block.shared + at, 16); });
    each_chunk(product.b, kProductCols, [&](std::size_t at, int) { reads(block.shared + at, 16); });
    if (read_operands(block, product) != product.operands)
        fail("shared memory that a wgmma reads was written before the wait for it");
    if (product.before) product.sums = std::move(product.before->sums);
    product.before = nullptr;
    product.multiply(product.operands.data(), product.accumulate, product.sums.data());
    product.done = true;
}

inline Issuer& issuer(const char* what) {
    Block& block = emulator::block();
    if (threadIdx.x / 128 * 128 + 128 > block.threads) fail(std::string(what) + " outside of a whole warpgroup");
    return hopper(block).warpgroups[threadIdx.x / 128].issuers[threadIdx.x % 128];
}

// Waits until the product is made, after those before it on the same accumulators.
inline void finish(const std::shared_ptr<Product>& product) {
    if (product->before) finish(std::shared_ptr<Product>(product->before));
    struct Issued final : Wait {
        const Product& product;
        explicit Issued(const Product& product) : product(product) {}
        bool over() const override { return product.issued == 128; }
        std::string text() const override {
            return "for a wgmma that " + std::to_string(product.issued) + " of 128 threads have issued";
        }
    };
    struct Done final : Wait {
        const Product& product;
        explicit Done(const Product& product) : product(product) {}
        bool over() const override { return product.done; }
        std::string text() const override { return "for a wgmma"; }
    };
    wait_for(Issued(*product));
    if (!product->asked_for) {
        product->asked_for = true;
        later("a wgmma was done", [product, &block = block()] {
            acquire(product.get());
            make(*product, block);
            release(&product->sums);
        });
    }
    wait_for(Done(*product));
    acquire(&product->sums);
}

}  // namespace emulator

inline void wgmma_fence() {
    emulator::Unseen unseen;
    emulator::issuer("wgmma_fence").fenced = true;
}

template <class T>
void wgmma_64x128(float (&acc)[64], std::uint64_t a, std::uint64_t b, bool accumulate) {
    using namespace emulator;
    static_assert(std::is_same_v<T, f16> || std::is_same_v<T, bf16> || std::is_same_v<T, e4m3>);
    Unseen unseen;
    Issuer& issuer = emulator::issuer("wgmma");
    auto& issuing = hopper(block()).warpgroups[threadIdx.x / 128].issuing;
    const std::size_t number = issuer.issued++;
    std::shared_ptr<Product>& product = issuing[number];
    const std::shared_ptr<Product> before = issuer.last_on(acc);
    if (!before && !issuer.fenced) fail("a wgmma on accumulators that no wgmma_fence has handed over");
    if (!product) {
        product = std::make_shared<Product>();
        product->a = a;
        product->b = b;
        product->accumulate = accumulate;
        product->multiply = multiply<T>;
        product->before = before;
        if (!before) product->sums.resize(kProductRows * kProductCols);
    }
    if (product->a != a || product->b != b || product->accumulate != accumulate || product->multiply != multiply<T> ||
        product->before != before)
        fail("a wgmma that differs between the threads of its warpgroup");
    require_tile(block(), a, kProductRows);
    require_tile(block(), b, kProductCols);
    for (int i = 0; i < 64; ++i) {
        if (!before) product->sums[static_cast<std::size_t>(product_place(threadIdx.x % 128, i))] = acc[i];
        acc[i] = std::numeric_limits<float>::quiet_NaN();
    }
    issuer.open.push_back({product, acc});
    release(product.get());
    if (++product->issued == 128) {
        product->operands = read_operands(block(), *product);
        issuing.erase(number);
    }
}

inline void wgmma_commit() {
    emulator::Unseen unseen;
    emulator::Issuer& issuer = emulator::issuer("wgmma_commit");
    issuer.committed.push_back(std::move(issuer.open));
    issuer.open.clear();
}

template <int Pending>
void wgmma_wait() {
    using namespace emulator;
    Unseen unseen;
    Issuer& issuer = emulator::issuer("wgmma_wait");
    issuer.fenced = false;
    while (issuer.committed.size() > std::size_t{Pending}) {
        const std::vector<Issuer::Pending> group = std::move(issuer.committed.front());
        issuer.committed.pop_front();
        for (const auto& [product, acc] : group) finish(product);
        for (const auto& [product, acc] : group) {
            const std::shared_ptr<Product> last = issuer.last_on(acc);
            if (last || product->sums.empty()) continue;  // a later product goes on with these accumulators
            for (int i = 0; i < 64; ++i)
                acc[i] = product->sums[static_cast<std::size_t>(product_place(threadIdx.x % 128, i))];
        }
    }
}

// A thread here has the registers that it needs.
template <int R>
void registers_grow() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
}
template <int R>
void registers_shrink() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
}

}  // namespace sparsekern::cuda
