// Pieces of a training step of GPT-2 on a CPU, forward and backward: what lies between the matrix
// products, which stay PyTorch's.
//
// Each piece reads its tensors once and writes them once, where PyTorch has an operation, and a pass
// over memory, for each of several steps. All sums are in float32. Rows are divided into the same
// parts, and parts are added in the same order, for any number of threads, so that the results do
// not depend on it.
//
// Uses the vector extensions of GCC and Clang, which work on every processor. fused.py calls it;
// machine/native.py compiles it.
//
// Shapes:  N tokens of a micro-batch: B rows of T    C channels      H heads    D channels per head
//          M channels inside the MLP                 V vocabulary    S keys, the same tokens
//
// A tensor of "stored" numbers is float32 or bfloat16, as `bits` says: what a product reads or wrote.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../machine/vectors.h"
#include "dropout.h"

namespace {

// -- vectors

// As many numbers as a register has. GCC keeps longer vectors in memory while it computes with them.
#if defined(__AVX512F__)
typedef Floats Part;
#elif defined(__AVX__)
typedef float Part __attribute__((vector_size(32)));
#else
typedef float Part __attribute__((vector_size(16)));
#endif
typedef decltype(Part{} < Part{}) PartWords;
constexpr int WIDTH = sizeof(Part) / sizeof(float);

inline Floats filled(float x) { return Floats{} + x; }

inline float largest(Floats v) {
    Floats w = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v = v > w ? v : w;
    float most = v[0];
    for (int i = 1; i < LANES / 2; i++) most = most < v[i] ? v[i] : most;
    return most;
}

// Compute 2^x, as 2^n * 2^r with n = round(x) and the Taylor series of e^(r ln 2), |r| <= 1/2.
inline Part exp2_of(Part x) {
    x = x < -126.f ? Part{} - 126.f : x;
    x = x > 127.f ? Part{} + 127.f : x;
    Part whole = x + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
    PartWords power = (PartWords)whole << 23;
    Part rest = x - (whole - 12582912.f);
    Part series = rest * 1.5403530e-4f + 1.3333558e-3f;
    for (float term : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
        series = series * rest + term;
    return (Part)((PartWords)series + power);
}

inline Floats exp2(Floats x) {
    Part parts[LANES / WIDTH];
    std::memcpy(parts, &x, sizeof x);
    for (Part& part : parts) part = exp2_of(part);
    std::memcpy(&x, parts, sizeof x);
    return x;
}

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// -- formats of stored numbers

struct In32 {
    static Floats get(const void* from, int64_t at, int64_t count = LANES) {
        return load<Floats>((const float*)from + at, count);
    }
    static void put(void* to, int64_t at, Floats x, int64_t count) {
        store((float*)to + at, x, count);
    }
};

struct In16 {
    static Floats get(const void* from, int64_t at, int64_t count = LANES) {
        return from_bfloat16(load<Halves>((const uint16_t*)from + at, count));
    }
    static void put(void* to, int64_t at, Floats x, int64_t count) {
        store((uint16_t*)to + at, to_bfloat16(x), count);
    }
};

// Call `run(In32())` or `run(In16())`.
template <class Run>
void in_format(int64_t bits, Run run) {
    bits == 32 ? run(In32()) : run(In16());
}

inline int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

// -- threads

constexpr int64_t PARTS = 64;  // of the rows; the same for any number of threads

// Call `one(part, first, end)` for all parts of `rows`, in any thread.
template <class Do>
void share(int64_t rows, int64_t threads, Do one) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        int64_t first = rows * part / PARTS, end = rows * (part + 1) / PARTS;
        if (first < end) one(part, first, end);
    }
}

// Sums over the rows of up to two columns of numbers, such as the gradient of a bias: each part has
// its own, and they are added at the end.
struct Sums {
    int64_t columns, room;
    int count;
    float* parts;

    Sums(int64_t columns, int count) : columns(columns), count(count) {
        static thread_local std::vector<float> kept;
        room = divided(columns, LANES) * LANES;
        kept.assign(PARTS * count * room, 0.f);
        parts = kept.data();
    }
    float* of(int64_t part, int which = 0) { return parts + (part * count + which) * room; }
    void finish(float* out, int64_t threads, int which = 0) {
        if (!out) return;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t c = 0; c < columns; c += LANES) {
            Floats total{};
            for (int64_t part = 0; part < PARTS; part++)
                total += load<Floats>(of(part, which) + c);
            store(out + c, total, columns - c);
        }
    }
};

