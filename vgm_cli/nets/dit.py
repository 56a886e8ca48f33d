"""DiT: a plain transformer on latent patches, conditioned by adaLN-Zero. Peebles & Xie 2022 (arXiv 2212.09748).

Same function and parameter names as facebookresearch/DiT@ed81ce2 models.py. Deviations: fused attention; labels are
dropped by the host, never by a draw inside forward; y may be None (unconditional); guidance is the host's, so
there is no forward_with_cfg. `SiT` below is the same network with the variance half of its output thrown away. With
second_time it is told a second number beside t, as networks that jump from one time to another are (MeanFlow,
2505.13447). swiglu, rope, rmsnorm, qknorm and wo_shift are LightningDiT's (2501.01423; hustvl/LightningDiT@2725fed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.embed import apply_rope, rope_angles_2d
from vgm_cli.nn.example import images
from vgm_cli.nn.features import places
from vgm_cli.nn.norm import RMSNorm
from vgm_cli.nn.sdpa import sdpa
from vgm_cli.ranges import Depth, Fraction, Positive, Side, Whole, Width


def sincos_1d(dim: int, positions: np.ndarray) -> np.ndarray:
    """(T,) positions -> (T, dim) float64: all sines, then all cosines, of 10000^(-k / (dim/2)) positions."""
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(positions.astype(np.float64), omega)  # (T, dim/2)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(dim: int, height: int, width: int) -> np.ndarray:
    """Position table (height * width, dim) float64, rows in raster order; the first half encodes the COLUMN index."""
    rows, columns = np.mgrid[:height, :width]
    return np.concatenate([sincos_1d(dim // 2, columns.ravel()), sincos_1d(dim // 2, rows.ravel())], axis=1)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor, weight: Tensor | None = None) -> Tensor:
    """x weight (1 + scale) + shift. x: (N, T, D); shift, scale: (N, D), no shift is 0; weight: (D,), None is 1."""
    gain = 1 + scale if weight is None else (1 + scale) * weight
    x = x * gain[:, None]
    return x if shift is None else x + shift[:, None]


def modulated(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """modulate(norm(x), shift, scale); RMSNorm's weights multiply the scale, which has fewer numbers than x."""
    if isinstance(norm, RMSNorm):
        return modulate(norm.unit(x), shift, scale, norm.weight)
    return modulate(norm(x), shift, scale)


def token_norm(width: int, rmsnorm: bool) -> nn.Module:
    """The normalisation of tokens (N, T, width): without weights, or by RMS with a learned weight."""
    return RMSNorm(width, eps=1e-6) if rmsnorm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D), tokens in raster order."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """(N,) timesteps, fractional ones too -> (N, D)."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_embedding_size // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / half)  # (N, half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # cosines first
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]


