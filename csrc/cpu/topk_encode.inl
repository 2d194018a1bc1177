// The kernels behind topk_encode.h. The including file sets the compiler's target and SPARSEKERN_LEVEL: 0 generic,
// 1 AVX2 and FMA, 2 AVX-512 with VNNI.

namespace sparsekern {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The int8 product of a few rows with a panel, for each instruction set.

#if SPARSEKERN_LEVEL == 2
constexpr int kTileRows = 6;  // 6 rows x 4 groups: 24 of the 32 registers accumulate
#else
constexpr int kTileRows = 4;
#endif

// Whether tile_product multiplies `packed` as it is, with the 128 that it is too large by.
constexpr bool kOffset = SPARSEKERN_LEVEL != 1;

// out[r][l] = sum over c of packed[l][c] * xq[r][c] - offset[r], for kTileRows rows and the kPanel latents of one panel;
// with packed[l][c] - 128 in place of packed[l][c] unless kOffset. Never inlined: among the variables of a caller the
// compiler keeps the accumulators in memory, at half the speed.
#if SPARSEKERN_LEVEL == 2

[[gnu::noinline]] void tile_product(const std::uint8_t* packed, const std::int8_t* xq, std::int64_t x_stride, std::int64_t quads,
                         const std::int32_t* offset, std::int32_t (*out)[kPanel]) {
    __m512i acc[kTileRows][4];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) acc[r][g] = _mm512_set1_epi32(-offset[r]);
    for (std::int64_t q = 0; q < quads; ++q) {
        __m512i w[4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) w[g] = _mm512_loadu_si512(packed + (q * 4 + g) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
            std::int32_t four;
            std::memcpy(&four, xq + r * x_stride + 4 * q, 4);
            const __m512i x = _mm512_set1_epi32(four);
            // In assembly because GCC 12 copies and spills every accumulator around the intrinsic: half the speed.
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g) asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][g]) : "v"(w[g]), "v"(x));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) _mm512_storeu_si512(out[r] + g * kGroup, acc[r][g]);
}

#elif SPARSEKERN_LEVEL == 1

[[gnu::noinline]] void tile_product(const std::uint8_t* packed, const std::int8_t* xq, std::int64_t x_stride, std::int64_t quads,
                         const std::int32_t* offset, std::int32_t (*out)[kPanel]) {
    // `vpmaddubsw` adds two products of an unsigned and a signed byte in 16 bits. |w| times x with w's sign fits, as
    // 2 * 127 * 127; the unsigned packed bytes times x would not.
    const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8(-128);
    for (int g = 0; g < 4; ++g) {
        __m256i acc[kTileRows][2];
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = _mm256_set1_epi32(-offset[r]);
        for (std::int64_t q = 0; q < quads; ++q) {
            const __m256i* at = reinterpret_cast<const __m256i*>(packed + (q * 4 + g) * 64);
            const __m256i w0 = _mm256_xor_si256(_mm256_loadu_si256(at), middle);
            const __m256i w1 = _mm256_xor_si256(_mm256_loadu_si256(at + 1), middle);
            const __m256i size0 = _mm256_abs_epi8(w0), size1 = _mm256_abs_epi8(w1);
#pragma GCC unroll 8
            for (int r = 0; r < kTileRows; ++r) {
                std::int32_t four;
                std::memcpy(&four, xq + r * x_stride + 4 * q, 4);
                const __m256i x = _mm256_set1_epi32(four);
                const __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(size0, _mm256_sign_epi8(x, w0)), ones);
                const __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(size1, _mm256_sign_epi8(x, w1)), ones);
                acc[r][0] = _mm256_add_epi32(acc[r][0], a);
                acc[r][1] = _mm256_add_epi32(acc[r][1], b);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[r] + g * kGroup), acc[r][0]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[r] + g * kGroup + 8), acc[r][1]);
        }
    }
}

#else

[[gnu::noinline]] void tile_product(const std::uint8_t* packed, const std::int8_t* xq, std::int64_t x_stride, std::int64_t quads,
                         const std::int32_t* offset, std::int32_t (*out)[kPanel]) {
    for (int r = 0; r < kTileRows; ++r) std::fill_n(out[r], kPanel, -offset[r]);
    for (std::int64_t q = 0; q < quads; ++q)
        for (int r = 0; r < kTileRows; ++r) {
            const std::int8_t* x = xq + r * x_stride + 4 * q;
            const std::uint8_t* w = packed + q * 4 * 64;
            for (std::int64_t l = 0; l < kPanel; ++l)
                out[r][l] += w[4 * l] * x[0] + w[4 * l + 1] * x[1] + w[4 * l + 2] * x[2] + w[4 * l + 3] * x[3];
        }
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Quantisation

// What float32 rounding can do to a score rescored by dot(), relative to |W| |x|: each of its at least 32 partial sums
// takes d / 32 additions, and adding them up fewer than 80 more.
inline float rounding(std::int64_t d) { return (static_cast<float>(d) / 32 + 80) * 6e-8f; }

// Below this a scale has no reciprocal in float32; above the inverse, squares overflow.
constexpr float kSmallest = 1e-30f;
constexpr float kLargest = 1e15f;

// Workspace: candidates of the rows at hand, and quantised weights where the caller has none.
constexpr std::int64_t kCandidateBytes = std::int64_t{128} << 20;
constexpr std::int64_t kPackedBytes = std::int64_t{8} << 20;

// The floor is first raised after this many latents, and then each time that as many again have been screened.
constexpr std::int64_t kFirstTidy = 256;

// max |w[c]|; infinite when an entry is infinite or no number.
float largest_size(const float* w, std::int64_t d) {
    float largest = 0;
    int wrong = 0;
#pragma omp simd reduction(max : largest) reduction(| : wrong)
    for (std::int64_t c = 0; c < d; ++c) {
        const float size = std::fabs(w[c]);
        largest = size > largest ? size : largest;
        wrong |= !(size <= std::numeric_limits<float>::max());
    }
    return wrong ? std::numeric_limits<float>::infinity() : largest;
}

// At least |w|; infinite for a row that is not finite.
float length(const float* w, std::int64_t d) {
    const float largest = largest_size(w, d);
    if (!(largest < kLargest)) return std::numeric_limits<float>::infinity();
    if (largest < 1e-15f) return largest * std::sqrt(static_cast<float>(d)) * 1.001f;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t c = 0; c < d; ++c) squares += w[c] * w[c];
    return std::sqrt(squares) * (1 + 1e-6f + 6e-8f * static_cast<float>(d));
}

