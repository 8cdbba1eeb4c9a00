"""Is this what was written? CRC-32C, the checksum of TensorFlow's files, at NumPy's speed.

Knows nothing of files. The checksum is the remainder of the data, as one long polynomial over the
field of two elements. Remainders can be taken in any order: here of 65,536 interleaved streams
side by side, which are then folded into one.

A polynomial is a 32-bit number whose highest bit is the coefficient of x^0, as CRC-32C has it.
"""

from functools import cache, lru_cache

import numpy as np

POLYNOMIAL = 0x82F63B78  # Castagnoli's, RFC 3720
ONE, X = 1 << 31, 1 << 30
ALL_ONES = 0xFFFFFFFF
STREAMS = 1 << 16  # of 4 bytes each: a row of them fits the cache of a core


def crc32c(data: bytes | np.ndarray) -> int:
    """The CRC-32C of some bytes, or of an array as it lies in memory."""
    octets = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    octets = octets.reshape(-1).view(np.uint8)
    # It starts from all ones rather than nothing, so that zeros in front of the data count.
    start = _product(ALL_ONES, _power(8 * octets.size))
    return start ^ _remainder(octets) ^ ALL_ONES


def unmasked(checksum: int) -> int:
    """A checksum from a file, where it is rotated and shifted: leveldb's `util/crc32c.h`."""
    rotated = (checksum - 0xA282EAD8) & ALL_ONES
    return (rotated >> 17 | rotated << 15) & ALL_ONES


def _remainder(octets: np.ndarray) -> int:
    """The data times x^32, modulo the polynomial."""
    row = 4 * min(STREAMS, 1 << (octets.size // 4).bit_length())
    head = octets.size % row
    first = np.zeros(row, np.uint8)  # zeros in front of a polynomial change nothing
    first[row - head :] = octets[:head]
    streams = first.view("<u4")
    for following in octets[head:].reshape(-1, row):
        streams = _times(streams, _power(8 * row)) ^ following.view("<u4")
    while streams.size > 1:
        half = streams.size // 2
        streams = _times(streams[:half], _power(32 * half)) ^ streams[half:]
    return _product(int(streams[0]), _power(32))


def _times(polynomials: np.ndarray, factor: int) -> np.ndarray:
    """Each of many polynomials times one, by two lookups."""
    low, high = _tables(factor)
    return low[polynomials & 0xFFFF] ^ high[polynomials >> 16]


@cache  # asked for one factor to a halving, so for 17 at most
def _tables(factor: int) -> list[np.ndarray]:
    """What the lower and the upper half of a number contribute to its product with a factor."""
    tables = []
    for lowest in (0, 16):
        table = np.zeros(1, np.uint32)
        for bit in range(lowest, lowest + 16):
            table = np.concatenate([table, table ^ np.uint32(_product(1 << bit, factor))])
        tables.append(table)
    return tables


@lru_cache
def _power(exponent: int) -> int:
    """x to some power."""
    result, square = ONE, X
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square, exponent = _product(square, square), exponent >> 1
    return result


def _product(one: int, other: int) -> int:
    """Two polynomials multiplied."""
    result = 0
    while one:
        if one & ONE:
            result ^= other
        one = one << 1 & ALL_ONES
        other = other >> 1 ^ (POLYNOMIAL if other & 1 else 0)
    return result
