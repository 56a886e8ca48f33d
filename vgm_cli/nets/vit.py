"""Vision transformers from local weights: DINO's and DINOv2's, CLIP's image tower, behind FD-DINOv2 and CMMD, and MAE's
encoder. One gives the features of the class token, those of every patch as a grid, or the tokens at several depths.

Papers: Oquab et al., DINOv2 (arXiv:2304.07193), facebookresearch/dinov2 (dinov2_vit{s,b,l,g}14_pretrain.pth); Radford
et al., CLIP (arXiv:2103.00020), openai/CLIP (ViT-*.pt). Read in the official layouts and in Hugging Face's
(model.safetensors of facebook/dinov2-* and openai/clip-vit-*). Sizes are read off the tensors; heads are 64 wide.
Position embeddings are interpolated as DINOv2's hub models do it (bicubic, scale (n + 0.1) / n0), as timm does it
(bicubic, antialiased), or bilinearly (StyleGAN-T); MAE's weights (He et al., arXiv:2111.06377) are timm's
vit_large_patch16_224.mae.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import MISSING_ASSET, VgmError
from vgm_cli.nn.meta import on_meta

ACCEPTED = (
    "DINOv2 (dinov2_vitl14_pretrain.pth, or facebook/dinov2-large's model.safetensors) or CLIP "
    "(ViT-L-14-336px.pt, or openai/clip-vit-large-patch14-336's model.safetensors)"
)
HEAD = 64
Interpolation = Literal["dinov2", "timm", "bilinear"]  # of position embeddings, see above
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel where `scaled`. hidden: width of fc1's output."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, scaled: bool, eps: float):
        super().__init__()
        self.heads, self.activation = heads, ACTIVATIONS[activation]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden // 2 if activation == "swiglu" else hidden, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if scaled else None
        self.scale2 = nn.Parameter(torch.ones(width)) if scaled else None

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D). causal: a token sees those before it alone."""
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = self.proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(b, n, d)
        )  # (B, N, D)
        x = x + (h if self.scale1 is None else h * self.scale1)
        h = self.fc2(self.activation(self.fc1(self.norm2(x))))  # (B, N, D)
        return x + (h if self.scale2 is None else h * self.scale2)


