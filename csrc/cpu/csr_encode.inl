// The kernels behind csr_encode.h, on those of screening.inl.

namespace sparsekern {
namespace {

// The rows of an encoder without experts, a block of them at a time, and their candidates.
struct Blocks {
    Workspace workspace;
    Screen screen;
    std::int64_t block_rows, block_latents;
    std::int64_t top = 0, count = 0;  // of the block at hand
    Places places = {};               // in it
    Row* rows;
    const float** sources;
    std::int8_t* xq;
    float* upper;
    std::int32_t* index;

    Blocks(const EncoderInput& input, const float* base, std::int64_t capacity, float slack)
        : screen{input, base, {}, 0, capacity, slack, 0, 0, {}} {
        const std::int64_t most_rows = std::max<std::int64_t>(1, kCandidateBytes / (8 * capacity));
        const std::int64_t blocks = (input.rows + most_rows - 1) / most_rows;
        block_rows = (input.rows + blocks - 1) / blocks;
        block_latents = latents_at_a_time(input);
        const std::int64_t most_places = block_rows + kTileRows - 1;
        rows = workspace.take<Row>(most_places);
        sources = workspace.take<const float*>(most_places);
        xq = workspace.take<std::int8_t>(most_places * padded_width(input.weights.d));
        upper = workspace.take<float>(block_rows * capacity + kPanel);
        index = workspace.take<std::int32_t>(block_rows * capacity + kPanel);
        screen.quantized = take_copy(input, workspace);
    }

    // Goes on to the next block; whether there is one. Its rows want all above `floor`.
    bool next(float floor) {
        top += count;
        if (top == screen.input.rows) return false;
        count = std::min(block_rows, screen.input.rows - top);
        places = places_of(nullptr, screen.input.weights.n, top, count, kTileRows, screen.input.threads);
        find_outliers(screen, top, count);
        enter_rows(screen, places, top, 1, rows, sources, xq, upper, index);
        for (std::int64_t b = 0; b < used(); ++b)
            if (rows[b].certain) rows[b].floor = floor;
        return true;
    }

    // Places in the block; those after `count` hold no row.
    std::int64_t used() const { return static_cast<std::int64_t>(places.slot.size()); }

    // Screens the latents [first, last) of the quantised copy at hand. `before` and `after` are called with each row's place:
    // in the same parallel loop, because each loop waits for the slowest thread.
    template <class Before, class After>
    void run(std::int64_t first, std::int64_t last, const Before& before, const After& after) {
        const std::int64_t meetings = static_cast<std::int64_t>(places.meetings.size());
        parallel_for(meetings, screen.input.threads, meetings, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t m = begin; m < end; ++m) {
                const Meeting& of = places.meetings[m];
                for (std::int64_t b = of.begin; b < of.end; ++b) before(b);
                screen_rows<Want::all_above>(screen, rows, xq, of, first, last, nullptr);
                for (std::int64_t b = of.begin; b < of.end; ++b) after(b);
            }
        });
    }

    Scoring scoring() {
        return {screen, rows, sources, used(), screen.capacity, 0, screen.input.weights.n, screen.input.threads};
    }

    void give_up_all() {
        for (std::int64_t b = 0; b < used(); ++b) give_up(rows[b]);
    }

    void report(std::uint8_t* certain) const {
        for (std::int64_t b = 0; b < count; ++b) certain[top + b] = rows[b].certain;
    }
};

// A row with more candidates than this is computed in full: one score costs rescoring several times what it costs a
// matrix product.
std::int64_t threshold_capacity(std::int64_t n) {
    return std::min(padded_latents(n), std::clamp<std::int64_t>(n / 8, 1024, 16384)) + 4 * kPanel;
}

