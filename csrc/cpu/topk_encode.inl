// The kernels behind topk_encode.h, on those of screening.inl.

namespace sparsekern {
namespace {

// A score, or its size, with its latent, as one number: larger for larger scores, and for the lower of tied latents. The
// lowest bit says whether the size is that of a negative score.
struct Scored {
    std::uint64_t key = 0;

    Scored() = default;
    Scored(float score, std::int32_t index, bool negative) {
        const std::uint32_t bits = ordered(score + 0.0f);  // of two zeros the positive one
        key = std::uint64_t{bits} << 32 | (0xfffffffeu - 2 * static_cast<std::uint32_t>(index)) | negative;
    }
    float score() const { return unordered(static_cast<std::uint32_t>(key >> 32)); }
    bool negative() const { return key & 1; }
    std::int32_t index() const { return static_cast<std::int32_t>((0xffffffffu - static_cast<std::uint32_t>(key)) / 2); }
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

// From the candidates of some rows (or slots) to their k largest.
struct Rescoring : Scoring {
    const EncodeArgs& args;
    const std::int32_t* places;  // of the results, from `top` on; -1 where there is none
    std::int64_t top;

    // Queues, which score() scores next, come behind the scored. First the k that look best: what they reach will spare
    // most of the others.
    void queue_best() const {
        const std::int64_t k = args.k;
        each_row([&](Row& row, float* scratch) {
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
        each_row([&](Row& row, float* scratch) {
            scored_sizes(row, scratch);
            std::nth_element(scratch, scratch + (args.k - 1), scratch + row.scored, std::greater<float>());
            row.floor = std::max(row.floor, scratch[args.k - 1]);
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

    // What the exact scores of the scored are compared by.
    void scored_sizes(const Row& row, float* __restrict out) const {
        if (args.absolute)
            std::transform(row.upper, row.upper + row.scored, out, [](float score) { return std::fabs(score); });
        else
            std::copy(row.upper, row.upper + row.scored, out);
    }

    // Writes the k largest of the scored.
    void select() const {
        each_range([&](std::int64_t begin, std::int64_t end) {
            std::vector<float> size(capacity);
            std::vector<Scored> scored;
            for (std::int64_t b = begin; b < end; ++b)
                if (rows[b].certain) select(b, size.data(), scored);
        });
    }

    void select(std::int64_t b, float* size, std::vector<Scored>& scored) const {
        const Row& row = rows[b];
        const std::int64_t k = args.k, first = (top + places[b]) * k;
        scored_sizes(row, size);
        const float reach = resolution(row);
        const float least = reached_by(k, size, row.scored) - reach;  // leaves few beside the k
        scored.resize(row.scored);
        std::int64_t kept = 0;
        for (std::int32_t c = 0; c < row.scored; ++c) {
            scored[kept] = Scored(size[c], row.index[c], args.absolute && row.upper[c] < 0);
            kept += size[c] >= least;
        }
        scored.resize(kept);
        if (kept > k) {
            std::nth_element(scored.begin(), scored.begin() + (k - 1), scored.end(), before);
            settle_near_ties(inputs[b], reach, scored);
        }
        sort_first(k, scored);
        for (std::int64_t j = 0; j < k; ++j) {
            const float score = scored[j].score();
            args.values[first + j] = args.absolute ? (scored[j].negative() ? -score : score) : std::max(score, 0.0f);
            args.index[first + j] = scored[j].index();
        }
    }

    // From the candidates to the results; returns how many were scored.
    std::int64_t run() {
        if (!bounded())
            for (std::int64_t b = 0; b < count; ++b) give_up(rows[b]);
        std::int64_t total = 0;
        if (!args.experts || args.experts->screened) {
            queue_best();
            total += score();
            queue_rest();
            total += score();
        }
        select();
        for (std::int64_t b = 0; b < count; ++b)
            if (places[b] >= 0) args.certain[top + places[b]] = rows[b].certain;
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
        const float kth = scored[args.k - 1].score();
        const auto near = [&](const Scored& s) { return std::fabs(s.score() - kth) <= reach; };
        const auto above = [&](const Scored& s) { return s.score() > kth && !near(s); };
        const auto ties = std::partition(scored.begin(), scored.end(), above);
        const auto rest = std::partition(ties, scored.end(), near);
        const std::int64_t open = args.k - (ties - scored.begin());
        if (rest - ties <= open) return;
        std::vector<std::pair<double, Scored>> exact;
        for (auto s = ties; s != rest; ++s) {
            const double score =
                exact_dot(args.input.weights.row(s->index()), x, args.input.weights.d) + args.input.bias_of(s->index());
            exact.push_back({args.absolute ? std::fabs(score) : score, *s});
        }
        std::sort(exact.begin(), exact.end(), [](const auto& a, const auto& b) {
            return a.first > b.first || (a.first == b.first && a.second.index() < b.second.index());
        });
        std::transform(exact.begin(), exact.end(), ties, [](const auto& e) { return e.second; });
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The whole

// In place of screening: scores the rows' latents in float32, as candidates that need no rescoring.
void score_rows(const Screen& screen, Row* rows, const float* const* x, const Meeting& of, bool first) {
    const Weights& w = screen.input.weights;
    for (std::int64_t i = of.low; i < of.high; ++i) {
        const float* weight = w.row(i);
        if (first) screen.quantized.norm[i] = length(weight, w.d);
        for (std::int64_t b = of.begin; b < of.end; ++b) {
            Row& row = rows[b];
            row.upper[row.count] =
                dot(weight, x[b], w.d, weight, x[b + 1 < of.end ? b + 1 : of.begin]) + screen.input.bias_of(i);
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

std::int64_t encode(const EncodeArgs& args) {
    const EncoderInput& input = args.input;
    const std::int64_t n = input.weights.n, d = input.weights.d, width = padded_width(d), latents = padded_latents(n);
    const Experts* experts = args.experts;
    const std::int64_t active = experts ? experts->active : 1, share = n / (experts ? experts->count : 1);
    const bool screened = !experts || experts->screened, merged = active > 1 && !experts->apart;
    const std::int64_t tile = screened ? kTileRows : 1;
    const std::int64_t met = std::min(latents, padded_latents(share) + kPanel);  // an expert may begin within a panel
    const std::int64_t capacity =
        screened ? std::min(met, std::max<std::int64_t>({4096, 32 * args.k, 4 * d})) + 4 * kPanel : share;
    const float largest_bias = input.bias ? largest_size(input.bias, n) : 0;
    Screen screen{input, input.bias, {}, 0, capacity, 4e-7f * largest_bias + 1e-33f, args.k, 0, {}};

    const std::int64_t most_rows = std::max<std::int64_t>(1, kCandidateBytes / (8 * screen.capacity * active));
    const std::int64_t blocks = (input.rows + most_rows - 1) / most_rows;
    const std::int64_t block_rows = (input.rows + blocks - 1) / blocks, block_slots = block_rows * active;
    const std::int64_t most_places =
        block_slots + (tile - 1) * std::min(experts ? experts->count : 1, block_slots);
    const std::int64_t block_latents = screened ? latents_at_a_time(input) : latents;
    Workspace workspace;
    const auto rows = workspace.take<Row>(most_places);  // by place; then, where slots are merged, by row
    const auto by_slot = workspace.take<Row>(merged ? block_slots : 0);
    const auto sources = workspace.take<const float*>(most_places);
    const auto xq = screened ? workspace.take<std::int8_t>(most_places * width) : nullptr;
    const auto upper = workspace.take<float>(block_slots * screen.capacity + kPanel);
    const auto index = workspace.take<std::int32_t>(block_slots * screen.capacity + kPanel);
    if (screened) {
        screen.quantized = take_copy(input, workspace);
    } else {
        screen.quantized.norm = workspace.take<float>(latents);
        std::fill_n(screen.quantized.norm, latents, 0.0f);
    }

    std::atomic<std::int64_t> rescored{0};
    for (std::int64_t top = 0; top < input.rows; top += block_rows) {
        const std::int64_t count = std::min(block_rows, input.rows - top), slots = count * active;
        const Places places = places_of(experts, n, top * active, slots, tile, input.threads);
        const std::int64_t used = static_cast<std::int64_t>(places.slot.size());
        const std::int64_t meetings = static_cast<std::int64_t>(places.meetings.size());
        if (screened) find_outliers(screen, top, count);
        enter_rows(screen, places, top, active, rows, sources, xq, upper, index);
        if (!(largest_bias < kLargest))
            for (std::int64_t p = 0; p < used; ++p) give_up(rows[p]);
        const bool by_expert = experts && !merged;
        const auto rescore = [&](const Meeting& of) {
            Scoring part{screen,  rows + of.begin, sources + of.begin, of.end - of.begin, screen.capacity, of.low,
                         of.high, 1};
            rescored += Rescoring{part, args, places.slot.data() + of.begin, top * active}.run();
        };
        for (std::int64_t first = 0; first < latents; first += block_latents) {
            const std::int64_t last = std::min(latents, first + block_latents);
            if (screened) quantize_block(screen, first, last);
            parallel_for(meetings, input.threads, meetings, [&](std::int64_t begin, std::int64_t end) {
                std::vector<float> scratch(screen.capacity);
                for (std::int64_t m = begin; m < end; ++m) {
                    const Meeting& of = places.meetings[m];
                    if (screened && args.absolute)
                        screen_rows<Want::largest_sizes>(screen, rows, xq, of, first, last, scratch.data());
                    else if (screened)
                        screen_rows<Want::largest>(screen, rows, xq, of, first, last, scratch.data());
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
            parallel_for(count, input.threads, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t b = begin; b < end; ++b) {
                    rows[b] = merge(by_slot + b * active, active);
                    sources[b] = input.row(top + b);
                }
            });
            std::vector<std::int32_t> itself(count);
            std::iota(itself.begin(), itself.end(), 0);
            Scoring whole{screen, rows, sources, count, screen.capacity * active, 0, n, input.threads};
            rescored += Rescoring{whole, args, itself.data(), top}.run();
        } else if (!experts) {
            Scoring whole{screen, rows, sources, used, screen.capacity, 0, n, input.threads};
            rescored += Rescoring{whole, args, places.slot.data(), top}.run();
        } else if (!screened || block_latents < latents) {
            parallel_for(meetings, input.threads, meetings, [&](std::int64_t begin, std::int64_t end) {
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
