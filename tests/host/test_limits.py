"""Files of strangers: whatever they claim, nothing they say is allocated, looped over or printed without a bound."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vgm_cli.ui import LONGEST, clean

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2028x\nerror: spoofed\r\udcff"


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


# -- terminal ----------------------------------------------------------------------------------------------------------


def test_clean_shows_what_would_act():
    assert clean(HOSTILE) == (r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2028x\nerror: spoofed\r\udcff")
    assert clean("plain, ünïcode, 日本語, C:\\names") == "plain, ünïcode, 日本語, C:\\names"
    assert clean("👩\u200d🔬") == "👩\u200d🔬"  # a joined emoji stays whole
    assert len(clean("a" * 10**7)) < LONGEST + 100


def hostile_folder(root: Path) -> Path:
    for name in ("\x1b[31mcat", "\u202edog\n"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(root / name / f"{i}.png")
    (root / "\x1b[31mcat" / "\x1b[2Jbroken.png").write_bytes(b"no picture")
    (root / "\x1b[31mcat" / "0.txt").write_text("\x1b]2;title\x07")
    return root


def test_names_of_files_and_classes_reach_no_terminal(vgm, tmp_path):
    root = hostile_folder(tmp_path / "data\x1b[0m")
    code, out, err = vgm("data", "info", root)
    assert code == 0 and r"\x1b[31mcat" in out and r"\u202edog" in out and r"\x1b[2Jbroken.png" in out
    assert harmless(out) and harmless(err)
    code, out, _ = vgm("data", "info", root, "--json")
    assert code == 0 and out.isascii() and harmless(out)
    assert "\u202edog\n" in json.loads(out)["classes"]  # the document keeps the name


def test_headers_reach_no_terminal(vgm, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    component = {"kind": "model", "name": HOSTILE[:-1], "kwargs": {}}
    save_file({HOSTILE[:-1]: np.zeros(3, np.float32)}, path, {"vgm.component": json.dumps(component)})
    for args in (("inspect", path), ("inspect", path, "--tensors"), ("sample", path)):
        code, out, err = vgm(*args)
        assert harmless(out) and harmless(err) and "spoofed" in out + err
        assert not any(line.startswith("error: spoofed") for line in (out + err).splitlines())
    assert code != 0


def test_markup_in_names_is_no_markup(capsys, monkeypatch):
    import sys

    from vgm_cli.ui import UI

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    UI().table(["name"], [["[link=http://x]a[/link][red]b"], ["\x1b[1mc"]])
    out = capsys.readouterr().out
    assert "[link=http://x]a[/link][red]b" in out and r"\x1b[1mc" in out and "\x1b[1mc" not in out


# -- pickles -----------------------------------------------------------------------------------------------------------


def number(n: int) -> bytes:
    return b"\x8a" + bytes([len(d := n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True))]) + d


def call(name: str, *args: bytes) -> bytes:
    """GLOBAL, arguments, REDUCE."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n(".encode() + b"".join(args) + b"tR"


