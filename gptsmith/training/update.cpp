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
#include <vector>

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

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));

inline Floats load(const float* from, int64_t count = LANES) {
    Floats vector{};
    if (count >= LANES) {
        std::memcpy(&vector, from, sizeof vector);
    } else {
        std::memcpy(&vector, from, count * sizeof(float));
    }
    return vector;
}

inline void store(float* to, Floats vector, int64_t count = LANES) {
    std::memcpy(to, &vector, std::min(count, LANES) * sizeof(float));
}

inline int64_t whole(int64_t count, int64_t in) { return (count + in - 1) / in * in; }

// -- one pass over all parameters, in pieces that threads take in turn

constexpr int64_t PIECE = 1 << 14;  // numbers
constexpr int64_t FEW = 1 << 16;    // numbers in all, for which waking other threads takes longer

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
// A matrix (L, S) lies in memory as panels of PANEL columns: (S / PANEL, L, PANEL), padded with
// zeros. A product reads both of its factors in that order.

constexpr int64_t PANEL = 32;
#ifdef __AVX512F__
constexpr int TALL = 8, WIDE = 2;  // rows and vectors of a tile, whose sums are kept in registers
#else
constexpr int TALL = 4, WIDE = 1;
#endif

struct Panels {
    int64_t rows, columns;  // padded to PANEL
    std::unique_ptr<float[], void (*)(float*)> numbers;

    Panels(int64_t rows, int64_t columns)
        : rows(whole(rows, PANEL)),
          columns(whole(columns, PANEL)),
          numbers(new (std::align_val_t(64)) float[this->rows * this->columns],
                  [](float* p) { operator delete[](p, std::align_val_t(64)); }) {}

    float* at(int64_t row, int64_t column) const {
        return &numbers[column / PANEL * PANEL * rows + row * PANEL + column % PANEL];
    }
};

// Compute a tile of a product: for R rows and V vectors of columns, sums over K terms of a(k, r)
// times b(k, columns). From one k to the next, b moves by PANEL and a by STEP; from one r to the
// next, a moves by the other of the two.
template <int R, int V, int STEP>
inline void tile(const float* a, const float* b, int64_t K, Floats (&sums)[R][V]) {
    constexpr int64_t ACROSS = STEP == PANEL ? 1 : PANEL;
    for (int64_t k = 0; k < K; k++, a += STEP, b += PANEL) {
        Floats columns[V];
        for (int v = 0; v < V; v++) columns[v] = load(b + v * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] += a[r * ACROSS] * columns[v];
    }
}

// Transpose a block of 16 rows.
inline void transpose(Floats (&rows)[LANES]) {
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < LANES; i++)
            if (!(i & half)) {
                Words low, high;
                for (int lane = 0; lane < LANES; lane++) {
                    low[lane] = lane & half ? lane - half + LANES : lane;
                    high[lane] = lane & half ? lane + LANES : lane + half;
                }
                Floats a = rows[i], b = rows[i + half];
                rows[i] = __builtin_shuffle(a, b, low);
                rows[i + half] = __builtin_shuffle(a, b, high);
            }
}

// The symmetric out = times * a^T b + by * plus, where a and b have K rows and all else is (S, S).
struct Symmetric {
    const Panels &out, &a, &b;
    float times = 1, by = 0;
    const Panels* plus = nullptr;

    // Compute the lower triangle, and copy it to the upper one.
    void compute() const {
        for (int64_t j = 0; j < out.columns; j += WIDE * LANES)
            for (int64_t i = j; i < out.columns; i += TALL)
                i < j + LANES ? part<1>(i, j) : part<WIDE>(i, j);
        for (int64_t i = 0; i < out.columns; i += LANES)
            for (int64_t j = 0; j < i; j += LANES) {
                Floats block[LANES];
                for (int r = 0; r < LANES; r++) block[r] = load(out.at(i + r, j));
                transpose(block);
                for (int r = 0; r < LANES; r++) store(out.at(j + r, i), block[r]);
            }
    }

    // Compute a tile of V vectors of columns, from row i and column j on.
    template <int V>
    void part(int64_t i, int64_t j) const {
        Floats sums[TALL][V] = {};
        tile<TALL, V, PANEL>(a.at(0, i), b.at(0, j), a.rows, sums);
        for (int r = 0; r < TALL; r++)
            for (int v = 0; v < V; v++) {
                Floats sum = times * sums[r][v];
                if (plus) sum += by * load(plus->at(i + r, j + v * LANES));
                store(out.at(i + r, j + v * LANES), sum);
            }
    }
};

