// Products of one to many rows of inputs and a matrix, whose rows the threads share.
//
// Several rows of the matrix are multiplied by a tile of input rows at a time. The partial sums
// stay in registers, so each vector that is loaded is used several times. A row's numbers are
// always added in the same order: vector by vector along the columns, then across the lanes.
//
// Shapes:  R rows of inputs    M rows of a matrix    K its columns

#pragma once

#ifdef _OPENMP
#include <omp.h>
#else  // one thread computes everything
inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
#endif
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../machine/vectors.h"

extern "C" {

struct Matrix {
    const void* numbers;     // (M, K), or packed (M, K / fields / lanes, lanes): see quantized.py
    const uint16_t* scales;  // (M, lanes), bfloat16; only for packed numbers
    const float* bias;       // (M,), or null
    int64_t rows, columns, lanes, bits;
};

}  // extern "C"

namespace {

inline int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

// -- threads

// One of the threads that compute a step. A loop's items are handed out in small pieces, since on a
// shared machine any thread may be interrupted at any time. At the end of a loop the threads spin,
// as waking up from sleep would take too long, but they yield the core to other programs.
class Thread {
   public:
    struct Shared {
        std::atomic<int64_t> next[2] = {};  // next item of this loop, and of the following one
        std::atomic<int64_t> arrived{0};    // how often threads have reached the end of a loop
    };

    explicit Thread(Shared& with) : shared(with), threads(omp_get_num_threads()) {}

    // Return how many of `items` a thread takes at a time.
    int64_t piece(int64_t items) const { return std::max<int64_t>(1, items / (threads * PIECES)); }

    // Call `one(i)` for every i below `items`, in any thread; return when all calls are done.
    template <class Do>
    void share(int64_t items, Do one) {
        auto& next = shared.next[loops % 2];
        int64_t piece = this->piece(items);
        for (int64_t first; (first = next.fetch_add(piece, std::memory_order_relaxed)) < items;)
            for (int64_t i = first; i < std::min(first + piece, items); i++) one(i);
        // No thread can be in the following loop yet, since this one has not arrived.
        if (omp_get_thread_num() == 0) shared.next[(loops + 1) % 2] = 0;
        loops++;
        shared.arrived.fetch_add(1, std::memory_order_acq_rel);
        for (int spins = 0; shared.arrived.load(std::memory_order_acquire) < loops * threads;)
            if (++spins > 100) sched_yield();
    }

   private:
    static constexpr int64_t PIECES = 8;  // of a loop for each thread, on average
    Shared& shared;
    int64_t threads, loops = 0;
};

// -- number formats: how a vector of weights is multiplied by its inputs
//
// FIELDS: a vector of packed words has one or two fields, which are multiplied one after another.
// SUMS: the partial sums of an output, each of another part of the inputs.
// WIDE: numbers in a vector of weights, or packed words.

struct Float32 {
    typedef float Stored;
    typedef Floats Held, Sum;
    static constexpr int FIELDS = 1, SUMS = 1, WIDE = 16;
    static constexpr bool PACKED = false;
    static Held field(Held held, int) { return held; }
    static Sum add(Sum sum, Floats held, Floats x, int) { return sum + held * x; }
    static void put(float* to, Floats low, Floats) { store(to, low); }
};

#ifdef __AVX512BF16__
struct Bfloat16 : Float32 {  // one instruction multiplies pairs, and adds the products in float32
    typedef uint16_t Stored;
    typedef Pairs Held;
    static constexpr int WIDE = 32;
    static Held field(Held held, int) { return held; }
    static Sum add(Sum sum, Held held, Floats x, int) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)held, (__m512bh)x);
    }
    static void put(float* to, Floats low, Floats high) {
        store((uint16_t*)to, to_bfloat16(low));
        store((uint16_t*)to + LANES, to_bfloat16(high));
    }
};
#else
struct Bfloat16 : Float32 {
    typedef uint16_t Stored;
    typedef Halves Held;
    static Floats field(Held held, int) { return from_bfloat16(held); }
};
#endif