// Writes the bytes of one row (rounded to 127ths of its largest entry, plus 128) and its scale, error and norm.
//
// Lengths are taken in units of the scale, where squares neither overflow nor underflow, and rounded up by more than
// their own rounding errors: a sum of d non-negative terms is off by at most d units in the last place. Never inlined,
// so that every caller gets the same bits: a compiler may add up in another order in another place.
[[gnu::noinline]] void quantize_row(const float* w, std::int64_t d, std::uint8_t* bytes, const Quantized& out, std::int64_t i) {
    out.scale[i] = out.error[i] = out.norm[i] = 0;
    std::memset(bytes, 128, padded_width(d));
    const float largest = largest_size(w, d);
    if (!(largest < kLargest)) {
        out.norm[i] = std::numeric_limits<float>::infinity();
        return;
    }
    const float root = std::sqrt(static_cast<float>(d));
    if (largest < kSmallest) {
        out.error[i] = out.norm[i] = largest * root * 1.001f;
        return;
    }
    const float scale = largest / 127, inverse = 127 / largest;
    float squares = 0, errors = 0;
#pragma omp simd reduction(+ : squares, errors)
    for (std::int64_t c = 0; c < d; ++c) {
        const float value = w[c] * inverse;
        const int whole = static_cast<int>(value + std::copysign(0.5f, value));
        const float rest = value - static_cast<float>(whole);
        bytes[c] = static_cast<std::uint8_t>(whole + 128);
        squares += value * value;
        errors += rest * rest;
    }
    const float up = 1 + 1e-6f + 6e-8f * static_cast<float>(d);
    out.scale[i] = scale;
    out.error[i] = scale * (std::sqrt(errors) + 4e-5f * root) * up;
    out.norm[i] = scale * std::sqrt(squares) * up + out.error[i];
}

// Moves the bytes of kGroup rows, [kGroup][width], to their place in the panels.
void pack_group(const std::uint8_t* rows, std::int64_t width, std::uint8_t* packed, std::int64_t first) {
    const std::int64_t quads = width / 4;
    std::uint8_t* to = packed + first / kPanel * kPanel * width + first % kPanel / kGroup * 64;
    for (std::int64_t q = 0; q < quads; ++q, to += 4 * 64)
        for (std::int64_t l = 0; l < kGroup; ++l) std::memcpy(to + 4 * l, rows + l * width + 4 * q, 4);
}

// `out.packed` begins at latent `origin`.
void quantize_from(std::int64_t origin, const Weights& weights, const Quantized& out, std::int64_t first,
                   std::int64_t last) {
    const std::int64_t width = padded_width(weights.d);
    std::vector<std::uint8_t> rows(kGroup * width);
    for (std::int64_t group = first; group < last; group += kGroup) {
        for (std::int64_t i = group; i < group + kGroup; ++i) {
            std::uint8_t* bytes = rows.data() + (i - group) * width;
            if (i < weights.n) {
                quantize_row(weights.data + i * weights.stride, weights.d, bytes, out, i);
            } else {
                out.scale[i] = out.error[i] = out.norm[i] = 0;
                std::memset(bytes, 128, width);
            }
        }
        pack_group(rows.data(), width, out.packed, group - origin);
    }
}

void quantize(const Weights& weights, const Quantized& out, std::int64_t first, std::int64_t last) {
    quantize_from(0, weights, out, first, last);
}

// ---------------------------------------------------------------------------------------------------------------------
// Screening

constexpr int kMaxOutliers = 16;

// Dimensions whose largest input is this many times that of the median dimension are multiplied in float32.
constexpr float kOutlierRatio = 6;

// One row of the batch, or one slot of it, while its latents are screened.
struct Row {
    float floor;          // no latent scoring below this is among the k largest
    float scale;          // of the quantised input
    float length;         // |x| without the outlier dimensions: multiplies Quantized::error
    float missing;        // |x - x^| and rounding: multiplies Quantized::norm
    float rounding;       // what rounding a rescored score can suffer, per unit of Quantized::norm
    std::int32_t offset;  // 128 * sum of the quantised input, which the product with `packed` has too much
    std::int32_t count;   // candidates
    std::int32_t scored, queued;  // of them, see Rescoring
    bool certain;
    float* upper;         // [capacity] upper bounds of the candidates' scores
    std::int32_t* index;  // [capacity]
    float outlier[kMaxOutliers];
};

struct Screen {
    const EncodeArgs& args;
    Quantized quantized;    // `packed` begins at latent `origin`
    std::int64_t origin;
    std::int64_t capacity;  // of a slot's candidates
    float slack;            // what rounding can do to a score beside its products: that of adding the bias
    int outliers;
    std::int64_t outlier_column[kMaxOutliers];

