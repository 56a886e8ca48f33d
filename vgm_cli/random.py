"""Random numbers that are a function of (seed, row, position), so that a row of a batch draws the same whatever
process, micro-batch or device it is on, and nobody draws another's rows.

The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) used by
counter: number j of a stream is a hash of its key + j. All of it is integer arithmetic on tensors; results on a CPU are
the same bit for bit whatever the number of threads, and on a GPU they differ by its logarithm's rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as a signed number
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
CPU_WORDS = 1 << 15  # hashed at once: three buffers of this length stay in a core's cache
GPU_WORDS = 1 << 24


def mix(z: Tensor, spare: Tensor | None = None, rounds: int = len(ROUNDS)) -> Tensor:
    """SplitMix64's finaliser of int64 words, in place. spare: a buffer of the same shape. rounds: how many of its three
    are made; the last one changes the lower 33 bits alone."""
    spare = torch.empty_like(z) if spare is None else spare
    for shift, factor in ROUNDS[:rounds]:
        torch.bitwise_right_shift(z, shift, out=spare)
        z.bitwise_xor_(spare.bitwise_and_((1 << (64 - shift)) - 1))  # the shift of signed words fills with ones
        if factor != 1:
            z.mul_(factor)
    return z


def keys(seed: int, first: int, n: int, device: torch.device) -> Tensor:
    """Keys (n,) of rows first to first + n - 1 under a 63-bit seed. They are hashed, so that streams do not overlap."""
    return mix(torch.arange(first, first + n, device=device).mul_(GAMMA).add_(seed))


def words(row_keys: Tensor, length: int, rounds: int = len(ROUNDS)) -> Iterator[tuple[slice, Tensor]]:
    """Random int64 words, `length` per key, as parts (rows, words (rows, length)); each part is overwritten by the
    next. rounds: see `mix`."""
    n, most = len(row_keys), CPU_WORDS if row_keys.device.type == "cpu" else GPU_WORDS
    part = max(1, min(n, most // max(length, 1)))
    steps = torch.arange(1, length + 1, device=row_keys.device).mul_(GAMMA)
    z = torch.empty(part, length, dtype=torch.int64, device=row_keys.device)
    spare = torch.empty_like(z)
    for start in range(0, n, part):
        rows = slice(start, min(start + part, n))
        own = z[: rows.stop - start]
        torch.add(row_keys[rows, None], steps, out=own)
        yield rows, mix(own, spare[: len(own)], rounds)


def high(z: Tensor) -> Tensor:
    """The upper 24 bits of words, as integers in float32."""
    return (z >> 40).bitwise_and_(0xFFFFFF).to(torch.float32)


def uniform(row_keys: Tensor, length: int) -> Tensor:
    """Uniform in [0, 1), multiples of 2^-24: (n, length)."""
    out = torch.empty(len(row_keys), length, device=row_keys.device)
    for rows, z in words(row_keys, length, rounds=2):
        torch.mul(high(z), 2.0**-24, out=out[rows])
    return out


def normal(row_keys: Tensor, length: int) -> Tensor:
    """Standard normal by Box and Muller's transform, two numbers from a word (|value| < 5.9): (n, length)."""
    half = (length + 1) // 2
    out = torch.empty(len(row_keys), 2 * half, device=row_keys.device)
    for rows, z in words(row_keys, half, rounds=2):
        radius = high(z).add_(0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
        angle = (z >> 31).bitwise_xor_(z).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2 * math.pi / 2**24)
        torch.mul(radius, angle.cos(), out=out[rows, :half])
        torch.mul(radius, angle.sin_(), out=out[rows, half:])
    return out[:, :length]


def integers(row_keys: Tensor, length: int, bound: int) -> Tensor:
    """Uniform integers in [0, bound), bound up to 2^31: (n, length) int64."""
    out = torch.empty(len(row_keys), length, dtype=torch.int64, device=row_keys.device)
    for rows, z in words(row_keys, length, rounds=2):
        out[rows] = (z >> 33).bitwise_and_(2**31 - 1).mul_(bound) >> 31
    return out
