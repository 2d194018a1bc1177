// topk_encode: the k largest scores in every row, or the k of largest size, by screening.h.
#pragma once

#include <cstdint>

#include "screening.h"

namespace sparsekern {

struct EncodeArgs {
    EncoderInput input;
    const Experts* experts;  // nullptr: all rows meet all latents
    std::int64_t k;
    bool absolute;          // by size, and with signs; not with experts
    float* values;          // [rows, k], or [slots, k] of experts apart; falling (in size), ReLU applied unless `absolute`
    std::int32_t* index;    // the same
    std::uint8_t* certain;  // [rows], or [slots]: 0 where it must be computed in full
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
