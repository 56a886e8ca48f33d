"""Feature networks: the same features as the official implementations, and the choice among them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_weights import clip_weights, seeded_state
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.metrics import features
from vgm_cli.metrics.clip_score import text_tower
from vgm_cli.metrics.features import choose, clean_resize, load_features, mnist_features
from vgm_cli.nets import vit
from vgm_cli.nets.inception import InceptionV3, tf1_resize

ORACLES = Path(__file__).parent / "oracles" / "feature-networks.safetensors"


@pytest.fixture(scope="session")
def oracle() -> dict[str, Tensor]:
    with safe_open(ORACLES, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}


@pytest.fixture(scope="session")
def shapes() -> dict[str, dict[str, list[int]]]:
    """Official state-dict layouts: {network: {key: shape}}."""
    with safe_open(ORACLES, framework="pt") as f:
        return {k.removesuffix(".keys"): json.loads(v) for k, v in f.metadata().items() if k.endswith(".keys")}


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in pytorch-fid's and torch-fidelity's layout, weights drawn by name."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with torch.device("meta"):
        layout = {k: v.shape for k, v in InceptionV3().state_dict().items()}
    torch.save(seeded_state(layout), path)
    return path


def nhwc(x: Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy()


# -- Inception -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
def test_inception_equals_torch_fidelity(oracle: dict[str, Tensor], inception_file: Path, size: int) -> None:
    net = load_features(inception_file)
    found = net(nhwc(oracle[f"inception{size}/in"]))
    assert (net.kind, net.dim, net.outputs) == ("inception", 2048, {"pool", "spatial", "logits"})
    for ours, theirs in (("pool", "pool"), ("spatial", "spatial"), ("logits", "logits_unbiased")):
        torch.testing.assert_close(found[ours], oracle[f"inception{size}/{theirs}"], rtol=1e-4, atol=2e-5)


def test_inception_adds_the_bias_to_its_logits(oracle: dict[str, Tensor], inception_file: Path) -> None:
    out = load_features(inception_file).net(oracle["inception32/in"].float())
    torch.testing.assert_close(out["logits"], oracle["inception32/logits"], rtol=1e-4, atol=2e-5)


def test_inception_trunk_has_the_size_of_torchvisions() -> None:
    with torch.device("meta"):
        net = InceptionV3()
    assert sum(p.numel() for n, p in net.named_parameters() if not n.startswith("fc.")) == 21_785_568


def test_inception_reads_safetensors_and_refuses_others(inception_file: Path, tmp_path: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    save_file(state, tmp_path / "w.safetensors")
    x = np.zeros((1, 8, 8, 3), np.uint8)
    assert torch.equal(load_features(tmp_path / "w.safetensors")(x)["pool"], load_features(inception_file)(x)["pool"])
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, tmp_path / "vision.pth")
    with pytest.raises(VgmError, match="torchvision") as e:
        load_features(tmp_path / "vision.pth")
    assert e.value.code == USAGE
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(VgmError, match="not the Inception") as e:
        load_features(tmp_path / "other.pth")
    assert e.value.code == MISSING_ASSET


class Detector(torch.nn.Module):
    """NVIDIA's TorchScript interface over a network that can be checked by hand."""

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        pooled = img.to(torch.float32).mean(dim=[2, 3])
        if return_features:
            return pooled.repeat(1, 683)[:, :2048]
        return torch.softmax(pooled if no_output_bias else pooled + 100.0 * torch.arange(3), dim=1)


def test_torchscript_inception_is_called_nvidias_way(tmp_path: Path) -> None:
    torch.jit.script(Detector()).save(str(tmp_path / "inception.pt"))
    net = load_features(tmp_path / "inception.pt")
    images = np.random.default_rng(0).integers(0, 9, (4, 6, 6, 3), np.uint8)
    found = net(images)
    assert net.outputs == {"pool", "logits"} and "TorchScript" in net.name
    mean = torch.from_numpy(images).float().mean((1, 2))
    torch.testing.assert_close(found["pool"][:, :3], mean)
    torch.testing.assert_close(found["logits"].softmax(1), mean.softmax(1))  # without the output bias