inline void add_to(float* sums, Floats x) { store(sums, load<Floats>(sums) + x); }

// -- dropout

struct Dropout {
    const int32_t* seeds;  // (B,), one for each row, or null: nothing is dropped
    int64_t threshold;    // probability * 2^24
    float scale;          // 1 / (1 - probability)

    // Return 0 or `scale` for each of 16 numbers.
    Floats mask(int64_t row, Naturals index) const {
        Naturals bits = random_bits(index, (uint32_t)seeds[row]);
        return bits >= (uint32_t)threshold ? filled(scale) : Floats{};
    }
    static Naturals from(uint32_t first, uint32_t step = 1) {
        return Naturals{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * step + first;
    }
};

}  // namespace

// -- residual stream and LayerNorm

// sum_out = x + dropout(branch + its bias), then LayerNorm of that (of x, without a branch) to `out`.
// `stats` has each token's mean and factor. Without `out`, there is no norm.
extern "C" void add_and_norm(const float* x, const void* branch, const float* branch_bias,
                             const int32_t* seeds, int64_t threshold, float scale, float* sum_out,
                             const float* weight, const float* bias, void* out, float* stats,
                             int64_t T, int64_t N, int64_t C, float eps, int64_t bits,
                             int64_t threads) {
    Dropout dropout{seeds, threshold, scale};
    auto one = [&](auto stored, int64_t n) {
        const float* row = x + n * C;
        if (branch) {
            float* to = sum_out + n * C;
            for (int64_t c = 0; c < C; c += LANES) {
                Floats added = stored.get(branch, n * C + c, C - c);
                if (branch_bias) added += load<Floats>(branch_bias + c, C - c);
                if (seeds) added *= dropout.mask(n / T, Dropout::from(n % T * C + c));
                store(to + c, load<Floats>(row + c, C - c) + added, C - c);
            }
            row = to;
        }
        if (!out) return;
        Floats total{}, squares{};
        for (int64_t c = 0; c < C; c += LANES) total += load<Floats>(row + c, C - c);
        float mean = sum(total) / C;
        for (int64_t c = 0; c < C; c += LANES) {
            Floats difference = load<Floats>(row + c, C - c) - mean;
            if (C - c < LANES) difference = load<Floats>((float*)&difference, C - c);
            squares += difference * difference;
        }
        float factor = 1 / std::sqrt(sum(squares) / C + eps);
        stats[2 * n] = mean, stats[2 * n + 1] = factor;
        for (int64_t c = 0; c < C; c += LANES) {
            Floats y = (load<Floats>(row + c, C - c) - mean) * factor;
            y *= load<Floats>(weight + c, C - c);
            if (bias) y += load<Floats>(bias + c, C - c);
            stored.put(out, n * C + c, y, C - c);
        }
    };
    in_format(bits, [&](auto stored) {
        share(N, threads, [&](int64_t, int64_t first, int64_t end) {
            for (int64_t n = first; n < end; n++) one(stored, n);
        });
    });
}

// dx = the gradient that reaches x around the norm (`around`) plus the one through it.
extern "C" void norm_backward(const void* dy, const float* x, const float* stats,
                              const float* weight, const float* around, float* dx,
                              float* d_weight, float* d_bias, int64_t N, int64_t C, int64_t bits,
                              int64_t threads) {
    Sums sums(C, 2);
    auto one = [&](auto stored, int64_t n, float* dw, float* db) {
        float mean = stats[2 * n], factor = stats[2 * n + 1];
        Floats g_total{}, gx_total{};
        for (int64_t c = 0; c < C; c += LANES) {
            Floats d = stored.get(dy, n * C + c, C - c);
            Floats normal = (load<Floats>(x + n * C + c, C - c) - mean) * factor;
            Floats g = d * load<Floats>(weight + c, C - c);
            g_total += g, gx_total += g * normal;  // d, and so g, is 0 beyond C
            add_to(dw + c, d * normal);
            if (d_bias) add_to(db + c, d);
        }
        float g_mean = sum(g_total) / C, gx_mean = sum(gx_total) / C;
        for (int64_t c = 0; c < C; c += LANES) {
            Floats g = stored.get(dy, n * C + c, C - c) * load<Floats>(weight + c, C - c);
            Floats normal = (load<Floats>(x + n * C + c, C - c) - mean) * factor;
            Floats d = (g - g_mean - normal * gx_mean) * factor;
            store(dx + n * C + c, d + load<Floats>(around + n * C + c, C - c), C - c);
        }
    };
    in_format(bits, [&](auto stored) {
        share(N, threads, [&](int64_t part, int64_t first, int64_t end) {
            for (int64_t n = first; n < end; n++) one(stored, n, sums.of(part), sums.of(part, 1));
        });
    });
    sums.finish(d_weight, threads);
    sums.finish(d_bias, threads, 1);
}

