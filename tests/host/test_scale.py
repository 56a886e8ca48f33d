"""Large sets and several machines: quick decoding, shards of latents over processes, plans, launching."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vgm_cli.data import dataset as module
from vgm_cli.data import open_dataset
from vgm_cli.data.decode import load_image, suffix
from vgm_cli.data.latent_cache import build_cache
from vgm_cli.data.latents import open_latents
from vgm_cli.data.loader import Batches
from vgm_cli.data.transforms import crop_to
from vgm_cli.engine import processes
from vgm_cli.errors import VgmError


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture without detail of a few pixels, as photographs have little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


# -- quick decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("crop", ["adm", "random", "center", "resize"])
def test_quick_crops_are_the_exact_ones_but_for_a_level_or_two(crop: str, mode: str) -> None:
    image = smooth(150, 101).convert(mode)
    a, b = (
        np.asarray(crop_to(image, 64, crop, random.Random(3), fast)).reshape(64, 64, -1).astype(int)
        for fast in (False, True)
    )
    assert abs(a - b).max() <= 2 and abs(a - b).mean() < 0.1


@pytest.mark.parametrize(("size", "side"), [(64, 100), (50, 51), (33, 51), (101, 200), (250, 401)])
def test_jpegs_are_decoded_no_smaller_than_needed(size: int, side: int, tmp_path: Path) -> None:
    """500 x 400 by powers of two, to at least the size asked for; other files whole."""
    smooth(500, 401).save(tmp_path / "a.jpg", quality=95)
    smooth(500, 401).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.jpg", size)
    assert abs(min(found.size) - side) <= 1 and min(found.size) >= size
    assert load_image(tmp_path / "a.png", size).size == load_image(tmp_path / "a.jpg").size == (500, 401)
    smooth(512, 400).save(tmp_path / "b.jpg", quality=95)
    a, b = (np.asarray(crop_to(load_image(tmp_path / "b.jpg", n), size, "adm"), int) for n in (size, 0))
    assert abs(a - b).mean() < 3


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirteen JPEGs in two classes, of a set that is read from disk."""
    monkeypatch.setattr(module, "VERIFY", 0)
    for i in range(13):
        path = tmp_path / "photographs" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(*((90, 70) if i % 3 else (70, 90)), seed=i).save(path, quality=95)
    return tmp_path / "photographs"


@pytest.mark.parametrize("crop", ["adm", "random"])
def test_quick_epochs_are_exact_shuffled_and_resumed(photographs: Path, crop: str) -> None:
    """Two processes with workers of their own see every image once an epoch, mirrored and cut as one process does, and
    go on anywhere."""
    opened = open_dataset(photographs, size=16, crop=crop, decode="fast")
    assert opened.memory is None and opened.describe()["decode"] == "fast"
    how: dict[str, Any] = {"seed": 5, "hflip": True, "drop_last": False}
    whole = iter(Batches(opened, 4, **how))
    one = [next(whole) for _ in range(8)]  # two epochs of 4, 4, 4 and 1
    for rank in range(2):
        stream = iter(Batches(opened, 2, rank=rank, world=2, workers=1, start=5, **how))
        for batch in one[5:7]:
            mine = next(stream)
            for key in ("x", "label", "index"):
                assert torch.equal(mine[key], batch[key][2 * rank : 2 * rank + 2])
    orders = [torch.cat([b["index"] for b in one[i : i + 4]]).tolist() for i in (0, 4)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(13)) and orders[0] != orders[1]


def test_quick_pixels_are_other_data(photographs: Path, vgm: Any, tmp_path: Path) -> None:
    """Fingerprints differ, so that neither a cache nor a resumed run mixes the two; recipes and `data encode` know it."""
    quick, exact = (open_dataset(photographs, size=16, decode=d) for d in ("fast", "exact"))
    assert quick.fingerprint() != exact.fingerprint() == open_dataset(photographs, size=16).fingerprint()
    assert (quick.pixels(range(13)) - exact.pixels(range(13))).abs().mean() < 0.1
    small = ("codec=null", "model={name: dit, patch_size: 4, depth: 1, hidden_size: 32, num_heads: 2}", "data.size=16")
    own = (f"data.path={photographs}", *small, "train.steps=1", "train.batch_size=4", "train.preview_n=0")
    code, _, err = vgm("train", "dit", *own, "data.decode=fast", "--out", tmp_path / "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run/data.json").read_text())["fingerprint"] == quick.fingerprint()
    code, _, err = vgm("train", "dit", *own, "data.decode=quick", "--plan")
    assert code == 2 and "exact" in err and "fast" in err
    code, _, err = vgm("data", "encode", photographs, "--codec", "mnist-codec", "--decode", "quick", "--out", "c")
    assert code == 2 and "decode" in err


@pytest.mark.parametrize(
    "name", ["a.JPG", "a/b.c/d", "a/.hidden", "a.tar.gz", "a.", "a/..x", "x.é", "", "a.b/c.PNG", ".a.b", "a b.jPeG"]
)
def test_suffixes_are_those_of_pathlib(name: str) -> None:
    assert suffix(name) == PurePosixPath(name).suffix.lower()


# -- latents over processes --------------------------------------------------------------------------------------------


