// What the tests of the CUDA kernels share beyond native_test.h. A new kernel's tests are one file of this folder.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

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

// What a process that runs `f` writes to stderr, if it ends otherwise than with success; empty else. It is how a
// sanitizer's report is seen.
template <class F>
std::string report_of(F f) {
    int ends[2];
    CHECK(pipe(ends) == 0, "no pipe");
    std::fflush(stdout);
    const pid_t child = fork();
    CHECK(child >= 0, "no process");
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        f();
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char piece[4096];
    for (ssize_t size; (size = read(ends[0], piece, sizeof piece)) > 0;) text.append(piece, static_cast<size_t>(size));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : text + " ";
}

}  // namespace sparsekern::test
