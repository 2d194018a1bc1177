// The nearest rows of bits, for many rows against many; included by bits.inl.
//
// A slice is one bit position of kSliceRows rows of b, and the slices of all positions are a panel. Rows of a are taken
// `Group` at a time. These give each position one of 2^Group classes: which of them have the bit set. The slices of a class
// are added up once for the whole group, in numbers whose binary digits are slices, each lane counting for its own row of b;
// what row r of the group has in common with the rows of b is then the sum over the classes whose bit r is set, and these
// sums share most of their additions (Arlazarov et al.'s method of the Four Russians, with rows in the place of columns).
//
// A full adder is two operations on three slices and leaves two. So n positions are counted in 2n operations at most, and
// added up in 2 * (2^(Group + 1) - Group - 2) for each digit. With 4,096 positions, groups of seven and 512 rows in a slice
// these are 2.3 and 1.3 operations a pair, where xor, popcnt and add are 24. A panel of that size stays in the second-level
// cache, from which each slice comes once for each group.

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

// Bit c of word r becomes bit r of word c.
inline void transpose(std::uint64_t (&x)[64]) {
    std::uint64_t mask = 0x00000000ffffffffu;
    for (int step = 32; step; step >>= 1, mask ^= mask << step)
        for (int top = 0; top < 64; top += 2 * step)
            for (int i = top; i < top + step; ++i) {
                const std::uint64_t swap = ((x[i] >> step) ^ x[i + step]) & mask;
                x[i] ^= swap << step;
                x[i + step] ^= swap;
            }
}

// Likewise of the eight bytes of a word.
inline std::uint64_t transpose_bytes(std::uint64_t x) {
    std::uint64_t swap = (x ^ (x >> 7)) & 0x00aa00aa00aa00aau;
    x ^= swap ^ (swap << 7);
    swap = (x ^ (x >> 14)) & 0x0000cccc0000ccccu;
    x ^= swap ^ (swap << 14);
    swap = (x ^ (x >> 28)) & 0x00000000f0f0f0f0u;
    return x ^ swap ^ (swap << 28);
}

// Rows of b as panels of slices, a block of them at a time. A panel ends with a slice of zeros.
struct SlicePanels {
    const BitRows& b;
    std::int64_t columns, stride, most_panels;  // stride: words of a panel
    Workspace workspace;
    std::uint64_t* packed;

    explicit SlicePanels(const BitRows& b) : b(b), columns(32 * b.words), stride((columns + 1) * kSliceWords) {
        const std::int64_t all = (b.rows + kSliceRows - 1) / kSliceRows;
        most_panels = std::max<std::int64_t>(1, std::min(all, BitPanels::kBytes / (8 * stride)));
        packed = workspace.take<std::uint64_t>(most_panels * stride);
    }

