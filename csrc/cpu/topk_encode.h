// topk_encode: the k largest of  score(b, i) = <W[i], x[b]> + bias[i]  in every row b, exactly, at the price of an int8
// matrix product.
//
//   screening    Every score is approximated by an int8 product in registers; only latents that could still be among
//                the k largest leave them, as candidates.
//   rescoring    The candidates' scores are computed again from the stored float32 weights, and the k largest taken.
//   certificate  |score - approximation| <= |W - W^| |x| + |W^| |x - x^| (Cauchy-Schwarz), with every norm measured, so
//                a latent is dropped only when it provably is not among the k largest. A row for which this could not
//                be kept up (not finite, too many candidates) is reported, for the caller to compute in full.
//
// The bound is worst-case: what is dropped never decides. It costs about a hundred rescored candidates a row.
#pragma once

#include <cstdint>

namespace sparsekern {

// Latents in the quantised copy come in panels of this many. Within a panel, for each four input dimensions and each of
// four groups of 16 latents, 64 bytes: latent-major, the four dimensions of a latent adjacent, as `vpdpbusd` wants them.
constexpr std::int64_t kPanel = 64;
constexpr std::int64_t kGroup = 16;

inline std::int64_t padded_width(std::int64_t d) { return (d + 3) / 4 * 4; }
inline std::int64_t padded_latents(std::int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// A float32 matrix of one row a latent.
struct Weights {
    const float* data;
    std::int64_t stride;  // between rows, in elements
    std::int64_t n;       // latents
    std::int64_t d;       // input width
};

// Its quantised copy: W^[i] = scale[i] * (packed[i] - 128). All arrays cover padded_latents(n) latents.
struct Quantized {
    std::uint8_t* packed;  // padded_latents(n) * padded_width(d) bytes, 64-byte aligned
    float* scale;
    float* error;  // >= |W[i] - W^[i]|
    float* norm;   // >= |W[i]| and >= |W^[i]|; infinite for a row that is not finite
};

// Which rows meet which latents: expert e owns latents [e * n / count, (e + 1) * n / count). A slot is one of a row's
// experts: slot row * active + j is the j-th.
struct Experts {
    std::int64_t count;
    std::int64_t active;          // of a row
    const std::int32_t* order;    // [rows * active]: slots by rising expert, and in an expert by rising slot
    const std::int32_t* offsets;  // [count + 1]: where each expert's slots begin in `order`
    bool apart;                   // the k largest of each slot, not of each row
    bool screened;                // else every score is computed in float32
};

struct EncodeArgs {
    Weights weights;
    const Experts* experts;      // nullptr: all rows meet all latents
    const Quantized* quantized;  // nullptr: quantised here, in blocks
    const float* bias;           // [n] or nullptr
    const float* x;              // [rows, d]
    std::int64_t x_stride;
    std::int64_t rows;
    std::int64_t k;
    float* values;          // [rows, k], or [slots, k] of experts apart; falling, ReLU applied
    std::int32_t* index;    // the same
    std::uint8_t* certain;  // [rows], or [slots]: 0 where it must be computed in full
    int threads;
};

struct TopkEncode {
    // Quantises rows [first, last) of the weights; `first` a multiple of kGroup, `last` too or the end.
    void (*quantize)(const Weights&, const Quantized&, std::int64_t first, std::int64_t last);
    // Returns the number of candidates rescored.
    std::int64_t (*encode)(const EncodeArgs&);
};

// One table for each instruction set; nullptr where this build has none for the machine's architecture.
const TopkEncode* topk_encode_generic();
const TopkEncode* topk_encode_avx2();
const TopkEncode* topk_encode_avx512();

}  // namespace sparsekern
