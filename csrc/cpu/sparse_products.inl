// The kernels behind sparse_products.h, written once as plain loops and compiled once for each instruction set: the
// including file sets the compiler's target and names SPARSEKERN_ISA. Everything lives in an unnamed namespace, so no
// function built for one instruction set can be linked in place of another's.

namespace sparsekern {
namespace {

// More parts than threads: a thread that was held up gets fewer of them.
constexpr std::int64_t kPartsPerThread = 8;

// Latent rows that are combined while one output row is held: fewer trips of the output through the L1 cache.
constexpr std::int64_t kUnroll = 4;

template <class T>
void decode_row(const std::int32_t* index, const T* values, std::int64_t k, const T* weight, std::int64_t weight_stride,
                const T* bias, T* __restrict out, std::int64_t d) {
    if (bias)
        std::memcpy(out, bias, d * sizeof(T));
    else
        std::memset(out, 0, d * sizeof(T));
    std::int64_t j = 0;
    for (; j + kUnroll <= k; j += kUnroll) {
        const T* w0 = weight + index[j] * weight_stride;
        const T* w1 = weight + index[j + 1] * weight_stride;
        const T* w2 = weight + index[j + 2] * weight_stride;
        const T* w3 = weight + index[j + 3] * weight_stride;
        const T v0 = values[j], v1 = values[j + 1], v2 = values[j + 2], v3 = values[j + 3];
#pragma omp simd
        for (std::int64_t c = 0; c < d; ++c) out[c] += (v0 * w0[c] + v1 * w1[c]) + (v2 * w2[c] + v3 * w3[c]);
    }
    for (; j < k; ++j) {
        const T* w = weight + index[j] * weight_stride;
        const T v = values[j];
#pragma omp simd
        for (std::int64_t c = 0; c < d; ++c) out[c] += v * w[c];
    }
}

// The first row of which `work(b)`, what lies before row b, is at least `share`; `rows` where there is none.
template <class Work>
std::int64_t row_at(std::int64_t share, std::int64_t rows, const Work& work) {
    std::int64_t low = 0, high = rows;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (work(middle) < share) low = middle + 1; else high = middle;
    }
    return low;
}

template <class T>
void sparse_decode(const Codes& codes, const T* values, const T* weight, std::int64_t weight_stride, const T* bias,
                   T* out, std::int64_t d, int threads) {
    if (d == 0) return;  // no memory to write to
    threads = useful_threads(2.0 * codes.slots() * d, threads);
    // Parts hold equal shares of the work, where an output row counts as one slot. A row that lies in several parts is
    // shared by columns, so that each element is still one sum in one order.
    const auto work = [=](std::int64_t b) { return codes.begin(b) + b; };
    parallel_for(work(codes.rows), threads, kPartsPerThread * threads, [=](std::int64_t begin, std::int64_t end) {
        if (begin == end) return;
        for (std::int64_t b = row_at(begin + 1, codes.rows, work) - 1; b < codes.rows && work(b) < end; ++b) {
            const std::int64_t first = codes.begin(b), slots = codes.begin(b + 1) - first;
            const auto column = [=](std::int64_t share) {  // in whole cache lines
                const std::int64_t inside = std::min(std::max<std::int64_t>(share - work(b), 0), slots + 1);
                return inside == slots + 1 ? d : d * inside / (slots + 1) / 16 * 16;
            };
            const std::int64_t left = column(begin), right = column(end);
            decode_row(codes.index + first, values + first, slots, weight + left, weight_stride,
                       bias ? bias + left : nullptr, out + b * d + left, right - left);
        }
    });
}

template <class T>
T dot(const T* a, const T* b, std::int64_t d) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < d; ++c) sum += a[c] * b[c];
    return sum;
}

template <class T>
void gather_dot(const Codes& codes, const T* weight, std::int64_t weight_stride, const T* grad,
                std::int64_t grad_stride, T* out, std::int64_t d, int threads) {
    threads = useful_threads(2.0 * codes.slots() * d, threads);
    parallel_for(codes.slots(), threads, kPartsPerThread * threads, [=](std::int64_t begin, std::int64_t end) {
        std::int64_t b = row_at(begin + 1, codes.rows, [=](std::int64_t row) { return codes.begin(row); }) - 1;
        for (std::int64_t s = begin; s < end; ++b)
            for (const std::int64_t last = std::min(end, codes.begin(b + 1)); s < last; ++s)
                out[s] = dot(weight + codes.index[s] * weight_stride, grad + b * grad_stride, d);
    });
}

template <class T>
void scatter_outer(const Codes& codes, const T* values, const T* grad, std::int64_t grad_stride, T* out,
                   std::int64_t d, int threads) {
    if (d == 0) return;
    // Counting sort of the slots by latent (compressed columns): slots of latent i are sorted[start[i]..start[i + 1]),
    // ascending, so that each output row is summed by one thread in a fixed order.
    struct Slot {
        T value;
        std::int32_t row;
    };
    const std::int64_t slots = codes.slots();
    std::vector<std::int64_t> start(codes.d_sae + 1, 0);
    for (std::int64_t s = 0; s < slots; ++s) ++start[codes.index[s] + 1];
    for (std::int64_t i = 0; i < codes.d_sae; ++i) start[i + 1] += start[i];
    std::vector<std::int64_t> next(start.begin(), start.end() - 1);
    std::vector<Slot> sorted(slots);
    for (std::int64_t b = 0; b < codes.rows; ++b)
        for (std::int64_t s = codes.begin(b); s < codes.begin(b + 1); ++s)
            sorted[next[codes.index[s]]++] = {values[s], static_cast<std::int32_t>(b)};

    threads = useful_threads(2.0 * slots * d + 0.25 * codes.d_sae * d, threads);
    // Parts hold equal shares of the work, not of the rows: frequencies are far from even. Clearing a row of fresh memory
    // costs as much as adding several slots to it.
    constexpr std::int64_t kRowCost = 6;
    const std::int64_t total = slots + kRowCost * codes.d_sae;
    const auto latent_at = [&](std::int64_t share) {
        return row_at(share, codes.d_sae, [&](std::int64_t i) { return start[i] + kRowCost * i; });
    };
    parallel_for(total, threads, [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t last = end == total ? codes.d_sae : latent_at(end);
        for (std::int64_t i = latent_at(begin); i < last; ++i) {
            T* __restrict row = out + i * d;
            std::memset(row, 0, d * sizeof(T));
            for (std::int64_t p = start[i]; p < start[i + 1]; ++p) {
                const T v = sorted[p].value;
                const T* g = grad + sorted[p].row * grad_stride;
#pragma omp simd
                for (std::int64_t c = 0; c < d; ++c) row[c] += v * g[c];
            }
        }
    });
}

template <class T>
const SparseProducts<T>* table() {
    static const SparseProducts<T> products = {sparse_decode<T>, gather_dot<T>, scatter_outer<T>};
    return &products;
}

}  // namespace

template <class T>
const SparseProducts<T>* SPARSEKERN_JOIN(sparse_products_, SPARSEKERN_ISA)() {
    return table<T>();
}
template const SparseProducts<float>* SPARSEKERN_JOIN(sparse_products_, SPARSEKERN_ISA)<float>();
template const SparseProducts<double>* SPARSEKERN_JOIN(sparse_products_, SPARSEKERN_ISA)<double>();

}  // namespace sparsekern
