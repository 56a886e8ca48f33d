"""The rewards the host brings. Torch-free."""

from __future__ import annotations

from vgm_cli.hookspecs import Component

REWARDS = {
    "weighted": ("combine:Weighted", "weighted sum of rewards; what --reward NAME=WEIGHT makes"),
    "function": ("combine:Function", "any module:function of (images, batch)"),
    "jpeg-compressibility": ("image:JPEGCompressibility", "minus the kilobytes of a JPEG over 500"),
    "jpeg-incompressibility": ("image:JPEGIncompressibility", "kilobytes of a JPEG"),
    "brightness": ("image:Brightness", "mean of the pixels, 0 to 1"),
    "ink": ("image:Ink", "share of pixels brighter than a threshold"),
    "similarity": ("image:Similarity", "closeness to a target image, by pixels or digit features"),
    "confidence": ("classifier:Confidence", "a digit classifier's probability of the wanted class"),
    "ocr": ("text:OCR", "how much of the prompt's quoted text is read back, 0 to 1"),
    "clip-score": ("clip:CLIPScore", "agreement of image and prompt by CLIP (extra: hf, local weights)"),
    "pickscore": ("clip:PickScore", "human preference by PickScore (extra: hf, local weights)"),
}


def components() -> list[Component]:
    return [
        Component(kind="reward", name=name, target=f"vgm_cli.rewards.{target}", verbs=("finetune-rl",), summary=summary)
        for name, (target, summary) in REWARDS.items()
    ]
