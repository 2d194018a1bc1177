// Distances between rows of bits: all of them, or the nearest rows.
//
// Both work on panels of kBitPanel rows of `b`, transposed so that 32 bits of each row lie side by side: a word of a row of
// `a` meets the same word of all rows of a panel in a few vector operations, and every lane counts for a pair of its own.
#pragma once

#include <cstdint>

namespace sparsekern {

constexpr std::int64_t kBitPanel = 64;

enum class BitMetric {
    hamming,  // |a ^ b|
    jaccard,  // |a ^ b| / |a | b|, in float32; 0 where neither has a bit
};

// `rows` rows of 32 * `words` bits, one after the other; at any address.
struct BitRows {
    const std::uint8_t* bits;
    std::int64_t rows, words;

    const std::uint8_t* row(std::int64_t i) const { return bits + 4 * words * i; }
};

struct BitKernels {
    // out [a.rows, b.rows]: int32 for Hamming, float for Jaccard.
    void (*distances)(const BitRows& a, const BitRows& b, BitMetric metric, void* out, int threads);

    // The k nearest rows of b of each row of a, by rising distance, ties to the lower index; without `itself` row i of b is
    // none of row i's. distance [a.rows, k] as above, index [a.rows, k].
    void (*neighbors)(const BitRows& a, const BitRows& b, std::int64_t k, BitMetric metric, bool itself, void* distance,
                      std::int32_t* index, int threads);
};

// One table for each instruction set; nullptr where this build has none for the machine's architecture.
const BitKernels* bit_kernels_generic();
const BitKernels* bit_kernels_avx2();
const BitKernels* bit_kernels_avx512();
const BitKernels* bit_kernels_avx512popcnt();  // beside avx512: its instruction that counts bits

}  // namespace sparsekern
