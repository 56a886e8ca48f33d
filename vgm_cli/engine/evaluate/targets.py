"""What is evaluated: pictures on disk, a model that is sampled as it is measured, or a codec that reconstructs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vgm_cli import limits
from vgm_cli.api import HasLogLikelihood
from vgm_cli.data import SHIPPED, Dataset, open_dataset
from vgm_cli.data.decode import File, Unreadable, open_image
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import processes
from vgm_cli.engine.conditions import beside, give_of_data
from vgm_cli.engine.run_files import newest
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.sample.output import JOB
from vgm_cli.engine.sample.setup import device_for, open_model, plan_for
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import to_uint8
from vgm_cli.metrics.base import Subject
from vgm_cli.metrics.pictures import DataPictures, Items, Pictures
from vgm_cli.metrics.protocols import Protocol
from vgm_cli.metrics.statistics import holds_statistics
from vgm_cli.ui import Progress, counted, ui


@dataclass
class Options:
    """The options of one evaluation, as the command line gives them. None leaves a choice to the protocol, the data
    or the checkpoint."""

    reference: str | None = None
    metrics: Sequence[str] = ()
    features: str | None = None
    protocol: str = "vgm"
    n: int | None = None
    split: str | None = None
    held_out: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: str | None = None
    seed: int = 0
    weights: str | None = None
    batch_size: int = 100
    precision: str = "auto"
    overrides: Sequence[str] = field(default_factory=tuple)
    save_stats: Path | None = None
    assertions: Sequence[str] = ()
    device: str | None = None
    named: frozenset[str] = frozenset()  # which of these the user gave


@dataclass
class Target:
    """What is measured. kind: files, codec or model. pictures: None where only the model itself is asked; rule: of
    rounding to 8 bits, None for files; data: what a checkpoint says of its training data; facts: for the results."""

    kind: str
    size: int
    channels: int
    device: torch.device
    pictures: Pictures | None = None
    rule: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    subject: Subject | None = None
    reference: Any = None  # settled already, for reconstructions


def open_target(target: str, options: Options, protocol: Protocol, sampled: bool = True) -> Target:
    """sampled: whether a model's images are wanted at all."""
    if not is_model(target):
        return images_of(target, options, protocol)
    path = ckpt.resolve(target, options.weights)
    if ckpt.read_header(path).is_codec:
        return reconstructions(path, options, protocol)
    loaded, device = open_model(target, options.weights, options.device)
    data = loaded.header.data
    if not data.get("image_size"):
        raise VgmError(f"{path} does not say the size of its images", "convert it with the data's facts", USAGE)
    facts = {"model": target, "weights": loaded.header.weights, "step": loaded.header.step}
    own = loaded.header
    subject = Subject(
        loaded.view, loaded.codec, own, None, device, options.batch_size, options.n, processes.shares, loaded.conditions
    )
    shape = data["image_size"], data["image_channels"]
    split = ((own.recipe or {}).get("data") or {}).get("split")
    if options.split is None and options.reference is None and isinstance(split, str):
        options.split = split  # of the data that it was trained on, the part that it saw
    found = Target("model", *shape, device, None, protocol.uint8, data, facts, subject)
    where, asked = items_from(loaded, options, path), None
    if where is not None:
        facts["conditions"] = where
        dataset = open_data(where, *shape, options.split, beside(loaded.conditions.components()))
        n = options.n or protocol.n
        rows = [i * len(dataset) // n for i in range(n)]
        give_of_data(loaded.conditions, dataset, rows)
        asked = Items([int(dataset.rows[row]) for row in rows], len(dataset.source))
    if sampled:
        plan = plan_for(
            loaded,
            n=options.n or protocol.n,
            sampler=options.sampler,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            guidance_interval=options.guidance_interval,
            seed=options.seed,
            batch_size=options.batch_size,
            overrides=options.overrides,
            precision=options.precision,
        )
        found.pictures = Sampled(loaded, plan, device, protocol.uint8, asked)
        found.facts |= {k: v for k, v in plan.settings(device).items() if k != "asked"}
        found.facts["precision"] = plan.precision
    return found


def items_from(loaded: ckpt.Loaded, options: Options, path: Path) -> str | None:
    """The data that tells a model what to draw, where it is no choice of a few such as classes: the reference, or what
    it was trained on."""
    if all(len(part.items) for part in loaded.conditions.parts.values()):
        return None
    if options.reference is not None and not holds_statistics(Path(options.reference)):
        return options.reference
    return trained_on(loaded.header.data, path)


def is_model(target: str) -> bool:
    """A run, a checkpoint or the name of one, rather than images."""
    path = Path(target)
    if path.suffix == ".safetensors" or (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file():
        return True
    if path.is_dir():
        return newest(path) is not None  # a folder of runs
    return not path.exists() and target not in SHIPPED and not ("{" in target and target.endswith(".tar"))


def images_of(target: str, options: Options, protocol: Protocol) -> Target:
    """A folder or .npz; n of them are taken evenly, as the first ones by a published protocol."""
    restored = Path(target) / "restored"
    if restored.is_dir() and (Path(target) / "results.json").is_file():
        hint = f"vgm evaluate {restored} --reference TRUTH"
        raise VgmError(f"{target} was made by vgm restore: it holds degraded and restored pictures", hint, USAGE)
    dataset = open_dataset(target, crop="none", without=by_product)
    if not isinstance(dataset, Dataset):
        raise VgmError(f"{target} holds latents; images are measured", "give the images themselves", USAGE)
    tell_unfinished(Path(target), len(dataset))
    pictures = DataPictures(dataset, options.n, first=protocol.name != "vgm")
    tell_number(target, options.n, len(dataset))
    facts = {k.replace("reference", "samples"): v for k, v in pictures.facts.items()}
    size, _, channels = pictures.shape()
    return Target("files", size, channels, device_for(options.device), pictures, facts=facts)


BY_PRODUCTS = re.compile(r"(.*/)?(grid|reals|sample-\d+-.*|.*-trace|.*-again)(_\d+)?\.png")


def by_product(name: str, read: Callable[[], File]) -> bool:
    """Whether a picture is one of ours that shows others, such as a grid, a trace or a rerun, and so is no sample.
    Its name and its metadata tell."""
    if not BY_PRODUCTS.fullmatch(name):
        return False
    try:
        with open_image(read()) as image:
            return any(str(key).startswith("vgm") for key in image.info)
    except (Unreadable, OSError, ValueError, SyntaxError):
        return False


def tell_unfinished(folder: Path, there: int) -> None:
    """A folder of samples that an interrupted `vgm sample` left is measured as it is, and said to be so."""
    try:
        wanted = json.loads(limits.read_text(folder / JOB))["n"] if (folder / JOB).is_file() else there
    except (VgmError, OSError, ValueError, TypeError, KeyError):
        return
    if isinstance(wanted, int) and there < wanted:
        ui.warn(f"{folder} is not finished: {there} of {counted(wanted, 'image')} are there; `vgm sample` goes on")


def tell_number(where: str, asked: int | None, there: int) -> None:
    """Warn where -n differs from the number of pictures in a set."""
    if asked is not None and asked > there:
        ui.warn(f"-n {asked}: {where} has {counted(there, 'picture')}, all are measured")
    elif asked is not None and asked < there:
        ui.info(f"{asked} of the {counted(there, 'picture')} of {where} are measured")


class Sampled:
    """A plan's images as a set of 8-bit pictures, sampled batch by batch when they are asked for. asked: which images
    of the data their conditions are those of, if they come from there."""

    def __init__(
        self, loaded: ckpt.Loaded, plan: generate.Plan, device: torch.device, rule: str, asked: Items | None = None
    ):
        self.loaded, self.plan, self.device, self.rule = loaded, plan, device, rule
        self.asked = asked or Items(range(plan.n), plan.n)
        self.labels = np.array(plan.labels) if plan.labels else None
        self.said: list[str] | None = None  # the texts, once they were asked for
        self.facts: dict[str, Any] = {}
        self.info: dict[str, Any] = {}  # what the sampler reports, e.g. nfe
        self.progress: Any = None  # told of every step
        self.after = 0  # where these begin in the progress

    def __len__(self) -> int:
        return self.plan.n

    def shape(self) -> tuple[int, int, int]:
        data = self.loaded.header.data
        return data["image_size"], data["image_size"], data["image_channels"]

    def items(self) -> Items:
        return self.asked

    def texts(self) -> list[str] | None:
        part = self.loaded.conditions.of_column("text")
        if part is not None and self.said is None:
            given, at_once = self.plan.given[part.name], 256  # a data set reads its pictures, too
            self.said = [str(text) for i in range(0, self.plan.n, at_once) for text in given[i : i + at_once]]
        return self.said

    def batch(self, first: int, last: int) -> np.ndarray:
        progress: Any = Part(self.progress, self.after) if self.progress is not None else None
        batches = generate.stream(self.loaded, self.plan, self.device, first, last, info=self.info, progress=progress)
        x = torch.cat([x.cpu() for x, _ in batches])
        return to_uint8(x, self.rule).permute(0, 2, 3, 1).numpy()


class Part:
    """Progress of the second of two parts of work, the first having been `before` items."""

    def __init__(self, progress: Progress, before: int):
        self.progress, self.before = progress, before

    def update(self, done: float, note: str | None = None) -> None:
        self.progress.update(self.before + done, note)


class Reconstructed:
    """Reconstructions of pictures by a codec, from the mode of its posterior, as a set of pictures."""

    def __init__(self, codec: Any, originals: DataPictures, device: torch.device, rule: str):
        self.codec, self.originals, self.device, self.rule = codec, originals, device, rule
        self.labels = originals.labels
        self.facts: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.originals)

    def shape(self) -> tuple[int, int, int]:
        return self.originals.shape()

    def items(self) -> Items:
        return self.originals.items()

    @torch.no_grad()
    def batch(self, first: int, last: int) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(self.originals.batch(first, last))).permute(0, 3, 1, 2)
        moments = self.codec.encode(x.to(self.device).float() / 127.5 - 1)
        y = self.codec.decode(self.codec.latents(moments)).float().cpu()
        generate.refuse_non_finite(y, first, "weights that are not finite")
        return to_uint8(y, self.rule).permute(0, 2, 3, 1).numpy()


