// The nearest rows of bits, for many rows against many; included by bits.inl.
//
// A slice is one bit position of kSliceRows rows of b, and the slices of all positions are a panel. Rows of a are taken
// `Group` at a time. These give each position one of 2^(Group - 1) classes: which of them differ there from the first. The
// slices, each complemented where the first row has a one, show which rows of b differ from that row. Those of a class are
// added up once for the whole group, in numbers whose binary digits are slices, each lane counting for its own row of b.
// The sum of all classes is the distance from the first row. Row r differs from b where the first row does not in just the
// classes whose bit is set for r: with s the sum of these, and d the positions in them, its distance is the first row's
// + d - 2s. The sums s share most of their additions (the method of the Four Russians, Arlazarov et al. 1970, with rows in
// the place of columns).
//
// A full adder, two operations where three-way logic is one, makes two slices of three. So n positions are counted in at
// most 2n operations, and C = 2^(Group - 1) classes added up in 2 (2C - Group - 1) for each digit. For 4,096 positions,
// groups of eight and 512 rows in a slice these are 2.0 and 1.1 operations a pair, where xor, popcnt and add are 24. A panel
// and its complement, 512 KB, stay in the second-level cache, from which each slice comes once for each group: at half a
// slice a cycle that takes two cycles a pair, and bounds the whole.

namespace sparsekern {
namespace {

#if SPARSEKERN_LEVEL == 0

constexpr int kSliceWords = 2;
struct Slice {
    std::uint64_t word[kSliceWords];
};
inline Slice load_slice(const std::uint64_t* from) { return {{from[0], from[1]}}; }
inline void store_slice(std::uint64_t* to, const Slice& a) { to[0] = a.word[0], to[1] = a.word[1]; }
inline Slice slice_of(bool bit) { return {{0 - std::uint64_t{bit}, 0 - std::uint64_t{bit}}}; }
inline Slice parity(const Slice& a, const Slice& b, const Slice& c) {
    return {{a.word[0] ^ b.word[0] ^ c.word[0], a.word[1] ^ b.word[1] ^ c.word[1]}};
}
inline Slice majority(const Slice& a, const Slice& b, const Slice& c) {
    return {{(a.word[0] & b.word[0]) | ((a.word[0] ^ b.word[0]) & c.word[0]),
             (a.word[1] & b.word[1]) | ((a.word[1] ^ b.word[1]) & c.word[1])}};
}

#elif SPARSEKERN_LEVEL == 1

constexpr int kSliceWords = 4;
using Slice = __m256i;
inline Slice load_slice(const std::uint64_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store_slice(std::uint64_t* to, Slice a) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), a); }
inline Slice slice_of(bool bit) { return _mm256_set1_epi64x(bit ? -1 : 0); }
inline Slice parity(Slice a, Slice b, Slice c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Slice majority(Slice a, Slice b, Slice c) {
    return _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(_mm256_xor_si256(a, b), c));
}

#else

