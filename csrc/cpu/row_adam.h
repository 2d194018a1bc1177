// Adam over a matrix of one row a latent whose gradient is kept as factors,
//
//     G[i] = sum over the parts, and over their slots (b, j) with index[b, j] == i, of  values[b, j] * vectors[b],
//
// so that the gradient itself never exists: each row of it is made in the L1 cache, where it is used up. One pass over
// memory makes the gradient, removes its component along a unit row, clips it, updates moments and weight, restores the
// unit norm, and refreshes the int8 copy that the encoder screens with.
#pragma once

#include <cstdint>

#include "screening.h"

namespace sparsekern {

// Slots of a code sorted by latent: those of latent i are order[start[i] .. start[i + 1]), ascending, so that every sum
// has one order whatever the number of threads.
struct SortedSlots {
    std::int32_t* start;  // [n + 1]
    std::int32_t* order;  // [slots]
};

// Stable counting sort; the number of slots must be below 2^31.
void sort_slots(const std::int32_t* index, std::int64_t slots, std::int64_t n, const SortedSlots& out);

struct OuterProducts {
    SortedSlots slots;
    const float* values;      // [rows, k], or [entries] of codes in CSR form
    std::int64_t k;
    const float* vectors;     // [rows, d]
    std::int64_t stride;      // between its rows, in elements
    const std::int32_t* row;  // [entries]: the row of each, or nullptr for k slots in every row

    const float* vector(std::int32_t slot) const { return vectors + (row ? row[slot] : slot / k) * stride; }
};

struct RowGradient {
    const OuterProducts* parts;
    std::int64_t count;
    std::int64_t n, d;
    const float* weight;  // [n, d], contiguous
    bool unit_rows;       // remove the component along weight[i] from G[i]
};

struct RowAdam {
    RowGradient gradient;
    float* weight;  // [n, d], contiguous, as are its moments
    float* mean;    // exp_avg
    float* square;  // exp_avg_sq
    float scale;    // of the gradient: the clipping coefficient
    float rate;     // lr / (1 - beta1^step)
    float beta1, beta2, eps;
    float root;     // sqrt(1 - beta2^step)
    // Rows without a gradient for `rest_after` steps are left alone until they have one again, when their moments are
    // decayed for the steps missed. nullptr: every row is updated in every step.
    std::int32_t* last;  // [n]: the step in which a row was last updated, and
    std::int32_t* active;  // [n]: in which it last had a gradient
    std::int32_t step, rest_after;
    const Quantized* quantized;  // refreshed, or nullptr
    float* squares;              // [n]: |G[i]|^2 as from gradient_squares, or nullptr
};

struct RowUpdates {
    // squares[i] = |G[i]|^2, unclipped; 0 for rows without a slot.
    void (*gradient_squares)(const RowGradient&, float* squares, int threads);
    void (*adam)(const RowAdam&, int threads);
};

// One table for each instruction set; nullptr where this build has none for the machine's architecture.
const RowUpdates* row_updates_generic();
const RowUpdates* row_updates_avx2();
const RowUpdates* row_updates_avx512();

}  // namespace sparsekern
