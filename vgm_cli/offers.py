"""What a network is told, and what a network, view, sampler, metric or reward may offer besides its call; a part of the
contract, see `api`.

Each is a protocol and asked for with isinstance, never by the name of an attribute; what does not offer it simply lacks
the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vgm_cli.api import Request


@runtime_checkable
class TakesSteps(Protocol):
    """A sampler with a number of steps, which a request may override. steps: its own; None: the model's."""

    steps: Any


@runtime_checkable
class NullCondition(Protocol):
    """A network that can be unconditional: what classifier-free guidance needs. One that was built without a null class
    does not have the method."""

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The unconditional version of a batch's keywords, of the same shapes: {"y": (B,)} -> the null class. The
        argument is left as it is."""
        ...


@runtime_checkable
class HasClasses(Protocol):
    """A network that may take class labels. num_classes: how many; 0: it takes none."""

    num_classes: int


@runtime_checkable
class HasSampleShape(Protocol):
    """A network of samples of one shape only. sample_shape: (C, H, W)."""

    sample_shape: tuple[int, ...]


@runtime_checkable
class DropsClasses(Protocol):
    """A network with a null class where class_dropout_prob is above 0."""

    class_dropout_prob: float


@runtime_checkable
class TwoTimes(Protocol):
    """A network that may be told a second time: where second_time is true, forward takes s (N,), what is told of the
    end of a jump (diffusion/flow_map.py)."""

    second_time: bool


@runtime_checkable
class LearnsVariance(Protocol):
    """A network whose output has twice the channels where learn_sigma is true: a mean and a variance."""

    learn_sigma: bool


@runtime_checkable
class Checkpointing(Protocol):
    """A network that can recompute its activations in the backward pass to save memory (train.checkpointing)."""

    checkpointing: bool


@runtime_checkable
class Repeats(Protocol):
    """A network of repeated blocks, which train.fsdp gathers one at a time. repeated: names of its lists of modules."""

    repeated: Sequence[str]


@runtime_checkable
class HasLogLikelihood(Protocol):
    """A view or network that knows the likelihood of images: vgm_cli/metrics/likelihood.py has its arguments."""

    def log_likelihood(self, x: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, str]:
        """x: what the model sees -> nats (B,), and in a few words how they were computed (exact, a bound, …)."""
        ...


@runtime_checkable
class HasLatentLikelihood(Protocol):
    """The same behind a codec. latent_likelihood: the likelihood of latents or codes means something by itself."""

    latent_likelihood: bool


@runtime_checkable
class SeveralCodebooks(Protocol):
    """A tokenizer whose ids are numbered over several codebooks, of which every position has its own. codes_each: size
    of one of them, so that a token says log2(codes_each) bits."""

    codes_each: int


@runtime_checkable
class HasPixelLikelihood(Protocol):
    """A tokenizer whose decoder is a distribution of 8-bit images. With a prior of its tokens that makes a model of
    images, whose bound log p(x) >= log p(x | tokens) + log p(tokens) `bits-per-dim` measures."""

    def pixel_log_likelihood(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: uint8 (B, C, H, W), ids: their tokens (B, *grid) -> log p(x | ids) in nats (B,)."""
        ...


@runtime_checkable
class HasPaths(Protocol):
    """A generator with a latent space to walk in, of which `ppl` measures how evenly images change."""

    def path_samples(
        self, generators: Sequence[torch.Generator], epsilon: float, space: str, sampling: str
    ) -> tuple[Tensor, Tensor]:
        """Pairs of images epsilon apart on paths between latents, a path of each generator's."""
        ...


@runtime_checkable
class Movable(Protocol):
    """A reward, a codec or whatever else an objective has to bring to a device by itself."""

    def to(self, device: torch.device) -> Any: ...


@runtime_checkable
class HasParts(Protocol):
    """A reward that is a sum. parts: what each term gave in the latest call, unweighted, {name: (B,)}."""

    parts: Mapping[str, Tensor]


class Condition(Protocol):
    """One thing that a network is told besides x and t: a class, a text, a picture.

    The host reads its items from the data (or from the command line), turns them into keywords of the network, and
    drops some rows of them while training; objectives find the keywords in batch["cond"], samplers in Request.cond.

    column: of the data: label, text, or one of pictures (`ReadsPictures`); the command line's --label is for a
    condition on labels, --prompt for one on texts, --hint for one on pictures. choices: every item, where they are few:
    sampled in turn where the user asks for none. A constructor may ask for `column`, as the recipe says it, for
    `channels`, those of its pictures, and for the recipe's frozen `codec`. A condition that is an nn.Module encodes on
    the device, each distinct item once; one with parameters is trained as a role of its name where the recipe says
    `train: true`.
    """

    column: str
    choices: Sequence[Any]

    def parse(self, words: Sequence[str]) -> list[Any]:
        """What the user typed -> items. VgmError: a word that is none."""
        ...

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """Items -> keywords of the network: {"y": (B,)}, {"context": (B, L, C)}, {"hint": (B, C, H, W)}."""
        ...

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """The keywords without a condition, n rows; {} where the network itself has them (NullCondition)."""
        ...

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """Keywords of the right shapes without an item, to count and time a network with."""
        ...


