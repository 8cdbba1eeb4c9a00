// What a training step does after its gradients, on a CPU: their norm, AdamW and Muon, each in one
// pass over the parameters, where PyTorch makes many small calls.
//
// Numbers are summed in an order that depends on the sizes alone, so the results are the same, to
// the bit, for any number of threads. Uses the vector extensions of GCC and Clang, which work on
// every processor. update.py calls it; machine/native.py compiles it.
//
// Shapes:  L longer side of a matrix, S its shorter side    K terms of each sum of a product

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../machine/vectors.h"

extern "C" {

struct Learned {  // a parameter of AdamW
    float* weight;
    const float* gradient;
    float *mean, *mean_square;  // of the gradient: exp_avg and exp_avg_sq
    float* step;                // (), the number of updates so far
    int64_t count;
};

struct Matrix {  // one of Muon's
    float* weight;
    const float* gradient;
    float* momentum;
    int64_t rows, columns;
};

}  // extern "C"

namespace {

constexpr Words COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats load(const float* from, int64_t count = LANES) { return load<Floats>(from, count); }

inline int64_t whole(int64_t count, int64_t in) { return (count + in - 1) / in * in; }

// -- one pass over all parameters, in pieces that threads take in turn

constexpr int64_t PIECE = 1 << 14;  // numbers
constexpr int64_t FEW = 1 << 16;    // numbers in all, of which one thread takes care faster

struct Piece {
    int64_t tensor, start, end;
};

// Cut tensors of these sizes into pieces.
template <class Tensor>
std::vector<Piece> pieces(const Tensor* tensors, int64_t count) {
    std::vector<Piece> found;
    for (int64_t i = 0; i < count; i++)
        for (int64_t start = 0; start < tensors[i].count; start += PIECE)
            found.push_back({i, start, std::min(start + PIECE, tensors[i].count)});
    return found;
}

// Call `one(i)` for every i below `items`, in any thread.
template <class Do>
void share(int64_t items, int64_t threads, Do one) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < items; i++) one(i);
}

}  // namespace

extern "C" {

struct Gradient {
    float* numbers;
    int64_t count;
};

// Return the norm of all gradients together; scale them to norm `most` if theirs is larger.
float clip(const Gradient* gradients, int64_t count, float most, int64_t threads) {
    std::vector<Piece> all = pieces(gradients, count);
    std::vector<double> squares(all.size());
    if (int64_t(all.size()) * PIECE <= FEW) threads = 1;
    share(all.size(), threads, [&](int64_t i) {
        const float* numbers = gradients[all[i].tensor].numbers;
        Floats sums[4] = {};
        for (int64_t n = all[i].start; n < all[i].end; n += 4 * LANES)
            for (int v = 0; v < 4; v++) {
                int64_t left = all[i].end - n - v * LANES;
                if (left <= 0) break;
                Floats x = load(numbers + n + v * LANES, left);
                sums[v] += x * x;
            }
        Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        for (int lane = 0; lane < LANES; lane++) squares[i] += sum[lane];
    });
    double total = 0;
    for (double square : squares) total += square;
    float norm = std::sqrt(total);
    float scale = most / (norm + 1e-6f);  // as torch.nn.utils.clip_grad_norm_
    if (scale < 1)
        share(all.size(), threads, [&](int64_t i) {
            float* numbers = gradients[all[i].tensor].numbers;
            for (int64_t n = all[i].start; n < all[i].end; n++) numbers[n] *= scale;
        });
    return norm;
}

// Update parameters as torch.optim.AdamW does.
void adamw(const Learned* tensors, int64_t count, double rate, double beta1, double beta2,
           double epsilon, double decay, int64_t threads) {
    std::vector<Piece> all = pieces(tensors, count);
    if (int64_t(all.size()) * PIECE <= FEW) threads = 1;
    for (int64_t i = 0; i < count; i++) *tensors[i].step += 1;
    share(all.size(), threads, [&](int64_t i) {
        const Learned& t = tensors[all[i].tensor];
        float size = rate / (1 - std::pow(beta1, *t.step));
        float root = 1 / std::sqrt(1 - std::pow(beta2, *t.step));
        float keep = 1 - rate * decay, new1 = 1 - beta1, old2 = beta2, new2 = 1 - beta2;
        float least = epsilon;
#pragma omp simd
        for (int64_t n = all[i].start; n < all[i].end; n++) {
            float g = t.gradient[n];
            float mean = t.mean[n] = t.mean[n] + (g - t.mean[n]) * new1;
            float square = t.mean_square[n] = t.mean_square[n] * old2 + g * g * new2;
            t.weight[n] = t.weight[n] * keep - size * mean / (std::sqrt(square) * root + least);
        }
    });
}

}  // extern "C"

