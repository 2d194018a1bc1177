// Adam over factored gradients, by the CUDA kernels in emulation, against plain loops in double.
#include "cuda/row_adam.h"

#include "cuda/by_latent.h"
#include "cuda_test.h"

using namespace sparsekern::cuda;
using namespace sparsekern::test;

namespace {

constexpr std::int32_t kSplit = 40;  // more than a warp stages at a time

// Entries of which most are of the first latent and one in six is zero; the last latents have none. `uneven`: they belong
// to rows by chance, as in CSR form.
struct Part {
    Buffer<std::int32_t> index, start, order, piece_start, piece_latent, row;
    Buffer<float> values, pieces;
    Matrix<float> vectors;
    std::int32_t k;
    bool uneven;

    Part(std::int64_t rows, std::int32_t k, std::int64_t n, std::int32_t d, std::int32_t gap, Random& random,
         bool uneven)
        : index(rows * k),
          start(n + 1),
          order(rows * k),
          piece_start(n),
          piece_latent(most_pieces(rows * k, kSplit)),
          row(rows * k),
          values(rows * k),
          pieces(piece_latent.size() * d),
          vectors(rows, d, d + gap),
          k(k),
          uneven(uneven) {
        for (std::int64_t e = 0; e < index.size(); ++e) {
            index[e] = static_cast<std::int32_t>(random.below(2) ? 0 : random.below((n + 1) / 2));
            row[e] = static_cast<std::int32_t>(uneven ? random.below(rows) : e / k);
        }
        std::sort(row.data(), row.data() + row.size());
        fill(values, random, Numbers::real);
        fill(vectors, random, Numbers::real);
        for (std::int64_t e = 0; e < index.size(); ++e)
            if (random.below(6) == 0) values[e] = 0;
        Buffer<std::uint8_t> workspace(sort_workspace(index.size(), n));
        sort_by_latent(index.data(), index.size(), n, kSplit,
                       {start.data(), order.data(), piece_start.data(), piece_latent.data()}, workspace.data(),
                       nullptr);
    }

    OuterProducts view() {
        return {values.data(),
                vectors.data(),
                vectors.stride,
                start.data(),
                order.data(),
                uneven ? row.data() : nullptr,
                piece_start.data(),
                pieces.data(),
                uneven ? 0 : k};
    }

