"""The latent cache: whole or not there, tied to codec and images, the same to training as encoding every time."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from vgm_cli.data import latent_cache, open_dataset
from vgm_cli.data.latent_cache import build_cache, open_cache
from vgm_cli.data.latents import INDEX, Latents, MemoryLatents, Sums, is_latents, open_latents, to_model
from vgm_cli.data.loader import Batches
from vgm_cli.data.pack import pack
from vgm_cli.errors import VgmError


class Posterior:
    """A codec with a posterior: means of 4 x 4 squares, a log-variance of -2, latents doubled."""

    calls = 0

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        c, h, w = image_shape
        return c, h // 4, w // 4

    def encode(self, x: Tensor) -> Tensor:
        self.calls += 1
        z = F.avg_pool2d(x, 4)
        return torch.cat([z, torch.full_like(z, -2.0)], 1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, logvar = moments.chunk(2, 1)
        return 2 * (mean if noise is None else mean + (logvar.clamp(-30, 20) / 2).exp() * noise)

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z / 2, scale_factor=4)


class Tokens(Posterior):
    """A codec of tokens: int64 (B, h, w), no channels, no noise."""

    def encode(self, x: Tensor) -> Tensor:
        return (F.avg_pool2d(x.mean(1, keepdim=True), 4)[:, 0] * 100).long()

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        assert not moments.is_floating_point()
        return moments

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        return image_shape[1] // 4, image_shape[2] // 4


@pytest.fixture
def images() -> Any:
    return open_dataset("shapes", size=16)


@pytest.fixture
def few(tmp_path: Path) -> Any:
    """Ten captioned images in two classes."""
    for i in range(10):
        folder = tmp_path / "few" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        (folder / f"{i}.txt").write_text(f"number {i}")
    return open_dataset(tmp_path / "few")


ITEM = 6 * 4 * 4 * 4  # bytes of one image's moments


def build(dataset: Any, folder: Path, codec: Any = None, name: str = "codec-1", **how: Any) -> Latents:
    return build_cache(dataset, codec or Posterior(), folder, name, **{"shard_bytes": 4 * ITEM, **how})


def refused(words: str, code: int, call: Any, *args: Any, **how: Any) -> None:
    with pytest.raises(VgmError) as e:
        call(*args, **how)
    assert words in e.value.message and e.value.code == code and "\n" not in e.value.message
    assert e.value.hint or code == 1


# -- what is stored --------------------------------------------------------------------------------------------------


def test_shards_hold_what_the_codec_gives(few: Any, tmp_path: Path) -> None:
    build(few, tmp_path / "c", hflip=True, shard_bytes=8 * ITEM)  # 4 images with their mirror images
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        *(f"latents-{i:05d}-of-00003.safetensors" for i in range(3)),
        INDEX,
    ]
    parts = [load_file(tmp_path / "c" / f"latents-{i:05d}-of-00003.safetensors") for i in range(3)]
    assert [len(p["moments"]) for p in parts] == [4, 4, 2]
    x = few.pixels(range(10))
    codec = Posterior()
    assert torch.allclose(torch.cat([p["moments"] for p in parts]), codec.encode(x))
    assert torch.allclose(torch.cat([p["moments_flip"] for p in parts]), codec.encode(x.flip(-1)))
    assert torch.cat([p["labels"] for p in parts]).tolist() == few.facts.labels.tolist()
    index = json.loads((tmp_path / "c" / INDEX).read_text())
    assert index["codec"] == "codec-1" and index["data"]["fingerprint"] == few.fingerprint()
    assert index["shape"] == [6, 4, 4] and index["latent_shape"] == [3, 4, 4] and index["mirrored"] is True


def test_statistics_are_those_of_model_space(images: Any, tmp_path: Path) -> None:
    mean, std = build(images, tmp_path / "c", shard_bytes=700 * ITEM).statistics
    z = 2 * F.avg_pool2d(images.pixels(range(len(images))), 4)
    assert torch.allclose(mean, z.mean((0, 2, 3)), atol=0.02)
    want = (z.var((0, 2, 3)) + 4 * np.exp(-2)).sqrt()  # the posterior's own width belongs to them
    assert torch.allclose(std, want, rtol=0.01)


def test_sums_merge_exactly() -> None:
    z = torch.randn(50, 3, 2, 2) * 5 + 100
    one, many = Sums(), Sums()
    one.add(z)
    for part in z.split([1, 30, 19]):
        piece = Sums()
        piece.add(part)
        many.merge(Sums.load(piece.dump()))
    flat = z.double().transpose(0, 1).flatten(1)
    for sums in (one, many):
        assert np.allclose(sums.result()["mean"], flat.mean(1), rtol=1e-12)
        assert np.allclose(sums.result()["std"], flat.std(1, unbiased=False), rtol=1e-9)


def test_facts_come_back(few: Any, tmp_path: Path) -> None:
    build(few, tmp_path / "c")
    d = open_dataset(tmp_path / "c")
    f = d.facts
    assert (f.kind, f.count, f.size, f.channels, f.num_classes, f.class_names) == (
        "latent-cache",
        10,
        4,
        3,
        2,
        ["a", "b"],
    )
    assert f.captions and d.image_shape == (3, 16, 16) and not d.mirrored and d.codec == "codec-1"
    assert d.describe()["image_size"] == 16 and d.describe()["latent_shape"] == [6, 4, 4]
    assert open_dataset(f.root).fingerprint() == d.fingerprint()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_on_request(few: Any, tmp_path: Path, dtype: str) -> None:
    d = build(few, tmp_path / "c", dtype=dtype)
    moments = d.gather(range(10))["moments"]
    assert moments.dtype == getattr(torch, dtype)
    assert torch.allclose(moments.float(), Posterior().encode(few.pixels(range(10))), atol=0.02)


def test_tokens_stay_integers(few: Any, tmp_path: Path) -> None:
    d = build(few, tmp_path / "c", Tokens(), shard_bytes=500, hflip=True, dtype="float16")
    assert len(d.shards) > 1 and d.statistics is None and (d.facts.size, d.facts.channels) == (4, 1)
    batch = next(iter(Batches(d, 10, seed=0)))
    assert batch["moments"].dtype == torch.int64 and batch["moments"].shape == (10, 4, 4)
    assert torch.equal(batch["moments"], Tokens().encode(few.pixels(batch["index"])))
    assert torch.equal(to_model(Tokens(), batch["moments"]), batch["moments"])


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_what_encoding_each_time_gives(few: Any, tmp_path: Path, workers: int) -> None:
    """Same order, same flips, same labels and captions; the moments are the codec's."""
    d = build(few, tmp_path / "c", hflip=True)
    pixels = itertools.islice(Batches(few, 7, seed=3, hflip=True), 8)
    cached = itertools.islice(Batches(d, 7, seed=3, hflip=True, workers=workers), 8)
    for a, b in zip(pixels, cached, strict=True):
        assert torch.allclose(Posterior().encode(a["x"]), b["moments"], atol=1e-6)
        assert torch.equal(a["index"], b["index"]) and torch.equal(a["label"], b["label"]) and a["text"] == b["text"]
        assert "x" not in b


