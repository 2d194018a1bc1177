// The encoder's steps beside its screen: rows are rounded for the screen, and its keys become codes.
//
//   cast_rows            rows in the precision of the screen, with a scale each and the size of what rounding changed
//   bucket_panel         keys from scores that a library's matmul has left in memory, where the fused screen cannot serve
//   select_candidates    the k-th largest key less the slack is what a candidate has to reach; a bucket that may hide
//                        more of them is opened
//   rescore              exact scores of the candidates, from the stored weights
//   repair               all latents of the rows that have no certificate; mostly there are none
//   take_best            the k largest, ties to the lower latent
//
// A row is a row of codes: a token, or with `share` > 1 one of the `share` rows of a token, of its latents in one expert
// each. Keys are [rows, owners, keep, buckets of an owner]: latent i of an owner is member i / buckets of bucket
// i % buckets, and the lowest `member_bits` of a key hold its member. Nothing waits for the device.
//
// Rescoring is where the bytes are. P candidates in all, of rows of d elements of s bytes, n latents:
//
//   by token     P·d·s from memory: a block has a token and reads the weights' rows of its candidates
//   by latent    n·(1 − exp(−P/n))·d·s from memory, since candidates are sorted by latent and a row of weights is read
//                once, and P·d·s from L2: the tokens' rows, in slices of the width so narrow that all of them fit there
//
// Milliseconds at 3.0 TB/s of memory and 5.5 TB/s of L2, float32, P of random latents (popular ones are met in L2 by
// either). By latent is between the larger and the sum of its two; sorting the candidates adds some 0.03. Instructions
// are 115 for a warp's two slices of 2 KiB by token, and 110 for one by latent: 0.4 and 0.8 ms at A. Nothing is measured.
//
//                              P / n    by token       by latent
//   A 8192, 4096, 2^17, 64     6.1      13.2 GB 4.4    2.1 GB 0.7, L2 13.2 GB 2.4
//   F 8192, 768, 2^17, 32      2.4      0.96 GB 0.32   0.37 GB 0.12, L2 0.96 GB 0.17
//   B 8192, 768, 2^20, 32      0.3      0.96 GB 0.32   0.83 GB 0.28, L2 0.96 GB 0.17
//
// So the caller goes by latent where each is met four times or more and the weights are far larger than L2, as at A, and
// by token elsewhere. Both give the same bits: a score is one sum in one order wherever it is made, also in repair.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace sparsekern::cuda {

// Rows of `d` elements, `stride` elements apart.
struct Rows {
    const void* data;
    std::int64_t stride;
};

// What a score is made of; one type for all: float32, bfloat16 or float16.
struct Operands {
    ElementType type;
    Rows x, weight;
    const void* bias;  // or nullptr
    int d;
    bool absolute;  // scores are compared by size
};

// Which latents a row has: `n` of every one of its `count` owners, experts[row · count + j]; or all `n`.
struct Owners {
    const std::int32_t* experts;  // nullptr: not routed
    int count, n;
};

// The candidates of all rows, at most `room` each. A row with `repaired` not 0 has none that count: its place in
// `waiting` is repaired − 1.
struct Candidates {
    std::int64_t rows;
    int room, share;
    std::int32_t* latents;   // [rows, room]; -1 for none
    float* scores;           // [rows, room]; the screen's (NaN where it has none), after rescoring the exact ones
    std::int32_t* count;     // [rows]; more than `room` where the row is repaired
    std::int32_t* repaired;  // [rows]
    std::int32_t* waiting;   // [1 + rows]: how many rows are to be repaired, and which; the first is to be 0 before
};

struct Keys {
    const float* keys;
    int n_buckets;  // of a row, all its owners together
    int n_members, keep, member_bits;
};

// What the exact scores can be away from the screen's: slack[token] + relative / 4 · |score|.
struct Slack {
    const float* slack;
    float relative;
};

// A candidate in the order of latents.
struct alignas(8) Pair {
    std::int32_t place;  // row · room + its place there
    std::int32_t latent;
};

struct Cast {
    ElementType type;
    void* rows;       // [padded, d]; zeros beyond n
    float* scale;     // [padded], or nullptr
    float* norm;      // [padded]
    float* error;     // [padded]
    float limit;      // what the largest element of a scaled row becomes
    std::int64_t padded;
};

void cast_rows(ElementType type, const Rows& rows, std::int64_t n, int d, const Cast& out, Stream stream);

struct Panel {
    ElementType type;
    Rows scores;                // [rows, members · n_buckets]
    const float* x_scale;       // [rows], or nullptr
    const float* weight_scale;  // [n], or nullptr
    const void* bias;           // [n], or nullptr
    ElementType bias_type;      // float32, or that of the scores
    std::int64_t rows, n;
    int first_member, members;
    bool absolute;
};

// Merges the scores of some members of all buckets into the keys; those of member 0 begin them.
void bucket_panel(const Panel& panel, const Keys& keys, float* out, Stream stream);

void select_candidates(const Keys& keys, const Slack& slack, int k, const Owners& owners, const Candidates& candidates,
                       Stream stream);

// With `check` an error of the screen above half the slack has the row repaired.
void rescore(const Operands& operands, const Candidates& candidates, const float* check, Stream stream);

// The same, by latent, in two calls. The first adds the candidates of each latent up in `starts` [n + 1], which is to be
// 0 before; the second wants their running sums there. `pairs` and `sums` have room for rows · room.
void count_by_latent(const Candidates& candidates, std::int32_t* starts, Stream stream);
void rescore_by_latent(const Operands& operands, const Candidates& candidates, const float* check, std::int32_t* starts,
                       std::int64_t n, Pair* pairs, float* sums, Stream stream);

// The `k` best of parts of each waiting row's latents, `slots` parts in all or one a row, go to `spare` [slots, k].
void repair(const Operands& operands, const Owners& owners, const Candidates& candidates, int k, std::uint64_t* spare,
            std::int64_t slots, Stream stream);

void take_best(ElementType type, const Candidates& candidates, int k, bool absolute, const std::uint64_t* spare,
               std::int64_t slots, void* values, std::int32_t* indices, Stream stream);

}  // namespace sparsekern::cuda
