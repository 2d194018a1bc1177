// Kernels for AVX512. The target is set here, after the standard headers, rather than by a compiler flag: an inline
// function of the standard library compiled for AVX512 could otherwise be the copy that the linker keeps for everyone.
#include <cstring>
#include <vector>

#include "parallel.h"
#include "sparse_products.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define SPARSEKERN_ISA avx512
#include "sparse_products.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace sparsekern {
template <class T> const SparseProducts<T>* sparse_products_avx512() { return nullptr; }
template const SparseProducts<float>* sparse_products_avx512<float>();
template const SparseProducts<double>* sparse_products_avx512<double>();
}  // namespace sparsekern

#endif
