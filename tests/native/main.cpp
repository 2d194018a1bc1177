// Runs every NATIVE_TEST of this folder, or those named on the command line.
#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

int main(int argc, char** argv) {
    std::printf("instruction sets:");
    for (const char* isa : {"generic", "avx2", "avx512"})
        std::printf(" %s%s", isa, machine_has(isa) ? "" : " (NOT RUN: this machine has none)");
    std::printf("\n");
    return run_tests(argc, argv);
}
