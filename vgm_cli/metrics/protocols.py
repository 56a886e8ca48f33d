"""Named ways of measuring, as published numbers were measured. A protocol sets what the command line leaves open, and a
result records every point in which it departs from the protocol it names. Torch-free.

adm             openai/guided-diffusion evaluations/ and scripts/image_sample.py
edm             NVlabs/edm fid.py and generate.py
clean           GaParmar/clean-fid, mode "clean" (Parmar et al., arXiv:2104.11222)
torch-fidelity  toshas/torch-fidelity, its defaults
mar             LTH14/mar engine_mar.py: torch-fidelity's numbers against ADM's ImageNet statistics
vgm             this tool: features by the data, few samples, uncertainty always
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vgm_cli.errors import unknown


@dataclass(frozen=True)
class Protocol:
    """uint8: rule of vgm_cli.images; resize: "own" (the network's) or "clean"; n: samples; kind: of feature network,
    None for any; weights, reference: what published numbers used, in words; metrics: what is measured unless asked
    otherwise; options: keywords of metrics; seed: of shuffles and subsets, None for the command's."""

    name: str
    uint8: str
    resize: str
    n: int
    kind: str | None
    weights: str
    reference: str
    metrics: tuple[str, ...] = ("fid",)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int | None = None


FIDELITY = {"inception-score": {"splits": 10, "shuffle": True}, "kid": {"subsets": 100, "subset_size": 1000}}
PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("vgm", "edm", "own", 2000, None, "by the data", "the data a run was trained on"),
        Protocol(
            "adm",
            "adm",
            "own",
            50_000,
            "inception",
            "TensorFlow graph 2015-12-05 (its PyTorch conversion gives the same features)",
            "the published reference batch: its mu, sigma, mu_s, sigma_s, and 10,000 images for precision and recall",
            ("fid", "sfid", "inception-score", "precision-recall"),
            {"inception-score": {"split_size": 5000, "shuffle": False}, "precision-recall": {"k": 3}},
        ),
        Protocol(
            "edm",
            "edm",
            "own",
            50_000,
            "inception",
            "NVIDIA's TorchScript 2015-12-05",
            "statistics of the whole training set",
        ),
        Protocol(
            "clean",
            "round",
            "clean",
            50_000,
            "inception",
            "NVIDIA's TorchScript 2015-12-05, its resize left out",
            "clean-fid's statistics, or a folder",
            ("fid", "kid"),
            {"kid": {"subsets": 100, "subset_size": 1000}},
        ),
        Protocol(
            "torch-fidelity",
            "round",
            "own",
            50_000,
            "inception",
            "pt_inception-2015-12-05 (pytorch-fid, torch-fidelity)",
            "a folder of images",
            ("inception-score", "fid", "kid", "precision-recall"),
            {**FIDELITY, "precision-recall": {"k": 3}},
            seed=2020,
        ),
        Protocol(
            "mar",
            "round",
            "own",
            50_000,
            "inception",
            "pt_inception-2015-12-05 (pytorch-fid, torch-fidelity)",
            "mu and sigma of ADM's ImageNet 256 reference batch",
            ("fid", "inception-score"),
            FIDELITY,
            seed=2020,
        ),
    )
}


def protocol(name: str) -> Protocol:
    """VgmError (exit code 2): unknown name."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def prescribed(p: Protocol) -> dict[str, Any]:
    """What a published protocol asks for and no program can check, for the result; {} of this tool's own."""
    return {} if p.name == "vgm" else {"prescribes": {"n": p.n, "weights": p.weights, "reference": p.reference}}


def with_options(metric: str, p: Protocol) -> str:
    """ "kid" -> "kid:subsets=100:subset_size=1000" where the protocol says so; what is written out already stays."""
    name, *own = metric.split(":")
    given = {o.partition("=")[0] for o in own}
    more = [f"{k}={str(v).lower()}" for k, v in p.options.get(name, {}).items() if k not in given]
    return ":".join([name, *own, *more])


def deviations(p: Protocol, result: Mapping[str, Any], uint8: str | None) -> list[str]:
    """In what a result departs from protocol `p`. uint8: the rule used here, None where files came as they are."""
    out: list[str] = []
    if p.name == "vgm":
        return out
    if result["n"] != p.n:
        out.append(f"{result['n']:,} samples instead of {p.n:,}")
    if uint8 is not None and uint8 != p.uint8:
        out.append(f"uint8 rule {uint8} instead of {p.uint8}")
    kind = result["protocol"].get("features_kind")
    if p.kind and kind not in (p.kind, None):
        out.append(f"{kind} features instead of {p.kind}")
    for key, value in p.options.get(result["metric"], {}).items():
        used = result["protocol"]["options"].get(key, value)
        if used != value:
            out.append(f"{key} {used} instead of {value}")
    return out
