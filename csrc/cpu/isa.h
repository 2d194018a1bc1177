// Which instruction sets this machine has, by the names that the kernel tables carry.
#pragma once

#include <string>

// The name of one instruction set's function: SPARSEKERN_JOIN(topk_encode_, SPARSEKERN_ISA).
#define SPARSEKERN_JOIN_(a, b) a##b
#define SPARSEKERN_JOIN(a, b) SPARSEKERN_JOIN_(a, b)

namespace sparsekern {

inline bool machine_has(const std::string& isa) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
    if (isa == "avx512popcnt") return machine_has("avx512") && __builtin_cpu_supports("avx512vpopcntdq");
#endif
    return isa == "generic";
}

}  // namespace sparsekern
