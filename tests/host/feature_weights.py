"""Weights drawn by name, the same wherever they are drawn: what an official network computed with them once is kept in
oracles/feature-networks.safetensors, and ours must compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vgm_cli.api import seed_of


def seeded_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict: matrices scaled by their fan-in, norms about 1, biases about 0, variances in [0.5, 1.5)."""
    state = {}
    for name, shape in shapes.items():
        g = torch.Generator().manual_seed(seed_of("feature weights", name))
        last = name.rsplit(".", 1)[-1]
        if last in ("num_batches_tracked", "position_ids"):
            state[name] = torch.zeros(tuple(shape), dtype=torch.long)
        elif last == "running_var":
            state[name] = torch.rand(tuple(shape), generator=g) + 0.5
        elif len(shape) >= 2 and last in ("weight", "in_proj_weight"):
            state[name] = torch.randn(tuple(shape), generator=g) * (2 / prod(shape[1:])) ** 0.5
        elif last in ("weight", "gamma", "lambda1"):
            state[name] = 1 + 0.1 * torch.randn(tuple(shape), generator=g)
        else:
            state[name] = 0.1 * torch.randn(tuple(shape), generator=g)
    return state


def clip_weights(folder: Path) -> tuple[Path, Path]:
    """A small CLIP of both towers in transformers' names, with drawn weights, and its tokenizer."""
    from safetensors.torch import save_file

    from vgm_cli.nets.clip_text import CLIPText
    from vgm_cli.nets.clip_text_checkpoints import transformers_from_ours
    from vgm_cli.nets.tokenizers import clip_vocabulary

    merges = [("r", "e"), ("re", "d</w>")]
    (folder / "bpe.txt").write_text("#version\n" + "\n".join(map(" ".join, merges)))
    torch.manual_seed(0)
    text = CLIPText(64, 1, 1, len(clip_vocabulary(merges)), 77, head=48)
    width, block = 64, "vision_model.encoder.layers.0"
    shapes: dict[str, Sequence[int]] = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.position_embedding.weight": (5, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 8, 8),
        "visual_projection.weight": (48, width),
    }
    layers = {f"{block}.self_attn.{k}": (width, width) for k in ("q_proj", "k_proj", "v_proj", "out_proj")}
    layers |= {f"{block}.mlp.fc1": (2 * width, width), f"{block}.mlp.fc2": (width, 2 * width)}
    norms = ("vision_model.pre_layrnorm", "vision_model.post_layernorm", f"{block}.layer_norm1", f"{block}.layer_norm2")
    layers |= dict.fromkeys(norms, (width,))
    shapes |= {f"{k}.weight": v for k, v in layers.items()} | {f"{k}.bias": v[:1] for k, v in layers.items()}
    both = {**transformers_from_ours(text.state_dict()), **seeded_state(shapes), "logit_scale": torch.tensor(4.6)}
    save_file(both, folder / "clip.safetensors")
    return folder / "clip.safetensors", folder / "bpe.txt"


def lpips_weights(folder: Path) -> tuple[Path, Path]:
    """VGG16 and the heads of LPIPS with drawn weights, in torchvision's and lpips' layouts."""
    from vgm_cli.nets.vgg import WIDTHS, VGG16Features

    with torch.device("meta"):
        layout = {k: v.shape for k, v in VGG16Features().state_dict().items()}
    torch.save(seeded_state(layout), folder / "vgg.pth")
    heads = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(WIDTHS)}
    torch.save({k: v.abs() for k, v in seeded_state(heads).items()}, folder / "heads.pth")
    return folder / "vgg.pth", folder / "heads.pth"