    const std::uint64_t* panel(std::int64_t p) const { return packed + p * stride; }

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
        std::uint64_t square[64];
        std::fill_n(to + columns * kSliceWords, kSliceWords, 0);
        for (int part = 0; part < kSliceWords; ++part, first += 64)
            for (std::int64_t w = 0; w < b.words; w += 2) {
                const std::int64_t words = std::min<std::int64_t>(2, b.words - w);
                for (std::int64_t r = 0; r < 64; ++r) {
                    square[r] = 0;
                    for (std::int64_t i = 0; i < words && first + r < b.rows; ++i)
                        square[r] |= static_cast<std::uint64_t>(word_at(b.row(first + r), w + i)) << 32 * i;
                }
                transpose(square);
                for (std::int64_t c = 0; c < 32 * words; ++c) to[(32 * w + c) * kSliceWords + part] = square[c];
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
    static constexpr int kClasses = 1 << Group;

    std::vector<std::uint16_t> list;
    std::int64_t start[kClasses + 1];  // where the lists begin
    int width[Group + 1];              // digits of sums over 2^level classes
    std::int32_t ones[Group];          // bits that are set in each row of the group

    void sort(const BitRows& a, std::int64_t first, std::int64_t rows) {
        const std::int64_t columns = 32 * a.words;
        std::vector<std::uint8_t> of(columns);
        std::int64_t size[kClasses] = {};
        for (std::int64_t c = 0; c < columns; c += 8) {
            std::uint64_t bytes = 0;
            for (std::int64_t r = 0; r < rows; ++r) bytes |= static_cast<std::uint64_t>(a.row(first + r)[c / 8]) << 8 * r;
            bytes = transpose_bytes(bytes);
            for (int i = 0; i < 8; ++i) ++size[of[c + i] = static_cast<std::uint8_t>(bytes >> 8 * i)];
        }
        std::int64_t next[kClasses];
        start[0] = 0;
        for (int one = 0; one < kClasses; ++one) {
            next[one] = start[one];
            start[one + 1] = start[one] + (size[one] + kStep - 1) / kStep * kStep;
        }
        list.assign(start[kClasses], static_cast<std::uint16_t>(columns));
        for (std::int64_t c = 0; c < columns; ++c) list[next[of[c]]++] = static_cast<std::uint16_t>(c);
        for (std::int64_t r = 0; r < Group; ++r) ones[r] = r < rows ? count_ones(a, first + r) : 0;
        for (int level = 0, count = kClasses; level <= Group; ++level, count /= 2) {
            width[level] = std::max(kRunDigits, digits(*std::max_element(size, size + count)));
            for (int one = 0; one < count / 2; ++one) size[one] = size[2 * one] + size[2 * one + 1];
        }
    }
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

// Of the 2^Level classes from `first` on: in sums[0] the sum of all, in sums[1 + r] of those whose bit r is set, numbers
// that are `stride` words apart. Behind them is room for those of lower levels.
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

// A bit for each row of b that differs from a row with `mine` bits in fewer than `worst`: those with
// ones + ~(2 common) + mine - worst + 1 < 0 in two's complement.
inline void test_slices(const std::uint64_t* common, const std::uint64_t* ones, int width, std::int32_t mine,
                        std::int32_t worst, std::uint64_t* passing) {
    const Slice none = slice_of(false), every = slice_of(true);
    const std::int64_t shift = static_cast<std::int64_t>(mine) - worst + 1;
    Slice carry = none, other = none, sum = none;
    for (int p = 0; p < width + 2; ++p) {
        const Slice twice = 0 < p && p <= width ? load_slice(common + (p - 1) * kSliceWords) : none;
        const Slice one = p < width ? load_slice(ones + p * kSliceWords) : none;
        sum = add_digits(add_digits(one, parity(twice, every, none), carry), slice_of(shift >> p & 1), other);
    }
    store_slice(passing, sum);
}

// One row's number among those of a slice.
inline std::int32_t number_at(const std::uint64_t* number, int width, std::int64_t row) {
    std::int32_t found = 0;
    for (int p = 0; p < width; ++p)
        found |= static_cast<std::int32_t>(number[p * kSliceWords + row / 64] >> row % 64 & 1) << p;
    return found;
}

// Enters the rows of a panel that are near enough.
inline void meet_slices(const std::uint64_t* common, const std::uint64_t* ones, int width, std::int32_t mine,
                        std::int64_t left, std::int64_t rows, std::int64_t not_this, std::int64_t k, std::int64_t& size,
                        BitNeighbor<std::int32_t>* heap) {
    const auto worst = [&] { return size == k ? heap[0].distance : std::int32_t{1} << width; };
    alignas(64) std::uint64_t passing[kSliceWords];
    std::int32_t tested = worst();
    test_slices(common, ones, width, mine, tested, passing);
    for (int word = 0; word < kSliceWords; ++word) {
        if (!passing[word]) continue;
        if (worst() < tested) test_slices(common, ones, width, mine, tested = worst(), passing);
        for (std::int64_t row = 64 * word; passing[word] && row < rows; ++row, passing[word] >>= 1) {
            if (!(passing[word] & 1) || left + row == not_this) continue;
            const std::int32_t differ = mine + number_at(ones, width, row) - 2 * number_at(common, width, row);
            meet(heap, size, k, {differ, static_cast<std::int32_t>(left + row)});
        }
    }
}

template <int Group>
void nearest_by_slices(const BitRows& a, const BitRows& b, std::int64_t k, bool itself, std::int32_t* distance,
                       std::int32_t* index, int threads) {
    SlicePanels panels(b);
    const std::int64_t stride = std::max(kRunDigits, digits(panels.columns)) * kSliceWords;
    std::vector<BitNeighbor<std::int32_t>> found(a.rows * k);
    std::vector<std::int64_t> size(a.rows, 0);
    const std::int64_t groups = (a.rows + Group - 1) / Group;
    // Groups whose lists are near at one time.
    const std::int64_t most_near = std::max<std::int64_t>(1, (512 << 10) / (2 * panels.columns));
    threads = useful_threads(1.0 * a.rows * b.rows * a.words, threads);
    for (std::int64_t top = 0; top < b.rows; top += panels.most_panels * kSliceRows) {
        const std::int64_t count = panels.pack(top, threads);
        parallel_for(groups, threads, 4 * threads, [&](std::int64_t begin, std::int64_t end) {
            std::vector<BitClasses<Group>> near(std::min(most_near, end - begin));
            // Numbers of all levels, and the classes' own.
            std::vector<std::uint64_t> memory((Group * (Group + 1) / 2 + 10) * stride + 8);
            std::uint64_t* sums = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64 / 8;
            for (std::int64_t group = begin; group < end; group += near.size()) {
                const std::int64_t here = std::min<std::int64_t>(near.size(), end - group);
                for (std::int64_t g = 0; g < here; ++g) {
                    const std::int64_t first = (group + g) * Group;
                    near[g].sort(a, first, std::min<std::int64_t>(Group, a.rows - first));
                }
                for (std::int64_t p = 0; p < count; ++p)
                    for (std::int64_t g = 0; g < here; ++g) {
                        add_classes<Group>(panels.panel(p), near[g], 0, stride, sums);
                        const std::int64_t left = top + p * kSliceRows, rows = std::min(kSliceRows, b.rows - left);
                        for (std::int64_t r = 0, i = (group + g) * Group; r < Group && i < a.rows; ++r, ++i)
                            meet_slices(sums + (1 + r) * stride, sums, near[g].width[Group], near[g].ones[r], left, rows,
                                        itself ? -1 : i, k, size[i], found.data() + i * k);
                    }
            }
        });
    }
    write_neighbors(found, k, distance, index, threads);
}

inline bool slices_pay(const BitRows& a, const BitRows& b) {
    return a.rows >= 7 && b.rows >= 1 && a.words >= 8 && a.words <= 512;
}

}  // namespace
}  // namespace sparsekern
