// Runs every NATIVE_TEST of the CUDA kernels, on the emulator, or those named on the command line.
#include "cuda_test.h"

using namespace sparsekern::test;

int main(int argc, char** argv) {
    program() = argv[0];
    if (argc == 3 && std::string(argv[1]) == "--case") {
        for (const Test& one : cases())
            if (argv[2] == std::string(one.name)) return one.run(), 0;
        return 2;
    }
    return run_tests(argc, argv);
}
