"""The toolkit from Python: `import vgm_cli as vgm; run = vgm.load("runs/dit"); x = run.sample(8, label=3)`.

Options are those of the command line, and mean the same: what `vgm sample` makes with them, `Model.sample` returns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vgm_cli import recipe as recipes
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.evaluate.setup import evaluate_target
from vgm_cli.engine.evaluate.targets import Options
from vgm_cli.engine.processes import keep_memory, pick_device
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.sample.setup import plan_for, refuse_codec, warn_of_ignored
from vgm_cli.engine.train import loop as training
from vgm_cli.engine.train.captioned import recipe_for
from vgm_cli.errors import USAGE, VgmError, unknown

TEXTS = str | Sequence[str] | None


class Model:
    """A trained network with what it needs to be used: see `load`.

    network: the nn.Module alone, frozen, in evaluation mode. view: what samplers are given, e.g. a Denoiser, which
    answers in x0, noise, score or velocity alike. codec: between pixels and latents, None for models of pixels.
    header: what the file says of itself: recipe, data, step, which average.
    """

    def __init__(self, loaded: ckpt.Loaded, device: torch.device):
        self.loaded, self.device = loaded, device
        self.info: dict[str, Any] = {}  # what the latest `sample` reports: nfe and the like

    @property
    def network(self) -> nn.Module:
        return self.loaded.model

    @property
    def view(self) -> Any:
        return self.loaded.view

    @property
    def codec(self) -> Any:
        return self.loaded.codec

    @property
    def header(self) -> ckpt.Header:
        return self.loaded.header

    @property
    def path(self) -> Path:
        return self.loaded.path

    def sample(
        self,
        n: int = 1,
        *,
        label: int | str | Sequence[int | str] | None = None,  # classes by number or name, in turn; None: all in turn
        prompt: TEXTS = None,  # texts, in turn
        negative: str | None = None,  # what guidance leads away from
        hint: TEXTS = None,  # files or folders of pictures to follow, in turn
        image: str | None = None,  # a file or folder of pictures to start from
        mask: str | None = None,  # a file that is bright where they are kept
        strength: float | None = None,  # how far they go back to noise, 0 to 1
        sampler: str | None = None,  # by name; None: the recipe's
        options: Mapping[str, Any] | None = None,  # of the sampler, {"eta": 0.5}
        steps: int | None = None,  # None: the sampler's own
        guidance_scale: float | None = None,  # None: the recipe's
        guidance_interval: tuple[float, float] | None = None,  # times between which to guide
        seed: int = 0,
        batch_size: int = 64,
        precision: str = "auto",  # fp32, bf16, or auto: as it was trained, where this machine can
    ) -> Tensor:
        """n images (n, C, H, W) about [-1, 1], fp32, on the CPU. Image i depends on the seed, its condition and i
        alone. VgmError: what the model or the sampler does not take, with what it does."""
        refuse_codec(self.header, self.path)
        plan = plan_for(
            self.loaded,
            n=n,
            label=",".join(map(str, listed(label))),
            prompts=listed(prompt),
            negative=negative,
            hints=listed(hint),
            images=image,
            mask=mask,
            strength=strength,
            sampler=sampler,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_interval=None if guidance_interval is None else ",".join(map(str, guidance_interval)),
            seed=seed,
            batch_size=batch_size,
            overrides=as_words(options or {}),
            precision=precision,
        )
        self.info = {}
        images, _ = generate.sample(self.loaded, plan, self.device, info=self.info)
        warn_of_ignored(self.info, plan)
        return images

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] through the codec and back, from the mode of its posterior.

        VgmError: it is a model of pixels and has none, or the codec does not take images of that shape.
        """
        codec: Any = self.network if self.header.is_codec else self.codec
        if codec is None:
            raise VgmError(f"{self.path} is a model of pixels: it has no codec", code=USAGE)
        codec.latent_shape(tuple(x.shape[1:]))
        out: Tensor = codec.decode(codec.latents(codec.encode(x.to(self.device))))
        return out.float().cpu()

    def evaluate(self, *metrics: str, **options: Any) -> list[dict[str, Any]]:
        """What `vgm evaluate` measures, one entry for each number with its protocol: run.evaluate("fid", n=1000).

        options: n, reference, features, protocol, sampler, steps, guidance_scale, seed, batch_size, overrides and the
        other fields of `Options`. VgmError: an unknown one.
        """
        known = [f.name for f in fields(Options) if f.name not in ("metrics", "named")]
        for name in options:
            if name not in known:
                raise unknown("option", name, known)
        device = options.pop("device", str(self.device))
        own = Options(metrics=metrics, device=device, named=frozenset(options), **options)
        return evaluate_target(str(self.path), own)


def as_words(overrides: Mapping[str, Any]) -> list[str]:
    """{"a.b": 1} -> ["a.b=1"], as the command line has it. What the caller writes counts as typed: it may name
    MODULE:ATTRIBUTE."""
    words = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    recipes.allow_typed(words)
    return words


def listed(value: Any) -> list[Any]:
    """One thing or several -> a list."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    return [] if value is None else [value] if isinstance(value, str | int) else list(value)


def load(target: str | Path = "last", *, weights: str | None = None, device: str | None = None) -> Model:
    """A trained model from a run, a checkpoint folder, a .safetensors file, or a short name of the newest run: "last",
    "dit", "dit/mnist".

    weights: "raw", an average's name such as "ema-0.999", None: the first average. device: auto (None), cpu, cuda,
    cuda:N or mps. VgmError: there is no such file, or it is damaged, or names what is not installed.
    """
    where = pick_device(device)
    if where.type == "cpu":
        keep_memory()
    return Model(ckpt.load(target, weights, where), where)


def train(
    paper: str | Path,
    recipe: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> Model:
    """Run a recipe to its end and load what it made: vgm.train("dit", overrides={"data.path": "photos"}).

    paper: a paper, PAPER/RECIPE or a YAML file. overrides: keys of the recipe, dotted. out: the run's folder; None: a
    new one below ./runs. VgmError: whatever `vgm train` refuses; the loss is not finite.
    """
    words = as_words(overrides or {})
    resolved = recipes.load(str(paper), str(recipe) if recipe else recipe_for(str(paper), words), words)
    outcome = training.train(resolved, Path(out) if out else None, resume=resume, overwrite=overwrite, device=device)
    return load(outcome.path, device=device)
