// What the tests of the CUDA kernels share beyond native_test.h. A new kernel's tests are one file of this folder.
#pragma once

#include <cstdlib>

#include "../native_test.h"
#include "cuda/device.h"

namespace sparsekern::test {

// The text of the CudaError that `f` ends with; a failure of the test if it does not.
template <class F>
std::string error_of(F f) {
    try {
        f();
    } catch (const cuda::CudaError& error) {
        return error.what();
    }
    throw Failure("no CudaError");
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Runs `f` with threads taking turns, and in some orders drawn at random.
template <class F>
void in_several_orders(F f, int seeds = 3) {
    unsetenv("SPARSEKERN_EMULATOR_ORDER");
    f();
    for (int seed = 1; seed <= seeds; ++seed) {
        setenv("SPARSEKERN_EMULATOR_ORDER", std::to_string(seed).c_str(), 1);
        f();
    }
    unsetenv("SPARSEKERN_EMULATOR_ORDER");
}

// What a sanitizer is to report: a process of its own runs it. A process that has started fibers cannot fork under
// ThreadSanitizer, so it is this program again, with `--case <name>`.
inline std::vector<Test>& cases() {
    static std::vector<Test> all;
    return all;
}

inline std::string& program() {
    static std::string path;
    return path;
}

#define NATIVE_CASE(name)                                                      \
    static void case_##name();                                                 \
    [[maybe_unused]] static const bool registered_case_##name =                \
        (::sparsekern::test::cases().push_back({#name, case_##name}), true); \
    static void case_##name()

// What is written by the process that runs a case, if it ends otherwise than with success; empty else.
inline std::string report_of(const std::string& name) {
    std::FILE* output = popen(("'" + program() + "' --case " + name + " 2>&1").c_str(), "r");
    CHECK(output, "no process");
    std::string text;
    char piece[4096];
    for (std::size_t size; (size = std::fread(piece, 1, sizeof piece, output)) > 0;) text.append(piece, size);
    return pclose(output) == 0 ? "" : text + " ";
}

}  // namespace sparsekern::test