std::int64_t threshold_encode(const EncoderInput& input, const float* threshold, ThresholdEntries& found,
                              std::uint8_t* certain) {
    const std::int64_t n = input.weights.n;
    const float largest_bias = input.bias ? largest_size(input.bias, n) : 0;
    // Scores less the threshold are screened against zero. What rounding can do to them beside their products goes with them.
    std::vector<float> base(n);
    for (std::int64_t i = 0; i < n; ++i) {
        const float size = std::fabs(input.bias_of(i)) + std::fabs(threshold[i]);
        base[i] = input.bias_of(i) - threshold[i];
        if (size <= std::numeric_limits<float>::max()) base[i] += 4e-7f * size;
    }
    const auto nothing = [](std::int64_t) {};
    Blocks blocks(input, base.data(), threshold_capacity(n), 1e-33f);
    std::int64_t rescored = 0;
    while (blocks.next(0)) {
        if (!(largest_bias < kLargest)) blocks.give_up_all();
        for (std::int64_t first = 0; first < n; first += blocks.block_latents) {
            const std::int64_t last = std::min(padded_latents(n), first + blocks.block_latents);
            quantize_block(blocks.screen, first, last);
            blocks.run(first, last, nothing, nothing);
        }
        Scoring scoring = blocks.scoring();
        if (!scoring.bounded()) blocks.give_up_all();
        for (std::int64_t b = 0; b < blocks.used(); ++b) blocks.rows[b].queued = blocks.rows[b].count;
        rescored += scoring.score();
        parallel_for(blocks.count, input.threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b) {
                const Row& row = blocks.rows[b];
                auto& entries = found.row(blocks.top + b);
                entries.resize(row.count + 1);
                std::int64_t kept = 0;
                for (std::int32_t c = 0; c < row.count; ++c) {  // by rising latent, as they were screened
                    entries[kept] = {row.index[c], row.upper[c]};
                    kept += row.upper[c] > threshold[row.index[c]];
                }
                entries.resize(kept);
            }
        });
        blocks.report(certain);
    }
    return rescored;
}

// A value that at least `count` values reach, close to the largest such; lowest where there are fewer. `each` calls what it
// is given with every value. By the 24 highest bits of their keys, because values may differ by powers of ten.
template <class Each>
float reached_by(std::int64_t count, const Each& each) {
    constexpr int kBits = 12;
    constexpr std::uint32_t kBins = 1u << kBits;
    std::vector<std::int64_t> bins(kBins);
    std::uint32_t prefix = 0;
    for (int shift = 32 - kBits; shift >= 32 - 2 * kBits; shift -= kBits) {
        std::fill(bins.begin(), bins.end(), 0);
        each([&](float value) {
            const std::uint32_t key = ordered(value) >> shift;
            bins[key % kBins] += key >> kBits == prefix;
        });
        std::uint32_t bin = kBins - 1;
        for (; bin > 0 && bins[bin] < count; --bin) count -= bins[bin];
        if (bins[bin] < count) return std::numeric_limits<float>::lowest();
        prefix = prefix << kBits | bin;
    }
    return unordered(prefix << (32 - 2 * kBits));
}

// One floor serves all rows: what as many scores as are wanted certainly reach, wherever in the batch. It is raised each
// time that as many latents again have been screened.
struct BatchTopk {
    Blocks& blocks;
    BatchLargest& found;
    float* lower;  // [used, capacity]: what the candidates certainly reach; half as much memory again

    Row& row(std::int64_t b) const { return blocks.rows[b]; }
    float* lower_of(std::int64_t b) const { return lower + b * blocks.screen.capacity; }

    // The most that float32 rounding can have changed an exact score of this row by.
    float error(const Row& row, std::int64_t i) const {
        return blocks.screen.quantized.norm[i] * row.rounding + blocks.screen.slack;
    }

    // What the first size(row) of the rows' lower bounds, and the entries found in earlier blocks, reach as often as
    // entries are wanted.
    template <class Size>
    float reached(const Size& size) const {
        return reached_by(found.count(), [&](const auto& visit) {
            for (std::int64_t b = 0; b < blocks.count; ++b) std::for_each_n(lower_of(b), size(row(b)), visit);
            for (const BatchLargest::Entry& e : found.entries()) visit(e.score - e.error);
        });
    }

    // Drops what the floor, as it now stands, leaves out.
    void thin(std::int64_t b) const {
        row(b).floor = std::max(row(b).floor, found.floor());
        drop(row(b));
    }

