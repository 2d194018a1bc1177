// The fused screen in emulation against a plain loop, on whole numbers, whose sums are exact in any order.
#include "cuda/screen.h"

#include "cuda_test.h"

using namespace sparsekern::cuda;
using namespace sparsekern::test;

namespace {

constexpr float kLowest = -3.0e38f;

struct Case {
    std::int64_t rows, d, n_buckets, n_members, missing;
    int keep;
    bool factors, absolute;
    int cluster;
    std::vector<std::int64_t> loads;  // slots of each expert; none: no experts
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << "rows " << c.rows << ", d " << c.d << ", n_buckets " << c.n_buckets << ", n_members " << c.n_members
               << ", missing " << c.missing << ", keep " << c.keep << ", factors " << c.factors << ", absolute "
               << c.absolute << ", cluster " << c.cluster << ", experts " << c.loads.size();
}

template <class T>
void fill_rows(Matrix<T>& matrix, Random& random, std::int64_t rows) {
    for (std::int64_t i = 0; i < matrix.rows; ++i)
        for (std::int64_t j = 0; j < matrix.cols; ++j)
            matrix.row(i)[j] = rounded_to<T>(i < rows ? static_cast<float>(random.below(9) - 4) : 0.0f);
}

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Key of one score, as sparsekern/backends/triton/encode.py has it.
float key_of(double score, std::int64_t member, std::int64_t n_members, bool absolute) {
    std::uint32_t low = 1;
    while (low < n_members) low *= 2;
    const float narrow = static_cast<float>(absolute ? std::fabs(score) : score);
    const std::uint32_t bits = (bits_of(narrow) & ~(low - 1)) | static_cast<std::uint32_t>(member);
    float key;
    std::memcpy(&key, &bits, sizeof key);
    return key;
}

template <class T>
void check_case(const Case& c, ElementType type) {
    Random random(11);
    const std::int64_t experts = std::max<std::int64_t>(c.loads.size(), 1), latents = c.n_buckets * c.n_members;
    const std::int64_t n_real = latents - c.missing, n = experts * latents, padding = 16 / sizeof(T);
    Matrix<T> x(c.rows, c.d, c.d + padding), weight(n, c.d, c.d + padding);
    fill_rows(x, random, c.rows);
    fill_rows(weight, random, c.missing ? n_real : n);
    Buffer<float> x_scale(c.rows), weight_scale(n - c.missing), bias(n - c.missing);
    for (std::int64_t i = 0; i < x_scale.size(); ++i) x_scale[i] = std::ldexp(1.0f, int(random.below(5)) - 2);
    for (std::int64_t i = 0; i < bias.size(); ++i) {
        weight_scale[i] = std::ldexp(1.0f, int(random.below(5)) - 2);
        bias[i] = random.below(9) ? static_cast<float>(random.below(41) - 20) : -std::numeric_limits<float>::infinity();
    }

    // Slots in the order of experts, the last slot first.
    Buffer<std::int32_t> order(c.rows), offsets(experts + 1), first_tile(experts);
    const std::int64_t height = 128 * c.cluster;
    Buffer<std::int32_t> tile_expert((c.rows + height - 1) / height + experts);
    Buffer<T> gathered(c.rows * c.d);
    std::vector<std::int64_t> expert_of(c.rows, 0);  // of each place in `order`
    ScreenSlots slots{order.data(), offsets.data(), first_tile.data(), tile_expert.data(), 1,
                      static_cast<std::int32_t>(experts)};
    std::int64_t place = 0, tiles = 0;
    for (std::int64_t e = 0; e < static_cast<std::int64_t>(c.loads.size()); ++e) {
        offsets[e] = static_cast<std::int32_t>(place);
        first_tile[e] = static_cast<std::int32_t>(tiles);
        for (std::int64_t i = 0; i < c.loads[e]; ++i, ++place) {
            order[place] = static_cast<std::int32_t>(c.rows - 1 - place);
            expert_of[place] = e;
        }
        for (std::int64_t i = 0; i < c.loads[e]; i += height) tile_expert[tiles++] = static_cast<std::int32_t>(e);
    }
    offsets[experts] = static_cast<std::int32_t>(place);
    while (tiles < tile_expert.size()) tile_expert[tiles++] = static_cast<std::int32_t>(experts);

    Buffer<float> keys(c.rows * c.keep * c.n_buckets);
    ScreenArgs args{type, x.data(), x.stride, nullptr, weight.data(), weight.stride, nullptr, nullptr,
                    ElementType::float32, keys.data(), c.rows, c.d, n_real, c.n_buckets, c.n_members, c.keep,
                    c.absolute, c.cluster, nullptr};
    if (c.factors) {
        args.x_scale = x_scale.data();
        args.weight_scale = weight_scale.data();
        args.bias = bias.data();
    }
    if (!c.loads.empty()) {
        const std::int64_t bytes = c.d * static_cast<std::int64_t>(sizeof(T));
        gather_rows(x.data(), x.stride * sizeof(T), order.data(), 1, gathered.data(), c.rows, bytes, nullptr);
        args.x = gathered.data();
        args.x_stride = c.d;
        args.slots = &slots;
    }
    screen(args, nullptr);

    std::vector<float> best(c.n_members + 3);
    for (std::int64_t p = 0; p < c.rows; ++p) {
        const std::int64_t b = c.loads.empty() ? p : order[p], before = expert_of[p] * latents;
        for (std::int64_t bucket = 0; bucket < c.n_buckets; ++bucket) {
            std::fill(best.begin(), best.end(), kLowest);
            for (std::int64_t member = 0; member < c.n_members; ++member) {
                const std::int64_t latent = member * c.n_buckets + bucket;
                if (latent >= n_real) continue;
                double score = 0;
                for (std::int64_t j = 0; j < c.d; ++j)
                    score += double(to_float(x.row(b)[j])) * to_float(weight.row(before + latent)[j]);
                if (c.factors) {
                    const std::int64_t i = before + latent;
                    score = score * x_scale[b] * weight_scale[i] + std::max(bias[i], kLowest);
                }
                best[member] = key_of(score, member, c.n_members, c.absolute);
            }
            std::sort(best.begin(), best.end(), std::greater<float>());
            for (int i = 0; i < c.keep; ++i) {
                const float found = keys[(b * c.keep + i) * c.n_buckets + bucket];
                CHECK(bits_of(found) == bits_of(best[i]), c << ": row " << b << ", bucket " << bucket << ", key " << i
                                                            << ": " << found << " for " << best[i]);
            }
        }
    }
}

}  // namespace