class Halves:
    """A codec without weights."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 4)

    def latents(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return moments

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape[0], shape[1] // 4, shape[2] // 4


def test_processes_share_the_shards_of_a_cache(photographs: Path, tmp_path: Path) -> None:
    """Each writes its own; the last call finds them all and makes the cache that one process makes."""
    images = open_dataset(photographs, size=16)
    how: dict[str, Any] = {"shard_bytes": 3 * 3 * 4 * 4 * 4}
    one = build_cache(images, Halves(), tmp_path / "one", "codec", **how)
    for rank in (1, 0):
        assert build_cache(images, Halves(), tmp_path / "two", "codec", share=(rank, 2), **how) is None
        count = len(list((tmp_path / "two").glob("*.safetensors")))
        assert count == (2 if rank else 5) and not (tmp_path / "two/index.json").exists()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("*.safetensors")}
    build_cache(images, Halves(), tmp_path / "two", "codec", **how)
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("*.safetensors")}
    two = open_latents(tmp_path / "two")
    assert one is not None and torch.equal(one.gather(range(13))["moments"], two.gather(range(13))["moments"])
    assert one.index == two.index


@pytest.mark.slow
def test_encode_in_two_processes(tmp_path: Path, process: type, vgm: Any) -> None:
    words = ("data", "encode", "mnist5k", "--split", "test", "--codec", "mnist-codec", "--out")
    code, out, err = process(*words, tmp_path / "two", "--nproc", 2).wait()
    assert code == 0 and out.strip() == str(tmp_path / "two"), err
    assert vgm(*words, tmp_path / "one")[0] == 0
    one, two = (open_latents(tmp_path / n) for n in ("one", "two"))
    assert torch.equal(one.gather(range(500))["moments"], two.gather(range(500))["moments"])


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(vgm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`vgm train … --plan --json`, without what takes seconds."""
    from vgm_cli.engine.train import plan as planning

    monkeypatch.setattr(planning, "time_steps", lambda *args: (0.5, "not timed"))
    monkeypatch.setattr(planning, "count_flops", lambda *args: (None, None))
    monkeypatch.setattr(planning, "memory_by_part", lambda *args: {"weights": 1})

    def ask(*words: Any) -> dict[str, Any]:
        code, out, err = vgm("train", *words, "--plan", "--json")
        assert code == 0, err
        return json.loads(out)

    return ask


def test_a_plan_says_what_travels(plan: Any) -> None:
    """A ring all-reduce sends 2 (n - 1) / n of the gradients; FSDP2 sends the weights twice for every micro-batch."""
    own = ("dit", "train.batch_size=64")
    alone, ring = plan(*own), plan(*own, "--nproc", 8, "--nnodes", 2)
    assert alone["communication"] is None and ring["processes"] == 16 and ring["nodes"] == 2
    gradients = 4 * ring["trainable"]
    assert ring["communication"]["bytes_per_step"] == round(2 * 15 / 16 * gradients)
    sharded = plan(*own, "--nproc", 4, "train.fsdp=true", "train.accumulate=2")
    assert sharded["communication"]["bytes_per_step"] == round(
        3 / 4 * (2 * 2 * 4 * sharded["parameters"] + 4 * sharded["trainable"])
    )
    several = plan("stylegan", "--nproc", 2)["communication"]["bytes_per_step"]  # generator and discriminator
    assert several > 4 * plan("stylegan")["parameters"]


def test_a_plan_counts_tokens(plan: Any, vgm: Any) -> None:
    assert plan("dit")["tokens"] == 49 and plan("llamagen")["tokens"] == 49 and plan("adm-unet")["tokens"] is None
    out = vgm("train", "dit", "--plan")[1]
    assert "128 images/s, 6.27 k tokens/s of 49 per image" in out, out


def test_a_plan_counts_the_latents_of_imagenet(plan: Any, vgm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,281,167 images and their mirror images, 8 numbers at 32 x 32 places; the encoder's FLOPs at the stated rate."""
    from vgm_cli.engine.train import plan as planning

    monkeypatch.setattr(planning, "speed", lambda *args: 1e11)
    found = plan("dit", "--recipe", "imagenet256")
    cache = found["latents"]
    assert cache["images"] == 1_281_167 and cache["bytes"] == 1_281_167 * 2 * 8 * 32 * 32 * 4
    assert 250e9 < cache["flops"] < 300e9  # kl-f8's encoder at 256 x 256
    assert cache["seconds"] == pytest.approx(cache["flops"] * 2 * 1_281_167 / 0.5e11)
    assert found["epochs"] == pytest.approx(7_000_000 * 256 / 1_281_167)
    assert plan("dit")["latents"] is None  # 5,000 digits are encoded into memory
    text = vgm("train", "dit", "--recipe", "imagenet256", "--plan")[1]
    assert "latent cache     78.20 GiB for 1,281,167 images" in text, text


# -- several machines --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_machines_train_as_one(tiny: Path, tmp_path: Path, vgm: Any, process: type) -> None:
    """The two commands of docs/scale.md, both on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{s.getsockname()[1]}"
    words = ("train", tiny, "--out", tmp_path / "two", "--nnodes", 2, "--nproc", 1, "--rdzv", meeting)
    machines = [process(*words) for _ in range(2)]
    for code, _, err in [m.wait() for m in machines]:
        assert code == 0, err
    assert vgm("train", tiny, "--out", tmp_path / "one")[0] == 0
    a, b = (load_file(tmp_path / r / "checkpoints/step-00000008/model.safetensors") for r in ("one", "two"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_slurms_variables_are_understood(nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    given = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NNODES": nodes}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if nodes == "2":
        with pytest.raises(VgmError, match="MASTER_ADDR") as e:
            processes.adopt_slurm()
        assert e.value.code == 2 and "scontrol" in e.value.hint
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv("MASTER_ADDR", "node-1")
    processes.adopt_slurm()
    found = [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    assert found == ["9", "16", "1", "node-1" if nodes == "2" else "127.0.0.1"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


# -- races -------------------------------------------------------------------------------------------------------------


def test_a_race_without_checkouts_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(str(root / "tests/bench"))
    import race

    monkeypatch.setattr("sys.argv", ["race.py", str(tmp_path)])
    assert race.main() == 2 and "guided-diffusion" in capsys.readouterr().err