TUPLES = b")q\x00" + b"h\x00\x86q\x00" * 60  # t = (t, t), sixty times
LISTS = b"]q\x00" + b"0]h\x00ah\x00aq\x00" * 60
DICTS = b"}q\x00" + b"0}U\x01ah\x00sU\x01bh\x00sq\x00" * 60
MODULES = (  # a pickled torch module whose two children are the same module, sixty levels deep
    b"ctorch.nn.modules.linear\nLinear\n)\x81q\x00"
    + (
        b"0ctorch.nn.modules.linear\nLinear\n)\x81}(U\x0b_parameters}U\x08_modules}(U\x01ah\x00U\x01bh\x00uub"
        b"q\x00"
    ) * 60
)  # fmt: skip
PICKLES = {
    "set of a range": call("builtins.set", call("builtins.range", number(10**9))),
    "counter": call("collections.Counter", call("builtins.range", number(10**9))),
    "list of a list of ranges": call("builtins.list", call("builtins.range", number(3 * 10**6))),
    "bytearray": call("builtins.bytearray", number(4 * 10**9)),
    "bytes": call("builtins.bytes", number(4 * 10**9)),
    "old names": call("__builtin__.bytearray", number(4 * 10**9)),
    "deque": call("collections.deque", call("builtins.range", number(10**9))),
    "ordered": call("collections.OrderedDict", call("builtins.range", number(10**9))),
    "default": call("collections.defaultdict", call("builtins.range", number(10**9))),
    "memo": b"Nr\xff\xff\xff\x7f" + b"j\xff\xff\xff\x7f" * 3,
    "tuple as a key": b"}" + TUPLES + b"Ns",
    "tuple in a set": call("builtins.set", b"(" + TUPLES + b"l"),
    "frozenset": b"\x8f(" + TUPLES + b"\x90",
    "text of a tree": call("builtins.str", LISTS),
    "text of a long number": call("builtins.int", b"X" + struct.pack("<I", 10**5) + b"9" * 10**5),
    "long number": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01" * 100,
    "decimal number": b"L" + b"9" * 10**6 + b"L\n",
    "claimed bytes": b"\x8e" + struct.pack("<Q", 10**12) + b"x",
    "claimed bytearray": b"\x96" + struct.pack("<Q", 10**12) + b"x",
    "claimed frame": b"\x95" + struct.pack("<Q", 10**12) + b"N",
    "copies of a text": b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x000"
    + b"](" + b"c_codecs\nencode\n(h\x00U\x06latin1tR" * 1000 + b"e",
    "copies of a list": b"(" + b"N" * 10**5 + b"lq\x000](" + b"cbuiltins\nlist\n(h\x00tR" * 1000 + b"e",
    "arguments": b"(" + b"N" * 10**5 + b"tq\x000](" + b"cargparse\nNamespace\nh\x00R" * 1000 + b"e",
    "same hash": b"}(" + b"".join(number(k * (2**61 - 1)) + b"N" for k in range(2**10, 2**14)) + b"u",
    "nested lists": b"]" * 10**5 + b"a" * (10**5 - 1),
    "nested tuples": b")" + b"\x85" * 10**5,
    "tree of lists": LISTS,
    "tree of dictionaries": DICTS,
    "tree of tuples": TUPLES,
    "tree of modules": MODULES,
    "name of a tree": b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}(U\x0aclass_name" + LISTS
    + b"U\x05stateNutR",
    "persistent tree": LISTS + b"Q",
    "array without end": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    b"(K\x01(" + number(10**12) + b"tcnumpy\ndtype\n(U\x02f4tR(K\x03U\x01<NNNtb\x89U\x04abcdtb",
}  # fmt: skip


TORCH = (
    "set of a range",
    "bytearray",
    "tuple as a key",
    "same hash",
    "long number",
    "copies of a text",
    "tree of modules",
)


@pytest.mark.parametrize("suffix, kind", [*(("pkl", k) for k in PICKLES), *(("pt", k) for k in TORCH)])
def test_pickles_build_no_more_than_they_hold(vgm, tmp_path, suffix, kind):
    body = b"\x80\x02" + PICKLES[kind] + b"."
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(body)
    if suffix == "pt":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("a/data.pkl", body)
            z.writestr("a/version", "3\n")
    before, start = peak(), time.process_time()
    code, _, err = vgm("inspect", path)
    assert code in (1, 2) and err.startswith("error: ") and "may be a bug" not in err and len(err) < 1000, err
    assert time.process_time() - start < 5 and peak() - before < 200 << 20


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_an_honest_checkpoint_with_everything_in_it_is_read(tmp_path):
    import torch

    from vgm_cli.weights.reading import read as load

    state = torch.nn.Linear(4, 4).state_dict()
    content = {
        "model": state,
        "ema": {k: v.clone() for k, v in state.items()},
        "rng": (3, tuple(range(625)), None),
        "history": [0.5] * 10_000,
        "counts": Counter("abc"),
        "seen": {(0, 1), frozenset({2})},
        "array": np.arange(6.0).reshape(2, 3),
        "size": torch.Size([2, 3]),
        "raw": bytearray(b"abc"),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    for legacy in (False, True):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        found = load(tmp_path / "a.pt")
        assert torch.equal(found["model"]["weight"], state["weight"]) and found["rng"][1] == tuple(range(625))
        assert found["seen"] == content["seen"] and found["size"] == (2, 3) and found["raw"] == b"abc"


def test_tensors_that_repeat_a_few_bytes_are_refused(vgm, tmp_path):
    import torch

    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pt")
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "one.pt")
    base = torch.zeros(10**6)
    torch.save({f"w{i}": base[:] for i in range(200)}, tmp_path / "many.pt")
    assert vgm("inspect", tmp_path / "one.pt")[0] == 0
    for name in ("wide.pt", "many.pt"):
        code, _, err = vgm("inspect", tmp_path / name)
        assert code == 1 and "would build more than" in err


