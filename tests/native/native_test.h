// What the tests of the C++ kernels share. They run without Python and torch, so that sanitizers see every access and
// every thread: `make sanitize`.
//
// A new kernel's tests are one file of this folder, with one NATIVE_TEST; nothing else needs to name it.
#pragma once

#if defined(__has_include)
#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#endif
#endif
#if !defined(ASAN_POISON_MEMORY_REGION)
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"

namespace sparsekern::test {

// ThreadSanitizer is slow and has little to see in work for one thread: such tests may then take fewer cases.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
constexpr bool kThreadSanitizer = __has_feature(thread_sanitizer);
#else
constexpr bool kThreadSanitizer = false;
#endif

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Fails the test, on the main thread, with what `context` streams: CHECK(a == b, "row " << row).
#define CHECK(condition, context)                                                                          \
    do {                                                                                                   \
        if (!(condition)) {                                                                                \
            std::ostringstream message_;                                                                   \
            message_.precision(17);                                                                        \
            message_ << __FILE__ << ":" << __LINE__ << ": " << #condition << " does not hold: " << context; \
            throw ::sparsekern::test::Failure(message_.str());                                             \
        }                                                                                                  \
    } while (false)

struct Test {
    const char* name;
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

// Defines a test that main() finds by itself.
#define NATIVE_TEST(name)                                                                              \
    static void test_##name();                                                                         \
    [[maybe_unused]] static const bool registered_##name =                                             \
        (::sparsekern::test::tests().push_back({#name, test_##name}), true);                           \
    static void test_##name()

// Runs every test, or those named on the command line; what main() returns.
inline int run_tests(int argc, char** argv) {
    int ran = 0;
    for (const Test& test : tests()) {
        if (argc > 1 && std::none_of(argv + 1, argv + argc, [&](std::string name) { return name == test.name; }))
            continue;
        ++ran;
        const auto start = std::chrono::steady_clock::now();
        try {
            test.run();
        } catch (const std::exception& error) {
            std::printf("%s FAILED\n%s\n", test.name, error.what());
            return 1;
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::printf("%s passed (%.1f s)\n", test.name, seconds.count());
        std::fflush(stdout);  // before what a sanitizer may write
    }
    if (ran == 0) std::printf("no test has such a name\n");
    return ran == 0;
}

// `size` elements on the heap and not one more, so that AddressSanitizer sees an access beyond either end. They start
// as NaN (the largest value of an integer type), so that what a kernel does not write shows. A buffer of none is a null
// pointer, as in torch.
template <class T>
class Buffer {
public:
    explicit Buffer(std::int64_t size) : size_(size), data_(size ? new T[size] : nullptr) {
        using Limits = std::numeric_limits<T>;
        std::fill(data_.get(), data_.get() + size, Limits::has_quiet_NaN ? Limits::quiet_NaN() : Limits::max());
    }
    std::int64_t size() const { return size_; }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](std::int64_t i) { return data_[i]; }
    const T& operator[](std::int64_t i) const { return data_[i]; }

private:
    std::int64_t size_;
    std::unique_ptr<T[]> data_;
};

// Rows `stride` elements apart, or all the same one (stride 0). No kernel may as much as read the elements between
// rows: they are NaN, and poisoned.
template <class T>
class Matrix {
public:
    Matrix(std::int64_t rows, std::int64_t cols, std::int64_t stride)
        : rows(rows), cols(cols), stride(stride), buffer_(rows && cols ? (rows - 1) * stride + cols : 0) {
        each_gap([](T* gap, std::size_t bytes) { ASAN_POISON_MEMORY_REGION(gap, bytes); });
    }
    ~Matrix() {
        each_gap([](T* gap, std::size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(gap, bytes); });
    }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;

    T* data() { return buffer_.data(); }
    const T* data() const { return buffer_.data(); }
    T* row(std::int64_t row) { return data() + row * stride; }
    const T* row(std::int64_t row) const { return data() + row * stride; }

    const std::int64_t rows, cols, stride;

private:
    template <class F>
    void each_gap(F f) {
        if (buffer_.size() && stride > cols)
            for (std::int64_t row = 0; row + 1 < rows; ++row)
                f(this->row(row) + cols, (stride - cols) * sizeof(T));
    }

    Buffer<T> buffer_;
};

// Numbers that are the same with every compiler and library (splitmix64).
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(n)); }
    double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

private:
    std::uint64_t state_;
};

// Whole numbers from -8 to 8 have products and sums that are exact in float up to 2^24, in any order, so that a slot
// too many or too few shows among any number of others. Real ones, from -1 to 1, show a changed order of summation.
enum class Numbers { whole, real };

inline double draw(Random& random, Numbers numbers) {
    return numbers == Numbers::whole ? static_cast<double>(random.below(17) - 8) : 2 * random.unit() - 1;
}

template <class T>
void fill(Buffer<T>& buffer, Random& random, Numbers numbers) {
    for (std::int64_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<T>(draw(random, numbers));
}

template <class T>
void fill(Matrix<T>& matrix, Random& random, Numbers numbers) {
    for (std::int64_t row = 0; row < matrix.rows; ++row)
        for (std::int64_t col = 0; col < matrix.cols; ++col)
            matrix.row(row)[col] = static_cast<T>(draw(random, numbers));
}

// A sum in double, and how far the same sum in T can be from it.
struct Sum {
    double value = 0, magnitude = 0;
    std::int64_t terms = 0;

    void add(double term) {
        value += term;
        magnitude += std::fabs(term);
        ++terms;
    }
    template <class T>
    double bound(Numbers numbers) const {
        // The classic gamma_n for either sum, with the rounding of the products; none of it for whole numbers.
        return numbers == Numbers::whole ? 0 : 2 * (terms + 2) * double(std::numeric_limits<T>::epsilon()) * magnitude;
    }
};

template <class T>
bool same_bits(const Buffer<T>& a, const Buffer<T>& b) {
    return a.size() == b.size() && (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Of a kernel's three tables those that this machine can run, with their names.
template <class Table>
std::vector<std::pair<std::string, const Table*>> runnable(const Table* generic, const Table* avx2,
                                                           const Table* avx512) {
    std::vector<std::pair<std::string, const Table*>> all = {{"generic", generic}, {"avx2", avx2}, {"avx512", avx512}};
    all.erase(std::remove_if(all.begin(), all.end(),
                             [](const auto& entry) { return !entry.second || !machine_has(entry.first); }),
              all.end());
    return all;
}

template <class T>
const char* type_name() {
    return sizeof(T) == 4 ? "float" : "double";
}

}  // namespace sparsekern::test
