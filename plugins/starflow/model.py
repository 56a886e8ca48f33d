"""TARFlow and STARFlow: stacks of autoregressive flow blocks with exact likelihood.

Zhai et al. 2024 (arXiv 2412.06329), in pixels; Gu et al. 2025 (arXiv 2506.06276), in latents. Official code:
apple/ml-tarflow@313120e and apple/ml-starflow@e565a46 transformer_flow.py; parameter names are the official ones.
A network of either kind models data to which noise of deviation `noise_std` was added; who samples takes it off again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.collectives import average
from vgm_cli.nn.example import label, noise
from vgm_cli.nn.precision import full_precision
from vgm_cli.ranges import Blocks, Depth, NonNegative, Positive, Side, Whole, Width

from .block import FlowBlock, Identity, Start
from .layers import Norm, Shape, Transformer
from .rope import angles, positions

LEVELS = 128.0  # of half the range of dequantised pixels: x = (level + u) / 128 - 1


class Encoding(NamedTuple):
    """What a flow makes of images.

    z: the latents (B, C, H, W). outputs: the tokens (B, T, D) of the images, then those after every block, the last
    being z's. logdets: of every block, log |derivative| of every number in the block's own order, (B, T, D).
    """

    z: Tensor
    outputs: list[Tensor]
    logdets: list[Tensor]

    def log_prob(self, variance: Tensor | float = 1.0) -> Tensor:
        """Log-density of the images in nats, (B,). variance: of the prior, (T, D) or a number."""
        variance = torch.as_tensor(variance, device=self.z.device)
        prior = -0.5 * (self.outputs[-1].square() / variance + variance.log() + math.log(2 * math.pi))
        return torch.stack([prior, *self.logdets]).sum((0, 2, 3))


class Flow(nn.Module, ABC):
    """What both families share: patches, blocks, likelihood. Subclasses say what a pass begins with (`starts`)."""

    blocks: nn.ModuleList
    repeated = ("blocks",)
    latent_likelihood = True  # see vgm_cli/metrics/likelihood.py
    num_classes: int
    noise_std: float
    patch_size: int
    in_channels: int
    rule: Literal["ratio", "linear"]  # how the family guides
    cond_top_only = False  # whether only the top block reads the condition
    has_denoiser = False

    def steps(self) -> list[FlowBlock | Identity]:
        """The blocks from data to noise; the last is the top one."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def top(self) -> FlowBlock:
        """The block next to the noise, which is never an Identity."""
        return self.blocks[-1]  # type: ignore[return-value]

    @property
    def checkpointing(self) -> bool:
        return any(b.checkpointing for b in self.steps())

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Transformer):
                module.checkpointing = on

    # -- for subclasses

    @abstractmethod
    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> tokens (B, T, D)."""
        ...

    @abstractmethod
    def unpatchify(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        """Tokens (B, T, D) -> (B, C, H, W), of which shape ends in H, W."""
        ...

    @abstractmethod
    def starts(self, shape: Sequence[int], n: int, cond: Mapping[str, Tensor]) -> list[Start]:
        """What a pass of n rows of (C, H, W) begins with in every block. cond: keywords of forward."""
        ...

    def variance(self) -> Tensor | float:
        """Of the prior, (T, D) or a number."""
        return 1.0

    def attention_temperature(self, value: float, n: int, guided: bool) -> float | Tensor:
        """What divides attention's logits while n rows (guided: and n worse ones) are sampled at this temperature."""
        return value

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tokens of (C, H, W). VgmError: sides that the patches do not divide."""
        p, (height, width) = self.patch_size, shape[-2:]
        if height % p or width % p:
            raise VgmError(f"{height}x{width} does not divide into patches of {p}", code=USAGE)
        return height // p, width // p

    # -- the flow

    def encode(self, x: Tensor, cond: Mapping[str, Tensor]) -> Encoding:
        """x (B, C, H, W), noisy or dequantised -> its latents, and how volumes change on the way."""
        tokens = self.patchify(x.float())
        outputs, logdets = [tokens], []
        for block, start in zip(self.steps(), self.starts(x.shape[1:], len(x), cond)):
            tokens, logdet = block(tokens, start)
            outputs.append(tokens)
            logdets.append(logdet)
        return Encoding(self.unpatchify(tokens, x.shape), outputs, logdets)

    def log_prob(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Exact log-density in nats, (B,), of x (B, C, H, W) as the network sees it."""
        return self.encode(x, cond).log_prob(self.variance())

    def denoised(self, x: Tensor, cond: Mapping[str, Tensor], sigma: float) -> Tensor:
        """x + sigma^2 d log p(x) / dx: the mean of what was there before noise of deviation sigma (Tweedie)."""
        with torch.enable_grad(), full_precision(x.device):
            x = x.detach().float().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, cond).sum(), x)
        return (x + sigma**2 * score).detach()

    def log_likelihood(
        self,
        x: Tensor,
        generators: list[torch.Generator],
        y: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, str]:
        """Log-likelihood of 8-bit images or of latents: (nats (B,), the method in words), see
        vgm_cli/metrics/likelihood.py. One draw of uniform dequantisation makes that of images a lower bound in
        expectation. Without labels the null class is asked."""
        cond = {k: v for k, v in (("y", y), ("context", context)) if v is not None}
        given = {"y": ", given the class", "context": ", given the text"}
        kind = "exact" + "".join(given[k] for k in cond)
        if x.dtype != torch.uint8:
            return self.log_prob(x, cond), kind
        u = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]).to(x.device)
        nats = self.log_prob(dequantised(x, u), cond) - x[0].numel() * math.log(LEVELS)
        return nats, f"{kind}, uniform dequantisation"


