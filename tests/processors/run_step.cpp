// Reads a model, an empty KV cache's sizes and rows of tokens from standard input, as
// test_other_processors.py writes them, and writes the logits that the compiled step computes.

#include "step.cpp"

#include <cstdio>
#include <cstdlib>

template <class Number>
Number* read(size_t count) {
    size_t bytes = count * sizeof(Number), room = (bytes + 127) / 64 * 64;
    auto to = (Number*)std::aligned_alloc(64, room);
    if (std::fread(to, 1, bytes, stdin) != bytes) std::abort();
    return to;
}

int64_t number() { return *read<int64_t>(1); }

// Read an array that its size in bytes precedes; a size of 0 means null.
template <class Number = char>
Number* array() {
    int64_t bytes = number();
    return bytes ? (Number*)read<char>(bytes) : nullptr;
}

Matrix matrix() {
    int64_t* sizes = read<int64_t>(4);
    void* numbers = array();
    uint16_t* scales = array<uint16_t>();
    return {numbers, scales, array<float>(), sizes[0], sizes[1], sizes[2], sizes[3]};
}

Norm norm() {
    float* weight = array<float>();
    return {weight, array<float>()};
}

int main() {
    Model model{};
    int64_t* sizes = read<int64_t>(5);
    model.n_layer = sizes[0], model.n_embd = sizes[1], model.n_head = sizes[2];
    model.n_inner = sizes[3], model.tanh = sizes[4];
    model.norm_eps = *read<float>(1);
    model.wte = matrix(), model.wpe = matrix();
    std::vector<Layer> layers;
    for (int64_t i = 0; i < model.n_layer; i++) {
        Norm ln_1 = norm(), ln_2 = norm();
        Matrix c_attn = matrix(), c_proj = matrix(), c_fc = matrix(), mlp_c_proj = matrix();
        layers.push_back({ln_1, ln_2, c_attn, c_proj, c_fc, mlp_c_proj});
    }
    model.layers = layers.data();
    model.ln_f = norm();
    model.head = matrix();
    int64_t texts = number(), capacity = number(), bits = number();
    size_t held = model.n_layer * texts * capacity * model.n_embd;
    std::vector<float> keys(held), values(held);
    Cache cache{keys.data(), values.data(), texts, capacity, bits};
    int64_t count = number(), wanted = number();
    Rows rows{count, wanted};
    rows.token = read<int64_t>(count), rows.text = read<int64_t>(count);
    rows.place = read<int64_t>(count), rows.logits_of = read<int64_t>(wanted);
    std::vector<float> logits(wanted * model.head.rows);
    rows.logits = logits.data();
    step(&model, &cache, &rows, 2);
    std::fwrite(logits.data(), sizeof(float), logits.size(), stdout);
}