// The gradient of the residual stream as the one of a branch: dropped, stored, and summed over the
// tokens for the branch's bias.
extern "C" void branch_gradient(const float* dx, const int32_t* seeds, int64_t threshold,
                                float scale, void* out, float* d_bias, int64_t T, int64_t N,
                                int64_t C, int64_t bits, int64_t threads) {
    Dropout dropout{seeds, threshold, scale};
    Sums sums(C, 1);
    in_format(bits, [&](auto stored) {
        share(N, threads, [&](int64_t part, int64_t first, int64_t end) {
            for (int64_t n = first; n < end; n++)
                for (int64_t c = 0; c < C; c += LANES) {
                    Floats d = load<Floats>(dx + n * C + c, C - c);
                    if (seeds) d *= dropout.mask(n / T, Dropout::from(n % T * C + c));
                    stored.put(out, n * C + c, d, C - c);
                    if (d_bias) add_to(sums.of(part) + c, d);
                }
        });
    });
    sums.finish(d_bias, threads);
}

namespace {

// -- GELU

// Return the probability that GELU multiplies x by, and its derivative.
template <bool TANH>
inline Floats gate(Floats x, Floats& slope) {
    if (TANH) {  // 0.5 (1 + tanh(y)) is sigmoid(2 y), here with y = sqrt(2 / pi) (x + 0.044715 x^3)
        Floats square = x * x;
        Floats e = exp2(x * (square * 0.044715f + 1.f) * (-1.59576912f * LOG2_E));
        Floats gate = 1.f / (e + 1.f);
        slope = gate * (1.f - gate) * (square * (3 * 0.044715f) + 1.f) * 1.59576912f;
        return gate;
    }
    // erf by formula 7.1.26 of Abramowitz and Stegun, whose error is at most 1.5e-7.
    Floats z = (x < 0.f ? -x : x) * 0.70710678f, t = 1.f / (z * 0.3275911f + 1.f);
    Floats series = t * 1.061405429f;
    for (float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        series = (series + term) * t;
    Floats e = exp2(z * z * -LOG2_E);
    slope = e * 0.39894228f;  // the density of the normal distribution
    Floats beyond = series * e * .5f;
    return x < 0.f ? beyond : 1.f - beyond;
}

}  // namespace

// Apply GELU to x + bias, and leave its derivative in the place of x for the backward pass.
extern "C" void gelu(void* x, const float* bias, void* out, int64_t N, int64_t M, int64_t tanh,
                     int64_t bits, int64_t threads) {
    auto gate_of = [&](auto stored, auto gate) {
        share(N, threads, [&](int64_t, int64_t first, int64_t end) {
            for (int64_t n = first; n < end; n++)
                for (int64_t m = 0; m < M; m += LANES) {
                    Floats value = stored.get(x, n * M + m, M - m), slope;
                    if (bias) value += load<Floats>(bias + m, M - m);
                    Floats open = gate(value, slope);
                    stored.put(out, n * M + m, value * open, M - m);
                    stored.put(x, n * M + m, open + value * slope, M - m);
                }
        });
    };
    in_format(bits, [&](auto stored) {
        if (tanh)
            gate_of(stored, [](Floats x, Floats& slope) { return gate<true>(x, slope); });
        else
            gate_of(stored, [](Floats x, Floats& slope) { return gate<false>(x, slope); });
    });
}

extern "C" void gelu_backward(void* d, const void* derivative, float* d_bias, int64_t N, int64_t M,
                              int64_t bits, int64_t threads) {
    Sums sums(M, 1);
    in_format(bits, [&](auto stored) {
        share(N, threads, [&](int64_t part, int64_t first, int64_t end) {
            for (int64_t n = first; n < end; n++)
                for (int64_t m = 0; m < M; m += LANES) {
                    int64_t at = n * M + m;
                    Floats dx = stored.get(d, at, M - m) * stored.get(derivative, at, M - m);
                    stored.put(d, at, dx, M - m);
                    if (d_bias) add_to(sums.of(part) + m, dx);
                }
        });
    });
    sums.finish(d_bias, threads);
}

namespace {

// -- small products, for attention
//
// Operands are in words of 32 bits: a float, or two bfloat16 that one instruction multiplies and
// adds. A word of the first operand is broadcast; of the second, 16 adjacent ones are read.

struct Single {
    static constexpr int64_t PER = 1;  // numbers in a word
    static Part add(Part sum, float a, Part b) { return sum + b * a; }
    static void put(float* words, int64_t at, Floats x) { store(words + at, x); }
    // The words of two rows of numbers: one row of words after the other.
    static void put_rows(float* words, int64_t width, Floats first, Floats second) {
        store(words, first);
        store(words + width, second);
    }
};

#ifdef __AVX512BF16__
struct Paired {
    static constexpr int64_t PER = 2;
    static Floats add(Floats sum, float a, Floats b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
    }
    static void put(float* words, int64_t at, Floats x) {
        store((uint16_t*)words + at, to_bfloat16(x));
    }
    // The words of two rows of numbers: a number of each row in every word.
    static void put_rows(float* words, int64_t, Floats first, Floats second) {
        store(words, (Floats)((rounded(first) >> 16) | (rounded(second) & 0xffff0000u)));
    }
};
#else
typedef Single Paired;
#endif

// So many rows and vectors of a product are in registers at once.
constexpr int TALL = 4;
#ifdef __AVX512F__
constexpr int WIDE = 4;
#else
constexpr int WIDE = 1;
#endif
constexpr int64_t QUERIES = 64, KEYS = 64;  // in a block

template <class Math, int N>
inline void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                 int64_t steps, float* out, int64_t width, bool add) {
    constexpr int M = N * LANES / WIDTH;
    Part total[TALL][M];
    for (int i = 0; i < TALL; i++)
        for (int m = 0; m < M; m++)
            total[i][m] = add ? load<Part>(out + i * width + m * WIDTH) : Part{};
    for (int64_t k = 0; k < steps; k++, a += a_step, b += b_step) {
        Part right[M];
        for (int m = 0; m < M; m++) right[m] = load<Part>(b + m * WIDTH);
        for (int i = 0; i < TALL; i++) {
            float left = a[i * a_row];
            for (int m = 0; m < M; m++) total[i][m] = Math::add(total[i][m], left, right[m]);
        }
    }
    for (int i = 0; i < TALL; i++)
        for (int m = 0; m < M; m++) store(out + i * width + m * WIDTH, total[i][m]);
}

// Four rows of a product: out[i][j] = sum over k of a[i * a_row + k * a_step] * b[k * b_step + j],
// for j below 16 * vectors; with `add`, added to `out`.
template <class Math>
inline void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                    int64_t steps, int64_t vectors, float* out, int64_t width, bool add) {
    while (vectors > 0) {
        int n = std::min<int64_t>(vectors, WIDE);
        switch (n) {
            case 1: tile<Math, 1>(a, a_row, a_step, b, b_step, steps, out, width, add); break;
            case 2: tile<Math, 2>(a, a_row, a_step, b, b_step, steps, out, width, add); break;
            case 3: tile<Math, 3>(a, a_row, a_step, b, b_step, steps, out, width, add); break;
            case 4: tile<Math, 4>(a, a_row, a_step, b, b_step, steps, out, width, add); break;
        }
        vectors -= n, b += n * LANES, out += n * LANES;
    }
}