constexpr int kSliceWords = 8;
using Slice = __m512i;
inline Slice load_slice(const std::uint64_t* from) { return _mm512_load_si512(from); }
inline void store_slice(std::uint64_t* to, Slice a) { _mm512_store_si512(to, a); }
inline Slice slice_of(bool bit) { return _mm512_set1_epi64(bit ? -1 : 0); }
inline Slice parity(Slice a, Slice b, Slice c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Slice majority(Slice a, Slice b, Slice c) { return _mm512_ternarylogic_epi64(a, b, c, 0xe8); }

#endif

constexpr std::int64_t kSliceRows = 64 * kSliceWords;

// Leaves the lower digit of a + b + c in a and returns the higher one.
inline Slice add_slices(Slice& a, const Slice& b, const Slice& c) {
    const Slice carry = majority(a, b, c);
    a = parity(a, b, c);
    return carry;
}

// Returns the lower digit, and leaves the higher one in `carry`.
inline Slice add_digits(const Slice& a, const Slice& b, Slice& carry) {
    const Slice sum = parity(a, b, carry);
    carry = majority(a, b, carry);
    return sum;
}

// Binary digits that numbers up to n have.
inline int digits(std::int64_t n) {
    int found = 0;
    for (; n; n >>= 1) ++found;
    return found;
}

// Bit c of byte r of a word becomes bit r of byte c.
inline std::uint64_t transpose_bytes(std::uint64_t x) {
    std::uint64_t swap = (x ^ (x >> 7)) & 0x00aa00aa00aa00aau;
    x ^= swap ^ (swap << 7);
    swap = (x ^ (x >> 14)) & 0x0000cccc0000ccccu;
    x ^= swap ^ (swap << 14);
    swap = (x ^ (x >> 28)) & 0x00000000f0f0f0f0u;
    return x ^ swap ^ (swap << 28);
}

// Likewise of 64 slices, in each of their words on its own.
inline void transpose(std::uint64_t* slices) {
    std::uint64_t mask = 0x00000000ffffffffu;
    for (int step = 32; step; step >>= 1, mask ^= mask << step)
        for (int top = 0; top < 64; top += 2 * step)
            for (int i = top; i < top + step; ++i) {
                std::uint64_t *x = slices + i * kSliceWords, *y = x + step * kSliceWords;
#pragma omp simd
                for (int word = 0; word < kSliceWords; ++word) {
                    const std::uint64_t swap = ((x[word] >> step) ^ y[word]) & mask;
                    x[word] ^= swap << step;
                    y[word] ^= swap;
                }
            }
}

// Rows of b as panels of slices, a block of panels at a time.
struct SlicePanels {
    const BitRows& b;
    std::int64_t columns, stride, most_panels;  // stride: words of a panel
    Workspace workspace;
    std::uint64_t* packed;

    explicit SlicePanels(const BitRows& b) : b(b), columns(32 * b.words), stride(columns * kSliceWords) {
        const std::int64_t all = (b.rows + kSliceRows - 1) / kSliceRows;
        most_panels = std::max<std::int64_t>(1, std::min(all, BitPanels::kBytes / (8 * stride)));
        packed = workspace.take<std::uint64_t>(most_panels * stride);
    }

    // A panel and its complement, and a slice of zeros.
    void copy(std::int64_t p, std::uint64_t* to) const {
        const std::uint64_t* from = packed + p * stride;
        for (std::int64_t i = 0; i < stride; ++i) to[i] = from[i];
        for (std::int64_t i = 0; i < stride; ++i) to[stride + i] = ~to[i];
        std::fill_n(to + 2 * stride, kSliceWords, 0);
    }

    // Packs the rows from `top` on; how many panels there are.
    std::int64_t pack(std::int64_t top, int threads) {
        const std::int64_t rows = std::min(b.rows - top, most_panels * kSliceRows);
        const std::int64_t panels = (rows + kSliceRows - 1) / kSliceRows;
        parallel_for(panels, useful_threads(16.0 * rows * b.words, threads), [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t p = begin; p < end; ++p) pack_panel(top + p * kSliceRows, packed + p * stride);
        });
        return panels;
    }

    void pack_panel(std::int64_t first, std::uint64_t* to) const {
        constexpr std::int64_t kWords = 16;  // of a row at a time: a cache line
        alignas(64) std::uint64_t squares[kWords / 2][64 * kSliceWords];
        for (std::int64_t left = 0; left < b.words; left += kWords) {
            const std::int64_t words = std::min(kWords, b.words - left);
            for (std::int64_t r = 0; r < kSliceRows; ++r) {
                std::uint64_t line[kWords / 2] = {};
                if (first + r < b.rows) std::memcpy(line, b.row(first + r) + 4 * left, 4 * words);
                for (int i = 0; i < kWords / 2; ++i) squares[i][r % 64 * kSliceWords + r / 64] = line[i];
            }
            for (auto& square : squares) transpose(square);
            std::copy_n(squares[0], 32 * words * kSliceWords, to + 32 * left * kSliceWords);
        }
    }
};

// Slices that are added at a time, and the most of them in a number of kRunDigits.
constexpr std::int64_t kStep = 8, kRun = 56;
constexpr int kRunDigits = 6;

// Classes that are added up in registers, 2^kFirstLevel.
constexpr int kFirstLevel = 3;

// Positions by class, for a group of rows of a. The list of a class is padded with the slice of zeros.
template <int Group>
struct BitClasses {
    static constexpr int kClasses = 1 << (Group - 1);

    std::vector<std::uint16_t> list;
    std::int64_t start[kClasses + 1];  // where the lists begin
    int width[Group];                  // digits of sums over 2^level classes
    std::int32_t differ[Group];        // bits in which each row of the group differs from the first

