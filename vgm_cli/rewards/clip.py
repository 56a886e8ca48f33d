"""Rewards by CLIP-like networks through transformers (the extra `hf`), from weights on disk; nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError, needs_extra
from vgm_cli.rewards.image import pictures

TOKENS = 77  # CLIP's context


class CLIPScore:
    """logit_scale * cosine(image, prompt) / divisor.

    path: a folder that `save_pretrained` wrote (config and weights of a CLIP model). processor: the folder of its
    tokenizer and image processor, None for the same. prompts: one per class, for models with classes instead of
    prompts. divisor: 30 as in flow_grpo. VgmError: the extra or the weights are missing, no prompt to compare with.
    """

    divisor = 30.0

    def __init__(self, path: str, processor: str | None = None, prompts: Sequence[str] | None = None):
        name = type(self).__name__
        if importlib.util.find_spec("transformers") is None:
            raise needs_extra(f"the reward {name}", "transformers", "hf")
        for folder in (path, processor or path):
            if (
                not (Path(folder) / "config.json").is_file()
                and not (Path(folder) / "preprocessor_config.json").is_file()
            ):
                hint = "download them once, then name the folder: path=FOLDER"
                raise VgmError(f"{name}: no weights in {folder}", hint, MISSING_ASSET)
        from transformers import AutoModel, AutoProcessor

        local = {"local_files_only": True, "trust_remote_code": False}
        self.processor = AutoProcessor.from_pretrained(processor or path, **local)
        self.model = AutoModel.from_pretrained(path, **local).eval().requires_grad_(False)
        self.prompts = None if prompts is None else list(prompts)

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def texts(self, batch: Mapping[str, Any]) -> list[str]:
        """One prompt per image."""
        if batch.get("text") is not None:
            return list(batch["text"])
        if self.prompts is None or batch.get("label") is None:
            raise VgmError(
                "a CLIP reward needs prompts", "prompts=[...], one per class, for class-conditional models", USAGE
            )
        if int(batch["label"].max()) >= len(self.prompts):
            raise VgmError(f"{len(self.prompts)} prompts for classes up to {int(batch['label'].max())}", code=USAGE)
        return [self.prompts[y] for y in batch["label"].tolist()]

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        device = next(self.model.parameters()).device
        views = self.processor(images=[p.convert("RGB") for p in pictures(images)], return_tensors="pt").to(device)
        texts = self.texts(batch)
        tokens = self.processor(text=texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt").to(
            device
        )
        image = unit(self.model.get_image_features(**views))
        text = unit(self.model.get_text_features(**tokens))
        return (self.model.logit_scale.exp() * (image * text).sum(1) / self.divisor).to(images.device)


class PickScore(CLIPScore):
    """PickScore_v1 (Kirstain et al. 2023, 2305.01569): the same score of a fine-tuned CLIP-H, over 26."""

    divisor = 26.0


def unit(features: Any) -> Tensor:
    """(B, D) of length 1; newer transformers wrap the features."""
    features = features if isinstance(features, Tensor) else features.pooler_output
    return features / features.norm(dim=-1, keepdim=True)
