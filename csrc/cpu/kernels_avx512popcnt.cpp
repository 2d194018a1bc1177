// Kernels for AVX-512 with VPOPCNTDQ, which some machines with AVX-512 lack: those that count bits. See kernels_avx512.cpp
// about the target.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "bits.h"
#include "isa.h"
#include "parallel.h"
#include "workspace.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,prefer-vector-width=512")
#endif

#define SPARSEKERN_ISA avx512popcnt
#define SPARSEKERN_LEVEL 3
#include "bits.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace sparsekern {
const BitKernels* bit_kernels_avx512popcnt() { return nullptr; }
}  // namespace sparsekern

#endif
