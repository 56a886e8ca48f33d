"""Properties of every schedule and choice of masks."""

from __future__ import annotations

import pytest
import torch

from vgm_cli.ar.masking import (
    confidence,
    first_of,
    gumbel,
    known_after,
    least_confident,
    mask_rate,
    still_masked,
)
from vgm_cli.ar.orders import inverse, order_of, random_orders, rolled
from vgm_cli.errors import VgmError

SCHEDULES = ["cosine", "arccos", "log", "exp", "root", "linear", "square", "cubic", "pow1.5"]


# -- properties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_fall_from_all_to_none(schedule: str) -> None:
    rate = mask_rate(torch.linspace(0, 1, 33, dtype=torch.float64), schedule, 64)
    assert float(rate[0]) == pytest.approx(1, abs=0.02) and float(rate[-1]) == pytest.approx(0, abs=1e-9)
    assert bool((rate.diff() <= 1e-12).all())


@pytest.mark.parametrize("schedule", ["sine", "pow", "pow-1", "powx", "pownan", "2", ""])
def test_unknown_schedules_are_refused(schedule: str) -> None:
    with pytest.raises(VgmError, match="no mask schedule"):
        mask_rate(torch.zeros(1), schedule, 16)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 12, 49])
def test_decoding_ends_whatever_the_steps(schedule: str, steps: int) -> None:
    """Every step makes a position known as long as there are two, and leaves one; no step makes one unknown."""
    total = torch.tensor([49, 20])
    masked = total
    for k in range(steps - 1):
        left = still_masked(total, masked, mask_rate(torch.tensor((k + 1) / steps), schedule, 49))
        assert bool(((left < masked) | (masked == 1)).all()) and bool((left >= 1).all())
        masked = left
    known = known_after(torch.arange(1, steps + 1, dtype=torch.float64) / steps, schedule, 49)
    assert (
        int(known[-1]) == 49 and bool((known.diff() >= 0).all()) and bool((known >= torch.arange(1, steps + 1)).all())
    )


@pytest.mark.parametrize(("schedule", "codes", "wanted"), [
    ("linear", 25, [1, 5, 10, 15, 20, 25]), ("square", 25, [1, 2, 4, 9, 16, 25]), ("root", 5, [1, 2, 3, 4, 5, 6]),
])  # fmt: skip
def test_parts_that_are_whole_numbers_are_not_rounded_down(schedule: str, codes: int, wanted: list[int]) -> None:
    """Those of the official float32 schedules, of which 1 less the share that is masked falls short."""
    assert known_after(torch.linspace(0, 1, 6), schedule, codes).tolist() == wanted


def test_the_least_confident_are_masked_and_known_ones_never() -> None:
    u = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    known = torch.zeros(3, 10, dtype=torch.bool)
    known[:, :4] = True
    sure = confidence(torch.linspace(-5, -1, 10).expand(3, -1), known, gumbel(u), 0.0)
    again = least_confident(sure, torch.tensor([0, 2, 6]))
    assert again.sum(1).tolist() == [0, 2, 6]
    assert again[1].nonzero().flatten().tolist() == [4, 5] and not again[:, :4].any()
    assert torch.equal(least_confident(sure, 10), ~known), "known ones are not masked even where more is asked for"
    noisy = confidence(torch.linspace(-5, -1, 10).expand(3, -1), known, gumbel(u), 100.0)
    assert torch.equal(least_confident(noisy, 1)[:, 4:].float().argmax(1), u[:, 4:].argmin(1)), "noise decides"
    assert float(gumbel(torch.rand(100000, generator=torch.Generator().manual_seed(1))).mean()) == pytest.approx(
        0.5772, abs=0.02
    )


def test_orders_of_their_own() -> None:
    u = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    orders = random_orders(u)
    assert torch.equal(orders.sort(1).values, torch.arange(12).expand(4, -1)) and len(orders.unique(dim=0)) == 4
    assert torch.equal(random_orders(u[2:3]), orders[2:3]), "an item's order is its own draw's"
    assert torch.equal(orders.gather(1, inverse(orders)), torch.arange(12).expand(4, -1))
    mask = first_of(orders, 5)
    assert mask.sum(1).tolist() == [5] * 4 and bool(mask.gather(1, orders[:, :5]).all())
    order = order_of("halton", 3, 5)
    assert torch.equal(order.sort().values, torch.arange(15))
    for row, shift in zip(rolled(order, torch.tensor([0, 4, 20])), (0, 4, 20)):
        assert torch.equal(row, order.roll(shift))


def test_beginnings_of_the_halton_order_are_spread() -> None:
    order = order_of("halton", 16, 16)
    for n in (16, 64, 128):
        row, column = order[:n] // 16, order[:n] % 16
        quarters = torch.bincount(2 * (row // 8) + column // 8, minlength=4)
        assert bool(((quarters - n / 4).abs() <= 3).all()), n