namespace {

// -- matrices in panels
//
// A matrix (K, N) lies in memory as panels of PANEL columns: (N / PANEL, K, PANEL), padded with
// zeros. In bfloat16, two rows lie in one row of words. So a product a^T b of (K, M) and (K, N)
// reads both from one end to the other.

constexpr int64_t PANEL = 32;
#ifdef __AVX512F__
constexpr int TALL = 8, WIDE = 2;  // rows and vectors of a tile, whose sums are kept in registers
#else
constexpr int TALL = 4, WIDE = 1;
#endif

struct Float32 {
    typedef float Stored;
    static constexpr int64_t ROWS = 1;  // in a row of memory
    static Floats add(Floats sum, float a, const float* b) { return sum + a * load(b); }
    static void get(const float* from, Floats (&rows)[1]) { rows[0] = load(from); }
    static void put(float* to, const Floats (&rows)[1]) { store(to, rows[0]); }
};

#ifdef __AVX512BF16__
struct Bfloat16 {
    typedef uint32_t Stored;  // two numbers
    static constexpr int64_t ROWS = 2;
    static Naturals words(const uint32_t* from) {
        Naturals found;
        std::memcpy(&found, from, sizeof found);
        return found;
    }
    static Floats add(Floats sum, uint32_t a, const uint32_t* b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a),
                                        (__m512bh)words(b));
    }
    static void get(const uint32_t* from, Floats (&rows)[2]) {
        Naturals pair = words(from);
        rows[0] = (Floats)(pair << 16), rows[1] = (Floats)(pair & 0xffff0000);
    }
    static void put(uint32_t* to, const Floats (&rows)[2]) {
        Naturals low = (Naturals)rows[0], high = (Naturals)rows[1];  // rounded to nearest, ties to even
        low = (low + 0x7fff + (low >> 16 & 1)) >> 16;
        high = (high + 0x7fff + (high >> 16 & 1)) & 0xffff0000;
        Naturals pair = low | high;
        std::memcpy(to, &pair, sizeof pair);
    }
};
#endif

template <class F>
struct Panels {
    typedef typename F::Stored Stored;
    int64_t rows, columns;  // padded to whole panels
    std::unique_ptr<Stored[], void (*)(Stored*)> numbers;

    Panels(int64_t rows, int64_t columns)
        : rows(whole(rows, PANEL)),
          columns(whole(columns, PANEL)),
          numbers(new (std::align_val_t(64)) Stored[this->rows / F::ROWS * this->columns],
                  [](Stored* p) { operator delete[](p, std::align_val_t(64)); }) {}

    Stored* at(int64_t row, int64_t column) const {
        return &numbers[(column / PANEL * rows + row) / F::ROWS * PANEL + column % PANEL];
    }

    // Read, and write, a block of 16 rows and columns.
    void get(int64_t row, int64_t column, Floats (&block)[LANES]) const {
        for (int64_t r = 0; r < LANES; r += F::ROWS)
            F::get(at(row + r, column), (Floats(&)[F::ROWS])block[r]);
    }
    void put(int64_t row, int64_t column, const Floats (&block)[LANES]) const {
        for (int64_t r = 0; r < LANES; r += F::ROWS)
            F::put(at(row + r, column), (const Floats(&)[F::ROWS])block[r]);
    }
};

// Exchange what lies off the diagonal between the halves of each 2 HALF rows and columns.
template <int HALF, int... LANE>
inline void exchange(Floats (&rows)[LANES], std::integer_sequence<int, LANE...>) {
    for (int i = 0; i < LANES; i++)
        if (!(i & HALF)) {
            Floats a = rows[i], b = rows[i + HALF];
            rows[i] = __builtin_shufflevector(a, b, (LANE & HALF ? LANE - HALF + 16 : LANE)...);
            rows[i + HALF] =
                __builtin_shufflevector(a, b, (LANE & HALF ? LANE + 16 : LANE + HALF)...);
        }
}

