// The encoder after its screen against a stable sort of the scores, which are whole numbers and so exact in any order.
#include "cuda/candidates.h"

#include <numeric>

#include "cuda_test.h"

using namespace sparsekern;
using namespace sparsekern::cuda;
using namespace sparsekern::test;

namespace {

struct Case {
    std::int64_t tokens;
    int d, gap;               // elements, and those between rows
    int n, owners, experts;   // latents of an owner; owners of a row and experts in all, or 1 and 0
    int share;                // rows of a token
    int across, keep, k, room;
    bool bias, absolute, by_latent;
    float slack;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << "tokens " << c.tokens << ", d " << c.d << ", gap " << c.gap << ", n " << c.n << ", owners " << c.owners
               << ", share " << c.share << ", across " << c.across << ", keep " << c.keep << ", k " << c.k << ", room "
               << c.room << ", absolute " << c.absolute << ", by latent " << c.by_latent;
}

template <class T>
constexpr ElementType kType = std::is_same_v<T, float> ? ElementType::float32 : ElementType::bfloat16;

template <class T>
struct Problem {
    Case c;
    std::int64_t rows, latents;
    Matrix<T> x, weight;
    Buffer<T> bias;
    Buffer<std::int32_t> experts;

    explicit Problem(const Case& c)
        : c(c),
          rows(c.tokens * c.share),
          latents(std::int64_t(c.n) * max_of(c.experts, 1)),
          x(c.tokens, c.d, c.d + c.gap),
          weight(latents, c.d, c.d + 2 * c.gap),
          bias(latents),
          experts(rows * c.owners) {
        Random random(11);
        const auto draw = [&] { return rounded_to<T>(static_cast<float>(random.below(9) - 4)); };
        for (std::int64_t i = 0; i < c.tokens; ++i)
            for (int j = 0; j < c.d; ++j) x.row(i)[j] = i == 1 ? T{} : draw();  // all latents of token 1 tie
        for (std::int64_t i = 0; i < latents; ++i) {
            for (int j = 0; j < c.d; ++j) weight.row(i)[j] = draw();
            bias[i] = c.bias ? draw() : T{};
        }
        for (std::int64_t i = 0; i < experts.size(); ++i)
            experts[i] = static_cast<std::int32_t>((i + i / c.owners) % max_of(c.experts, 1));
    }
    std::int64_t latent_of(std::int64_t row, int owner, int i) const {
        return c.experts ? std::int64_t(experts[row * c.owners + owner]) * c.n + i : i;
    }
    float score(std::int64_t row, std::int64_t latent) const {
        float sum = to_float(bias[latent]);
        for (int j = 0; j < c.d; ++j) sum += to_float(x.row(row / c.share)[j]) * to_float(weight.row(latent)[j]);
        return sum;
    }
};

int member_bits(int members) {
    int bits = 0;
    while (1 << bits < members) ++bits;
    return bits;
}

float with_member(float score, int member, int bits) {
    std::uint32_t number;
    std::memcpy(&number, &score, sizeof number);
    number = (number & ~0u << bits) | static_cast<unsigned>(member);
    std::memcpy(&score, &number, sizeof number);
    return score;
}

template <class T>
Buffer<float> plain_keys(const Problem<T>& problem, int members) {
    const Case& c = problem.c;
    Buffer<float> keys(problem.rows * c.owners * c.keep * c.across);
    for (std::int64_t row = 0; row < problem.rows; ++row)
        for (int owner = 0; owner < c.owners; ++owner)
            for (int bucket = 0; bucket < c.across; ++bucket) {
                std::vector<float> all(members, -3.0e38f);
                for (int member = 0; member < members && member * c.across + bucket < c.n; ++member) {
                    const float score = problem.score(row, problem.latent_of(row, owner, member * c.across + bucket));
                    all[member] = with_member(c.absolute ? std::fabs(score) : score, member, member_bits(members));
                }
                std::sort(all.rbegin(), all.rend());
                all.resize(max_of(members, c.keep), -3.0e38f);
                for (int turn = 0; turn < c.keep; ++turn)
                    keys[((row * c.owners + owner) * c.keep + turn) * c.across + bucket] = all[turn];
            }
    return keys;
}

template <class T>
void check_case(const Case& c) {
    const Problem<T> problem(c);
    const std::int64_t rows = problem.rows, slots = 7 + rows;
    const int members = ceil_div(c.n, c.across);
    const Buffer<float> keys = plain_keys(problem, members);
    Buffer<float> slack(c.tokens), scores(rows * c.room), sums(rows * c.room);
    for (std::int64_t i = 0; i < c.tokens; ++i) slack[i] = c.slack;
    Buffer<std::int32_t> latents(rows * c.room), count(rows), repaired(rows), waiting(1 + rows), index(rows * c.k);
    Buffer<std::int32_t> starts(problem.latents + 1);
    Buffer<Pair> pairs(rows * c.room);
    Buffer<std::uint64_t> spare(slots * c.k);
    Buffer<T> values(rows * c.k);
    waiting[0] = 0;
    const Candidates candidates{rows, c.room, c.share, latents.data(), scores.data(), count.data(), repaired.data(),
                                waiting.data()};
    const Owners owners{c.experts ? problem.experts.data() : nullptr, c.owners, c.n};
    const Operands operands{kType<T>, {problem.x.data(), problem.x.stride}, {problem.weight.data(), problem.weight.stride},
                            c.bias ? problem.bias.data() : nullptr, c.d, c.absolute};
    select_candidates({keys.data(), c.owners * c.across, members, c.keep, member_bits(members)}, {slack.data(), 0.0f},
                      c.k, owners, candidates, nullptr);
    if (c.by_latent) {
        for (std::int64_t i = 0; i <= problem.latents; ++i) starts[i] = 0;
        count_by_latent(candidates, starts.data(), nullptr);
        for (std::int64_t i = 0; i < problem.latents; ++i) starts[i + 1] += starts[i];
        rescore_by_latent(operands, candidates, slack.data(), starts.data(), problem.latents, pairs.data(), sums.data(),
                          nullptr);
    } else {
        rescore(operands, candidates, slack.data(), nullptr);
    }
    repair(operands, owners, candidates, c.k, spare.data(), slots, nullptr);
    take_best(kType<T>, candidates, c.k, c.absolute, spare.data(), slots, values.data(), index.data(), nullptr);

    CHECK(waiting[0] > 0 && waiting[0] < rows, waiting[0] << " rows are repaired; " << c);
    for (std::int64_t row = 0; row < rows; ++row) {
        std::vector<std::pair<float, std::int64_t>> all;
        for (int owner = 0; owner < c.owners; ++owner)
            for (int i = 0; i < c.n; ++i) {
                const std::int64_t latent = problem.latent_of(row, owner, i);
                all.emplace_back(problem.score(row, latent), latent);
            }
        std::sort(all.begin(), all.end(), [&](const auto& a, const auto& b) {
            const float left = c.absolute ? std::fabs(a.first) : a.first, right = c.absolute ? std::fabs(b.first) : b.first;
            return left != right ? left > right : a.second < b.second;
        });
        for (int j = 0; j < c.k; ++j) {
            const float expected = to_float(rounded_to<T>(c.absolute ? all[j].first : std::max(all[j].first, 0.0f)));
            CHECK(index[row * c.k + j] == all[j].second && to_float(values[row * c.k + j]) == expected,
                  "row " << row << ", place " << j << ": " << index[row * c.k + j] << " with "
                         << to_float(values[row * c.k + j]) << ", expected " << all[j].second << " with " << expected
                         << "; repaired " << repaired[row] << "; " << c);
        }
    }
}

}  // namespace

