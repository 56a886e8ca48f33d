"""What `vgm evaluate` does around the metrics: find the samples (sampling a run as they are measured, reconstructing
with a codec), the reference, the protocol; share the work over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vgm_cli.data import SHIPPED, open_dataset
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import evaluate as measuring
from vgm_cli.engine import generate, ranks
from vgm_cli.engine.measure import save_statistics
from vgm_cli.engine.sampling import device_for, open_model, plan_for, warn_of_ignored
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import to_uint8
from vgm_cli.metrics import features as networks
from vgm_cli.metrics import protocols
from vgm_cli.metrics.base import Subject
from vgm_cli.metrics.pictures import DataPictures, Pictures
from vgm_cli.metrics.protocols import Protocol
from vgm_cli.metrics.statistics import Statistics, holds_statistics, read_statistics, write_statistics
from vgm_cli.ui import ui


@dataclass
class Options:
    """Of one evaluation, as the command line gives them; None leaves it to the protocol, the data or the checkpoint."""

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


@dataclass
class Target:
    """What is measured. pictures: None where only the model itself is asked; rule: of rounding to 8 bits, None for
    files; data: what a checkpoint says of its training data; facts: for the results."""

    size: int
    channels: int
    device: torch.device
    pictures: Pictures | None = None
    rule: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    subject: Subject | None = None
    reference: Any = None  # settled already, for reconstructions


def evaluate_target(target: str, options: Options, progress: Any = None) -> list[dict[str, Any]]:
    """Results of every metric for a run, checkpoint, codec, folder or .npz; see engine.evaluate for what one holds."""
    ranks.join()
    protocol = protocols.protocol(options.protocol)
    metrics = [protocols.with_options(measuring.full_name(m), protocol) for m in options.metrics or protocol.metrics]
    built = [measuring.build_metric(m) for m in metrics]
    measuring.check_names(options.assertions, metrics)
    found = open_target(target, options, protocol, sampled=not all(map(measuring.of_model, built)))
    if isinstance(found.pictures, Sampled):
        found.pictures.progress = progress
    reference = found.reference
    if reference is None and any(measuring.of_model(m) or m.needs_reference for m in built):
        reference = open_reference(options, found)
    if found.subject is not None and hasattr(reference, "gather"):
        found.subject.dataset = reference
    results = measuring.evaluate(
        found.pictures,
        reference=reference,
        held_out=open_data(options.held_out, found.size, found.channels) if options.held_out else None,
        metrics=metrics,
        features=options.features,
        batch_size=options.batch_size,
        seed=options.seed if protocol.seed is None else protocol.seed,
        facts=found.facts,
        save_stats=options.save_stats,
        protocol={"name": protocol.name, "uint8": found.rule or "as stored", **protocols.prescribed(protocol)},
        resize=protocol.resize,
        subject=found.subject,
        device=found.device,
        progress=progress.update if progress is not None else None,
    )
    for result in results:
        if isinstance(found.pictures, Sampled):
            result |= found.pictures.info
            result["seed"] = options.seed
        gone = protocols.deviations(protocol, result, found.rule)
        if gone:
            result["protocol"]["deviations"] = gone
            ui.warn(f"{result['metric']} departs from protocol {protocol.name}: {'; '.join(gone)}")
    if isinstance(found.pictures, Sampled):
        warn_of_ignored(found.pictures.info, found.pictures.plan)
    caution(results, options)
    return results


def caution(results: Sequence[dict[str, Any]], options: Options) -> None:
    """Say what a reader of the numbers could miss."""
    for r in results:
        dim = r["protocol"].get("features_dim")
        if r["metric"] in ("fid", "fd-dinov2") and dim and r["n"] <= dim:
            ui.warn(f"{r['metric']} of {r['n']} samples with {dim} features is far too high: take more samples, or kid")
    told = [r["protocol"] for r in results if r["protocol"].get("features_kind") == "mnist"]
    if options.features is None and told and "mnist" not in str(told[0].get("reference", "mnist")).lower():
        ui.warn("the shipped network knows digits only: for other pictures give Inception weights with --features")


# -- what is measured ------------------------------------------------------------------------------------------------


def open_target(target: str, options: Options, protocol: Protocol, sampled: bool = True) -> Target:
    """sampled: whether a model's images are wanted at all."""
    if not is_model(target):
        return images_of(target, options, protocol)
    path = ckpt.resolve(target, options.weights)
    if ckpt.read_header(path).is_codec:
        return reconstructions(path, options, protocol)
    loaded, device = open_model(target, options.weights)
    data = loaded.header.data
    if not data.get("image_size"):
        raise VgmError(f"{path} does not say the size of its images", "convert it with the data's facts", USAGE)
    facts = {"model": target, "weights": loaded.header.weights, "step": loaded.header.step}
    own = loaded.header
    subject = Subject(loaded.view, loaded.codec, own, None, device, options.batch_size, options.n, ranks.shares)
    found = Target(data["image_size"], data["image_channels"], device, None, protocol.uint8, data, facts, subject)
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
        found.pictures = Sampled(loaded, plan, device, protocol.uint8)
        found.facts |= {k: v for k, v in plan.settings(device).items() if k != "asked"}
        found.facts["precision"] = plan.precision
    return found