def test_memory_and_disk_agree(few: Any, tmp_path: Path) -> None:
    d = build(few, tmp_path / "c", hflip=True)
    x = few.pixels(range(10))
    codec = Posterior()
    held = MemoryLatents(codec.encode(x), codec.encode(x.flip(-1)), few.labels(), [few.item(i)[2] for i in range(10)])
    for a, b in itertools.islice(zip(Batches(d, 4, seed=1, hflip=True), Batches(held, 4, seed=1, hflip=True)), 5):
        assert (
            a.keys() == b.keys() and torch.allclose(a["moments"], b["moments"]) and torch.equal(a["label"], b["label"])
        )
    with pytest.raises(VgmError, match="10 latents but 3 labels"):
        MemoryLatents(codec.encode(x), labels=np.zeros(3, np.int64))


def test_flips_need_mirrored_latents(few: Any, tmp_path: Path) -> None:
    refused("no mirrored images", 2, Batches, build(few, tmp_path / "c"), 4, seed=0, hflip=True)


def test_reading_does_not_touch_what_is_stored(few: Any, tmp_path: Path) -> None:
    d = build(few, tmp_path / "c", hflip=True)
    before = d.gather(range(10))["moments"].clone()
    for batch in itertools.islice(Batches(d, 10, seed=0, hflip=True), 3):
        batch["moments"].zero_()
    assert torch.equal(d.gather(range(10))["moments"], before)


# -- whole or not there ----------------------------------------------------------------------------------------------


class Cut(Posterior):
    """Fails at the n-th batch, as a kill would."""

    def __init__(self, n: int) -> None:
        self.n = n

    def encode(self, x: Tensor) -> Tensor:
        if self.calls == self.n:
            raise KeyboardInterrupt
        return super().encode(x)


