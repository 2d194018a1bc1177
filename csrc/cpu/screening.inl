// What the screened encoders share: the int8 product, the quantised copies, the candidates that leave the screen, and
// their scores in float32. The including file sets the compiler's target and SPARSEKERN_LEVEL: 0 generic, 1 AVX2 and FMA,
// 2 AVX-512 with VNNI.

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
    const EncoderInput& input;
    const float* base;      // [n] or nullptr: what is added to each product before it is compared
    Quantized quantized;    // `packed` begins at latent `origin`
    std::int64_t origin;
    std::int64_t capacity;  // of a slot's candidates
    float slack;            // what rounding can do to a score beside its products: that of adding the bias
    std::int64_t k;         // how many are wanted of a row; 0 where a row's floor is not its own
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
    alignas(64) float base[kPanel];  // NaN, which passes no comparison, for latents that are not wanted
    alignas(64) float outlier[kMaxOutliers][kPanel];

    // Of the latents from `at` on those in [low, high) are wanted.
    void enter(const Screen& screen, std::int64_t at, std::int64_t low, std::int64_t high) {
        const Weights& w = screen.input.weights;
        first = at;
        worst_error = worst_norm = 0;
        for (std::int64_t l = 0; l < kPanel; ++l) {
            const bool real = low <= at + l && at + l < high;
            base[l] = !real ? std::numeric_limits<float>::quiet_NaN() : screen.base ? screen.base[at + l] : 0;
            scale[l] = screen.quantized.scale[at + l];
            worst_error = std::max(worst_error, screen.quantized.error[at + l]);
            worst_norm = std::max(worst_norm, screen.quantized.norm[at + l]);
            for (int o = 0; o < screen.outliers; ++o)
                outlier[o][l] = real ? w.row(at + l)[screen.outlier_column[o]] : 0;
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

// Drops the candidates that certainly stay below the row's floor.
inline void drop(Row& row) {
    std::int32_t kept = 0;
    for (std::int32_t c = 0; c < row.count; ++c) {
        const float upper = row.upper[c];
        row.upper[kept] = upper;
        row.index[kept] = row.index[c];
        kept += upper >= row.floor;
    }
    row.count = kept;
}

// Raises the row's floor to what k candidates certainly reach, and drops the candidates that certainly stay below it.
void prune(const Screen& screen, Row& row, float* scratch) {
    if (row.count < screen.k) return;
    lower_bounds(screen, row, 2, scratch);
    row.floor = std::max(row.floor, reached_by(screen.k, scratch, row.count));
    drop(row);
}

constexpr auto is_certain = [](const Row& row) { return row.certain; };

void give_up(Row& row) {
    row.certain = false;
    row.count = row.scored = row.queued = 0;
    row.floor = std::numeric_limits<float>::max();
}

// What is wanted: the k largest of every row, the k of largest size, or all that reach a floor from elsewhere.
enum class Want { largest, largest_sizes, all_above };

// Adds to the row's candidates those of the panel's latents whose score (or its size) may reach its floor.
#if SPARSEKERN_LEVEL == 2

template <Want want>
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
    if constexpr (want == Want::largest_sizes)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) score[g] = _mm512_abs_ps(score[g]);
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

template <Want want>
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
        if constexpr (want == Want::largest_sizes)
            for (std::int64_t l = 0; l < kGroup; ++l) score[l] = std::fabs(score[l]);
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
template <Want want>
void screen_rows(const Screen& screen, Row* rows, const std::int8_t* xq, const Meeting& of, std::int64_t first,
                 std::int64_t last, float* scratch) {
    const std::int64_t width = padded_width(screen.input.weights.d);
    const std::int64_t low = std::max(first, of.low), high = std::min(last, of.high);
    Panel panel;
    alignas(64) std::int32_t product[kTileRows][kPanel];
    std::int64_t at = low / kPanel * kPanel, tidy_at = of.low + kFirstTidy;
    while (tidy_at < at) tidy_at += tidy_at - of.low;
    for (; at < high; at += kPanel) {
        panel.enter(screen, at, low, high);
        const std::uint8_t* packed = screen.quantized.packed + (at - screen.origin) * width;
        const bool tidy = want != Want::all_above && at >= tidy_at;
        if (tidy) tidy_at += tidy_at - of.low;
        for (std::int64_t b = of.begin; b < of.end; b += kTileRows) {
            if (want == Want::all_above && std::none_of(rows + b, rows + b + kTileRows, is_certain)) continue;
            std::int32_t offset[kTileRows];
            for (int r = 0; r < kTileRows; ++r) offset[r] = rows[b + r].offset;
            tile_product(packed, xq + b * width, width, width / 4, offset, product);
            for (int r = 0; r < kTileRows; ++r) {
                Row& row = rows[b + r];
                if (tidy) prune(screen, row, scratch);
                collect<want>(screen, panel, row, product[r]);
                if (row.count > screen.capacity - 2 * kPanel) {
                    if (want != Want::all_above) prune(screen, row, scratch);
                    if (row.count > screen.capacity - 2 * kPanel) give_up(row);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

// Quantises one input and sets up its row; `xq` has padded_width(d) bytes, `plain` room for the input.
void enter_row(const Screen& screen, const float* x, float* __restrict plain, std::int8_t* __restrict xq, Row& row) {
    const std::int64_t d = screen.input.weights.d;
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
    const std::int64_t d = screen.input.weights.d;
    std::vector<float> largest(d, 0);
    for (std::int64_t b = first; b < first + rows; ++b) {
        const float* x = screen.input.row(b);
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

// Latents whose quantised copy exists at one time.
std::int64_t latents_at_a_time(const EncoderInput& input) {
    const std::int64_t latents = padded_latents(input.weights.n);
    if (input.quantized) return latents;
    return std::min(latents, std::max(kPanel, kPackedBytes / padded_width(input.weights.d) / kPanel * kPanel));
}

// The caller's copy, or memory for one.
Quantized take_copy(const EncoderInput& input, Workspace& workspace) {
    if (input.quantized) return *input.quantized;
    const std::int64_t latents = padded_latents(input.weights.n);
    return {workspace.take<std::uint8_t>(latents_at_a_time(input) * padded_width(input.weights.d)),
            workspace.take<float>(latents), workspace.take<float>(latents), workspace.take<float>(latents)};
}

// Sees to it that the copy has the latents [first, last).
void quantize_block(Screen& screen, std::int64_t first, std::int64_t last) {
    const EncoderInput& input = screen.input;
    if (input.quantized) return;
    screen.origin = first;
    parallel_for((last - first) / kGroup, input.threads, [&](std::int64_t begin, std::int64_t end) {
        quantize_from(first, input.weights, screen.quantized, first + begin * kGroup, first + end * kGroup);
    });
}

// Sets up the rows of a block, which begins at row `top`. `xq` is nullptr where nothing is screened.
void enter_rows(const Screen& screen, const Places& places, std::int64_t top, std::int64_t active, Row* rows,
                const float** sources, std::int8_t* xq, float* upper, std::int32_t* index) {
    const std::int64_t d = screen.input.weights.d, width = padded_width(d);
    const std::int64_t used = static_cast<std::int64_t>(places.slot.size());
    parallel_for(used, screen.input.threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::int8_t> unused(xq ? 0 : width);
        std::vector<float> plain(d);
        std::int64_t slot = 0;
        for (std::int64_t p = begin; p < end; ++p) {
            const bool real = places.slot[p] >= 0;  // others are copies of any row, which collect nothing
            slot = real ? places.slot[p] : slot;
            rows[p].upper = upper + slot * screen.capacity;
            rows[p].index = index + slot * screen.capacity;
            sources[p] = screen.input.row(top + slot / active);
            enter_row(screen, sources[p], plain.data(), xq ? xq + p * width : unused.data(), rows[p]);
            if (!real) give_up(rows[p]);
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Rescoring

// A float as a number that orders as it does, and back.
inline std::uint32_t ordered(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

inline float unordered(std::uint32_t key) {
    key ^= key >> 31 ? 0x80000000u : 0xffffffffu;
    float value;
    std::memcpy(&value, &key, 4);
    return value;
}

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

// Some rows (or slots), all of whose latents are in [low, high), and their candidates from the end of screening on. A row's
// candidates are its first Row::scored, of which `upper` now holds the exact score, then the others, of which those before
// Row::queued are to be scored next.
struct Scoring {
    const Screen& screen;
    Row* rows;
    const float* const* inputs;
    std::int64_t count;
    std::int64_t capacity;  // of a row's candidates
    std::int64_t low, high;
    int threads;

    struct Pair {
        std::int32_t row, candidate;
    };
    std::vector<Pair> pairs = {};
    std::vector<std::int32_t> start = {};

    template <class Body>
    void each_range(const Body& body) const {
        parallel_for(count, threads, threads > 1 ? kPartsPerThread * threads : 1, body);
    }

    // The body gets a row that is certain, and room for a number for each of its candidates.
    template <class Body>
    void each_row(const Body& body) const {
        each_range([&](std::int64_t begin, std::int64_t end) {
            std::vector<float> scratch(capacity);
            for (std::int64_t b = begin; b < end; ++b)
                if (rows[b].certain) body(rows[b], scratch.data());
        });
    }

    // Scores what is queued, latent by latent: each row of the weights is read once, in order, where the rows of
    // the batch would read it from all over the memory, many times. Returns how many were scored.
    std::int64_t score() {
        const EncoderInput& input = screen.input;
        const std::int64_t n = high - low, d = input.weights.d;
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
                             const float* next_weight = input.weights.row(rows[next.row].index[next.candidate]);
                             const float score =
                                 dot(input.weights.row(i), inputs[pairs[p].row], d, next_weight, inputs[next.row]);
                             row.upper[pairs[p].candidate] = score + input.bias_of(i);
                         }
                     });
        for (std::int64_t b = 0; b < count; ++b) rows[b].scored = rows[b].queued;
        return total;
    }

    // Whether all weights are finite; else there is no bound to rely on.
    bool bounded() const {
        const float finite = std::numeric_limits<float>::max();
        const float* norm = screen.quantized.norm;
        return std::all_of(norm + low, norm + high, [=](float length) { return length <= finite; });
    }
};

}  // namespace
}  // namespace sparsekern