inline void transpose(Floats (&block)[LANES]) {
    constexpr std::make_integer_sequence<int, LANES> lanes;
    exchange<8>(block, lanes), exchange<4>(block, lanes);
    exchange<2>(block, lanes), exchange<1>(block, lanes);
}

// out = times * a^T b + by * plus + diagonal * I. If it is known to be symmetric, its lower triangle
// is computed, and copied to the upper one.
template <class F>
struct Product {
    const Panels<F>&out, &a, &b;
    float times = 1, by = 0;
    const Panels<F>* plus = nullptr;
    float diagonal = 0;

    void all() const {
        for (int64_t j = 0; j < out.columns; j += WIDE * LANES)
            for (int64_t i = 0; i < out.rows; i += TALL) part<WIDE>(i, j);
    }

    void symmetric() const {
        for (int64_t j = 0; j < out.columns; j += WIDE * LANES)
            for (int64_t i = j; i < out.rows; i += TALL)
                i < j + LANES ? part<1>(i, j) : part<WIDE>(i, j);
        for (int64_t i = 0; i < out.rows; i += LANES)
            for (int64_t j = 0; j < i; j += LANES) {
                Floats block[LANES];
                out.get(i, j, block);
                transpose(block);
                out.put(j, i, block);
            }
    }

    // Compute a tile of TALL rows and V vectors of columns, from row i and column j on.
    template <int V>
    __attribute__((noinline)) void part(int64_t i, int64_t j) const {
        Floats sums[TALL][V] = {};
        const typename F::Stored *down = a.at(0, i), *across = b.at(0, j);
        for (int64_t k = 0; k < a.rows; k += F::ROWS, down += PANEL, across += PANEL)
            for (int r = 0; r < TALL; r++)
                for (int v = 0; v < V; v++)
                    sums[r][v] = F::add(sums[r][v], down[r], across + v * LANES);
        for (int v = 0; v < V; v++)
            for (int r = 0; r < TALL; r += F::ROWS) {
                Floats rows[F::ROWS] = {};
                if (plus) F::get(plus->at(i + r, j + v * LANES), rows);
                for (int n = 0; n < F::ROWS; n++) {
                    rows[n] = times * sums[r + n][v] + by * rows[n];
                    rows[n] += COUNT == int32_t(i + r + n - j - v * LANES) ? diagonal : 0.f;
                }
                F::put(out.at(i + r, j + v * LANES), rows);
            }
    }
};

// -- Muon

struct Choices {
    float rate, momentum, decay;
    float quintic[3];
    int64_t iterations;
};

// A matrix whose singular values move to about one, (L, S) or (S, L) in the model's memory.
template <class F>
struct Direction {
    const Matrix& matrix;
    bool wide = matrix.columns > matrix.rows;
    int64_t L = std::max(matrix.rows, matrix.columns), S = std::min(matrix.rows, matrix.columns);
    Panels<F> tall{L, S}, flat{S, L};  // the matrix, and its transpose
    float norm = 0;

    // Move the momentum to the gradient, and take Nesterov's mean of the two.
    void gather(float momentum) {
        Floats squares{};
        for (int64_t i = 0; i < (wide ? flat : tall).rows; i += LANES)
            for (int64_t j = 0; j < (wide ? flat : tall).columns; j += LANES) {
                Floats block[LANES] = {};
                for (int64_t r = 0; r < std::min<int64_t>(LANES, matrix.rows - i); r++) {
                    int64_t at = (i + r) * matrix.columns + j, count = matrix.columns - j;
                    if (count <= 0) break;
                    Floats gradient = load(matrix.gradient + at, count);
                    Floats mean = load(matrix.momentum + at, count);
                    mean += (gradient - mean) * (1 - momentum);
                    store(matrix.momentum + at, mean, count);
                    block[r] = gradient + (mean - gradient) * momentum;
                    squares += block[r] * block[r];
                }
                (wide ? flat : tall).put(i, j, block);
                transpose(block);
                (wide ? tall : flat).put(j, i, block);
            }
        double sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
        norm = std::sqrt(sum) + 1e-7f;
    }

