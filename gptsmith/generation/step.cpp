// One forward pass of GPT-2 on a CPU. Each of a few rows is one token, at a position of one of the
// texts in the KV cache.
//
// Each weight is read from memory once for up to eight rows, in the format in which it is stored:
// float32, bfloat16, or several small integers in a word. The numbers of a row are always summed in
// the same order, so its logits do not depend, to the bit, on the other rows or on the number of
// threads.
//
// Uses the vector extensions of GCC and Clang, which work on every processor. compiled.py describes
// the model to it; machine/native.py compiles it.
//
// Shapes:  R rows        C channels          H heads        D channels per head    S tokens so far
//          V vocabulary  M rows of a matrix  K its columns  T texts in the cache

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

extern "C" {

struct Matrix {
    const void* numbers;     // (M, K), or packed (M, K / fields / lanes, lanes): see quantized.py
    const uint16_t* scales;  // (M, lanes), bfloat16; only for packed numbers
    const float* bias;       // (M,), or null
    int64_t rows, columns, lanes, bits;
};

struct Norm {
    const float *weight, *bias;  // (C,), the bias or null
};

struct Layer {
    Norm ln_1, ln_2;
    Matrix c_attn, c_proj, c_fc, mlp_c_proj;
};

struct Model {
    const Layer* layers;
    Norm ln_f;
    Matrix head;
    int64_t n_layer, n_embd, n_head, n_inner;
    float norm_eps;
    int32_t tanh;  // whether GELU is computed by the tanh approximation, or exactly by erf
};

struct Cache {
    void *keys, *values;  // (layers, T, capacity, H, D)
    int64_t texts, capacity, bits;
};

struct Rows {
    int64_t count, wanted;        // R, and the number of rows whose logits are computed
    const int64_t *text, *place;  // (R,): each token's text, and its position in that text
    const int64_t* logits_of;     // (wanted,): the rows whose logits are computed
    float* x;                     // (R, C): the embeddings, then the residual stream
    float* logits;                // (wanted, V)
};

}  // extern "C"

