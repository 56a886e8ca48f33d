"""Whether two numbers may be compared: everything that a metric depends on, other than the model, must be equal.
Torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgm_cli import foreign, limits
from vgm_cli.data.fingerprint import older
from vgm_cli.errors import FAILED, USAGE, VgmError

# protocol entry -> why a difference forbids the comparison
MUST_AGREE = {
    "features_sha256": "features come from different networks",
    "features": "features come from different networks",
    "resize": "images were resized by different rules",
    "uint8": "samples were rounded to 8 bits by different rules",
    "reference_fingerprint": "the references differ",
    "reference_subset": "different parts of the reference were taken",
    "held_out": "the held-out images differ",
    "image_shape": "the images differ in size or channels",
}
BIASED = ("fid", "sfid", "fd-dinov2", "precision", "recall", "density", "coverage", "inception-score", "cmmd")
HARMLESS = ("seed", "vgm")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The list that `vgm evaluate --out` wrote. VgmError: missing (exit code 2), something else (1)."""
    if not os.path.lexists(path):
        raise VgmError(f"no such file: {path}", "write one with `vgm evaluate … --out FILE`", USAGE)
    try:
        found = limits.parse_json(limits.read_text(path), str(path))
    except (OSError, ValueError) as e:
        raise VgmError(f"{path} is not a results file: {limits.short(str(e))}", code=FAILED) from e
    results = found if isinstance(found, list) else [found]
    if not all(isinstance(r, dict) and {"metric", "value", "protocol"} <= set(r) for r in results):
        raise VgmError(f"{path} does not hold results of `vgm evaluate`", code=FAILED)
    for r in results:
        foreign.check(r, "result", path)
        if r["value"] is None:  # JSON has no infinity
            if not r.get("identical_pairs"):
                raise VgmError(f"{path}: {r['metric']} is not a number", "measure it again", FAILED)
            r["value"] = math.inf
    return results


def compare(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per metric that both have: metric, values, comparable, reasons (why not), notes, and for comparable
    ones with uncertainties sigmas, the difference in its standard deviations."""
    second = {r["metric"]: r for r in b}
    return [compare_one(r, second[r["metric"]]) for r in a if r["metric"] in second]


def compare_one(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    reasons: list[str] = []
    notes: list[str] = []
    pa, pb = a["protocol"], b["protocol"]
    for key, reason in MUST_AGREE.items():
        x, y = pa.get(key), pb.get(key)
        if older(x, y):
            notes.append(f"{key}: of different versions, not compared")
        elif x != y and reason not in [r.partition(":")[0] for r in reasons]:
            reasons.append(f"{reason}: {show(x)} and {show(y)}")
    options = {**(pa.get("options") or {})}, {**(pb.get("options") or {})}
    for key in sorted(set(options[0]) | set(options[1])):
        x, y = options[0].get(key), options[1].get(key)
        if x != y:
            (notes if key == "uncertainty" else reasons).append(f"{key} differs: {show(x)} and {show(y)}")
    if a.get("n") != b.get("n"):
        text = f"made of {show(a.get('n'))} and of {show(b.get('n'))} samples"
        biased = a["metric"] in BIASED
        (reasons if biased else notes).append(text + (f", and {a['metric']} depends on their number" if biased else ""))
    if a.get("n_reference") != b.get("n_reference") and not any("reference" in r for r in reasons):
        reasons.append(f"references of {show(a.get('n_reference'))} and of {show(b.get('n_reference'))} images")
    if pa.get("name") != pb.get("name"):
        notes.append(f"named protocols {show(pa.get('name'))} and {show(pb.get('name'))}")
    notes += [f"{key}: {show(a.get(key))} and {show(b.get(key))}" for key in HARMLESS if a.get(key) != b.get(key)]
    out: dict[str, Any] = {"metric": a["metric"], "values": [a["value"], b["value"]], "comparable": not reasons,
                           "reasons": reasons, "notes": notes}  # fmt: skip
    spread = math.hypot(a.get("uncertainty") or 0, b.get("uncertainty") or 0)
    if not reasons and spread > 0 and None not in (a.get("uncertainty"), b.get("uncertainty")):
        out["sigmas"] = abs(a["value"] - b["value"]) / spread
    return out


def show(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"