def dequantised(levels: Tensor, u: Tensor) -> Tensor:
    """Levels 0 to 255 and u in [0, 1) of the same shape -> (level + u) / 128 - 1, in [-1, 1)."""
    return (levels.float() + u) / LEVELS - 1


class Denoiser(Transformer):
    """Predicts the gradient of the negative log-likelihood, times noise_std, of a noisy grid of tokens: a transformer
    that sees all tokens at once (STARFlow-V's learned denoiser)."""

    def __init__(self, in_channels: int, shape: Shape, txt_dim: int):
        super().__init__(shape, causal=False)
        self.proj_in = nn.Linear(in_channels, shape.channels)
        self.proj_out = nn.Linear(shape.channels, in_channels)
        nn.init.zeros_(self.proj_out.weight)
        self.proj_txt = nn.Linear(txt_dim, shape.channels) if txt_dim else None

    def forward(self, x: Tensor, start: Start) -> Tensor:
        """Tokens (B, T, D) -> (B, T, D)."""
        h = self.proj_in(x)
        if self.proj_txt is not None and start.condition is not None:
            h = torch.cat([self.proj_txt(start.condition).type_as(h), h], dim=1)
        return self.proj_out(self.run(h, start.table)[:, -x.shape[1] :])


class STARFlow(Flow):
    """A deep flow block next to the prior, which reads the condition, and shallow ones towards the data.

    x may have any sides: positions are relative to the grid. y (B,): classes; context (B, L, txt_dim): the features of
    a text. VgmError: sizes that do not fit, a text model without its text.
    """

    rule = "ratio"

    def __init__(
        self,
        in_channels: Width = 4,  # channels of x
        img_size: Side = 32,  # side of x that the network is made for
        patch_size: Width = 1,  # side of a token
        channels: Width = 2048,  # width
        layers_per_block: tuple[Blocks, ...] = (2, 2, 2, 2, 2, 18),  # of each flow block, the top last; 0: none
        head_dim: Width = 64,  # channels of a head
        num_heads: Depth | None = None,  # None: channels / head_dim
        num_kv_heads: Depth | None = None,  # heads of keys and values; None: num_heads
        top_block_channels: Width | None = None,  # width of the top block; None: channels
        expansion: Positive = 4.0,  # width of the MLPs over channels
        num_classes: Whole = 0,  # a class is one more token; the class behind the last is no class. 0: none
        txt_size: Whole = 0,  # tokens of a text; 0: classes or nothing
        txt_dim: Whole = 0,  # numbers of a text's token
        cond_top_only: bool = True,  # the condition goes to the top block alone
        seq_order: Literal["L2R", "R2L"] = "L2R",  # L2R: the first block reads backwards, R2L: forwards, then in turn
        sos: bool = True,  # a start token; false: the first token of a block passes as it is
        use_softplus: bool = True,  # scales by softplus; false: by exp
        soft_clip: NonNegative = 4.0,  # bound of log-scales and means; 0: none
        use_final_norm: bool = True,  # a norm behind the last attention block
        norm_type: Norm = "layer_norm",  # before attention and MLP
        use_bias: bool = True,  # in attention and MLP
        use_swiglu: bool = False,  # gated MLPs
        use_qk_norm: bool = False,  # queries and keys of unit mean square
        use_post_norm: bool = False,  # a norm after attention and MLP, too
        hf_style_rope: bool = False,  # rotate channel i with i + head_dim / 2; false: neighbours
        pt_seq_len: Whole | None = None,  # positions that the grid spans; None: img_size / patch_size
        denoiser_layers: Blocks = 0,  # of the learned denoiser; 0: there is none (STARFlow-V has 8)
        conditional_denoiser: bool = True,  # the learned denoiser reads the condition
        noise_std: NonNegative = 0.3,  # deviation of the noise in the data that the network models
    ):
        super().__init__()
        if txt_size and not txt_dim:
            raise VgmError("a text model needs the width of its text features", "model.txt_dim=2048", USAGE)
        self.in_channels, self.patch_size, self.noise_std = in_channels, patch_size, noise_std
        self.num_classes = 0 if txt_size else num_classes
        self.txt_size, self.txt_dim, self.cond_top_only = txt_size, txt_dim, cond_top_only
        if self.num_classes:
            self.txt_size, self.txt_dim = 1, num_classes + 1
            self.null_condition = self._null_condition  # api.NullCondition: absent without classes
        self.side = pt_seq_len or img_size // patch_size
        numbers = in_channels * patch_size**2
        shape = Shape(
            channels, 1, head_dim, num_heads, num_kv_heads, expansion, norm_type, use_swiglu, use_bias, use_qk_norm,
            use_post_norm, use_final_norm, "halves" if hf_style_rope else "adjacent",
        )  # fmt: skip
        if head_dim % 2 or (self.txt_size and (head_dim // 2 < 10 or head_dim % 4)):
            raise VgmError(f"head_dim={head_dim} has no room for positions", "a multiple of 4 from 20 on", USAGE)
        last = len(layers_per_block) - 1
        blocks: list[nn.Module] = []
        if not (layers_per_block and layers_per_block[-1]):
            raise VgmError("the top block needs layers", "model.layers_per_block ends in at least 1", USAGE)
        for i, layers in enumerate(layers_per_block):
            if not layers:
                blocks.append(Identity())
                continue
            own = {"layers": layers}
            if i == last and top_block_channels:
                own |= {"channels": top_block_channels}
            blocks.append(
                FlowBlock(
                    numbers,
                    Shape(**{**vars(shape), **own}),
                    flip=i % 2 == (seq_order == "R2L"),
                    scale="softplus" if use_softplus else "exp",
                    soft_clip=soft_clip,
                    sos=sos,
                    txt_dim=self.txt_dim if i == last or not cond_top_only else 0,
                )
            )
        self.blocks = nn.ModuleList(blocks)
        if denoiser_layers:
            own = {"layers": denoiser_layers}
            self.learnable_self_denoiser = Denoiser(
                numbers, Shape(**{**vars(shape), **own}), self.txt_dim if conditional_denoiser else 0
            )
            self.has_denoiser = True
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Two patches a side; of a text model, a text of random features."""
        side = 2 * config["patch_size"]
        given = {"x": noise(1, config["in_channels"], side, side)}
        if config["txt_size"]:
            return {**given, "context": noise(1, config["txt_size"], config["txt_dim"])}
        return {**given, **label(config["num_classes"])}

    def patchify(self, x: Tensor) -> Tensor:
        p, (height, width) = self.patch_size, self.grid(x.shape)
        x = x.unflatten(3, (width, p)).unflatten(2, (height, p))  # (B, C, h, p, w, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # a token is (row, column, channel)

    def unpatchify(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        p, grid = self.patch_size, self.grid(shape)
        x = tokens.unflatten(1, grid).unflatten(3, (p, p, self.in_channels))  # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    # -- conditions

    def _null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if "y" in cond else dict(cond)

    def condition(self, n: int, cond: Mapping[str, Tensor]) -> Tensor | None:
        """The condition's tokens (n, L, txt_dim); a class is one token, all zero but for its own place."""
        if not self.txt_size:
            return None
        like = self.top.proj_in.weight
        if self.num_classes:
            y = cond.get("y")
            y = torch.full((n,), self.num_classes, device=like.device) if y is None else y
            return (y[:, None, None] == torch.arange(self.txt_dim, device=y.device)).to(like.dtype)
        if "context" not in cond:
            raise VgmError("this model draws what a text says", "--prompt TEXT, or --prompts FILE", USAGE)
        return cond["context"].to(like.dtype)

    def table(self, grid: tuple[int, int], text: int, head_dim: int) -> Tensor:
        """Rotations of a condition's tokens and a grid's, (text + tokens, head_dim / 2, 2)."""
        device = self.top.proj_in.weight.device
        key = (*grid, text, head_dim, device)
        if key not in self._tables:
            places = positions(*grid, text, self.side, axes=3 if self.txt_size else 2)
            turned = angles(places, head_dim)
            self._tables[key] = torch.stack([turned.cos(), turned.sin()], dim=-1).to(device)
        return self._tables[key]

    def starts(self, shape: Sequence[int], n: int, cond: Mapping[str, Tensor]) -> list[Start]:
        tokens = self.condition(n, cond)
        return [Start() if isinstance(b, Identity) else self.start(b, shape, tokens) for b in self.steps()]

    def start(self, block: FlowBlock | Denoiser, shape: Sequence[int], tokens: Tensor | None) -> Start:
        """What a pass through one block begins with."""
        own = None if block.proj_txt is None else tokens
        length = 0 if own is None else own.shape[1]
        return Start(own, self.table(self.grid(shape), length, block.shape.head_dim))

    # -- forward

    def forward(
        self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None, denoise: bool = False
    ) -> Encoding | Tensor:
        """x (B, C, H, W) -> its encoding. denoise: the learned denoiser's output instead, shaped like x."""
        cond = {k: v for k, v in (("y", y), ("context", context)) if v is not None}
        if not denoise:
            return self.encode(x, cond)
        if not self.has_denoiser:
            raise VgmError("this network has no learned denoiser", "model.denoiser_layers=8", USAGE)
        start = self.start(self.learnable_self_denoiser, x.shape[1:], self.condition(len(x), cond))
        return self.unpatchify(self.learnable_self_denoiser(self.patchify(x.float()), start), x.shape)


class TARFlow(Flow):
    """Equal flow blocks over patches of pixels, with learned positions. y (B,): classes, -1 is no class.

    VgmError: sizes that do not fit.
    """

    rule = "linear"
    var: Tensor

    def __init__(
        self,
        in_channels: Width = 3,  # channels of x
        img_size: Side = 64,  # side of x
        patch_size: Width = 2,  # side of a token
        channels: Width = 768,  # width, a multiple of head_dim
        num_blocks: Depth = 8,  # flow blocks
        layers_per_block: Depth = 8,  # attention blocks of each
        head_dim: Width = 64,  # channels of a head
        nvp: bool = True,  # false: scales are 1 and the prior's variance is learned (volume preserving)
        num_classes: Whole = 0,  # 0: unconditional
        noise_std: NonNegative = 0.05,  # deviation of the noise in the data that the network models
    ):
        super().__init__()
        self.in_channels, self.img_size, self.patch_size = in_channels, img_size, patch_size
        self.num_classes, self.nvp, self.noise_std = num_classes, nvp, noise_std
        tokens = math.prod(self.grid(self.sample_shape))
        shape = Shape(channels, layers_per_block, head_dim)
        numbers = in_channels * patch_size**2
        scale: Literal["exp", "none"] = "exp" if nvp else "none"
        self.blocks = nn.ModuleList(
            PlacedBlock(numbers, shape, i % 2 == 1, scale, tokens, num_classes) for i in range(num_blocks)
        )
        self.register_buffer("var", torch.ones(tokens, numbers))
        if num_classes:
            self.null_condition = self._null_condition  # api.NullCondition: absent without classes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.in_channels, self.img_size, self.img_size)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "x": noise(1, config["in_channels"], config["img_size"], config["img_size"]),
            **label(config["num_classes"]),
        }

    def patchify(self, x: Tensor) -> Tensor:
        """A token is (channel, row, column)."""
        p, (height, width) = self.patch_size, self.grid(x.shape)
        x = x.unflatten(3, (width, p)).unflatten(2, (height, p))  # (B, C, h, p, w, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        p, grid = self.patch_size, self.grid(shape)
        x = tokens.unflatten(1, grid).unflatten(3, (self.in_channels, p, p))  # (B, h, w, C, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def starts(self, shape: Sequence[int], n: int, cond: Mapping[str, Tensor]) -> list[Start]:
        if tuple(shape) != self.sample_shape:
            raise VgmError(f"this TARFlow was built for {self.sample_shape}, not {tuple(shape)}", code=USAGE)
        return [Start(y=cond.get("y"))] * len(self.blocks)

    def variance(self) -> Tensor | float:
        return 1.0 if self.nvp else self.var

    def attention_temperature(self, value: float, n: int, guided: bool) -> float | Tensor:
        """Of the worse rows alone: a blurred attention to be guided away from, for networks without classes."""
        if not guided or value == 1:
            return 1.0
        like = self.var
        return torch.cat([torch.ones(n).to(like), torch.full((n,), value).to(like)]).view(-1, 1, 1, 1)

    @torch.no_grad()
    def update_prior(self, z: Tensor) -> None:
        """Move the prior's variance a tenth towards that of latent tokens (B, T, D), of all processes."""
        self.var.lerp_(average(z.detach().float().square().mean(0)), 0.1)

    def _null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {**cond, "y": torch.full_like(cond["y"], -1)} if "y" in cond else dict(cond)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Encoding:
        """x (B, C, H, W) -> its encoding."""
        return self.encode(x, {} if y is None else {"y": y})


class PlacedBlock(FlowBlock):
    """A block of TARFlow: places and classes are learned vectors, added to every token; no class is their mean."""

    def __init__(
        self, in_channels: int, shape: Shape, flip: bool, scale: Literal["exp", "none"], tokens: int, num_classes: int
    ):
        super().__init__(in_channels, shape, flip, scale)
        self.pos_embed = nn.Parameter(torch.randn(tokens, shape.channels) * 1e-2)
        self.class_embed = nn.Parameter(torch.randn(num_classes, 1, shape.channels) * 1e-2) if num_classes else None

    def embed(self, inputs: Tensor, start: Start, at: int) -> Tensor:
        places = torch.arange(at, at + inputs.shape[1], device=inputs.device)
        h = self.proj_in(inputs) + self.pos_embed[len(self.pos_embed) - 1 - places if self.flip else places]
        if self.class_embed is None:
            return h
        mean = self.class_embed.mean(0, keepdim=True)
        table = torch.cat([self.class_embed, mean])  # -1 is the last row
        return h + (mean if start.y is None else table[start.y])