def test_packed_archives_of_weights_are_refused(vgm, tmp_path):
    import torch

    torch.save({"w": torch.zeros(10**6)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as a, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    code, _, err = vgm("inspect", tmp_path / "b.pt")
    assert code == 1 and "compressed" in err
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z, z.open("w.npy", "w") as f:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (50, 10**6)})
        f.write(header.getvalue())
        for _ in range(50):
            f.write(bytes(4 * 10**6))
    before = peak()
    for args in (("inspect",), ("convert",), ("data", "info"), ("evaluate",)):
        more = {"convert": [tmp_path / "x.safetensors"], "evaluate": ["--reference", tmp_path / "bomb.npz"]}
        code, _, err = vgm(*args, tmp_path / "bomb.npz", *more.get(args[0], []))
        assert code in (1, 2) and "may be a bug" not in err
    assert peak() - before < 100 << 20


# -- .safetensors ------------------------------------------------------------------------------------------------------


def safetensors(path: Path, header: str | bytes | dict, data: int = 16) -> Path:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    return path


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "dtype": {"a": entry("F1024")},
    "negative shape": {"a": entry(shape=(-2, -2))},
    "huge shape": {"a": entry(shape=(10**18, 10**18))},
    "overflow": {"a": entry(shape=(2**32, 2**32))},
    "dimensions": {"a": entry(shape=[1] * 10**5 + [4])},
    "reversed": {"a": entry(offsets=(16, 0))},
    "negative offsets": {"a": entry(offsets=(-16, 0))},
    "beyond": {"a": entry(shape=(10**9,), offsets=(0, 4 * 10**9))},
    "overlap": {"a": entry(), "b": entry()},
    "gap": {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(8, 12))},
    "left over": {"a": entry(shape=(1,), offsets=(0, 4))},
    "floats": {"a": entry(shape=(4.0,))},
    "true": {"a": entry(shape=(4, True))},
    "twice": json.dumps({"a": entry(), "b": entry()}).replace("b", "a", 1),
    "missing": {"a": {"dtype": "F32"}},
    "a list": "[1, 2]",
    "a number": "7",
    "deep": '{"a":' + "[" * 10**5,
    "deep and whole": '{"a":' + "[" * 10**5 + "]" * 10**5 + "}",
    "digits": json.dumps({"a": entry(shape=(7,))}).replace("7", "9" * 10**5),
    "no text": b"\xff\xfe{}",
    "metadata": {"__metadata__": {"a": 1}, "b": entry()},
    "deep metadata": {
        "__metadata__": {"vgm.component": "[" * 10**5},
        "b": entry(),
    },
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_describe_their_file_or_are_refused(vgm, tmp_path, kind):
    path = safetensors(tmp_path / "a.safetensors", HEADERS[kind])
    for args in (("inspect", path), ("sample", path), ("convert", path, tmp_path / "x.pt")):
        code, _, err = vgm(*args)
        assert code in (1, 2) and "may be a bug" not in err and len(err) < 1000, err


