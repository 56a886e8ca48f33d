"""The numbers of `vgm evaluate`: every metric over both sides, each with the protocol that it depends on."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vgm_cli import __version__
from vgm_cli.engine import processes
from vgm_cli.engine.evaluate.measure import (
    Progress,
    measure,
    measure_reference,
    refuse_few,
    save_statistics,
    source_facts,
)
from vgm_cli.errors import CHECK_FAILED, FAILED, USAGE, VgmError, unknown
from vgm_cli.metrics import features as networks
from vgm_cli.metrics.base import OF_NETWORK, Measured, Subject, Value
from vgm_cli.metrics.features import FeatureNet
from vgm_cli.metrics.pictures import ArrayPictures, DataPictures, InColour, Pictures, items_of, pairs, texts_of
from vgm_cli.metrics.statistics import Statistics, read_statistics
from vgm_cli.registry import registry
from vgm_cli.ui import ui
from vgm_cli.yaml_text import parse_yaml

ALIASES = {"pr": "precision-recall", "prdc": "density-coverage", "is": "inception-score", "bpd": "bits-per-dim"}
NO_NETWORK = "pixels"


def evaluate(
    images: np.ndarray | Pictures | None,
    *,
    reference: Any = None,
    metrics: Sequence[str] = ("fid",),
    features: str | Sequence[str] | None = None,
    labels: Any = None,
    batch_size: int = 100,
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
    save_stats: Path | None = None,
    protocol: Mapping[str, Any] | None = None,
    resize: str = "own",
    subject: Subject | None = None,
    held_out: Any = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Numbers of every metric, each a dict of metric, value, uncertainty, n, n_reference, protocol, `facts`, seed, vgm,
    time. All processes of torch.distributed share the work and get the same list.

    images: uint8 (N, H, W, C) or Pictures; None where only model metrics are asked. reference: a data set, Pictures, an
    array, a statistics file or None. metrics: names, options as "kid:subset_size=100". features: see `features.choose`.
    facts: what the samples came from. protocol: more to record. subject: for model metrics. held_out: images that no
    training saw, for memorisation. progress(images done), those of the reference first. Grey pictures against colour
    ones get three equal channels.
    Raises VgmError: unknown metric or missing reference (exit code 2), missing weights (4).
    """
    pictures = ArrayPictures(images, labels) if isinstance(images, np.ndarray) else images
    chosen = [(text, build_metric(text)) for text in metrics]
    of_images = [m for _, m in chosen if not of_model(m)]
    sides = Sides(pictures, as_reference(reference), features, resize, batch_size, torch.device(device), progress)
    sides.held_out = as_reference(held_out)
    if any(m.needs_reference for m in of_images):
        sides.in_common()
    sides.plan(of_images)
    if save_stats is not None:
        sides.first_network()
    results: list[dict[str, Any]] = []
    for name, metric in chosen:
        began = time.time()
        if of_model(metric):
            if subject is None:
                raise VgmError(
                    f"{name} is measured on a model, not on images",
                    "give a run or checkpoint of a generator; a codec has none of its own, models on its codes do",
                    USAGE,
                )
            values = metric(subject, seed)
            data = {"features": "none", **source_facts(DataPictures(subject.dataset) if subject.dataset else None)}
            counts: tuple[int | None, int | None] = (subject.n, None)
            more: Mapping[str, Any] = {"name": (protocol or {}).get("name", "vgm")}  # nothing is rounded to 8 bits
        else:
            values, data, counts = sides.values(metric, seed)
            more = {"name": "vgm", **(protocol or {})}
            if metric.needs_reference and sides.mismatch:
                more["channels"] = sides.mismatch
        shared = {"protocol": {**more, **data}, "facts": facts or {}, "seed": seed}
        results += [result_of(v, counts, shared, time.time() - began) for v in values]
    if save_stats is not None:
        sides.save(save_stats)
    return processes.from_main(results)


