"""Philox4x32-10, a counter-based random number generator (Salmon et al., SC 2011)."""

from __future__ import annotations

from prill_runtime.errors import InvalidParameter

Words = tuple[int, int, int, int]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """The four output words for a counter of four and a key of two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_uniform(seed: int, position: int) -> float:
    """A float64 in [0, 1) that depends on seed and position alone.

    The key is the seed's low and high word, the counter (position low, position high, 0, 0). The upper
    27 bits of the first word and the upper 26 bits of the second make a 53-bit fraction.

    Raises:
        InvalidParameter: seed or position outside 0 … 2⁶⁴ − 1.
    """
    for name, value in (("seed", seed), ("position", position)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise InvalidParameter(
                "not an unsigned 64-bit number", where=name, expected="0 to 2^64 - 1", got=value
            )
    words = philox4x32((position & _MASK, position >> 32, 0, 0), (seed & _MASK, seed >> 32))
    return ((words[0] >> 5) * (1 << 26) + (words[1] >> 6)) / float(1 << 53)