NATIVE_TEST(candidates) {
    //                 tokens  d gap   n own exp share across keep k room
    const Case cases[] = {{4, 12, 0, 300, 1, 0, 1, 32, 3, 5, 64, true, false, false, 0.5f},
                          {4, 12, 4, 300, 1, 0, 1, 32, 3, 5, 64, false, true, true, 0.5f},
                          {3, 7, 1, 70, 1, 0, 1, 70, 1, 3, 40, false, false, true, 0.0f},
                          {3, 530, 0, 90, 1, 0, 1, 10, 2, 4, 64, false, false, true, 0.5f},
                          {3, 8, 0, 60, 2, 3, 1, 15, 3, 4, 64, false, false, false, 0.5f},
                          {3, 8, 8, 60, 1, 3, 2, 15, 3, 2, 32, false, false, false, 0.5f},
                          {3, 8, 0, 60, 1, 4, 4, 15, 3, 1, 32, false, true, true, 0.5f}};
    for (const Case& c : cases) {
        check_case<float>(c);
        check_case<bf16>(c);
    }
    in_several_orders([&] { check_case<float>(cases[0]); }, kThreadSanitizer ? 1 : 3);
}

NATIVE_TEST(cast_rows) {
    for (const auto& [d, gap] : std::vector<std::pair<int, int>>{{16, 0}, {600, 8}, {7, 2}}) {
        Matrix<float> rows(3, d, d + gap);
        Random random(3);
        fill(rows, random, Numbers::real);
        Buffer<f16> out(5 * d);
        Buffer<float> scale(5), norm(5), error(5);
        cast_rows(ElementType::float32, {rows.data(), rows.stride}, 3, d,
                  {ElementType::float16, out.data(), scale.data(), norm.data(), error.data(), 1.0f, 5}, nullptr);
        for (int row = 0; row < 5; ++row) {
            double squares = 0, errors = 0;
            float largest = 0;
            for (int j = 0; j < d; ++j) {
                const float value = row < 3 ? rows.row(row)[j] : 0.0f, back = to_float(out[row * d + j]) * scale[row];
                largest = std::max(largest, std::fabs(value));
                squares += double(value) * value;
                errors += double(value - back) * (value - back);
                CHECK(std::fabs(value - back) <= scale[row] * 0x1p-11f, "element " << j << " of " << value);
            }
            CHECK(scale[row] == std::max(largest, 1e-30f), "scale " << scale[row] << " of " << largest);
            CHECK(std::fabs(norm[row] - std::sqrt(squares)) <= 1e-5 * norm[row], "norm " << norm[row]);
            CHECK(std::fabs(error[row] - std::sqrt(errors)) <= 1e-5 * error[row], "error " << error[row]);
        }
    }
}