def test_tf1_resize_has_no_half_pixel_centres() -> None:
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert tf1_resize(x, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


def test_clean_resize_equals_clean_fids(oracle: dict[str, Tensor]) -> None:
    found = clean_resize(oracle["clean/in"], 37)[0].permute(1, 2, 0)
    torch.testing.assert_close(found, oracle["clean/out"], rtol=0, atol=1e-4)
    assert (found % 1).max() > 0  # not rounded


def test_clean_and_own_resize_give_different_features(oracle: dict[str, Tensor], inception_file: Path) -> None:
    images = nhwc(oracle["inception64/in"])
    own, clean = load_features(inception_file), load_features(inception_file, "clean")
    assert own.resize != clean.resize and own.sha256 == clean.sha256
    assert (own(images)["pool"] - clean(images)["pool"]).abs().max() > 1e-3


def test_sfid_and_inception_score_by_weights_on_disk(inception_file: Path) -> None:
    from vgm_cli.engine.evaluate.run import evaluate

    a, b = (np.random.default_rng(i).integers(0, 255, (4, 16, 16, 3), np.uint8) for i in range(2))
    metrics = ["sfid", "is:splits=1"]
    found = {r["metric"]: r for r in evaluate(a, reference=b, metrics=metrics, features=str(inception_file))}
    net = load_features(inception_file)
    s, r = (torch.as_tensor(net(x)["spatial"]).double() for x in (a, b))
    # of 4 images each: the trace of the root of two covariances' product is a sum of 4 singular values
    ours, theirs = s - s.mean(0), r - r.mean(0)
    spread = ours.square().sum() + theirs.square().sum() - 2 * torch.linalg.matrix_norm(ours @ theirs.T, "nuc")
    distance = (s.mean(0) - r.mean(0)).square().sum() + spread / 3
    assert found["sfid"]["value"] == pytest.approx(float(distance), rel=1e-4)
    assert found["inception-score"]["value"] >= 1 and found["sfid"]["protocol"]["features_kind"] == "inception"


# -- vision transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        ("dinov2", "dinov2/98"),
        ("dinov2", "dinov2/56"),  # position embedding of 7x7 patches interpolated to 4x4
        ("dinov2-swiglu", "dinov2-swiglu/98"),
        ("dinov2-hf", "dinov2-hf/56"),
        ("clip", "clip/56"),
        ("clip-hf", "clip-hf/56"),
    ],
)
def test_vision_transformer_equals_the_official_one(
    oracle: dict[str, Tensor], shapes: dict[str, dict[str, list[int]]], layout: str, case: str
) -> None:
    name = case.replace("/", "")
    net = vit.build(seeded_state(shapes[layout]))
    with torch.no_grad():
        torch.testing.assert_close(net(oracle[f"{name}/in"].float()), oracle[f"{name}/out"], rtol=1e-4, atol=1e-5)


def test_vision_transformers_are_recognised_by_content(shapes: dict[str, dict[str, list[int]]], tmp_path: Path) -> None:
    torch.save(seeded_state(shapes["dinov2"]), tmp_path / "a.pth")
    save_file(seeded_state(shapes["clip-hf"]), tmp_path / "b.safetensors")
    dino, clip = load_features(tmp_path / "a.pth"), load_features(tmp_path / "b.safetensors")
    images = np.random.default_rng(0).integers(0, 255, (2, 30, 30, 1), np.uint8)
    assert (dino.kind, dino.dim, clip.kind, clip.dim) == ("dinov2", 128, "clip", 64)
    assert "224" in dino.resize and "56" in clip.resize
    torch.testing.assert_close(clip(images)["pool"].norm(dim=1), torch.ones(2))
    assert dino(images)["pool"].shape == (2, 128)


def test_an_incomplete_or_foreign_transformer_is_refused(shapes: dict[str, dict[str, list[int]]]) -> None:
    state = seeded_state(shapes["dinov2"])
    with pytest.raises(VgmError, match="not a whole dinov2") as e:
        vit.build({k: v for k, v in state.items() if k != "norm.bias"})
    assert e.value.code == MISSING_ASSET
    with pytest.raises(VgmError, match="register_tokens"):
        vit.build({**state, "register_tokens": torch.zeros(1, 4, 128)})