    void sort(const BitRows& a, std::int64_t first, std::int64_t rows) {
        const std::int64_t columns = 32 * a.words;
        std::vector<std::uint8_t> of(columns);
        std::int64_t size[kClasses] = {};
        for (std::int64_t c = 0; c < columns; c += 8) {
            std::uint64_t bytes = 0;
            for (std::int64_t r = 0; r < rows; ++r) bytes |= static_cast<std::uint64_t>(a.row(first + r)[c / 8]) << 8 * r;
            bytes = transpose_bytes(bytes);
            for (int i = 0; i < 8; ++i) {
                of[c + i] = static_cast<std::uint8_t>(bytes >> 8 * i);
                ++size[class_of(of[c + i])];
            }
        }
        std::int64_t next[kClasses];
        start[0] = 0;
        for (int one = 0; one < kClasses; ++one) {
            next[one] = start[one];
            start[one + 1] = start[one] + (size[one] + kStep - 1) / kStep * kStep;
        }
        list.assign(start[kClasses], static_cast<std::uint16_t>(2 * columns));
        for (std::int64_t c = 0; c < columns; ++c)
            list[next[class_of(of[c])]++] = static_cast<std::uint16_t>(c + (of[c] & 1) * columns);
        for (int r = 0; r < Group; ++r) {
            differ[r] = 0;
            for (int one = 0; one < kClasses; ++one) differ[r] += r && one >> (r - 1) & 1 ? size[one] : 0;
        }
        for (int level = 0, count = kClasses; level < Group; ++level, count /= 2) {
            width[level] = std::max(kRunDigits, digits(*std::max_element(size, size + count)));
            for (int one = 0; one < count / 2; ++one) size[one] = size[2 * one] + size[2 * one + 1];
        }
    }

    // Of a position: which of the other rows differ from the first, given each row's bit.
    static int class_of(int bits) { return (bits >> 1) ^ (-(bits & 1) & (kClasses - 1)); }
};

// The sum of up to kRun slices: digits in registers.
inline void count_run(const std::uint64_t* panel, const std::uint16_t* list, std::int64_t count, Slice (&digit)[kRunDigits]) {
    for (Slice& d : digit) d = slice_of(false);
    const Slice none = slice_of(false);
    for (const std::uint16_t* end = list + count; list < end; list += kStep) {
        const auto slice = [=](int i) { return load_slice(panel + static_cast<std::size_t>(list[i]) * kSliceWords); };
        const Slice a = add_slices(digit[0], slice(0), slice(1)), b = add_slices(digit[0], slice(2), slice(3));
        const Slice ab = add_slices(digit[1], a, b);
        const Slice c = add_slices(digit[0], slice(4), slice(5)), d = add_slices(digit[0], slice(6), slice(7));
        const Slice cd = add_slices(digit[1], c, d);
        Slice carry = add_slices(digit[2], ab, cd);
        for (int p = 3; p < kRunDigits; ++p) carry = add_slices(digit[p], carry, none);
    }
}

// The sum of all slices of a class, of `width` digits.
inline void count_class(const std::uint64_t* panel, const std::uint16_t* list, std::int64_t count, int width,
                        std::uint64_t* out) {
    Slice digit[kRunDigits];
    std::int64_t run = std::min(count, kRun);
    count_run(panel, list, run, digit);
    for (int p = 0; p < kRunDigits; ++p) store_slice(out + p * kSliceWords, digit[p]);
    const Slice none = slice_of(false);
    for (int p = kRunDigits; p < width; ++p) store_slice(out + p * kSliceWords, none);
    while (count > run) {
        list += run, count -= run;
        run = std::min(count, kRun);
        count_run(panel, list, run, digit);
        Slice carry = none;
        for (int p = 0; p < width; ++p) {
            std::uint64_t* to = out + p * kSliceWords;
            store_slice(to, add_digits(load_slice(to), p < kRunDigits ? digit[p] : none, carry));
        }
    }
}

// Numbers that add_classes has room for: Level + 1 sums, behind them those of lower levels and at the end a count for each
// class of the lowest.
template <int Level>
constexpr int kNumbers = Level + kNumbers<Level - 1>;
template <>
constexpr int kNumbers<kFirstLevel> = kFirstLevel + 1 + (1 << kFirstLevel);