// Transpose 16 x 16 words: exchange the halves that are 8, 4, 2 and 1 apart.
template <int S>
inline void exchange(Floats (&v)[LANES]) {
#define KEEP(l) ((l) & S ? 16 + (l) - S : (l))
#define MOVE(l) ((l) & S ? 16 + (l) : (l) + S)
#define ALL(f) \
    f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), \
        f(15)
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) {
            Floats a = v[i], b = v[i + S];
            v[i] = __builtin_shufflevector(a, b, ALL(KEEP));
            v[i + S] = __builtin_shufflevector(a, b, ALL(MOVE));
        }
#undef KEEP
#undef MOVE
#undef ALL
}

// Transpose rows of words, `width` words each, 16 rows and `width` columns at a time.
// (rows, width) -> (width, rows)
inline void transpose(const float* from, int64_t rows, int64_t width, float* to) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t w = 0; w < width; w += LANES) {
            Floats v[LANES];
            int64_t count = std::min<int64_t>(LANES, width - w);
            for (int i = 0; i < LANES; i++) v[i] = load<Floats>(from + (r + i) * width + w, count);
            exchange<8>(v), exchange<4>(v), exchange<2>(v), exchange<1>(v);
            for (int64_t i = 0; i < count; i++) store(to + (w + i) * rows + r, v[i]);
        }
}