namespace {

// -- vectors

constexpr int LANES = 16;
constexpr int TILE = 8;              // rows that are multiplied each time a weight is read
constexpr int64_t USUAL_HEAD = 64;   // channels per head in every published GPT-2
constexpr int64_t MANY = 8;          // with this many rows, one thread computes all heads of a row
constexpr int64_t AHEAD = 16 << 10;  // bytes: how far ahead weights are prefetched
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef uint32_t Naturals __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t Pairs __attribute__((vector_size(64)));

// Load `count` numbers into a vector, and fill the rest with zeros.
template <class Vector, class Number>
inline Vector load(const Number* from, int64_t count = sizeof(Vector) / sizeof(Number)) {
    Vector vector{};
    if (count >= int64_t(sizeof(Vector) / sizeof(Number))) {
        std::memcpy(&vector, from, sizeof vector);
    } else {
        std::memcpy(&vector, from, count * sizeof(Number));
    }
    return vector;
}

template <class Vector, class Number>
inline void store(Number* to, Vector vector, int64_t count = LANES) {
    if (count >= LANES) {
        std::memcpy(to, &vector, LANES * sizeof(Number));
    } else {
        std::memcpy(to, &vector, count * sizeof(Number));
    }
}

inline float sum(Floats v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

// Return the sums of up to 16 vectors, each computed in the same order as by `sum`.
template <int COUNT>
inline Floats sums(const Floats (&given)[COUNT]) {
    Floats v[16] = {};
    for (int i = 0; i < COUNT; i++) v[i] = given[i];
    for (int i = 0; i < 8; i++)  // fold two vectors of 16 partial sums into one of 2 x 8, and so on
        v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18,
                                       19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24,
                                       25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18,
                                       19, 24, 25, 26, 27) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21,
                                       22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20,
                                       21, 24, 25, 28, 29) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19,
                                       22, 23, 26, 27, 30, 31);
    return __builtin_shufflevector(v[0], v[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                                   28, 30) +
           __builtin_shufflevector(v[0], v[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27,
                                   29, 31);
}

inline Floats from_bfloat16(Halves numbers) {
    return (Floats)(__builtin_convertvector(numbers, Naturals) << 16);
}

// Round to nearest, ties to even.
inline Halves to_bfloat16(Floats numbers) {
    Naturals bits = (Naturals)numbers;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
}

// Compute e^x as 2^n * e^r with n = round(x / ln 2). A short Taylor series is enough for e^r, since
// |r| <= ln(2) / 2.
inline Floats exp(Floats x) {
    x = x < -87.f ? Floats{} - 87.f : x;
    x = x > 88.f ? Floats{} + 88.f : x;
    Floats whole = x * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
    Words power = (Words)whole << 23;
    whole -= 12582912.f;
    // ln(2) is subtracted in two parts, so that the product with the first one is exact.
    Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats series = rest * (1.f / 5040) + 1.f / 720;
    for (float term : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        series = series * rest + term;
    return (Floats)((Words)series + power);
}

// -- number formats of a matrix: how a vector is loaded, and multiplied by its inputs
//
// A vector of packed words has several fields, which are multiplied one after another.

struct Float32 {
    typedef float Stored, Input;
    typedef Floats Held, Field, Sum;
    static constexpr int FIELDS = 1, WIDE = 16;  // WIDE: numbers in a vector, or packed words
    static constexpr bool PACKED = false;
    template <int>
    static Field field(Held held) { return held; }
    static Sum add(Sum sum, Field field, const Input* x) { return sum + field * load<Floats>(x); }
    static void put(Input* to, Floats x) { store(to, x); }
};

#ifdef __AVX512BF16__
struct Bfloat16 : Float32 {  // one instruction multiplies pairs, and adds the products in float32
    typedef uint16_t Stored, Input;
    typedef Pairs Held, Field;
    static constexpr int WIDE = 32;
    template <int>
    static Field field(Held held) { return held; }
    static Sum add(Sum sum, Field field, const Input* x) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)field, (__m512bh)load<Pairs>(x));
    }
    static void put(Input* to, Floats x) { store(to, to_bfloat16(x)); }
};
#else
struct Bfloat16 : Float32 {
    typedef uint16_t Stored;
    typedef Halves Held;
    template <int>
    static Field field(Held held) { return from_bfloat16(held); }
};
#endif

// Unsigned integers of 8 or 4 bits, several in each word of 32 bits. A field is a pair of them, one
// from each half of the word. It is multiplied by a pair of 16-bit inputs and added in 32 bits,
// which is exact.
template <int BITS>
struct Packed {
    typedef int32_t Stored;
    typedef int16_t Input;
    typedef Words Held, Field, Sum;
    static constexpr int FIELDS = 16 / BITS, WIDE = 16;
    static constexpr int OFFSET = 1 << (BITS - 1);
    static constexpr bool PACKED = true;
    template <int FIELD>
    static Field field(Held held) {
        Pairs shifted = (Pairs)held >> (BITS * FIELD);
        return (Field)(FIELD < FIELDS - 1 ? shifted & (uint16_t)((1 << BITS) - 1) : shifted);
    }
    static Sum add(Sum sum, Field field, const Input* inputs) {
        Words x = load<Words>(inputs);
#ifdef __AVX512VNNI__
        return (Words)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)field, (__m512i)x);
#else
        return sum + (field & 0xffff) * (x << 16 >> 16) + (field >> 16) * (x >> 16);
#endif
    }
};

// -- number formats of the KV cache, and of weights that are unpacked for PyTorch

struct In32 {
    typedef float Stored;
    static Floats get(const float* from, int64_t count) { return load<Floats>(from, count); }
    static void put(float* to, Floats x, int64_t count) { store(to, x, count); }
};

