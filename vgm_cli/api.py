"""The plugin contract's torch half: what a model, an objective, a sampler and a codec are to the host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = dict[str, Any]  # "x": (B, C, H, W) in [-1, 1] or latents, "y": (B,) int64 labels, "index": (B,) positions


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


@dataclass(frozen=True)
class Phase:
    """One optimisation phase of a step.

    trains: roles of `objective.networks` that receive gradients; the others are frozen during the phase.
    optimizer: phases naming the same optimizer share its state. every: run at steps divisible by it.
    gain: factor on the loss (lazy regularisation). clip: gradient-norm limit, None for the recipe's.
    """

    name: str
    trains: tuple[str, ...] = ("model",)
    optimizer: str = "main"
    every: int = 1
    gain: float = 1.0
    clip: float | None = None


@dataclass(frozen=True)
class Step:
    """Position and randomness of one optimisation step; every draw is a function of (seed, index, name).

    Draws are made for the whole global batch and sliced to this process's rows, so that the number of
    processes does not change what an item sees. index counts from 0. micro/micros: gradient accumulation.
    """

    index: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    micro: int = 0
    micros: int = 1
    total: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def generator(self, name: str = "") -> torch.Generator:
        """A CPU generator for the draw called `name`; the same on every rank."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.index, name))

    def _rows(self, n: int, draw: Callable[[int], Tensor]) -> Tensor:
        shards = self.world * self.micros
        shard = self.micro * self.world + self.rank
        return draw(n * shards)[shard * n : (shard + 1) * n].to(self.device)

    def randn(self, shape: Iterable[int], name: str) -> Tensor:
        """Standard normal draw of `shape`, its first dimension being this process's batch."""
        n, *rest = shape
        return self._rows(n, lambda total: torch.randn(total, *rest, generator=self.generator(name)))

    def rand(self, n: int, name: str) -> Tensor:
        """Uniform draw in [0, 1): (n,)."""
        return self._rows(n, lambda total: torch.rand(total, generator=self.generator(name)))

    def randint(self, high: int, n: int, name: str) -> Tensor:
        """Uniform integers in [0, high): (n,)."""
        return self._rows(n, lambda total: torch.randint(high, (total,), generator=self.generator(name)))


@dataclass
class Request:
    """What a sampler is asked for: N items, each with its own random stream.

    shape: one sample as the model sees it (C, H, W). cond: batched conditions, e.g. {"y": (N,)}.
    steps / guidance_scale: None means the sampler's own default. callback(i, total, x_t, x0) may be None.
    """

    shape: tuple[int, ...]
    generators: list[torch.Generator]
    cond: dict[str, Tensor] = field(default_factory=dict)
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    operator: Any = None
    measurement: Tensor | None = None
    callback: Callable[[int, int, Tensor, Tensor | None], None] | None = None
    info: dict[str, Any] = field(default_factory=dict)  # samplers report e.g. info["nfe"]

    def __len__(self) -> int:
        return len(self.generators)

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """One standard normal draw per item from that item's own generator: (N, *shape)."""
        shape = self.shape if shape is None else shape
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def rand(self, shape: tuple[int, ...] = ()) -> Tensor:
        """One uniform draw per item: (N, *shape)."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(self.device)


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per item; CPU so that a sample is the same on every device."""
    return [torch.Generator().manual_seed(s) for s in seeds]


@runtime_checkable
class Objective(Protocol):
    """What is optimised. Constructor keywords are the recipe's `objective:` node; networks arrive by role name."""

    networks: Mapping[str, nn.Module]

    def phases(self) -> list[Phase]: ...

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over this process's rows and what to log (detached scalars)."""
        ...


class ObjectiveBase:
    """Defaults of the optional half of the contract; inherit it or implement the same names."""

    networks: Mapping[str, nn.Module]

    def phases(self) -> list[Phase]:
        return [Phase("main")]

    def prepare(self, first_batch: Batch, step: Step) -> None:
        """Data-dependent initialisation on the first batch (actnorm, latent scale)."""

    def experience(self, batch: Batch, step: Step) -> Iterable[Batch]:
        """Batches to optimise on made from `batch`: roll-outs, reflow pairs. Default: the batch itself."""
        return [batch]

    def after_step(self, step: Step) -> None:
        """Targets, curricula, resampler histories."""

    def view(self) -> dict[str, Any] | None:
        """How a sampler must look at the trained network, written into every checkpoint, e.g.
        {"name": "denoiser", "path": {...}, "prediction": "eps"}; None: the bare network."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Whatever resuming needs besides networks and optimizers, as tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)[:3]}")


class Sampler(Protocol):
    """Turns a model (or its view) and a request into samples (N, *shape)."""

    def __call__(self, model: Any, request: Request) -> Tensor: ...


@runtime_checkable
class Codec(Protocol):
    """A frozen first stage between pixels and what the model sees.

    encode gives what is worth caching (posterior moments, or the latents themselves); latents turns that
    into model space (drawing from the posterior with `noise`, scaling); decode goes back to pixels.
    """

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(C, H, W) of an image -> (c, h, w) of what the model sees."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1] -> moments (B, 2c, h, w)."""
        ...

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """moments -> scaled latents (B, c, h, w); noise: (B, c, h, w) standard normal, None for the mode."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) -> images (B, C, H, W) about [-1, 1]."""
        ...
