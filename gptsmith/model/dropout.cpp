// Dropout whose masks are computed from seeds: dropout.py has the definition, and checks this.
//
// The elements of a row are numbered as in (H, T, S), from (0, start, 0) on: H planes of T lines of
// S elements, of which R lines and the first E elements of each are given. Every element's random
// bits depend on its number and the row's seed alone, so it does not matter which thread computes
// them, and the backward pass computes the same mask again instead of keeping it.

#include <cstdint>
#include <cstring>

#include "dropout.h"

namespace {

float wide(float x) { return x; }

float wide(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

void store(float x, float& y) { y = x; }

void store(float x, uint16_t& y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

template <typename Number>
void drop(const Number* x, Number* y, const int32_t* seeds, int64_t rows, int64_t H, int64_t T,
          int64_t S, int64_t start, int64_t R, int64_t E, uint32_t dropped, float scale,
          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < rows * H * R; line++) {
        const int64_t row = line / (H * R), h = line / R % H, t = start + line % R;
        const uint32_t seed = seeds[row], first = (h * T + t) * S;
        const Number* from = x + line * E;
        Number* to = y + line * E;
#pragma omp simd
        for (int32_t s = 0; s < int32_t(E); s++) {
            const float kept = random_bits(first + s, seed) >= dropped ? wide(from[s]) * scale : 0;
            store(kept, to[s]);
        }
    }
}

}  // namespace

extern "C" void drop_numbers(int bytes, const void* x, void* y, const int32_t* seeds, int64_t rows,
                             int64_t H, int64_t T, int64_t S, int64_t start, int64_t R, int64_t E,
                             int32_t dropped, float scale, int threads) {
    if (bytes == 4)
        drop((const float*)x, (float*)y, seeds, rows, H, T, S, start, R, E, dropped, scale,
             threads);
    if (bytes == 2)
        drop((const uint16_t*)x, (uint16_t*)y, seeds, rows, H, T, S, start, R, E, dropped, scale,
             threads);
}