class LabelEmbedder(nn.Module):
    """(N,) labels -> (N, D). Row num_classes of the table, where there is one, is the null class."""

    def __init__(self, num_classes: int, hidden_size: int, has_null: bool):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + has_null, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Rotations(nn.Module):
    """Rotary positions of a square grid of tokens: half of a head's channels turns with the row, half with the column.
    Official checkpoints hold the buffers freqs_cos and freqs_sin (T, head_dim), each value twice."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, grid: int, head_dim: int):
        super().__init__()
        angles = rope_angles_2d(grid, grid, head_dim).repeat_interleave(2, dim=-1)  # (T, head_dim)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self) -> Tensor:
        """What apply_rope takes: (T, head_dim / 2, 2)."""
        return torch.stack([self.freqs_cos[:, ::2], self.freqs_sin[:, ::2]], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection, rows ordered (q, k, v), heads within.

    qknorm: queries and keys are normalised per head, by RMS or (rmsnorm=False) by a LayerNorm with weights.
    """

    def __init__(self, dim: int, num_heads: int, qknorm: bool = False, rmsnorm: bool = False):
        super().__init__()
        self.num_heads, self.qknorm = num_heads, qknorm
        self.qkv = nn.Linear(dim, 3 * dim)
        if qknorm:
            head = dim // num_heads
            self.q_norm, self.k_norm = (RMSNorm(head, 1e-6) if rmsnorm else nn.LayerNorm(head) for _ in "qk")
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.num_heads, -1).unbind(2)  # 3 x (N, T, heads, D/heads)
        if self.qknorm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        x = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """silu(a) b of two linear maps of x, projected back. Shazeer 2020 (2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


def swiglu_width(dim: int, mlp_ratio: float) -> int:
    """Hidden width of a SwiGLU that has about the weights of an MLP with mlp_ratio: two thirds of its width."""
    return int(2 / 3 * int(dim * mlp_ratio))


class DiTBlock(nn.Module):
    """Attention and MLP, each with its shift, scale and gate from the condition; gates start at zero."""

    def __init__(
        self,
        hidden_size: int,  # width D
        num_heads: int,  # attention heads
        mlp_ratio: float,  # hidden width of the MLP over D
        swiglu: bool = False,  # a gated MLP
        rmsnorm: bool = False,  # norms without mean
        qknorm: bool = False,  # queries and keys are normed
        wo_shift: bool = False,  # the condition scales and gates, and does not shift
    ):
        super().__init__()
        self.norm1, self.norm2 = token_norm(hidden_size, rmsnorm), token_norm(hidden_size, rmsnorm)
        self.attn = Attention(hidden_size, num_heads, qknorm, rmsnorm)
        width = swiglu_width(hidden_size, mlp_ratio) if swiglu else int(hidden_size * mlp_ratio)
        self.mlp = SwiGLU(hidden_size, width) if swiglu else Mlp(hidden_size, width)
        self.parts = 4 if wo_shift else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.parts * hidden_size))

    def modulations(self, c: Tensor) -> Sequence[Any]:
        found = self.adaLN_modulation(c).chunk(self.parts, dim=1)
        return found if self.parts == 6 else (None, *found[:2], None, *found[2:])

    def forward(self, x: Tensor, c: Tensor, rope: Tensor | None = None) -> Tensor:
        """x: (N, T, D); c: (N, D); rope: what Rotations gives."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulations(c)  # 6 x (N, D)
        x = x + gate_a[:, None] * self.attn(modulated(self.norm1, x, shift_a, scale_a), rope)
        return x + gate_m[:, None] * self.mlp(modulated(self.norm2, x, shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, rmsnorm: bool = False):
        super().__init__()
        self.norm_final = token_norm(hidden_size, rmsnorm)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final, x, shift, scale))


