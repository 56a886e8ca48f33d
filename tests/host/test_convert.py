"""`vgm convert`: every registered layout there and back, files of every kind, and what is refused."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vgm_cli import layouts, unpickle
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import convert, probe, weight_files
from vgm_cli.errors import VgmError
from vgm_cli.registry import registry
from vgm_cli.testing import suites

ADM: dict[str, Any] = {"image_size": 16, "model_channels": 64, "num_res_blocks": 1, "channel_mult": (1, 2)}
ADM |= {"attention_resolutions": (2,), "num_head_channels": 64, "num_classes": 5}
DIT = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "num_classes": 5}
EDM = {"img_resolution": 8, "in_channels": 1, "num_classes": 3, "model_channels": 32, "channel_mult": [1, 2]}
EDM |= {"num_blocks": 1, "attn_resolutions": [4]}
STAGE = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16, "z_channels": 4, "embed_dim": 4}
STAGE |= {"attn_resolutions": ()}
GPT = {"dim": 64, "n_layer": 2, "n_head": 1, "vocab_size": 20, "grid": (16, 16), "num_classes": 5, "multiple_of": 32}
GLOW = {"size": 16, "in_channels": 2, "levels": 2, "depth": 2, "width": 12}
STYLE: dict[str, Any] = {"latent_size": 8, "w_dim": 8, "mapping_layers": 2, "size": 16}
NARROW = {"channel_base": 64, "channel_max": 12}
WIDTHS = (6, 6, 6, 6, 4, 4, 3, 2, 2)

# A small network of every layout, by keywords of its constructor; a new layout adds its own. Trailing KEY=VALUE are
# what its shapes do not tell.
TINY: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "adm-classifier": (ADM | {"channel_mult": (1, 2), "pool": "adaptive"}, ()),
    "adm-unet": (ADM, ()),
    "adm-unet-diffusers": (ADM | {"use_new_attention_order": True}, ()),
    "adm-unet-diffusers-legacy": (ADM, ()),
    "autoencoder-kl": (STAGE, ()),
    "autoencoder-kl-diffusers": (STAGE, ()),
    "consistency": (ADM | {"use_new_attention_order": True}, ()),
    "dit": (DIT, ("num_heads=2",)),
    "dit-diffusers": (DIT | {"input_size": 32, "patch_size": 8}, ("num_heads=2",)),
    "dit-diffusers-512": (DIT | {"input_size": 64, "patch_size": 16}, ("num_heads=2",)),
    "dmd2-discriminator": ({"channels": 64, "side": 8}, ()),
    "dmd2-fake-score": (EDM, ()),
    "edm": (EDM, ()),
    "glow": (GLOW, ()),
    "glow-average": (GLOW, ()),
    "glow-rosinality": (GLOW | {"style": "rosinality", "permutation": "lu"}, ()),
    "llamagen": (GPT, ()),
    "llamagen-384": (GPT | {"grid": (24, 24)}, ()),
    "llamagen-512": (GPT | {"grid": (32, 32)}, ()),
    "llamagen-tokenizer": (STAGE | {"n_embed": 16, "resolution": 256, "attn_resolutions": (128,)}, ()),
    "lpips": ({}, ()),
    "rectified-flow": ({"image_size": 32, "nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "fir": True}, ()),
    "sit": (DIT, ("num_heads=2",)),
    "stylegan": (STYLE | {"mapping_width": 8, "fmap_base": 64, "fmap_max": 12}, ()),
    "stylegan-discriminator": ({"size": 16, "fmap_base": 64, "fmap_max": 12}, ()),
    "stylegan-rosinality": ({"w_dim": 6, "mapping_layers": 2, "widths": WIDTHS}, ()),
    "stylegan-rosinality-discriminator": ({"widths": WIDTHS, "from_rgb_activate": True}, ()),
    "stylegan-rosinality-discriminator-plain": ({"widths": WIDTHS}, ()),
    "stylegan2": (STYLE | NARROW | {"num_classes": 3, "embed": 5}, ()),
    "stylegan2-discriminator": ({"size": 16, "architecture": "skip"} | NARROW, ()),
    "stylegan2-tf": (STYLE | NARROW, ()),
    "vae-pythae": ({"size": 8, "latent_dim": 3, "hidden": [12], "architecture": "mlp", "activation": "relu"}, ()),
    "vq-autoencoder": (STAGE | {"n_embed": 16}, ()),
    "vqgan": (STAGE | {"n_embed": 16, "embed_dim": 16}, ()),
    "vqgan-prior": ({"vocab_size": 16, "n_layer": 2, "n_head": 1, "n_embd": 64, "condition": "class", "num_classes": 1000}, ()),
}  # fmt: skip
