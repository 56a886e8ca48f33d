"""What `vgm evaluate` does around the metrics: find the samples (sampling a run first), find the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vgm_cli.data import open_dataset
from vgm_cli.engine import evaluate as measuring
from vgm_cli.engine import generate
from vgm_cli.engine.sampling import autocast, open_model, plan_for
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import to_uint8
from vgm_cli.ui import ui


def evaluate_target(
    target: str,
    *,
    reference: str | None,
    metrics: Sequence[str],
    features: str | None = None,
    n: int | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    weights: str | None = None,
    batch_size: int = 100,
    precision: str = "fp32",
    overrides: Sequence[str] = (),
    save_stats: Path | None = None,
    progress: Any = None,
) -> list[dict[str, Any]]:
    """Results of every metric for a run, checkpoint, folder or .npz; see engine.evaluate for what a result holds."""
    facts: dict[str, Any] = {}
    path = Path(target)
    is_model = path.suffix == ".safetensors" or (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file()
    if is_model or not path.exists():
        loaded, device = open_model(target, weights, precision)
        plan = plan_for(loaded, n=n or 2000, sampler=sampler, steps=steps, guidance_scale=guidance_scale, seed=seed,
                        batch_size=batch_size, overrides=overrides)
        info: dict[str, Any] = {}
        with autocast(precision, device):
            x, labels = generate.sample(loaded, plan, device, progress, info)
        images = to_uint8(x).permute(0, 2, 3, 1).numpy()
        y = np.array(labels) if labels else None
        facts = {"model": target, "weights": loaded.header.weights, "step": loaded.header.step, "sampler": plan.sampler,
                 "guidance_scale": plan.guidance_scale if labels else None, **info}
        default = loaded.header.data
    else:
        dataset = open_dataset(target, crop="none")
        count = min(n or len(dataset), len(dataset))
        images = np.stack([np.asarray(dataset.item(i)[0]) for i in range(count)])
        own = dataset.labels()
        y = np.asarray(own)[:count] if own is not None else None
        default = {}
    size, channels = images.shape[1], images.shape[3]
    if reference is None:
        if not default:
            raise VgmError("a folder or .npz needs --reference", "data or a statistics file", USAGE)
        reference = default.get("root") or "mnist5k"
    return measuring.evaluate(
        images,
        reference=open_reference(reference, size, channels),
        metrics=list(metrics),
        features=features,
        labels=y,
        batch_size=batch_size,
        seed=seed,
        facts=facts,
        save_stats=save_stats,
    )


def open_reference(reference: str, size: int, channels: int) -> Any:
    """A data set at the samples' size, or the path of a statistics file."""
    path = Path(reference)
    if path.suffix in (".safetensors", ".npz", ".pkl", ".pt", ".pth") and path.is_file() and not _holds_images(path):
        return path
    dataset = open_dataset(reference, size=size, channels=channels)
    if dataset.facts.size != size:
        ui.warn(f"the reference was resized to {size} pixels")
    return dataset


def _holds_images(path: Path) -> bool:
    if path.suffix != ".npz":
        return False
    with np.load(path) as f:
        return "mu" not in f.files and any(k in f.files for k in ("images", "arr_0", "x"))


