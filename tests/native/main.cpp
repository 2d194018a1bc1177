// Runs every NATIVE_TEST, or those named on the command line.
#include <chrono>
#include <cstdio>

#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

int main(int argc, char** argv) {
    std::printf("instruction sets:");
    for (const char* isa : {"generic", "avx2", "avx512"})
        std::printf(" %s%s", isa, machine_has(isa) ? "" : " (NOT RUN: this machine has none)");
    std::printf("\n");

    int ran = 0;
    for (const Test& test : tests()) {
        if (argc > 1 && std::none_of(argv + 1, argv + argc, [&](std::string name) { return name == test.name; }))
            continue;
        ++ran;
        const auto start = std::chrono::steady_clock::now();
        try {
            test.run();
        } catch (const std::exception& error) {
            std::printf("%s FAILED\n%s\n", test.name, error.what());
            return 1;
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::printf("%s passed (%.1f s)\n", test.name, seconds.count());
        std::fflush(stdout);  // before what a sanitizer may write
    }
    if (ran == 0) std::printf("no test has such a name\n");
    return ran == 0;
}