// -- attention

struct Heads {
    int64_t B, T, H, D;
    const float* bias;  // (3 C,) of query, key and value, or null
    Dropout dropout;
};

// Memory of a thread, which grows and is kept.
inline float* room(int which, int64_t words) {
    static thread_local std::vector<float> kept[12];
    if ((int64_t)kept[which].size() < words) kept[which].resize(words);
    return kept[which].data();
}

// One head of one row: its numbers padded to whole vectors of channels and of tokens.
template <class In, class Math>
struct Head {
    static constexpr int64_t PER = Math::PER;
    const Heads& all;
    int64_t b, h, C, wide, words;  // wide: D in whole vectors; words: of a row of `wide` numbers

    Head(const Heads& all, int64_t item)
        : all(all), b(item / all.H), h(item % all.H), C(all.H * all.D),
          wide(divided(all.D, LANES) * LANES), words(wide / PER) {}

    // Read 16 channels of a token's query (0), key (1) or value (2).
    Floats get(const void* qkv, int64_t which, int64_t t, int64_t d) const {
        if (t >= all.T) return Floats{};
        int64_t at = which * C + h * all.D + d;
        Floats x = In::get(qkv, (b * all.T + t) * 3 * C + at, all.D - d);
        return all.bias ? x + load<Floats>(all.bias + at, all.D - d) : x;
    }
    Floats get_one(const void* y, int64_t t, int64_t d) const {  // of y or its gradient
        if (t >= all.T) return Floats{};
        return In::get(y, (b * all.T + t) * C + h * all.D + d, all.D - d);
    }
    void put(void* qkv, int64_t which, int64_t t, const float* row) const {
        for (int64_t d = 0; d < all.D; d += LANES)
            In::put(qkv, (b * all.T + t) * 3 * C + which * C + h * all.D + d,
                    load<Floats>(row + d), all.D - d);
    }
    // Copy tokens as rows of words.
    template <class Get>
    void rows(Get get, int64_t first, int64_t count, float* to) const {
        for (int64_t t = 0; t < count; t++)
            for (int64_t d = 0; d < wide; d += LANES)
                Math::put(to + t * words, d, get(first + t, d));
    }
    // Copy pairs of tokens as rows of words.
    template <class Get>
    void pairs(Get get, int64_t first, int64_t count, float* to) const {
        for (int64_t t = 0; t < count; t += 2)
            for (int64_t d = 0; d < wide; d += LANES)
                Math::put_rows(to + t / PER * wide + d, wide, get(first + t, d),
                               get(first + t + 1, d));
    }
    // The mask of dropout for 16 queries from t on, at key s.
    Floats kept(int64_t t, int64_t s) const {
        return all.dropout.mask(b, Dropout::from((h * all.T + t) * all.T + s, all.T));
    }
};

