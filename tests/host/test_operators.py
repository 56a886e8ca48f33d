"""Properties of every registered degradation: adjoint, decomposition, shapes, draws; and what each is in the field."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from vgm_cli.api import generators
from vgm_cli.data import open_dataset
from vgm_cli.errors import VgmError
from vgm_cli.operators import kernel_wizard, motion
from vgm_cli.operators.base import Operator
from vgm_cli.operators.inpainting import Inpainting
from vgm_cli.operators.jpeg import JPEG
from vgm_cli.operators.latent import Decoded
from vgm_cli.operators.manifest import OPERATORS
from vgm_cli.operators.motion import MotionDeblurring
from vgm_cli.operators.noise import NOISES, Clean, Gaussian, Poisson, noise_class
from vgm_cli.operators.separable import GaussianDeblurring, SuperResolution, gaussian_taps
from vgm_cli.registry import registry

# settings beside the defaults that take another branch
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "inpainting": [{"mask": "random"}, {"mask": "lama"}, {"mask": "extreme"}, {"box": (3, 6), "margin": 2}],
    "super-resolution": [{"scale": 3, "kernel": "lanczos3"}, {"scale": 2.5}, {"scale": 2, "kernel": "box"}],
    "gaussian-deblurring": [{"kernel_size": 9, "std": 1.5}, {"kernel_size": 15, "std": 2.0, "padding": "circular"}],
    "motion-deblurring": [{"kernel_size": 9}, {"kernel_size": 15, "padding": "circular"}],
    "nonlinear-deblurring": [{"kernel_size": 9, "gamma": 1.5}],
    "phase-retrieval": [{"pad": 3}],
    "colorization": [{"weights": (0.299, 0.587, 0.114)}],
    "jpeg": [{"quality": 60, "subsampling": "4:4:4"}],
}
SHAPES = [(3, 16, 16), (1, 17, 13)]
CASES = [
    pytest.param(name, options, shape, id=f"{name}-{i}-{'x'.join(map(str, shape))}")
    for name in registry().names("operator")
    for i, options in enumerate([{}, *VARIANTS.get(name, [])])
    for shape in SHAPES
    if not (name == "colorization" and shape[0] == 1)
]


def make(name: str, options: dict[str, Any], shape: tuple[int, int, int], items: int = 2, seed: int = 0) -> Operator:
    built: Operator = registry().build("operator", {"name": name, **options})
    return built.bind(shape, generators(range(seed, seed + items)))


def images(shape: tuple[int, int, int], n: int = 2, seed: int = 0) -> Tensor:
    """Smooth random images in [-1, 1], float64."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, shape[0], 5, 5, generator=g, dtype=torch.float64) * 2 - 1
    return F.interpolate(coarse, shape[1:], mode="bilinear").clamp(-1, 1)