NATIVE_TEST(bucket_panel) {
    // Two panels, of which the last has not all buckets of its last member.
    for (const int n_buckets : {16, 9}) {
        const int n = 5 * n_buckets - 3, rows = 3, members = 5, first = 2;
        Random random(5);
        Buffer<float> bias(n), keys(rows * 3 * n_buckets);
        fill(bias, random, Numbers::whole);
        std::vector<std::vector<float>> scores(rows, std::vector<float>(n));
        for (auto& row : scores)
            for (float& score : row) score = static_cast<float>(random.below(200) - 100);
        for (const auto& [begin, end] : {std::pair{0, first}, std::pair{first, members}}) {
            const int width = std::min(n, end * n_buckets) - begin * n_buckets;
            Matrix<f16> panel(rows, width, width);
            for (int row = 0; row < rows; ++row)
                for (int j = 0; j < width; ++j) panel.row(row)[j] = rounded_to<f16>(scores[row][begin * n_buckets + j]);
            bucket_panel({ElementType::float16, {panel.data(), panel.stride}, nullptr, nullptr, bias.data(),
                          ElementType::float32, rows, n, begin, end - begin, true},
                         {nullptr, n_buckets, members, 3, 3}, keys.data(), nullptr);
        }
        for (int row = 0; row < rows; ++row)
            for (int bucket = 0; bucket < n_buckets; ++bucket) {
                std::vector<float> all;
                for (int member = 0; member * n_buckets + bucket < n; ++member) {
                    const int latent = member * n_buckets + bucket;
                    all.push_back(with_member(std::fabs(scores[row][latent] + bias[latent]), member, 3));
                }
                std::sort(all.rbegin(), all.rend());
                for (int turn = 0; turn < 3; ++turn)
                    CHECK(keys[(row * 3 + turn) * n_buckets + bucket] == all[turn],
                          "bucket " << bucket << " of row " << row << ", turn " << turn);
            }
    }
}
