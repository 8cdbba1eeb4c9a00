// One forward pass of GPT-2 on a CPU. Each of a few rows is one token, at a position of one of the
// texts in the KV cache.
//
// Each weight is read from memory once for all rows, in the format in which it is stored: float32,
// bfloat16, or several small integers in a word (products.h). The numbers of a row are always summed in
// the same order, so its logits do not depend, to the bit, on the other rows or on the number of
// threads.
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

constexpr int64_t USUAL_HEAD = 64;  // channels per head in every published GPT-2

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
            store(&p[h * room + first], sums<LANES>(dots) * scale);
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
// after each.
extern "C" void step(const Model* the_model, const Cache* the_cache, const Rows* the_rows,
                     int threads) {
    const Model& model = *the_model;
    const Cache& cache = *the_cache;
    const Rows& rows = *the_rows;
    int64_t R = rows.count, C = model.n_embd, M = model.n_inner;
    auto attention_in = cache.bits == 32 ? attention<In32> : attention<In16>;
    Then activate = model.tanh ? Then::GELU_TANH : Then::GELU;
    std::vector<float> qkv(R * 3 * C), gathered(R * C), hidden(R * M);
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
        std::vector<float> p, normal(C);
        auto normalized = [&](const Norm& w, int64_t r) {
            normalize(rows.x + r * C, w, C, model.norm_eps, normal.data());
            return normal.data();
        };
        auto multiply = [&](const Matrix& w, auto row, float* to, Then then) {
            product(thread, w, R, row, own, all, {to, then});
        };
        for (int64_t layer = 0; layer < model.n_layer; layer++) {
            const Layer& w = model.layers[layer];
            multiply(w.c_attn, [&](int64_t r) { return normalized(w.ln_1, r); }, qkv.data(),
                     Then::WRITE);
            attention_in(thread, model, cache, rows, layer, qkv.data(), p, gathered.data());
            multiply(w.c_proj, [&](int64_t r) { return &gathered[r * C]; }, rows.x, Then::ADD);
            multiply(w.c_fc, [&](int64_t r) { return normalized(w.ln_2, r); }, hidden.data(),
                     activate);
            multiply(w.mlp_c_proj, [&](int64_t r) { return &hidden[r * M]; }, rows.x, Then::ADD);
        }
        auto last = [&](int64_t i) { return normalized(model.ln_f, rows.logits_of[i]); };
        product(thread, model.head, rows.wanted, last, own, all, {rows.logits, Then::WRITE});
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