// Unsigned integers of 8 or 4 bits, several in each word of 32 bits. A field has four of them, one
// in each byte of the word. Inputs are integers of 16 bits. All sums are exact until they are
// scaled.
template <int BITS>
struct Packed {
    typedef int32_t Stored;
    typedef Words Held, Sum;
    static constexpr int FIELDS = 8 / BITS, SUMS = 2, WIDE = 16;
    static constexpr int OFFSET = 1 << (BITS - 1);
    static constexpr bool PACKED = true;
    static Words field(Words held, int which) {
        return BITS == 8 ? held : (Words)((Naturals)held >> (BITS * which)) & 0x0f0f0f0f;
    }
#ifdef __AVX512VNNI__
    // An instruction multiplies four bytes and adds the products: first the inputs' high bytes are
    // multiplied, then their low ones.
    static constexpr int LARGEST = 0x7f7f;  // the largest input whose high byte is below 128
    static Words add(Words sum, Words field, Floats x, int) {
        return (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)field, (__m512i)x);
    }
    static Words join(Words high, Words low) { return (high << 8) + low; }
    static void put(Words (&to)[SUMS], int byte, Words x) {
        Words high = (x + 128) >> 8;  // rounded, so that the rest is a signed byte
        to[0] |= (high & 0xff) << (8 * byte);
        to[1] |= ((x - (high << 8)) & 0xff) << (8 * byte);
    }
#else
    // First the even bytes are multiplied as numbers of 16 bits, then the odd ones.
    static constexpr int LARGEST = 0x7fff;
    static Words add(Words sum, Words field, Floats inputs, int odd) {
        Words pair = (Words)((Naturals)field >> (8 * odd)) & 0x00ff00ff, x = (Words)inputs;
#ifdef __AVX2__
        for (int half = 0; half < 2; half++)
            ((__m256i*)&sum)[half] = _mm256_add_epi32(((__m256i*)&sum)[half],
                _mm256_madd_epi16(((__m256i*)&pair)[half], ((__m256i*)&x)[half]));
        return sum;
#else
        return sum + (pair & 0xffff) * (x << 16 >> 16) + (pair >> 16) * (x >> 16);
#endif
    }
    static Words join(Words even, Words odd) { return even + odd; }
    static void put(Words (&to)[SUMS], int byte, Words x) {
        to[byte % 2] |= (x & 0xffff) << (byte / 2 * 16);
    }
#endif
};

// -- inputs, in the order in which a product reads them

// Vectors of inputs that are multiplied by a vector of weights. Each is of another row; a row of
// inputs of packed numbers has two.
#ifdef __AVX512F__
constexpr int WIDEST = 8;
#else
constexpr int WIDEST = 2;
#endif
constexpr int64_t BLOCKS = 3;        // of 16 rows, that a thread multiplies by all inputs in turn
constexpr int64_t MANY = 8;          // input rows for which the threads share what is cheap, too
constexpr int64_t AHEAD = 16 << 10;  // bytes: how far ahead weights are prefetched
constexpr size_t CACHED = 24 << 10;  // bytes of inputs: most first caches have 32 KB

// The largest number of input rows in a tile, and how many rows of the matrix RS of them are
// multiplied by at a time: the partial sums have to fit the registers.
template <class F>
constexpr int TILE = WIDEST / F::SUMS;
template <class F, int RS>
constexpr int AT_ONCE = RS == TILE<F> ? 2 : 4;

struct alignas(64) Line {  // loads that cross cache lines take twice as long
    float numbers[LANES];
};

struct Inputs {
    std::vector<Line> ordered;   // for each tile, (vectors in a row of the matrix, rows, SUMS, 16)
    std::vector<float> offsets;  // for each tile, (lanes / 16, rows, 16): first terms of the sums,
                                 // as packed numbers are stored with OFFSET added
    std::vector<float> scales;   // (R,): 1, or the scale of inputs that were rounded to 16 bits
};

// Return how many vectors of inputs a row of the matrix is multiplied by.
template <class F>
int64_t across(const Matrix& w) {
    if (!F::PACKED) return divided(w.columns, F::WIDE);
    return divided(w.lanes, LANES) * (w.columns / w.lanes / 4) * F::SUMS;
}

