"""Where training draws its log-SNRs: the density p that importance weights w / p take out of the objective again.

Kingma & Gao 2023 (2303.00848): a density changes the variance of the loss's estimate, never the loss, as long as its
ends stay. A schedule lambda(u), falling from lambda_max at u = 0 to lambda_min at u = 1, is the same as its density
p = -du / dlambda. All numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError

from .gamma import Monotone
from .weightings import EDM_MEAN, EDM_STD, normal_density

Curve = Callable[[Tensor], Tensor]


class Fixed:
    """A density of log-SNRs between `low` and `high` that has a formula; the other classes here have the same methods.

    u_of: the time of the uncut schedule at a log-SNR. of_u: its inverse. slope: its derivative.
    """

    def __init__(self, u_of: Curve, of_u: Curve, slope: Curve, low: float, high: float, shift: float = 0.0):
        self.u_of, self.of_u, self.slope, self.shift = u_of, of_u, slope, shift
        self.low, self.high = low, high
        ends = u_of(torch.tensor([high - shift, low - shift], dtype=torch.float64, device="cpu"))
        self.first, self.width = float(ends[0]), float(ends[1] - ends[0])

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The log-SNRs at uniform draws u (B,) in [0, 1), and the density at each: (B,), (B,)."""
        l = (self.of_u(self.first + u.double() * self.width) + self.shift).clamp(self.low, self.high)
        return l, self.density(l)

    def density(self, l: Tensor) -> Tensor:
        """The density at log-SNRs between the ends: like l."""
        return self.slope(l.double() - self.shift) / self.width


def cosine(low: float, high: float, shift: float = 0.0) -> Fixed:
    """lambda = -2 ln tan(pi u / 2), plus a shift (Nichol & Dhariwal 2021; Hoogeboom et al. 2023)."""
    return Fixed(
        lambda l: 2 / math.pi * torch.atan(torch.exp(-l / 2)),
        lambda u: -2 * torch.tan(math.pi / 2 * u).log(),
        lambda l: 1 / (2 * math.pi * torch.cosh(l / 2)),
        low,
        high,
        shift,
    )


def flow(low: float, high: float, shift: float = 0.0) -> Fixed:
    """lambda = 2 ln((1 - u) / u): uniform times of flow matching on straight lines."""
    return Fixed(
        lambda l: torch.sigmoid(-l / 2),
        lambda u: 2 * (torch.log1p(-u) - u.log()),
        lambda l: 1 / (8 * torch.cosh(l / 4) ** 2),
        low,
        high,
        shift,
    )


def edm(low: float, high: float, shift: float = 0.0) -> Fixed:
    """lambda ~ N(2.4, 2.4^2): EDM's ln sigma ~ N(-1.2, 1.2^2) (Karras et al. 2022)."""
    return Fixed(
        lambda l: torch.special.ndtr((EDM_MEAN - l) / EDM_STD),
        lambda u: EDM_MEAN - EDM_STD * torch.special.ndtri(u),
        lambda l: normal_density(l, EDM_MEAN, EDM_STD),
        low,
        high,
        shift,
    )


def linear(low: float, high: float, shift: float = 0.0) -> Fixed:
    """Uniform between the ends (VDM's fixed schedule), which a shift does not change."""
    return Fixed(lambda l: -l, lambda u: -u, torch.ones_like, low, high)


FIXED: dict[str, Callable[..., Fixed]] = {"cosine": cosine, "flow": flow, "edm": edm, "linear": linear}


class Adaptive:
    """p proportional to a moving average of w ||eps_hat - eps||^2 in equal bins, so that every draw has the same loss.

    All bins begin at 1, the uniform density. p is constant in a bin, the schedule linear between the edges. What the
    paper starts from and how often it refreshes is not known; two public implementations begin so and update each step.
    """

    def __init__(self, low: float, high: float, bins: int = 100, decay: float = 0.999):
        self.low, self.high, self.decay = low, high, decay
        self.width = (high - low) / bins
        self.histogram = torch.ones(bins, dtype=torch.float64, device="cpu")

    def bin_of(self, l: Tensor) -> Tensor:
        return ((l.double() - self.low) / self.width).floor().long().clamp(0, len(self.histogram) - 1)

    def density(self, l: Tensor) -> Tensor:
        mass = self.histogram.to(l.device)
        return mass[self.bin_of(l)] / (mass.sum() * self.width)

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        mass = self.histogram.to(u.device)
        edges = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
        wanted = (1 - u.double()) * edges[-1]  # u = 0 is the upper end
        at = torch.searchsorted(edges[1:].contiguous(), wanted).clamp(max=len(mass) - 1)
        l = self.low + (at + (wanted - edges[at]) / mass[at]) * self.width
        return l, mass[at] / (edges[-1] * self.width)

    def update(self, l: Tensor, values: Tensor) -> None:
        """Move every bin that holds one of the log-SNRs l (B,) towards the mean of its values (B,); others stay."""
        hit = nn.functional.one_hot(self.bin_of(l), len(self.histogram)).double()  # (B, bins): sums in one order
        count, total = hit.sum(0), values.double() @ hit
        mass = self.histogram.to(l.device)
        moved = self.decay * mass + (1 - self.decay) * total / count.clamp(min=1)
        self.histogram = torch.where(count > 0, moved, mass)

    def state_dict(self) -> dict[str, Tensor]:
        return {"histogram": self.histogram}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """VgmError: another number of bins."""
        if state["histogram"].shape != self.histogram.shape:
            have, want = len(state["histogram"]), len(self.histogram)
            raise VgmError(f"the checkpoint's schedule has {have} bins, the recipe's {want}", code=USAGE)
        self.histogram = state["histogram"].double().clone()


class Learned:
    """VDM's monotone network as a schedule between fixed ends: u -> gamma = -lambda.

    It is trained on the square of each draw's loss: the loss's mean does not depend on the schedule, so that this
    lowers its variance (Kingma et al. 2021, appendix I.2).
    """

    def __init__(self, network: Monotone):
        self.network = network
        self.low, self.high = -network.gamma_max, -network.gamma_min

    def draw(self, u: Tensor, tap: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """tap: changes the gradient that comes back to the schedule from each draw, see `Monotone`."""
        gamma, slope = self.network(u.double(), tap)
        return -gamma, 1 / slope

    def density(self, l: Tensor) -> Tensor:
        return self.draw(self.network.inverse(-l))[1]


def make_density(
    name: str, low: float, high: float, shift: float, bins: int, decay: float, network: Any = None
) -> Fixed | Adaptive | Learned:
    """The density called `name` between two log-SNRs. VgmError: the ends are the wrong way round."""
    if not low < high:
        raise VgmError(f"logsnr_min={low:g} is not below logsnr_max={high:g}", code=USAGE)
    if name == "adaptive":
        return Adaptive(low, high, bins, decay)
    return Learned(network) if name == "learned" else FIXED[name](low, high, shift)
