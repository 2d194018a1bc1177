// The screened encoder against a stable sort of the scores, which are whole numbers and so exact in any order.
#include "cpu/topk_encode.h"

#include <numeric>

#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

namespace {

struct Case {
    std::int64_t rows, n, d, k, gap;
    bool bias, outliers, copy, absolute;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << "rows " << c.rows << ", n " << c.n << ", d " << c.d << ", k " << c.k << ", gap " << c.gap << ", bias "
               << c.bias << ", outliers " << c.outliers << ", copy " << c.copy << ", absolute " << c.absolute;
}

// A quantised copy in memory of its own.
struct Copy {
    Buffer<std::uint8_t> packed;
    Buffer<float> scale, error, norm;

    Copy(const TopkEncode& table, const Weights& weights)
        : packed(padded_latents(weights.n) * padded_width(weights.d)),
          scale(padded_latents(weights.n)),
          error(padded_latents(weights.n)),
          norm(padded_latents(weights.n)) {
        table.quantize(weights, view(), 0, padded_latents(weights.n));
    }
    Quantized view() { return {packed.data(), scale.data(), error.data(), norm.data()}; }
};

void check_case(const Case& c, int most_threads) {
    Random random(7);
    Matrix<float> weight(c.n, c.d, c.d + c.gap), x(c.rows, c.d, c.d + 2 * c.gap);
    Buffer<float> bias(c.n);
    fill(weight, random, Numbers::whole);
    fill(x, random, Numbers::whole);
    fill(bias, random, Numbers::whole);
    if (c.outliers)
        for (std::int64_t b = 0; b < c.rows; ++b) x.row(b)[c.d / 2] *= 200;

    std::vector<std::int32_t> expected;
    std::vector<float> expected_values;
    std::vector<double> scores(c.n), sizes(c.n);
    for (std::int64_t b = 0; b < c.rows; ++b) {
        for (std::int64_t i = 0; i < c.n; ++i) {
            scores[i] = c.bias ? bias[i] : 0;
            for (std::int64_t j = 0; j < c.d; ++j) scores[i] += double(weight.row(i)[j]) * x.row(b)[j];
            sizes[i] = c.absolute ? std::fabs(scores[i]) : scores[i];
        }
        std::vector<std::int32_t> order(c.n);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return sizes[i] > sizes[j]; });
        expected.insert(expected.end(), order.begin(), order.begin() + c.k);
        for (std::int64_t j = 0; j < c.k; ++j)
            expected_values.push_back(static_cast<float>(c.absolute ? scores[order[j]] : std::max(scores[order[j]], 0.0)));
    }

    for (const auto& [isa, table] : runnable(topk_encode_generic(), topk_encode_avx2(), topk_encode_avx512())) {
        const Weights weights{weight.data(), weight.stride, c.n, c.d};
        Copy copy(*table, weights);
        const Quantized quantized = copy.view();
        for (int threads = 1; threads <= most_threads; ++threads) {
            Buffer<float> values(c.rows * c.k);
            Buffer<std::int32_t> index(c.rows * c.k);
            Buffer<std::uint8_t> certain(c.rows);
            table->encode({{weights, c.copy ? &quantized : nullptr, c.bias ? bias.data() : nullptr, x.data(), x.stride,
                            c.rows, threads},
                           nullptr, c.k, c.absolute, values.data(), index.data(), certain.data()});
            for (std::int64_t b = 0; b < c.rows; ++b) CHECK(certain[b] == 1, isa << ", row " << b << "; " << c);
            for (std::int64_t s = 0; s < c.rows * c.k; ++s)
                CHECK(index[s] == expected[s], isa << ", slot " << s << " has latent " << index[s] << ", expected "
                                                   << expected[s] << ", threads " << threads << "; " << c);
            for (std::int64_t s = 0; s < c.rows * c.k; ++s)
                CHECK(values[s] == expected_values[s], isa << ", slot " << s << " has value " << values[s] << ", expected "
                                                           << expected_values[s] << "; " << c);
        }
    }
}

struct RoutedCase {
    std::int64_t rows, share, count, active, d, k;
    bool apart, screened, copy, uneven;
};

std::ostream& operator<<(std::ostream& out, const RoutedCase& c) {
    return out << "rows " << c.rows << ", " << c.count << " experts of " << c.share << ", active " << c.active << ", d "
               << c.d << ", k " << c.k << ", apart " << c.apart << ", screened " << c.screened << ", copy " << c.copy
               << ", uneven " << c.uneven;
}