    OuterProducts with_pieces(std::int64_t n, std::int32_t d, std::int32_t slice) {
        sum_pieces(view(), piece_latent.data(), piece_latent.size(), n, d, kSplit, slice, pieces.data(), nullptr);
        return view();
    }
};

struct Case {
    std::int32_t d;
    bool unit_rows;
    std::int32_t slice;  // of the columns
    bool uneven;
    std::int32_t gap;  // between vectors
};

template <class T>
void check_rounded(const Buffer<float>& weight, std::int64_t i, std::int32_t d, const T* rows, float limit, float scale,
                   float norm, float error, const std::string& where) {
    double square = 0, off = 0;
    float largest = 0;
    for (std::int64_t c = i * d; c < (i + 1) * d; ++c) largest = std::max(largest, std::fabs(weight[c]));
    const float expected_scale = limit > 0 ? std::max(largest / limit, 1e-30f) : 1.0f;
    if (limit > 0) CHECK(scale == expected_scale, where << ": scale " << scale << ", not " << expected_scale);
    for (std::int64_t c = i * d; c < (i + 1) * d; ++c) {
        const T expected = rounded_to<T>(weight[c] / expected_scale);
        CHECK(rows[c].bits == expected.bits, where << ", element " << c << " of the copy: " << to_float(rows[c]));
        square += double(weight[c]) * weight[c];
        off += std::pow(weight[c] - double(to_float(rows[c])) * expected_scale, 2);
    }
    CHECK(std::fabs(norm - std::sqrt(square)) <= 1e-5 * std::sqrt(square), where << ": norm " << norm);
    CHECK(std::fabs(error - std::sqrt(off)) <= 1e-3 * std::sqrt(off) + 1e-7, where << ": error " << error);
}

template <class T>
void check_case(const Case& c, ElementType type, float limit) {
    const std::int64_t n = 7;
    const std::int32_t d = c.d;
    const std::string where =
        "d " + std::to_string(d) + ", slice " + std::to_string(c.slice) + (c.unit_rows ? ", unit rows" : "");
    Random random(11);
    Part one(60, 3, n, d, c.gap, random, c.uneven), other(2, 1, n, d, c.gap, random, false);
    Buffer<float> weight(n * d), mean(n * d), square(n * d);
    fill(weight, random, Numbers::real);
    fill(mean, random, Numbers::real);
    for (std::int64_t i = 0; i < n * d; ++i) square[i] = static_cast<float>(random.unit() + 0.1);

    const float rate = 0.1f, root = 0.7f, clip = 0.5f, eps = 1e-3f, beta1 = 0.9f, beta2 = 0.99f;
    std::vector<double> expected(n * d), gradients(n * d), norms(n), bounds(n);
    for (std::int64_t i = 0; i < n; ++i) {
        double* g = &gradients[i * d];
        double along = 0, norm = 0;
        for (Part* part : {&one, &other})
            for (std::int64_t e = 0; e < part->index.size(); ++e)
                if (part->index[e] == i && part->values[e] != 0) {
                    const float* vector = part->vectors.row(part->row[e]);
                    double length = 0;
                    for (std::int32_t col = 0; col < d; ++col) {
                        g[col] += double(part->values[e]) * vector[col];
                        length += double(vector[col]) * vector[col];
                    }
                    bounds[i] += std::fabs(part->values[e]) * std::sqrt(length);
                }
        for (std::int32_t col = 0; col < d; ++col) along += g[col] * weight[i * d + col];
        for (std::int32_t col = 0; col < d; ++col) {
            const std::int64_t at = i * d + col;
            const double used = g[col] - (c.unit_rows ? along * weight[at] : 0);
            norms[i] += used * used;
            const double m = beta1 * double(mean[at]) + (1 - double(beta1)) * clip * used;
            const double v = beta2 * double(square[at]) + (1 - double(beta2)) * clip * clip * used * used;
            expected[at] = weight[at] - rate * m / (std::sqrt(v) / root + eps);
            norm += expected[at] * expected[at];
        }
        if (c.unit_rows)
            for (std::int64_t at = i * d; at < (i + 1) * d; ++at) expected[at] /= std::sqrt(norm);
    }

    const std::int64_t slices = c.unit_rows ? 1 : (d + c.slice - 1) / c.slice;
    Buffer<float> some_rows(3 * d);  // the last lot of latents is not full
    const RowWorkspace workspace{some_rows.data(), 3};
    Buffer<float> w(n * d), m(n * d), v(n * d), squares(slices * n), alone(slices * n), rows(n * d), bound(n);
    const auto restart = [&] {
        std::copy(weight.data(), weight.data() + n * d, w.data());
        std::copy(mean.data(), mean.data() + n * d, m.data());
        std::copy(square.data(), square.data() + n * d, v.data());
        std::fill(squares.data(), squares.data() + squares.size(), 0.0f);
    };
    restart();
    std::fill(alone.data(), alone.data() + alone.size(), 0.0f);
    Buffer<T> copy_rows(n * d);
    Buffer<float> scale(n), norm(n), error(n);
    const float hyper[] = {rate, root, clip};
    std::uint8_t needed = 0;
    RowGradient gradient{{one.with_pieces(n, d, c.slice), other.with_pieces(n, d, c.slice)}, 2, kSplit, n, d, c.slice,
                         w.data(), c.unit_rows, &needed, squares.data()};
    const RoundedRows copy{type,        copy_rows.data(), limit, limit > 0 ? scale.data() : nullptr,
                           norm.data(), error.data()};
    const AdamStep step{w.data(), m.data(), v.data(), hyper, 1 - beta1, 1 - beta2, eps, copy};

    row_adam(gradient, step, workspace, nullptr);
    CHECK(same_bits(w, weight) && same_bits(m, mean) && same_bits(v, square), where << ": an update not needed");
    CHECK(std::isnan(norm[0]), where << ": a copy not needed");
    needed = 1;
    gradient.squares = alone.data();
    gradient_squares(gradient, workspace, nullptr);
    gradient.squares = squares.data();
    row_adam(gradient, step, workspace, nullptr);
    CHECK(same_bits(squares, alone), where << ": other squares with the update");
    for (std::int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (std::int64_t slice = 0; slice < slices; ++slice) sum += squares[slice * n + i];
        CHECK(std::fabs(sum - norms[i]) <= 1e-4 * (1 + norms[i]),
              where << ", row " << i << ": squares " << sum << ", not " << norms[i]);
        check_rounded<T>(w, i, d, copy_rows.data(), limit, scale[i], norm[i], error[i], where);
    }
    for (std::int64_t at = 0; at < n * d; ++at)
        CHECK(std::fabs(w[at] - expected[at]) <= 2e-5,
              where << ", element " << at << ": " << w[at] << ", not " << expected[at]);

    Buffer<float> again(n * d);
    std::copy(w.data(), w.data() + n * d, again.data());
    if (c.slice < d) {
        restart();
        gradient.slice = d;
        row_adam(gradient, step, {}, nullptr);
        CHECK(same_bits(w, again), where << ": other bits than of whole rows");
    }
    gradient_rows(gradient, rows.data(), nullptr);
    for (std::int64_t at = 0; at < n * d; ++at)
        CHECK(std::fabs(rows[at] - gradients[at]) <= 1e-5,
              where << ", element " << at << " of the gradient: " << rows[at] << ", not " << gradients[at]);

    std::vector<float> lengths[2];
    for (int p = 0; p < 2; ++p) {
        const Matrix<float>& vectors = (p ? other : one).vectors;
        for (std::int64_t r = 0; r < vectors.rows; ++r) {
            double sum = 0;
            for (std::int32_t col = 0; col < d; ++col) sum += double(vectors.row(r)[col]) * vectors.row(r)[col];
            lengths[p].push_back(static_cast<float>(std::sqrt(sum)));
        }
    }
    const float* const length[] = {lengths[0].data(), lengths[1].data()};
    bound_rows(gradient, length, bound.data(), nullptr);
    for (std::int64_t i = 0; i < n; ++i)
        CHECK(std::fabs(bound[i] - bounds[i]) <= 1e-4 * (1 + bounds[i]), where << ", bound " << i << ": " << bound[i]);
}

}  // namespace

NATIVE_TEST(row_adam_of_one_warp) {
    check_case<f16>({1, false, 1, false, 3}, ElementType::float16, 1);
    check_case<e4m3>({37, true, 37, true, 3}, ElementType::float8_e4m3, 448);
    check_case<bf16>({64, true, 64, false, 4}, ElementType::bfloat16, 0);
    check_case<f16>({130, false, 64, true, 2}, ElementType::float16, 1);
    check_case<e4m3>({132, false, 64, false, 4}, ElementType::float8_e4m3, 448);
    check_case<bf16>({20, false, 8, true, 0}, ElementType::bfloat16, 0);
    check_case<f16>({44, true, 16, false, 4}, ElementType::float16, 1);
}

NATIVE_TEST(row_adam_of_several_warps) {
    in_several_orders([] { check_case<f16>({600, true, 600, false, 4}, ElementType::float16, 1); }, 2);
    check_case<e4m3>({1101, true, 1101, true, 1}, ElementType::float8_e4m3, 448);
    if (kThreadSanitizer) return;
    check_case<f16>({4100, false, 600, false, 0}, ElementType::float16, 1);
    check_case<bf16>({8196, true, 8196, false, 4}, ElementType::bfloat16, 0);
}