def is_model(target: str) -> bool:
    """A run, a checkpoint or the name of one, rather than images."""
    path = Path(target)
    if path.suffix == ".safetensors" or (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file():
        return True
    return not path.exists() and target not in SHIPPED and not ("{" in target and target.endswith(".tar"))


def images_of(target: str, options: Options, protocol: Protocol) -> Target:
    """A folder or .npz; n of them are taken evenly, as the first ones by a published protocol."""
    dataset = open_dataset(target, crop="none")
    pictures = DataPictures(dataset, options.n, first=protocol.name != "vgm")
    names = {
        "reference": "samples",
        "reference_fingerprint": "samples_fingerprint",
        "reference_subset": "samples_subset",
    }
    facts = {names[k]: v for k, v in pictures.facts.items()}
    size, _, channels = pictures.shape()
    return Target(size, channels, device_for(), pictures, facts=facts)


class Sampled:
    """A plan's images, made when they are asked for: batch by batch, as 8-bit pictures."""

    def __init__(self, loaded: ckpt.Loaded, plan: generate.Plan, device: torch.device, rule: str):
        self.loaded, self.plan, self.device, self.rule = loaded, plan, device, rule
        self.labels = np.array(plan.labels) if plan.labels else None
        self.facts: dict[str, Any] = {}
        self.info: dict[str, Any] = {}  # what the sampler reports, e.g. nfe
        self.progress: Any = None  # told of every step

    def __len__(self) -> int:
        return self.plan.n

    def shape(self) -> tuple[int, int, int]:
        data = self.loaded.header.data
        return data["image_size"], data["image_size"], data["image_channels"]

    def batch(self, first: int, last: int) -> np.ndarray:
        batches = generate.stream(
            self.loaded, self.plan, self.device, first, last, info=self.info, progress=self.progress
        )
        x = torch.cat([x.cpu() for x, _ in batches])
        return to_uint8(x, self.rule).permute(0, 2, 3, 1).numpy()


class Reconstructed:
    """What a codec makes of pictures, from the mode of its posterior."""

    def __init__(self, codec: Any, originals: DataPictures, device: torch.device, rule: str):
        self.codec, self.originals, self.device, self.rule = codec, originals, device, rule
        self.labels = originals.labels
        self.facts: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.originals)

    def shape(self) -> tuple[int, int, int]:
        return self.originals.shape()

    @torch.no_grad()
    def batch(self, first: int, last: int) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(self.originals.batch(first, last))).permute(0, 3, 1, 2)
        moments = self.codec.encode(x.to(self.device).float() / 127.5 - 1)
        y = self.codec.decode(self.codec.latents(moments)).float().cpu()
        return to_uint8(y, self.rule).permute(0, 2, 3, 1).numpy()