// Scores are computed with a row for each key and a lane for each query, so that the softmax needs
// no sums across lanes. Of each block, only what a query may see is computed, in steps of 16.
template <class In, class Math>
void attend(const Heads& all, int64_t item, const void* qkv, void* y, float* logs) {
    constexpr int64_t PER = Math::PER;
    Head<In, Math> head(all, item);
    int64_t T = all.T, D = all.D, padded = divided(T, QUERIES) * QUERIES;
    int64_t wide = head.wide, words = head.words;
    float *keys = room(0, padded * words), *values = room(1, padded * wide / PER);
    float *queries = room(2, QUERIES * words), *across = room(3, QUERIES * words);
    float *scores = room(4, padded * QUERIES), *weights = room(5, padded * QUERIES);
    float* gathered = room(6, TALL * wide);
    head.rows([&](int64_t t, int64_t d) { return head.get(qkv, 1, t, d); }, 0, padded, keys);
    head.pairs([&](int64_t t, int64_t d) { return head.get(qkv, 2, t, d); }, 0, padded, values);
    float scale = LOG2_E / std::sqrt((float)D);
    for (int64_t first = 0; first < T; first += QUERIES) {
        auto get = [&](int64_t t, int64_t d) { return head.get(qkv, 0, t, d); };
        head.rows(get, first, QUERIES, queries);
        transpose(queries, QUERIES, words, across);
        int64_t end = std::min(T, first + QUERIES);
        for (int64_t s = 0; s < divided(end, LANES) * LANES; s += TALL) {
            int64_t dead = std::max<int64_t>(0, s - first) / LANES * LANES;
            product<Math>(keys + s * words, words, 1, across + dead, QUERIES, words,
                          (QUERIES - dead) / LANES, scores + s * QUERIES + dead, QUERIES, false);
        }
        for (int64_t t = first; t < end; t += LANES) {
            int64_t seen = t + LANES;  // keys that one of the 16 queries sees, or a few more
            float *column = scores + t - first, *to = weights + t - first;
            Words query = (Words)Dropout::from(t);
            Floats most = filled(-INFINITY), total{};
            for (int64_t s = 0; s < seen; s++) {
                Floats score = load<Floats>(column + s * QUERIES);
                if (s > t) score = query < (int32_t)s ? filled(-INFINITY) : score;
                most = score > most ? score : most;
            }
            most *= scale;
            auto weight = [&](int64_t s) __attribute__((always_inline)) {
                Floats p = exp2(load<Floats>(column + s * QUERIES) * scale - most);
                if (s > t) p = query < (int32_t)s ? Floats{} : p;
                total += p;
                return all.dropout.seeds ? p * head.kept(t, s) : p;
            };
            for (int64_t s = 0; s < seen; s += 2) {
                Floats one = weight(s), other = weight(s + 1);
                Math::put_rows(to + s / PER * QUERIES, QUERIES, one, other);
            }
            for (int i = 0; i < LANES && t + i < T; i++)
                logs[(head.b * all.H + head.h) * T + t + i] = most[i] + std::log2(total[i]);
            for (int64_t i = 0; i < LANES; i += TALL) {
                product<Math>(to + i, 1, QUERIES, values, wide, seen / PER, wide / LANES, gathered,
                              wide, false);
                for (int64_t j = 0; j < TALL && t + i + j < T; j++)
                    for (int64_t d = 0; d < D; d += LANES)
                        In::put(y, (head.b * T + t + i + j) * head.C + head.h * D + d,
                                load<Floats>(gathered + j * wide + d) / total[i + j], D - d);
            }
        }
    }
}

