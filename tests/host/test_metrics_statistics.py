"""Statistics files: every format that is about is read, ours is written, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.metrics.moments import Moments
from vgm_cli.metrics.statistics import holds_statistics, read_statistics, write_statistics

RNG = np.random.default_rng(0)
ACTS = RNG.normal(size=(50, 6))
MU, SIGMA = ACTS.mean(0), np.cov(ACTS, rowvar=False)
SPATIAL = RNG.normal(size=(50, 4))


def check(path: Path, n: int | None = None) -> None:
    assert holds_statistics(path)
    stats = read_statistics(path)
    assert stats.moments is not None
    np.testing.assert_allclose(stats.moments.mean.numpy(), MU, rtol=1e-6)
    np.testing.assert_allclose(stats.moments.cov.numpy(), SIGMA, rtol=1e-5, atol=1e-7)
    assert stats.n == n


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": MU, "sigma": SIGMA},  # EDM, StudioGAN, clean-fid, pytorch-fid
        {"ref_mu": MU, "ref_sigma": SIGMA},  # MeanFlow
        {"mu": MU.astype(np.float32), "sigma": SIGMA.astype(np.float32)},
        {"mu": MU[None], "sigma": SIGMA, "arr_0": np.zeros((3, 4, 4, 3), np.uint8)},
    ],
)
def test_means_and_covariances_in_npz(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    check(tmp_path / "s.npz")


@pytest.mark.parametrize("key", ["pool_3", "feats", "real_feats"])
def test_activations_in_npz(tmp_path: Path, key: str) -> None:
    acts = ACTS[:, None, None] if key == "pool_3" else ACTS  # (N, 1, 1, D) in some files
    np.savez(tmp_path / "s.npz", **{key: acts})
    check(tmp_path / "s.npz", 50)
    pool = read_statistics(tmp_path / "s.npz").pool
    assert pool is not None and pool.shape == (50, 6)


def test_plain_npy_of_activations(tmp_path: Path) -> None:
    np.save(tmp_path / "feats.npy", ACTS)
    check(tmp_path / "feats.npy", 50)


def test_adm_reference_batch(tmp_path: Path) -> None:
    images = np.zeros((7, 4, 4, 3), np.uint8)
    cov = np.cov(SPATIAL, rowvar=False)
    np.savez(tmp_path / "ref.npz", arr_0=images, mu=MU, sigma=SIGMA, mu_s=SPATIAL.mean(0), sigma_s=cov)
    stats = read_statistics(tmp_path / "ref.npz")
    assert stats.images == tmp_path / "ref.npz" and stats.spatial is not None
    np.testing.assert_allclose(stats.spatial.cov.numpy(), cov, rtol=1e-6)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.zeros(7, np.int64))
    assert not holds_statistics(tmp_path / "samples.npz")


@pytest.mark.parametrize(
    "value",
    [
        {"real_mean": MU, "real_cov": SIGMA},  # MMagic
        {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU, "sigma": SIGMA}},  # EDM2
        {"mu": MU, "sigma": SIGMA, "num_images": 50},
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_arrays_alone(tmp_path: Path, value: dict[str, Any], protocol: int) -> None:
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(value, protocol))
    check(tmp_path / "s.pkl")


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".npz"])
def test_hostile_files_run_nothing(tmp_path: Path, suffix: str) -> None:
    path, mark = tmp_path / f"s{suffix}", tmp_path / "ran"
    value = {"mu": MU, "sigma": Payload(mark)}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(value))
    elif suffix == ".pt":
        torch.save(value, path)
    else:
        np.savez(path, **{k: np.array(v, dtype=object) if k == "sigma" else v for k, v in value.items()})
    with pytest.raises(VgmError) as e:
        read_statistics(path)
    assert e.value.code == FAILED and not mark.exists()


def test_torch_files_of_tensors(tmp_path: Path) -> None:
    torch.save({"mu": torch.from_numpy(MU), "sigma": torch.from_numpy(SIGMA), "n": 50}, tmp_path / "s.pt")
    check(tmp_path / "s.pt", 50)


def test_ours_keeps_everything(tmp_path: Path) -> None:
    pool, spatial = torch.from_numpy(ACTS), Moments.of(torch.from_numpy(SPATIAL))
    facts = {"features": "net", "features_sha256": "ab", "reference": "data"}
    write_statistics(tmp_path / "s.safetensors", Moments.of(pool), spatial, facts, pool)
    check(tmp_path / "s.safetensors", 50)
    stats = read_statistics(tmp_path / "s.safetensors")
    assert stats.facts == facts and stats.spatial is not None and stats.pool is not None
    assert torch.equal(stats.pool, pool.float()) and torch.equal(stats.spatial.mean, spatial.mean)
    with pytest.raises(VgmError, match=r"written as \.safetensors"):
        write_statistics(tmp_path / "s.npz", Moments.of(pool), None, {})


def test_the_same_numbers_have_the_same_fingerprint(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"real_mean": MU, "real_cov": SIGMA}))
    np.savez(tmp_path / "c.npz", mu=MU + 0.1, sigma=SIGMA)
    a, b, c = (read_statistics(tmp_path / n).fingerprint() for n in ("a.npz", "b.pkl", "c.npz"))
    assert a == b != c


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("none.npz", None, USAGE, "no statistics file"),
        ("cut.npz", b"PK\x03\x04rest", FAILED, "not a readable"),
        ("cut.safetensors", b"\x00" * 20, FAILED, "cannot be read"),
        ("cut.pkl", b"\x80\x04\x95", FAILED, "not readable"),
        ("odd.txt", b"mu", USAGE, "no kind of statistics"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, code: int, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VgmError, match=says) as e:
        read_statistics(tmp_path / name)
    assert e.value.code == code


def test_files_without_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", weights=MU)
    with pytest.raises(VgmError, match="holds no statistics") as e:
        read_statistics(tmp_path / "a.npz")
    assert "it holds weights" in e.value.hint
    np.savez(tmp_path / "b.npz", mu=MU, sigma=SIGMA[:3])
    with pytest.raises(VgmError, match="do not fit"):
        read_statistics(tmp_path / "b.npz")
