"""What `vgm sample` and `vgm evaluate` share: open a model, turn options into a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vgm_cli import foreign
from vgm_cli.api import TakesSteps
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.environment import bf16_supported
from vgm_cli.engine.processes import keep_memory, pick_device
from vgm_cli.engine.sample.loop import Plan, class_labels, class_numbers, sampler_node
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ranges import Images, NonNegative, Steps, fit
from vgm_cli.ui import ui
from vgm_cli.validation import check_sampler
from vgm_cli.yaml_text import parse_yaml


def device_for(name: str | None = None) -> torch.device:
    return pick_device(name)


def open_model(
    model: str, weights: str | None = None, device_name: str | None = None
) -> tuple[ckpt.Loaded, torch.device]:
    """A loaded generator on this machine's device; codecs alone cannot be sampled from."""
    device = pick_device(device_name)
    if device.type == "cpu":
        keep_memory()
    loaded = ckpt.load(model, weights, device)
    if weights is not None and weights != loaded.header.weights:
        ui.warn(f"--weights {weights} has no effect: {loaded.path} holds {loaded.header.weights}")
    if loaded.header.is_codec:
        hint = f"train a model on its latents or codes (--codec {model}), or measure it: vgm evaluate {model}"
        raise VgmError(f"{model} is a codec: it reconstructs, it does not generate", hint, USAGE)
    return loaded, device


def precision_of(loaded: ckpt.Loaded, asked: str = "auto") -> str:
    """auto: bf16 where this machine has it and the network was trained in it, else fp32. VgmError: unknown name."""
    if asked not in ("auto", "fp32", "bf16"):
        raise unknown("precision", asked, ("auto", "fp32", "bf16"))
    if asked != "auto":
        return asked
    trained = (loaded.header.recipe.get("train") or {}).get("precision", "fp32")
    return "bf16" if trained in ("auto", "bf16") and bf16_supported() else "fp32"


def plan_for(
    loaded: ckpt.Loaded,
    *,
    n: int,
    label: str = "",
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    overrides: Sequence[str] = (),
    images: str | None = None,
    precision: str = "auto",
) -> Plan:
    """Command-line options on top of the recipe that the checkpoint carries."""
    recipe = loaded.header.recipe
    own = {}
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq:
            raise VgmError(f"'{text}' is not KEY=VALUE", "example: eta=0.5", USAGE)
        own[key.removeprefix("sampler.")] = parse_yaml(value, text)
    if sampler in (None, (recipe.get("sampler") or {}).get("name")):
        told = {k: v for k, v in (recipe.get("sampler") or {}).items() if k not in own}
        foreign.tell_files(told, loaded.path)
    guidance_scale = fit(guidance_scale, NonNegative | None, "--guidance-scale")
    steps = fit(steps, Steps | None, "--steps")
    n = fit(n, Images, "-n")
    node = sampler_node(recipe, sampler, own)
    check_sampler(node)
    wanted = class_numbers([w.strip() for w in label.split(",") if w.strip()], loaded) if label else []
    interval = None
    if guidance_interval is not None:
        try:
            low, high = (float(v) for v in guidance_interval.split(","))
        except ValueError as e:
            raise VgmError(f"--guidance-interval {guidance_interval} is not LO,HI", "example: 0.1,0.8", USAGE) from e
        if not 0 <= low <= high:  # no upper end: a network of EDM's path counts in sigma
            hint = "t is 0 at the data, 1 at noise; of EDM's networks sigma"
            raise VgmError(f"--guidance-interval {guidance_interval} is no interval of times", hint, USAGE)
        interval = (low, high)
    wishes = {
        "seed": seed or None,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": interval,
        "images": images,
    }
    plan = Plan(
        n=n,
        seed=seed,
        labels=class_labels(n, loaded.header.data.get("num_classes") or 0, wanted),
        sampler=node,
        steps=steps,
        guidance_scale=recipe.get("guidance_scale") if guidance_scale is None else guidance_scale,
        guidance_interval=interval,
        batch_size=batch_size,
        images=given_images(loaded, images, n) if images is not None else None,
        source=images,
        roles=loaded.roles,
        precision=precision_of(loaded, precision),
        named=tuple(k for k, v in wishes.items() if v is not None),
    )
    device = next(loaded.model.parameters()).device
    if plan.build(device).grid_columns:
        plan.labels = class_labels(n, loaded.header.data.get("num_classes") or 0, wanted, plan.build(device))
    if isinstance(plan.build(device), TakesSteps) and steps is not None:
        plan.sampler["steps"] = steps  # one truth in every record
    return plan


def warn_of_ignored(info: Mapping[str, Any], plan: Plan) -> None:
    """Options that the user gave and the sampler has no use for."""
    for name in info.get("ignored", ()):
        why = "" if plan.labels or not name.startswith("guidance") else ": this network has no classes"
        option = "input" if name == "images" else name.replace("_", "-")
        ui.warn(f"--{option} has no effect on the sampler {plan.sampler['name']}{why}")


def named(loaded: ckpt.Loaded, model: str) -> str:
    """What was loaded, by a name that means the same tomorrow: `last` or a folder of runs becomes the run."""
    path = Path(model)
    whole = path.is_file() or (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file()
    if whole or loaded.path.parent == ckpt.ASSETS:
        return model
    return str(next((p.parent for p in loaded.path.parents if p.name == "checkpoints"), loaded.path))


def given_images(loaded: ckpt.Loaded, data: str, n: int) -> torch.Tensor:
    """The first n images of a data set as the model sees them, on its device: (<= n, C, H, W)."""
    from vgm_cli.data import open_dataset

    facts = loaded.header.data
    dataset = open_dataset(data, size=facts.get("image_size"), channels=facts.get("image_channels"))
    x: torch.Tensor = dataset.pixels(range(min(n, len(dataset)))).to(next(loaded.model.parameters()).device)
    if loaded.codec is None:
        return x
    with torch.no_grad():
        return loaded.codec.latents(loaded.codec.encode(x))  # type: ignore[no-any-return]