// Compute out = x p, for x and out (L, S) and the symmetric p (S, S).
void multiply(const Panels& out, const Panels& x, const Panels& p) {
    for (int64_t j = 0; j < p.columns; j += WIDE * LANES)
        for (int64_t i = 0; i < x.rows; i += TALL) {
            Floats sums[TALL][WIDE] = {};
            for (int64_t k = 0; k < x.columns; k += PANEL)
                tile<TALL, WIDE, 1>(x.at(i, k), p.at(k, j), PANEL, sums);
            for (int r = 0; r < TALL; r++)
                for (int v = 0; v < WIDE; v++)
                    store(out.at(i + r, j + v * LANES), sums[r][v]);
        }
}

// -- Muon

// Move the momentum to the gradient, and put Nesterov's mean of the two into `to`.
void gather(const Matrix& m, float momentum, const Panels& to) {
    bool wide = m.columns > m.rows;
    for (int64_t i = 0; i < (wide ? to.columns : to.rows); i += LANES)
        for (int64_t j = 0; j < (wide ? to.rows : to.columns); j += LANES) {
            Floats block[LANES] = {};
            for (int64_t r = 0; r < std::min(LANES, m.rows - i); r++) {
                int64_t at = (i + r) * m.columns + j, count = m.columns - j;
                if (count <= 0) break;
                Floats gradient = load(m.gradient + at, count), mean = load(m.momentum + at, count);
                mean += (gradient - mean) * (1 - momentum);
                store(m.momentum + at, mean, count);
                block[r] = gradient + (mean - gradient) * momentum;
            }
            if (wide) transpose(block);
            for (int64_t r = 0; r < LANES; r++)
                store(wide ? to.at(j + r, i) : to.at(i + r, j), block[r]);
        }
}

// Scale the weights by `keep`, and subtract `size` times the direction.
void apply(const Matrix& m, float keep, float size, const Panels& direction) {
    bool wide = m.columns > m.rows;
    for (int64_t i = 0; i < m.rows; i += LANES)
        for (int64_t j = 0; j < m.columns; j += LANES) {
            Floats block[LANES];
            for (int64_t r = 0; r < LANES; r++)
                block[r] = load(wide ? direction.at(j + r, i) : direction.at(i + r, j));
            if (wide) transpose(block);
            for (int64_t r = 0; r < std::min(LANES, m.rows - i); r++) {
                int64_t at = (i + r) * m.columns + j, count = m.columns - j;
                store(m.weight + at, keep * load(m.weight + at, count) - size * block[r], count);
            }
        }
}

}  // namespace

extern "C" {

// Update matrices as Muon does; see muon.py. With G = X^T X, each iteration X Q(G) of the quintic
// only multiplies X by a polynomial of G. So X is multiplied once, by the product P of all Q, and
// what is iterated are symmetric matrices (S, S), of which half is computed.
void muon(const Matrix* matrices, int64_t count, float rate, float momentum, float decay,
          const float* quintic, int64_t iterations, int64_t threads) {
    share(count, std::min(threads, count), [&](int64_t i) {
        const Matrix& m = matrices[i];
        int64_t L = std::max(m.rows, m.columns), S = std::min(m.rows, m.columns);
        Panels x(L, S), direction(L, S), g(S, S), q(S, S), p(S, S), spare(S, S);
        gather(m, momentum, x);
        Symmetric{g, x, x}.compute();
        double square = 0;  // of the norm of x
        for (int64_t n = 0; n < S; n++) square += *g.at(n, n);
        float norm = std::sqrt(square) + 1e-7f;
        float inverse = 1 / norm;
        for (int64_t n = 0; n < g.rows * g.columns; n++) g.numbers[n] *= inverse * inverse;
        for (int64_t step = 0; step < iterations; step++) {
            Symmetric{q, g, g, quintic[2], quintic[1], &g}.compute();
            for (int64_t n = 0; n < S; n++) *q.at(n, n) += quintic[0];
            if (step == 0) {
                std::copy_n(&q.numbers[0], q.rows * q.columns, &p.numbers[0]);
            } else {
                Symmetric{spare, p, q}.compute();
                std::swap(p, spare);
            }
            if (step == iterations - 1) break;
            Symmetric{spare, g, q}.compute();
            Symmetric{g, spare, q}.compute();
        }
        multiply(direction, x, p);
        float ratio = std::max(1.f, float(m.rows) / m.columns);
        apply(m, 1 - rate * decay, rate * std::sqrt(ratio) * inverse, direction);
    });
}

}  // extern "C"
