"""The plugin contract's torch half: what a model, an objective, a sampler and a codec are to the host."""

from __future__ import annotations

import copy
import hashlib
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vgm_cli import random
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.offers import (  # noqa: F401  # the contract is imported from here
    Checkpointing,
    Companions,
    CompletesImages,
    Condition,
    DropsClasses,
    FinishesImages,
    FollowsPictures,
    HasClasses,
    HasExample,
    HasFeatures,
    HasLatentLikelihood,
    HasLogLikelihood,
    HasParts,
    HasPaths,
    HasPixelLikelihood,
    HasSampleShape,
    HasTiles,
    LearnsVariance,
    Movable,
    NullCondition,
    ReadsPictures,
    Repeats,
    RestorationMethod,
    SeveralCodebooks,
    TakesSteps,
    TokenDecoder,
    TwoTimes,
)

# "x": (B, C, H, W) in [-1, 1] or latents (or "tokens"), "cond": keywords of the network, some rows of them dropped,
# "null": what stands for no condition, "index": (B,) positions, and the data's own columns, e.g. "label": (B,) int64
Batch = dict[str, Any]


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU, on a device: to a GPU from page-locked memory, so that neither side waits."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class Phase:
    """One optimisation phase of a step: a loss, what it trains, and by which optimizer. All else is frozen in it."""

    name: str
    trains: tuple[str, ...] = ("model",)  # roles of `objective.networks`, or parts of them ("model.control")
    optimizer: str = "main"  # phases naming the same optimizer share its state
    every: int = 1  # run at steps divisible by it
    gain: float = 1.0  # factor on the loss (lazy regularisation)
    clip: float | None = None  # limit of the gradients' norm; None: the recipe's

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that are trained, whole or in part."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.trains))


@dataclass(frozen=True)
class Step:
    """Position and randomness of one optimisation step; every draw is a function of (seed, index, name, row).

    A row of the global batch has its own stream for every draw, so that neither the number of processes nor that of
    micro-batches changes what an item sees, and a process draws for its own rows alone. Draws are made on `device`
    itself: nothing is copied there, nothing waits. index counts from 0. micro/micros: gradient accumulation.
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

    def _first(self, n: int) -> int:
        """Number of this process's first row in the global batch, of n rows in every process and micro-batch."""
        return (self.micro * self.world + self.rank) * n

    def rows(self, n: int) -> tuple[range, int]:
        """Numbers of this process's rows in the global batch, and how many rows that has; n rows in every process and
        micro-batch."""
        return range(self._first(n), self._first(n) + n), n * self.world * self.micros

    def _keys(self, n: int, name: str) -> Tensor:
        return random.keys(seed_of(self.seed, self.index, name), self._first(n), n, self.device)

    def on_cpu(self) -> Step:
        """The same step, its draws made on the CPU: for numbers that the CPU reads, so that it need not wait."""
        return replace(self, device=torch.device("cpu"))

    def randn(self, shape: Iterable[int], name: str) -> Tensor:
        """Standard normal draw of `shape`, its first dimension being this process's batch."""
        n, *rest = shape
        return random.normal(self._keys(n, name), math.prod(rest)).reshape(n, *rest)

    def rand(self, n: int | Iterable[int], name: str) -> Tensor:
        """Uniform draw in [0, 1): (n,), or of a shape whose first dimension is this process's batch."""
        n, *rest = (n,) if isinstance(n, int) else n
        return random.uniform(self._keys(n, name), math.prod(rest)).reshape(n, *rest)

    def randint(self, high: int, n: int, name: str) -> Tensor:
        """Uniform integers in [0, high): (n,)."""
        return random.integers(self._keys(n, name), 1, high).reshape(n)

    def stratified(self, n: int, name: str) -> Tensor:
        """Times in [0, 1) spread evenly over the global batch, each uniform by itself: (u + i / N) mod 1 with one u for
        all its N rows (Kingma et al. 2021, Variational Diffusion Models, appendix I.1): (n,)."""
        own, total = self.rows(n)
        rows = torch.arange(own.start, own.stop, device=self.device, dtype=torch.float32)
        u = random.uniform(random.keys(seed_of(self.seed, self.index, name), 0, 1, self.device), 1)[0]
        return (u + rows / total) % 1


