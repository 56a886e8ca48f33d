"""Draws are a function of (seed, step, name, row): the same in any process and micro-batch, and as random as they look."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vgm_cli import random
from vgm_cli.api import Step

DRAWS = {
    "normal": lambda step, n: step.randn((n, 3, 5), "x"),
    "uniform": lambda step, n: step.rand((n, 7), "x"),
    "integers": lambda step, n: step.randint(10, n, "x"),
    "stratified": lambda step, n: step.stratified(n, "x"),
}


def split(draw, world: int, micros: int, n: int = 24) -> Tensor:
    """The global batch of n rows, drawn by `world` processes in `micros` micro-batches."""
    own = n // (world * micros)
    return torch.cat(
        [
            draw(Step(5, seed=3, rank=rank, world=world, micro=micro, micros=micros), own)
            for micro in range(micros)
            for rank in range(world)
        ]
    )


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(("world", "micros"), [(2, 1), (1, 3), (4, 2)])
def test_rows_do_not_depend_on_who_draws_them(name: str, world: int, micros: int) -> None:
    assert torch.equal(split(DRAWS[name], world, micros), split(DRAWS[name], 1, 1))


@pytest.mark.parametrize("name", DRAWS)
def test_every_step_seed_and_name_draws_anew(name: str) -> None:
    draws = [DRAWS[name](Step(index, seed=seed), 64) for index, seed in ((0, 0), (1, 0), (0, 1))]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(Step(0).rand(64, "t"), Step(0).rand(64, "noise"))


def test_threads_do_not_change_a_draw() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Step(0).randn((40, 3000), "x")
        torch.set_num_threads(2)
        assert torch.equal(one, Step(0).randn((40, 3000), "x"))
    finally:
        torch.set_num_threads(before)


def test_parts_of_a_draw_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Step(0).randn((40, 300), "x")
    monkeypatch.setattr(random, "CPU_WORDS", 500)
    assert torch.equal(whole, Step(0).randn((40, 300), "x"))


def test_splitmix64_is_the_published_one() -> None:
    """First outputs of the reference implementation seeded with 1234567 (Vigna's splitmix64.c, as Rosetta Code lists)."""
    key = torch.tensor([1234567])
    parts = [z.clone() for _, z in random.words(key, 5)]
    got = [int(v) % 2**64 for v in parts[0][0]]
    assert got == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_draws_are_functions_of_whole_words() -> None:
    """They make two of a word's three rounds, where the third changes bits that they do not read."""
    key = torch.tensor([1234567, -5])
    whole = torch.cat([z.clone() for _, z in random.words(key, 600)])
    high, low = (whole >> 40) & 0xFFFFFF, whole & 0xFFFFFF
    assert torch.equal(random.uniform(key, 600), high * 2.0**-24)
    assert torch.equal(random.integers(key, 600, 1000), (whole >> 33 & 2**31 - 1) * 1000 >> 31)
    radius = ((high + 0.5) * 2.0**-24).log().mul(-2).sqrt()
    angle = low.float() * (2 * math.pi / 2**24)
    assert torch.equal(random.normal(key, 1200), torch.cat([radius * angle.cos(), radius * angle.sin()], 1))


def test_normal_numbers_are_normal() -> None:
    """Moments, the distribution function (Kolmogorov-Smirnov), and independence of neighbours along rows, columns,
    steps and of the two numbers that one word gives."""
    x = Step(0).randn((1000, 400), "x").double()
    n = x.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - expected) < 4.5 * math.sqrt(variance / n)
    ordered = x.flatten().sort().values
    distance = (torch.special.ndtr(ordered) - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(distance) * math.sqrt(n) < 1.8  # exceeded once in 300 draws of true normals
    others = {
        "columns": (x[:, 1:], x[:, :-1]),
        "rows": (x[1:], x[:-1]),
        "halves": (x[:, :200], x[:, 200:]),
        "steps": (x, Step(1).randn((1000, 400), "x").double()),
    }
    for name, (a, b) in others.items():
        for p, q in ((1, 1), (2, 2), (1, 2)):
            u, v = a**p - (a**p).mean(), b**q - (b**q).mean()
            r = float((u * v).mean() / (u.std() * v.std()))
            assert abs(r) < 4.5 / math.sqrt(u.numel()), (name, p, q, r)


def test_uniform_numbers_and_integers_are_uniform() -> None:
    u = Step(0).rand((200, 1000), "u")
    assert 0 <= float(u.min()) and float(u.max()) < 1
    ordered = u.flatten().double().sort().values
    assert float((ordered - (torch.arange(u.numel()) + 0.5) / u.numel()).abs().max()) * math.sqrt(u.numel()) < 1.8
    counts = torch.bincount(Step(0).randint(10, 50_000, "y"), minlength=10).double()
    assert len(counts) == 10 and float(((counts - 5000) ** 2 / 5000).sum()) < 30  # chi-squared, 9 degrees of freedom


def test_stratified_times_are_one_to_a_stratum() -> None:
    t = torch.cat([Step(2, rank=r, world=4).stratified(16, "t") for r in range(4)])
    assert torch.equal((t * 64).floor().sort().values, torch.arange(64.0))
    means = torch.stack([Step(i).stratified(8, "t")[0] for i in range(400)])
    assert 0.44 < float(means.mean()) < 0.56 and float(means.max()) > 0.95