def test_clip_score_is_the_cosine_of_both_towers(
    vgm, shapes: dict[str, dict[str, list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tokenizer = clip_weights(tmp_path)
    (tmp_path / "pictures").mkdir()
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"pictures/{i}.png")
    score = ("evaluate", "pictures", "--metrics", f"clip-score:tokenizer={tokenizer}", "--json")
    code, _, err = vgm(*score)
    assert code == 4 and "VGM_CLIP" in err
    monkeypatch.setenv("VGM_CLIP", str(file))
    code, _, err = vgm(*score)
    assert code == 2 and "captions=FILE" in err
    (tmp_path / "texts.txt").write_text("red\na red apple\n")  # taken in turn
    code, out, err = vgm(*score[:3], f"{score[3]}:captions=texts.txt", "--json")
    assert code == 0, err
    found = json.loads(out)[0]
    tower = text_tower(str(file), str(tokenizer))
    told = tower.both(tower.ids(["red", "a red apple"] * 2, torch.device("cpu")))[1]
    seen = vit.build(load_file(file))(
        (
            torch.from_numpy(images).permute(0, 3, 1, 2) / 255
            - torch.tensor(features.NORMALISATION["clip"][0])[:, None, None]
        )
        / torch.tensor(features.NORMALISATION["clip"][1])[:, None, None]
    )
    assert found["value"] == pytest.approx(float(torch.cosine_similarity(told, seen).mean()), abs=1e-5)
    assert found["n"] == 4 and found["texts"] == 2 and found["protocol"]["options"] == {"score": "cosine"}
    for i in range(4):
        (tmp_path / f"pictures/{i}.txt").write_text("a red apple" if i % 2 else "red")  # the pictures' own
    assert json.loads(vgm(*score)[1])[0]["value"] == pytest.approx(found["value"])
    torch.save(seeded_state(shapes["clip"]), tmp_path / "other.pt")
    code, _, err = vgm(*score, "--features", "other.pt")
    assert code == 2 and "two networks" in err
    torch.save(seeded_state(shapes["dinov2"]), tmp_path / "dino.pt")
    code, _, err = vgm(*score[:3], f"{score[3]}:text={tmp_path / 'dino.pt'}")
    assert code == 4 and "no text tower" in err


# -- digits, and the choice ------------------------------------------------------------------------------------------


def test_digit_network_recognises_digits_it_never_saw() -> None:
    from vgm_cli.data import open_dataset

    data = open_dataset()
    rows = np.arange(9, 5000, 10)  # the held-out tenth
    out = mnist_features()(nhwc(data.images(rows)))
    assert out["pool"].shape == (500, 64)
    labels = data.labels()
    assert labels is not None and (out["logits"].argmax(1).numpy() == labels[rows]).mean() > 0.98


def test_small_grey_images_get_the_digit_network() -> None:
    for size in (28, 32):
        assert choose(None, size, 1).kind == "mnist"
    assert choose("mnist", 256, 3) is mnist_features()  # forced
    assert choose(None, 64, 3, kind="mnist") is mnist_features()  # class-accuracy insists


@pytest.mark.parametrize(("size", "channels"), [(28, 3), (64, 1), (256, 3)])
def test_other_pictures_get_the_colour_network(size: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VGM_INCEPTION", raising=False)
    assert choose(None, size, channels) is choose("colour", 28, 1) is features.colour_features()
    with pytest.raises(VgmError) as e:
        choose("inception", size, channels)
    assert e.value.code == MISSING_ASSET and "VGM_INCEPTION" in e.value.hint


def test_variables_name_weights(
    inception_file: Path, shapes: dict[str, dict[str, list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGM_INCEPTION", str(inception_file))
    assert choose(None, 64, 3).kind == choose("inception", 28, 1).kind == "inception"
    with pytest.raises(VgmError) as e:
        choose(None, 64, 3, kind="dinov2")
    assert e.value.code == MISSING_ASSET and "VGM_DINOV2" in e.value.hint
    torch.save(seeded_state(shapes["dinov2"]), tmp_path / "d.pth")
    monkeypatch.setenv("VGM_DINOV2", str(tmp_path / "d.pth"))
    assert choose(None, 64, 3, kind="dinov2").kind == "dinov2"
    monkeypatch.setenv("VGM_CLIP", str(tmp_path / "d.pth"))
    with pytest.raises(VgmError, match="not clip weights"):
        choose(None, 64, 3, kind="clip")


def test_several_files_serve_several_metrics(
    inception_file: Path, shapes: dict[str, dict[str, list[int]]], tmp_path: Path
) -> None:
    torch.save(seeded_state(shapes["clip"]), tmp_path / "c.pt")
    both = f"{tmp_path / 'c.pt'},{inception_file}"
    assert choose(both, 64, 3).kind == "inception"
    assert choose(both, 64, 3, kind="clip").kind == "clip"
    assert choose(str(tmp_path / "c.pt"), 64, 3).kind == "clip"  # the only one given


def test_missing_files_exit_with_4(tmp_path: Path) -> None:
    with pytest.raises(VgmError, match="no feature weights") as e:
        load_features(tmp_path / "none.pth")
    assert e.value.code == MISSING_ASSET
    with pytest.raises(VgmError) as e:
        mnist_features(tmp_path / "none.safetensors")
    assert e.value.code == MISSING_ASSET


def test_description_names_network_hash_and_resize() -> None:
    told = mnist_features().describe()
    assert told["features"] == "mnist-features" and told["features_sha256"] == features.file_sha256(features.DIGITS)
    assert "28x28" in told["resize"]
