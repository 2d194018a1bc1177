// Kernels for AVX-512 with VNNI. The target is set here, after the standard headers, rather than by a compiler flag: an inline
// function of the standard library compiled for it could otherwise be the copy that the linker keeps for everyone.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "bits.h"
#include "csr_encode.h"
#include "isa.h"
#include "parallel.h"
#include "row_adam.h"
#include "screening.h"
#include "sparse_products.h"
#include "topk_encode.h"
#include "workspace.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif

#define SPARSEKERN_ISA avx512
#define SPARSEKERN_LEVEL 2
#include "sparse_products.inl"
#include "screening.inl"
#include "topk_encode.inl"
#include "csr_encode.inl"
#include "row_adam.inl"
#include "bits.inl"

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
const TopkEncode* topk_encode_avx512() { return nullptr; }
const CsrEncode* csr_encode_avx512() { return nullptr; }
const RowUpdates* row_updates_avx512() { return nullptr; }
const BitKernels* bit_kernels_avx512() { return nullptr; }
}  // namespace sparsekern

#endif
