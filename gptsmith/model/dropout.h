// The random bits by which dropout chooses what it keeps; dropout.py has the definition.

#pragma once

#include <cstdint>

namespace {

// Mix an element's number and its row's seed into 24 bits, for a number or a vector of numbers.
template <class Number>
inline Number random_bits(Number element, uint32_t seed) {
    Number x = element * 0x9e3779b9u + seed;
    x = (x ^ x >> 16) * 0x85ebca6bu + seed;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return (x ^ x >> 16) >> 8;
}

}  // namespace