// Every slot against a stable sort of the scores of its expert's latents, or of those of all experts of its row.
void check_routed(const RoutedCase& c, int threads) {
    const std::int64_t n = c.share * c.count, slots = c.rows * c.active;
    Random random(11);
    Matrix<float> weight(n, c.d, c.d), x(c.rows, c.d, c.d + 3);
    Buffer<float> bias(n);
    fill(weight, random, Numbers::whole);
    fill(x, random, Numbers::whole);
    fill(bias, random, Numbers::whole);

    std::vector<std::int32_t> expert(slots), order, offsets{0};
    for (std::int64_t s = 0; s < slots; ++s)  // distinct in a row; uneven: as few experts as possible
        expert[s] = static_cast<std::int32_t>((s % c.active + (c.uneven ? 0 : s / c.active * 7)) % c.count);
    for (std::int32_t e = 0; e < c.count; ++e) {
        for (std::int32_t s = 0; s < slots; ++s)
            if (expert[s] == e) order.push_back(s);
        offsets.push_back(static_cast<std::int32_t>(order.size()));
    }

    const std::int64_t found = c.apart ? slots : c.rows, each = c.apart ? 1 : c.active;
    std::vector<std::int32_t> expected;
    for (std::int64_t f = 0; f < found; ++f) {
        std::vector<std::pair<double, std::int32_t>> scores;
        for (std::int64_t j = 0; j < each; ++j)
            for (std::int64_t l = 0; l < c.share; ++l) {
                const std::int64_t i = expert[f * each + j] * c.share + l;
                double score = bias[i];
                for (std::int64_t q = 0; q < c.d; ++q)
                    score += double(weight.row(i)[q]) * x.row(c.apart ? f / c.active : f)[q];
                scores.push_back({-score, static_cast<std::int32_t>(i)});
            }
        std::sort(scores.begin(), scores.end());
        for (std::int64_t j = 0; j < c.k; ++j) expected.push_back(scores[j].second);
    }

    for (const auto& [isa, table] : runnable(topk_encode_generic(), topk_encode_avx2(), topk_encode_avx512())) {
        const Weights weights{weight.data(), weight.stride, n, c.d};
        Copy copy(*table, weights);
        const Quantized quantized = copy.view();
        const Experts experts{c.count, c.active, order.data(), offsets.data(), c.apart, c.screened};
        Buffer<float> values(found * c.k);
        Buffer<std::int32_t> index(found * c.k);
        Buffer<std::uint8_t> certain(found);
        table->encode({{weights, c.copy ? &quantized : nullptr, bias.data(), x.data(), x.stride, c.rows, threads},
                       &experts, c.k, false, values.data(), index.data(), certain.data()});
        for (std::int64_t f = 0; f < found; ++f) CHECK(certain[f] == 1, isa << ", row " << f << "; " << c);
        for (std::int64_t s = 0; s < found * c.k; ++s)
            CHECK(index[s] == expected[s], isa << ", slot " << s << " has latent " << index[s] << ", expected "
                                               << expected[s] << ", threads " << threads << "; " << c);
    }
}

}  // namespace

NATIVE_TEST(topk_encode_routed) {
    for (bool screened : {false, true})
        for (bool apart : {false, true})
            for (bool uneven : {false, true}) {
                check_routed({23, 70, 5, 2, 37, 9, apart, screened, screened && uneven, uneven}, 3);
                if (kThreadSanitizer) continue;
                check_routed({1, 1, 1, 1, 5, 1, apart, screened, false, uneven}, 1);
                check_routed({7, 64, 3, 3, 64, 5, apart, screened, screened, uneven}, 1);
                check_routed({40, 700, 2, 1, 20, 30, apart, screened, false, uneven}, 2);
                check_routed({9, 3, 50, 4, 8, 2, apart, screened, screened && !uneven, uneven}, 2);
            }
}

NATIVE_TEST(topk_encode_odd_shapes) {
    for (std::int64_t d : {1, 3, 37, 64, 130})
        for (std::int64_t n : {1, 63, 64, 300})
            for (std::int64_t rows : {1, 7}) {
                if (kThreadSanitizer && (n != 300 || d != 37)) continue;
                for (std::int64_t k : {std::int64_t{1}, (n + 1) / 2, n})
                    for (bool copy : {false, true})
                        for (bool absolute : {false, true})
                            check_case({rows, n, d, k, copy ? 5 : 0, copy, !copy, copy, absolute}, 1);
            }
}

NATIVE_TEST(topk_encode_on_threads) {
    check_case({61, 1500, 70, 9, 3, true, true, false, false}, 4);
    check_case({61, 1500, 70, 9, 0, false, false, true, false}, 3);
    check_case({61, 1500, 70, 9, 3, true, true, false, true}, 3);
}

NATIVE_TEST(topk_encode_reports_rows_that_it_cannot_answer_for) {
    const std::int64_t n = 9000, d = 8, rows = 5, k = 3;
    Matrix<float> weight(n, d, d), x(rows, d, d);
    Random random(3);
    fill(weight, random, Numbers::real);
    fill(x, random, Numbers::real);
    for (std::int64_t i = 0; i < n; ++i) std::copy(weight.row(0), weight.row(0) + d, weight.row(i));  // all the same
    x.row(2)[1] = std::numeric_limits<float>::infinity();
    for (const auto& [isa, table] : runnable(topk_encode_generic(), topk_encode_avx2(), topk_encode_avx512())) {
        Buffer<float> values(rows * k);
        Buffer<std::int32_t> index(rows * k);
        Buffer<std::uint8_t> certain(rows);
        table->encode({{{weight.data(), d, n, d}, nullptr, nullptr, x.data(), d, rows, 2},
                       nullptr, k, false, values.data(), index.data(), certain.data()});
        for (std::int64_t b = 0; b < rows; ++b) CHECK(certain[b] == 0, isa << ", row " << b);
    }
}