struct In16 {
    typedef uint16_t Stored;
    static Floats get(const uint16_t* from, int64_t count) {
        return from_bfloat16(load<Halves>(from, count));
    }
    static void put(uint16_t* to, Floats x, int64_t count) { store(to, to_bfloat16(x), count); }
};

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

    // Call `one(i)` for every i below `items`, in any thread; return when all calls are done.
    template <class Do>
    void share(int64_t items, Do one) {
        auto& next = shared.next[loops % 2];
        int64_t piece = std::max<int64_t>(1, items / (threads * PIECES));
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

// -- products

// The inputs of a product. They are copied into the order in which the product reads them, and
// padded with zeros to whole vectors and tiles.
struct Inputs {
    std::vector<float> rows;     // (R, K), before copying
    std::vector<float> ordered;  // for each tile, (vectors in a row of the matrix, rows, 64 bytes)
    std::vector<float> offsets;  // for each tile, (lanes / 16, rows, 16): first terms of the sums,
                                 // as packed numbers are stored with OFFSET added
    std::vector<float> scales;   // (R,): 1, or the scale of inputs that were rounded to 16 bits
};

// Return how many rows to multiply at once if `left` of R are left.
inline int64_t tile_of(int64_t left, int64_t R) {
    return R == 1 ? 1 : left > 4 ? TILE : left > 2 ? 4 : 2;
}

inline int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

// Return how many vectors of inputs a row of the matrix is multiplied by.
template <class F>
inline int64_t vectors(const Matrix& w) {
    if (!F::PACKED) return divided(w.columns, F::WIDE);
    return divided(w.lanes, LANES) * (w.columns / w.lanes / 2);
}

// Copy the inputs of one row, to every `stride`th vector from `to` on.
template <class F>
void order_row(const Matrix& w, const float* from, float* to, int64_t stride) {
    for (int64_t k = 0; k < w.columns; k += F::WIDE, to += stride * LANES)
        for (int64_t half = 0; half < F::WIDE && k + half < w.columns; half += LANES)
            F::put((typename F::Input*)to + half,
                   load<Floats>(from + k + half, w.columns - k - half));
}

// As `order_row` for packed numbers: round the inputs to 16 bits, scaled so that the largest is
// 32767, and store them in pairs, and the offsets. Returns the scale.
template <class F>
float order_packed(const Matrix& w, const float* from, float* to, float* offsets, int64_t stride) {
    constexpr int64_t PAIRS = F::FIELDS;  // of numbers in a word
    Floats most{}, nothing{};
    for (int64_t k = 0; k < w.columns; k += LANES) {
        Floats x = load<Floats>(from + k, w.columns - k), size = x < 0.f ? -x : x;
        most = size > most ? size : most;
        nothing += x * 0.f;
    }
    if (sum(nothing) != 0) return NAN;  // an input is infinite or NaN, which has no integer
    float largest = 0;
    for (int i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
    float factor = largest > 0 ? 32767 / largest : 0;
    for (int64_t c = 0; c < w.lanes; c += LANES, offsets += stride * LANES) {
        Words offset{};
        auto rounded = [&](int64_t field) {
            Floats x = load<Floats>(from + field * w.lanes + c, w.lanes - c) * factor;
            return __builtin_convertvector(x + (x < 0.f ? Floats{} - .5f : Floats{} + .5f), Words);
        };
        for (int64_t word = 0; word < w.columns / w.lanes; word += 2 * PAIRS)
            for (int64_t field = 0; field < PAIRS; field++, to += stride * LANES) {
                Words low = rounded(word + field), high = rounded(word + field + PAIRS);
                store(to, (Floats)((low & 0xffff) | high << 16));
                offset -= (low + high) * F::OFFSET;
            }
        store(offsets, (Floats)offset);
    }
    return largest / 32767;
}

// Copy all inputs into the order in which the product reads them.
template <class F>
void order(const Matrix& w, int64_t R, Inputs& in) {
    int64_t padded = (R - 1) / TILE * TILE + tile_of((R - 1) % TILE + 1, R);
    int64_t across = vectors<F>(w), chunks = F::PACKED ? divided(w.lanes, LANES) : 0;
    in.ordered.assign(across * padded * LANES, 0.f);
    in.offsets.assign(chunks * padded * LANES, 0.f);
    in.scales.assign(R, 1.f);
    for (int64_t r = 0; r < R; r++) {
        int64_t first = r / TILE * TILE, tile = tile_of(R - first, R);
        const float* from = &in.rows[r * w.columns];
        float* to = &in.ordered[(first * across + r - first) * LANES];
        if constexpr (F::PACKED) {
            float* offsets = &in.offsets[(first * chunks + r - first) * LANES];
            in.scales[r] = order_packed<F>(w, from, to, offsets, tile);
        } else {
            order_row<F>(w, from, to, tile);
        }
    }
}

// Multiply one vector of each of MS rows of a matrix by the inputs of RS rows, field by field.
template <class F, int MS, int RS, int FIELD = 0>
inline void multiply(typename F::Sum (&sums)[MS][RS], const typename F::Held (&held)[MS],
                 const float* x) {
    if constexpr (FIELD < F::FIELDS) {
        typename F::Field fields[MS];
        for (int m = 0; m < MS; m++) fields[m] = F::template field<FIELD>(held[m]);
        for (int r = 0; r < RS; r++)
            for (int m = 0; m < MS; m++)
                sums[m][r] = F::add(sums[m][r], fields[m],
                                    (const typename F::Input*)(x + r * LANES));
        multiply<F, MS, RS, FIELD + 1>(sums, held, x + RS * LANES);
    }
}

// Multiply MS rows of a matrix, from row m on, by RS rows of inputs, from row r on. Each of the
// totals is a vector of partial sums.
template <class F, int MS, int RS>
void product_of(const Matrix& w, int64_t m, const Inputs& in, int64_t r, Floats (&total)[MS][RS]) {
    typedef typename F::Held Held;
    int64_t lanes = F::PACKED ? w.lanes : w.columns;
    int64_t parts = F::PACKED ? w.columns / lanes / 2 / F::FIELDS : 1;
    const float* x = &in.ordered[r * vectors<F>(w) * LANES];
    const float* offsets = F::PACKED ? &in.offsets[r * divided(lanes, LANES) * LANES] : nullptr;
    const typename F::Stored* rows[MS];
    const uint16_t* scales[MS];
    for (int i = 0; i < MS; i++) {
        int64_t row = std::min(m + i, w.rows - 1);  // repeat the last row if there are too few
        rows[i] = (const typename F::Stored*)w.numbers + row * parts * lanes;
        scales[i] = w.scales + row * lanes;
    }
    auto multiply_part = [&](typename F::Sum(&sums)[MS][RS], int64_t at, int64_t count)
                         __attribute__((always_inline)) {
        Held held[MS];
        for (int i = 0; i < MS; i++) {
            __builtin_prefetch((const char*)(rows[i] + at) + AHEAD, 0, 2);
            held[i] = load<Held>(rows[i] + at, count);
        }
        multiply<F, MS, RS>(sums, held, x);
        x += F::FIELDS * RS * LANES;
    };
    auto columns = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        if constexpr (!F::PACKED) {
            multiply_part(total, c, count);
        } else {
            Words sums[MS][RS];
            for (int r = 0; r < RS; r++, offsets += LANES)
                for (int i = 0; i < MS; i++) sums[i][r] = (Words)load<Floats>(offsets);
            for (int64_t n = 0; n < parts; n++) multiply_part(sums, n * lanes + c, count);
            for (int i = 0; i < MS; i++) {
                Floats scale = from_bfloat16(load<Halves>(scales[i] + c, count));
                for (int r = 0; r < RS; r++)
                    total[i][r] += __builtin_convertvector(sums[i][r], Floats) * scale;
            }
        }
    };
    int64_t c = 0;
    for (; c + F::WIDE <= lanes; c += F::WIDE) columns(c, F::WIDE);
    if (c < lanes) columns(c, lanes - c);
}

// As `product_of`, then add up the partial sums, scale, add the bias, and write or add to `out`.
template <class F, int MS, int RS>
void finish(const Matrix& w, int64_t m, const Inputs& in, int64_t r, int64_t R, bool add,
            float* out) {
    Floats total[MS][RS] = {};
    product_of<F, MS, RS>(w, m, in, r, total);
    Floats summed = sums<MS * RS>(*(Floats(*)[MS * RS])total);
    for (int i = 0; i < MS && m + i < w.rows; i++)
        for (int j = 0; j < RS && r + j < R; j++) {
            // An explicit fma, since the compiler might fuse it for one tile size and not another.
            float bias = w.bias ? w.bias[m + i] : 0.f;
            float value = std::fma(summed[i * RS + j], in.scales[r + j], bias);
            float& place = out[(r + j) * w.rows + m + i];
            place = add ? place + value : value;
        }
}

// Multiply inputs (R, K) by a matrix -> (R, M), written to `out` or added to it. The threads share
// the rows of the matrix.
template <class F>
void product_in(Thread& thread, const Matrix& w, Inputs& in, int64_t R, bool add, float* out) {
    constexpr int FEW = 2;  // rows of the matrix at once; the sums of more do not fit the registers
    order<F>(w, R, in);
    int64_t at_once = R == 1 ? 4 : FEW;
    thread.share((w.rows + at_once - 1) / at_once, [&](int64_t item) {
        int64_t m = item * at_once;
        for (int64_t r = 0; r < R; r += TILE)
            switch (tile_of(R - r, R)) {
                case 1: finish<F, 4, 1>(w, m, in, r, R, add, out); break;
                case 2: finish<F, FEW, 2>(w, m, in, r, R, add, out); break;
                case 4: finish<F, FEW, 4>(w, m, in, r, R, add, out); break;
                case 8: finish<F, FEW, 8>(w, m, in, r, R, add, out); break;
            }
    });
}

void product(Thread& thread, const Matrix& w, Inputs& in, int64_t R, bool add, float* out) {
    switch (w.bits) {
        case 32: return product_in<Float32>(thread, w, in, R, add, out);
        case 16: return product_in<Bfloat16>(thread, w, in, R, add, out);
        case 8: return product_in<Packed<8>>(thread, w, in, R, add, out);
        case 4: return product_in<Packed<4>>(thread, w, in, R, add, out);
    }
}

// -- between products: LayerNorm, GELU and attention

// LayerNorm: normalize to mean 0 and variance 1, then apply weight and bias.  (C,) -> (C,)
void normalize(const float* x, const Norm& w, int64_t C, float eps, float* out) {
    Floats total{}, squares{};
    for (int64_t c = 0; c < C; c += LANES) total += load<Floats>(x + c, C - c);
    float mean = sum(total) / C;
    for (int64_t c = 0; c < C; c += LANES) {
        Floats difference = load<Floats>(x + c, C - c) - mean;
        if (C - c < LANES) difference = load<Floats>((float*)&difference, C - c);
        squares += difference * difference;
    }
    float factor = 1 / std::sqrt(sum(squares) / C + eps);
    for (int64_t c = 0; c < C; c++)
        out[c] = (x[c] - mean) * factor * w.weight[c] + (w.bias ? w.bias[c] : 0.f);
}

Floats gelu(Floats x, bool tanh) {
    if (tanh)  // 0.5 (1 + tanh(y)) is sigmoid(2 y), here with y = sqrt(2 / pi) (x + 0.044715 x^3)
        return x / (exp(x * (x * x * 0.044715f + 1.f) * -1.59576912f) + 1.f);
    // erf by formula 7.1.26 of Abramowitz and Stegun, whose error is at most 1.5e-7.
    Floats z = (x < 0.f ? -x : x) * 0.70710678f, t = 1.f / (z * 0.3275911f + 1.f);
    Floats series = t * 1.061405429f;
    for (float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        series = (series + term) * t;
    Floats beyond = series * exp(-z * z);  // 1 - erf(z)
    return x * .5f * (x < 0.f ? beyond : 2.f - beyond);
}

// Compute the softmax in place.  (S,) -> (S,)
void softmax(float* x, int64_t S) {
    float most = *std::max_element(x, x + S);
    Floats totals{};
    for (int64_t s = 0; s < S; s += LANES) {
        Floats e = exp(load<Floats>(x + s, S - s) - most);
        store(x + s, e, S - s);
        totals += load<Floats>(x + s, S - s);
    }
    float total = sum(totals);
    for (int64_t s = 0; s < S; s += LANES) store(x + s, load<Floats>(x + s, S - s) / total, S - s);
}

// Compute attention for some heads of one row, 16 keys at a time and all heads of each key, since
// these are adjacent in memory. SIZE is D if that is known when this is compiled, so that the
// vectors of a head stay in registers, or else 0.  (heads, D), (S, C), (S, C) -> (heads, D)
template <class In, int64_t SIZE>
void attend(const float* q, const typename In::Stored* keys, const typename In::Stored* values,
            int64_t S, int64_t C, int64_t size, int64_t heads, std::vector<float>& p, float* out) {
    constexpr int CHUNK = 4;  // vectors of a head that are kept in registers
    const int64_t D = SIZE ? SIZE : size, room = divided(S, LANES) * LANES;
    p.resize(heads * room);
    float scale = 1 / std::sqrt((float)D);
    for (int64_t first = 0; first < S; first += LANES)
        for (int64_t h = 0; h < heads; h++) {
            Floats dots[LANES] = {};
            for (int64_t i = 0; i < LANES && first + i < S; i++)
                for (int64_t d = 0; d < D; d += LANES) {
                    auto key = keys + (first + i) * C + h * D + d;
                    __builtin_prefetch(key + LANES * C);
                    dots[i] += load<Floats>(q + h * D + d, D - d) * In::get(key, D - d);
                }
            store(&p[h * room + first], sums(dots) * scale);
        }
    for (int64_t h = 0; h < heads; h++) softmax(&p[h * room], S);
    std::fill(out, out + heads * D, 0.f);
    for (int64_t first = 0; first < S; first += LANES)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t at = 0; at < D; at += CHUNK * LANES) {
                float* to = out + h * D + at;
                int64_t left = D - at;
                Floats gathered[CHUNK] = {};
                for (int i = 0; i < CHUNK && i * LANES < left; i++)
                    gathered[i] = load<Floats>(to + i * LANES, left - i * LANES);
                for (int64_t s = first; s < first + LANES && s < S; s++)
                    for (int i = 0; i < CHUNK && i * LANES < left; i++) {
                        auto value = values + s * C + h * D + at + i * LANES;
                        __builtin_prefetch(value + LANES * C);
                        gathered[i] += In::get(value, left - i * LANES) * p[h * room + s];
                    }
                for (int i = 0; i < CHUNK && i * LANES < left; i++)
                    store(to + i * LANES, gathered[i], left - i * LANES);
            }
}

// Write each row's key and value into the cache, then compute its attention.  (R, 3 C) -> (R, C)
template <class In>
void attention(Thread& thread, const Model& model, const Cache& cache, const Rows& rows,
               int64_t layer, const float* qkv, std::vector<float>& p, float* out) {
    int64_t C = model.n_embd, H = model.n_head, D = C / H;
    auto keys = (typename In::Stored*)cache.keys, values = (typename In::Stored*)cache.values;
    auto at = [&](int64_t row, int64_t place) {
        return ((layer * cache.texts + rows.text[row]) * cache.capacity + place) * C;
    };
    thread.share(rows.count, [&](int64_t r) {
        for (int64_t c = 0; c < C; c += LANES) {
            const float* row = qkv + r * 3 * C + c;
            In::put(keys + at(r, rows.place[r]) + c, load<Floats>(row + C, C - c), C - c);
            In::put(values + at(r, rows.place[r]) + c, load<Floats>(row + 2 * C, C - c), C - c);
        }
    });
    // With few rows, the heads of a row are divided into parts, so that every thread has work.
    int64_t parts = rows.count < MANY ? std::min<int64_t>(H, 4) : 1, heads = divided(H, parts);
    auto attend_some = D == USUAL_HEAD ? attend<In, USUAL_HEAD> : attend<In, 0>;
    thread.share(rows.count * parts, [&](int64_t item) {
        int64_t r = item / parts, h = item % parts * heads, begin = at(r, 0) + h * D;
        attend_some(qkv + r * 3 * C + h * D, keys + begin, values + begin, rows.place[r] + 1, C, D,
                    std::clamp<int64_t>(H - h, 0, heads), p, out + r * C + h * D);
    });
}

}  // namespace

