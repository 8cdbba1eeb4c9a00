// One forward pass of GPT-2 on a CPU. Each of a few rows is one token, at a position of one of the
// texts in the KV cache.
//
// Each weight is read from memory once for all rows, in the format in which it is stored: float32,
// bfloat16, or several small integers in a word (products.h). The numbers of a row are always
// summed in the same order, so its logits do not depend, to the bit, on the other rows or on the
// number of threads.
//
// Uses the vector extensions of GCC and Clang, which work on every processor. compiled.py describes
// the model to it; machine/native.py compiles it.
//
// Shapes:  R rows        C channels          H heads        D channels per head    S tokens so far
//          V vocabulary  M rows of a matrix  K its columns  T texts in the cache

#include "products.h"

extern "C" {

struct Norm {
    const float *weight, *bias;  // (C,), the bias or null
};

struct Layer {
    Norm ln_1, ln_2;
    Matrix c_attn, c_proj, c_fc, mlp_c_proj;
};

struct Model {
    Matrix wte, wpe;  // rows are the embeddings of tokens and of positions
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
    const int64_t *token, *text, *place;  // (R,): tokens, their texts and positions in these
    const int64_t* logits_of;             // (wanted,): the rows whose logits are computed
    float* logits;                        // (wanted, V)
};

}  // extern "C"

namespace {

constexpr int64_t USUAL_HEAD = 64;  // channels per head in every published GPT-2

// -- number formats of the KV cache, and of weights outside products

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

// Unpack a row of a matrix into float32 or bfloat16, with a single rounding.  -> (K,)
template <int BITS, class Out>
void unpack_row(const Matrix& w, int64_t m, typename Out::Stored* to) {
    constexpr int64_t FIELDS = 32 / BITS;
    int64_t K = w.columns, lanes = w.lanes;
    auto words = (const int32_t*)w.numbers + m * K / FIELDS;
    for (int64_t c = 0; c < lanes; c += LANES) {
        Floats scale = from_bfloat16(load<Halves>(w.scales + m * lanes + c, lanes - c));
        for (int64_t at = 0; at < K; at += lanes * FIELDS) {
            Naturals held = load<Naturals>(words + at / FIELDS + c, lanes - c);
            for (int64_t field = 0; field < FIELDS; field++, held >>= BITS) {
                Words number = (Words)(held & ((1u << BITS) - 1)) - Packed<BITS>::OFFSET;
                Floats value = __builtin_convertvector(number, Floats) * scale;
                Out::put(to + at + field * lanes + c, value, lanes - c);
            }
        }
    }
}

template <class In>
void copy_row(const Matrix& w, int64_t m, float* to) {
    auto from = (const typename In::Stored*)w.numbers + m * w.columns;
    for (int64_t c = 0; c < w.columns; c += LANES)
        store(to + c, In::get(from + c, w.columns - c), w.columns - c);
}

// Copy a row of a matrix in any format.  -> (K,)
void get_row(const Matrix& w, int64_t m, float* to) {
    switch (w.bits) {
        case 32: return copy_row<In32>(w, m, to);
        case 16: return copy_row<In16>(w, m, to);
        case 8: return unpack_row<8, In32>(w, m, to);
        case 4: return unpack_row<4, In32>(w, m, to);
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

struct Scratch {
    std::vector<float> p;    // (heads, S): attention's scores, then its weights
    std::vector<Line> dots;  // (heads, 16): partial sums of the scores of 16 keys
    std::vector<float> row;  // (C,)
};

// Compute attention for some heads of one row. A few keys are read at a time, with all their heads,
// since these are adjacent in memory. SIZE is D if that is known when this is compiled, so that
// the loops over a head are unrolled, or else 0.  (heads, D), (S, C), (S, C) -> (heads, D)
template <class In, int64_t SIZE>
void attend(const float* q, const typename In::Stored* keys, const typename In::Stored* values,
            int64_t S, int64_t C, int64_t size, int64_t heads, Scratch& scratch, float* out) {
    constexpr int64_t KEYS = 4, LINE = sizeof(Line) / sizeof(typename In::Stored);
    const int64_t D = SIZE ? SIZE : size, room = divided(S, LANES) * LANES;
    scratch.p.resize(heads * room);
    scratch.dots.resize(heads * LANES);
    float scale = 1 / std::sqrt((float)D), *p = scratch.p.data();
    // Return 16 numbers of key or value s from c on, and ask for those that are read eight keys
    // later, once for each cache line. The last key is repeated if there are too few.
    auto get = [&](auto from, int64_t s, int64_t c, int64_t left) __attribute__((always_inline)) {
        from += std::min(s, S - 1) * C + c;
        if (c % LINE == 0) __builtin_prefetch(from + 2 * KEYS * C);
        return In::get(from, left);
    };
    for (int64_t s = 0; s < S; s += KEYS) {
        for (int64_t h = 0; h < heads; h++) {
            Floats dots[KEYS] = {};
            for (int64_t d = 0; d < D; d += LANES)
                for (int i = 0; i < KEYS; i++)
                    dots[i] += load<Floats>(q + h * D + d, D - d) *
                               get(keys, s + i, h * D + d, D - d);
            for (int i = 0; i < KEYS; i++)
                store(scratch.dots[h * LANES + s % LANES + i].numbers, dots[i]);
        }
        int64_t done = s % LANES + KEYS;
        if (done < LANES && s + KEYS < S) continue;
        for (int64_t h = 0; h < heads; h++)
            store(p + h * room + s + KEYS - done,
                  sums<LANES>((const Floats*)&scratch.dots[h * LANES]) * scale);
    }
    for (int64_t h = 0; h < heads; h++) softmax(p + h * room, S);
    std::fill(out, out + heads * D, 0.f);
    for (int64_t s = 0; s < S; s += KEYS)
        for (int64_t h = 0; h < heads; h++) {
            float weights[KEYS];
            for (int i = 0; i < KEYS; i++) weights[i] = s + i < S ? p[h * room + s + i] : 0;
            for (int64_t d = 0; d < D; d += LANES) {
                Floats sum = load<Floats>(out + h * D + d, D - d);
                for (int i = 0; i < KEYS; i++)
                    sum += get(values, s + i, h * D + d, D - d) * weights[i];
                store(out + h * D + d, sum, D - d);
            }
        }
}

// Write each row's key and value into the cache, then compute its attention.  (R, 3 C) -> (R, C)
template <class In>
void attention(Thread& thread, const Model& model, const Cache& cache, const Rows& rows,
               int64_t layer, const float* qkv, Scratch& scratch, float* out) {
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
                    std::clamp<int64_t>(H - h, 0, heads), scratch, out + r * C + h * D);
    });
}

}  // namespace

