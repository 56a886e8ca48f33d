"""Reading images at the size of ImageNet: photographs of about 500 x 400 as JPEGs, through `data.loader.Batches` and
through what one writes by hand, a PyTorch DataLoader over Pillow with ADM's crop. Figures are images per second of
processor time on one core, so that other work on the machine does not count; the two take turns.

VGM_BENCH_IMAGES=20000 makes that many files; the default times the same work with fewer.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vgm_cli.data import dataset as sets
from vgm_cli.data import open_dataset
from vgm_cli.data.loader import Batches
from vgm_cli.data.transforms import center_crop_arr
from vgm_cli.engine.processes import keep_memory

pytestmark = pytest.mark.bench
IMAGES = int(os.environ.get("VGM_BENCH_IMAGES", "2000"))
SHAPES = ((500, 375), (500, 400), (375, 500), (400, 500))  # width and height, as most of ImageNet's
BATCH = 64


def textures(n: int, side: int, seed: int) -> np.ndarray:
    """n random pictures with the spectrum of photographs, uint8 (n, side, side, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    amplitude = np.maximum(np.hypot(rows, columns), 1 / side) ** -1.2
    waves = rng.normal(size=(n, 4, side, side // 2 + 1, 2)) @ np.array([1, 1j])
    a = np.fft.irfft2(waves * amplitude, s=(side, side))
    a = 0.8 * a[:, :1] + 0.3 * a[:, 1:]  # brightness varies more than colour
    a = (a - a.mean((1, 2, 3), keepdims=True)) / a.std((1, 2, 3), keepdims=True)
    return (120 + 50 * a).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IMAGES files of about 100 kB in ten class folders."""
    root = tmp_path_factory.mktemp("photographs")
    pool, rng = textures(24, 640, 0), random.Random(0)
    for i in range(IMAGES):
        width, height = SHAPES[i % len(SHAPES)]
        left, top = rng.randrange(640 - width), rng.randrange(640 - height)
        path = root / f"n{i % 10:08d}" / f"n{i % 10:08d}_{i}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pool[i % len(pool), top : top + height, left : left + width]).save(path, quality=90)
    return root


class ByHand(torch.utils.data.Dataset):
    """guided-diffusion's and DiT's data set without torchvision: Pillow, ADM's crop, a flip, floats in [-1, 1]."""

    def __init__(self, root: Path, side: int) -> None:
        self.paths, self.side = sorted(root.glob("*/*")), side
        self.labels = [int(p.parent.name[1:]) for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with open(self.paths[i], "rb") as f:
            image = Image.open(f)
            image.load()
        a = np.array(center_crop_arr(image.convert("RGB"), self.side))
        if random.random() < 0.5:
            a = a[:, ::-1]
        return torch.from_numpy((a.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1).copy()), self.labels[i]


def taking_turns(streams: dict[str, Iterator[Any]], batches: int, rounds: int) -> dict[str, float]:
    """{name: images per second of processor time}, each the best of its rounds."""
    best = dict.fromkeys(streams, float("inf"))
    for _ in range(rounds + 1):
        for name, stream in streams.items():
            began = time.process_time()
            for _ in range(batches):
                next(stream)
            best[name] = min(best[name], time.process_time() - began)
    return {name: batches * BATCH / seconds for name, seconds in best.items()}


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sets, "VERIFY", 0)  # read from disk, as a set that does not fit into memory
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_memory()  # as training does
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("side", [256, 128, 64])
def test_images_per_second_and_core(photographs: Path, one_core: None, side: int) -> None:
    """data.decode=fast reads at least 1.5 times as many; exact, whose pixels are those of ADM, no fewer."""

    def ours(decode: str) -> Iterator[Any]:
        dataset = open_dataset(photographs, size=side, decode=decode, quiet=True)
        assert dataset.memory is None
        return iter(Batches(dataset, BATCH, seed=0, hflip=True))

    loader = torch.utils.data.DataLoader(ByHand(photographs, side), BATCH, shuffle=True, drop_last=True)
    endless: Callable[[], Iterator[Any]] = lambda: (batch for _ in iter(int, 1) for batch in loader)
    streams = {"exact": ours("exact"), "fast": ours("fast"), "by hand": endless()}
    found = taking_turns(streams, batches=4, rounds=max(3, IMAGES // (12 * BATCH)))
    print(
        f"\nJPEGs of 500 x 400 to {side} x {side}, images/s per core: "
        + ", ".join(f"{name} {rate:.0f} ({rate / found['by hand']:.2f} x)" for name, rate in found.items())
    )
    assert found["fast"] > 1.5 * found["by hand"] and found["exact"] > found["by hand"] / 1.05


def test_epochs_over_workers(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loader processes: wall seconds of one epoch, every image in it once; resumed in its midst, the same batches."""
    monkeypatch.setattr(sets, "VERIFY", 0)
    dataset = open_dataset(photographs, size=256, decode="fast", quiet=True)
    steps, began = len(dataset) // BATCH, time.perf_counter()
    stream = iter(Batches(dataset, BATCH, seed=0, hflip=True, workers=2))
    index = torch.cat([next(stream)["index"] for _ in range(steps)])
    seconds = time.perf_counter() - began
    assert len(index.unique()) == len(index) == steps * BATCH
    later = iter(Batches(dataset, BATCH, seed=0, hflip=True, start=steps))
    a, b = next(stream), next(later)
    assert all(torch.equal(a[k], b[k]) for k in ("x", "label", "index"))
    loader = torch.utils.data.DataLoader(ByHand(photographs, 256), BATCH, shuffle=True, drop_last=True, num_workers=2)
    began = time.perf_counter()
    for _ in loader:
        pass
    theirs = time.perf_counter() - began
    print(f"\nan epoch over 2 workers, images/s: fast {len(index) / seconds:.0f}, by hand {len(index) / theirs:.0f}")