def reconstructions(path: Path, options: Options, protocol: Protocol) -> Target:
    """A codec against the pictures it is given: reconstruction FID, PSNR, SSIM, LPIPS."""
    device = device_for()
    header, codec = ckpt.read_header(path), ckpt.read_codec(path, device)
    data = header.data
    where = options.reference or trained_on(data, path)
    if holds_statistics(Path(where)):
        raise VgmError("a codec is measured on images that it reconstructs, not on statistics", code=USAGE)
    dataset = open_data(where, data.get("image_size"), data.get("image_channels"), options.split)
    originals = DataPictures(dataset, options.n)
    size, _, channels = originals.shape()
    facts = {"model": str(path), "weights": header.weights, "step": header.step, "samples": "reconstructions"}
    pictures = Reconstructed(codec, originals, device, protocol.uint8)
    return Target(size, channels, device, pictures, protocol.uint8, data, facts, reference=originals)


# -- what it is compared with ----------------------------------------------------------------------------------------


def open_reference(options: Options, target: Target) -> Any:
    """A data set at the samples' size, or statistics; by default the data that a model was trained on."""
    where = options.reference or (trained_on(target.data, target.facts["model"]) if target.data else None)
    if where is None:
        raise VgmError("a folder or .npz needs --reference", "data or a statistics file", USAGE)
    if holds_statistics(Path(where)):
        return read_statistics(where)
    return open_data(where, target.size, target.channels, options.split)


def trained_on(data: dict[str, Any], model: Path | str) -> str:
    """Where a checkpoint says that its training data lie; told, since nobody who sits here named that place.

    VgmError: it says nothing.
    """
    if not data.get("root"):
        hint = "--reference DATA, or a statistics file"
        raise VgmError(f"{model} does not say on what data it was trained: no reference to compare with", hint, USAGE)
    where = str(data["root"])
    if where not in SHIPPED:
        ui.info(f"reference: {where}, as {model} says")
    return where


def open_data(where: str, size: int | None, channels: int | None, split: str | None = None) -> Any:
    """Images at a size; says so when they had another."""
    dataset = open_dataset(where, size=size, channels=channels, split=split)
    if not hasattr(dataset, "source"):
        raise VgmError(f"{where} holds latents; images are compared", "give the images themselves", USAGE)
    found = dataset.source.header(0)[:2]
    if size is not None and found != (size, size):
        ui.warn(f"the images of {where}, the first of {found[0]}×{found[1]} pixels, were resized to {size}")
    return dataset


def evaluate_statistics(
    data: str,
    out: Path,
    *,
    features: str | None = None,
    size: int | None = None,
    split: str | None = None,
    protocol: str = "vgm",
    batch_size: int = 100,
    keep_features: bool = False,
) -> dict[str, Any]:
    """`vgm evaluate stats`: statistics of a data set, or those of another format, as .safetensors."""
    ranks.join()
    rule = protocols.protocol(protocol).resize
    if holds_statistics(Path(data)):
        return restate(read_statistics(data), out)
    dataset = open_data(data, size, None, split)
    net = networks.choose(features, dataset.facts.size, dataset.facts.channels, None, rule)
    return save_statistics(DataPictures(dataset), net, out, batch_size, device_for(), keep_features)


def restate(stats: Statistics, out: Path) -> dict[str, Any]:
    """Another format's statistics in ours; a network that the file does not name stays unknown."""
    assert stats.moments is not None
    facts = {"reference": str(stats.path), "reference_fingerprint": stats.fingerprint(), **stats.facts}
    if ranks.rank_world()[0] == 0:
        write_statistics(out, stats.moments, stats.spatial, facts, stats.pool)
    return {**facts, "n": stats.n, "dim": stats.moments.dim, "out": str(out)}
