// Static work sharing over plain threads.
//
// Not OpenMP: torch carries its own OpenMP runtime, and a second pool in the same process fights it for the cores.
// Threads are started per call: that costs tens of microseconds, where the kernels below run for milliseconds, and it
// leaves nothing behind that a fork (a DataLoader worker) could inherit in a broken state.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace sparsekern {

// Calls body(begin, end, part) for `parts` contiguous ranges that cover [0, n); part 0 runs on the calling thread.
template <class Body>
void parallel_for(std::int64_t n, int threads, Body body) {
    const int parts = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, n)));
    const auto bound = [n, parts](int part) { return n * part / parts; };
    std::vector<std::thread> workers;
    workers.reserve(parts - 1);
    for (int part = 1; part < parts; ++part)
        workers.emplace_back([&body, &bound, part] { body(bound(part), bound(part + 1), part); });
    body(bound(0), bound(1), 0);
    for (std::thread& worker : workers) worker.join();
}

// How many threads are worth starting for `flops` of work.
inline int useful_threads(double flops, int threads) {
    constexpr double kFlopsPerThread = 2e6;  // about a hundred microseconds: several times the cost of a thread
    return static_cast<int>(std::max(1.0, std::min<double>(threads, flops / kFlopsPerThread)));
}

}  // namespace sparsekern
