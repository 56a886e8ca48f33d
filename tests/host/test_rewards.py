"""Rewards on images whose value is known, their sums, and what is said when something is missing."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vgm_cli.data import open_dataset
from vgm_cli.errors import VgmError
from vgm_cli.registry import registry
from vgm_cli.rewards.text import edit_distance, quoted, text_score


def build(name: str, **options: object) -> object:
    """As when the options are typed."""
    registry().trust(options)
    return registry().build("reward", {"name": name, **options})


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """100 shipped digits (100, 1, 28, 28) in [-1, 1] and their labels."""
    data = open_dataset("mnist5k")
    some = range(0, 5000, 50)
    return data.pixels(some), torch.from_numpy(np.asarray(data.labels())[list(some)])


def flat(*values: float, channels: int = 1) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, channels, 16, 16).clone()


def test_jpeg_sizes() -> None:
    """Noise compresses worse than a plain image; the size is that of a file of the same bytes."""
    g = torch.Generator().manual_seed(0)
    images = torch.cat([flat(0.0, channels=3), torch.rand(1, 3, 16, 16, generator=g) * 2 - 1])
    size = build("jpeg-incompressibility")(images, {})
    assert size[1] > size[0] + 0.2
    array = ((images[1].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=95)
    assert size[1].item() == pytest.approx(buffer.tell() / 1000)
    torch.testing.assert_close(build("jpeg-compressibility")(images, {}), -size / 500)
    assert build("jpeg-incompressibility", quality=20)(images, {})[1] < size[1]
    for bad in (0, 96):
        with pytest.raises(VgmError, match=r"1 to 95|does not fit"):
            build("jpeg-compressibility", quality=bad)
    with pytest.raises(VgmError, match="1 or 3 channels"):
        build("jpeg-compressibility")(torch.zeros(1, 4, 7, 7), {})


def test_brightness_and_ink() -> None:
    images = flat(-1.0, 0.0, 1.0)
    torch.testing.assert_close(build("brightness")(images, {}), torch.tensor([0.0, 0.5, 1.0]))
    images[1, :, :4] = 0.5  # a quarter of the rows at 0.75 of white
    torch.testing.assert_close(build("ink")(images, {}), torch.tensor([0.0, 0.25, 1.0]))
    assert build("ink", threshold=0.8)(images, {})[1] == 0


def test_similarity(tmp_path: Path, digits) -> None:
    x, _ = digits
    file = tmp_path / "target.png"
    Image.fromarray(((x[7, 0] + 1) * 127.5).round().byte().numpy()).save(file)
    by_pixels = build("similarity", target=str(file))(x, {})
    assert by_pixels.argmax() == 7 and by_pixels[7].item() == pytest.approx(0, abs=1e-4) and by_pixels.max() <= 0
    by_features = build("similarity", target=str(file), measure="features")(x, {})
    assert by_features.argmax() == 7 and by_features[7].item() == pytest.approx(1, abs=1e-3)
    colour = build("similarity", target=str(file))(x.expand(-1, 3, -1, -1)[:9], {})  # brought to size and channels
    torch.testing.assert_close(colour, by_pixels[:9])
    with pytest.raises(VgmError, match="missing") as e:
        build("similarity", target=str(tmp_path / "none.png"))
    assert e.value.code == 4
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(VgmError, match="not a readable image"):
        build("similarity", target=str(tmp_path / "text.png"))


def test_confidence(digits) -> None:
    x, y = digits
    right, wrong = build("confidence")(x, {"label": y}), build("confidence")(x, {"label": (y + 1) % 10})
    assert right.mean() > 0.9 and wrong.mean() < 0.05
    torch.testing.assert_close(build("confidence", log=True)(x, {"label": y}).exp(), right)
    assert (build("confidence")(x, {}) >= right).all()
    with pytest.raises(VgmError, match="digits 0 to 9"):
        build("confidence")(x, {"label": y + 5})


def test_weighted_sum(digits) -> None:
    x, y = digits
    both = build("weighted", terms={"ink": 2.0, "confidence": {"weight": 0.5, "log": True}})
    expected = 2 * build("ink")(x, {}) + 0.5 * build("confidence", log=True)(x, {"label": y})
    torch.testing.assert_close(both(x, {"label": y}), expected)
    assert set(both.parts) == {"ink", "confidence"}
    for terms, message in (
        ({}, "no reward"),
        ({"inc": 1.0}, "unknown reward 'inc'"),
        ({"ink": "much"}, "not a number"),
        ({"ink": True}, "not a number"),
        ({"ink": {"weight": 1.0, "thresh": 0.2}}, "thresh"),
    ):
        with pytest.raises(VgmError, match=message) as e:
            build("weighted", terms=terms)
        assert e.value.code == 2


def corner(images: Tensor, batch: object) -> list[float]:
    return images[:, 0, 0, 0].tolist()


def one_number(images: Tensor, batch: object) -> float:
    return 1.0


def broken(images: Tensor, batch: object) -> Tensor:
    return torch.full((len(images),), float("nan"))


NUMBER = 3


def test_any_function() -> None:
    images = flat(-1.0, 0.25)
    torch.testing.assert_close(build("function", target=f"{__name__}:corner")(images, {}), torch.tensor([-1.0, 0.25]))
    total = build("weighted", terms={f"{__name__}:corner": 2.0})
    torch.testing.assert_close(total(images, {}), torch.tensor([-2.0, 0.5]))
    for target, message in (("one_number", r"gives \(\) for 2 images"), ("broken", "not finite")):
        with pytest.raises(VgmError, match=message):
            build("weighted", terms={f"{__name__}:{target}": 1.0})(images, {})
    for target, message in ((f"{__name__}:NUMBER", "not a function"), (f"{__name__}:nothing", "has no 'nothing'")):
        with pytest.raises(VgmError, match=message):
            build("function", target=target)


def test_edit_distance_and_text() -> None:
    for a, b, d in (("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)):
        assert edit_distance(a, b) == edit_distance(b, a) == d
    assert text_score("Hello World", ["hel", "lo wor", "ld!"]) == 1
    assert text_score("sale", ["sole"]) == 0.75
    assert text_score("no", ["far too many other letters"]) == 0
    assert quoted('a sign that says "open" in red') == "open"
    with pytest.raises(VgmError, match="double quotes"):
        quoted("a sign that says open")
    with pytest.raises(VgmError, match="no text"):
        text_score(" ", ["x"])


def read_brightness(image: np.ndarray) -> list[str]:
    return ["open"] if image.mean() > 100 else []


def test_ocr_by_any_reader() -> None:
    reward = build("ocr", reader=f"{__name__}:read_brightness")
    prompts = ['a "open" sign', 'a "open" sign']
    assert reward(flat(-1.0, 1.0), {"text": prompts}).tolist() == [0.0, 1.0]
    with pytest.raises(VgmError, match="needs prompts"):
        reward(flat(1.0), {})


@pytest.mark.parametrize("name", ["clip-score", "pickscore"])
def test_clip_rewards_name_the_extra_and_the_weights(name: str, tmp_path: Path, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else found(n, *a))
    with pytest.raises(VgmError, match="extra hf") as e:
        build(name, path=str(tmp_path))
    assert e.value.code == 4 and e.value.hint.endswith("pip install transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: object() if n == "transformers" else found(n, *a))
    with pytest.raises(VgmError, match="no weights") as e:
        build(name, path=str(tmp_path / "nowhere"))
    assert e.value.code == 4


def test_clip_rewards_on_a_small_network(tmp_path: Path) -> None:
    """Scores of a random CLIP saved on disk are those that its own forward gives."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "clip"
    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {w: i for i, w in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    views = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(views, tokenizer).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "max_position_embeddings": 77, "eos_token_id": len(vocabulary) - 1,
            "bos_token_id": len(vocabulary) - 2, "pad_token_id": len(vocabulary) - 1}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompts = ["a cat", "two dogs"]
    arrays = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    inputs = transformers.CLIPProcessor.from_pretrained(folder)(
        text=prompts, images=[Image.fromarray(a) for a in arrays], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    torch.testing.assert_close(build("clip-score", path=str(folder))(images, {"text": prompts}), logits / 30)
    pick = build("pickscore", path=str(folder), prompts=["two dogs", "a cat"])
    torch.testing.assert_close(pick(images, {"label": torch.tensor([1, 0])}), logits / 26)
    with pytest.raises(VgmError, match="2 prompts"):
        pick(images, {"label": torch.tensor([2, 0])})
    with pytest.raises(VgmError, match="needs prompts"):
        build("clip-score", path=str(folder))(images, {"label": torch.tensor([0, 0])})
