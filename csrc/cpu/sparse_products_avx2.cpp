// Kernels for AVX2. The target is set here, after the standard headers, rather than by a compiler flag: an inline
// function of the standard library compiled for AVX2 could otherwise be the copy that the linker keeps for everyone.
#include <cstring>
#include <vector>

#include "parallel.h"
#include "sparse_products.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define SPARSEKERN_ISA avx2
#include "sparse_products.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace sparsekern {
template <class T> const SparseProducts<T>* sparse_products_avx2() { return nullptr; }
template const SparseProducts<float>* sparse_products_avx2<float>();
template const SparseProducts<double>* sparse_products_avx2<double>();
}  // namespace sparsekern

#endif
