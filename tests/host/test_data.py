"""Every kind of data set and of image file, what is read off it, and the order in which batches come."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vgm_cli.data import dataset as module
from vgm_cli.data import open_dataset
from vgm_cli.data.decode import eight_bits, load_image
from vgm_cli.data.loader import Batches
from vgm_cli.data.tars import expand_braces
from vgm_cli.data.transforms import CROPS, center_crop_arr
from vgm_cli.errors import VgmError


def picture(i: int, size: tuple[int, int] = (16, 16), channels: int = 3) -> np.ndarray:
    """uint8 (H, W, C) that says which it is: all pixels differ from those of other i."""
    rng = np.random.default_rng(i)
    return rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def class_folders(root: Path, n: int = 4) -> Path:
    for c, name in enumerate(("cats", "dogs", "owls")):
        for i in range(n):
            save(root / name / f"{i}.png", picture(10 * c + i))
    return root


def fails(code: int, *words: str, **how: Any) -> None:
    with pytest.raises(VgmError) as e:
        open_dataset(**how)
    assert e.value.code == code
    for word in words:
        assert word in f"{e.value.message} {e.value.hint}"
    assert "\n" not in e.value.message


# -- kinds of sets ---------------------------------------------------------------------------------------------------


def rgb(file: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(load_image(str(file)).convert("RGB"))


def test_class_folders_give_labels(tmp_path: Path) -> None:
    d = open_dataset(class_folders(tmp_path / "d"))
    f = d.facts
    assert (f.kind, f.count, f.size, f.channels, f.num_classes) == ("folder", 12, 16, 3, 3)
    assert f.class_names == ["cats", "dogs", "owls"]
    assert f.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(d.item(5)[0], picture(11)) and d.item(5)[1:] == (1, None)


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "d" / f"{i}.png", picture(i))
    d = open_dataset(tmp_path / "d")
    assert d.facts.num_classes == 0 and d.facts.labels is None and "label" not in d.gather([0])
    fails(2, "no labels", "class sub-folders", path=tmp_path / "d", labels=True)


def test_an_image_beside_class_folders_is_named(tmp_path: Path) -> None:
    save(class_folders(tmp_path / "d") / "stray.png", picture(99))
    assert open_dataset(tmp_path / "d").facts.num_classes == 0
    fails(2, "stray.png", path=tmp_path / "d", labels=True)


def test_splits_share_their_classes(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b", "c")):
        save(tmp_path / "d/train" / name / "0.png", picture(i))
    save(tmp_path / "d/val/c/1.png", picture(7))
    assert open_dataset(tmp_path / "d").facts.count == 3  # train, without being asked
    val = open_dataset(tmp_path / "d", split="val")
    assert val.facts.num_classes == 3 and val.facts.labels.tolist() == [2]
    fails(2, "no split 'test'", path=tmp_path / "d", split="test")


@pytest.mark.parametrize("name", ["mnist5k", "openmoji", "shapes"])
def test_shipped_sets_have_images_to_choose_by_and_others_to_report(name: str) -> None:
    """train and test are all images, fit and val all of train; every class is in each."""
    parts = {split: open_dataset(name, split=split) for split in ("train", "test", "fit", "val")}
    names = {split: set(d.source.names) for split, d in parts.items()}
    assert names["train"] | names["test"] == set(open_dataset(name).source.names)
    assert names["fit"] | names["val"] == names["train"]
    assert not names["train"] & names["test"] and not names["fit"] & names["val"]
    assert len({d.fingerprint() for d in parts.values()}) == 4
    assert all(set(d.facts.labels.tolist()) == set(range(d.facts.num_classes)) for d in parts.values())
    assert 0.08 < len(names["val"]) / len(names["train"]) < 0.12
    fails(2, "no split 'dev'", "train, test, fit, val", path=name, split="dev")


def test_hidden_files_and_other_files_are_passed_over(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d", 1)
    (root / ".cache").mkdir()
    save(root / ".cache/x.png", picture(1))
    (root / "cats/notes.md").write_text("no image")
    (root / "cats/._0.png").write_bytes(b"resource fork")
    assert open_dataset(root).facts.count == 3


def test_captions_from_metadata_and_from_text_files(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "d" / f"{i}.png", picture(i))
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}", "kind": "xyx"[i]} for i in range(3)]
    (tmp_path / "d/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d/1.txt").write_text("from the file\n")
    d = open_dataset(tmp_path / "d")
    assert d.facts.captions and d.gather([0, 1, 2])["text"] == ["picture 0", "from the file", "picture 2"]
    labelled = open_dataset(tmp_path / "d", label_key="kind")
    assert labelled.facts.class_names == ["x", "y"] and labelled.facts.labels.tolist() == [0, 1, 0]
    fails(1, "no label for 0.png", path=tmp_path / "d", label_key="colour")
    (tmp_path / "d/metadata.jsonl").write_text('{"file_name": "0.png", "text": "one"}\n{broken')
    fails(1, "line 2", "not valid JSON", path=tmp_path / "d")


def test_metadata_csv_and_missing_captions(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "d" / f"{i}.png", picture(i))
    (tmp_path / "d/metadata.csv").write_text("file_name,text\n0.png,only the first\n")
    assert open_dataset(tmp_path / "d").gather([0, 1])["text"] == ["only the first", ""]


def edm_zip(path: Path, listing: Any, n: int = 4, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as z:
        for i in range(n):
            z.writestr(f"00000/img{i:08d}.png", png(picture(i)))
        if listing is not None:
            z.writestr("dataset.json", json.dumps(listing))
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_edm_zip(tmp_path: Path, compression: int) -> None:
    labels = [[f"00000/img{i:08d}.png", 5 * (i % 2)] for i in range(4)]
    d = open_dataset(edm_zip(tmp_path / "x.zip", {"labels": labels}, compression=compression))
    assert (d.facts.kind, d.facts.count, d.facts.num_classes) == ("zip", 4, 6)
    assert d.facts.labels.tolist() == [0, 5, 0, 5] and np.array_equal(d.item(3)[0], picture(3))


def test_edm_zip_without_labels_or_with_some_missing(tmp_path: Path) -> None:
    assert open_dataset(edm_zip(tmp_path / "x.zip", {"labels": None})).facts.num_classes == 0
    fails(2, "dataset.json holds no labels", path=tmp_path / "x.zip", labels=True)
    fails(1, "no label for", path=edm_zip(tmp_path / "y.zip", {"labels": [["00000/img00000000.png", 1]]}))
    vectors = {"labels": [[f"00000/img{i:08d}.png", [0.0, 1.0]] for i in range(4)]}
    fails(1, "vectors", path=edm_zip(tmp_path / "z.zip", vectors))


def test_too_few_class_names_do_not_lose_classes(tmp_path: Path) -> None:
    labels = [[f"00000/img{i:08d}.png", i] for i in range(4)]
    d = open_dataset(edm_zip(tmp_path / "x.zip", {"labels": labels, "class_names": ["cat", "dog"]}))
    assert d.facts.num_classes == 4 and d.facts.class_names == ["cat", "dog", "2", "3"]


def test_a_zipped_folder_with_a_folder_around_it(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        for p in sorted(root.rglob("*.png")):
            z.write(p, f"photos/{p.relative_to(root)}")
        z.writestr("__MACOSX/photos/cats/._0.png", b"resource fork")
    d = open_dataset(tmp_path / "x.zip")
    assert d.facts.class_names == ["cats", "dogs", "owls"] and d.facts.count == 12


def test_a_damaged_zip(tmp_path: Path) -> None:
    content = edm_zip(tmp_path / "x.zip", {"labels": None}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    fails(1, "not a readable zip", path=tmp_path / "cut.zip")
    at = content.index(b"IDAT") + 20  # one image of four loses a byte
    (tmp_path / "hit.zip").write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    d = open_dataset(tmp_path / "hit.zip")
    assert len(d) == 3 and d.facts.skipped == ["00000/img00000000.png"]


def tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as t:
        for i, sample in enumerate(samples):
            for field, content in sample.items():
                member = tarfile.TarInfo(f"./{path.stem}-{i:04d}.{field}")
                member.size = len(content)
                t.addfile(member, io.BytesIO(content))
    return path


def test_webdataset_tars(tmp_path: Path) -> None:
    for s in range(3):
        samples = [
            {"cls": str(i).encode(), "png": png(picture(4 * s + i)), "txt": f"text {i}".encode()} for i in range(4)
        ]
        tar(tmp_path / f"part-{s:03d}.tar", samples)
    whole = open_dataset(tmp_path / "part-{000..002}.tar")
    assert (whole.facts.kind, whole.facts.count, whole.facts.num_classes) == ("tar", 12, 4)
    assert np.array_equal(whole.item(9)[0], picture(9)) and whole.item(9)[1:] == (1, "text 1")
    assert open_dataset(tmp_path).facts.count == 12  # a folder of shards
    assert open_dataset(tmp_path / "part-001.tar").facts.count == 4
    fails(2, "no such tar file", "part-003.tar", path=tmp_path / "part-{000..003}.tar")


def test_tar_labels_by_name_and_in_json(tmp_path: Path) -> None:
    names = [{"png": png(picture(i)), "cls": n} for i, n in enumerate((b"owl", b"cat", b"owl"))]
    d = open_dataset(tar(tmp_path / "n.tar", names))
    assert d.facts.class_names == ["cat", "owl"] and d.facts.labels.tolist() == [1, 0, 1]
    rows = [{"png": png(picture(i)), "json": json.dumps({"label": i, "caption": f"no {i}"}).encode()} for i in range(3)]
    d = open_dataset(tar(tmp_path / "j.tar", rows))
    assert d.facts.labels.tolist() == [0, 1, 2] and d.item(2)[2] == "no 2"
    masked = tar(tmp_path / "m.tar", [{"mask.png": png(picture(8)), "png": png(picture(9)), "depth.png": b""}])
    assert np.array_equal(open_dataset(masked).item(0)[0], picture(9))
    fails(1, "no label for n.tar/n-0001", path=tar(tmp_path / "n.tar", [names[0], {"png": png(picture(1))}]))


def test_a_tar_that_was_cut_off_keeps_what_is_whole(tmp_path: Path) -> None:
    content = tar(tmp_path / "x.tar", [{"png": png(picture(i, (64, 64)))} for i in range(4)]).read_bytes()
    (tmp_path / "x.tar").write_bytes(content[: len(content) // 2])
    d = open_dataset(tmp_path / "x.tar")
    assert 1 <= len(d) < 4 and d.facts.skipped == ["x.tar"]
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    fails(1, "y.tar", "not a readable tar", path=tmp_path / "y.tar")


def test_brace_names() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}{0..1}") == ["x0", "x1", "y0", "y1"]
    assert expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_in_the_adm_layout(tmp_path: Path, compressed: bool) -> None:
    images = np.stack([picture(i) for i in range(5)])
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", arr_0=images, arr_1=np.array([0, 2, 1, 2, 0]))
    d = open_dataset(tmp_path / "x.npz")
    assert (d.facts.kind, d.facts.count, d.facts.num_classes) == ("npz", 5, 3)
    assert np.array_equal(d.images(range(5)).permute(0, 2, 3, 1).numpy(), images)
    np.savez(tmp_path / "y.npz", images=images)
    fails(2, "no labels", "labels", path=tmp_path / "y.npz", labels=True)


@pytest.mark.parametrize(
    "as_stored",
    [
        lambda a: a.transpose(0, 3, 1, 2),
        lambda a: a.astype(np.float32) / 255,
        lambda a: a.astype(np.float32) / 127.5 - 1,
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.uint16) * 257,
    ],
    ids=["channels first", "[0, 1]", "[-1, 1]", "int64", "16 bits"],
)
def test_npz_arrays_of_other_ranges_and_layouts(tmp_path: Path, as_stored: Any) -> None:
    images = np.stack([picture(i) for i in range(3)])
    images[0, 0, 0] = (0, 128, 255)
    np.savez(tmp_path / "x.npz", images=as_stored(images))
    assert np.array_equal(open_dataset(tmp_path / "x.npz").images(range(3)).permute(0, 2, 3, 1).numpy(), images)


def test_npz_that_is_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    fails(2, "statistics", path=tmp_path / "stats.npz")
    np.savez(tmp_path / "odd.npz", images=np.zeros((4, 5)))
    fails(1, "(4, 5)", path=tmp_path / "odd.npz")
    np.savez(tmp_path / "pair.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(3))
    fails(1, "4 images but 3 labels", path=tmp_path / "pair.npz")
    np.savez(tmp_path / "objects.npz", images=np.array([{}, {}]))
    fails(1, "Python objects", path=tmp_path / "objects.npz")
    (tmp_path / "text.npz").write_text("hello")
    fails(1, "not a readable .npz", path=tmp_path / "text.npz")


def test_shipped_sets() -> None:
    d = open_dataset()
    assert (d.facts.count, d.facts.size, d.facts.channels, d.facts.num_classes) == (5000, 28, 1, 10)
    assert np.bincount(d.facts.labels).tolist() == [500] * 10
    shapes = open_dataset("shapes", size=24)
    assert shapes.facts.size == 24 and shapes.facts.captions and shapes.facts.class_names[2] == "triangle"
    assert torch.equal(shapes.images(range(9)), open_dataset("shapes", size=24).images(range(9)))


def test_what_is_no_data(tmp_path: Path) -> None:
    fails(2, "no such data", "mnist5k", path="mnist5")
    (tmp_path / "x.pkl").write_bytes(b"no")
    fails(2, "no kind of data set", path=tmp_path / "x.pkl")
    (tmp_path / "empty").mkdir()
    fails(1, "empty", path=tmp_path / "empty")
    fails(2, "unknown crop 'midle'", path="shapes", crop="midle")
    fails(2, "channels=4", path="shapes", channels=4)
    fails(2, "size=0", path="mnist5k", size=0)


# -- kinds of image files --------------------------------------------------------------------------------------------


def test_grey_and_colour_are_seen(tmp_path: Path) -> None:
    save(tmp_path / "grey/0.png", picture(0, channels=1))
    Image.fromarray(picture(1, channels=1)[..., 0]).convert("P").save(tmp_path / "grey/1.png")
    assert open_dataset(tmp_path / "grey").facts.channels == 1
    save(tmp_path / "grey/2.png", picture(2))
    mixed = open_dataset(tmp_path / "grey")
    assert mixed.facts.channels == 3 and np.array_equal(mixed.item(0)[0], picture(0, channels=1).repeat(3, -1))
    assert open_dataset(tmp_path / "grey", channels=1).item(2)[0].shape == (16, 16, 1)


def test_palette_bilevel_and_cmyk(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    red.quantize(4).save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(rgb(tmp_path / "palette.png").astype(int) - (200, 30, 40)).max() <= 4
    assert np.abs(rgb(tmp_path / "cmyk.tif").astype(int) - (200, 30, 40)).max() <= 2
    Image.new("1", (16, 16), 1).save(tmp_path / "bits.png")
    assert (rgb(tmp_path / "bits.png") == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.save(tmp_path / "x.png", transparency=0)
    else:
        Image.new(mode, (8, 8), 0).save(tmp_path / "x.png")
    assert (rgb(tmp_path / "x.png") == 255).all()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert (abs(rgb(tmp_path / "half.png").astype(int) - 127) <= 1).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]] * 4, np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    d = open_dataset(tmp_path)
    assert d.facts.channels == 1 and d.item(0)[0][0, :, 0].tolist() == [0, 1, 128, 255]
    assert eight_bits(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
    assert eight_bits(np.array([0.0, 100.0, 255.0])).tolist() == [0, 100, 255]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 16), "black")
    image.paste((255, 255, 255), (0, 0, 12, 16))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, this is a quarter turn clockwise
    image.save(tmp_path / "x.png", exif=exif)
    d = open_dataset(tmp_path, size=16)
    x = d.item(0)[0]
    assert x.shape == (16, 16, 3) and x[0].mean() > 250 and x[-1].mean() < 5  # white on top


def test_any_size_becomes_one_square(tmp_path: Path) -> None:
    for i, size in enumerate([(40, 30), (30, 50), (30, 30), (64, 100)]):
        save(tmp_path / "d" / f"{i}.png", picture(i, size))
    d = open_dataset(tmp_path / "d")
    assert d.facts.size == 24  # the most common short side, 30, down to a multiple of 8
    assert d.images(range(4)).shape == (4, 3, 24, 24)
    for i in range(4):
        want = center_crop_arr(Image.open(tmp_path / "d" / f"{i}.png"), 24)
        assert np.array_equal(d.item(i)[0], np.asarray(want))
    fails(2, "not squares of one size", path=tmp_path / "d", crop="none")
    assert open_dataset(tmp_path / "d", size=17).facts.size == 17


def test_squares_of_one_size_stay_as_they_are(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "d" / f"{i}.png", picture(i, (21, 21)))
    for crop in set(CROPS) - {"random"}:
        d = open_dataset(tmp_path / "d", crop=crop)
        assert d.facts.size == 21 and np.array_equal(d.item(1)[0], picture(1, (21, 21))), crop


def test_crops_differ_where_there_is_something_to_crop(tmp_path: Path) -> None:
    save(tmp_path / "d/0.png", picture(0, (40, 32)))
    seen = {crop: open_dataset(tmp_path / "d", size=16, crop=crop).item(0)[0] for crop in ("adm", "center", "resize")}
    for a, b in itertools.combinations(seen, 2):
        assert not np.array_equal(seen[a], seen[b])


# -- unreadable files ------------------------------------------------------------------------------------------------


def spoil(root: Path) -> Path:
    """Five good images and three bad ones."""
    for i in range(5):
        save(root / f"{i}.png", picture(i))
    good = (root / "0.png").read_bytes()
    (root / "cut.png").write_bytes(good[: len(good) // 2])
    (root / "noise.jpg").write_bytes(b"not an image")
    (root / "zero.webp").write_bytes(b"")
    return root


def test_unreadable_files_are_named_and_left_out(tmp_path: Path) -> None:
    d = open_dataset(spoil(tmp_path / "d"))
    assert len(d) == 5 and sorted(d.facts.skipped) == ["cut.png", "noise.jpg", "zero.webp"]
    assert [np.array_equal(d.item(i)[0], picture(i)) for i in range(5)] == [True] * 5


def test_of_large_sets_they_are_replaced_when_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "VERIFY", 2)
    d = open_dataset(spoil(tmp_path / "d"))
    assert d.memory is None and len(d) == 8 and d.facts.skipped == []
    assert d.gather(range(8))["x"].shape == (8, 3, 16, 16)
    assert sorted(d.facts.skipped) == ["cut.png", "noise.jpg", "zero.webp"]
    d.gather(range(8))
    assert len(d.facts.skipped) == 3  # each is named once
    assert "1 picture that cannot be read so far, now cut.png" in capsys.readouterr().err


def test_nothing_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(b"nothing")
    (tmp_path / "y.png").write_bytes(b"nothing")
    fails(1, "none of the 2 images", "x.png", path=tmp_path)
    monkeypatch.setattr(module, "VERIFY", 0)
    fails(1, "none of the 2 images", path=tmp_path)


# -- batches ---------------------------------------------------------------------------------------------------------


def take(dataset: Any, size: int, n: int, **how: Any) -> list[dict[str, Any]]:
    return list(itertools.islice(Batches(dataset, size, **{"seed": 0, **how}), n))


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) if k != "text" else x[k] == y[k] for k in x)
        for x, y in zip(a, b)
    )


@pytest.fixture(params=["memory", "disk"])
def twelve(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """12 labelled images, decoded at opening or when read."""
    if request.param == "disk":
        monkeypatch.setattr(module, "VERIFY", 4)
    d = open_dataset(class_folders(tmp_path / "d"))
    assert (d.memory is None) == (request.param == "disk")
    return d


def test_batches_hold_what_the_contract_says(twelve: Any) -> None:
    batch = take(twelve, 5, 1)[0]
    assert batch["x"].shape == (5, 3, 16, 16) and batch["x"].dtype == torch.float32
    assert -1 <= batch["x"].min() < -0.9 and 0.9 < batch["x"].max() <= 1
    assert batch["label"].tolist() == twelve.facts.labels[batch["index"]].tolist()
    assert torch.equal(batch["x"], twelve.pixels(batch["index"]))
    assert "label" not in take(twelve, 5, 1, labels=False)[0]


def test_the_order_is_the_seeds(twelve: Any) -> None:
    a = take(twelve, 5, 6)
    assert same(a, take(twelve, 5, 6)) and not same(a, take(twelve, 5, 6, seed=1))
    stream = torch.cat([b["index"] for b in a]).tolist()
    assert sorted(stream[:12]) == sorted(stream[12:24]) == list(range(12)) and stream[:12] != stream[12:24]


def test_any_step_is_reached_directly(twelve: Any) -> None:
    whole = take(twelve, 5, 9, hflip=True)
    assert same(whole[4:], take(twelve, 5, 5, hflip=True, start=4))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_one_stream(twelve: Any, world: int) -> None:
    one = take(twelve, 6, 5, hflip=True)
    ranks = [take(twelve, 6 // world, 5, rank=r, world=world, hflip=True) for r in range(world)]
    for step, batch in enumerate(one):
        for k in ("x", "label", "index"):
            assert torch.equal(batch[k], torch.cat([r[step][k] for r in ranks])), k


def test_worker_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERIFY", 4)
    d = open_dataset(spoil(tmp_path / "d"), crop="random", size=12)
    alone = take(d, 3, 6, hflip=True)
    d = open_dataset(tmp_path / "d", crop="random", size=12)
    assert same(alone, take(d, 3, 6, hflip=True, workers=2))
    assert sorted(d.facts.skipped) == ["cut.png", "noise.jpg", "zero.webp"]  # told by the workers


def test_a_workers_error_is_still_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERIFY", 0)
    for i in range(2):
        save(tmp_path / "d" / f"{i}.png", picture(i))
    d = open_dataset(tmp_path / "d")
    for i in range(2):
        (tmp_path / "d" / f"{i}.png").write_bytes(b"gone")
    with pytest.raises(VgmError, match="2 images in a row cannot be read"):
        take(d, 2, 1, workers=1)


def test_flips_are_half_and_mirror_the_image(twelve: Any) -> None:
    plain, flipped = take(twelve, 12, 20), take(twelve, 12, 20, hflip=True)
    mirrored = 0
    for a, b in zip(plain, flipped):
        for x, y in zip(a["x"], b["x"]):
            assert torch.equal(x, y) or torch.equal(x.flip(-1), y)
            mirrored += not torch.equal(x, y)
    assert 90 <= mirrored <= 150  # of 240


def test_random_crops_are_functions_of_seed_and_position(tmp_path: Path) -> None:
    save(tmp_path / "d/0.png", picture(0, (40, 32)))
    d = open_dataset(tmp_path / "d", size=16, crop="random")
    a = take(d, 1, 6)
    assert same(a, take(d, 1, 6)) and same(a[3:], take(d, 1, 3, start=3))
    assert len({tuple(b["x"].flatten().tolist()) for b in a}) == 6


def test_small_sets_fill_large_batches(twelve: Any) -> None:
    batch = take(twelve, 30, 1)[0]
    counts = np.bincount(batch["index"].numpy())
    assert len(batch["x"]) == 30 and counts.min() == 2 and counts.max() == 3


def test_without_drop_last_an_epoch_ends_short(twelve: Any) -> None:
    sizes = [len(b["index"]) for b in take(twelve, 5, 6, drop_last=False)]
    assert sizes == [5, 5, 2, 5, 5, 2]
    ranks = [take(twelve, 4, 2, drop_last=False, rank=r, world=2) for r in range(2)]
    seen = torch.cat([b["index"] for r in ranks for b in r])
    assert sorted(seen.tolist()) == list(range(12)) and [len(b["index"]) for b in ranks[1]] == [4, 0]


def test_impossible_batches(twelve: Any) -> None:
    for how in ({"batch_size": 0}, {"batch_size": 4, "rank": 2, "world": 2}):
        with pytest.raises(VgmError, match="not possible"):
            Batches(twelve, **{"seed": 0, **how})


# -- identity --------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_sets_own(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d")
    print_ = open_dataset(root).fingerprint()
    assert print_ == open_dataset(root).fingerprint() and print_.startswith("v2:12-")
    assert print_ != open_dataset(root, size=8).fingerprint()
    assert print_ != open_dataset(root, crop="center").fingerprint()
    (root / "cats").rename(root / "zebras")
    assert print_ != open_dataset(root).fingerprint()


def test_archives_with_the_same_names_and_sizes_differ_by_content(tmp_path: Path) -> None:
    for name, i in (("a", 0), ("b", 1), ("c", 0)):
        np.savez(tmp_path / f"{name}.npz", images=picture(i)[None])
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as z:
            image = io.BytesIO()
            Image.fromarray(picture(i)).save(image, "BMP")
            z.writestr("0.bmp", image.getvalue())
    for kind in ("npz", "zip"):
        a, b, c = (open_dataset(tmp_path / f"{name}.{kind}").fingerprint() for name in "abc")
        assert a == c != b


@pytest.mark.parametrize("large", [False, True])
def test_other_pixels_under_the_same_names_and_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    from vgm_cli.data import fingerprint

    if large:  # evenly spaced images are read
        monkeypatch.setattr(fingerprint, "WHOLE", 0)
    seen = set()
    for i in range(2):
        Image.fromarray(picture(i)).save(tmp_path / "0.bmp")
        tar(tmp_path / "0.tar", [{"bmp": (tmp_path / "0.bmp").read_bytes()}])
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "0.bmp").rename(tmp_path / "d/0.bmp")
        seen |= {open_dataset(tmp_path / name).fingerprint() for name in ("d", "0.tar")}
    assert len(seen) == 4
    (tmp_path / "d/0.txt").write_text("a caption")
    assert open_dataset(tmp_path / "d").fingerprint() not in seen


def test_fingerprints_of_another_format_cannot_be_compared() -> None:
    from vgm_cli.data.fingerprint import same

    assert same("v2:3-a", "v2:3-a") is True and same("v2:3-a", "v2:3-b") is False
    assert same("3-a", "v2:3-a") is None and same(None, "v2:3-a") is None and same("3-a", "3-a") is None


def test_results_with_an_older_fingerprint_of_the_reference_are_compared() -> None:
    from vgm_cli.engine.evaluate.compare import compare_one

    def result(fingerprint: str) -> dict[str, Any]:
        return {"metric": "fid", "value": 1.0, "protocol": {"reference_fingerprint": fingerprint}}

    new, old = result("v2:5000-" + "a" * 24), result("5000-" + "b" * 24)
    assert compare_one(new, old)["comparable"] and "of different versions" in str(compare_one(new, old)["notes"])
    for other in ("v2:5000-" + "b" * 24, "statistics-" + "b" * 24, ""):
        assert not compare_one(new, result(other))["comparable"]


def test_facts_of_subsets_keep_their_classes(tmp_path: Path) -> None:
    """A class whose images are all unreadable keeps its number."""
    root = class_folders(tmp_path / "d", 2)
    for p in (root / "dogs").iterdir():
        p.write_bytes(b"gone")
    f = open_dataset(root).facts
    assert f.num_classes == 3 and f.labels.tolist() == [0, 0, 2, 2] and len(f.skipped) == 2


# -- vgm data --------------------------------------------------------------------------------------------------------


def test_info_says_what_training_sees(tmp_path: Path, vgm: Any) -> None:
    root = spoil(class_folders(tmp_path / "d") / "cats")
    code, out, err = vgm("data", "info", root.parent)
    assert code == 0, err
    assert "13 images of 16×16×3" in out
    assert "cats (5)" in out and "3 unreadable" in out and "cut.png" in out and "fingerprint" in out
    code, out, _ = vgm("data", "info", root.parent, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["classes"].keys() == {"cats", "dogs", "owls"} and facts["classes"]["dogs"] == 4
    assert sum(facts["classes"].values()) == facts["count"] and len(facts["skipped"]) == 3


def test_info_of_a_flat_folder_says_why_there_are_no_classes(tmp_path: Path, vgm: Any) -> None:
    save(tmp_path / "d/0.png", picture(0))
    (tmp_path / "d/0.txt").write_text("a red house")
    code, out, _ = vgm("data", "info", tmp_path / "d")
    assert code == 0 and "none: class sub-folders" in out and "'a red house'" in out


def test_info_errors(tmp_path: Path, vgm: Any) -> None:
    (tmp_path / "empty").mkdir()
    for code, *args in ((2, "nowhere"), (1, tmp_path / "empty"), (2, "mnist5k", "--crop", "sideways")):
        got, _, err = vgm("data", "info", *args)
        assert got == code and err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize("suffix", ["zip", "npz", "tar"])
def test_packing_keeps_images_labels_and_captions(tmp_path: Path, vgm: Any, suffix: str) -> None:
    root = class_folders(tmp_path / "d")
    for p in root.rglob("*.png"):
        p.with_suffix(".txt").write_text(f"{p.parent.name} {p.stem}")
    code, out, err = vgm("data", "pack", root, tmp_path / f"x.{suffix}", "--json")
    assert code == 0, err
    assert json.loads(out)["count"] == 12
    before, after = open_dataset(root), open_dataset(tmp_path / f"x.{suffix}")
    assert torch.equal(before.images(range(12)), after.images(range(12)))
    assert before.facts.labels.tolist() == after.facts.labels.tolist()
    if suffix != "npz":
        assert [after.item(i)[2] for i in range(12)] == [before.item(i)[2] for i in range(12)]
    if suffix == "zip":
        assert after.facts.class_names == before.facts.class_names
        with zipfile.ZipFile(tmp_path / "x.zip") as z:  # EDM's own layout
            assert json.loads(z.read("dataset.json"))["labels"][5] == ["00000/img00000005.png", 1]


def test_packing_crops_and_skips(tmp_path: Path, vgm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(tmp_path / "d")
    code, _, err = vgm("data", "pack", tmp_path / "d", tmp_path / "x.zip", "--size", 8, "--channels", 1)
    assert code == 0 and "3 unreadable" in err
    d = open_dataset(tmp_path / "x.zip")
    assert (d.facts.count, d.facts.size, d.facts.channels, d.facts.num_classes) == (5, 8, 1, 0)
    monkeypatch.setattr(module, "VERIFY", 2)  # now they are met only on the way
    assert vgm("data", "pack", tmp_path / "d", tmp_path / "y.zip")[0] == 0
    assert open_dataset(tmp_path / "y.zip").facts.count == 5
    code, _, err = vgm("data", "pack", tmp_path / "d", tmp_path / "y.npz")
    assert code == 1 and "cannot be read" in err and not (tmp_path / "y.npz").exists()


def test_packing_writes_all_or_nothing(tmp_path: Path, vgm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli.data import pack

    root = class_folders(tmp_path / "d")
    (tmp_path / "x.zip").write_bytes(b"what was there")
    real, calls = pack.png, []

    def full(image: np.ndarray) -> bytes:
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return real(image)

    monkeypatch.setattr(pack, "png", full)
    code, _, err = vgm("data", "pack", root, tmp_path / "x.zip", "--overwrite")
    assert code == 1 and "no space left" in err
    assert (tmp_path / "x.zip").read_bytes() == b"what was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "x.zip"]


def test_packing_refuses(tmp_path: Path, vgm: Any) -> None:
    np.savez(tmp_path / "x.npz", images=picture(0)[None])
    for args, words in (
        (("mnist5k", "x.rar"), "unknown kind of file"),
        (("mnist5k", "x.zip", "--crop", "random"), "random crops"),
        ((tmp_path / "x.npz", tmp_path / "x.npz"), "the set itself"),
    ):
        code, _, err = vgm("data", "pack", *args)
        assert code == 2 and words in err


def test_grid(tmp_path: Path, vgm: Any) -> None:
    root = class_folders(tmp_path / "d")
    code, out, _ = vgm("data", "grid", root, "--out", "x.png", "-n", 4, "--label", "owls,0", "--json")
    assert code == 0 and {row["label"] for row in json.loads(out)["images"]} <= {"owls", "cats"}
    with Image.open("x.png") as grid:
        assert grid.size == (2 * 6 * 16 + 3 * 2,) * 2  # 16 pixels shown as 96
        shown = np.asarray(grid)[2:98:6, 2:98:6]
    assert np.array_equal(shown, open_dataset(root).item(json.loads(out)["images"][0]["index"])[0])
    for args, words in (
        (("--out", "x.jpg"), "not a .png"),
        (("--out", "y.png", "--label", "wolves"), "unknown class"),
        (("--out", "x.png"), "exists"),
    ):
        code, _, err = vgm("data", "grid", root, *args)
        assert code == 2 and words in err