// Return how many rows of inputs to multiply at once if there are many: fewer of long rows, so that
// they stay in the first cache.
template <class F>
int64_t whole_tile(const Matrix& w) {
    bool fits = TILE<F> * across<F>(w) * sizeof(Line) <= CACHED;
    return fits ? TILE<F> : std::min(TILE<F>, 4);
}

// Return how many rows to multiply at once if `left` of them are left.
template <class F>
int64_t tile_of(const Matrix& w, int64_t left) {
    int64_t rows = whole_tile<F>(w);
    while (rows / 2 >= left) rows /= 2;
    return rows;
}

// Copy the inputs of a row, to every `stride`th vector from `to` on.
template <class F>
void order_floats(const Matrix& w, const float* from, float* to, int64_t stride) {
    for (int64_t k = 0; k < w.columns; k += F::WIDE, to += stride * LANES) {
        int64_t left = w.columns - k;
        Floats high{};
        if (left > LANES) high = load<Floats>(from + k + LANES, left - LANES);
        F::put(to, load<Floats>(from + k, left), high);
    }
}

// As `order_floats` for packed numbers: round the inputs to 16 bits, scaled so that the largest is
// LARGEST, and store them, and the offsets. Returns the scale.
template <class F>
float order_packed(const Matrix& w, const float* from, float* to, float* offsets, int64_t stride) {
    Floats most{}, nothing{};
    for (int64_t k = 0; k < w.columns; k += LANES) {
        Floats x = load<Floats>(from + k, w.columns - k), size = x < 0.f ? -x : x;
        most = size > most ? size : most;
        nothing += x * 0.f;
    }
    if (sum(nothing) != 0) return NAN;  // an input is infinite or NaN, which has no integer
    float largest = 0;
    for (int i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
    float factor = largest > 0 ? F::LARGEST / largest : 0;
    for (int64_t c = 0; c < w.lanes; c += LANES, offsets += stride * LANES) {
        Words total{};
        for (int64_t word = 0; word < w.columns / w.lanes; word += 4 * F::FIELDS)
            for (int field = 0; field < F::FIELDS; field++, to += stride * F::SUMS * LANES) {
                Words parts[F::SUMS] = {};
                for (int byte = 0; byte < 4; byte++) {
                    int64_t at = (word + byte * F::FIELDS + field) * w.lanes + c;
                    Floats x = load<Floats>(from + at, w.lanes - c) * factor;
                    x += x < 0.f ? Floats{} - .5f : Floats{} + .5f;
                    Words rounded = __builtin_convertvector(x, Words);
                    total += rounded;
                    F::put(parts, byte, rounded);
                }
                for (int i = 0; i < F::SUMS; i++) store(to + i * LANES, (Floats)parts[i]);
            }
        store(offsets, (Floats)(total * -F::OFFSET));
    }
    return largest / F::LARGEST;
}

// Make room for R rows of inputs of a matrix.
template <class F>
void make_room_for(const Matrix& w, int64_t R, Inputs& in) {
    auto grow = [](auto& vector, size_t size) { vector.resize(std::max(vector.size(), size)); };
    int64_t last = (std::max<int64_t>(R, 1) - 1) % whole_tile<F>(w) + 1;  // rows of the last tile
    int64_t padded = R - last + tile_of<F>(w, last);
    grow(in.ordered, across<F>(w) * padded);
    grow(in.offsets, F::PACKED ? divided(w.lanes, LANES) * padded * LANES : 0);
    grow(in.scales, padded);
}

// Copy row r of R rows of inputs into the order in which the product reads them.
template <class F>
void order(const Matrix& w, int64_t R, int64_t r, const float* from, Inputs& in) {
    int64_t row = r % whole_tile<F>(w), first = r - row, tile = tile_of<F>(w, R - first);
    float* to = in.ordered[first * across<F>(w) + row * F::SUMS].numbers;
    in.scales[r] = 1;
    if constexpr (F::PACKED) {
        int64_t chunks = divided(w.lanes, LANES);
        float* offsets = &in.offsets[(first * chunks + row) * LANES];
        in.scales[r] = order_packed<F>(w, from, to, offsets, tile);
    } else {
        order_floats<F>(w, from, to, tile);
    }
}

// -- products

// What becomes of the results.
enum class Then { WRITE, ADD, GELU, GELU_TANH };

struct Outputs {
    float* to;  // (R, M)
    Then then;
};

// Multiply one vector of each of MS rows of a matrix by the inputs of RS rows.
template <class F, int MS, int RS>
inline void multiply(typename F::Sum (&sums)[MS][RS * F::SUMS],
                     const typename F::Held (&held)[MS], const float* x) {
#pragma GCC unroll 2
    for (int f = 0; f < F::FIELDS; f++, x += RS * F::SUMS * LANES) {
        decltype(F::field(held[0], f)) fields[MS];
#pragma GCC unroll 4
        for (int m = 0; m < MS; m++) fields[m] = F::field(held[m], f);
#pragma GCC unroll 8
        for (int r = 0; r < RS * F::SUMS; r++) {
            Floats inputs = load<Floats>(x + r * LANES);
#ifdef __AVX512F__
            // Or else GCC loads it again for each row of the matrix. A single row waits for memory.
            if (RS > 1) asm("" : "+v"(inputs));
#endif
#pragma GCC unroll 4
            for (int m = 0; m < MS; m++)
                sums[m][r] = F::add(sums[m][r], fields[m], inputs, r % F::SUMS);
        }
    }
}

// Multiply some rows of a matrix, from row m on, by RS rows of inputs, from row r on. Each of the
// totals is a vector of partial sums.
template <class F, int RS>
void product_of(const Matrix& w, int64_t m, const Inputs& in, int64_t r, int64_t ahead,
                Floats (*total)[LANES]) {
    constexpr int MS = AT_ONCE<F, RS>;
    typedef typename F::Held Held;
    int64_t lanes = F::PACKED ? w.lanes : w.columns;
    int64_t parts = F::PACKED ? w.columns / lanes / 4 / F::FIELDS : 1;
    const float* x = in.ordered[r * across<F>(w)].numbers;
    const float* offsets = F::PACKED ? &in.offsets[r * divided(lanes, LANES) * LANES] : nullptr;
    const typename F::Stored* rows[MS];
    const uint16_t* scales[MS];
    for (int i = 0; i < MS; i++) {
        int64_t row = std::min(m + i, w.rows - 1);  // repeat the last row if there are too few
        rows[i] = (const typename F::Stored*)w.numbers + row * parts * lanes;
        scales[i] = w.scales + row * lanes;
    }
    typename F::Sum sums[MS][RS * F::SUMS] = {};
    auto multiply_part = [&](int64_t at, int64_t count) __attribute__((always_inline)) {
        Held held[MS];
#pragma GCC unroll 4
        for (int i = 0; i < MS; i++) {
            __builtin_prefetch((const char*)(rows[i] + at) + ahead, 0, 2);
            held[i] = load<Held>(rows[i] + at, count);
        }
        multiply<F, MS, RS>(sums, held, x);
        x += F::FIELDS * RS * F::SUMS * LANES;
    };
    auto columns = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        if constexpr (!F::PACKED) {
            multiply_part(c, count);
        } else {
            for (int r = 0; r < RS; r++, offsets += LANES)
                for (int i = 0; i < MS; i++) {
                    sums[i][2 * r] = Words{};
                    sums[i][2 * r + 1] = (Words)load<Floats>(offsets);
                }
            for (int64_t n = 0; n < parts; n++) multiply_part(n * lanes + c, count);
            for (int i = 0; i < MS; i++) {
                Floats scale = from_bfloat16(load<Halves>(scales[i] + c, count));
                for (int r = 0; r < RS; r++) {
                    Words joined = F::join(sums[i][2 * r], sums[i][2 * r + 1]);
                    Floats scaled = __builtin_convertvector(joined, Floats) * scale;
                    total[r][i] = c ? total[r][i] + scaled : scaled;
                }
            }
        }
    };
    int64_t c = 0;
    for (; c + F::WIDE <= lanes; c += F::WIDE) columns(c, F::WIDE);
    if (c < lanes) columns(c, lanes - c);
    if constexpr (!F::PACKED)
        for (int r = 0; r < RS; r++)
            for (int i = 0; i < MS; i++) total[r][i] = sums[i][r];
}