// Compute the forward pass. The threads share products and attention, and wait for one another
// after each; every thread computes what is cheap (norms and GELU) for itself, which needs no
// waiting.
extern "C" void step(const Model* the_model, const Cache* the_cache, const Rows* the_rows,
                     int threads) {
    const Model& model = *the_model;
    const Cache& cache = *the_cache;
    const Rows& rows = *the_rows;
    int64_t R = rows.count, C = model.n_embd, M = model.n_inner;
    bool tanh = model.tanh;
    auto attention_in = cache.bits == 32 ? attention<In32> : attention<In16>;
    std::vector<float> qkv(R * 3 * C), gathered(R * C), hidden(R * M);
    Thread::Shared shared;
#pragma omp parallel num_threads(threads)
    {
        Thread thread(shared);
        Inputs in;
        std::vector<float> p;
        auto normalized = [&](const Norm& w, const int64_t* which, int64_t count) {
            in.rows.resize(count * C);
            for (int64_t i = 0; i < count; i++) {
                const float* x = rows.x + (which ? which[i] : i) * C;
                normalize(x, w, C, model.norm_eps, &in.rows[i * C]);
            }
        };
        auto activated = [&] {
            in.rows.resize(R * M);
            for (int64_t i = 0; i < R * M; i += LANES)
                store(&in.rows[i], gelu(load<Floats>(&hidden[i], R * M - i), tanh), R * M - i);
        };
        for (int64_t layer = 0; layer < model.n_layer; layer++) {
            const Layer& w = model.layers[layer];
            normalized(w.ln_1, nullptr, R);
            product(thread, w.c_attn, in, R, false, qkv.data());
            attention_in(thread, model, cache, rows, layer, qkv.data(), p, gathered.data());
            in.rows = gathered;
            product(thread, w.c_proj, in, R, true, rows.x);
            normalized(w.ln_2, nullptr, R);
            product(thread, w.c_fc, in, R, false, hidden.data());
            activated();
            product(thread, w.mlp_c_proj, in, R, true, rows.x);
        }
        normalized(model.ln_f, rows.logits_of, rows.wanted);
        product(thread, model.head, in, rows.wanted, false, rows.logits);
    }
}