NATIVE_TEST(screen) {
    std::vector<Case> cases = {
        {140, 200, 20, 32, 0, 3, true, false, 2, {}},
        {200, 72, 16, 16, 0, 3, true, false, 1, {0, 131, 64, 0, 5}},
    };
    if (!kThreadSanitizer) {
        const std::vector<Case> more = {
            {1, 8, 8, 16, 0, 1, false, false, 1, {}},   {300, 64, 16, 48, 0, 2, true, true, 4, {}},
            {520, 136, 9, 20, 7, 3, true, true, 2, {}}, {33, 320, 24, 7, 3, 3, false, false, 1, {}},
            {40, 64, 8, 16, 0, 3, false, false, 1, {0, 0, 40}}, {350, 64, 8, 16, 0, 3, true, false, 2, {300, 50}},
        };
        cases.insert(cases.end(), more.begin(), more.end());
    }
    for (const Case& c : cases) {
        check_case<f16>(c, ElementType::float16);
        if (c.d % 16 == 0) check_case<e4m3>(c, ElementType::float8_e4m3);
    }
    check_case<bf16>(cases[0], ElementType::bfloat16);
}

NATIVE_TEST(screen_tiles) {
    for (const auto& [tokens, buckets, group] : {std::array{1, 1, 1}, {7, 3, 2}, {8, 5, 16}, {12, 4, 4}}) {
        std::vector<int> seen(tokens * buckets);
        for (int unit = 0; unit < tokens * buckets; ++unit) {
            const ScreenTile tile = screen_tile_of(unit, tokens, buckets, group);
            CHECK(tile.tokens >= 0 && tile.tokens < tokens, "unit " << unit);
            CHECK(tile.buckets >= 0 && tile.buckets < buckets, "unit " << unit);
            ++seen[tile.tokens * buckets + tile.buckets];
        }
        CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }), tokens << " by " << buckets);
    }
}
