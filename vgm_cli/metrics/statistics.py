"""Statistics of a reference: written as .safetensors, read in every format that is about.

Ours: mu (D,), sigma (D, D), mu_s, sigma_s where the network has spatial features, optionally pool (N, D); metadata
says the count, the feature network's sha256, resize, the data and its fingerprint. Read by key: `mu, sigma` (EDM,
StudioGAN, clean-fid, pytorch-fid, torch-fidelity), `ref_mu, ref_sigma`, `real_mean, real_cov` (MMagic), `fid: {mu,
sigma}` (EDM2), activations `pool_3` (score_sde), `feats` (clean-fid), `real_feats` (StudioGAN), and ADM's reference
batch (mu, sigma, mu_s, sigma_s and images arr_0). Pickles are read only if they hold nothing but numpy arrays.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli import atomic, foreign, limits
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.metrics.moments import Moments
from vgm_cli.weights import reading
from vgm_cli.weights.contents import contents

SUFFIXES = (".safetensors", ".npz", ".npy", ".pkl", ".pickle", ".pt", ".pth")
MEANS = (("mu", "sigma"), ("ref_mu", "ref_sigma"), ("real_mean", "real_cov"), ("mean", "cov"))
ACTIVATIONS = ("pool_3", "feats", "real_feats", "pool")
ACCEPTED = (
    "mu and sigma, ref_mu and ref_sigma, pool_3, feats or real_feats, in .safetensors, .npz, .pt or plain pickles"
)


@dataclass
class Statistics:
    """What a file gives. images: the path, where an ADM batch holds pictures too; facts: what it says of itself."""

    path: Path
    n: int | None = None
    moments: Moments | None = None
    spatial: Moments | None = None
    pool: Tensor | None = None
    images: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Of the numbers themselves, so that the same statistics in two formats are the same reference."""
        h = hashlib.blake2b(digest_size=12)
        for moments in (self.moments, self.spatial):
            if moments is not None:
                h.update(moments.mean.float().numpy().tobytes())
                h.update(moments.cov.diagonal().float().numpy().tobytes())
        return f"statistics-{h.hexdigest()}"


def check_target(path: Path, overwrite: bool = False) -> None:
    """VgmError (exit code 2): statistics are not written there, or something is there already."""
    if path.suffix != ".safetensors":
        raise VgmError(f"statistics are written as .safetensors, not {path.suffix or 'a folder'}", code=USAGE)
    if path.is_dir():
        raise VgmError(f"{path} is a folder", code=USAGE)
    atomic.refuse_existing(path, overwrite)


def write_statistics(
    path: Path, moments: Moments, spatial: Moments | None, facts: Mapping[str, Any], pool: Tensor | None = None
) -> None:
    """Atomic. facts: features, features_sha256, resize, reference, reference_fingerprint, …"""
    check_target(path, overwrite=True)
    tensors = {"mu": moments.mean, "sigma": moments.cov}
    if spatial is not None:
        tensors |= {"mu_s": spatial.mean, "sigma_s": spatial.cov}
    if pool is not None:
        tensors["pool"] = pool.float()
    meta = {"format": "pt", "vgm.statistics": atomic.dump_json(facts), "vgm.n": str(moments.n)}
    atomic.save_safetensors({k: v.contiguous() for k, v in tensors.items()}, path, meta)


def read_statistics(path: str | Path) -> Statistics:
    """Raises VgmError: nothing there (exit code 2), unreadable or refused (1), nothing usable in it (2)."""
    path = Path(path)
    if not path.is_file():
        raise VgmError(f"no statistics file at {path}", f"accepted: {ACCEPTED}", USAGE)
    facts: dict[str, Any] = {}
    n: int | None = None
    try:
        if path.suffix == ".safetensors":
            arrays, n, facts = _safetensors(path)
        elif path.suffix in (".npz", ".npy"):
            arrays = _numpy(path)
        elif path.suffix in (".pt", ".pth", ".pkl", ".pickle"):
            arrays = contents(reading.read(path))
        else:
            raise VgmError(f"{path} is no kind of statistics file", f"accepted: {ACCEPTED}", USAGE)
    except VgmError:
        raise
    except Exception as e:  # numpy, zipfile, torch and safetensors each raise their own for a damaged file
        raise VgmError(f"{path} cannot be read: {(str(e) or type(e).__name__).splitlines()[0]}", code=FAILED) from e
    return _interpret(path, arrays, n, facts)