// Unpack a matrix into float32 or bfloat16, with a single rounding.  -> (M, K)
template <int BITS, class Out>
void unpack_to(const Matrix& w, typename Out::Stored* to, int threads) {
    constexpr int64_t FIELDS = 32 / BITS;
    int64_t K = w.columns, lanes = w.lanes;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < w.rows; m++) {
        auto words = (const int32_t*)w.numbers + m * K / FIELDS;
        for (int64_t c = 0; c < lanes; c += LANES) {
            Floats scale = from_bfloat16(load<Halves>(w.scales + m * lanes + c, lanes - c));
            for (int64_t at = 0; at < K; at += lanes * FIELDS) {
                Naturals held = load<Naturals>(words + at / FIELDS + c, lanes - c);
                for (int64_t field = 0; field < FIELDS; field++, held >>= BITS) {
                    Words number = (Words)(held & ((1u << BITS) - 1)) - Packed<BITS>::OFFSET;
                    Floats value = __builtin_convertvector(number, Floats) * scale;
                    Out::put(to + m * K + at + field * lanes + c, value, lanes - c);
                }
            }
        }
    }
}

extern "C" void unpack(const Matrix* w, void* to, int64_t bits, int threads) {
    if (w->bits == 8 && bits == 32) unpack_to<8, In32>(*w, (float*)to, threads);
    if (w->bits == 8 && bits == 16) unpack_to<8, In16>(*w, (uint16_t*)to, threads);
    if (w->bits == 4 && bits == 32) unpack_to<4, In32>(*w, (float*)to, threads);
    if (w->bits == 4 && bits == 16) unpack_to<4, In16>(*w, (uint16_t*)to, threads);
}