    // The most by which the approximate score of latent i can miss the true one.
    float margin(const Row& row, std::int64_t i) const {
        return quantized.error[i] * row.length + quantized.norm[i] * row.missing + slack;
    }
};

// What a thread needs to know of the panel at hand.
struct Panel {
    std::int64_t first;
    float worst_error, worst_norm;
    alignas(64) float scale[kPanel];
    alignas(64) float base[kPanel];  // bias; lowest for latents that are not wanted
    alignas(64) float outlier[kMaxOutliers][kPanel];

    // Of the latents from `at` on those in [low, high) are wanted.
    void enter(const Screen& screen, std::int64_t at, std::int64_t low, std::int64_t high) {
        const Weights& w = screen.args.weights;
        first = at;
        worst_error = worst_norm = 0;
        for (std::int64_t l = 0; l < kPanel; ++l) {
            const bool real = low <= at + l && at + l < high;
            base[l] = !real ? -std::numeric_limits<float>::infinity() : screen.args.bias ? screen.args.bias[at + l] : 0;
            scale[l] = screen.quantized.scale[at + l];
            worst_error = std::max(worst_error, screen.quantized.error[at + l]);
            worst_norm = std::max(worst_norm, screen.quantized.norm[at + l]);
            for (int o = 0; o < screen.outliers; ++o)
                outlier[o][l] = real ? w.data[(at + l) * w.stride + screen.outlier_column[o]] : 0;
        }
    }
};

// A value that at least k of the n values reach, close to the largest such; n >= k.
float reached_by(std::int64_t k, const float* values, std::int64_t n) {
    float low = values[0], high = values[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (std::int64_t i = 0; i < n; ++i) {
        low = values[i] < low ? values[i] : low;
        high = values[i] > high ? values[i] : high;
    }
    for (int step = 0; step < 14; ++step) {
        const float middle = low + (high - low) / 2;
        std::int32_t reach = 0;
#pragma omp simd reduction(+ : reach)
        for (std::int64_t i = 0; i < n; ++i) reach += values[i] >= middle;
        if (reach >= k) low = middle; else high = middle;
        if (reach == k) break;
    }
    return low;
}

// The candidates' upper bounds less so many times their margins.
inline void lower_bounds(const Screen& screen, const Row& row, float times, float* __restrict out) {
    const float* error = screen.quantized.error;
    const float* norm = screen.quantized.norm;
    const float length = row.length, missing = row.missing, slack = screen.slack;
    const std::int32_t count = row.count;
#pragma omp simd
    for (std::int32_t c = 0; c < count; ++c) {
        const std::int32_t i = row.index[c];
        out[c] = row.upper[c] - times * (error[i] * length + norm[i] * missing + slack);
    }
}

// Raises the row's floor to what k candidates certainly reach, and drops the candidates that certainly stay below it.
void prune(const Screen& screen, Row& row, float* scratch) {
    if (row.count < screen.args.k) return;
    lower_bounds(screen, row, 2, scratch);
    row.floor = std::max(row.floor, reached_by(screen.args.k, scratch, row.count));
    std::int32_t kept = 0;
    for (std::int32_t c = 0; c < row.count; ++c) {
        const float upper = row.upper[c];
        row.upper[kept] = upper;
        row.index[kept] = row.index[c];
        kept += upper >= row.floor;
    }
    row.count = kept;
}

void give_up(Row& row) {
    row.certain = false;
    row.count = row.scored = row.queued = 0;
    row.floor = std::numeric_limits<float>::max();
}

// Adds to the row's candidates those of the panel's latents whose score may reach its floor.
#if SPARSEKERN_LEVEL == 2

inline void collect(const Screen& screen, const Panel& panel, Row& row, const std::int32_t* product) {
    const __m512 cut = _mm512_set1_ps(row.floor - (panel.worst_error * row.length + panel.worst_norm * row.missing +
                                                   screen.slack));
    const __m512 x_scale = _mm512_set1_ps(row.scale);
    __m512 score[4];
    __mmask16 hit[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
        const __m512 scale = _mm512_mul_ps(_mm512_load_ps(panel.scale + g * kGroup), x_scale);
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(product + g * kGroup));
        score[g] = _mm512_fmadd_ps(whole, scale, _mm512_load_ps(panel.base + g * kGroup));
    }
    for (int o = 0; o < screen.outliers; ++o) {
        const __m512 x = _mm512_set1_ps(row.outlier[o]);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g)
            score[g] = _mm512_fmadd_ps(x, _mm512_load_ps(panel.outlier[o] + g * kGroup), score[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) hit[g] = _mm512_cmp_ps_mask(score[g], cut, _CMP_GE_OQ);
    if (!(hit[0] | hit[1] | hit[2] | hit[3])) return;
    const __m512 floor = _mm512_set1_ps(row.floor), length = _mm512_set1_ps(row.length);
    const __m512 missing = _mm512_set1_ps(row.missing), slack = _mm512_set1_ps(screen.slack);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    std::int32_t count = row.count;
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
        if (!hit[g]) continue;
        const std::int64_t first = panel.first + g * kGroup;
        __m512 upper =
            _mm512_fmadd_ps(_mm512_loadu_ps(screen.quantized.norm + first), missing, _mm512_add_ps(score[g], slack));
        upper = _mm512_fmadd_ps(_mm512_loadu_ps(screen.quantized.error + first), length, upper);
        const __mmask16 keep = _mm512_mask_cmp_ps_mask(hit[g], upper, floor, _CMP_GE_OQ);
        const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lane);
        // Compressed in a register and stored whole: compressing stores are microcode on some machines.
        _mm512_storeu_ps(row.upper + count, _mm512_maskz_compress_ps(keep, upper));
        _mm512_storeu_si512(row.index + count, _mm512_maskz_compress_epi32(keep, index));
        count += __builtin_popcount(keep);
    }
    row.count = count;
}

