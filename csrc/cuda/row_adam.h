// Adam over a matrix of one row a latent whose gradient is kept as factors,
//
//     G[i] = sum over the sums of outer products, and over the entries e of latent i, of  values[e] * vectors[row(e)],
//
// so that the gradient itself never exists, or that of some latents at a time: a block has a latent, makes its row of G
// in registers, and uses it up there. One pass over memory removes the component along a unit row, clips, updates both
// moments and the weight, restores the unit norm, and refreshes the low-precision copy that the encoder screens with.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace sparsekern::cuda {

// Entries are sorted by latent (by_latent.h). The sums of the pieces of long latents are those of sum_pieces.
struct OuterProducts {
    const float* values;   // [entries]
    const float* vectors;  // [rows, d]
    std::int64_t stride;   // between its rows, in elements
    const std::int32_t* start;
    const std::int32_t* order;
    const std::int32_t* row_of;  // [entries]: the row of each, or nullptr for k entries in every row
    const std::int32_t* piece_start;
    const float* pieces;  // [most_pieces, d]
    std::int32_t k;
};

constexpr int kMostSums = 4;

struct RowGradient {
    OuterProducts sums[kMostSums];
    std::int32_t count;
    std::int32_t split;  // entries of a piece
    std::int64_t n;
    std::int32_t d;
    std::int32_t slice;   // columns that are gone through together (see row_adam.cu); d for all
    const float* weight;  // [n, d], contiguous
    bool unit_rows;       // remove the component along weight[i] from G[i]
    // Where it holds false nothing at all is done; nullptr for always.
    const std::uint8_t* needed;
    // [slices, n]: of the squares of G[i] in each slice the sum, unclipped. Not written for latents without an entry.
    // For unit rows [n]: they are squared whole.
    float* squares;
};

// A rounded copy of the rows. The scale of a row is its largest magnitude over `limit`, which brings it to the range of
// the narrow type; without a limit rows are not scaled.
struct RoundedRows {
    ElementType type;
    void* rows;   // [n, d], or nullptr for no copy
    float limit;  // 0 for none
    float* scale;  // [n]
    float* norm;   // [n], of the rows before rounding
    float* error;  // [n], of what rounding changed
};

struct AdamStep {
    float* weight;  // that of the gradient; as its moments, contiguous
    float* first_moment;
    float* second_moment;
    const float* hyper;  // lr / (1 - beta1^step), sqrt(1 - beta2^step), and what the gradient is multiplied by
    float first_rate;    // 1 - beta1
    float second_rate;   // 1 - beta2
    float eps;
    RoundedRows copy;
};

// The widest rows: those that fit into the registers of a block.
constexpr std::int32_t kWidest = 16384;

// sums [most_pieces, d]: of the entries of each piece. Those of unused pieces are not written.
void sum_pieces(const OuterProducts& product, const std::int32_t* piece_latent, std::int64_t pieces, std::int64_t n,
                std::int32_t d, std::int32_t split, std::int32_t slice, float* sums, Stream stream);

// bounds[i]: an upper bound on |G[i]| by the triangle inequality, up to rounding. norms[s]: of the vectors of sum s.
void bound_rows(const RowGradient& gradient, const float* const* norms, float* bounds, Stream stream);

// rows [n, d]: the gradient, which is not projected.
void gradient_rows(const RowGradient& gradient, float* rows, Stream stream);

// Room for the gradient of some latents. Unit rows that are to be gone through in slices need it, no others.
struct RowWorkspace {
    float* rows;  // [count, d]
    std::int64_t count;
};

// Squares of the gradient alone.
void gradient_squares(const RowGradient& gradient, const RowWorkspace& workspace, Stream stream);

void row_adam(const RowGradient& gradient, const AdamStep& step, const RowWorkspace& workspace, Stream stream);

}  // namespace sparsekern::cuda