@dataclass
class Request:
    """What a sampler is asked for: the N items of one batch of a job, each with its own random stream. With a mask,
    `images` are one for each item, and what the mask keeps of them is not changed."""

    shape: tuple[int, ...]  # of one sample as the model sees it: (C, H, W), or the grid of tokens
    generators: list[torch.Generator]  # N, one per item, on the CPU
    cond: dict[str, Tensor] = field(default_factory=dict)  # keywords of the network, N rows each, e.g. {"y": (N,)}
    null: dict[str, Tensor] = field(default_factory=dict)  # no condition, one row, where null_condition does not say
    steps: int | None = None  # None: the sampler's own
    guidance_scale: float | None = None  # None: the sampler's own
    guidance_interval: tuple[float, float] | None = None  # host times between which to guide; None: always
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where samples are made
    operator: Any = None  # of a restoration: the degradation A, bound to these items
    measurement: Tensor | None = None  # of a restoration: y (N, ...)
    callback: Callable[[int, int, Tensor, Tensor | None], None] | None = None  # (i, total, x_t (N, ...), x0 or None)
    info: dict[str, Any] = field(default_factory=dict)  # samplers report nfe, and in notes sentences for the user
    index: list[int] = field(default_factory=list)  # numbers of these items in the whole job; empty: 0 to N-1
    images: Tensor | None = None  # (M, *shape) to start from, as the model sees them; the same for every batch
    mask: Tensor | None = None  # (N, 1, H, W) bool of pixels, true where an image is kept
    codec: Any = None  # makes images of the result, for samplers that look into it; None: pixels
    asked: dict[str, Sequence[Any]] = field(default_factory=dict)  # N items by column: classes, texts, pictures

    def __post_init__(self) -> None:
        self.index = self.index or list(range(len(self.generators)))

    def classes(self) -> Tensor:
        """The class of every item, (N,) int64, for a classifier that guides. VgmError: none is asked for."""
        if "label" not in self.asked:
            raise VgmError("a classifier guides towards a class, this network has none", "classifier=null", USAGE)
        return torch.as_tensor(self.asked["label"], dtype=torch.long, device=self.device)

    def __len__(self) -> int:
        return len(self.generators)

    def drawn_by(self, generators: list[torch.Generator]) -> Request:
        """The same request with other random streams."""
        other = copy.copy(self)
        other.generators = generators
        return other

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """One standard normal draw per item from that item's own generator: (N, *shape)."""
        shape = self.shape if shape is None else shape
        return send(torch.stack([torch.randn(shape, generator=g) for g in self.generators]), self.device)

    def rand(self, shape: tuple[int, ...] = ()) -> Tensor:
        """One uniform draw per item: (N, *shape)."""
        return send(torch.stack([torch.rand(shape, generator=g) for g in self.generators]), self.device)


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
    """Defaults of the optional half of the contract. Whoever loads a bare objective adds what it lacks (`complete`), so
    that the host calls every name below on every objective and asks none whether it is there.

    shardable: the networks are used in `loss` alone, so that train.fsdp may cut their weights into pieces.
    uncompiled: roles that train.compile leaves alone: networks that a loss differentiates through twice, or more than
        once (create_graph, retain_graph), which a compiled graph does not allow.
    forward_mode: `loss` takes forward-mode derivatives (torch.func.jvp), so that no network of it is compiled in place
        nor recomputes its activations.
    sparse_grads: in some steps some trained parameters receive no gradient, which several processes have to know.
    prepare_size: images that `prepare` wants, the same on every process; None: a training batch.
    """

    networks: Mapping[str, nn.Module]
    shardable: bool = False
    uncompiled: Sequence[str] = ()
    forward_mode: bool = False
    sparse_grads: bool = False
    prepare_size: int | None = None

    def phases(self) -> list[Phase]:
        return [Phase("main")]

    def to(self, device: torch.device) -> None:
        """Move whatever the loss needs besides `networks`: a teacher, a reward, tables. The host moves the networks."""

    def prepare(self, first_batch: Batch, step: Step) -> None:
        """Data-dependent initialisation on the first batch (actnorm, latent scale)."""

    def experience(self, batch: Batch, step: Step) -> Iterable[Batch]:
        """Batches to optimise on made from `batch`: roll-outs, reflow pairs. Default: the batch itself. A list, not a
        generator, is made in the precision that the loss sees."""
        return [batch]

    def schedule(self, step: Step) -> Mapping[str, Mapping[str, float]]:
        """What this step asks of the optimizers, by name, on top of the recipe: {"main": {"lr": 0.5}} halves the
        learning rate of the recipe's schedule, {"main": {"weight_decay": 0.1}} takes the place of the weight decay."""
        return {}

    def restarts(self, step: Step) -> bool:
        """Whether the optimizers forget their moments before this step (progressive growing)."""
        return False

    def after_step(self, step: Step) -> None:
        """Targets, curricula, resampler histories."""

    def remark(self, row: Mapping[str, float]) -> str | None:
        """A warning about a row of the log, {name: mean since the last row}, in one sentence; None: nothing is wrong. A
        run says each sentence once."""
        return None

    def export(self, role: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A network's state (its own or an average's) as checkpoints hold it, e.g. adapters folded in. Entries that
        this leaves out are kept for resuming; what it changes must not be trained."""
        return state

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
    """Turns a model (or its view) and a request into samples (N, *shape). Optional: `SamplerBase`, `TakesSteps`."""

    def __call__(self, model: Any, request: Request) -> Tensor: ...


class SamplerBase:
    """How a grid shows what a sampler makes. Whoever loads a bare sampler adds what it lacks, as with objectives.

    grid_columns: pictures per row, of samplers whose items make a table; None: any number does.
    grid_labels: whether the "columns" or the "rows" of that table share a label.
    grid_period: so many items stay under one another; 0: none do.
    """

    grid_columns: int | None = None
    grid_labels: Literal["columns", "rows"] = "columns"
    grid_period: int = 0


def complete(thing: Any, base: type) -> Any:
    """The same thing, with the base's attributes and methods for whatever it lacks; one that inherits lacks nothing."""
    for name, value in vars(base).items():
        if not name.startswith("_") and not hasattr(thing, name):
            value = types.MethodType(value, thing) if isinstance(value, types.FunctionType) else value
            object.__setattr__(thing, name, value)  # a frozen dataclass is completed, too
    return thing