// P: a block's weights; dP their gradient; dS = P * (dP - sum of P * dP) that of the scores. Then
// dV = P' dY, dQ = dS K and dK = dS' Q.
template <class In, class Math>
void attend_backward(const Heads& all, int64_t item, const void* qkv,
                     const void* y, const void* dy, const float* logs, void* d_qkv) {
    constexpr int64_t PER = Math::PER, ACROSS = QUERIES / PER;  // words of a row of queries
    Head<In, Math> head(all, item);
    int64_t T = all.T, D = all.D, padded = divided(T, QUERIES) * QUERIES;
    int64_t wide = head.wide, words = head.words;
    auto query = [&](int64_t t, int64_t d) { return head.get(qkv, 0, t, d); };
    auto key = [&](int64_t t, int64_t d) { return head.get(qkv, 1, t, d); };
    auto value = [&](int64_t t, int64_t d) { return head.get(qkv, 2, t, d); };
    auto gradient = [&](int64_t t, int64_t d) { return head.get_one(dy, t, d); };
    float *keys = room(0, padded * words), *values = room(1, padded * words);
    float* key_pairs = room(2, padded * wide / PER);
    float *dk = room(3, padded * wide), *dv = room(4, padded * wide);
    float *rows = room(5, QUERIES * words), *dq = room(6, QUERIES * wide);
    float* columns = room(7, 2 * QUERIES * words);  // queries, then the gradients of y, transposed
    float* in_pairs = room(8, 2 * QUERIES * words);
    float* scores = room(9, 2 * KEYS * QUERIES);  // then dP
    float* weights = room(10, 3 * KEYS * QUERIES);  // P, dS, and dS in pairs of keys
    float *d_scores = weights + KEYS * QUERIES, *pairs = d_scores + KEYS * QUERIES;
    float *dp = scores + KEYS * QUERIES, *dy_columns = columns + QUERIES * words;
    float *dy_pairs = in_pairs + QUERIES * words, *delta = room(11, QUERIES);
    head.rows(key, 0, padded, keys);
    head.rows(value, 0, padded, values);
    head.pairs(key, 0, padded, key_pairs);
    std::fill(dk, dk + padded * wide, 0.f);
    std::fill(dv, dv + padded * wide, 0.f);
    float scale = 1 / std::sqrt((float)D);
    for (int64_t first = 0; first < T; first += QUERIES) {
        head.rows(query, first, QUERIES, rows);
        transpose(rows, QUERIES, words, columns);
        head.rows(gradient, first, QUERIES, rows);
        transpose(rows, QUERIES, words, dy_columns);
        head.pairs(query, first, QUERIES, in_pairs);
        head.pairs(gradient, first, QUERIES, dy_pairs);
        for (int64_t t = 0; t < QUERIES; t++) {
            Floats total{};
            for (int64_t d = 0; d < D; d += LANES)
                total += gradient(first + t, d) * head.get_one(y, first + t, d);
            delta[t] = sum(total);
        }
        std::fill(dq, dq + QUERIES * wide, 0.f);
        int64_t end = std::min(T, first + QUERIES);
        for (int64_t from = 0; from < end; from += KEYS) {
            int64_t count = std::min(KEYS, divided(end - from, LANES) * LANES);
            // Of a key's row in the block, the queries before this one do not see it.
            auto dead = [&](int64_t s) {
                return std::max<int64_t>(0, from + s - first) / LANES * LANES;
            };
            for (int64_t s = 0; s < count; s += TALL) {
                int64_t n = dead(s), left = (QUERIES - n) / LANES;
                product<Math>(keys + (from + s) * words, words, 1, columns + n, QUERIES, words,
                              left, scores + s * QUERIES + n, QUERIES, false);
                product<Math>(values + (from + s) * words, words, 1, dy_columns + n, QUERIES,
                              words, left, dp + s * QUERIES + n, QUERIES, false);
            }
            for (int64_t t = 0; t < QUERIES; t += LANES) {
                Words place = (Words)Dropout::from(first + t);
                const float* log_row = logs + (head.b * all.H + head.h) * T + first + t;
                Floats log = load<Floats>(log_row, std::max<int64_t>(0, T - first - t));
                Floats mean = load<Floats>(delta + t);
                auto weigh = [&](int64_t s) __attribute__((always_inline)) {
                    Floats score = load<Floats>(scores + s * QUERIES + t);
                    Floats p = exp2(score * (scale * LOG2_E) - log);
                    if (from + s > first + t) p = place < (int32_t)(from + s) ? Floats{} : p;
                    Floats d = load<Floats>(dp + s * QUERIES + t), dropped = p;
                    if (all.dropout.seeds) {
                        Floats mask = head.kept(first + t, from + s);
                        d *= mask, dropped *= mask;
                    }
                    Math::put(weights + s * ACROSS, t, dropped);
                    d = p * (d - mean) * scale;
                    Math::put(d_scores + s * ACROSS, t, d);
                    return d;
                };
                int64_t seen = std::min(count, first + t + LANES - from);
                for (int64_t s = 0; s < seen; s += 2) {
                    Floats one = weigh(s), other = weigh(s + 1);
                    Math::put_rows(pairs + s / PER * QUERIES + t, QUERIES, one, other);
                }
                if (seen > 0)
                    for (int64_t i = t; i < t + LANES; i += TALL)
                        product<Math>(pairs + i, 1, QUERIES, key_pairs + from / PER * wide, wide,
                                      seen / PER, wide / LANES, dq + i * wide, wide, true);
            }
            for (int64_t s = 0; s < count; s += TALL) {
                int64_t n = dead(s) / PER;
                product<Math>(weights + s * ACROSS + n, ACROSS, 1, dy_pairs + n * wide, wide,
                              ACROSS - n, wide / LANES, dv + (from + s) * wide, wide, true);
                product<Math>(d_scores + s * ACROSS + n, ACROSS, 1, in_pairs + n * wide, wide,
                              ACROSS - n, wide / LANES, dk + (from + s) * wide, wide, true);
            }
        }
        for (int64_t t = first; t < end; t++) head.put(d_qkv, 0, t, dq + (t - first) * wide);
    }
    for (int64_t t = 0; t < T; t++) {
        head.put(d_qkv, 1, t, dk + t * wide);
        head.put(d_qkv, 2, t, dv + t * wide);
    }
}

}  // namespace