def result_of(
    value: Value, counts: tuple[int | None, int | None], shared: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """One number as it is printed, stored and compared."""
    return {
        "metric": value.metric,
        "value": value.value,
        "uncertainty": value.uncertainty if value.uncertainty is None or math.isfinite(value.uncertainty) else None,
        "n": counts[0] if value.n is None else value.n,
        "n_reference": counts[1],
        "protocol": {**shared["protocol"], "options": dict(value.options)},
        **shared["facts"],
        **value.facts,
        **({"remarks": list(value.remarks)} if value.remarks else {}),
        "seed": shared["seed"],
        "vgm": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 2),
    }


def refuse_non_finite(results: Sequence[Mapping[str, Any]]) -> None:
    """VgmError (exit code 1): some number is NaN or infinite; of identical pairs infinity is right."""
    bad = [r["metric"] for r in results if not finite(r)]
    if bad:
        hint = "the samples, the reference or a network's weights are out of all range"
        raise VgmError(f"{', '.join(bad)} came out as NaN or infinity", hint, FAILED)


def finite(result: Mapping[str, Any]) -> bool:
    """Whether a result's value is a number to be shown."""
    return math.isfinite(result["value"]) or (result["value"] == math.inf and bool(result.get("identical_pairs")))


def of_model(metric: Any) -> bool:
    return bool(metric.needs_model)


def full_name(text: str) -> str:
    """ "pr:k=5" -> "precision-recall:k=5"."""
    name, colon, options = text.partition(":")
    return ALIASES.get(name, name) + colon + options


def build_metric(text: str) -> Any:
    """ "fid" or "kid:subsets=10:subset_size=100" -> the metric."""
    name, *options = full_name(text).split(":")
    node: dict[str, Any] = {"name": name}
    for option in options:
        key, eq, value = option.partition("=")
        if not eq:
            raise VgmError(f"'{option}' is not KEY=VALUE", f"example: {name}:{option}=1", USAGE)
        node[key] = parse_yaml(value, option)
    return registry().build("metric", node)


def as_reference(reference: Any) -> Pictures | Statistics | None:
    if isinstance(reference, str | Path):
        return read_statistics(reference)
    if isinstance(reference, np.ndarray):
        return ArrayPictures(reference, facts={"reference": "an array"})
    if reference is None or isinstance(reference, Statistics | Pictures):
        return reference
    return DataPictures(reference)


