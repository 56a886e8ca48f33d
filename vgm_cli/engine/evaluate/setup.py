"""What `vgm evaluate` does around the metrics: the protocol, the reference, what had no effect, work over processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vgm_cli.engine import processes
from vgm_cli.engine.evaluate import run as measuring
from vgm_cli.engine.evaluate.measure import save_statistics
from vgm_cli.engine.evaluate.targets import Options, Sampled, Target, open_data, open_target, trained_on
from vgm_cli.engine.processes import pick_device
from vgm_cli.engine.sample.setup import warn_of_ignored
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics import features as networks
from vgm_cli.metrics import protocols
from vgm_cli.metrics.pictures import DataPictures, Pictures
from vgm_cli.metrics.protocols import Protocol
from vgm_cli.metrics.statistics import Statistics, check_target, holds_statistics, read_statistics, write_statistics
from vgm_cli.ui import Progress, counted, ui


def evaluate_target(target: str, options: Options) -> list[dict[str, Any]]:
    """Results of every metric for a run, checkpoint, codec, folder or .npz; see engine.evaluate for what one holds."""
    processes.join()
    protocol = protocols.protocol(options.protocol)
    metrics, built = metrics_of(options.metrics or protocol.metrics, protocol)
    if options.metrics:
        measuring.check_names(options.assertions, metrics)
    pick_device(options.device)
    found = open_target(target, options, protocol, sampled=not all(map(measuring.of_model, built)))
    if found.kind == "codec" and not options.metrics and protocol.name == "vgm":
        metrics, built = metrics_of((*protocol.metrics, "psnr"), protocol)
    if options.features is None and protocol.kind and found.channels == 3:
        options.features = protocol.kind  # the shipped network is none that numbers were published with
    measuring.check_names(options.assertions, metrics)
    reference = found.reference
    of_images = [m for m in built if not measuring.of_model(m)]
    if reference is None and any(m.needs_reference for m in of_images):
        reference = open_reference(options, found)
    check_partners(target, options, found, metrics, built, reference)
    if found.subject is not None and any(map(needs_data, built)):
        found.subject.dataset = scored(options, found, reference)
    tell_ineffective(target, options, found, built, reference)
    sides: list[Any] = [reference, found.pictures]
    total = sum(len(side) for side in sides if isinstance(side, Pictures))
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


def check_partners(
    target: str, options: Options, found: Target, metrics: Sequence[str], built: Sequence[Any], reference: Any
) -> None:
    """VgmError: a metric compares each sample with a picture of its own, but the model was told of none."""
    if not isinstance(found.pictures, Sampled) or "conditions" in found.facts or isinstance(reference, Statistics):
        return
    if options.reference is not None and len(found.pictures) == len(reference):
        return  # by position, such as the same seeds' images by another sampler
    if name := next((n for n, m in zip(metrics, built) if m.pairs), None):
        raise VgmError(
            f"{name} compares every sample with the picture of its own text or hint, and {target} is told neither",
            "fid, kid and precision-recall compare sets; pairs go by position where --reference has -n pictures",
            USAGE,
        )


def needs_data(metric: Any) -> bool:
    return measuring.of_model(metric) and metric.needs_data


CAUTIONED = ("fid", "fd-dinov2", "sfid", "fid-inf")


def caution(results: Sequence[dict[str, Any]], options: Options) -> None:
    """Warn of what a reader of the numbers could overlook, such as few samples."""
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
    protocols_of_digits = [r["protocol"] for r in results if r["protocol"].get("features_kind") == "mnist"]
    if (
        options.features is None
        and protocols_of_digits
        and "mnist" not in str(protocols_of_digits[0].get("reference", "mnist")).lower()
    ):
        ui.warn("this network knows digits only: --features colour is the shipped one of other pictures")


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
    if found.kind != "model" and not any(m.uses_seed for m in built):
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
    if all(measuring.of_model(m) and m.n for m in built):
        out["n"] = "the metrics say their own"
    if not any(m.uses_held_out for m in of_images):
        out["held_out"] = "only memorisation looks at held-out images"
    return out


def tell_ineffective(target: str, options: Options, found: Target, built: Sequence[Any], reference: Any) -> None:
    for name, why in ineffective(options, found, built, reference).items():
        if name in options.named:
            given = " ".join(options.overrides) if name == "overrides" else "--" + name.replace("_", "-")
            ui.warn(f"{given} has no effect on {target}: {why}")


# -- what is measured ------------------------------------------------------------------------------------------------


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
    wanted = features if features is not None or dataset.facts.channels == 1 else protocols.protocol(protocol).kind
    net = networks.choose(wanted, dataset.facts.size, dataset.facts.channels, None, rule)
    return save_statistics(DataPictures(dataset), net, out, batch_size, where, keep_features)


def restate(stats: Statistics, out: Path) -> dict[str, Any]:
    """Write statistics that were read in another format as ours. A network that their file does not name stays
    unknown."""
    assert stats.moments is not None
    facts = {"reference": str(stats.path), "reference_fingerprint": stats.fingerprint(), **stats.facts}
    if processes.rank_world()[0] == 0:
        write_statistics(out, stats.moments, stats.spatial, facts, stats.pool)
    return {**facts, "n": stats.n, "dim": stats.moments.dim, "out": str(out)}