def test_every_operator_is_listed() -> None:
    assert set(registry().names("operator")) >= set(OPERATORS) and len(OPERATORS) >= 8
    linear = {name for name in OPERATORS if make(name, {}, (3, 28, 28)).linear}
    assert len(linear) >= 6 and "phase-retrieval" not in linear


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_shapes_and_gradients(name: str, options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    operator = make(name, options, shape)
    x = images(shape).requires_grad_(True)
    y = operator(x)
    assert y.shape == (2, *operator.measurement_shape) and torch.isfinite(y).all()
    assert operator.picture(y).shape == (2, shape[0], *shape[1:])
    baseline = operator.baseline(y)
    assert baseline is None or baseline.shape == x.shape
    gradient = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)[0]
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert y.dtype == torch.float64 and operator(x.detach().float()).dtype == torch.float32


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_linear_algebra(name: str, options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    """<A x, u> = <x, A^T u>; A = U S V^T with V orthogonal; ridge solves its normal equations; A A^+ A = A."""
    operator = make(name, options, shape)
    x = torch.randn(2, *shape, dtype=torch.float64)
    y = operator(x)
    if not operator.linear:
        with pytest.raises(VgmError, match="not linear"):
            operator.adjoint(y)
        z = 0.2 * torch.randn(2, *shape, dtype=torch.float64)
        assert not torch.allclose(operator(0.2 * x + z), operator(0.2 * x) + operator(z), atol=1e-3), "it is linear"
        return
    u = torch.randn_like(y)
    left, right = (y * u).sum(), (x * operator.adjoint(u)).sum()
    assert abs(left - right) <= 1e-10 * (y.norm() * u.norm())
    svd = operator.svd
    assert (svd.V(svd.Vt(x)) - x).abs().max() < 1e-10
    assert (svd.Ut(y) - svd.singular * svd.Vt(x)).abs().max() < 1e-10
    assert abs(svd.Vt(x).abs().square().sum() - x.square().sum()) < 1e-9 * x.square().sum()
    for weight in (0.3, 1e-3):
        z = operator.ridge(y, weight)
        normal = operator.adjoint(operator(z)) + weight * z - operator.adjoint(y)
        assert normal.abs().max() < 1e-8
    assert (operator(operator.pinv(y)) - y).abs().max() < 1e-3 * y.abs().max()
    near = operator.prox(x, y + u, 0.5)  # argmin |y + u - A z|^2 + 0.5 |z - x|^2: its gradient is zero
    assert (operator.adjoint(operator(near) - y - u) + 0.5 * (near - x)).abs().max() < 1e-8


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_draws_come_from_the_generators(name: str, options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    """The same seed, the same degradation; an item's does not depend on its batch; the global stream is untouched."""
    x = images(shape, 3)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    together = make(name, options, shape, 3)
    alone = torch.cat([make(name, options, shape, 1, seed=i)(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together(x), alone, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    if together.is_drawn:
        other = make(name, options, shape, 3, seed=50)
        assert not torch.equal(other(x), together(x))
        assert together.state() and all(len(v) == 3 for v in together.state().values())


def test_binding_leaves_the_settings_alone() -> None:
    free = Inpainting("random")
    first, second = free.bind((1, 8, 8), generators([1])), free.bind((1, 12, 12), generators([1, 2]))
    assert not hasattr(free, "masks")
    assert first.measurement_shape == (1, 8, 8) and second.measurement_shape == (1, 12, 12)
    blur = GaussianDeblurring(5, 1.0).bind((1, 8, 8), generators([1]))
    assert blur.svd.singular.shape == (1, 1, 8, 8)
    assert blur.bind((1, 12, 12), generators([1])).svd.singular.shape == (1, 1, 12, 12)


# -- what each is in the field ----------------------------------------------------------------------------------------


def test_super_resolution_keeps_constants_and_is_matlabs() -> None:
    operator = make("super-resolution", {"scale": 4}, (1, 32, 32))
    assert torch.allclose(operator(torch.full((1, 1, 32, 32), 0.3)), torch.full((1, 1, 8, 8), 0.3))
    x = images((1, 32, 32), 1)
    pillow = Image.fromarray(x[0, 0].float().numpy()).resize((8, 8), Image.Resampling.BICUBIC)
    inside = (operator(x)[0, 0] - torch.from_numpy(np.array(pillow)))[2:-2, 2:-2]  # borders: mirrored against cut off
    assert inside.abs().max() < 1e-5
    assert (operator.baseline(operator(x)) - x).abs().mean() < 0.05


@pytest.mark.parametrize(("size", "std"), [(61, 3.0), (9, 2.0), (5, 0.7)])
def test_gaussian_kernel_is_scipys(size: int, std: float) -> None:
    delta = np.zeros((size, size))
    delta[size // 2, size // 2] = 1
    taps = gaussian_taps(size, std)
    assert np.abs(np.outer(taps, taps) - gaussian_filter(delta, std)).max() < 1e-15


def test_reflecting_blurs_are_torchs() -> None:
    """Where the frame is smaller than the image: ReflectionPad2d and a cross-correlation."""
    x = images((3, 20, 24))
    gaussian = GaussianDeblurring(9, 2.0).bind((3, 20, 24), generators([0, 1]))
    shaken = MotionDeblurring(9, 0.5).bind((3, 20, 24), generators([0, 1]))
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    for operator, kernels in ((gaussian, [gaussian.kernel()] * 2), (shaken, list(shaken.kernels[:, 0].double()))):  # type: ignore[attr-defined]
        for i, k in enumerate(kernels):
            want = F.conv2d(padded[i : i + 1], k.expand(3, 1, 9, 9), groups=3)
            assert torch.allclose(operator(x)[i : i + 1], want, atol=1e-12)


def test_motion_kernels_are_paths() -> None:
    kernels = make("motion-deblurring", {"kernel_size": 31, "intensity": 0.7}, (1, 28, 28), 8).state()["kernel"]
    assert kernels.shape == (8, 1, 31, 31) and (kernels >= 0).all()
    assert torch.allclose(kernels.sum((1, 2, 3)), torch.ones(8), atol=1e-5)
    assert (kernels.flatten(1).max(1).values < 0.9).all(), "a point blurs nothing"


def test_large_blurs_are_solved_without_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "DENSE", 100)
    operator = make("motion-deblurring", {"kernel_size": 9}, (1, 29, 31))
    y = operator(torch.randn(2, 1, 29, 31, dtype=torch.float64))
    z = operator.ridge(y, 0.01)
    assert (operator.adjoint(operator(z)) + 0.01 * z - operator.adjoint(y)).abs().max() < 1e-5
    with pytest.raises(VgmError, match="too large to decompose") as e:
        _ = operator.svd
    assert e.value.code == 2 and "circular" in e.value.hint


def test_masks_have_the_sizes_asked_for() -> None:
    box = make("inpainting", {"box": 0.5}, (1, 28, 28), 6).state()["mask"]
    assert ((1 - box).sum((1, 2, 3)) == 14 * 14).all() and len({tuple(m.flatten().tolist()) for m in box}) > 1
    assert (box[:, :, :2] == 1).all() and (box[..., -2:] == 1).all(), "the margin is 2 pixels of 28"
    missing = make("inpainting", {"mask": "random", "removed": 0.92}, (3, 20, 20), 4).state()["mask"]
    assert ((1 - missing).sum((1, 2, 3)) == int(400 * 0.92)).all()
    kept = make("inpainting", {"mask": "extreme", "box": 10}, (1, 28, 28), 2).state()["mask"]
    assert (kept.sum((1, 2, 3)) == 100).all()


def test_masks_and_kernels_from_files(tmp_path: Path) -> None:
    hole = np.full((28, 28), 255, np.uint8)
    hole[4:9, 3:20] = 0
    Image.fromarray(hole).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", 1 - hole / 255.0)
    one = Inpainting(str(tmp_path / "a.png")).bind((1, 28, 28), generators(range(3)))
    assert not one.is_drawn and torch.equal(one.state()["mask"].squeeze(), torch.from_numpy(hole / 255.0).float())
    second = Inpainting(str(tmp_path)).bind((1, 28, 28), generators([0]), first=1)
    assert torch.equal(second.state()["mask"] + one.state()["mask"], torch.ones(1, 1, 28, 28))
    blur = MotionDeblurring(9, 0.5).bind((1, 28, 28), generators(range(2)))
    from safetensors.torch import save_file

    save_file(blur.state(), tmp_path / "drawn.safetensors")
    again = MotionDeblurring(kernel=str(tmp_path / "drawn.safetensors")).bind((1, 28, 28), generators([7]), first=1)
    x = images((1, 28, 28))
    assert torch.allclose(again(x[1:]), blur(x)[1:], atol=1e-6)
    for operator, text in (
        (Inpainting(str(tmp_path / "none.png")), "no such mask"),
        (Inpainting(str(tmp_path / "drawn.safetensors")), "no 'mask'"),
        (MotionDeblurring(kernel=str(tmp_path / "none.npy")), "no such kernel"),
        (Inpainting(str(tmp_path)), "holds 2 files for 3 images"),
    ):
        with pytest.raises(VgmError, match=text):
            operator.bind((1, 28, 28), generators(range(3)))
    with pytest.raises(VgmError, match="28x28"):
        Inpainting(str(tmp_path / "a.png")).bind((1, 14, 14), generators([0]))


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_is_pillows(quality: int) -> None:
    """In grey levels; libjpeg's integer transform now and then rounds one coefficient of a block to the other side."""
    x = open_dataset("mnist5k").pixels(range(0, 5000, 500))
    differences = []
    got = ((JPEG(quality)(x) + 1) * 127.5).round()
    for i in range(len(x)):
        file = io.BytesIO()
        Image.fromarray(((x[i, 0] + 1) * 127.5).round().byte().numpy()).save(file, "JPEG", quality=quality)
        want = torch.from_numpy(np.array(Image.open(file))).float()
        differences.append((got[i, 0] - want).abs().mean())
        assert (want - (x[i, 0] + 1) * 127.5).abs().mean() > 0.1, "nothing was compressed"
    assert max(differences) < 1 and torch.stack(differences).median() < 0.3


def test_jpeg_of_colours() -> None:
    x = open_dataset("shapes").pixels(range(6))
    for subsampling, limit in (("4:4:4", 0.3), ("4:2:0", 2.5)):  # libjpeg smooths enlarged colours, this does not
        got = ((JPEG(50, subsampling)(x) + 1) * 127.5).round().permute(0, 2, 3, 1)
        for i in range(len(x)):
            file = io.BytesIO()
            pixels = ((x[i] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(file, "JPEG", quality=50, subsampling=subsampling)
            want = torch.from_numpy(np.array(Image.open(file))).float()
            assert (got[i] - want).abs().mean() < limit
    again = JPEG(50, "4:4:4")
    assert (again(again(x)) - again(x)).abs().mean() < 0.01, "compressing twice is compressing once"


def test_phase_retrieval_forgets_what_it_should() -> None:
    """The spectrum's energy is the image's; the image turned by 180 degrees has the same amplitudes."""
    operator = make("phase-retrieval", {"pad": 4}, (1, 20, 20))
    x = images((1, 20, 20))
    y = operator(x)
    assert y.shape == (2, 1, 28, 28) and torch.allclose(y.square().sum(), x.square().sum())
    assert torch.allclose(operator(x.flip(-1, -2)), y, atol=1e-9)
    assert make("phase-retrieval", {"oversample": 1.0}, (1, 20, 20)).measurement_shape == (1, 84, 84)


def test_learned_blur_reads_the_official_names(tmp_path: Path) -> None:
    """GOPRO_wVAE's layout: the half that is not used is ignored, anything missing is an error."""
    with torch.device("meta"):
        empty = kernel_wizard.KernelWizard()
    assert sum(p.numel() for p in empty.parameters()) == 23_662_531
    keys = set(empty.state_dict())
    assert {"feature_extractor.6.conv1.weight", "adapter.model.submodule.submodule.submodule.submodule.down.1.weight",
            "adapter.model.up.1.bias", "recon_trunk.28.bias"} <= keys  # fmt: skip
    torch.manual_seed(0)
    state = {k: torch.randn(v.shape) * 0.02 for k, v in empty.state_dict().items()}
    torch.save({**state, "kernel_extractor.model.1.weight": torch.zeros(1)}, tmp_path / "wizard.pth")
    x = images((3, 256, 256), 1).float()
    fixed = make("nonlinear-deblurring", {"weights": str(tmp_path / "wizard.pth")}, (3, 256, 256), 1)
    assert torch.equal(fixed(x), fixed(x)) and not torch.equal(fixed(x), x)
    drawn = make("nonlinear-deblurring", {"weights": str(tmp_path / "wizard.pth"), "resample": True}, (3, 256, 256), 1)
    assert not torch.equal(drawn(x), drawn(x)), "a new code every time"
    with pytest.raises(VgmError, match="256x256"):
        make("nonlinear-deblurring", {"weights": str(tmp_path / "wizard.pth")}, (1, 28, 28))
    with pytest.raises(VgmError) as e:
        make("nonlinear-deblurring", {"weights": str(tmp_path / "none.pth")}, (3, 256, 256))
    assert e.value.code == 4
    torch.save({"recon_trunk.28.bias": torch.zeros(3)}, tmp_path / "broken.pth")
    with pytest.raises(VgmError, match="no KernelWizard"):
        kernel_wizard.load(str(tmp_path / "broken.pth"))


def test_nonlinear_blur_of_linear_light_is_motion_blur() -> None:
    """At gamma 1 nothing is nonlinear but the clamp."""
    shape = (1, 28, 28)
    straight = make("nonlinear-deblurring", {"kernel_size": 9, "gamma": 1.0}, shape)
    shaken = make("motion-deblurring", {"kernel_size": 9}, shape)
    x = images(shape)
    assert (straight(x) - shaken(x)).abs().max() < 1e-3
    bright = make("nonlinear-deblurring", {"kernel_size": 9}, shape)(x)
    assert bright.mean() > shaken(x).mean(), "light averages brighter than code values"


class HalfCodec:
    """Images are twice their latents."""

    def decode(self, z: Tensor) -> Tensor:
        return 2 * z

    def encode(self, x: Tensor) -> Tensor:
        return x / 2

    def latents(self, moments: Tensor) -> Tensor:
        return moments


def test_latents_are_measured_through_the_decoder() -> None:
    inner = make("super-resolution", {"scale": 2}, (1, 8, 8))
    operator = Decoded(inner, HalfCodec(), (1, 8, 8))
    z = torch.rand(2, 1, 8, 8) / 2
    assert torch.equal(operator(z), inner(2 * z)) and operator.latent and not operator.linear and not operator.has_pinv
    y = inner(torch.rand(2, 1, 8, 8))
    assert torch.allclose(operator.prox(z, y, 0.5), inner.prox(2 * z, y, 0.5).clamp(-1, 1) / 2)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_has_the_spread_it_says() -> None:
    y = torch.zeros(2, 1, 64, 64)
    gaussian = Gaussian(0.2)(y, generators([1, 2]))
    assert abs(gaussian.std() - 0.2) < 0.01 and not torch.equal(gaussian[0], gaussian[1])
    shot = Poisson(0.5)(y, generators([1, 2]))
    assert abs(shot.mean()) < 0.01 and abs(shot.std() - Poisson(0.5).sigma) < 0.01
    assert torch.equal(Clean()(y, generators([1, 2])), y)
    for kind in NOISES.values():
        together = kind()(y, generators([1, 2]))
        assert torch.equal(together[1:], kind()(y[1:], generators([2]))), "an item's noise depends on its batch"


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: SuperResolution(0.5), "scale is at least 1"),
        (lambda: GaussianDeblurring(8), "odd size"),
        (lambda: GaussianDeblurring(9, -1.0), "not negative"),
        (lambda: MotionDeblurring(9, 1.5), "between 0 and 1"),
        (lambda: JPEG(0), "1 to 100"),
        (lambda: Inpainting(removed=(0.9, 0.1)), "smaller first"),
        (lambda: Gaussian(-1), "not negative"),
        (lambda: Poisson(0), "light"),
        (lambda: noise_class("gausian"), "unknown noise"),
        (lambda: registry().build("operator", {"name": "super-resolution", "kernel": "cube"}), "does not fit"),
        (lambda: registry().build("operator", {"name": "super-resolution", "skale": 2}), "unknown key"),
        (lambda: registry().build("operator", "superresolution"), "unknown operator"),
        (lambda: make("colorization", {}, (1, 8, 8)), "colour images"),
        (lambda: make("inpainting", {"box": 27}, (1, 28, 28)), "does not fit"),
        (lambda: make("phase-retrieval", {"pad": -1}, (1, 28, 28)), "pad=-1"),
    ],
)
def test_errors_have_a_sentence_and_exit_code_2(build: Any, text: str) -> None:
    with pytest.raises(VgmError, match=text) as e:
        build()
    assert e.value.code == 2