extern "C" void attention(const void* qkv, const float* bias, const int32_t* seeds,
                          int64_t threshold, float scale, void* y, float* logs, int64_t B,
                          int64_t T, int64_t H, int64_t D, int64_t bits, int64_t threads) {
    Heads all{B, T, H, D, bias, {seeds, threshold, scale}};
    auto one = bits == 32 ? attend<In32, Single> : attend<In16, Paired>;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t item = 0; item < B * H; item++) one(all, item, qkv, y, logs);
}

extern "C" void attention_backward(const void* qkv, const float* bias, const int32_t* seeds,
                                   int64_t threshold, float scale, const void* y, const void* dy,
                                   const float* logs, void* d_qkv, int64_t B, int64_t T,
                                   int64_t H, int64_t D, int64_t bits, int64_t threads) {
    Heads all{B, T, H, D, bias, {seeds, threshold, scale}};
    auto one = bits == 32 ? attend_backward<In32, Single> : attend_backward<In16, Paired>;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t item = 0; item < B * H; item++) one(all, item, qkv, y, dy, logs, d_qkv);
}

// -- cross entropy

// Turn the logits of each token into the gradient of its loss, times `scale`, in place, unless that
// is null; `nats` is the loss. A target of -1 has neither.
extern "C" void cross_entropy(void* logits, const int64_t* targets, const float* scale, float* nats,
                              int64_t N, int64_t V, int64_t bits, int64_t threads) {
    const int64_t whole = V / LANES * LANES, left = V - whole;
    const Words inside = (Words)Dropout::from(0) < (int32_t)left;
    auto one = [&](auto stored, int64_t n) {
        int64_t row = n * V, target = targets[n];
        nats[n] = 0;
        if (target < 0) {
            for (int64_t v = 0; v < V; v += LANES) stored.put(logits, row + v, Floats{}, V - v);
            return;
        }
        Floats last = inside ? stored.get(logits, row + whole, left) : filled(-INFINITY);
        Floats most = last, total{};
        for (int64_t v = 0; v < whole; v += LANES) {
            Floats x = stored.get(logits, row + v);
            most = x > most ? x : most;
        }
        float base = largest(most) * LOG2_E;
        for (int64_t v = 0; v < whole; v += LANES)
            total += exp2(stored.get(logits, row + v) * LOG2_E - base);
        total += inside ? exp2(last * LOG2_E - base) : Floats{};
        float log = base + std::log2(sum(total));
        nats[n] = log * LN_2 - stored.get(logits, row + target, 1)[0];
        if (!scale) return;
        for (int64_t v = 0; v < V; v += LANES) {
            Floats p = exp2(stored.get(logits, row + v, V - v) * LOG2_E - log);
            if (v <= target && target < v + LANES) p[target - v] -= 1;
            stored.put(logits, row + v, p * *scale, V - v);
        }
    };
    in_format(bits, [&](auto stored) {
        share(N, threads, [&](int64_t, int64_t first, int64_t end) {
            for (int64_t n = first; n < end; n++) one(stored, n);
        });
    });
}
