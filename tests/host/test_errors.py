"""What a stranger does wrong: one sentence, the right exit code, nothing lost, no traceback."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file


def check(result: tuple[int, str, str], code: int, *words: str) -> None:
    got, _, err = result
    assert got == code, err
    for word in words:
        assert word in err, err
    assert "Traceback" not in err
    assert err.startswith("error: ") or "\nerror: " in err


def test_wrong_paper(vgm) -> None:
    check(vgm("train", "ditt"), 2, "unknown paper 'ditt'", "dit")


def test_wrong_recipe(vgm, tiny: Path) -> None:
    check(vgm("train", tiny, "--recipe", "mnist"), 2, "so --recipe mnist is one too many")
    check(vgm("train", "dit", "--recipe", "imagenet257"), 2, "unknown recipe", "imagenet256")


def test_a_path_in_place_of_a_paper(vgm) -> None:
    check(vgm("train", "./runs/a", "--resume", "train.steps=5"), 2, "a paper is expected", "--out ./runs/a --resume")


def test_wrong_recipe_file(vgm) -> None:
    check(vgm("train", "missing.yaml"), 2, "no such recipe file")


def test_broken_yaml(vgm, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: {name: dit\n")
    check(vgm("train", "broken.yaml"), 2, "not valid YAML")


def test_wrong_key(vgm) -> None:
    check(vgm("train", "dit", "train.step=5"), 2, "unknown key 'step'", "steps")
    check(vgm("train", "dit", "trian.steps=5"), 2, "unknown key 'trian'", "train")
    check(vgm("train", "dit", "model.hiden_size=5"), 2, "unknown key 'hiden_size'", "hidden_size")
    check(vgm("train", "dit", "steps=5"), 2, "train.steps")


def test_wrong_type(vgm) -> None:
    check(vgm("train", "dit", "train.steps=many"), 2, "train.steps", "does not fit")
    check(vgm("train", "dit", "model.depth=deep"), 2, "depth='deep'", "does not fit")
    check(vgm("train", "dit", "train.ema=0.9"), 2, "train.ema=[0.9]")
    check(vgm("train", "dit", "train.steps"), 2, "not KEY=VALUE")


def test_wrong_component(vgm) -> None:
    check(vgm("train", "dit", "objective={name: idpm}"), 2, "unknown objective 'idpm'", "iddpm")
    check(vgm("train", "dit", "model.preset=DiT-XXL/2"), 2, "unknown model preset")


def test_missing_data(vgm, tiny: Path) -> None:
    check(vgm("train", tiny, "data.path=nowhere"), 2, "nowhere")


def test_empty_folder(vgm, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check(vgm("train", tiny, f"data.path={tmp_path / 'empty'}"), 1, "empty")


def test_corrupt_images_are_named_and_skipped(vgm, tiny: Path, tmp_path: Path) -> None:
    for c in ("a", "b"):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (28, 28), 20 * i).save(tmp_path / "data" / c / f"{i}.png")
    good = (tmp_path / "data/a/0.png").read_bytes()
    (tmp_path / "data/a/cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "data/b/noise.jpg").write_bytes(b"not an image at all")
    code, _, err = vgm("train", tiny, f"data.path={tmp_path / 'data'}", "train.steps=2", "--out", "run")
    assert code == 0, err
    assert "2 unreadable" in err and "cut.png" in err and "noise.jpg" in err


def test_only_corrupt_images(vgm, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.png").write_bytes(b"nothing")
    check(vgm("train", tiny, f"data.path={tmp_path / 'data'}"), 1, "x.png")


def test_unlabelled_data_where_labels_are_wanted(vgm, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(4):
        Image.new("L", (28, 28), 20 * i).save(tmp_path / "flat" / f"{i}.png")
    check(vgm("train", tiny, f"data.path={tmp_path / 'flat'}", "data.labels=true"), 2, "no labels")


def test_wrong_checkpoint(vgm, tmp_path: Path) -> None:
    check(vgm("sample", "nowhere"), 2, "no such run or checkpoint")
    (tmp_path / "empty").mkdir()
    check(vgm("sample", tmp_path / "empty"), 2, "no complete checkpoint")
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    check(vgm("sample", tmp_path / "foreign.safetensors"), 1, "does not say what network")


def test_truncated_checkpoint(vgm, tiny: Path, tmp_path: Path) -> None:
    assert vgm("train", tiny, "train.steps=1", "--out", "run")[0] == 0
    file = next((tmp_path / "run/checkpoints").glob("step-*/model.safetensors"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1000])
    check(vgm("sample", cut), 1, "not a readable safetensors file")


def test_wrong_label_weights_output_sampler(vgm, tiny: Path) -> None:
    assert vgm("train", tiny, "train.steps=1", "--out", "run")[0] == 0
    check(vgm("sample", "run", "--label", "10"), 2, "label 10")
    check(vgm("sample", "run", "--weights", "ema-0.5"), 2, "no weights 'ema-0.5'", "ema-0.9")
    check(vgm("sample", "run", "--out", "grid.bmp"), 2, "unknown kind of output")
    check(vgm("sample", "run", "--sampler", "eulr"), 2, "unknown sampler 'eulr'", "euler")
    check(vgm("sample", "run", "--guidance-interval", "0.1"), 2, "LO,HI")
    check(vgm("sample", "run", "etaa=1"), 2, "unknown key 'etaa'")
    check(vgm("sample", "run", "guidance_scale=2"), 2, "it is an option: --guidance-scale 2")
    check(vgm("sample", "run", "--steps", 3, "steps=4"), 2, "--steps 3 and steps=4 say two things")
    check(vgm("sample", "run/checkpoints/last/trainer.safetensors"), 1, "model.safetensors")
    check(vgm("evaluate", "run", "--metrics", "fidd"), 2, "unknown metric 'fidd'", "fid")


def test_next_commands_can_be_pasted(vgm, tiny: Path) -> None:
    code, _, err = vgm("train", tiny, "train.steps=1", "--out", "a run")
    assert code == 0 and "done: 1 step in" in err and "next: vgm sample 'a run'" in err, err


def test_one_picture_is_no_data(vgm, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "x.png")
    check(vgm("data", "info", tmp_path / "x.png"), 2, "is one picture, not a data set", str(tmp_path))


def test_missing_codec_weights(vgm) -> None:
    digits = ("data.path=mnist5k", "data.size=null", "data.channels=null")
    check(vgm("train", "dit", "--recipe", "imagenet256", *digits), 4, "codec.weights")


def test_full_disk_loses_nothing(vgm, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the second checkpoint is written: exit 1, the first checkpoint whole, resume works."""
    from vgm_cli import atomic

    real, calls = atomic.save_safetensors, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 5:
            Path(path).write_bytes(b"half")
            raise atomic.failure(Path(path), OSError(errno.ENOSPC, "No space left on device"))
        real(tensors, path, metadata)

    monkeypatch.setattr(atomic, "save_safetensors", full)
    check(vgm("train", tiny, "--out", "run"), 1, "no space left on device", "free some space", "--resume goes on")
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*[0-9]")] == ["step-00000004"]
    monkeypatch.setattr(atomic, "save_safetensors", real)
    assert vgm("train", tiny, "--out", "run", "--resume")[0] == 0
    assert vgm("sample", "run", "-n", 4, "--out", "x.png")[0] == 0


def test_a_full_disk_in_the_words_of_numpy() -> None:
    from vgm_cli import atomic

    told = atomic.failure(Path("x.npz"), OSError("50176 requested and 8064 written"))
    assert told.message == "cannot write x.npz: no space left on device" and "free some space" in told.hint


def test_a_bug_is_one_sentence_and_a_traceback_only_with_debug(vgm, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli import recipe

    def broken(*args: object) -> None:
        raise RuntimeError("a loose wire")

    monkeypatch.setattr(recipe, "load", broken)
    check(vgm("train", "dit"), 1, "RuntimeError: a loose wire", "--debug")
    with pytest.raises(RuntimeError, match="loose wire"):
        vgm("--debug", "train", "dit")


def test_usage_errors_exit_with_2(vgm) -> None:
    assert vgm("train")[0] == 2
    assert vgm("frobnicate")[0] == 2
    assert vgm("sample", "x", "-n", "0")[0] == 2
