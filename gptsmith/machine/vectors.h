// Vectors of 16 numbers, by the extensions of GCC and Clang, which work on every processor.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
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
inline void store(Number* to, Vector vector,
                  int64_t count = sizeof(Vector) / sizeof(Number)) {
    if (count >= int64_t(sizeof(Vector) / sizeof(Number))) {
        std::memcpy(to, &vector, sizeof vector);
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
inline Floats sums(const Floats* given) {
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

// Round to nearest, ties to even. Each number's bfloat16 is then in the upper half of its word.
inline Naturals rounded(Floats numbers) {
    Naturals bits = (Naturals)numbers;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

inline Halves to_bfloat16(Floats numbers) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)numbers);
#else
    return __builtin_convertvector(rounded(numbers) >> 16, Halves);
#endif
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

inline Floats gelu(Floats x, bool tanh) {
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

}  // namespace