#else

inline void collect(const Screen& screen, const Panel& panel, Row& row, const std::int32_t* product) {
    const float cut =
        row.floor - (panel.worst_error * row.length + panel.worst_norm * row.missing + screen.slack);
    const float x_scale = row.scale;
    for (std::int64_t at = 0; at < kPanel; at += kGroup) {
        alignas(64) float score[kGroup];
        for (std::int64_t l = 0; l < kGroup; ++l)
            score[l] = static_cast<float>(product[at + l]) * (panel.scale[at + l] * x_scale) + panel.base[at + l];
        for (int o = 0; o < screen.outliers; ++o)
            for (std::int64_t l = 0; l < kGroup; ++l) score[l] += row.outlier[o] * panel.outlier[o][at + l];
        std::int32_t any = 0;
        for (std::int64_t l = 0; l < kGroup; ++l) any |= score[l] >= cut;
        if (!any) continue;
        for (std::int64_t l = 0; l < kGroup; ++l) {
            const std::int64_t i = panel.first + at + l;
            const float upper = score[l] + screen.margin(row, i);
            row.upper[row.count] = upper;
            row.index[row.count] = static_cast<std::int32_t>(i);
            row.count += (score[l] >= cut) & (upper >= row.floor);
        }
    }
}

#endif

// Rows [begin, end), multiples of kTileRows, that meet the latents [low, high).
struct Meeting {
    std::int64_t begin, end;
    std::int64_t low, high;
};