class Sides:
    """Samples and reference under every network that the metrics want."""

    def __init__(
        self,
        pictures: Pictures | None,  # the samples
        reference: Pictures | Statistics | None,  # images, or statistics of them; None: no metric compares
        features: Any,  # {name: network}, as the metrics want them
        resize: str,  # how images are brought to a network's side
        batch_size: int,  # images per forward
        device: torch.device,  # where networks run
        progress: Progress | None = None,  # called with what is done; None: silence
    ):
        self.pictures, self.reference, self.features, self.resize = pictures, reference, features, resize
        self.batch_size, self.device, self.progress = batch_size, device, progress
        self.keys: dict[str | None, str] = {}  # the kind that metrics insist on (None is any) -> its network's key
        self.nets: dict[str, FeatureNet | None] = {}  # by weights and resize rule, so that one network runs once
        self.needs: dict[str, tuple[set[str], set[str]]] = {}
        self.held_out: Pictures | Statistics | None = None
        self.mismatch = ""  # how grey and colour were brought together, for the protocol
        self.samples: dict[str, Measured] = {}
        self.references: dict[str, Measured] = {}

    def in_common(self) -> None:
        """Make both sides comparable: grey pictures on one side become colour where the other side is. Warn where
        statistics are those of other images than the samples."""
        if self.pictures is None or self.reference is None:
            return
        h, w, c = self.pictures.shape()
        if isinstance(self.reference, Statistics):
            made_of = self.reference.facts.get("reference_shape") or [h, w, c]
            if list(made_of) != [h, w, c]:
                mine, theirs = (f"{a[1]}×{a[0]} {'grey' if a[2] == 1 else 'colour'}" for a in ((h, w, c), made_of))
                self.mismatch = f"{mine} samples, statistics of {theirs} pictures"
                ui.warn(f"{self.reference.path}: {self.mismatch}")
            return
        channels = c, self.reference.shape()[2]
        if len(set(channels)) > 1:
            grey, colour = ("samples", "references") if c == 1 else ("references", "samples")
            self.mismatch = f"grey {grey} against colour {colour}: the {grey} have three equal channels"
            ui.warn(self.mismatch)
        if max(channels) == 3:
            self.pictures, self.reference = in_colour(self.pictures), in_colour(self.reference)
            if self.held_out is not None and not isinstance(self.held_out, Statistics):
                self.held_out = in_colour(self.held_out)

    def plan(self, metrics: Sequence[Any]) -> None:
        """Collect what each network has to compute for all metrics together. Everything that can be refused is refused
        here, before any work."""
        for metric in metrics:
            if self.pictures is None:
                raise VgmError(f"{type(metric).__name__} needs images", code=USAGE)
            kind = kind_of(metric)
            if kind not in self.keys:
                h, _, c = self.pictures.shape()
                looks = kind != NO_NETWORK
                net = networks.choose(self.features, h, c, kind, self.resize) if looks else None
                key = f"{net.sha256} {net.resize}" if net is not None else NO_NETWORK
                self.keys[kind] = key
                self.nets.setdefault(key, net)
                self.needs.setdefault(key, (set(), set()))
            key = self.keys[kind]
            self._check(metric, self.nets[key])
            self._count(metric)
            self.needs[key][0].update(metric.needs_samples)
            self.needs[key][1].update(metric.needs_reference)

    def _check(self, metric: Any, net: FeatureNet | None) -> None:
        name = type(metric).__name__
        listed = (c for c in registry().components.values() if c.kind == "metric")
        name = next((c.name for c in listed if c.target.endswith(f":{name}")), name)  # as the user wrote it
        assert self.pictures is not None
        for need in {*metric.needs_samples, *metric.needs_reference} & set(OF_NETWORK):
            if net is not None and OF_NETWORK[need] not in net.outputs:
                have = f"{OF_NETWORK[need]} features"
                hint = "give Inception weights: --features inception.pth"
                raise VgmError(f"{name} needs {have}, which {net.name} does not have", hint, USAGE)
        if "labels" in metric.needs_samples and self.pictures.labels is None:
            raise VgmError(f"{name} needs labelled samples", "conditional models and .npz with arr_1 have them", USAGE)
        if "texts" in metric.needs_samples and texts_of(self.pictures) is None:
            raise VgmError(f"{name} needs the samples' texts", f"{name}:captions=FILE, one a line", USAGE)
        if metric.needs_reference and self.reference is None:
            raise VgmError(f"{name} compares with a reference", "give --reference: data or a statistics file", USAGE)

    def _count(self, metric: Any) -> None:
        """VgmError: the metric cannot be computed on so many images of that shape, or on pairs of these two sets."""
        assert self.pictures is not None
        r = self.reference if metric.needs_reference else None
        if metric.pairs and r is not None and not isinstance(r, Statistics):
            pairs(items_of(self.pictures), items_of(r))
        for n in (len(self.pictures), count_of(r)):
            if n is not None:
                refuse_few(n)
        metric.check(len(self.pictures), count_of(r), self.pictures.shape())

    def values(self, metric: Any, seed: int) -> tuple[list[Value], dict[str, Any], tuple[int | None, int | None]]:
        """(numbers, protocol, counts of either side); numbers on the first process only."""
        key = self.keys[kind_of(metric)]
        net, of_reference = self.nets[key], self.needs[key][1]
        assert self.pictures is not None
        if key not in self.references:  # before the samples: what a statistics file lacks is known before they are made
            where = self.reference, of_reference, net, self.batch_size, self.device
            self.references[key] = measure_reference(*where, progress=self.progress)
        if not self.samples:
            wants = {k: (self.nets[k], self.needs[k][0]) for k in self.nets}
            there = count_of(self.reference) if of_reference and not isinstance(self.reference, Statistics) else 0
            progress = None if self.progress is None else shifted(self.progress, there)
            self.samples = measure(self.pictures, wants, self.batch_size, self.device, progress)
        samples, reference = self.samples[key], self.references[key]
        more = {}
        if metric.uses_held_out and self.held_out is not None:
            more["held_out"] = measure_reference(self.held_out, of_reference, net, self.batch_size, self.device)
        values = metric(samples, reference, seed, **more) if processes.rank_world()[0] == 0 else []
        data: dict[str, Any] = net.describe() if net is not None else {"features": NO_NETWORK}
        counts: tuple[int | None, int | None] = (samples.n, None)
        if metric.needs_reference:
            data |= source_facts(self.reference)
            if more:
                data["held_out"] = source_facts(self.held_out).get("reference_fingerprint")
            counts = (samples.n, reference.n)
        return values, {**data, "image_shape": list(self.pictures.shape())}, counts

    def save(self, path: Path) -> None:
        """The reference's statistics under the first network."""
        assert self.reference is not None
        save_statistics(self.reference, self.first_network(), path, self.batch_size, self.device)

    def first_network(self) -> FeatureNet:
        """The network that a reference's statistics are saved for. VgmError: no metric uses one."""
        net = next((n for n in self.nets.values() if n is not None), None)
        if net is None or self.reference is None:
            raise VgmError("there are no statistics to write: no metric looks at features of a reference", code=USAGE)
        return net