// Of the 2^Level classes from `first` on: in sums[0] the sum of all, in sums[1 + r] of those whose bit r is set, numbers
// that are `stride` words apart, of width[Level] digits.
template <int Level, int Group>
void add_classes(const std::uint64_t* panel, const BitClasses<Group>& classes, int first, std::int64_t stride,
                 std::uint64_t* sums) {
    const Slice none = slice_of(false);
    if constexpr (Level == kFirstLevel) {
        std::uint64_t* counts = sums + 4 * stride;
        for (int i = 0; i < 8; ++i)
            count_class(panel, classes.list.data() + classes.start[first + i],
                        classes.start[first + i + 1] - classes.start[first + i], classes.width[0], counts + i * stride);
        Slice carry[11];
        for (Slice& c : carry) c = none;
        const auto add_digit = [&](int p, const Slice (&x)[8]) {
            const Slice sum01 = add_digits(x[0], x[1], carry[0]), sum23 = add_digits(x[2], x[3], carry[1]);
            const Slice sum45 = add_digits(x[4], x[5], carry[2]), sum67 = add_digits(x[6], x[7], carry[3]);
            const Slice left = add_digits(sum01, sum23, carry[4]), odd_left = add_digits(x[1], x[3], carry[5]);
            const Slice right = add_digits(sum45, sum67, carry[6]), odd_right = add_digits(x[5], x[7], carry[7]);
            std::uint64_t* to = sums + p * kSliceWords;
            store_slice(to, add_digits(left, right, carry[8]));
            store_slice(to + stride, add_digits(odd_left, odd_right, carry[9]));
            store_slice(to + 2 * stride, add_digits(sum23, sum67, carry[10]));
            store_slice(to + 3 * stride, right);
        };
        Slice x[8];
        for (int p = 0; p < classes.width[0]; ++p) {
            for (int i = 0; i < 8; ++i) x[i] = load_slice(counts + i * stride + p * kSliceWords);
            add_digit(p, x);
        }
        for (Slice& zero : x) zero = none;
        for (int p = classes.width[0]; p < classes.width[Level]; ++p) add_digit(p, x);
    } else {
        // The right half's sum of all is where the one over the highest bit belongs.
        std::uint64_t* right = sums + Level * stride;
        add_classes<Level - 1>(panel, classes, first, stride, sums);
        add_classes<Level - 1>(panel, classes, first + (1 << (Level - 1)), stride, right);
        Slice carry[Level];
        for (Slice& c : carry) c = none;
        const int below = classes.width[Level - 1];
        for (int p = 0; p < below; ++p)
            for (int i = 0; i < Level; ++i) {
                std::uint64_t* to = sums + i * stride + p * kSliceWords;
                store_slice(to, add_digits(load_slice(to), load_slice(to + Level * stride), carry[i]));
            }
        if (classes.width[Level] > below) {
            for (int i = 0; i < Level; ++i) store_slice(sums + i * stride + below * kSliceWords, carry[i]);
            store_slice(right + below * kSliceWords, none);
        }
    }
}

// Distances of a row of a group from the rows of a panel: rows of b differ from the group's first row in `first` bits, of
// which `swapped` are among the `differ` ones where the two rows of a are not the same.
struct SlicedDistances {
    const std::uint64_t *first, *swapped;
    int width;
    std::int32_t differ;

    // A bit for each distance below `bound`, up to 2^width: where first + ~(2 swapped) + differ - bound + 1, which is the
    // distance less the bound, is negative in two's complement.
    void below(std::int32_t bound, std::uint64_t* passing) const {
        const Slice none = slice_of(false), every = slice_of(true);
        const std::int64_t shift = static_cast<std::int64_t>(differ) - bound + 1;
        Slice carry = none, other = none, sum = none;
        for (int p = 0; p < width + 2; ++p) {
            const Slice twice = 0 < p && p <= width ? load_slice(swapped + (p - 1) * kSliceWords) : none;
            const Slice once = p < width ? load_slice(first + p * kSliceWords) : none;
            const Slice digit = add_digits(once, parity(twice, every, none), carry);
            sum = add_digits(digit, slice_of(shift >> p & 1), other);
        }
        store_slice(passing, sum);
    }

    std::int32_t at(std::int64_t row) const {
        std::int32_t found = differ;
        for (int p = 0; p < width; ++p) {
            const std::int64_t word = p * kSliceWords + row / 64;
            found += static_cast<std::int32_t>(first[word] >> row % 64 & 1) << p;
            found -= static_cast<std::int32_t>(swapped[word] >> row % 64 & 1) << (p + 1);
        }
        return found;
    }
};