// Compute the forward pass. The threads share products and attention, and wait for one another
// after each.
extern "C" void step(const Model* the_model, const Cache* the_cache, const Rows* the_rows,
                     int threads) {
    const Model& model = *the_model;
    const Cache& cache = *the_cache;
    const Rows& rows = *the_rows;
    int64_t R = rows.count, C = model.n_embd, M = model.n_inner;
    auto attention_in = cache.bits == 32 ? attention<In32> : attention<In16>;
    Then activate = model.tanh ? Then::GELU_TANH : Then::GELU;
    std::vector<float> x(R * C), qkv(R * 3 * C), gathered(R * C), hidden(R * M);
    auto make_all_room = [&](Inputs& in) {
        for (int64_t layer = 0; layer < model.n_layer; layer++) {
            const Layer& w = model.layers[layer];
            for (auto matrix : {&w.c_attn, &w.c_proj, &w.c_fc, &w.mlp_c_proj})
                make_room(*matrix, R, in);
        }
        make_room(model.head, rows.wanted, in);
    };
    Thread::Shared shared;
    Inputs all;
    if (R >= MANY) make_all_room(all);
#pragma omp parallel num_threads(threads)
    {
        Thread thread(shared);
        Inputs own;
        if (R < MANY || rows.wanted < MANY) make_all_room(own);
        Scratch scratch;
        scratch.row.resize(C);
        float* other = scratch.row.data();
        auto normalized = [&](const Norm& w, int64_t r) {
            normalize(&x[r * C], w, C, model.norm_eps, other);
            return other;
        };
        auto multiply = [&](const Matrix& w, auto row, float* to, Then then) {
            product(thread, w, R, row, own, all, {to, then});
        };
        thread.share(R, [&](int64_t r) {
            get_row(model.wte, rows.token[r], &x[r * C]);
            get_row(model.wpe, rows.place[r], other);
            for (int64_t c = 0; c < C; c++) x[r * C + c] += other[c];
        });
        for (int64_t layer = 0; layer < model.n_layer; layer++) {
            const Layer& w = model.layers[layer];
            multiply(w.c_attn, [&](int64_t r) { return normalized(w.ln_1, r); }, qkv.data(),
                     Then::WRITE);
            attention_in(thread, model, cache, rows, layer, qkv.data(), scratch, gathered.data());
            multiply(w.c_proj, [&](int64_t r) { return &gathered[r * C]; }, x.data(), Then::ADD);
            multiply(w.c_fc, [&](int64_t r) { return normalized(w.ln_2, r); }, hidden.data(),
                     activate);
            multiply(w.mlp_c_proj, [&](int64_t r) { return &hidden[r * M]; }, x.data(), Then::ADD);
        }
        auto last = [&](int64_t i) { return normalized(model.ln_f, rows.logits_of[i]); };
        product(thread, model.head, rows.wanted, last, own, all, {rows.logits, Then::WRITE});
    }
}

// Unpack a matrix into float32 or bfloat16.  -> (M, K)
template <int BITS, class Out>
void unpack_to(const Matrix& w, typename Out::Stored* to, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < w.rows; m++) unpack_row<BITS, Out>(w, m, to + m * w.columns);
}

extern "C" void unpack(const Matrix* w, void* to, int64_t bits, int threads) {
    if (w->bits == 8 && bits == 32) unpack_to<8, In32>(*w, (float*)to, threads);
    if (w->bits == 8 && bits == 16) unpack_to<8, In16>(*w, (uint16_t*)to, threads);
    if (w->bits == 4 && bits == 32) unpack_to<4, In32>(*w, (float*)to, threads);
    if (w->bits == 4 && bits == 16) unpack_to<4, In16>(*w, (uint16_t*)to, threads);
}