class DiT(nn.Module):
    """Diffusion transformer: forward(x, t, y) -> eps, and with learn_sigma the variance channels after it.

    Without labels (num_classes=0, or y=None) the null class conditions every image. checkpointing=True recomputes the
    blocks in backward.
    """

    repeated = ("blocks",)

    def __init__(
        self,
        input_size: Side = 32,  # side of x (latents: image size / 8)
        patch_size: Width = 2,  # side of a token's patch
        in_channels: Width = 4,  # channels of x
        hidden_size: Width = 1152,  # width D
        depth: Depth = 28,  # number of blocks
        num_heads: Depth = 16,  # attention heads; D must divide by it
        mlp_ratio: Positive = 4.0,  # hidden width of the MLP over D
        class_dropout_prob: Fraction = 0.1,  # > 0: the label table has a null class
        num_classes: Whole = 1000,  # 0 is unconditional
        learn_sigma: bool = True,  # twice the output channels: the second half is the variance
        context_dim: Width | None = None,  # width of a text's vectors, whose sum conditions like a class; None: none
        second_time: bool = False,  # forward is told a second time, s, which has an embedder of its own
        swiglu: bool = False,  # the MLP is a SwiGLU of two thirds of its width
        rope: bool = False,  # rotary positions, besides the added ones
        rmsnorm: bool = False,  # RMSNorm with weights in place of every LayerNorm
        qknorm: bool = False,  # queries and keys are normalised per head: calmer in half precision, a little worse
        wo_shift: bool = False,  # blocks are scaled and gated by the condition, not shifted
    ):
        super().__init__()
        if input_size % patch_size:
            raise VgmError(f"patch_size={patch_size} does not divide the side {input_size}", code=USAGE)
        if hidden_size % num_heads or hidden_size % 4:
            raise VgmError(f"hidden_size={hidden_size} must divide by num_heads={num_heads} and by 4", code=USAGE)
        if rope and hidden_size // num_heads % 4:
            raise VgmError(f"rope needs heads whose width divides by 4, not {hidden_size // num_heads}", code=USAGE)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.class_dropout_prob, self.learn_sigma = num_classes, class_dropout_prob, learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.second_time = second_time
        self.sample_shape = (in_channels, input_size, input_size)
        self.checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if second_time:
            self.r_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, has_null=class_dropout_prob > 0)
        self.context_embedder = None if context_dim is None else nn.Linear(context_dim, hidden_size)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, hidden_size), requires_grad=False)
        self.feat_rope = Rotations(grid, hidden_size // num_heads) if rope else None
        options = (swiglu, rmsnorm, qknorm, wo_shift)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, *options) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, rmsnorm)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier linears, sin-cos positions, small embeddings; modulation and output at zero: the model gives 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        grid = self.input_size // self.patch_size
        self.pos_embed[0].copy_(torch.from_numpy(sincos_2d(self.pos_embed.shape[-1], grid, grid)))
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.flatten(1))  # as the linear layer on patches that it is
        nn.init.zeros_(patches.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.r_embedder) if self.second_time else (self.t_embedder,):
            for layer in (embedder.mlp[0], embedder.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)  # type: ignore[union-attr, index]
        nn.init.zeros_(self.final_layer.linear.weight)

    def null_labels(self, like: Tensor) -> Tensor:
        """(N,) labels of the null class for x. VgmError: this network has none."""
        if not self.class_dropout_prob:
            raise VgmError(
                "this network was built without a null class, it cannot be unconditional",
                "class_dropout_prob above 0 adds one",
                USAGE,
            )
        return torch.full((len(like),), self.num_classes, device=like.device)

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The unconditional version of cond, for classifier-free guidance."""
        return {**cond, "y": self.null_labels(cond["y"])} if cond.get("y") is not None else dict(cond)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, p * p * C), channels fastest -> (N, C, H, W)."""
        p, grid = self.patch_size, self.input_size // self.patch_size
        x = x.view(len(x), grid, grid, p, p, -1)  # (N, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, self.input_size, self.input_size)

    def embed(
        self, x: Tensor, t: Tensor, y: Tensor | None, context: Tensor | None = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What forward is given -> tokens (N, T, D) and their condition (N, D)."""
        if x.shape[1:] != self.sample_shape:
            raise VgmError(f"the network is built for {self.sample_shape}, got {tuple(x.shape[1:])}", code=USAGE)
        if y is None:
            y = self.null_labels(x)
        c = self.t_embedder(t) + self.y_embedder(y)
        if self.second_time:
            c = c + self.r_embedder(torch.zeros_like(t) if s is None else s)
        elif s is not None:
            raise VgmError("the network is told one time, not two", "model.second_time=true", USAGE)
        if self.context_embedder is not None and context is not None:
            c = c + self.context_embedder(context.sum(1))
        return self.x_embedder(x) + self.pos_embed, c

    def run(self, block: nn.Module, x: Tensor, c: Tensor, rope: Tensor | None) -> Tensor:
        """block(x, c, rope), recomputed in backward when `checkpointing` is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, c, rope, use_reentrant=False)
        return block(x, c, rope)

    @property
    def middle(self) -> str:
        return f"blocks.{len(self.blocks) // 2}"

    def features(
        self,
        x: Tensor,
        t: Tensor,
        layers: Sequence[str],
        y: Tensor | None = None,
        context: Tensor | None = None,
        s: Tensor | None = None,
    ) -> list[Tensor]:
        """Tokens (N, T, D) behind the blocks that are named "blocks.3"; see api.HasFeatures."""
        at = places(layers, [f"blocks.{i}" for i in range(len(self.blocks))])
        x, c = self.embed(x, t, y, context, s)
        rope, found = self.feat_rope() if self.feat_rope else None, []
        for block in self.blocks[: max(at, default=-1) + 1]:
            x = self.run(block, x, c, rope)
            found.append(x)
        return [found[i] for i in at]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        given = images(config["in_channels"], config["input_size"], config["num_classes"])
        return given | ({"s": torch.tensor([0.25])} if config.get("second_time") else {})

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        """x: (N, C, H, W); t: (N,) timesteps in [0, 1000); y: (N,) int64 labels; context: (N, L, context_dim) a
        text; s: (N,) the second time of a network that has one, None for 0. Gives (N, C or 2C, H, W). VgmError: x has
        another size than the positions."""
        x, c = self.embed(x, t, y, context, s)
        rope = self.feat_rope() if self.feat_rope else None
        for block in self.blocks:
            x = self.run(block, x, c, rope)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c))  # (N, C or 2C, H, W)


class SiT(DiT):
    """DiT as Scalable Interpolant Transformers use it (willisma/SiT@947f95b): t in [0, 1] fed as it is, and only the
    first half of the output channels returned; learn_sigma stays true so that published weights fit."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        return super().forward(x, t, y, context, s)[:, : self.in_channels]