def reconstructions(path: Path, options: Options, protocol: Protocol) -> Target:
    """A codec against the pictures it is given: reconstruction FID, PSNR, SSIM, LPIPS."""
    device = device_for(options.device)
    header, codec = ckpt.read_header(path), ckpt.read_codec(path, device)
    data = header.data
    where = options.reference or trained_on(data, path)
    if holds_statistics(Path(where)):
        raise VgmError("a codec is measured on images that it reconstructs, not on statistics", code=USAGE)
    dataset = open_data(where, data.get("image_size"), data.get("image_channels"), options.split)
    tell_number(where, options.n, len(dataset))
    originals = DataPictures(dataset, options.n)
    size, _, channels = originals.shape()
    facts = {"model": str(path), "weights": header.weights, "step": header.step, "samples": "reconstructions"}
    pictures = Reconstructed(codec, originals, device, protocol.uint8)
    subject = None
    if isinstance(codec, HasLogLikelihood):  # a model of images by itself
        subject = Subject(codec, None, header, None, device, options.batch_size, options.n, processes.shares)
    return Target("codec", size, channels, device, pictures, protocol.uint8, data, facts, subject, originals)


# -- what it is compared with ----------------------------------------------------------------------------------------


def trained_on(data: dict[str, Any], model: Path | str) -> str:
    """Where a checkpoint says that its training data lie; told, since nobody who sits here named that place.

    VgmError: it says nothing.
    """
    if not data.get("root") and Path(model).parent == ckpt.ASSETS:
        return "mnist5k"  # what we ship is trained on what we ship
    if not data.get("root"):
        hint = "--reference DATA, or a statistics file"
        raise VgmError(f"{model} does not say on what data it was trained: no reference to compare with", hint, USAGE)
    where = str(data["root"])
    if where not in SHIPPED:
        ui.once(f"reference {where}", f"reference: {where}, as {model} says")
    return where


def open_data(
    where: str, size: int | None, channels: int | None, split: str | None = None, columns: Sequence[str] = ()
) -> Any:
    """Images at a size; says so when they had another. VgmError: no data set, such as a run with its previews."""
    if (Path(where) / "checkpoints").is_dir():
        raise VgmError(
            f"{where} is a run, not data", "name the images: a folder, .zip, .tar, .npz or statistics", USAGE
        )
    dataset = open_dataset(where, size=size, channels=channels, split=split, columns=columns, without=by_product)
    if not isinstance(dataset, Dataset):
        raise VgmError(f"{where} holds latents; images are compared", "give the images themselves", USAGE)
    found = dataset.source.header(int(dataset.rows[0]))[:2]
    if size is not None and found != (size, size):
        ui.warn(f"the images of {where}, the first of {found[0]}×{found[1]} pixels, were resized to {size}")
    return dataset