def test_a_cut_off_build_is_never_taken_for_whole_and_goes_on(few: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(few, tmp_path / "c", Cut(2))  # one call finds the shape, one makes the first shard
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["latents-00000-of-00003.safetensors"]
    assert is_latents(tmp_path / "c")
    refused("half built", 1, open_dataset, tmp_path / "c")
    refused("half built", 1, open_cache, tmp_path / "c", "codec-1", few.fingerprint())
    codec = Posterior()
    resumed = build(few, tmp_path / "c", codec)
    assert codec.calls == 3  # the shape and the two missing shards
    whole = build(few, tmp_path / "d")
    assert torch.equal(resumed.gather(range(10))["moments"], whole.gather(range(10))["moments"])
    a, b = (json.loads((tmp_path / c / INDEX).read_text()) for c in "cd")
    assert a == b


def test_a_half_built_cache_of_another_kind_is_left_alone(few: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(few, tmp_path / "c", Cut(2))
    for how in ({"name": "codec-2"}, {"hflip": True}, {"dtype": "float16"}, {"shard_bytes": 3 * ITEM}):
        refused("half-built latent cache of another kind", 2, build, few, tmp_path / "c", **how)


def test_a_whole_cache_is_used_again(few: Any, tmp_path: Path) -> None:
    build(few, tmp_path / "c", hflip=True)
    codec = Posterior()
    for hflip in (True, False):
        assert len(build(few, tmp_path / "c", codec, hflip=hflip)) == 10
    assert codec.calls == 0


def test_another_codec_or_other_images_are_refused(few: Any, images: Any, tmp_path: Path) -> None:
    build(few, tmp_path / "c")
    print_ = few.fingerprint()
    assert len(open_cache(tmp_path / "c", "codec-1", print_)) == 10
    refused("another codec (codec-1, not codec-2)", 2, open_cache, tmp_path / "c", "codec-2", print_)
    refused("other images", 2, open_cache, tmp_path / "c", "codec-1", images.fingerprint())
    refused("another codec", 2, build, few, tmp_path / "c", name="codec-2")
    refused("other images", 2, build, images, tmp_path / "c")
    refused("no mirrored images", 2, build, few, tmp_path / "c", hflip=True)
    cropped = open_dataset(tmp_path / "few", crop="center")
    refused("cropped otherwise", 2, build, cropped, tmp_path / "c")
    refused("another codec", 2, open_latents(tmp_path / "c").refuse_other, "codec-2")


@pytest.mark.parametrize("kind", ["png", "bmp", "tar", "zip", "npz"])
def test_other_images_under_the_same_names_are_seen(tmp_path: Path, kind: str) -> None:
    def made(seed: int) -> Any:
        image = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        folder = tmp_path / "d"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / ("0.bmp" if kind == "bmp" else "0.png"), compress_level=0)
        if kind in ("png", "bmp"):
            return open_dataset(folder)
        pack(open_dataset(folder), tmp_path / f"x.{kind}")
        return open_dataset(tmp_path / f"x.{kind}")

    build(made(0), tmp_path / "c")
    assert len(build(made(0), tmp_path / "c")) == 1
    other = made(1)
    refused("made from other images", 2, build, other, tmp_path / "c")
    refused("made from other images", 2, open_cache, tmp_path / "c", "codec-1", other.fingerprint())
    again = build(other, tmp_path / "c", overwrite=True)
    assert torch.allclose(again.gather([0])["moments"], Posterior().encode(other.pixels([0])))


def test_another_dtype_of_a_whole_cache(few: Any, tmp_path: Path) -> None:
    build(few, tmp_path / "c", dtype="float16")
    refused("holds float16, not float32", 2, build, few, tmp_path / "c", dtype="float32")
    assert len(build(few, tmp_path / "c")) == len(build(few, tmp_path / "c", dtype="float16")) == 10
    assert build(few, tmp_path / "c", dtype="float32", overwrite=True).gather([0])["moments"].dtype == torch.float32
    build(few, tmp_path / "t", Tokens(), dtype="float16")  # says nothing of tokens
    assert len(build(few, tmp_path / "t", Tokens(), dtype="float32")) == 10


def test_overwriting_removes_the_cache_and_nothing_else(few: Any, tmp_path: Path) -> None:
    build(few, tmp_path / "c")
    (tmp_path / "c/mine.txt").write_text("mine")
    build(few, tmp_path / "c", name="codec-2", shard_bytes=8 * ITEM, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "latents-00000-of-00002.safetensors", "latents-00001-of-00002.safetensors", INDEX, "mine.txt"
    ]  # fmt: skip


def test_a_cache_of_an_older_version_is_used_with_a_warning(
    few: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(few, tmp_path / "c")
    index = json.loads((tmp_path / "c" / INDEX).read_text())
    for stored in ("10-0123456789abcdef01234567", "9-0123456789abcdef01234567"):
        index["data"]["fingerprint"] = stored
        (tmp_path / "c" / INDEX).write_text(json.dumps(index))
        if stored.startswith("10-"):
            assert len(open_cache(tmp_path / "c", "codec-1", few.fingerprint())) == 10
            assert "of an older version" in capsys.readouterr().err
        else:
            refused("other images", 2, open_cache, tmp_path / "c", "codec-1", few.fingerprint())


def test_what_cannot_become_a_cache(few: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    refused("holds other files", 2, build, few, tmp_path / "notes")
    refused("random crops", 2, build, open_dataset(tmp_path / "few", crop="random"), tmp_path / "c")
    refused("cannot write", 1, build, few, tmp_path / "notes/todo.txt")
    refused("no latent cache", 2, open_cache, tmp_path / "c", "codec-1", "x")


def test_a_damaged_cache_is_one_sentence(few: Any, tmp_path: Path) -> None:
    build(few, tmp_path / "c")
    shard = tmp_path / "c/latents-00001-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-50])
    refused("not a readable shard", 1, open_dataset, tmp_path / "c")
    shard.unlink()
    refused("latents-00001", 1, open_dataset, tmp_path / "c")
    shard.write_bytes(content)
    index = json.loads((tmp_path / "c" / INDEX).read_text())
    for change, words in (
        ({"version": 9}, "version 9"),
        ({"format": "x"}, "not the index"),
        ({"shards": index["shards"][:2]}, "8 latents"),
    ):
        (tmp_path / "c" / INDEX).write_text(json.dumps({**index, **change}))
        refused(words, 1, open_dataset, tmp_path / "c")
    (tmp_path / "c" / INDEX).write_text("{")
    refused("cannot be read", 1, open_dataset, tmp_path / "c")


def test_a_full_disk_leaves_a_build_that_goes_on(few: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli import atomic

    real, calls = atomic.save_safetensors, []

    def full(tensors: Any, path: Any, metadata: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise atomic.failure(Path(path), OSError(28, "No space left on device"))
        real(tensors, path, metadata)

    monkeypatch.setattr(latent_cache.atomic, "save_safetensors", full)
    refused("no space left", 1, build, few, tmp_path / "c")
    assert len(build(few, tmp_path / "c")) == 10 and len(calls) == 4


def test_unreadable_images_are_replaced_with_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli.data import dataset as module

    monkeypatch.setattr(module, "VERIFY", 2)
    for i in range(6):
        folder = tmp_path / "d" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 40 * i).save(folder / f"{i}.png")
    (tmp_path / "d/a/4.png").write_bytes(b"gone")  # the last of a: the first of b stands in
    d = build(open_dataset(tmp_path / "d"), tmp_path / "c")
    assert d.facts.labels.tolist() == [0, 0, 1, 1, 1, 1] and d.facts.skipped == ["a/4.png"]


def test_reading_is_safe_from_several_threads(few: Any, tmp_path: Path) -> None:
    d = build(few, tmp_path / "c")
    want = d.gather(range(10))["moments"]
    d = open_latents(tmp_path / "c")
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(torch.equal(d.gather(range(10))["moments"], want)))
        for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] * 8


# -- latents made elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """LightningDiT's layout: two shards of drawn latents."""
    g = torch.Generator().manual_seed(0)
    for i, n in enumerate((6, 4)):
        z = torch.randn(n, 3, 4, 4, generator=g) * 3 + 1
        folder = tmp_path / "latents"
        folder.mkdir(exist_ok=True)
        tensors = {"latents": z, "latents_flip": z.flip(-1).contiguous(), "labels": torch.arange(n) % 3}
        save_file(tensors, folder / f"latents_rank00_shard{i:03d}.safetensors")
    (tmp_path / "latents/latents_stats.pt").write_bytes(b"a pickle that nobody opens")
    return tmp_path / "latents"


def test_lightningdit_shards(elsewhere: Path) -> None:
    d = open_dataset(elsewhere)
    f = d.facts
    assert (f.kind, f.count, f.size, f.channels, f.num_classes) == ("latents-folder", 10, 4, 3, 3)
    assert d.mirrored and d.drawn and d.codec == "" and d.image_shape is None
    z = torch.cat([load_file(p)["latents"] for p in sorted(elsewhere.glob("*.safetensors"))])
    batch = next(iter(Batches(d, 10, seed=0, hflip=True)))
    for row, i in zip(batch["moments"], batch["index"]):
        assert torch.equal(row, z[i]) or torch.equal(row, z[i].flip(-1))
    mean, std = d.statistics
    assert torch.allclose(mean, z.mean((0, 2, 3))) and torch.allclose(std, z.std((0, 2, 3), unbiased=False))
    before, last = d.fingerprint(), max(elsewhere.glob("*.safetensors"))
    save_file({k: v.flip(0) for k, v in load_file(last).items()}, last)  # other latents in files of the same size
    assert open_dataset(elsewhere).fingerprint() != before


def test_drawn_latents_pass_through_a_codec_that_expects_moments(elsewhere: Path) -> None:
    d = open_dataset(elsewhere)
    z = d.gather(range(4))["moments"]
    noise = torch.randn(4, 3, 4, 4)
    assert torch.allclose(to_model(Posterior(), z, noise, drawn=True), 2 * z, atol=1e-5)  # no second draw

    class Plain(Posterior):
        def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
            return moments / 2

    assert torch.equal(to_model(Plain(), z, noise, drawn=True), z / 2)
    assert d.image_shape_for(Posterior()) == (3, 16, 16)
    with pytest.raises(VgmError, match="does not make latents of 3×4×4"):
        d.image_shape_for(Tokens())


def test_shards_that_do_not_belong_together(elsewhere: Path) -> None:
    save_file({"latents": torch.zeros(2, 3, 8, 8)}, elsewhere / "z.safetensors")
    refused("does not fit the other shards", 1, open_latents, elsewhere)
    save_file({"weights": torch.zeros(2)}, elsewhere / "z.safetensors")
    refused("no tensor `latents`", 1, open_latents, elsewhere)
    bad = {"latents": torch.zeros(2, 3, 4, 4), "latents_flip": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(5).long()}
    save_file(bad, elsewhere / "z.safetensors")
    refused("labels, not one per latent", 1, open_latents, elsewhere)


def test_unlabelled_latents(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    save_file({"latents": torch.zeros(2, 3, 4, 4)}, tmp_path / "z/0.safetensors")
    assert open_dataset(tmp_path / "z").facts.num_classes == 0
    refused("no labels", 2, open_dataset, tmp_path / "z", labels=True)


def test_a_folder_of_weights_is_no_latents(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    assert not is_latents(tmp_path) and open_dataset(tmp_path).facts.kind == "folder"


# -- the commands and training ---------------------------------------------------------------------------------------


def encode(vgm: Any, *args: Any) -> tuple[int, str, str]:
    return vgm("data", "encode", *args)


def test_encode_then_train_from_the_cache(tmp_path: Path, vgm: Any) -> None:
    """The cached, the in-memory and the encode-each-time run are the same run."""
    digits = open_dataset()
    np.savez(tmp_path / "d.npz", images=digits.images(range(0, 5000, 100)).permute(0, 2, 3, 1).numpy(),
             labels=digits.facts.labels[::100])  # fmt: skip
    code, out, err = encode(
        vgm, tmp_path / "d.npz", "--codec", "mnist-codec", "--out", tmp_path / "c", "--hflip", "--json"
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["count"] == 50 and facts["latent_shape"] == [8, 7, 7] and facts["mirrored"]
    assert all(0.7 < s < 1.3 for s in facts["std"])
    small = ("train.steps=3", "train.batch_size=8", "train.precision=fp32", "train.preview_n=0", "train.log_every=1",
             "train.compile=off", "model.depth=1", "model.hidden_size=32", "data.hflip=true",
             "optimizer.warmup=0")  # fmt: skip
    losses = {}
    for name, how in {
        "memory": ("data.path=d.npz",),
        "each time": ("data.path=d.npz", "data.cache_latents=false"),
        "cache": ("data.path=d.npz", "data.cache_latents=c"),
        "new cache": ("data.path=d.npz", "data.cache_latents=new"),
        "latents": ("data.path=c",),
    }.items():
        code, _, err = vgm("train", "dit", *how, *small, "--out", name)
        assert code == 0, err
        losses[name] = [json.loads(row)["loss"] for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert len(losses["memory"]) == 3
    for name, found in losses.items():
        assert np.allclose(found, losses["memory"], rtol=1e-4), name
    assert vgm("sample", "latents", "-n", 2, "--steps", 2, "--out", "x.png")[0] == 0
    code, _, err = vgm("train", "dit", "data.path=d.npz", "data.cache_latents=c", "data.crop=center", *small,
                       "--out", "e1")  # fmt: skip
    assert code == 2 and "cropped otherwise" in err
    code, _, err = vgm("train", "dit", "data.path=c", "codec=null", *small, "--out", "e2")
    assert code == 2 and "holds latents" in err
    code, _, err = vgm("train", "dit", "data.path=c", "--plan")
    assert code == 0, err


def test_latents_are_shown_decoded(tmp_path: Path, vgm: Any) -> None:
    digits = open_dataset()
    np.savez(tmp_path / "d.npz", images=digits.images(range(4)).permute(0, 2, 3, 1).numpy())
    assert encode(vgm, "d.npz", "--codec", "mnist-codec", "--out", "c", "--dtype", "float16")[0] == 0
    code, out, err = vgm("data", "info", "c")
    assert code == 0 and "4 latents of 8×7×7" in out and "codec" in out, err
    assert vgm("data", "grid", "c", "--codec", "mnist-codec", "--out", "x.png", "-n", 1, "--seed", 3)[0] == 0
    assert vgm("data", "grid", "d.npz", "--out", "y.png", "-n", 1, "--seed", 3)[0] == 0
    a, b = (np.asarray(Image.open(p)).astype(float) for p in ("x.png", "y.png"))
    assert np.abs(a - b).mean() < 10  # decoded, it is the same digit
    code, _, err = vgm("data", "grid", "c", "--out", "z.png")
    assert code == 2 and "--codec" in err
    code, _, err = vgm("data", "pack", "c", "x.zip")
    assert code == 2 and "holds latents" in err


def test_encode_errors(tmp_path: Path, vgm: Any) -> None:
    np.savez(tmp_path / "d.npz", images=open_dataset().images(range(4)).permute(0, 2, 3, 1).numpy())
    for args, words, code in (
        (("d.npz", "--codec", "nowhere", "--out", "c"), "no such run or checkpoint", 2),
        (("d.npz", "--codec", "mnist-features", "--out", "c"), "mnist-features", 1),
        (("d.npz", "--codec", "mnist-codec", "--out", "c", "--dtype", "int3"), "unknown dtype", 2),
        (("nowhere", "--codec", "mnist-codec", "--out", "c"), "no such data", 2),
        (("d.npz", "--codec", "mnist-codec", "--tokens", "--out", "c"), "not tokens", 2),
    ):
        got, _, err = encode(vgm, *args)
        assert (got, words in err, "Traceback" in err) == (code, True, False), err
    assert not (tmp_path / "c").exists()
    with safe_open(_shard(vgm, tmp_path), framework="pt") as f:
        assert "labels" not in f.keys()
    code, _, err = encode(vgm, "c", "--codec", "mnist-codec", "--out", "e")
    assert code == 2 and "latents already" in err


def _shard(vgm: Any, tmp_path: Path) -> Path:
    assert encode(vgm, "d.npz", "--codec", "mnist-codec", "--out", "c")[0] == 0
    return next((tmp_path / "c").glob("*.safetensors"))


def test_the_codec_of_a_run_is_found(tmp_path: Path, vgm: Any) -> None:
    """--codec RUN: of a model on latents, the codec it was trained with."""
    np.savez(tmp_path / "d.npz", images=open_dataset().images(range(8)).permute(0, 2, 3, 1).numpy())
    small = ("train.steps=1", "train.batch_size=4", "train.preview_n=0", "model.depth=1", "model.hidden_size=32")
    assert vgm("train", "dit", "data.path=d.npz", *small, "--out", "run")[0] == 0
    assert encode(vgm, "d.npz", "--codec", "run", "--out", "a")[0] == 0
    assert encode(vgm, "d.npz", "--codec", "mnist-codec", "--out", "b")[0] == 0
    assert open_latents(tmp_path / "a").codec == open_latents(tmp_path / "b").codec
    pixel = ("codec=null", "model.patch_size=4")
    assert vgm("train", "dit", "data.path=d.npz", *pixel, *small, "--out", "pixel")[0] == 0
    code, _, err = encode(vgm, "d.npz", "--codec", "pixel", "--out", "e")
    assert code == 2 and "not a codec" in err