// Multiply 16 rows of a matrix, from row m on, by RS rows of inputs. Then add up the partial sums,
// scale them, add the bias, and pass the results on.
template <class F, int RS>
void multiply_16(const Matrix& w, int64_t m, const Inputs& in, int64_t r, int64_t R, int64_t ahead,
                 const Outputs& out) {
    Floats totals[RS][LANES];
    int64_t count = std::min<int64_t>(LANES, w.rows - m);
    for (int64_t i = 0; i < count; i += AT_ONCE<F, RS>)
        product_of<F, RS>(w, m + i, in, r, ahead, (Floats(*)[LANES])&totals[0][i]);
    Floats bias = w.bias ? load<Floats>(w.bias + m, count) : Floats{};
    for (int j = 0; j < RS && r + j < R; j++) {
        Floats result = sums<LANES>(totals[j]) * in.scales[r + j] + bias;
        float* to = out.to + (r + j) * w.rows + m;
        if (out.then == Then::ADD) result += load<Floats>(to, count);
        if (out.then >= Then::GELU) result = gelu(result, out.then == Then::GELU_TANH);
        store(to, result, count);
    }
}

// Return `multiply_16` for a number of rows that `tile_of` returned.
template <class F, int RS = TILE<F>>
auto multiply_tile(int64_t rows) {
    if constexpr (RS > 1)
        if (rows < RS) return multiply_tile<F, RS / 2>(rows);
    return multiply_16<F, RS>;
}