// Screens the rows against those of their latents that are in the block [first, last).
void screen_rows(const Screen& screen, Row* rows, const std::int8_t* xq, const Meeting& of, std::int64_t first,
                 std::int64_t last, float* scratch) {
    const std::int64_t width = padded_width(screen.args.weights.d);
    const std::int64_t low = std::max(first, of.low), high = std::min(last, of.high);
    Panel panel;
    alignas(64) std::int32_t product[kTileRows][kPanel];
    std::int64_t at = low / kPanel * kPanel, tidy_at = of.low + kFirstTidy;
    while (tidy_at < at) tidy_at += tidy_at - of.low;
    for (; at < high; at += kPanel) {
        panel.enter(screen, at, low, high);
        const std::uint8_t* packed = screen.quantized.packed + (at - screen.origin) * width;
        const bool tidy = at >= tidy_at;
        if (tidy) tidy_at += tidy_at - of.low;
        for (std::int64_t b = of.begin; b < of.end; b += kTileRows) {
            std::int32_t offset[kTileRows];
            for (int r = 0; r < kTileRows; ++r) offset[r] = rows[b + r].offset;
            tile_product(packed, xq + b * width, width, width / 4, offset, product);
            for (int r = 0; r < kTileRows; ++r) {
                Row& row = rows[b + r];
                if (tidy) prune(screen, row, scratch);
                collect(screen, panel, row, product[r]);
                if (row.count > screen.capacity - 2 * kPanel) {
                    prune(screen, row, scratch);
                    if (row.count > screen.capacity - 2 * kPanel) give_up(row);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rescoring

// <a, b>; the other two are what the caller reads next.
#if SPARSEKERN_LEVEL == 2

inline float dot(const float* a, const float* b, std::int64_t d, const float* next_a, const float* next_b) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    std::int64_t c = 0;
    for (; c + 64 <= d; c += 64) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
            _mm_prefetch(reinterpret_cast<const char*>(next_a + c + 16 * u), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(next_b + c + 16 * u), _MM_HINT_T0);
            sum[u] = _mm512_fmadd_ps(_mm512_loadu_ps(a + c + 16 * u), _mm512_loadu_ps(b + c + 16 * u), sum[u]);
        }
    }
    for (; c < d; c += 16) {
        const __mmask16 tail = d - c >= 16 ? 0xffff : static_cast<__mmask16>((1 << (d - c)) - 1);
        sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(tail, a + c), _mm512_maskz_loadu_ps(tail, b + c), sum[0]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

#else

inline float dot(const float* a, const float* b, std::int64_t d, const float* next_a, const float* next_b) {
    constexpr std::int64_t kLanes = 32;
    float lanes[kLanes] = {};
    std::int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) {
        for (std::int64_t l = 0; l < kLanes; l += 16) {
            __builtin_prefetch(next_a + c + l);
            __builtin_prefetch(next_b + c + l);
        }
        for (std::int64_t l = 0; l < kLanes; ++l) lanes[l] += a[c + l] * b[c + l];
    }
    float sum = 0;
    for (; c < d; ++c) sum += a[c] * b[c];
    for (std::int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
    return sum;
}

#endif

inline float dot(const float* a, const float* b, std::int64_t d) { return dot(a, b, d, a, b); }

double exact_dot(const float* a, const float* b, std::int64_t d) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < d; ++c) sum += static_cast<double>(a[c]) * b[c];
    return sum;
}

// A score with its latent, as one number: larger for larger scores, and for the lower of tied latents.
struct Scored {
    std::uint64_t key = 0;

    Scored() = default;
    Scored(float score, std::int32_t index) {
        score += 0.0f;  // of two zeros the positive one
        std::uint32_t bits;
        std::memcpy(&bits, &score, 4);
        bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
        key = std::uint64_t{bits} << 32 | (0xffffffffu - static_cast<std::uint32_t>(index));
    }
    float score() const {
        std::uint32_t bits = static_cast<std::uint32_t>(key >> 32);
        bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
        float score;
        std::memcpy(&score, &bits, 4);
        return score;
    }
    std::int32_t index() const { return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(key)); }
};

// An object, because sorting algorithms would call a function through a pointer.
constexpr auto before = [](const Scored& a, const Scored& b) { return a.key > b.key; };

// Sorts the first k. Few are put at their ranks, which are counted without a branch to guess.
inline void sort_first(std::int64_t k, std::vector<Scored>& scored) {
    constexpr std::int64_t kFew = 64;
    if (k > kFew) return std::sort(scored.begin(), scored.begin() + k, before);
    std::uint64_t key[kFew], sorted[kFew];
    for (std::int64_t j = 0; j < k; ++j) key[j] = scored[j].key;
    for (std::int64_t j = 0; j < k; ++j) {
        std::int64_t rank = 0;
#pragma omp simd reduction(+ : rank)
        for (std::int64_t i = 0; i < k; ++i) rank += key[i] > key[j];
        sorted[rank] = key[j];
    }
    for (std::int64_t j = 0; j < k; ++j) scored[j].key = sorted[j];
}

// Some rows (or slots), all of whose latents are in [low, high), and their candidates from the end of screening to the
// selection. A row's candidates are its first Row::scored, of which `upper` now holds the exact score, then the others.
struct Rescoring {
    const Screen& screen;
    Row* rows;
    const float* const* inputs;
    const std::int32_t* places;  // of the results, from `top` on; -1 where there is none
    std::int64_t top;
    std::int64_t count;
    std::int64_t capacity;  // of a row's candidates
    std::int64_t low, high;
    int threads;

    struct Pair {
        std::int32_t row, candidate;
    };
    std::vector<Pair> pairs = {};
    std::vector<std::int32_t> start = {};

    const float* weight(std::int64_t i) const { return screen.args.weights.data + i * screen.args.weights.stride; }
    float bias(std::int64_t i) const { return screen.args.bias ? screen.args.bias[i] : 0; }

    template <class Body>
    void each_row(const Body& body) const {
        parallel_for(count, threads, threads > 1 ? kPartsPerThread * threads : 1,
                     [&](std::int64_t begin, std::int64_t end) {
                         std::vector<float> scratch(capacity);
                         std::vector<Scored> scored;
                         for (std::int64_t b = begin; b < end; ++b)
                             if (rows[b].certain) body(b, rows[b], scratch.data(), scored);
                     });
    }

    // Queues, which score() scores next, come behind the scored. First the k that look best: what they reach will spare
    // most of the others.
    void queue_best() const {
        const std::int64_t k = screen.args.k;
        each_row([&](std::int64_t, Row& row, float* scratch, std::vector<Scored>&) {
            prune(screen, row, scratch);
            row.scored = row.queued = 0;
            if (row.count < k) return give_up(row);
            lower_bounds(screen, row, 1, scratch);
            const float good = reached_by(k, scratch, row.count);
            std::int32_t queued = 0;
            for (std::int32_t c = 0; c < row.count; ++c) {  // swapped in any case: no branch to guess
                std::swap(row.upper[queued], row.upper[c]);
                std::swap(row.index[queued], row.index[c]);
                queued += scratch[c] >= good;
            }
            row.queued = queued;
        });
    }

    // All that could still be among the k largest.
    void queue_rest() const {
        each_row([&](std::int64_t, Row& row, float* scratch, std::vector<Scored>&) {
            std::copy(row.upper, row.upper + row.scored, scratch);
            std::nth_element(scratch, scratch + (screen.args.k - 1), scratch + row.scored, std::greater<float>());
            row.floor = std::max(row.floor, scratch[screen.args.k - 1]);
            for (std::int32_t c = row.scored; c < row.count; ++c) {
                const float upper = row.upper[c];
                const std::int32_t index = row.index[c];
                row.upper[row.queued] = upper;
                row.index[row.queued] = index;
                row.queued += upper >= row.floor;
            }
            row.count = row.queued;
        });
    }

    // Scores what is queued, latent by latent: each row of the weights is read once, in order, where the rows of
    // the batch would read it from all over the memory, many times. Returns how many were scored.
    std::int64_t score() {
        const std::int64_t n = high - low, d = screen.args.weights.d;
        start.assign(n + 1, 0);
        for (std::int64_t b = 0; b < count; ++b)
            for (std::int32_t c = rows[b].scored; c < rows[b].queued; ++c) ++start[rows[b].index[c] - low + 1];
        for (std::int64_t i = 0; i < n; ++i) start[i + 1] += start[i];
        const std::int64_t total = start[n];
        pairs.resize(total);
        for (std::int64_t b = 0; b < count; ++b)
            for (std::int32_t c = rows[b].scored; c < rows[b].queued; ++c)
                pairs[start[rows[b].index[c] - low]++] = {static_cast<std::int32_t>(b), c};
        parallel_for(total, threads, threads > 1 ? kPartsPerThread * threads : 1,
                     [&](std::int64_t begin, std::int64_t end) {
                         for (std::int64_t p = begin; p < end; ++p) {
                             Row& row = rows[pairs[p].row];
                             const std::int32_t i = row.index[pairs[p].candidate];
                             const Pair& next = pairs[std::min(p + 1, total - 1)];
                             const float* next_weight = weight(rows[next.row].index[next.candidate]);
                             const float score = dot(weight(i), inputs[pairs[p].row], d, next_weight, inputs[next.row]);
                             row.upper[pairs[p].candidate] = score + bias(i);
                         }
                     });
        for (std::int64_t b = 0; b < count; ++b) rows[b].scored = rows[b].queued;
        return total;
    }

    // Writes the k largest of the scored.
    void select() const {
        const std::int64_t k = screen.args.k;
        each_row([&](std::int64_t b, Row& row, float*, std::vector<Scored>& scored) {
            const float reach = resolution(row);
            const float least = reached_by(k, row.upper, row.scored) - reach;  // leaves few beside the k
            scored.resize(row.scored);
            std::int64_t kept = 0;
            for (std::int32_t c = 0; c < row.scored; ++c) {
                scored[kept] = Scored(row.upper[c], row.index[c]);
                kept += row.upper[c] >= least;
            }
            scored.resize(kept);
            if (kept > k) {
                std::nth_element(scored.begin(), scored.begin() + (k - 1), scored.end(), before);
                settle_near_ties(inputs[b], reach, scored);
            }
            sort_first(k, scored);
            const std::int64_t first = (top + places[b]) * k;
            for (std::int64_t j = 0; j < k; ++j) {
                screen.args.values[first + j] = std::max(scored[j].score(), 0.0f);
                screen.args.index[first + j] = scored[j].index();
            }
        });
    }

    // From the candidates to the results; returns how many were scored.
    std::int64_t run() {
        const float finite = std::numeric_limits<float>::max();
        const float* norm = screen.quantized.norm;
        if (!std::all_of(norm + low, norm + high, [=](float length) { return length <= finite; }))
            for (std::int64_t b = 0; b < count; ++b) give_up(rows[b]);
        std::int64_t total = 0;
        if (!screen.args.experts || screen.args.experts->screened) {
            queue_best();
            total += score();
            queue_rest();
            total += score();
        }
        select();
        for (std::int64_t b = 0; b < count; ++b)
            if (places[b] >= 0) screen.args.certain[top + places[b]] = rows[b].certain;
        return total;
    }

    // The largest difference of two of the row's scores that float32 rounding can turn around: both may be off.
    float resolution(const Row& row) const {
        const float* norms = screen.quantized.norm;
        float norm = 0;
#pragma omp simd reduction(max : norm)
        for (std::int32_t c = 0; c < row.scored; ++c) norm = norms[row.index[c]] > norm ? norms[row.index[c]] : norm;
        return 2 * (norm * row.rounding + screen.slack);
    }

    // Scores that float32 rounding could have moved across the k-th are ordered by their float64 values instead, so
    // that the selected set is that of exact arithmetic. After this the first k of `scored` are the selected.
    void settle_near_ties(const float* x, float reach, std::vector<Scored>& scored) const {
        const float kth = scored[screen.args.k - 1].score();
        const auto near = [&](const Scored& s) { return std::fabs(s.score() - kth) <= reach; };
        const auto above = [&](const Scored& s) { return s.score() > kth && !near(s); };
        const auto ties = std::partition(scored.begin(), scored.end(), above);
        const auto rest = std::partition(ties, scored.end(), near);
        const std::int64_t open = screen.args.k - (ties - scored.begin());
        if (rest - ties <= open) return;
        std::vector<std::pair<double, Scored>> exact;
        for (auto s = ties; s != rest; ++s)
            exact.push_back({exact_dot(weight(s->index()), x, screen.args.weights.d) + bias(s->index()), *s});
        std::sort(exact.begin(), exact.end(), [](const auto& a, const auto& b) {
            return a.first > b.first || (a.first == b.first && a.second.index() < b.second.index());
        });
        std::transform(exact.begin(), exact.end(), ties, [](const auto& e) { return e.second; });
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The whole

// Quantises one input and sets up its row; `xq` has padded_width(d) bytes, `plain` room for the input.
void enter_row(const Screen& screen, const float* x, float* __restrict plain, std::int8_t* __restrict xq, Row& row) {
    const std::int64_t d = screen.args.weights.d;
    std::memset(xq, 0, padded_width(d));
    row.floor = std::numeric_limits<float>::lowest();
    row.scale = row.length = row.missing = row.rounding = 0;
    row.offset = row.count = row.scored = row.queued = 0;
    row.certain = true;
    if (!(largest_size(x, d) < kLargest)) return give_up(row);
    std::memcpy(plain, x, d * sizeof(float));
    float apart = 0;
    for (int o = 0; o < screen.outliers; ++o) {
        row.outlier[o] = x[screen.outlier_column[o]];
        apart += std::fabs(row.outlier[o]);
        plain[screen.outlier_column[o]] = 0;
    }
    const float largest = largest_size(plain, d);
    if (largest > 0 && largest < kSmallest) return give_up(row);
    const float root = std::sqrt(static_cast<float>(d));
    const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    float squares = 0, errors = 0;
    std::int32_t sum = 0;
#pragma omp simd reduction(+ : squares, errors, sum)
    for (std::int64_t c = 0; c < d; ++c) {
        const float value = plain[c] * inverse;
        const int whole = static_cast<int>(value + std::copysign(0.5f, value));
        const float rest = value - static_cast<float>(whole);
        xq[c] = static_cast<std::int8_t>(whole);
        squares += value * value;
        errors += rest * rest;
        sum += whole;
    }
    const float up = 1 + 1e-6f + 6e-8f * static_cast<float>(d);
    row.scale = scale;
    row.offset = kOffset ? 128 * sum : 0;
    row.length = scale * std::sqrt(squares) * up;
    row.rounding = rounding(d) * (row.length + apart);
    // Rounding counts three times: in the approximate score, in the rescored one, and in the one that it is compared with.
    row.missing = scale * (std::sqrt(errors) + 4e-5f * root) * up + 3 * row.rounding;
}

// Input dimensions that dwarf the others, by the largest entry of each in this batch.
void find_outliers(Screen& screen, std::int64_t first, std::int64_t rows) {
    const std::int64_t d = screen.args.weights.d;
    std::vector<float> largest(d, 0);
    for (std::int64_t b = first; b < first + rows; ++b) {
        const float* x = screen.args.x + b * screen.args.x_stride;
        for (std::int64_t c = 0; c < d; ++c) largest[c] = std::max(largest[c], std::fabs(x[c]));
    }
    std::vector<float> sorted = largest;
    std::nth_element(sorted.begin(), sorted.begin() + d / 2, sorted.end());
    const float limit = kOutlierRatio * sorted[d / 2];
    screen.outliers = 0;
    if (limit == 0) return;  // most dimensions are unused; there is no scale to compare with
    std::vector<std::pair<float, std::int64_t>> found;
    for (std::int64_t c = 0; c < d; ++c)
        if (largest[c] > limit) found.push_back({-largest[c], c});
    std::sort(found.begin(), found.end());
    for (const auto& [size, column] : found)
        if (screen.outliers < kMaxOutliers) screen.outlier_column[screen.outliers++] = column;
    std::sort(screen.outlier_column, screen.outlier_column + screen.outliers);
}

// In place of screening: scores the rows' latents in float32, as candidates that need no rescoring.
void score_rows(const Screen& screen, Row* rows, const float* const* x, const Meeting& of, bool first) {
    const Weights& w = screen.args.weights;
    for (std::int64_t i = of.low; i < of.high; ++i) {
        const float* weight = w.data + i * w.stride;
        if (first) screen.quantized.norm[i] = length(weight, w.d);
        for (std::int64_t b = of.begin; b < of.end; ++b) {
            Row& row = rows[b];
            row.upper[row.count] = dot(weight, x[b], w.d, weight, x[b + 1 < of.end ? b + 1 : of.begin]) +
                                   (screen.args.bias ? screen.args.bias[i] : 0);
            row.index[row.count++] = static_cast<std::int32_t>(i);
        }
    }
    for (std::int64_t b = of.begin; b < of.end; ++b) rows[b].scored = rows[b].count;
}

// One row from its slots, whose candidates lie one after the other in memory.
Row merge(const Row* slots, std::int64_t active) {
    Row row = slots[0];
    for (std::int64_t j = 1; j < active; ++j) {
        row.certain &= slots[j].certain;
        row.floor = std::max(row.floor, slots[j].floor);
    }
    if (!row.certain) {
        give_up(row);
        return row;
    }
    row.count = 0;
    for (std::int64_t j = 0; j < active; ++j)
        for (std::int32_t c = 0; c < slots[j].count; ++c) {
            if (slots[j].upper[c] < row.floor) continue;
            row.upper[row.count] = slots[j].upper[c];
            row.index[row.count++] = slots[j].index[c];
        }
    row.scored = slots[0].scored ? row.count : 0;
    return row;
}

// The slots of a block in the order in which they are screened: by expert, each expert's filled up to whole tiles.
struct Places {
    std::vector<std::int32_t> slot;  // in the block; -1 fills up
    std::vector<Meeting> meetings;   // in parts of about equal size
};

Places places_of(const Experts* experts, std::int64_t n, std::int64_t first_slot, std::int64_t slots,
                 std::int64_t tile, int threads) {
    Places places;
    const std::int64_t most = std::max(tile, (slots / (kPartsPerThread * threads) + tile - 1) / tile * tile);
    const std::int64_t count = experts ? experts->count : 1;
    for (std::int64_t e = 0; e < count; ++e) {
        const std::int64_t begin = static_cast<std::int64_t>(places.slot.size());
        if (experts) {
            const std::int32_t* from = experts->order + experts->offsets[e];
            const std::int32_t* to = experts->order + experts->offsets[e + 1];
            from = std::lower_bound(from, to, first_slot);
            to = std::lower_bound(from, to, first_slot + slots);
            for (; from < to; ++from) places.slot.push_back(static_cast<std::int32_t>(*from - first_slot));
        } else {
            places.slot.resize(slots);
            std::iota(places.slot.begin(), places.slot.end(), 0);
        }
        while (static_cast<std::int64_t>(places.slot.size()) % tile) places.slot.push_back(-1);
        const std::int64_t end = static_cast<std::int64_t>(places.slot.size());
        const std::int64_t tiles = (end - begin) / tile, parts = (end - begin + most - 1) / most;
        for (std::int64_t part = 0; part < parts; ++part)
            places.meetings.push_back({begin + tiles * part / parts * tile, begin + tiles * (part + 1) / parts * tile,
                                       n / count * e, n / count * (e + 1)});
    }
    return places;
}

std::int64_t encode(const EncodeArgs& args) {
    const std::int64_t n = args.weights.n, d = args.weights.d, width = padded_width(d), latents = padded_latents(n);
    const Experts* experts = args.experts;
    const std::int64_t active = experts ? experts->active : 1, share = n / (experts ? experts->count : 1);
    const bool screened = !experts || experts->screened, merged = active > 1 && !experts->apart;
    const std::int64_t tile = screened ? kTileRows : 1;
    Screen screen{args, {}, 0, 0, 0, 0, {}};
    const std::int64_t met = std::min(latents, padded_latents(share) + kPanel);  // an expert may begin within a panel
    screen.capacity =
        screened ? std::min(met, std::max<std::int64_t>({4096, 32 * args.k, 4 * d})) + 4 * kPanel : share;
    const float largest_bias = args.bias ? largest_size(args.bias, n) : 0;
    screen.slack = 4e-7f * largest_bias + 1e-33f;

    const std::int64_t most_rows = std::max<std::int64_t>(1, kCandidateBytes / (8 * screen.capacity * active));
    const std::int64_t blocks = (args.rows + most_rows - 1) / most_rows;
    const std::int64_t block_rows = (args.rows + blocks - 1) / blocks, block_slots = block_rows * active;
    const std::int64_t most_places =
        block_slots + (tile - 1) * std::min(experts ? experts->count : 1, block_slots);
    const std::int64_t block_latents =
        args.quantized ? latents : std::min(latents, std::max(kPanel, kPackedBytes / width / kPanel * kPanel));
    Workspace workspace;
    const auto rows = workspace.take<Row>(most_places);  // by place; then, where slots are merged, by row
    const auto by_slot = workspace.take<Row>(merged ? block_slots : 0);
    const auto sources = workspace.take<const float*>(most_places);
    const auto xq = workspace.take<std::int8_t>(screened ? most_places * width : 0);
    const auto upper = workspace.take<float>(block_slots * screen.capacity + kPanel);
    const auto index = workspace.take<std::int32_t>(block_slots * screen.capacity + kPanel);
    if (!screened) {
        screen.quantized.norm = workspace.take<float>(latents);
        std::fill_n(screen.quantized.norm, latents, 0.0f);
    } else if (args.quantized) {
        screen.quantized = *args.quantized;
    } else {
        screen.quantized.packed = workspace.take<std::uint8_t>(block_latents * width);
        screen.quantized.scale = workspace.take<float>(latents);
        screen.quantized.error = workspace.take<float>(latents);
        screen.quantized.norm = workspace.take<float>(latents);
    }

    std::atomic<std::int64_t> rescored{0};
    for (std::int64_t top = 0; top < args.rows; top += block_rows) {
        const std::int64_t count = std::min(block_rows, args.rows - top), slots = count * active;
        const Places places = places_of(experts, n, top * active, slots, tile, args.threads);
        const std::int64_t used = static_cast<std::int64_t>(places.slot.size());
        const std::int64_t meetings = static_cast<std::int64_t>(places.meetings.size());
        if (screened) find_outliers(screen, top, count);
        parallel_for(used, args.threads, [&](std::int64_t begin, std::int64_t end) {
            std::vector<std::int8_t> unused(screened ? 0 : width);
            std::vector<float> plain(d);
            std::int64_t slot = 0;
            for (std::int64_t p = begin; p < end; ++p) {
                const bool real = places.slot[p] >= 0;  // others are copies of any row, which collect nothing
                slot = real ? places.slot[p] : slot;
                rows[p].upper = upper + slot * screen.capacity;
                rows[p].index = index + slot * screen.capacity;
                sources[p] = args.x + (top + slot / active) * args.x_stride;
                enter_row(screen, sources[p], plain.data(), screened ? xq + p * width : unused.data(), rows[p]);
                if (!real) give_up(rows[p]);
            }
        });
        if (!(largest_bias < kLargest))
            for (std::int64_t p = 0; p < used; ++p) give_up(rows[p]);
        const bool by_expert = experts && !merged;
        const auto rescore = [&](const Meeting& of) {
            rescored += Rescoring{screen, rows + of.begin, sources + of.begin, places.slot.data() + of.begin,
                                  top * active, of.end - of.begin, screen.capacity, of.low, of.high, 1}.run();
        };
        for (std::int64_t first = 0; first < latents; first += block_latents) {
            const std::int64_t last = std::min(latents, first + block_latents);
            if (screened && !args.quantized) {
                screen.origin = first;
                parallel_for((last - first) / kGroup, args.threads, [&](std::int64_t begin, std::int64_t end) {
                    quantize_from(first, args.weights, screen.quantized, first + begin * kGroup, first + end * kGroup);
                });
            }
            parallel_for(meetings, args.threads, meetings, [&](std::int64_t begin, std::int64_t end) {
                std::vector<float> scratch(screen.capacity);
                for (std::int64_t m = begin; m < end; ++m) {
                    const Meeting& of = places.meetings[m];
                    if (screened)
                        screen_rows(screen, rows, xq, of, first, last, scratch.data());
                    else if (first == 0)
                        score_rows(screen, rows, sources, of, m == 0 || places.meetings[m - 1].low != of.low);
                    // An expert's weights are read again while they are in the cache; and while one thread waits for
                    // memory here, another may be multiplying.
                    if (by_expert && screened && block_latents == latents) rescore(of);
                }
            });
        }
        if (!screened) rescored += slots * share;
        if (merged) {
            for (std::int64_t p = 0; p < used; ++p)
                if (places.slot[p] >= 0) by_slot[places.slot[p]] = rows[p];
            parallel_for(count, args.threads, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t b = begin; b < end; ++b) {
                    rows[b] = merge(by_slot + b * active, active);
                    sources[b] = args.x + (top + b) * args.x_stride;
                }
            });
            std::vector<std::int32_t> itself(count);
            std::iota(itself.begin(), itself.end(), 0);
            rescored += Rescoring{screen, rows, sources, itself.data(), top, count, screen.capacity * active, 0, n,
                                  args.threads}.run();
        } else if (!experts) {
            rescored += Rescoring{screen, rows, sources, places.slot.data(), top, used, screen.capacity, 0, n,
                                  args.threads}.run();
        } else if (!screened || block_latents < latents) {
            parallel_for(meetings, args.threads, meetings, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t m = begin; m < end; ++m) rescore(places.meetings[m]);
            });
        }
    }
    return rescored;
}

}  // namespace

const TopkEncode* SPARSEKERN_JOIN(topk_encode_, SPARSEKERN_ISA)() {
    static const TopkEncode table = {quantize, encode};
    return &table;
}

}  // namespace sparsekern