def in_colour(pictures: Pictures) -> Pictures:
    return pictures if pictures.shape()[2] == 3 else InColour(pictures)


def count_of(reference: Pictures | Statistics | None) -> int | None:
    return reference.n if isinstance(reference, Statistics) else None if reference is None else len(reference)


def shifted(progress: Progress, by: int | None) -> Progress:
    return lambda done: progress((by or 0) + done)


def kind_of(metric: Any) -> str | None:
    """The kind of feature network that a metric requires: None for any, NO_NETWORK for metrics that look at pixels."""
    needs = {*metric.needs_samples, *metric.needs_reference}
    return metric.network if needs & set(OF_NETWORK) else NO_NETWORK


# -- assertions ------------------------------------------------------------------------------------------------------

ASSERTION = re.compile(r"\s*([A-Za-z][\w-]*)\s*(<=|>=|<|>)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")
HOLDS = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def parse_assertion(expression: str) -> tuple[str, str, float]:
    """'fid<5' -> ("fid", "<", 5.0). VgmError (exit code 2): not of that form."""
    found = ASSERTION.fullmatch(expression)
    try:
        if found:
            return found[1], found[2], float(found[3])
    except ValueError:
        pass
    raise VgmError(f"'{expression}' is no assertion", 'example: --assert "fid<5", with <, <=, > or >=', USAGE)


def check_names(expressions: Sequence[str], metrics: Sequence[str]) -> None:
    """VgmError (exit code 2), before anything is measured: an assertion about a number that no metric gives."""
    names: set[str] = set()
    for text in metrics:
        names.update(build_metric(text).gives or (full_name(text).partition(":")[0],))
    for expression in expressions:
        name = parse_assertion(expression)[0]
        if ALIASES.get(name, name) not in names:
            raise unknown("number in --assert", name, names)


def check_assertion(expression: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Raises VgmError: it does not hold (exit code 3), it names no measured number, or is not understood (2)."""
    name, sign, limit = parse_assertion(expression)
    found = [r for r in results if r["metric"] == ALIASES.get(name, name)]
    if not found:
        raise unknown("number in --assert", name, [r["metric"] for r in results])
    for r in found:
        if not HOLDS[sign](r["value"], limit):  # not-a-number fails every comparison
            raise VgmError(f"{expression} does not hold: {name} is {r['value']:.6g}", code=CHECK_FAILED)
