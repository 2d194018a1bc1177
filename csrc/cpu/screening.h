// What the screened encoders take. All find large values of
//
//     score(b, i) = <W[i], x[b]> + bias[i]
//
// exactly, at the price of an int8 matrix product:
//
//   screening    Every score is approximated by an int8 product in registers; only latents that could still be wanted
//                leave them, as candidates.
//   rescoring    The candidates' scores are computed again from the stored float32 weights, and those decide.
//   certificate  |score - approximation| <= |W - W^| |x| + |W^| |x - x^| (Cauchy-Schwarz), with every norm measured, so
//                a latent is dropped only when it provably is not wanted. A row for which this could not be kept up (not
//                finite, too many candidates) is reported, for the caller to compute in full.
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

    const float* row(std::int64_t i) const { return data + i * stride; }
};

// Its quantised copy: W^[i] = scale[i] * (packed[i] - 128). All arrays cover padded_latents(n) latents.
struct Quantized {
    std::uint8_t* packed;  // padded_latents(n) * padded_width(d) bytes, 64-byte aligned
    float* scale;
    float* error;  // >= |W[i] - W^[i]|
    float* norm;   // >= |W[i]| and >= |W^[i]|; infinite for a row that is not finite
};

struct EncoderInput {
    Weights weights;
    const Quantized* quantized;  // nullptr: quantised by the encoder, in blocks
    const float* bias;           // [n] or nullptr
    const float* x;              // [rows, d]
    std::int64_t x_stride;
    std::int64_t rows;
    int threads;

    const float* row(std::int64_t b) const { return x + b * x_stride; }
    float bias_of(std::int64_t i) const { return bias ? bias[i] : 0; }
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

}  // namespace sparsekern