// Multiply R rows of inputs by a matrix. The threads share blocks of its rows.
template <class F>
void multiply_all(Thread& thread, const Matrix& w, const Inputs& in, int64_t R,
                  const Outputs& out) {
    int64_t block = std::clamp<int64_t>(thread.piece(w.rows) / LANES, 1, BLOCKS) * LANES;
    thread.share(divided(w.rows, block), [&](int64_t item) {
        int64_t first = item * block, end = std::min(first + block, w.rows);
        for (int64_t r = 0; r < R; r += whole_tile<F>(w)) {
            auto multiply_some = multiply_tile<F>(tile_of<F>(w, R - r));
            int64_t ahead = r == 0 ? AHEAD : 0;  // later tiles find the weights in the cache
            for (int64_t m = first; m < end; m += LANES)
                multiply_some(w, m, in, r, R, ahead, out);
        }
    });
}

// Call `what` with the number format of a matrix.
template <class What>
void in_format(const Matrix& w, What what) {
    switch (w.bits) {
        case 32: return what(Float32());
        case 16: return what(Bfloat16());
        case 8: return what(Packed<8>());
        case 4: return what(Packed<4>());
    }
}

inline void make_room(const Matrix& w, int64_t R, Inputs& in) {
    in_format(w, [&](auto format) { make_room_for<decltype(format)>(w, R, in); });
}

// Multiply inputs (R, K), whose row r `row(r)` returns, by a matrix -> (R, M). Threads share
// copying of many rows; of a few, each thread copies all for itself, which needs no waiting.
template <class Row>
void product(Thread& thread, const Matrix& w, int64_t R, Row row, Inputs& own, Inputs& shared,
             const Outputs& out) {
    in_format(w, [&](auto format) {
        typedef decltype(format) F;
        Inputs& in = R < MANY ? own : shared;
        auto copy = [&](int64_t r) { order<F>(w, R, r, row(r), in); };
        if (R < MANY) {
            for (int64_t r = 0; r < R; r++) copy(r);
        } else {
            thread.share(R, copy);
        }
        multiply_all<F>(thread, w, in, R, out);
    });
}

}  // namespace
