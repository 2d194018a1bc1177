// The three partial derivatives of the trilinear form
//
//     T(v, W, g) = sum over rows b and slots j of  v[b, j] * <W[index[b, j]], g[b]>
//
// are everything that a sparse code needs on its way forward and backward:
//
//     sparse_decode  dT/dg :  out[b]    = bias + sum_j v[b, j] * W[index[b, j]]
//     gather_dot     dT/dv :  out[b, j] = <W[index[b, j]], g[b]>
//     scatter_outer  dT/dW :  out[i]    = sum over (b, j) with index[b, j] == i of  v[b, j] * g[b]
//
// Rows have k slots each, or any number of them (codes in CSR form). Threads share slots, not rows, and results do not
// depend on how many threads there are.
//
// All arrays are row-major with unit stride along the last axis; `*_stride` is the distance between rows in elements.
// `index` holds int32 latent numbers in [0, d_sae), checked by the caller. Row offsets are 64-bit throughout.
#pragma once

#include <cstdint>

namespace sparsekern {

// Slots, or entries, of one row after the other: k in each row, or those from crow[b] to crow[b + 1].
struct Codes {
    const std::int32_t* index;  // contiguous
    std::int64_t rows;
    std::int64_t k;
    std::int64_t d_sae;
    const std::int64_t* crow = nullptr;  // [rows + 1], or nullptr for k slots in every row

    std::int64_t begin(std::int64_t b) const { return crow ? crow[b] : b * k; }
    std::int64_t slots() const { return begin(rows); }
};

template <class T>
struct SparseProducts {
    void (*sparse_decode)(const Codes&, const T* values, const T* weight, std::int64_t weight_stride, const T* bias,
                          T* out, std::int64_t d, int threads);
    void (*gather_dot)(const Codes&, const T* weight, std::int64_t weight_stride, const T* grad,
                       std::int64_t grad_stride, T* out, std::int64_t d, int threads);
    // Writes every row of out [d_sae, d]; rows that no slot points to become zero. Sums run in slot order whatever
    // the number of threads, so the result is the same bits every time.
    void (*scatter_outer)(const Codes&, const T* values, const T* grad, std::int64_t grad_stride, T* out,
                          std::int64_t d, int threads);
};

// One table for each instruction set; nullptr where this build has none for the machine's architecture.
template <class T> const SparseProducts<T>* sparse_products_generic();
template <class T> const SparseProducts<T>* sparse_products_avx2();
template <class T> const SparseProducts<T>* sparse_products_avx512();

}  // namespace sparsekern
