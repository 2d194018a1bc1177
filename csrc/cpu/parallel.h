// Sharing work over threads: those of torch where they can be had, else new ones.
//
// torch keeps a pool of OpenMP threads, and after each of its own loops they spin for a while, waiting for the next. A
// second pool, or threads started beside it, would compete with them for the cores: kernels then run no faster on two
// cores than on one. So the kernels borrow torch's pool. They are not linked with an OpenMP library, which could be
// another copy than torch's: Python tells use_openmp() which one torch has loaded.
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace sparsekern {

// libgomp's entry point behind `#pragma omp parallel`: runs work(data) on up to `threads` threads and waits for them.
using OpenMPFork = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
inline OpenMPFork openmp_fork = nullptr;

// Borrow the threads of the libgomp at `path`, if the process has it loaded. Returns whether it has.
inline bool use_openmp(const char* path) {
#if defined(__linux__)
    if (void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD))
        openmp_fork = reinterpret_cast<OpenMPFork>(dlsym(library, "GOMP_parallel"));
#else
    (void)path;
#endif
    return openmp_fork != nullptr;
}

// Calls body(begin, end) for up to `parts` contiguous ranges that cover [0, n), on up to `threads` threads. The ranges
// depend on n and `parts` alone, not on how many threads turn up or which of them takes what.
template <class Body>
void parallel_for(std::int64_t n, int threads, std::int64_t parts, const Body& body) {
    struct Work {
        const Body& body;
        const std::int64_t n, parts;
        std::atomic<std::int64_t> next{0};

        void run() {
            for (std::int64_t part; (part = next.fetch_add(1)) < parts;)
                body(n * part / parts, n * (part + 1) / parts);
        }
        static void enter(void* work) { static_cast<Work*>(work)->run(); }
    } work{body, n, std::max<std::int64_t>(1, std::min(parts, n))};
    const int team = static_cast<int>(std::min<std::int64_t>(threads, work.parts));

    if (team <= 1) {
        work.run();
    } else if (openmp_fork) {
        openmp_fork(Work::enter, &work, static_cast<unsigned>(team), 0);
    } else {
        std::vector<std::thread> helpers;
        for (int helper = 1; helper < team; ++helper) helpers.emplace_back(Work::enter, &work);
        work.run();
        for (std::thread& helper : helpers) helper.join();
    }
}

// As many parts as threads.
template <class Body>
void parallel_for(std::int64_t n, int threads, const Body& body) {
    parallel_for(n, threads, threads, body);
}

// How many threads are worth waking for `flops` of work.
inline int useful_threads(double flops, int threads) {
    constexpr double kFlopsPerThread = 2e6;  // about a hundred microseconds: several times the cost of a new thread
    return static_cast<int>(std::max(1.0, std::min<double>(threads, flops / kFlopsPerThread)));
}

}  // namespace sparsekern
