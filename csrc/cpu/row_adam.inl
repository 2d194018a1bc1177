// The kernels behind row_adam.h, written once as plain loops.

namespace sparsekern {
namespace {

// row = G[i]; returns whether any slot points to it. Never inlined, for the same bits in the norm and in the update.
[[gnu::noinline]] bool gradient_row(const RowGradient& g, std::int64_t i, float* __restrict row) {
    bool any = false;
    for (std::int64_t p = 0; p < g.count; ++p) {
        const OuterProducts& part = g.parts[p];
        const std::int32_t* slot = part.slots.order + part.slots.start[i];
        const std::int32_t* end = part.slots.order + part.slots.start[i + 1];
        if (slot == end) continue;
        if (!any) std::memset(row, 0, g.d * sizeof(float));
        any = true;
        for (; slot + 4 <= end; slot += 4) {
            const float v0 = part.values[slot[0]], v1 = part.values[slot[1]];
            const float v2 = part.values[slot[2]], v3 = part.values[slot[3]];
            const float* x0 = part.vector(slot[0]);
            const float* x1 = part.vector(slot[1]);
            const float* x2 = part.vector(slot[2]);
            const float* x3 = part.vector(slot[3]);
#pragma omp simd
            for (std::int64_t c = 0; c < g.d; ++c) row[c] += (v0 * x0[c] + v1 * x1[c]) + (v2 * x2[c] + v3 * x3[c]);
        }
        for (; slot < end; ++slot) {
            const float v = part.values[*slot];
            const float* x = part.vector(*slot);
#pragma omp simd
            for (std::int64_t c = 0; c < g.d; ++c) row[c] += v * x[c];
        }
    }
    if (any && g.unit_rows) {
        const float* w = g.weight + i * g.d;
        const float along = dot(w, row, g.d);
#pragma omp simd
        for (std::int64_t c = 0; c < g.d; ++c) row[c] -= along * w[c];
    }
    return any;
}

void gradient_squares(const RowGradient& g, float* squares, int threads) {
    parallel_for(g.n, threads, kPartsPerThread * threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> row(g.d);
        for (std::int64_t i = begin; i < end; ++i)
            squares[i] = gradient_row(g, i, row.data()) ? dot(row.data(), row.data(), g.d) : 0;
    });
}

// One row of Adam. `gradient` is nullptr for a row without one. Returns the square of the new norm.
template <bool kGradient>
float adam_row(const RowAdam& a, const float* gradient, float* __restrict w, float* __restrict m, float* __restrict v) {
    const float beta1 = a.beta1, beta2 = a.beta2, scale = a.scale, rate = a.rate, eps = a.eps, inverse = 1 / a.root;
    float norm = 0;
#pragma omp simd reduction(+ : norm)
    for (std::int64_t c = 0; c < a.gradient.d; ++c) {
        float mean, square;
        if (kGradient) {
            const float g = scale * gradient[c];
            mean = m[c] + (g - m[c]) * (1 - beta1);
            square = beta2 * v[c] + (1 - beta2) * g * g;
        } else {
            mean = m[c] - m[c] * (1 - beta1);
            square = beta2 * v[c];
        }
        m[c] = mean;
        v[c] = square;
        const float value = w[c] - rate * mean / (std::sqrt(square) * inverse + eps);
        w[c] = value;
        norm += value * value;
    }
    return norm;
}

void decay_row(const RowAdam& a, float* m, float* v, std::int32_t missed) {
    const float decay1 = std::pow(a.beta1, static_cast<float>(missed));
    const float decay2 = std::pow(a.beta2, static_cast<float>(missed));
    for (std::int64_t c = 0; c < a.gradient.d; ++c) {
        m[c] *= decay1;
        v[c] *= decay2;
    }
}

void adam(const RowAdam& a, int threads) {
    const std::int64_t n = a.gradient.n, d = a.gradient.d, width = padded_width(d);
    const std::int64_t groups = (n + kGroup - 1) / kGroup;
    parallel_for(groups, threads, kPartsPerThread * threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> gradient(d);
        std::vector<std::uint8_t> bytes(kGroup * width, 128);
        for (std::int64_t group = begin; group < end; ++group) {
            const std::int64_t first = group * kGroup, last = std::min(n, first + kGroup);
            bool changed = false;
            for (std::int64_t i = first; i < last; ++i) {
                const bool any = gradient_row(a.gradient, i, gradient.data());
                if (a.squares) a.squares[i] = any ? dot(gradient.data(), gradient.data(), d) : 0;
                float *w = a.weight + i * d, *m = a.mean + i * d, *v = a.square + i * d;
                if (a.last) {
                    if (any) a.active[i] = a.step;
                    if (a.step - a.active[i] >= a.rest_after) continue;
                    if (a.last[i] < a.step - 1) decay_row(a, m, v, a.step - 1 - a.last[i]);
                    a.last[i] = a.step;
                }
                changed = true;
                const float square =
                    any ? adam_row<true>(a, gradient.data(), w, m, v) : adam_row<false>(a, nullptr, w, m, v);
                if (a.gradient.unit_rows) {
                    const float inverse = 1 / std::max(std::sqrt(square), std::numeric_limits<float>::min());
#pragma omp simd
                    for (std::int64_t c = 0; c < d; ++c) w[c] *= inverse;
                }
            }
            if (changed && a.quantized) {
                // The last group may not be full; what the group before it left there is no row.
                std::fill(bytes.begin() + (last - first) * width, bytes.end(), 128);
                for (std::int64_t i = first; i < last; ++i)
                    quantize_row(a.weight + i * d, d, bytes.data() + (i - first) * width, *a.quantized, i);
                pack_group(bytes.data(), width, a.quantized->packed, first);
            }
        }
    });
}

}  // namespace

const RowUpdates* SPARSEKERN_JOIN(row_updates_, SPARSEKERN_ISA)() {
    static const RowUpdates table = {gradient_squares, adam};
    return &table;
}

}  // namespace sparsekern