// Enters the rows of a panel that are near enough; `left` is the first of its `rows` rows.
inline void meet_slices(const SlicedDistances& distances, std::int64_t left, std::int64_t rows, std::int64_t not_this,
                        std::int64_t k, std::int64_t& size, BitNeighbor<std::int32_t>* heap) {
    const auto worst = [&] { return size == k ? heap[0].distance : std::int32_t{1} << distances.width; };
    alignas(64) std::uint64_t passing[kSliceWords];
    std::int32_t bound = worst();
    distances.below(bound, passing);
    for (int word = 0; word < kSliceWords; ++word) {
        if (!passing[word]) continue;
        if (worst() < bound) distances.below(bound = worst(), passing);
        std::uint64_t here = passing[word];
        for (std::int64_t row = 64 * word; here && row < rows; ++row, here >>= 1)
            if ((here & 1) && left + row != not_this)
                meet(heap, size, k, {distances.at(row), static_cast<std::int32_t>(left + row)});
    }
}

// Groups of rows go through the panels one after the other, each panel for as many of them as have their lists near.
template <int Group>
void nearest_by_slices(const BitRows& a, const BitRows& b, std::int64_t k, bool itself, std::int32_t* distance,
                       std::int32_t* index, int threads) {
    constexpr std::int64_t kNear = 512 << 10;  // bytes of lists
    SlicePanels panels(b);
    const std::int64_t stride = std::max(kRunDigits, digits(panels.columns)) * kSliceWords;
    std::vector<BitNeighbor<std::int32_t>> found(a.rows * k);
    std::vector<std::int64_t> size(a.rows, 0);
    const std::int64_t groups = (a.rows + Group - 1) / Group;
    const std::int64_t most_near = std::max<std::int64_t>(1, kNear / (2 * panels.columns));
    threads = useful_threads(1.0 * a.rows * b.rows * a.words, threads);
    const std::int64_t parts = std::max<std::int64_t>(threads, std::min<std::int64_t>(4 * threads, groups / most_near));
    for (std::int64_t top = 0; top < b.rows; top += panels.most_panels * kSliceRows) {
        const std::int64_t count = panels.pack(top, threads);
        parallel_for(groups, threads, parts, [&](std::int64_t begin, std::int64_t end) {
            Workspace workspace;
            std::uint64_t* panel = workspace.take<std::uint64_t>(2 * panels.stride + kSliceWords);
            std::uint64_t* sums = workspace.take<std::uint64_t>(kNumbers<Group - 1> * stride);
            std::uint64_t* zeros = workspace.take<std::uint64_t>(stride);
            std::fill_n(zeros, stride, 0);
            std::vector<BitClasses<Group>> near(std::min(most_near, end - begin));
            for (std::int64_t group = begin; group < end; group += most_near) {
                const std::int64_t here = std::min(most_near, end - group);
                for (std::int64_t g = 0; g < here; ++g) {
                    const std::int64_t first = (group + g) * Group;
                    near[g].sort(a, first, std::min<std::int64_t>(Group, a.rows - first));
                }
                for (std::int64_t p = 0; p < count; ++p) {
                    panels.copy(p, panel);
                    const std::int64_t left = top + p * kSliceRows, rows = std::min(kSliceRows, b.rows - left);
                    for (std::int64_t g = 0; g < here; ++g) {
                        const BitClasses<Group>& classes = near[g];
                        add_classes<Group - 1>(panel, classes, 0, stride, sums);
                        for (std::int64_t r = 0, i = (group + g) * Group; r < Group && i < a.rows; ++r, ++i)
                            meet_slices({sums, r ? sums + r * stride : zeros, classes.width[Group - 1], classes.differ[r]},
                                        left, rows, itself ? -1 : i, k, size[i], found.data() + i * k);
                    }
                }
            }
        });
    }
    write_neighbors(found, k, distance, index, threads);
}

// Whether slices beat xor and popcnt. They take time to make (some 100 microseconds a panel of 4,096 positions), which many
// rows of a share; narrow rows have too few positions for their classes; what is near enough is read out bit by bit, and
// lists have 16 bits. Measured with AVX-512.
inline bool slices_pay(const BitRows& a, const BitRows& b, std::int64_t k) {
    return 64 <= a.words && a.words < 1024 && a.rows * a.words >= 256 * 128 && b.rows >= 128 * std::max<std::int64_t>(k, 8);
}

}  // namespace
}  // namespace sparsekern
