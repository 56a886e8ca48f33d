"""The plugin contract's torch-free half: markers, what a plugin declares, and the hooks it may implement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pluggy
import typer

API_VERSION = 1
PROJECT = "vgm"

KINDS = (
    "model",
    "objective",
    "sampler",
    "view",
    "codec",
    "condition",
    "operator",
    "reward",
    "metric",
    "dataset",
    "converter",
    "optimizer",
)

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One named thing a recipe can build. Declares only strings, so listing costs no torch import.

    Every field is given by its name: Component(kind="model", name="dit", target="mine.model:DiT").
    kind: one of KINDS. name: what the recipe writes. target: "module:attr", imported when built.
    presets: published configurations, {name: constructor keywords}, or "module:attr" of such a dict
        in a torch-free module.
    from_data: {constructor keyword: fact} filled by the host when the recipe leaves it open; facts are
        size (side of x as the model sees it, after the codec), channels, num_classes, image_size and
        image_channels (before the codec), and of a codec's tokens vocab_size, grid, and scales: (h, w) of every grid
        of a pyramid, whose size and channels are those of its features; ROLE.KEYWORD is what another network of the
        recipe was told ("base.model_channels").
    verbs: commands that offer it (objectives: "train", "distill", "finetune-rl"). summary: one line for `vgm ls`.
    denoiser: of models forward(x, t, **cond), of objectives that train any of these, and of views that show a network
        so: the result is a denoiser, which distill, restore and finetune-rl take (`vgm matrix`).
    trains: of such an objective, the models that it trains where these are not any.
    two_times: of models that can be told the end of a jump, too (offers.TwoTimes), and of objectives that train these
        alone.
    """

    kind: str
    name: str
    target: str
    presets: Mapping[str, Mapping[str, Any]] | str = field(default_factory=dict)
    from_data: Mapping[str, str] = field(default_factory=dict)
    verbs: tuple[str, ...] = ()
    summary: str = ""
    denoiser: bool = False
    trains: tuple[str, ...] = ()
    two_times: bool = False


@dataclass(frozen=True)
class Paper:
    """What a plugin reproduces. Feeds `vgm ls`, `vgm explain`, docs and model cards.

    expects: published headline numbers, {"ImageNet 256 FID-50K (XL/2, cfg 1.5)": 2.27}.
    """

    name: str
    title: str
    year: int
    arxiv: str = ""
    repository: str = ""
    family: str = ""
    summary: str = ""
    expects: Mapping[str, float] = field(default_factory=dict)


class Hooks:
    """Every hook a plugin may implement."""

    @hookspec
    def vgm_components(self) -> Iterable[Component | Paper]:  # type: ignore[empty-body]
        """Return what this plugin brings. Must not import torch."""

    @hookspec
    def vgm_commands(self, app: typer.Typer) -> None:
        """Add commands to the CLI with `@app.command()`. Must not import torch at import time."""