@runtime_checkable
class ReadsPictures(Protocol):
    """A condition whose items are pictures: they come from columns of the data, or are made of the images.

    reads: the columns that an item is made of; `image` is the image that is trained on. draws: whether `items_of` makes
    something else of the same pictures each time.
    """

    reads: Sequence[str]
    draws: bool

    def items_of(self, columns: Mapping[str, Tensor], drawn: Sequence[torch.Generator]) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] of every column that it reads -> items (B, ...), as encode takes them.
        drawn: a generator for each row, where `draws` says that something is drawn."""
        ...


@runtime_checkable
class Companions(Protocol):
    """A sampler of several networks at once. also: the others, as the host loads them (RUN on the command line); what
    the k-th is told carries its number (hint_1), and its pictures are asked for under names of their own (hint2)."""

    also: Sequence[Any]


class TokenDecoder(Protocol):
    """One generation of tokens with a cache, code after code: what vgm_cli/ar samples from."""

    def first(self) -> Tensor:
        """Logits (B, V) of the first code."""
        ...

    def step(self, ids: Tensor) -> Tensor:
        """ids: (B,) the latest codes -> logits (B, V) of the next."""
        ...


@runtime_checkable
class RestorationMethod(Protocol):
    """A sampler that `vgm restore` offers (its component's verbs name "restore"): it starts from a measurement."""

    def accepts(self, model: Any, codec: Any) -> str | None:
        """None where it can restore with this model; else a sentence that says why not, for the user. model: what
        samplers see of the network. codec: of a model of latents, else None."""
        ...

    def __call__(self, model: Any, request: Request) -> Tensor:
        """request.measurement: what is known of the images; request.operator: how it was made of them."""
        ...


@runtime_checkable
class CompletesImages(Protocol):
    """A restoration method that keeps of request.images what request.mask says and makes the rest anew; it does not
    look at the measurement, so that only tasks that hide pixels are for it. completes: true."""

    completes: bool


@runtime_checkable
class FollowsPictures(Protocol):
    """A blind restoration method: its network follows the degraded picture, a condition on pictures, and is not told
    how it came about, so that pictures may have any size.

    blind: true. added: what is put behind every text; negative: the text that guidance leads away from where the user
    gives none. tile: of how many pixels, or None.
    """

    blind: bool
    added: str
    negative: str
    tile: int | None

    def grain(self, model: Any, codec: Any) -> int:
        """The number of pixels that a side has to be a multiple of."""
        ...

    def sizes(self, size: Sequence[int], side: int, least: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """For a picture of size (h, w): the size at which it is restored, and the size of the result. side: of the
        images that the network was trained on; least: see grain."""
        ...


@runtime_checkable
class FinishesImages(Protocol):
    """A sampler that has the last word on decoded images."""

    def finish(self, images: Tensor, request: Request) -> Tensor:
        """images: (N, C, H, W) of what it returned for this request."""
        ...


@runtime_checkable
class HasTiles(Protocol):
    """A codec that can encode and decode in tiles. tile: of so many pixels; None: the whole at once. factor: side of an
    image over side of its latents."""

    tile: int | None
    factor: int


@runtime_checkable
class HasFeatures(Protocol):
    """A network that shows what its layers compute: to a discriminator's head, to a loss on features.

    middle: the name of the layer half way, for whoever has no other choice.
    """

    middle: str

    def features(self, x: Tensor, t: Tensor, layers: Sequence[str], **cond: Any) -> list[Tensor]:
        """Outputs of the named layers, in the order of the names: maps (B, C, h, w) or tokens (B, T, D).

        Arguments are those of forward. Differentiable; what comes after the last of the layers is not run. VgmError:
        no such layer.
        """
        ...


@runtime_checkable
class HasExample(Protocol):
    """A network or codec that says what it takes: what a proof of a conversion or a check of shapes feeds it.

    A network without it is taken for `forward(x, t, y)` of images, times and labels. vgm_cli.nn.example helps to write
    it.
    """

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Keywords of forward (of a codec: `x`, the images of encode) for the network that `config` builds: one row or
        two, as small as the network allows, the same at every call. config: every keyword of the constructor, defaults
        included."""
        ...


class MetricBase:
    """What a metric says of itself, with the defaults for one that does not say. Whoever builds a metric adds what it
    lacks (`api.complete`), so that the engine reads these and never asks whether they are there."""

    needs_samples: frozenset[str] = frozenset()  # of metrics.base.NEEDS, measured of the samples
    needs_reference: frozenset[str] = frozenset()  # the same of the reference
    network: str | None = None  # kind of feature network that it requires: mnist, inception, …; None: any
    pairs: bool = False  # the k-th sample belongs to the k-th image of the reference
    uses_seed: bool = False  # it draws
    uses_held_out: bool = False  # called with held_out=Measured where such images are given
    needs_model: bool = False  # it looks at the model (ModelMetric) in place of two sets of images (Metric)
    needs_data: bool = True  # of a ModelMetric: it looks at images of the data, too
    n: int | None = None  # of a ModelMetric: its own number of images
    gives: tuple[str, ...] = ()  # names of its numbers; none: the metric's own

    def check(self, n: int | None, n_reference: int | None, shape: tuple[int, int, int]) -> None:
        """VgmError: it cannot be computed of n samples and n_reference images (None: not known) of (H, W, C)."""