def test_headers_longer_than_any_file_needs(vgm, tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (2**63, 10**10, 100):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        assert vgm("inspect", path)[0] == 1
    safetensors(path, b'{"a":' + b" " * (17 << 20) + b"{}}")
    assert vgm("inspect", path)[0] == 1
    safetensors(path, {"a": entry(), "__metadata__": {"format": "pt"}})
    assert vgm("inspect", path)[0] == 0


# -- texts -------------------------------------------------------------------------------------------------------------


def laughs(levels: int = 30) -> str:
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(lines)


YAMLS = {
    "laughs": laughs(),
    "merged": "\n".join(["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30)]),
    "recursive": "model: &m\n  name: dit\n  again: *m",
    "recursive list": "model: &m [*m]",
    "deep": "model: " + "[" * 10**5,
    "deep blocks": "model:\n" + "\n".join(" " * i + "a:" for i in range(1, 200)),
    "long": "model: " + "a" * 10**6,
    "digits": "train: {steps: " + "9" * 10**5 + "}",
    "date": "model: 2001-99-99",
    "base": "base: " + "a" * 10**4,
    "base of another kind": "base: [1, 2]",
    "base with a zero": 'base: "a\\0b"',
    "depth": "base: dit/mnist\nmodel: {depth: 1000000, hidden_size: 32, num_heads: 2}",
    "width": "base: dit/mnist\nmodel: {depth: 1, hidden_size: 1000000000, num_heads: 2}",
    "wide": "base: dit/mnist\nmodel: {depth: 1, hidden_size: 16000000, num_heads: 2}",
    "digits of a width": "base: dit/mnist\nmodel: {hidden_size: " + "9" * 100 + "}",
}


BUILT = ("depth", "width", "wide", "digits of a width")


@pytest.mark.parametrize("kind", YAMLS)
def test_recipes_of_strangers_end_in_a_sentence(vgm, tmp_path, kind):
    (tmp_path / "r.yaml").write_text(YAMLS[kind])
    start, before = time.process_time(), peak()
    for args in (("validate", tmp_path / "r.yaml"), ("train", tmp_path / "r.yaml", "--print-config")):
        code, _, err = vgm(*args)
        built = kind in BUILT and args[0] == "train"
        assert (code in (1, 2) or built) and "may be a bug" not in err and len(err) < 1000, err
    assert time.process_time() - start < (8 if kind not in BUILT else 25)  # with the import of torch's compiler
    assert peak() - before < (200 if kind not in BUILT else 400) << 20


def test_json_of_strangers_ends_in_a_sentence(vgm, tmp_path):
    images(tmp_path / "data", 2)
    deep = "[" * 10**5
    for name in ("metadata.jsonl", "dataset.json"):
        (tmp_path / "data" / name).write_text(deep)
        code, _, err = vgm("data", "info", tmp_path / "data")
        assert code == 1 and "deeply" in err
        (tmp_path / "data" / name).unlink()
    (tmp_path / "a.safetensors.index.json").write_text(deep)
    assert vgm("inspect", tmp_path / "a.safetensors.index.json")[0] == 1


# -- pictures ----------------------------------------------------------------------------------------------------------


def images(root: Path, n: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(root / f"{i}.png")
    return root


def test_huge_pictures_are_left_out_and_named(vgm, tmp_path, monkeypatch):
    root = images(tmp_path / "data", 3)
    Image.new("1", (13000, 13000)).save(root / "huge.png")
    before = peak()
    code, out, err = vgm("data", "info", root, "--json")
    assert code == 0 and json.loads(out)["count"] == 3 and json.loads(out)["skipped"] == ["huge.png"]
    assert peak() - before < 100 << 20
    monkeypatch.setenv("VGM_MAX_PIXELS", "63")
    code, _, err = vgm("data", "info", root)
    assert code == 1 and "VGM_MAX_PIXELS" in err
    monkeypatch.setenv("VGM_MAX_PIXELS", "many")
    assert vgm("data", "info", root)[0] == 2


def test_pictures_that_would_start_programs_are_not_opened(tmp_path, monkeypatch):
    import subprocess

    from vgm_cli.data.decode import Unreadable, load_image

    def started(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_text(text)
    with pytest.raises(Unreadable):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "ico", "tga", "pcx", "sgi", "dds"]
)
def test_pictures_of_every_format_are_read_whatever_their_suffix(tmp_path, suffix):
    from vgm_cli.data.decode import load_image

    Image.new("RGB", (16, 16), "red").save(tmp_path / f"a.{suffix}")
    (tmp_path / f"a.{suffix}").rename(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (16, 16)


def test_transparency_in_bands_is_what_it_was(monkeypatch):
    from vgm_cli.data import decode

    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 11, 4), np.uint8), "RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    monkeypatch.setattr(decode, "BAND", 50)
    assert (np.asarray(decode.on_white(rgba)) == np.asarray(whole)).all()
    wide = np.random.default_rng(0).integers(0, 65536, (37, 11), np.uint16)
    assert (decode.eight_bits(wide) == (wide / 257 + 0.5).astype(np.uint8)).all()


def test_text_chunks_that_unpack_without_end(vgm, tmp_path):
    import zlib

    packed = b"vgm\0\0" + zlib.compress(bytes(50 << 20))
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    images(tmp_path / "data", 1)
    good = (tmp_path / "data" / "0.png").read_bytes()
    (tmp_path / "a.png").write_bytes(good[:33] + chunk + good[33:])
    before = peak()
    code, _, err = vgm("rerun", tmp_path / "a.png")
    assert code in (1, 2) and "may be a bug" not in err and peak() - before < 40 << 20


def test_only_regular_files_are_opened(vgm, tmp_path):
    root = images(tmp_path / "data", 2)
    os.mkfifo(root / "pipe.png")
    os.symlink(root / "loop.png", root / "loop.png")
    os.symlink(root, root / "again")
    os.symlink("/dev/zero", root / "zero.png")
    code, out, _ = vgm("data", "info", root, "--json")
    assert code == 0 and json.loads(out)["count"] == 2
    for name in ("p.png", "p.zip", "p.npz", "p.tar", "p.safetensors", "p.pt", "p.yaml", "config.json"):
        os.mkfifo(tmp_path / name)
    import torch

    torch.save({"w": torch.zeros(1)}, tmp_path / "a.pt")
    for args in (
        *[("data", "info", tmp_path / f"p.{k}") for k in ("zip", "npz", "tar", "png")],
        *[("inspect", tmp_path / f"p.{k}") for k in ("safetensors", "pt", "npz")],
        ("validate", tmp_path / "p.yaml"),
        ("rerun", tmp_path / "p.png"),
        ("sample", tmp_path / "p.safetensors"),
        ("evaluate", tmp_path / "p.npz", "--reference", tmp_path / "p.npz"),
    ):
        code, _, err = vgm(*args)
        assert code in (1, 2) and "may be a bug" not in err, err
    assert vgm("inspect", tmp_path / "a.pt")[0] == 0  # the pipe beside it is called config.json


def test_archives_of_pictures_unpack_in_proportion(vgm, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.write(images(tmp_path / "data", 2) / "1.png", "good.png")
        with z.open("bomb.png", "w") as f:
            for _ in range(100):
                f.write(bytes(1 << 20))
    before = peak()
    code, out, _ = vgm("data", "info", tmp_path / "a.zip", "--json")
    assert code == 0 and json.loads(out)["skipped"] == ["bomb.png"] and peak() - before < 60 << 20


@pytest.mark.parametrize(
    "pattern", ["{0..99999999}", "{0..9999}{0..9999}", "{0..99999999999999}", "{" + "," * 10**6 + "}"]
)
def test_patterns_of_shards_have_an_end(vgm, tmp_path, pattern):
    before = peak()
    code, _, err = vgm("data", "info", f"{tmp_path}/{pattern}.tar")
    assert code in (1, 2) and len(err) < 1000 and "may be a bug" not in err and peak() - before < 60 << 20


# -- headers that ask for too much -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {"depth": 200_000},
        {"hidden_size": 10**9},
        {"hidden_size": 2**20},
        {"input_size": 10**6},
        {"num_classes": 10**7},
        {"hidden_size": 10**30},
    ],
)
def test_headers_build_no_more_than_their_file_holds(vgm, tmp_path, keywords):
    from safetensors.numpy import save_file

    kwargs = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 1, "num_heads": 2}
    component = {"kind": "model", "name": "dit", "kwargs": {**kwargs, "num_classes": 10, **keywords}}
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros(4, np.float32)}, path, {"vgm.component": json.dumps(component)})
    start, before = time.process_time(), peak()
    code, _, err = vgm("sample", path, "-n", "1", "--out", tmp_path / "x.png")
    assert code in (1, 2) and "may be a bug" not in err and len(err) < 1000, err
    assert time.process_time() - start < 5 and peak() - before < 200 << 20


def test_processes_of_a_thousand_million_steps_are_refused():
    from vgm_cli.diffusion.discrete import named_betas
    from vgm_cli.errors import VgmError

    for schedule in ("linear", "cosine", "jsd"):
        with pytest.raises(VgmError, match="steps"):
            named_betas(schedule, 10**9)