class VisionTransformer(nn.Module):
    """Vision transformer of CLIP, DINOv2 and MAE: images (B, 3, H, W) to the features of the class token."""

    def __init__(
        self,
        width: int,  # of the tokens
        depth: int,  # number of blocks
        heads: int,  # attention heads
        patch: int,  # side of a patch in pixels
        grid: int,  # patches per side of the stored position embedding
        hidden: int,  # width inside the MLPs
        activation: str = "gelu",  # nonlinearity of the MLPs
        scaled: bool = True,  # branches have learned scales (DINOv2's layer scale)
        norm_pre: bool = False,  # normalise tokens before the first block (CLIP)
        patch_bias: bool = True,  # the patch convolution has a bias
        head: int = 0,  # width of the projection after the class token (CLIP); 0: none
        eps: float = 1e-6,  # added to the variance in normalisations
    ):
        super().__init__()
        self.grid, self.side = grid, patch
        self.patch = nn.Conv2d(3, width, patch, patch, bias=patch_bias)
        self.cls = nn.Parameter(torch.zeros(width))
        self.pos = nn.Parameter(torch.zeros(1 + grid * grid, width))
        self.norm_pre = nn.LayerNorm(width, eps=eps) if norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, hidden, activation, scaled, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, head, bias=False) if head else nn.Identity()
        self.dim = head or width

    def positions(self, grid: tuple[int, int], how: Interpolation = "dinov2") -> Tensor:
        """(1 + rows * columns, D) of a grid of patches. how: they are interpolated for another size."""
        if grid == (self.grid, self.grid):
            return self.pos
        old = self.pos[1:].view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
        if how == "bilinear":
            new = F.interpolate(old, size=grid, mode="bilinear")
        elif how == "timm":
            new = F.interpolate(old, size=grid, mode="bicubic", antialias=True)
        else:
            rows, columns = ((n + 0.1) / self.grid for n in grid)
            new = F.interpolate(old, scale_factor=(rows, columns), mode="bicubic")
        return torch.cat([self.pos[:1], new.flatten(2)[0].T])

    def embed(self, x: Tensor, how: Interpolation = "dinov2") -> Tensor:
        """x: (B, 3, H, W) -> tokens with their positions, before any layer: (B, 1 + N, D), the class token first."""
        x = self.patch(x)  # (B, D, h, w)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        return torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.positions(grid, how)

    def tokens(self, x: Tensor, how: Interpolation = "dinov2") -> Tensor:
        """x: (B, 3, H, W) -> (B, 1 + N, D), the class token first, before the last normalisation."""
        x = self.norm_pre(self.embed(x, how))
        for block in self.blocks:
            x = block(x)
        return x

    def levels(self, x: Tensor, blocks: Sequence[int], how: Interpolation = "bilinear") -> list[Tensor]:
        """x: (B, 3, H, W) -> tokens (B, 1 + N, D) behind each of the blocks, numbered from 0, in their order, and last
        those before the first block."""
        embedded = self.embed(x, how)
        x = self.norm_pre(embedded)
        found: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = block(x)
            if i in blocks:
                found[i] = x
        return [*(found[i] for i in blocks), embedded]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) normalised, both sides multiples of the patch -> (B, dim)."""
        return self.head(self.norm(self.tokens(x)[:, 0]))

    def grid_features(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) -> features of the patches in their places, (B, D, H / patch, W / patch), as timm's."""
        grid = [n // self.side for n in x.shape[2:]]
        x = self.norm(self.tokens(x, "timm")[:, 1:])  # (B, N, D)
        return x.transpose(1, 2).unflatten(2, grid)


# -- weights ---------------------------------------------------------------------------------------------------------

State = Mapping[str, Tensor]

DINO = [
    (r"cls_token", "cls"),
    (r"pos_embed", "pos"),
    (r"patch_embed\.proj\.(\w+)", r"patch.\1"),
    (r"blocks\.(?:\d+\.)?(\d+)\.(norm\d\.\w+)", r"blocks.\1.\2"),
    (r"blocks\.(?:\d+\.)?(\d+)\.attn\.(qkv|proj)\.(\w+)", r"blocks.\1.\2.\3"),
    (r"blocks\.(?:\d+\.)?(\d+)\.ls(\d)\.gamma", r"blocks.\1.scale\2"),
    (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.(fc\d)\.(\w+)", r"blocks.\1.\2.\3"),
    (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.(\w+)", r"blocks.\1.fc1.\2"),
    (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.(\w+)", r"blocks.\1.fc2.\2"),
    (r"norm\.(\w+)", r"norm.\1"),
]
DINO_HF = [
    (r"embeddings\.cls_token", "cls"),
    (r"embeddings\.position_embeddings", "pos"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch.\1"),
    (r"encoder\.layer\.(\d+)\.(norm\d\.\w+)", r"blocks.\1.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.qkv.\3/\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.scale\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.(fc\d)\.(\w+)", r"blocks.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(\w+)", r"blocks.\1.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(\w+)", r"blocks.\1.fc2.\2"),
    (r"layernorm\.(\w+)", r"norm.\1"),
]
CLIP = [
    (r"visual\.class_embedding", "cls"),
    (r"visual\.positional_embedding", "pos"),
    (r"visual\.conv1\.weight", "patch.weight"),
    (r"visual\.ln_pre\.(\w+)", r"norm_pre.\1"),
    (r"visual\.transformer\.resblocks\.(\d+)\.ln_(\d)\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", r"blocks.\1.qkv.\2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"blocks.\1.proj.\2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"blocks.\1.fc1.\2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"blocks.\1.fc2.\2"),
    (r"visual\.ln_post\.(\w+)", r"norm.\1"),
    (r"visual\.proj", "head.weight/transposed"),
]
CLIP_HF = [
    (r"vision_model\.embeddings\.class_embedding", "cls"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "pos"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "patch.weight"),
    (r"vision_model\.pre_layrnorm\.(\w+)", r"norm_pre.\1"),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", r"blocks.\1.qkv.\3/\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"blocks.\1.proj.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(fc\d)\.(\w+)", r"blocks.\1.\2.\3"),
    (r"vision_model\.post_layernorm\.(\w+)", r"norm.\1"),
    (r"visual_projection\.weight", "head.weight"),
]
# signature key -> (kind, table, prefix of keys that are another network's or unused)
LAYOUTS = {
    "patch_embed.proj.weight": ("dinov2", DINO, r"mask_token"),
    "embeddings.patch_embeddings.projection.weight": ("dinov2", DINO_HF, r"embeddings\.mask_token"),
    "visual.conv1.weight": (
        "clip",
        CLIP,
        r"(?!visual\.)",
    ),
    "vision_model.embeddings.patch_embedding.weight": (
        "clip",
        CLIP_HF,
        r"text_model\.|text_projection|logit_scale|.*position_ids",
    ),
}


def kind_of(state: State) -> str | None:
    """ "dinov2", "clip", or None when the tensors are of neither."""
    return next((kind for key, (kind, *_) in LAYOUTS.items() if key in state), None)


def to_ours(state: State, where: str = "the file") -> dict[str, Tensor]:
    """Any of the four layouts -> VisionTransformer's names, float32. VgmError: a tensor of no known role (code 4)."""
    layout = next((value for key, value in LAYOUTS.items() if key in state), None)
    if layout is None:
        raise VgmError(f"{where} holds no known vision transformer", f"accepted: {ACCEPTED}", MISSING_ASSET)
    _, table, foreign = layout
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        hit = next((re.sub(a, b, name) for a, b in table if re.fullmatch(a, name)), None)
        if hit is None:
            if re.match(foreign, name):
                continue
            raise VgmError(f"{where}: '{name}' has no place in DINOv2 or CLIP", f"accepted: {ACCEPTED}", MISSING_ASSET)
        target, _, how = hit.partition("/")
        value = tensor.float()
        if how == "transposed":
            ours[target] = value.T.contiguous()
        elif how:
            parts.setdefault(target, {})[how[0]] = value
        else:
            ours[target] = (
                value.flatten() if target == "cls" else value[0] if target == "pos" and value.ndim == 3 else value
            )
    return ours | {k: torch.cat([v["q"], v["k"], v["v"]]) for k, v in parts.items()}


def build(state: State, where: str = "the file", heads: int | None = None) -> VisionTransformer:
    """A network with these weights, in eval mode. heads: None takes heads of 64 channels, as all published ones have.
    VgmError (exit code 4): not of this kind, or incomplete."""
    kind, ours = kind_of(state), to_ours(state, where)
    try:
        width, _, patch, _ = ours["patch.weight"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in ours if k.startswith("blocks."))
        hidden = ours["blocks.0.fc1.weight"].shape[0]
        head = ours["head.weight"].shape[0] if "head.weight" in ours else 0
        grid = round((len(ours["pos"]) - 1) ** 0.5)
        swiglu = ours["blocks.0.fc2.weight"].shape[1] * 2 == hidden
    except (KeyError, ValueError) as e:
        raise VgmError(
            f"{where} is an incomplete vision transformer: {e}", f"accepted: {ACCEPTED}", MISSING_ASSET
        ) from e
    activation = "swiglu" if swiglu else "gelu" if kind == "dinov2" else "quick-gelu"
    with on_meta():
        net = VisionTransformer(
            width,
            depth,
            heads or max(width // HEAD, 1),
            patch,
            grid,
            hidden,
            activation,
            scaled="blocks.0.scale1" in ours,
            norm_pre=kind == "clip",
            patch_bias="patch.bias" in ours,
            head=head,
            eps=1e-6 if kind == "dinov2" else 1e-5,
        )
    want = {k: v.shape for k, v in net.state_dict().items()}
    wrong = sorted(set(want) ^ set(ours)) or [k for k in want if want[k] != ours[k].shape]
    if wrong:
        raise VgmError(f"{where} is not a whole {kind} network: '{wrong[0]}'", f"accepted: {ACCEPTED}", MISSING_ASSET)
    net.load_state_dict(ours, assign=True)
    return net.eval().requires_grad_(False)
