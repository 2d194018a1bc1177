// Runs every NATIVE_TEST of the CUDA kernels, on the emulator, or those named on the command line.
#include "../native_test.h"

int main(int argc, char** argv) { return sparsekern::test::run_tests(argc, argv); }
