// The screen of the encoder: every token times every latent in low precision, of which only the best of each bucket are
// written. For sm_90a.
//
// Latent i is member i / n_buckets of bucket i % n_buckets. Of every bucket the `keep` largest scores of a token
// survive, falling, as keys: the float32 score with the number of the member in its lowest bits. So no tensor of tokens
// by latents exists. The keys are those of the Triton kernel `_screen`, up to the order in which a product is summed.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace sparsekern::cuda {

// Slots (a token's place at one of its experts) in the order of experts, for an encoder whose tokens meet the latents
// of some experts alone. Tile t has 128 * cluster slots of expert tile_expert[t], which is n_experts where there is no
// such tile; there are at most ceil(slots / (128 * cluster)) + n_experts. The tables are on the device.
struct ScreenSlots {
    const std::int32_t* order;        // [slots]: slots by rising expert
    const std::int32_t* offsets;      // [n_experts + 1]: where each expert's begin in `order`
    const std::int32_t* first_tile;   // [n_experts]
    const std::int32_t* tile_expert;  // [tiles]
    std::int32_t n_active;            // slots of a token: slot s is token s / n_active's
    std::int32_t n_experts;
};

struct ScreenArgs {
    ElementType type;  // float16, bfloat16 or float8_e4m3
    // [rows, d]: the tokens; with slots the token of each slot, in their order (gather_rows). Rows begin at multiples
    // of 16 bytes, as do those of the weight; strides are in elements.
    const void* x;
    std::int64_t x_stride;
    const float* x_scale;  // [tokens]: what a token's scores are multiplied by, or nullptr
    // [n_buckets * n_members, d], with slots [n_experts * n_buckets * n_members, d].
    const void* weight;
    std::int64_t weight_stride;
    const float* weight_scale;  // of each latent, or nullptr
    const void* bias;           // of each latent, or nullptr; float32, float16 or bfloat16
    ElementType bias_type;
    float* keys;  // [rows, keep, n_buckets]; with slots, row s is slot s's
    std::int64_t rows, d;
    // Latents from n_real on do not exist: their rows only fill up n_buckets * n_members, and may hold anything finite.
    // Scales and bias have n_real entries. With slots n_real is n_buckets * n_members, the latents of one expert.
    std::int64_t n_real, n_buckets, n_members;
    int keep;       // 1 to 3
    bool absolute;  // keys of sizes
    int cluster;    // blocks, of 128 rows each, that share what they read of the weight: 1, 2 or 4
    const ScreenSlots* slots;  // or nullptr
};

void screen(const ScreenArgs& args, Stream stream);

// out[i] = x[order[i] / n_active]: rows of `row_bytes`, a multiple of 16, `stride_bytes` apart in x, contiguous in out.
void gather_rows(const void* x, std::int64_t stride_bytes, const std::int32_t* order, std::int32_t n_active, void* out,
                 std::int64_t rows, std::int64_t row_bytes, Stream stream);

// Which tile of tokens and which of buckets unit `unit` of screen()'s work is. Units that are close run at one time:
// `group` tiles of tokens, whose x stays in the cache, go down all buckets together and share the weight's rows.
struct ScreenTile {
    std::int32_t tokens, buckets;
};

__host__ __device__ __forceinline__ ScreenTile screen_tile_of(std::int32_t unit, std::int32_t token_tiles,
                                                              std::int32_t bucket_tiles, std::int32_t group) {
    const std::int32_t band = unit / (group * bucket_tiles), within = unit % (group * bucket_tiles);
    const std::int32_t height = min_of(group, token_tiles - band * group);
    return {band * group + within % height, within / height};
}

}  // namespace sparsekern::cuda
