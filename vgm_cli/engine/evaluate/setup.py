"""What `vgm evaluate` does around the metrics: find the samples (sampling a run as they are measured, reconstructing
with a codec), the reference, the protocol; share the work over processes."""

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
from vgm_cli.data import SHIPPED, open_dataset
from vgm_cli.data.decode import File, Unreadable, open_image
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import processes
from vgm_cli.engine.evaluate import run as measuring
from vgm_cli.engine.evaluate.measure import save_statistics
from vgm_cli.engine.processes import pick_device
from vgm_cli.engine.run_files import newest
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.sample.output import JOB
from vgm_cli.engine.sample.setup import device_for, open_model, plan_for, warn_of_ignored
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.images import to_uint8
from vgm_cli.metrics import features as networks
from vgm_cli.metrics import protocols
from vgm_cli.metrics.base import Subject
from vgm_cli.metrics.image import WINDOW
from vgm_cli.metrics.pictures import DataPictures, Items, Pictures
from vgm_cli.metrics.protocols import Protocol
from vgm_cli.metrics.statistics import Statistics, check_target, holds_statistics, read_statistics, write_statistics
from vgm_cli.ui import Progress, counted, ui


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


def evaluate_target(target: str, options: Options) -> list[dict[str, Any]]:
    """Results of every metric for a run, checkpoint, codec, folder or .npz; see engine.evaluate for what one holds."""
    processes.join()
    protocol = protocols.protocol(options.protocol)
    metrics, built = metrics_of(options.metrics or protocol.metrics, protocol)
    if options.metrics:
        measuring.check_names(options.assertions, metrics)
    pick_device(options.device)
    found = open_target(target, options, protocol, sampled=not all(map(measuring.of_model, built)))
    if found.kind == "codec" and not options.metrics:
        metrics, built = metrics_of(of_codec(found, options, protocol), protocol)
    measuring.check_names(options.assertions, metrics)
    reference = found.reference
    of_images = [m for m in built if not measuring.of_model(m)]
    if reference is None and any(m.needs_reference for m in of_images):
        reference = open_reference(options, found)
    if found.subject is not None and any(map(needs_data, built)):
        found.subject.dataset = scored(options, found, reference)
    tell_ineffective(target, options, found, built, reference)
    sides: list[Any] = [reference, found.pictures]
    total = sum(len(side) for side in sides if hasattr(side, "batch"))
    with Progress("evaluating", total, every=10) as progress:
        if isinstance(found.pictures, Sampled):
            found.pictures.progress, found.pictures.after = progress, total - len(found.pictures)
        results = measuring.evaluate(
            found.pictures,
            reference=reference,
            held_out=DataPictures(open_data(options.held_out, found.size, None)) if options.held_out else None,
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
            progress=progress.update,
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


def metrics_of(names: Sequence[str], protocol: Protocol) -> tuple[list[str], list[Any]]:
    """Metrics with the protocol's options, as text and made."""
    texts = [protocols.with_options(measuring.full_name(m), protocol) for m in names]
    return texts, [measuring.build_metric(m) for m in texts]


def needs_data(metric: Any) -> bool:
    return measuring.of_model(metric) and getattr(metric, "needs_data", True)


def of_codec(found: Target, options: Options, protocol: Protocol) -> Sequence[str]:
    """What a codec is measured by unless told: the protocol's metrics, or without weights for them what needs none."""
    try:
        networks.choose(options.features, found.size, found.channels, None, protocol.resize)
    except VgmError as e:
        if e.code != MISSING_ASSET or protocol.name != "vgm" or options.features is not None:
            raise
        ui.info("rFID of these images needs Inception weights (--features FILE): PSNR and SSIM are measured")
        return ["psnr", "ssim"] if found.size >= WINDOW else ["psnr"]
    return protocol.metrics


CAUTIONED = ("fid", "fd-dinov2", "sfid", "fid-inf")


def caution(results: Sequence[dict[str, Any]], options: Options) -> None:
    """Say what a reader of the numbers could miss."""
    for r in results:
        dim = r["protocol"].get("features_dim")
        if r["metric"] in CAUTIONED[:2] and dim and r["n"] <= dim:
            ui.warn(f"{r['metric']} of {r['n']} samples with {dim} features is far too high: take more samples, or kid")
        if r["metric"] in CAUTIONED and dim and r["n_reference"] is not None and r["n_reference"] <= dim:
            few = f"{counted(r['n_reference'], 'reference')} with {dim} features"
            ui.warn(f"{r['metric']} against {few} means little: take more references, or kid")
    said = {remark: bool(r.get("samples_subset")) for r in results for remark in r.get("remarks", ())}
    for remark, part in said.items():
        if not (part and "reference without" in remark):  # only a part of the samples is wanted
            ui.warn(remark)
    told = [r["protocol"] for r in results if r["protocol"].get("features_kind") == "mnist"]
    if options.features is None and told and "mnist" not in str(told[0].get("reference", "mnist")).lower():
        ui.warn("the shipped network knows digits only: for other pictures give Inception weights with --features")


# -- options without effect ------------------------------------------------------------------------------------------

SAMPLING = ("sampler", "steps", "guidance_scale", "guidance_interval", "precision", "overrides")
MADE = {
    "files": "its pictures are made already",
    "codec": "a codec reconstructs, it does not sample",
    "model": "no metric looks at samples",
}


def ineffective(options: Options, found: Target, built: Sequence[Any], reference: Any) -> dict[str, str]:
    """{option: why it has no effect} of this evaluation, whether it was given or not."""
    protocol = protocols.protocol(options.protocol)
    of_images = [m for m in built if not measuring.of_model(m)]
    networked = [m for m in of_images if measuring.kind_of(m) != measuring.NO_NETWORK]
    compares = any(m.needs_reference for m in of_images) or any(map(needs_data, built))
    out: dict[str, str] = {}
    if not isinstance(found.pictures, Sampled):
        out |= dict.fromkeys(SAMPLING, MADE[found.kind])
    if found.kind == "files":
        out["weights"] = MADE["files"]
    if found.kind != "model" and not any(getattr(m, "uses_seed", False) for m in built):
        out["seed"] = "nothing is drawn"
    elif found.kind != "model" and protocol.seed is not None:
        out["seed"] = f"protocol {protocol.name} prescribes {protocol.seed}"
    if found.kind == "files" and not networked:
        out |= dict.fromkeys(("batch_size", "device"), "no metric runs a network on batches")
    if not networked:
        out["features"] = "no metric looks at features"
    if not compares and found.kind != "codec":
        out |= dict.fromkeys(("reference", "split"), "no metric compares with a reference")
    elif isinstance(reference, Statistics):
        out["split"] = "the reference is statistics"
    if all(measuring.of_model(m) and getattr(m, "n", None) for m in built):
        out["n"] = "the metrics say their own"
    if not any(getattr(m, "uses_held_out", False) for m in of_images):
        out["held_out"] = "only memorisation looks at held-out images"
    return out


def tell_ineffective(target: str, options: Options, found: Target, built: Sequence[Any], reference: Any) -> None:
    for name, why in ineffective(options, found, built, reference).items():
        if name in options.named:
            given = " ".join(options.overrides) if name == "overrides" else "--" + name.replace("_", "-")
            ui.warn(f"{given} has no effect on {target}: {why}")


# -- what is measured ------------------------------------------------------------------------------------------------


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
    subject = Subject(loaded.view, loaded.codec, own, None, device, options.batch_size, options.n, processes.shares)
    shape = data["image_size"], data["image_channels"]
    found = Target("model", *shape, device, None, protocol.uint8, data, facts, subject)
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
    if not hasattr(dataset, "source"):
        raise VgmError(f"{target} holds latents; images are measured", "give the images themselves", USAGE)
    tell_unfinished(Path(target), len(dataset))
    pictures = DataPictures(dataset, options.n, first=protocol.name != "vgm")
    tell_number(target, options.n, len(dataset))
    facts = {k.replace("reference", "samples"): v for k, v in pictures.facts.items()}
    size, _, channels = pictures.shape()
    return Target("files", size, channels, device_for(options.device), pictures, facts=facts)


BY_PRODUCTS = re.compile(r"(.*/)?(grid|reals|sample-\d+-.*|.*-trace|.*-again)(_\d+)?\.png")


def by_product(name: str, read: Callable[[], File]) -> bool:
    """A picture of ours that shows others: grids, traces, reruns. Told by its name and by what it remembers."""
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
    """Say so where -n is not the number of pictures in a set."""
    if asked is not None and asked > there:
        ui.warn(f"-n {asked}: {where} has {counted(there, 'picture')}, all are measured")
    elif asked is not None and asked < there:
        ui.info(f"{asked} of the {counted(there, 'picture')} of {where} are measured")


class Sampled:
    """A plan's images, made when they are asked for: batch by batch, as 8-bit pictures."""

    def __init__(self, loaded: ckpt.Loaded, plan: generate.Plan, device: torch.device, rule: str):
        self.loaded, self.plan, self.device, self.rule = loaded, plan, device, rule
        self.labels = np.array(plan.labels) if plan.labels else None
        self.facts: dict[str, Any] = {}
        self.info: dict[str, Any] = {}  # what the sampler reports, e.g. nfe
        self.progress: Any = None  # told of every step
        self.after = 0  # where these begin in the progress

    def __len__(self) -> int:
        return self.plan.n

    def shape(self) -> tuple[int, int, int]:
        data = self.loaded.header.data
        return data["image_size"], data["image_size"], data["image_channels"]

    def batch(self, first: int, last: int) -> np.ndarray:
        progress: Any = Part(self.progress, self.after) if self.progress is not None else None
        batches = generate.stream(self.loaded, self.plan, self.device, first, last, info=self.info, progress=progress)
        x = torch.cat([x.cpu() for x, _ in batches])
        return to_uint8(x, self.rule).permute(0, 2, 3, 1).numpy()


class Part:
    """Progress of what comes after `before` others."""

    def __init__(self, progress: Progress, before: int):
        self.progress, self.before = progress, before

    def update(self, done: float, note: str | None = None) -> None:
        self.progress.update(self.before + done, note)


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
    return Target("codec", size, channels, device, pictures, protocol.uint8, data, facts, reference=originals)


# -- what it is compared with ----------------------------------------------------------------------------------------


def open_reference(options: Options, target: Target) -> Any:
    """Pictures at the samples' size, or statistics; by default the data that a model was trained on, as it saw them."""
    where = options.reference or (trained_on(target.data, target.facts["model"]) if target.data else None)
    if where is None:
        raise VgmError("a folder or .npz needs --reference", "data or a statistics file", USAGE)
    if holds_statistics(Path(where)):
        return read_statistics(where)
    channels = target.channels if options.reference is None else None
    dataset = open_data(where, target.size, channels, options.split)
    pictures = DataPictures(dataset)
    found = dataset.source.header(int(dataset.rows[0]))[:2]
    if found != (target.size, target.size):
        pictures.facts["reference_resized"] = f"from {found[0]}×{found[1]} (the first) to {target.size}×{target.size}"
    return pictures


def scored(options: Options, target: Target, reference: Any) -> Any:
    """Images to score by a model, as it sees them."""
    if isinstance(reference, DataPictures) and reference.dataset.channels == target.channels:
        return reference.dataset
    where = options.reference or trained_on(target.data, target.facts["model"])
    if holds_statistics(Path(where)):
        raise VgmError("a model scores images, not statistics", "give --reference DATA", USAGE)
    return open_data(where, target.size, target.channels, options.split)


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
        ui.info(f"reference: {where}, as {model} says")
    return where


def open_data(where: str, size: int | None, channels: int | None, split: str | None = None) -> Any:
    """Images at a size; says so when they had another. VgmError: no data set, such as a run with its previews."""
    if (Path(where) / "checkpoints").is_dir():
        raise VgmError(
            f"{where} is a run, not data", "name the images: a folder, .zip, .tar, .npz or statistics", USAGE
        )
    dataset = open_dataset(where, size=size, channels=channels, split=split, without=by_product)
    if not hasattr(dataset, "source"):
        raise VgmError(f"{where} holds latents; images are compared", "give the images themselves", USAGE)
    found = dataset.source.header(int(dataset.rows[0]))[:2]
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
    device: str | None = None,
    overwrite: bool = False,
    named: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """`vgm evaluate stats`: statistics of a data set, or those of another format, as .safetensors. named: the options
    that the user gave."""
    processes.join()
    rule = protocols.protocol(protocol).resize
    where = pick_device(device)
    processes.on_main(lambda: check_target(out, overwrite))
    if holds_statistics(Path(data)):
        for name in sorted(named - {"out", "overwrite"}):
            ui.warn(f"--{name.replace('_', '-')} has no effect on {data}: these are statistics already")
        return restate(read_statistics(data), out)
    dataset = open_data(data, size, None, split)
    net = networks.choose(features, dataset.facts.size, dataset.facts.channels, None, rule)
    return save_statistics(DataPictures(dataset), net, out, batch_size, where, keep_features)


def restate(stats: Statistics, out: Path) -> dict[str, Any]:
    """Another format's statistics in ours; a network that the file does not name stays unknown."""
    assert stats.moments is not None
    facts = {"reference": str(stats.path), "reference_fingerprint": stats.fingerprint(), **stats.facts}
    if processes.rank_world()[0] == 0:
        write_statistics(out, stats.moments, stats.spatial, facts, stats.pool)
    return {**facts, "n": stats.n, "dim": stats.moments.dim, "out": str(out)}