@runtime_checkable
class Codec(Protocol):
    """A frozen first stage between pixels and what the model sees.

    encode gives what is worth caching (posterior moments, or the latents themselves); latents turns that
    into model space (drawing from the posterior with `noise`, scaling); decode goes back to pixels. An objective
    whose constructor has a parameter `codec` is given the frozen codec of its recipe.
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


@runtime_checkable
class Tokenizer(Protocol):
    """A codec that can also give tokens: what every token model trains on.

    With `codec: {name: ..., output: tokens}` a batch holds "tokens", int64 (B, *grid), in place of "x"; models are
    built from the facts vocab_size and grid; samplers return ids (N, *grid), which the host decodes; token caches are
    tied to the codec's hash like those of latents.
    """

    codebook_size: int  # ids are in [0, codebook_size)

    def token_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(C, H, W) of an image -> the grid: (h, w), or (L,) for several scales one after the other."""
        ...

    def tokens(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1] -> ids (B, *grid) int64."""
        ...

    def decode_tokens(self, ids: Tensor) -> Tensor:
        """ids (B, *grid), or of another grid that the codec can decode -> images (B, C, H, W) about [-1, 1]."""
        ...


@runtime_checkable
class PyramidTokenizer(Tokenizer, Protocol):
    """A tokenizer of several grids from coarse to fine, each of which adds what the coarser ones left out (VAR).

    The ids of an image are those of all grids one after the other: token_shape is (L,), L the positions of all grids.
    What the grids add up to are the features (B, C, h, w), of the last grid's size, from which the image is decoded:
    samplers may return them, or show them step by step, in the place of ids.
    Models are built from the facts scales, vocab_size and channels (C). vgm_cli.ar.pyramid goes over the scales.
    """

    def scales(self, image_shape: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
        """(C, H, W) of an image -> (h, w) of every grid, coarse to fine."""
        ...

    def code_vectors(self) -> Tensor:
        """(codebook_size, C): the vector of every id; samplers may mix them."""
        ...

    def added(self, features: Tensor, codes: Tensor, scale: int) -> Tensor:
        """The features (B, C, h, w) with what grid number `scale` adds: its code vectors are codes (B, C, h_k, w_k)."""
        ...

    def decode_features(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w), of all grids or of the first few -> images (B, C, H, W) about [-1, 1]."""
        ...