    // Scale the weights by `keep`, and subtract `size` times the direction.
    void apply(const Panels<F>& flat, float keep, float size) const {
        for (int64_t i = 0; i < matrix.rows; i += LANES)
            for (int64_t j = 0; j < matrix.columns; j += LANES) {
                Floats block[LANES];
                flat.get(wide ? i : j, wide ? j : i, block);
                if (!wide) transpose(block);
                for (int64_t r = 0; r < std::min<int64_t>(LANES, matrix.rows - i); r++) {
                    int64_t at = (i + r) * matrix.columns + j, count = matrix.columns - j;
                    store(matrix.weight + at,
                          keep * load(matrix.weight + at, count) - size * block[r], count);
                }
            }
    }

    void update(const Choices& choices) {
        float keep = 1 - choices.rate * choices.decay;
        float size = choices.rate * std::sqrt(std::max(1.f, float(matrix.rows) / matrix.columns));
        gather(choices.momentum);
        if constexpr (F::ROWS == 1) {
            apply(by_gram(choices), keep, size / norm);
        } else {
            apply(by_steps(choices), keep, size);
        }
    }

    // With G = X^T X, every iteration multiplies X by a polynomial Q(G), and all of these commute.
    // So X is multiplied once, by their product P; what is iterated are symmetric matrices (S, S).
    Panels<F> by_gram(const Choices& choices) {
        const float(&q)[3] = choices.quintic;
        Panels<F> gram(S, S), factor(S, S), product(S, S), spare(S, S);
        Product<F>{gram, tall, tall, 1 / norm / norm}.symmetric();
        for (int64_t step = 0; step < choices.iterations; step++) {
            Product<F>{factor, gram, gram, q[2], q[1], &gram, q[0]}.symmetric();
            if (step == 0) {
                std::copy_n(factor.at(0, 0), factor.rows * factor.columns, product.at(0, 0));
            } else {
                Product<F>{spare, product, factor}.symmetric();
                std::swap(product, spare);
            }
            if (step == choices.iterations - 1) break;
            Product<F>{spare, gram, factor}.symmetric();
            Product<F>{gram, spare, factor}.symmetric();
        }
        Panels<F> result(S, L);
        Product<F>{result, product, flat}.all();
        return result;
    }

    // The same one iteration after another. In bfloat16, errors of G would grow in the way above.
    Panels<F> by_steps(const Choices& choices) {
        const float(&q)[3] = choices.quintic;
        Panels<F> gram(S, S), factor(S, S), spare(S, L);
        for (int64_t step = 0; step < choices.iterations; step++) {
            float scale = step ? 1 : 1 / norm, square = scale * scale;
            Product<F>{gram, tall, tall, square}.symmetric();
            Product<F>{factor, gram, gram, q[2], q[1], &gram, q[0]}.symmetric();
            Product<F>{spare, factor, flat, scale}.all();
            std::swap(flat, spare);
            if (step == choices.iterations - 1) break;
            for (int64_t i = 0; i < flat.rows; i += LANES)
                for (int64_t j = 0; j < flat.columns; j += LANES) {
                    Floats block[LANES];
                    flat.get(i, j, block);
                    transpose(block);
                    tall.put(j, i, block);
                }
        }
        return std::move(flat);
    }
};

}  // namespace

extern "C" {

// Update matrices as muon.py does. `bf16` allows products in bfloat16, which processors with an
// instruction for them multiply twice as fast; long matrices need fewer products in float32.
void muon(const Matrix* matrices, int64_t count, const Choices* choices, int32_t bf16,
          int64_t threads) {
    share(count, std::min(threads, count), [&](int64_t i) {
        const Matrix& m = matrices[i];
#ifdef __AVX512BF16__
        if (bf16 && std::max(m.rows, m.columns) < 2 * std::min(m.rows, m.columns))
            return Direction<Bfloat16>{m}.update(*choices);
#endif
        Direction<Float32>{m}.update(*choices);
    });
}

}  // extern "C"
