// Streaming row-wise top-k against a sort, in the emulator of CUDA.
#include "cuda/row_topk.h"

#include "cuda_test.h"

using namespace sparsekern::cuda;
using namespace sparsekern::test;

namespace {

// NaN above all numbers, -0 equal to 0: what an order has to say.
bool above(float a, float b) { return a > b || (a != a && b == b); }

std::vector<float> numbers() {
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> all = {nan, -nan, 0x1p-149f, -0x1p-149f, 3.4028235e38f, -3.4028235e38f, infinity, -infinity};
    for (std::uint32_t bits = 0; bits < 1 << 16; bits += 23) {
        all.push_back(to_float(f16{static_cast<std::uint16_t>(bits)}));
        all.push_back(to_float(bf16{static_cast<std::uint16_t>(bits)}));
    }
    all.push_back(-0.0f);
    return all;
}

NATIVE_TEST(row_topk_orders) {
    const std::vector<float> keys = numbers();
    for (const float a : keys) {
        const float back = key_of(code_of(a));
        CHECK(back == a || (std::isnan(back) && std::isnan(a)), a);
        const auto order = order_of<float>(candidate_of(a, 7));
        CHECK(index_of(order) == 7 && order > order_of<float>(candidate_of(a, 8)), a);
        for (std::size_t i = 0; i < keys.size(); i += 11)
            CHECK((code_of(a) > code_of(keys[i])) == above(a, keys[i]), a << " and " << keys[i]);
    }
}

// Also of bounds that no key has: those that a radix descent ends with.
NATIVE_TEST(row_topk_bounds) {
    const std::vector<float> keys = numbers();
    std::vector<std::uint64_t> bounds = {0, ~std::uint64_t{0} >> 32};
    for (std::size_t i = 0; i < keys.size(); i += 29)
        for (const std::uint32_t near : {0u, 1u, ~0u})
            if (code_of(keys[i]) + near <= kNanCode)
                bounds.push_back(std::uint64_t{code_of(keys[i]) + near} << 32 | ~std::uint32_t{7});
    for (const std::uint32_t code : {kZeroCode - 2, kZeroCode - 1, kZeroCode, kZeroCode + 1, kInfinityCode, kNanCode})
        bounds.push_back(std::uint64_t{code} << 32 | ~std::uint32_t{7});
    for (const std::uint64_t order : bounds) {
        const Bound bound = bound_at(order);
        for (const float key : keys)
            for (const int index : {6, 7, 8}) {
                if (order >> 32 == kNanCode && index > 7) continue;  // the stream ends before
                const bool passes = !(key <= bound.below(index));
                CHECK(passes == (order_of<float>(candidate_of(key, index)) >= order),
                      key << " at " << index << " and bound " << order);
            }
    }
}

template <class T>
struct Storage;
template <>
struct Storage<float> {
    using type = float;
    static constexpr ElementType element = ElementType::float32;
    static float stored(float key) { return key; }
};
template <>
struct Storage<bf16> {
    using type = std::uint16_t;
    static constexpr ElementType element = ElementType::bfloat16;
    static std::uint16_t stored(float key) { return rounded_to<bf16>(key).bits; }
};
template <>
struct Storage<f16> {
    using type = std::uint16_t;
    static constexpr ElementType element = ElementType::float16;
    static std::uint16_t stored(float key) { return rounded_to<f16>(key).bits; }
};

template <class T>
float loaded(const typename Storage<T>::type* stored) {
    T key;
    std::memcpy(&key, stored, sizeof key);
    return to_float(key);
}

enum class Kind { random, ties, equal, rising };

float draw_key(Random& random, Kind kind, std::int64_t col) {
    if (kind == Kind::random) return static_cast<float>(draw(random, Numbers::real));
    if (kind == Kind::ties) return static_cast<float>(draw(random, Numbers::whole));
    return kind == Kind::equal ? 1.0f : static_cast<float>(col);
}

template <class T>
void check_rows(const RowTopkPlan& plan, std::int64_t n, int k, Kind kind, Random& random) {
    constexpr std::int64_t kRows = 2;
    Matrix<typename Storage<T>::type> keys(kRows, n, n + 3);
    for (std::int64_t row = 0; row < kRows; ++row)
        for (std::int64_t col = 0; col < n; ++col)
            keys.row(row)[col] = Storage<T>::stored(draw_key(random, kind, col));
    Buffer<typename Storage<T>::type> values(kRows * k);
    Buffer<std::int32_t> indices(kRows * k), passes(kRows);
    Buffer<std::uint64_t> workspace((row_topk_workspace(plan) + 7) / 8);
    const RowTopk call{keys.data(),   Storage<T>::element, kRows, n, keys.stride, k, values.data(), indices.data(),
                       passes.data(), workspace.data()};
    row_topk(call, plan, nullptr);

    for (std::int64_t row = 0; row < kRows; ++row) {
        std::vector<std::int32_t> order(n);
        for (std::int64_t i = 0; i < n; ++i) order[i] = static_cast<std::int32_t>(i);
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](std::int32_t i, std::int32_t j) {
            const float a = loaded<T>(keys.row(row) + i), b = loaded<T>(keys.row(row) + j);
            return above(a, b) || (!above(b, a) && i < j);
        });
        CHECK(passes[row] >= 1, row);
        for (int i = 0; i < k; ++i) {
            const std::int64_t at = row * k + i;
            CHECK(indices[at] == order[i] && loaded<T>(&values[at]) == loaded<T>(keys.row(row) + order[i]),
                  "place " << i << " of row " << row << ": index " << indices[at] << ", expected " << order[i]);
        }
    }
}

template <class T>
void check_type() {
    Random random(5);
    const int bytes = sizeof(T);
    for (const Kind kind : {Kind::random, Kind::ties, Kind::equal, Kind::rising}) {
        check_rows<T>(row_topk_plan(2, 5, 5, bytes, 4), 5, 5, kind, random);
        check_rows<T>(row_topk_plan(2, 611, 70, bytes, 4), 611, 70, kind, random);
        // A sample that serves, one that lets through too few, and parts with lists that have room and that have not.
        const std::int64_t n = kThreadSanitizer ? 1501 : 6001;
        for (const RowTopkPlan& plan : {RowTopkPlan{256, 30, 1, 0, 2, 0, 0}, RowTopkPlan{256, 1, 1, 0, 2, 0, 0},
                                        RowTopkPlan{256, 30, 3, 2048, 1, 0, 0}, RowTopkPlan{256, 60, 2, 64, 2, 0, 0}})
            check_rows<T>(plan, n, 100, kind, random);
    }
    // More candidates than shared memory has room for, of which there is a list or not.
    if (kThreadSanitizer) return;
    check_rows<T>({256, 250, 2, 8000, 2, 0, 0}, 8000, 1024, Kind::random, random);
    check_rows<T>({256, 250, 1, 0, 2, 0, 0}, 8000, 1024, Kind::ties, random);
}

NATIVE_TEST(row_topk) {
    in_several_orders(check_type<float>, kThreadSanitizer ? 1 : 2);
    check_type<bf16>();
    check_type<f16>();
}

}  // namespace
