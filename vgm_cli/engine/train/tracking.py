"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, through accelerate. What is tracked is a copy:
a tracker that fails on the way is told of once, and training goes on without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vgm_cli.errors import FAILED, MISSING_ASSET, VgmError, unknown
from vgm_cli.ui import ui

OWN = ("jsonl", "none")
EXTRAS = ("tensorboard", "wandb", "trackio")


def check(name: str) -> None:
    """VgmError: no such tracker, or its extra is not installed."""
    if name not in (*OWN, *EXTRAS):
        raise unknown("tracker", name, (*OWN, *EXTRAS))
    if name in EXTRAS and importlib.util.find_spec(name) is None:
        raise VgmError(f"tracking with {name} needs an extra", f"pip install 'vgm[{name}]'", MISSING_ASSET)


class Tracker:
    """One tracker of one run, on the first process; `jsonl` and `none` are empty ones."""

    def __init__(self, name: str, run: Path, config: Mapping[str, Any], start: int):
        """config: flat, for the tracker's table of settings. start: what a resumed run has behind it."""
        self.name = name
        self.tracker: Any = None
        if name not in EXTRAS:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        label = "/".join(run.resolve().parts[-2:])
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": str(run), "purge_step": start + 1},
            "wandb": {"name": label, "dir": str(run)},
            "trackio": {"name": label},
        }
        try:
            self.tracker = LOGGER_TYPE_TO_CLASS[name](name if name == "tensorboard" else "vgm", **options[name])
            self.tracker.start()
            self.tracker.store_init_configuration(dict(config))
        except Exception as e:
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise VgmError(f"{name} does not start: {reason}", "--track jsonl trains without it", FAILED) from e

    def log(self, row: Mapping[str, Any], step: int) -> None:
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        self._tell(lambda t: t.log(numbers, step=step))

    def picture(self, file: Path, step: int) -> None:
        """A preview, from its file."""
        self._tell(lambda t: self._send(t, file, step))

    def _send(self, tracker: Any, file: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        if self.name == "trackio":
            import trackio

            tracker.log({"samples": trackio.Image(str(file))}, step=step)
            return
        with Image.open(file) as image:
            more = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(image.convert("RGB"))[None]}, step=step, **more)

    def finish(self) -> None:
        self._tell(lambda t: t.finish())
        self.tracker = None

    def _tell(self, what: Callable[[Any], None]) -> None:
        if self.tracker is None:
            return
        try:
            what(self.tracker)
        except Exception as e:
            self.tracker = None
            reason = (str(e) or type(e).__name__).splitlines()[0]
            ui.warn(f"{self.name} failed: {reason}; training goes on, and metrics.jsonl has every row")
