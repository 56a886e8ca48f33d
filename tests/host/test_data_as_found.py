"""Data as people have them: names, tables, encodings, links, suffixes and ranges that other tools and systems leave.

What can be meant is read, what was assumed or left out is said, and the rest is an error in one sentence.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vgm_cli.data import files, open_dataset
from vgm_cli.data.decode import eight_bits
from vgm_cli.errors import VgmError


def picture(i: int, mode: str = "RGB", size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)).convert(mode)


def encoded(i: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(i).save(file, kind)
    return file.getvalue()


def folder(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(i))
    return root


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(zipfile.ZipInfo(name), content)
    return path


def tarred(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as t:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            t.addfile(member, io.BytesIO(content))
    return path


def captions(dataset: Any) -> dict[str, str | None]:
    return {dataset.name(i): dataset.caption(i) for i in range(len(dataset))}


def said(dataset: Any) -> str:
    return "\n".join(dataset.facts.remarks)


def refused(code: int, *words: str, **how: Any) -> None:
    with pytest.raises(VgmError) as e:
        open_dataset(**how)
    assert e.value.code == code, e.value.message
    for word in words:
        assert word in f"{e.value.message} {e.value.hint}"
    assert "\n" not in e.value.message


# -- zips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["photos\\cat\\0.png", "photos\\dog\\0.PNG", "photos\\empty\\"],
        ["photos/cat/0.png", "photos\\dog\\0.png"],
        ["./photos/cat/0.png", "photos//dog/0.png", "__MACOSX/photos/cat/._0.png", "photos/.DS_Store"],
        ["a/b/photos/cat/0.png", "a/b/photos/dog/0.png"],
    ],
    ids=["backslashes", "both", "dots and macOS", "folders around it"],
)
def test_zips_of_other_systems(tmp_path: Path, names: list[str]) -> None:
    d = open_dataset(
        zipped(tmp_path / "x.zip", {n: encoded(i) if "png" in n.lower() else b"" for i, n in enumerate(names)})
    )
    assert d.facts.class_names == ["cat", "dog"] and d.facts.labels.tolist() == [0, 1]
    assert np.array_equal(d.item(1)[0], np.asarray(picture(1)))


def test_zip_names_in_utf8_that_do_not_say_so(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {f"{c}/0.png": encoded(i) for i, c in enumerate(("käse", "owl"))})
    content = path.read_bytes()
    flags = content.replace(b"\x14\x00\x00\x08", b"\x14\x00\x00\x00")  # the mark of UTF-8 names, as macOS leaves it out
    assert flags != content
    path.write_bytes(flags)
    assert open_dataset(path).facts.class_names == ["käse", "owl"]


def test_encrypted_zips_and_names_that_stand_in_a_zip_twice(tmp_path: Path) -> None:
    content = zipped(tmp_path / "x.zip", {"0.png": encoded(0)}).read_bytes()
    for mark in (b"PK\x03\x04\x14\x00", b"PK\x01\x02\x14\x03\x14\x00"):
        content = content.replace(mark + b"\x00", mark + b"\x01")
    (tmp_path / "x.zip").write_bytes(content)
    refused(1, "encrypted", path=tmp_path / "x.zip")
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "y.zip", "w") as z:
        z.writestr("0.png", encoded(0))
        z.writestr("0.png", encoded(1))
    d = open_dataset(tmp_path / "y.zip")
    assert len(d) == 1 and "1 name" in said(d) and np.array_equal(d.item(0)[0], np.asarray(picture(1)))


# -- tables ----------------------------------------------------------------------------------------------------------

CATS = ("cat/0.png", "cat/1.png", "dog/0.png")


@pytest.mark.parametrize(
    "spelled",
    [
        lambda n: n.replace("/", "\\"),
        lambda n: f"./{n}",
        lambda n: f"/home/somebody/photos/{n}",
        lambda n: "C:\\photos\\" + n.replace("/", "\\"),
        lambda n: f"photos/{n}",
        lambda n: n.upper(),
    ],
    ids=["backslashes", "dot", "absolute", "drive", "a folder too many", "case"],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "dataset.json"])
def test_names_in_tables(tmp_path: Path, spelled: Any, kind: str) -> None:
    root = folder(tmp_path / "d", *CATS)
    rows = [(spelled(n), f"this is {n}") for n in CATS]
    if kind == "jsonl":
        (root / "metadata.jsonl").write_text("\n\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows))
    elif kind == "csv":
        (root / "metadata.csv").write_text("file_name,text\n" + "\n".join(f"{n},{t}" for n, t in rows))
    else:
        labels = [[n, "cat" in n.lower()] for n, _ in rows]
        (root / "dataset.json").write_text(json.dumps({"labels": labels, "captions": rows}))
    d = open_dataset(root)
    assert captions(d) == {n: f"this is {n}" for n in CATS}
    assert not d.facts.remarks
    if kind == "dataset.json":
        assert d.facts.labels.tolist() == [1, 1, 0]


def test_one_table_above_the_splits_is_read_for_each(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", "train/0.png", "train/1.png", "test/0.png")
    rows = [{"file_name": n, "text": n} for n in ("train/0.png", "train/1.png", "test/0.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(open_dataset(root)) == {"0.png": "train/0.png", "1.png": "train/1.png"}
    d = open_dataset(root, split="test")
    assert captions(d) == {"0.png": "test/0.png"} and not d.facts.remarks


def test_a_prefix_too_many_inside_a_split_and_one_too_few_above_it(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", "train/0.png", "test/1.png")
    (root / "train/metadata.csv").write_text("file_name,text\ntrain/0.png,inside\n")
    assert captions(open_dataset(root)) == {"0.png": "inside"}
    (root / "train/metadata.csv").unlink()
    (root / "metadata.csv").write_text("file_name,text\n0.png,above\n1.png,too\n")
    assert captions(open_dataset(root)) == {"0.png": "above"}


def test_rows_without_an_image_and_images_without_a_row_are_told(tmp_path: Path, vgm: Any) -> None:
    root = folder(tmp_path / "d", *CATS)
    rows = [{"file_name": n, "text": n} for n in ("cat/0.png", "dog/1.png", "owl/0.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = vgm("data", "info", root)
    assert code == 0 and "2 of 3 rows meet no image, such as dog/1.png, owl/0.png" in err
    assert "2 of 3 images have no caption, such as cat/1.png, dog/0.png" in err
    assert captions(open_dataset(root)) == {"cat/0.png": "cat/0.png", "cat/1.png": None, "dog/0.png": None}
    (root / "metadata.jsonl").write_text(json.dumps(rows[1]))  # its only row does not become that of cat/1.png
    d = open_dataset(root)
    assert not d.facts.captions and "1 of 1 rows" in said(d)
    assert "captions     none" in vgm("data", "info", root)[1]


@pytest.mark.parametrize(
    "text",
    [
        'file_name;text\r\n0.png;"two\r\nlines"\r\n1.png;a cat, sitting\r\n',
        'file_name\ttext\n0.png\t"two\r\nlines"\n\n1.png\ta cat, sitting\n',
        'File Name,Caption\n0.png,"two\r\nlines"\n1.png,"a cat, sitting"\n',
        'prompt,image\n"two\r\nlines",0.png\n"a cat, sitting",1.png\n',
        'sep=;\nfile_name;text\n0.png;"two\r\nlines";\n1.png;a cat, sitting;\n',
    ],
    ids=["semicolons", "tabs", "other columns", "other order", "Excel"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_of_other_tools(tmp_path: Path, text: str, encoding: str) -> None:
    root = folder(tmp_path / "d", "0.png", "1.png")
    (root / "metadata.csv").write_bytes(text.encode(encoding))
    d = open_dataset(root)
    assert captions(d) == {"0.png": "two\r\nlines", "1.png": "a cat, sitting"} and not d.facts.remarks


def test_text_in_any_encoding_or_an_error_that_names_the_file(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", "0.png", "1.png")
    row = '{"file_name": "0.png", "text": "Žluťoučký\u2028kůň"}'
    for encoding in ("utf-8", "utf-16", "utf-16-le", "utf-32"):
        (root / "metadata.jsonl").write_bytes(row.encode(encoding))
        assert captions(open_dataset(root))["0.png"] == "Žluťoučký\u2028kůň"
    (root / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "Käse"}'.encode("cp1252"))
    (root / "1.txt").write_bytes("über".encode("cp1252"))
    d = open_dataset(root)
    assert captions(d) == {"0.png": "Käse", "1.png": "über"}
    assert "metadata.jsonl" in said(d) and "1.txt" in said(d) and said(d).count("cp1252") == 2
    (root / "1.txt").write_bytes(b"\x81\x8d")
    refused(1, "1.txt", "unknown encoding", path=root)
    (root / "1.txt").unlink()
    (root / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "text": "\x81\x8d"}')
    refused(1, "metadata.jsonl", "unknown encoding", path=root)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", '{"file_name": "0.png"}\n\n{oops', "line 3"),
        ("metadata.jsonl", '{"file_name": "0.png"}\n[1]', "line 2"),
        ("metadata.jsonl", '{"text": "no name"}', "no file_name"),
        ("metadata.csv", "file_name,text\n0.png,a cat, sitting", "line 2 has more values"),
        ("metadata.csv", 'file_name,text\n0.png,"never closed\n1.png,x', "is not CSV"),
        ("metadata.csv", "0.png,a cat\n1.png,a dog", "no file_name"),
        ("dataset.json", '{"labels": [["0.png"]]}', "not a list of [name, label]"),
        ("dataset.json", "[" * 100_000, "nested too deeply"),
        ("dataset.json", '{"labels": [["0.png", 0], ["1.png", 1]], "class_names": ["a", "a"]}', "different names"),
    ],
)
def test_broken_tables_are_named_with_their_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    root = folder(tmp_path / "d", "0.png", "1.png")
    (root / name).write_text(text)
    refused(1, name, words, path=root)


def test_labels_of_a_flat_folder_come_from_its_table(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", "0.png", "1.png", "2.png")
    (root / "metadata.csv").write_text("file_name,label\n0.png,owl\n1.png,cat\n2.png,owl\n")
    d = open_dataset(root)
    assert d.facts.class_names == ["cat", "owl"] and d.facts.labels.tolist() == [1, 0, 1]


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [100_000, 10**9, 2**63 - 1, 10**30, 1e300, np.inf, np.nan, -1, 0.5])
def test_numbers_that_are_no_classes(tmp_path: Path, top: float) -> None:
    images = np.full((8, 8, 8), 7, np.uint8)
    if abs(top) < 2**63 or isinstance(top, float):
        np.savez(tmp_path / "x.npz", images=images, labels=np.array([0] * 7 + [top]))
        refused(1, "label", path=tmp_path / "x.npz")
    if isinstance(top, int):
        root = folder(tmp_path / "d", "0.png", "1.png")
        (root / "dataset.json").write_text(json.dumps({"labels": [["0.png", 0], ["1.png", top]]}))
        refused(1, "label", path=root)
        tarred(tmp_path / "x.tar", {"0.png": encoded(0), "0.cls": str(top).encode()})
        refused(1, "label", path=tmp_path / "x.tar")


def test_numbers_that_no_image_has_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.full((3, 8, 8), 7, np.uint8), labels=np.array([0, 5, 9]))
    d = open_dataset(tmp_path / "x.npz")
    assert d.facts.num_classes == 10 and "10 classes, of which 3 have images: 0, 5, 9" in said(d)
    np.savez(tmp_path / "y.npz", images=np.full((3, 8, 8), 7, np.uint8), labels=np.array([0, 2, 1]))
    assert not said(open_dataset(tmp_path / "y.npz"))


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["docs/0.png", "preview.png"])
@pytest.mark.parametrize("names", [("train", "val"), ("Training", "dev"), ("train", "VALIDATION"), ("train", "test")])
def test_splits_with_something_beside_them(tmp_path: Path, vgm: Any, beside: str, names: tuple[str, str]) -> None:
    root = folder(tmp_path / "d", *(f"{s}/{c}/{i}.png" for s in names for c in ("a", "b") for i in range(2)), beside)
    code, _, err = vgm("data", "info", root)
    assert code == 0 and "look like splits" in err and f"data.split={names[0]}" in err and beside.split("/")[0] in err
    d = open_dataset(root, split=names[1].lower())
    assert len(d) == 4 and d.facts.class_names == ["a", "b"] and not d.facts.remarks


def test_classes_that_are_named_like_a_split(tmp_path: Path) -> None:
    """Trains and cars: one folder named like a split, its images directly in it."""
    d = open_dataset(folder(tmp_path / "d", "train/0.png", "car/0.png"))
    assert d.facts.class_names == ["car", "train"] and not d.facts.remarks


def test_where_there_are_no_splits_a_wish_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.full((3, 8, 8), 7, np.uint8))
    (tmp_path / "t").mkdir()
    tarred(tmp_path / "t/x.tar", {"0.png": encoded(0)})
    for name in ("x.npz", "t/x.tar", "t"):
        refused(2, "no splits", path=tmp_path / name, split="val")


def test_linked_folders_are_read_and_cycles_cut(tmp_path: Path) -> None:
    folder(tmp_path / "real", "cat/0.png", "dog/1.png")
    root = tmp_path / "d"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "real", target_is_directory=True)
    (root / "val").symlink_to("train", target_is_directory=True)
    (tmp_path / "real/cat/back").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real/owl").symlink_to("dog", target_is_directory=True)
    for split in ("train", "val"):
        d = open_dataset(root, split=split)
        assert [d.name(i) for i in range(len(d))] == ["cat/0.png", "dog/1.png", "owl/1.png"]
    (tmp_path / "real/dog/gone.png").symlink_to("nothing")
    d = open_dataset(root)
    assert len(d) == 3 and sorted(d.facts.skipped) == ["train/dog/gone.png", "train/owl/gone.png"]


def test_links_that_lead_round_and_round_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOPS", 20)
    for i in range(8):
        (tmp_path / f"f{i}").mkdir()
        if i:
            for name in ("a", "b"):
                (tmp_path / f"f{i - 1}" / name).symlink_to(tmp_path / f"f{i}", target_is_directory=True)
    refused(1, "again and again", path=tmp_path / "f0")


def test_what_is_found_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "d", "a/0.png", "b/1.png", "b/c/2.png")
    (root / "z").symlink_to("b", target_is_directory=True)
    (root / "metadata.csv").write_text("file_name,text\na/0.png,above\n")
    (root / "a/metadata.csv").write_text("file_name,text\n0.png,beside\n")
    scan = os.scandir

    class Backwards(list):
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc: object) -> None: ...

    forwards = open_dataset(root)
    monkeypatch.setattr(files.os, "scandir", lambda p: Backwards(sorted(scan(p), key=lambda e: e.name, reverse=True)))
    backwards = open_dataset(root)
    assert captions(forwards) == captions(backwards) and captions(forwards)["a/0.png"] == "beside"
    assert forwards.fingerprint() == backwards.fingerprint()


def test_names_that_are_no_utf8(tmp_path: Path, vgm: Any) -> None:
    root = os.fsencode(tmp_path / "d")
    for i, name in enumerate((b"\xe9t\xe9", "été".encode())):
        os.makedirs(root + b"/" + name)
        with open(root + b"/" + name + b"/\xff.png", "wb") as f:
            f.write(encoded(i))
    code, out, err = vgm("data", "info", tmp_path / "d", "--json")
    assert code == 0 and json.loads(out)["num_classes"] == 2, err
    assert vgm("data", "info", tmp_path / "d")[0] == 0
    for suffix in ("zip", "tar", "npz"):
        assert vgm("data", "pack", tmp_path / "d", tmp_path / f"x.{suffix}")[0] == 0
        assert len(open_dataset(tmp_path / f"x.{suffix}")) == 2


# -- suffixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "PCX", "SGI", "QOI", "DDS", "ICO"]
)
@pytest.mark.parametrize("name", ["photo", "photo.img", "photo.jpg", "photo.JPG_large"])
def test_a_picture_is_what_its_content_says(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(encoded(0, kind))
    (tmp_path / "d" / "beside.weird").write_bytes(bytes(range(256)))
    zipped(tmp_path / "x.zip", {name: encoded(0, kind), "beside.weird": bytes(range(256))})
    for path in (tmp_path / "d", tmp_path / "x.zip"):
        d = open_dataset(path)
        assert len(d) == 1 and d.facts.others == {".weird": 1}
    tarred(tmp_path / "x.tar", {f"1.{name.rpartition('.')[2]}": encoded(0, kind), "1.cls": b"0"})
    assert open_dataset(tmp_path / "x.tar").facts.num_classes == 1


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, vgm: Any, tiny: Path) -> None:
    root = folder(tmp_path / "d", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    for name in ("a/0.heic", "a/1.heic", "clip.mp4", "README.md"):
        (root / name).write_bytes(b"ftyp")
    (root / "a/cut.png").write_bytes(encoded(0)[:40])
    os.mkfifo(root / "b/pipe.png")
    out = vgm("data", "info", root)[1]
    assert "4 files, no pictures: .heic (2)" in out and "2 unreadable: b/pipe.png, a/cut.png" in out
    facts = json.loads(vgm("data", "info", root, "--json")[1])
    assert facts["others"] == {".heic": 2, ".mp4": 1, ".md": 1} and facts["skipped"] == ["b/pipe.png", "a/cut.png"]
    for words in (("train", tiny, f"data.path={root}", "train.steps=1", "data.size=28", "data.channels=1"),
                  ("evaluate", root, "--reference", root, "--metrics", "psnr")):  # fmt: skip
        code, _, err = vgm(*words)
        assert code == 0 and "2 unreadable pictures left out: b/pipe.png, a/cut.png" in err, err
        assert "3 files not used, being no pictures: .heic (2), .mp4 (1)" in err


def test_a_run_of_an_older_version_goes_on_with_a_word(tmp_path: Path, vgm: Any, tiny: Path) -> None:
    """Its fingerprint says nothing of contents, so that it cannot be compared; one of today is."""
    assert vgm("train", tiny, "train.steps=1", "--out", tmp_path / "run")[0] == 0
    file = tmp_path / "run/data.json"
    facts = json.loads(file.read_text())
    for stored, code, words in (("5000-" + "a" * 24, 0, "an older version"), ("v2:5000-" + "a" * 24, 2, "fingerprint")):
        file.write_text(json.dumps(facts | {"fingerprint": stored}))
        got, _, err = vgm("train", tiny, "train.steps=2", "--out", tmp_path / "run", "--resume")
        assert got == code and words in err, err


def test_an_empty_set_says_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.heic").write_bytes(b"")
    refused(1, "empty", ".heic (1)", path=tmp_path / "d")


# -- tars ------------------------------------------------------------------------------------------------------------


def test_tar_names_with_dots(tmp_path: Path) -> None:
    names = ("img.0001", "img.0002", "v1.5-a", "v1.5-b", "d.x/one.two.three")
    content = {f"{n}.png": encoded(i) for i, n in enumerate(names)} | {
        f"{n}.cls": b"%d" % i for i, n in enumerate(names)
    }
    d = open_dataset(tarred(tmp_path / "x.tar", content | {f"{names[1]}.TXT": b"the second"}))
    assert [d.name(i) for i in range(len(d))] == [f"x.tar/{n}" for n in names]
    assert d.facts.labels.tolist() == [0, 1, 2, 3, 4] and d.caption(1) == "the second"
    for i in range(5):
        assert np.array_equal(d.item(i)[0], np.asarray(picture(i)))


def test_further_pictures_of_a_sample_and_links_are_told(tmp_path: Path) -> None:
    path = tarred(tmp_path / "x.tar", {"0.png": encoded(0), "0.mask.png": encoded(1), "0.cls": b"0"})
    with tarfile.open(path, "a") as t:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        t.addfile(link)
    d = open_dataset(path)
    assert len(d) == 1 and np.array_equal(d.item(0)[0], np.asarray(picture(0)))
    assert "1 further picture of samples not used: 0.mask.png" in said(d) and "1 image left out: links" in said(d)


def test_tar_texts_in_other_encodings(tmp_path: Path) -> None:
    content = {"0.png": encoded(0), "0.cls": "größe".encode("cp1252"), "0.txt": "größer".encode("utf-16")}
    d = open_dataset(tarred(tmp_path / "x.tar", content))
    assert d.facts.class_names == ["größe"] and d.caption(0) == "größer" and "cp1252" in said(d)
    with pytest.raises(VgmError, match=r"x\.tar/0"):
        open_dataset(tarred(tmp_path / "x.tar", content | {"0.cls": b"\x81"}))
    with pytest.raises(VgmError, match=r"the json of x\.tar/0 is not valid JSON"):
        open_dataset(tarred(tmp_path / "x.tar", {"0.png": encoded(0), "0.json": b"{"}))


# -- ranges ----------------------------------------------------------------------------------------------------------

RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(1, 8, 8)


def with_ends(a: np.ndarray, low: float, high: float) -> np.ndarray:
    a = a.copy()
    a.flat[0], a.flat[-1] = low, high
    return a


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (with_ends(RAMP / 127.5 - 1, -1.0, 1.02), "clipped to -1..1"),
        (with_ends(RAMP / 127.5 - 1, -1.3, 1.4).astype(np.float32), "clipped to -1..1"),
        (with_ends(RAMP / 255, 0, 1.000001), "clipped to 0..1"),
        (with_ends(RAMP / 255, -0.02, 1.05).astype(np.float16), "clipped to 0..1"),
        (with_ends(RAMP.astype(np.float32), -3, 258), "clipped to 0..255"),
        (with_ends(RAMP * 257.0, 0, 65535), ""),
        (with_ends(RAMP, 0, 255).astype(np.uint16), "taken as of 0..255"),
        (with_ends(RAMP, 0, 255).astype(np.uint32), "taken as of 0..255"),
        (with_ends(RAMP, 0, 255).astype(np.int32), "taken as of 0..255"),
        (with_ends(RAMP.astype(np.uint16) * 257, 0, 65535), "taken as of 0..65535"),
        (with_ends(RAMP.astype(np.uint64) * 16843009, 0, 2**32 - 1), "taken as of 0..4.29497e+09"),
    ],
    ids=lambda v: f"{v.dtype}" if isinstance(v, np.ndarray) else v.replace(" ", "-"),
)
def test_values_a_little_outside_their_range(tmp_path: Path, stored: np.ndarray, told: str) -> None:
    """One range for the whole array: a second, dark image does not get one of its own."""
    dark = np.zeros_like(stored) if stored.min() >= -0.5 else np.full_like(stored, -1)
    np.savez(tmp_path / "x.npz", images=np.concatenate([stored, dark]))
    d = open_dataset(tmp_path / "x.npz")
    want = np.concatenate([with_ends(RAMP, 0, 255), np.zeros_like(RAMP)])
    found = d.images([0, 1])[:, 0].numpy()
    assert np.abs(found.astype(int) - want).max() <= (stored.dtype == np.float16)
    assert told in said(d) and bool(told) == bool(said(d))


def test_values_of_no_range_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for images, words in (
        (rng.normal(size=(4, 8, 8, 3)), "no usual range"),
        (rng.integers(-128, 127, (4, 8, 8)).astype(np.int8), "no usual range"),
        (np.full((2, 8, 8), 1e9), "no usual range"),
        (with_ends(np.zeros((2, 8, 8), np.float16), np.nan, 1), "1 values that are NaN"),
        (with_ends(np.zeros((2, 8, 8)), np.inf, 1), "NaN or infinite"),
        (np.zeros((2, 8, 8), complex), "not pixels"),
    ):
        np.savez(tmp_path / "x.npz", images=images)
        refused(1, words, path=tmp_path / "x.npz")


def test_all_black_and_one_picture(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 2, (2, 8, 8)).astype(np.uint8))
    assert "all is black" in said(open_dataset(tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", images=np.asarray(picture(0)))
    d = open_dataset(tmp_path / "y.npz")
    assert len(d) == 1 and np.array_equal(d.item(0)[0], np.asarray(picture(0)))


def test_float_image_files(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name, values in {"a": RAMP[0] / 255 * 1.000001, "b": RAMP[0] / 127.5 - 1}.items():
        Image.fromarray(values.astype(np.float32)).save(tmp_path / f"d/{name}.tif")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "d/c.tif")
    d = open_dataset(tmp_path / "d")
    assert d.facts.skipped == ["c.tif"]
    assert all(np.array_equal(d.item(i)[0][..., 0], RAMP[0]) for i in range(2))
    with pytest.raises(ValueError, match="NaN"):
        eight_bits(np.array([0.0, np.nan]))


@pytest.mark.parametrize(("stored", "channels", "words"), [("RGB", 1, "turned grey"), ("L", 3, "three equal channels")])
def test_a_change_of_channels_is_told_once(tmp_path: Path, vgm: Any, stored: str, channels: int, words: str) -> None:
    (tmp_path / "d").mkdir()
    for i in range(3):
        picture(i, stored).save(tmp_path / f"d/{i}.png")
    code, _, err = vgm("data", "info", tmp_path / "d", "--channels", channels)
    assert code == 0 and err.count(words) == 1


# -- vgm data --------------------------------------------------------------------------------------------------------


def test_data_alone_says_what_there_is(vgm: Any) -> None:
    code, out, _ = vgm("data")
    assert code == 0 and "info" in out and "pack" in out
    rows = json.loads(vgm("ls", "datasets", "--json")[1])
    assert {"mnist5k", "shapes"} <= {row["name"] for row in rows} and all(row["summary"] for row in rows)


def test_one_image_is_not_1_images(tmp_path: Path, vgm: Any) -> None:
    folder(tmp_path / "d", "0.png")
    assert "d: 1 image of 16×16×3" in vgm("data", "info", tmp_path / "d")[1]


@pytest.mark.parametrize("suffix", ["zip", "npz", "tar"])
def test_pack_and_grid_replace_only_when_told(tmp_path: Path, vgm: Any, suffix: str) -> None:
    folder(tmp_path / "d", "0.png", "1.png")
    packed = tmp_path / f"p.{suffix}"
    packed.write_bytes(b"precious")
    for args, out in ((("pack", tmp_path / "d", packed), packed), (("grid", packed, "--out", "g.png"), Path("g.png"))):
        if out.name == "g.png":
            out.write_bytes(b"precious")
        code, _, err = vgm("data", *args)
        assert code == 2 and "exists" in err and "--overwrite" in err and out.read_bytes() == b"precious"
        assert vgm("data", *args, "--overwrite")[0] == 0 and out.read_bytes() != b"precious"


def test_a_set_is_never_packed_onto_itself(tmp_path: Path, vgm: Any) -> None:
    folder(tmp_path / "d", "0.png", "1.png")
    source = tmp_path / "sub/p.zip"
    source.parent.mkdir()
    assert vgm("data", "pack", tmp_path / "d", source)[0] == 0
    (tmp_path / "soft.zip").symlink_to(source)
    (tmp_path / "hard.zip").hardlink_to(source)
    (tmp_path / "folder").symlink_to("sub", target_is_directory=True)
    before = source.read_bytes()
    for target in ("sub/../sub/p.zip", "soft.zip", "hard.zip", "folder/p.zip"):
        for a, b in ((source, target), (tmp_path / target, source)):
            code, _, err = vgm("data", "pack", a, b, "--size", 8, "--overwrite")
            assert code == 2 and "the set itself" in err
    code, _, err = vgm("data", "pack", tmp_path / "d", tmp_path / "d/x.tar")
    assert code == 2 and "would hide" in err
    assert source.read_bytes() == before