def _interpret(path: Path, arrays: Mapping[str, Any], n: int | None, facts: dict[str, Any]) -> Statistics:
    if isinstance(arrays.get("fid"), Mapping):  # EDM2: one mapping per metric
        arrays = {**arrays, **arrays["fid"]}
    out = Statistics(path, n, facts=facts)
    count = arrays.get("n") if n is None else n
    out.n = int(np.asarray(count)) if count is not None else None
    for mean, cov in MEANS:
        if mean in arrays and cov in arrays:
            out.moments = _moments(path, arrays[mean], arrays[cov], out.n)
            break
    if "mu_s" in arrays and "sigma_s" in arrays:
        out.spatial = _moments(path, arrays["mu_s"], arrays["sigma_s"], out.n)
    for key in ACTIVATIONS:
        if key in arrays:
            pool = torch.as_tensor(np.asarray(arrays[key])).float()
            refuse_non_finite(path, pool)
            out.pool = pool.reshape(len(pool), -1)
            out.n = out.n or len(pool)
            out.moments = out.moments or Moments.of(out.pool)
            break
    if "arr_0" in arrays:
        out.images = path
    if out.moments is None and out.pool is None:
        keys = ", ".join(sorted(map(str, arrays))[:8]) or "nothing"
        raise VgmError(f"{path} holds no statistics of features", f"accepted: {ACCEPTED}; it holds {keys}", USAGE)
    return out


def _moments(path: Path, mu: Any, sigma: Any, n: int | None) -> Moments:
    mean, cov = (torch.as_tensor(np.asarray(a)).double() for a in (mu, sigma))
    mean = mean.flatten()
    refuse_non_finite(path, mean, cov)
    if cov.shape != (len(mean), len(mean)):
        raise VgmError(f"{path}: mean {tuple(mean.shape)} and covariance {tuple(cov.shape)} do not fit", code=FAILED)
    scale = 1e-6 * float(cov.abs().amax()) if len(mean) else 0
    symmetric = torch.allclose(cov, cov.T, rtol=1e-3, atol=scale)
    if not len(mean) or not symmetric or bool((cov.diagonal() < -scale).any()):
        raise VgmError(f"{path}: what should be a covariance is none: it is not symmetric, or negative", code=FAILED)
    return Moments.given(mean, cov, n)


def refuse_non_finite(path: Path, *arrays: Tensor) -> None:
    """VgmError (exit code 1): statistics that hold NaN or infinity."""
    bad = sum(int((~a.isfinite()).sum()) for a in arrays)
    if bad:
        raise VgmError(f"{path} holds {bad:,} values that are NaN or infinite", "make the statistics again", FAILED)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], int | None, dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        meta = f.metadata() or {}
        arrays = {k: f.get_tensor(k) for k in f.keys()}
    count = re.fullmatch(r"\d{1,12}", meta.get("vgm.n", ""), re.ASCII)
    n = int(count[0]) or None if count else None  # 0: unknown
    said = limits.parse_json(meta.get("vgm.statistics", "{}"), f"the header of {path}")
    return arrays, n, foreign.check(said, "statistics", path)


class _Unread:
    """Stands for an array that is there and need not be read (an ADM batch's 2 GB of images)."""


def _numpy(path: Path) -> dict[str, Any]:
    if path.suffix == ".npy":
        return {"pool": limits.read_npy(path)}
    from vgm_cli.data.arrays import npz_keys

    names = npz_keys(path)
    wanted = [k for k in names if not k.startswith("arr_")]
    return {**dict.fromkeys(names, _Unread), **limits.read_npz(path, wanted)}


def holds_statistics(path: Path) -> bool:
    """Whether a file is to be read here rather than as images."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    if path.suffix != ".npz":
        return True
    from vgm_cli.data.arrays import npz_keys

    keys = set(npz_keys(path))
    return any({m, c} <= keys for m, c in MEANS) or bool(keys & set(ACTIVATIONS))
