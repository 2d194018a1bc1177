// parallel_for with few items, where the kernels themselves would stay on one thread.
#include "cpu/parallel.h"

#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

namespace {

// Where the ranges of [0, n) begin and end, each item visited once. The vectors are not guarded, so ThreadSanitizer
// reports two threads at one item.
std::vector<std::int64_t> ranges(std::int64_t n, int threads, const char* pool) {
    std::vector<int> visits(n, 0);
    std::vector<std::int64_t> end_of(n, -1);
    parallel_for(n, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) ++visits[i];
        if (begin < end) end_of[begin] = end;
    });
    const auto once = std::count(visits.begin(), visits.end(), 1);
    CHECK(once == n, once << " of " << n << " items visited once, " << threads << " threads, " << pool);
    const auto parts = n - std::count(end_of.begin(), end_of.end(), -1);
    CHECK(parts == std::min<std::int64_t>(n, threads), parts << " ranges of " << n << " items on " << threads);
    return end_of;
}

// Stand-ins for libgomp's GOMP_parallel: one that brings every thread asked for, and one that brings none.
void fork_all(void (*work)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; ++i) team.emplace_back(work, data);
    work(data);
    for (std::thread& member : team) member.join();
}

void fork_none(void (*work)(void*), void* data, unsigned, unsigned) { work(data); }

}  // namespace

NATIVE_TEST(parallel_for) {
    for (std::int64_t n : {0, 1, 2, 3, 7, 1000})
        for (int threads : {1, 2, 3, 4, 9}) {
            const auto own = ranges(n, threads, "own threads");
            for (OpenMPFork fork : {fork_all, fork_none}) {
                openmp_fork = fork;
                const auto borrowed = ranges(n, threads, "a borrowed pool");
                openmp_fork = nullptr;
                CHECK(own == borrowed, "other ranges of " << n << " items on a borrowed pool of " << threads);
            }
        }
}

NATIVE_TEST(useful_threads) {
    CHECK(useful_threads(0, 4) == 1, useful_threads(0, 4));
    CHECK(useful_threads(1e12, 4) == 4, useful_threads(1e12, 4));
    for (double flops = 1; flops < 1e9; flops *= 1.5)
        for (int threads = 1; threads < 6; ++threads) {
            const int useful = useful_threads(flops, threads);
            CHECK(useful >= 1 && useful <= threads, useful << " of " << threads << " for " << flops);
        }
}
