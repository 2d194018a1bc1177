// The screened encoder against a stable sort of the scores, which are whole numbers and so exact in any order.
#include "cpu/topk_encode.h"

#include <numeric>

#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

namespace {

struct Case {
    std::int64_t rows, n, d, k, gap;
    bool bias, outliers, copy;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << "rows " << c.rows << ", n " << c.n << ", d " << c.d << ", k " << c.k << ", gap " << c.gap << ", bias "
               << c.bias << ", outliers " << c.outliers << ", copy " << c.copy;
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
    std::vector<double> scores(c.n);
    for (std::int64_t b = 0; b < c.rows; ++b) {
        for (std::int64_t i = 0; i < c.n; ++i) {
            scores[i] = c.bias ? bias[i] : 0;
            for (std::int64_t j = 0; j < c.d; ++j) scores[i] += double(weight.row(i)[j]) * x.row(b)[j];
        }
        std::vector<std::int32_t> order(c.n);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return scores[i] > scores[j]; });
        expected.insert(expected.end(), order.begin(), order.begin() + c.k);
    }

    for (const auto& [isa, table] : runnable(topk_encode_generic(), topk_encode_avx2(), topk_encode_avx512())) {
        const Weights weights{weight.data(), weight.stride, c.n, c.d};
        Copy copy(*table, weights);
        const Quantized quantized = copy.view();
        for (int threads = 1; threads <= most_threads; ++threads) {
            Buffer<float> values(c.rows * c.k);
            Buffer<std::int32_t> index(c.rows * c.k);
            Buffer<std::uint8_t> certain(c.rows);
            table->encode({weights, c.copy ? &quantized : nullptr, c.bias ? bias.data() : nullptr, x.data(), x.stride,
                           c.rows, c.k, values.data(), index.data(), certain.data(), threads});
            for (std::int64_t b = 0; b < c.rows; ++b) CHECK(certain[b] == 1, isa << ", row " << b << "; " << c);
            for (std::int64_t s = 0; s < c.rows * c.k; ++s)
                CHECK(index[s] == expected[s], isa << ", slot " << s << " has latent " << index[s] << ", expected "
                                                   << expected[s] << ", threads " << threads << "; " << c);
        }
    }
}

}  // namespace

NATIVE_TEST(topk_encode_odd_shapes) {
    for (std::int64_t d : {1, 3, 37, 64, 130})
        for (std::int64_t n : {1, 63, 64, 300})
            for (std::int64_t rows : {1, 7}) {
                if (kThreadSanitizer && (n != 300 || d != 37)) continue;
                for (std::int64_t k : {std::int64_t{1}, (n + 1) / 2, n})
                    for (bool copy : {false, true}) check_case({rows, n, d, k, copy ? 5 : 0, copy, !copy, copy}, 1);
            }
}

NATIVE_TEST(topk_encode_on_threads) {
    check_case({61, 1500, 70, 9, 3, true, true, false}, 4);
    check_case({61, 1500, 70, 9, 0, false, false, true}, 3);
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
        table->encode({{weight.data(), d, n, d}, nullptr, nullptr, x.data(), d, rows, k, values.data(), index.data(),
                       certain.data(), 2});
        for (std::int64_t b = 0; b < rows; ++b) CHECK(certain[b] == 0, isa << ", row " << b);
    }
}