    void screen() {
        const std::int64_t latents = padded_latents(blocks.screen.input.weights.n);
        std::int64_t tidy_at = kFirstTidy;
        for (std::int64_t first = 0; first < latents; first += blocks.block_latents) {
            const std::int64_t last = std::min(latents, first + blocks.block_latents);
            quantize_block(blocks.screen, first, last);
            for (std::int64_t at = first; at < last;) {
                const std::int64_t until = std::min(last, tidy_at);
                blocks.run(
                    at, until, [&](std::int64_t b) { thin(b); },
                    [&](std::int64_t b) { lower_bounds(blocks.screen, row(b), 2, lower_of(b)); });
                at = until;
                if (at < tidy_at && at < latents) continue;
                tidy_at *= 2;
                found.raise(reached([](const Row& row) { return row.count; }));
            }
        }
    }

    // From the candidates to entries; returns how many were scored.
    std::int64_t rescore() {
        Scoring scoring = blocks.scoring();
        if (!scoring.bounded()) blocks.give_up_all();
        const auto each = [&](const auto& body) {
            scoring.each_range([&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t b = begin; b < end; ++b) body(b, row(b));
            });
        };
        // First those that look best: what they reach will spare most of the others.
        each([&](std::int64_t b, Row& row) {
            thin(b);
            lower_bounds(blocks.screen, row, 1, lower_of(b));
        });
        const float good = reached([](const Row& row) { return row.count; });
        each([&](std::int64_t b, Row& row) {
            for (std::int32_t c = 0; c < row.count; ++c) {  // swapped in any case: no branch to guess
                std::swap(row.upper[row.queued], row.upper[c]);
                std::swap(row.index[row.queued], row.index[c]);
                row.queued += lower_of(b)[c] >= good;
            }
        });
        std::int64_t total = scoring.score();
        each([&](std::int64_t b, Row& row) {
            for (std::int32_t c = 0; c < row.scored; ++c) lower_of(b)[c] = row.upper[c] - error(row, row.index[c]);
        });
        found.raise(reached([](const Row& row) { return row.scored; }));
        each([&](std::int64_t, Row& row) {
            for (std::int32_t c = row.scored; c < row.count; ++c) {
                const float upper = row.upper[c];
                const std::int32_t index = row.index[c];
                row.upper[row.queued] = upper;
                row.index[row.queued] = index;
                row.queued += upper >= found.floor();
            }
        });
        total += scoring.score();
        for (std::int64_t b = 0; b < blocks.count; ++b)
            for (std::int32_t c = 0; c < row(b).scored; ++c) {
                const float score = row(b).upper[c], off = error(row(b), row(b).index[c]);
                if (score + off >= found.floor()) found.add({blocks.top + b, row(b).index[c], score, off});
            }
        found.select();
        return total;
    }
};

std::int64_t batch_topk_encode(const EncoderInput& input, BatchLargest& found, std::uint8_t* certain) {
    const std::int64_t n = input.weights.n, average = found.count() / input.rows;
    const std::int64_t capacity =
        std::min(padded_latents(n), std::max<std::int64_t>({4096, 32 * average, 4 * input.weights.d})) + 4 * kPanel;
    const float largest_bias = input.bias ? largest_size(input.bias, n) : 0;
    Blocks blocks(input, input.bias, capacity, 4e-7f * largest_bias + 1e-33f);
    BatchTopk work{blocks, found, blocks.workspace.take<float>((blocks.block_rows + kTileRows) * capacity)};
    std::int64_t rescored = 0;
    while (blocks.next(found.floor())) {
        if (!(largest_bias < kLargest)) blocks.give_up_all();
        work.screen();
        rescored += work.rescore();
        blocks.report(certain);
    }
    found.bound_weights(blocks.screen.quantized.norm);
    return rescored;
}

}  // namespace

const CsrEncode* SPARSEKERN_JOIN(csr_encode_, SPARSEKERN_ISA)() {
    static const CsrEncode table = {threshold_encode, batch_topk_encode};
    return &table;
}

}  // namespace sparsekern
