"""The arithmetic of every metric, against scipy, torchmetrics, torch-fidelity's stored numbers and closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from feature_weights import lpips_weights
from safetensors import safe_open
from torch import Tensor

from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.metrics.base import Measured
from vgm_cli.metrics.class_accuracy import accuracy_of
from vgm_cli.metrics.frechet import (
    FID,
    FIDInfinity,
    Moments,
    SpatialFID,
    frechet_distance,
    frechet_infinity,
    frechet_spread,
    frechet_with_error,
)
from vgm_cli.metrics.image import MSSSIM, PSNR, LPIPSDistance, ms_ssim, psnr, ssim
from vgm_cli.metrics.inception_score import inception_score
from vgm_cli.metrics.kernel import gaussian_mmd, kernel_distance, polynomial_mmd
from vgm_cli.metrics.manifold import density_coverage, precision_recall
from vgm_cli.metrics.memorisation import Memorisation, closer, nearest
from vgm_cli.metrics.path_length import path_length, prepare, slerp
from vgm_cli.metrics.pictures import small

ORACLES = Path(__file__).parent / "oracles" / "feature-networks.safetensors"


def draws(n: int, d: int, seed: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix * scale / d**0.5 + torch.rand(d, generator=g)


def scipy_distance(a: Tensor, b: Tensor) -> float:
    s1, s2 = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    delta = (a.mean(0) - b.mean(0)).numpy()
    return float(delta @ delta + np.trace(s1 + s2 - 2 * root.real))


@pytest.fixture(scope="module")
def fidelity() -> dict[str, Any]:
    """Features, and what torch-fidelity 0.4.0 made of them."""
    with safe_open(ORACLES, framework="pt") as f:
        tensors = {k: f.get_tensor(f"fidelity/{k}").float() for k in ("f1", "f2", "logits")}
        return {**tensors, **json.loads(f.metadata()["fidelity.results"])}


# -- Frechet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [300, 20])  # 20 samples of 32 features: a singular covariance
def test_frechet_distance_equals_scipys(n: int) -> None:
    a, b = draws(n, 32, 0), draws(400, 32, 1, 1.3)
    m, r = Moments.of(a), Moments.of(b)
    assert frechet_distance(m.mean, m.cov, r.mean, r.cov) == pytest.approx(scipy_distance(a, b), rel=1e-5)


def test_frechet_distance_of_known_gaussians() -> None:
    one, zero = torch.eye(3), torch.zeros(3)
    assert frechet_distance(zero, one, zero + 2, 4 * one) == pytest.approx(3 * 4 + 3 * (1 + 4 - 2 * 2))
    assert frechet_distance(zero, one, zero, one) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Net(torch.nn.Module):
        num_features = 8

        def forward(self, x: Tensor) -> Tensor:
            return x.double().flatten(1)[:, :8]

    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 255, (60, 3, 4, 4), generator=g, dtype=torch.uint8)
    b = torch.randint(30, 255, (80, 3, 4, 4), generator=g, dtype=torch.uint8)
    metric = FrechetInceptionDistance(feature=Net(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    metric.update(b, real=True)
    metric.update(a, real=False)
    m, r = Moments.of(Net()(a)), Moments.of(Net()(b))
    assert frechet_distance(m.mean, m.cov, r.mean, r.cov) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_frechet_distance_equals_torch_fidelitys(fidelity: dict[str, Any]) -> None:
    m, r = Moments.of(fidelity["f1"]), Moments.of(fidelity["f2"])
    value = frechet_distance(m.mean, m.cov, r.mean, r.cov)
    assert value == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-6)


def test_statistics_of_different_width_are_refused() -> None:
    with pytest.raises(VgmError, match="cannot be compared"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x = draws(101, 7, 3) + 1e4  # far from 0: sums of squares would cancel
    total = Moments.empty(7)
    for part in x.split(10):
        total.update(part)
    torch.testing.assert_close(total.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(total.cov, torch.cov(x.T), rtol=1e-8, atol=1e-10)
    assert total.n == 101


def test_first_order_error_is_the_spread_of_repeated_samples() -> None:
    mu, sigma = torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    values, errors, boots = [], [], []
    for seed in range(60):
        x = draws(400, 8, 99, 0.8)[torch.from_numpy(np.random.default_rng(seed).integers(0, 400, 200))]
        value, error = frechet_with_error(x, mu, sigma)
        m = Moments.of(x)
        assert value == pytest.approx(frechet_distance(m.mean, m.cov, mu, sigma), rel=1e-9)
        values.append(value)
        errors.append(error)
        if seed < 8:
            boots.append(frechet_spread(x, mu, sigma, 20, seed))
    spread = np.std(values, ddof=1)
    assert np.mean(errors) == pytest.approx(spread, rel=0.25)
    assert np.mean(boots) == pytest.approx(spread, rel=0.35)


def test_bootstrap_with_fewer_samples_than_features_equals_the_plain_one() -> None:
    x, ref = draws(12, 20, 4), draws(200, 20, 5)
    r = Moments.of(ref)
    g, values = np.random.default_rng(7), []
    for _ in range(6):
        m = Moments.of(x[torch.from_numpy(g.integers(0, 12, 12))])
        values.append(frechet_distance(m.mean, m.cov, r.mean, r.cov))
    assert frechet_spread(x, r.mean, r.cov, 6, 7) == pytest.approx(np.std(values, ddof=1), rel=1e-6)


def test_extrapolation_removes_the_bias_of_small_samples() -> None:
    x, sigma = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.eye(16)
    m = Moments.of(x[:200])
    biased = frechet_distance(m.mean, m.cov, torch.zeros(16), sigma)
    value, error = frechet_infinity(x, torch.zeros(16), sigma, smallest=200)
    assert biased > 0.3 and abs(value) < 0.03 and 0 < error < 0.05
    with pytest.raises(VgmError, match="at least 20"):
        frechet_infinity(x[:10], torch.zeros(16), sigma)


def test_fid_says_how_its_uncertainty_was_had() -> None:
    pool = draws(50, 6, 0)
    side, ref = Measured(50, moments=Moments.of(pool), pool=pool), Measured(60, moments=Moments.of(draws(60, 6, 1)))
    (first,) = FID()(side, ref, 0)
    (boot,) = FID(bootstrap=10)(side, ref, 0)
    (bare,) = FID(bootstrap=0)(side, ref, 0)
    assert first.options == {"uncertainty": "first order"} and boot.options == {"uncertainty": "bootstrap of 10"}
    assert first.uncertainty and boot.uncertainty and bare.uncertainty is None
    assert first.value == pytest.approx(bare.value) and "pool" not in FID(bootstrap=0).needs_samples


def test_sfid_looks_at_spatial_features_and_fid_inf_at_the_samples() -> None:
    pool, spatial, other = draws(400, 6, 0), draws(50, 4, 2), draws(60, 4, 3)
    ref = Measured(500, moments=Moments.of(draws(500, 6, 0)), spatial=Moments.of(other))
    side = Measured(400, spatial=Moments.of(spatial), pool=pool)
    (s,) = SpatialFID()(side, ref, 0)
    assert (s.metric, s.value) == ("sfid", pytest.approx(scipy_distance(spatial, other), rel=1e-5))
    (f,) = FIDInfinity(points=8, smallest=50)(side, ref, 3)
    assert ref.moments is not None
    expected = frechet_infinity(pool, ref.moments.mean, ref.moments.cov, 8, 50, 3)
    assert (f.metric, f.value, f.uncertainty, f.options) == ("fid-inf", *expected, {"points": 8})


# -- kernels, scores, manifolds --------------------------------------------------------------------------------------


def test_kid_equals_torch_fidelitys_and_torchmetrics(fidelity: dict[str, Any]) -> None:
    from torchmetrics.image.kid import poly_mmd

    mean, spread = kernel_distance(fidelity["f1"], fidelity["f2"], subsets=20, subset_size=50, seed=2020)
    assert mean == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-5)
    assert spread == pytest.approx(fidelity["kernel_inception_distance_std"], rel=1e-5)
    a, b = draws(40, 5, 0), draws(40, 5, 1)
    assert polynomial_mmd(a, b) == pytest.approx(float(poly_mmd(a, b, degree=3, gamma=None, coef=1.0)), rel=1e-9)


def test_kid_is_unbiased_and_refuses_too_large_subsets() -> None:
    values = [polynomial_mmd(draws(60, 4, 5)[:30], draws(60, 4, 5)[30:])]
    g = torch.Generator().manual_seed(0)
    values += [polynomial_mmd(*torch.randn(2, 30, 4, generator=g)) for _ in range(300)]
    assert abs(np.mean(values[1:])) < 4 * np.std(values[1:]) / 300**0.5
    with pytest.raises(VgmError, match="subsets of 100"):
        kernel_distance(draws(50, 3, 0), draws(50, 3, 1), subset_size=100)


def test_cmmd_is_the_biased_gaussian_mmd() -> None:
    a, b = torch.nn.functional.normalize(draws(30, 6, 0)), torch.nn.functional.normalize(draws(40, 6, 1))

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        return np.mean([[math.exp(-float((p - q).square().sum()) / 200) for q in y] for p in x])

    value, error = gaussian_mmd(a, b)
    assert value == pytest.approx(1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)), rel=1e-6)
    assert gaussian_mmd(a, a)[0] == pytest.approx(0, abs=1e-9) and error > 0


def test_inception_score_equals_torch_fidelitys(fidelity: dict[str, Any]) -> None:
    mean, spread = inception_score(fidelity["logits"], splits=10, shuffle=True, seed=2020)
    assert mean == pytest.approx(fidelity["inception_score_mean"], rel=1e-6)
    assert spread == pytest.approx(fidelity["inception_score_std"], rel=1e-5)


def test_inception_score_of_extremes_and_adms_splits() -> None:
    sure = 100 * torch.eye(10).repeat(10, 1)
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-6)  # certain and even
    assert inception_score(torch.zeros(100, 10))[0] == pytest.approx(1)  # knows nothing
    logits = draws(25, 4, 0)
    mean, _ = inception_score(logits, split_size=10, shuffle=False)
    parts = [inception_score(logits[i : i + 10], splits=1, shuffle=False)[0] for i in (0, 10, 20)]
    assert mean == pytest.approx(np.mean(parts))


def test_precision_recall_equals_torch_fidelitys(fidelity: dict[str, Any]) -> None:
    precision, recall = precision_recall(fidelity["f1"], fidelity["f2"], k=3)
    assert precision == pytest.approx(fidelity["precision"], abs=1e-6)
    assert recall == pytest.approx(fidelity["recall"], abs=1e-6)


def test_manifold_metrics_equal_their_definitions() -> None:
    s, r, k = draws(40, 3, 0), draws(50, 3, 1), 4
    ds, dr, d = (torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") for a, b in ((s, s), (r, r), (s, r)))
    rs, rr = ds.sort(1).values[:, k], dr.sort(1).values[:, k]  # position 0 is the point itself
    assert precision_recall(s, r, k) == (
        float((d <= rr).any(1).double().mean()),
        float((d.T <= rs).any(1).double().mean()),
    )
    density, coverage = density_coverage(s, r, k)
    assert density == pytest.approx(float((d < rr).double().sum() / (k * len(s))))
    assert coverage == pytest.approx(float((d.min(0).values < rr).double().mean()))
    same = density_coverage(r, r, k)
    assert same[0] == pytest.approx(1, abs=0.3) and same[1] == 1 and precision_recall(r, r, k) == (1, 1)


def test_neighbours_need_enough_images() -> None:
    with pytest.raises(VgmError, match="need more than 3"):
        precision_recall(draws(3, 2, 0), draws(9, 2, 1))


# -- pairs -----------------------------------------------------------------------------------------------------------


def pictures(n: int, c: int, size: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(n, c, 9, 9, generator=g), (size, size), mode="bilinear")
    return x, (x + 0.1 * torch.randn(x.shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_equal_torchmetrics(channels: int) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    x, y = pictures(3, channels, 40)
    theirs = [float(peak_signal_noise_ratio(x[i], y[i], data_range=1.0)) for i in range(3)]
    assert psnr(x, y).tolist() == pytest.approx(theirs, rel=1e-5)
    each = structural_similarity_index_measure(x.double(), y.double(), data_range=1.0, reduction="none")
    assert ssim(x, y, padding="reflect").tolist() == pytest.approx(each.tolist(), rel=1e-6)
    assert ssim(x, x).tolist() == pytest.approx([1] * 3)


def test_ms_ssim_equals_torchmetrics() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    x, y = pictures(2, 3, 180)
    theirs = multiscale_structural_similarity_index_measure(
        x.double(), y.double(), data_range=1.0, reduction="none", normalize="relu"
    )
    assert ms_ssim(x, y, padding="reflect").tolist() == pytest.approx(theirs.tolist(), rel=1e-4)
    with pytest.raises(VgmError, match="176"):
        ms_ssim(x[..., :100, :100], y[..., :100, :100])
    a, b = ((v * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for v in (x, y))
    (value,) = MSSSIM(padding="reflect")(Measured(2, images=a), Measured(2, images=b), 0)
    assert value.metric == "ms-ssim" and value.value == pytest.approx(float(theirs.mean()), abs=1e-3)


def test_pairs_must_match() -> None:
    a = Measured(2, images=np.zeros((2, 12, 12, 1), np.uint8))
    b = Measured(3, images=np.zeros((3, 12, 12, 1), np.uint8))
    with pytest.raises(VgmError, match="compares pairs"):
        PSNR()(a, b, 0)
    noisy = Measured(2, images=np.full((2, 12, 12, 1), 51, np.uint8))
    (value,) = PSNR()(a, noisy, 0)
    assert value.value == pytest.approx(-20 * math.log10(0.2))


@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return lpips_weights(tmp_path_factory.mktemp("lpips"))


def test_lpips_of_pairs(lpips_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli.losses.lpips import LPIPS

    for variable in ("VGM_LPIPS_VGG", "VGM_LPIPS_HEADS"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(VgmError) as e:
        LPIPSDistance()
    assert e.value.code == MISSING_ASSET and "VGM_LPIPS_VGG" in e.value.hint
    metric = LPIPSDistance(*map(str, lpips_files))
    rng = np.random.default_rng(0)
    a, b = (Measured(3, images=rng.integers(0, 255, (3, 16, 16, 3), np.uint8)) for _ in range(2))
    (value,) = metric(a, b, 0)
    x, y = (torch.from_numpy(m.images).permute(0, 3, 1, 2).float() / 127.5 - 1 for m in (a, b) if m.images is not None)
    with torch.no_grad():
        assert value.value == pytest.approx(float(LPIPS(*map(str, lpips_files))(x, y).mean()), rel=1e-5)
    assert metric(a, a, 0)[0].value == 0 and len(value.options["vgg_sha256"]) == 64


# -- class accuracy --------------------------------------------------------------------------------------------------


def test_class_accuracy_counts_hits() -> None:
    logits = torch.eye(10)[torch.tensor([1, 2, 3, 3])]
    assert accuracy_of(logits, np.array([1, 2, 3, 4])) == 0.75
    with pytest.raises(VgmError, match="reach 10"):
        accuracy_of(logits, np.array([1, 2, 3, 10]))
    with pytest.raises(VgmError, match="have 2 labels"):
        accuracy_of(logits, np.array([1, 2]))


# -- memorisation ----------------------------------------------------------------------------------------------------


def sides(samples: Tensor, train: Tensor) -> tuple[Measured, Measured]:
    return Measured(len(samples), pool=samples, pixels=samples), Measured(len(train), pool=train, pixels=train)


def test_closer_is_the_mann_whitney_statistic() -> None:
    from scipy.stats import mannwhitneyu

    a, b = draws(30, 1, 0)[:, 0].abs().round(decimals=1), draws(40, 1, 1)[:, 0].abs().round(decimals=1)  # with ties
    value, error = closer(a, b)
    assert value == pytest.approx(mannwhitneyu(a.numpy(), b.numpy()).statistic / (30 * 40))
    assert error == pytest.approx(math.sqrt(71 / (12 * 1200)))


def test_fresh_samples_pass_and_copies_are_found() -> None:
    train, fresh, held_out = (torch.randn(400, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found = {v.metric: v for v in Memorisation()(*sides(fresh, train), 0)}
    assert found["memorisation"].value == pytest.approx(0.5, abs=4 * (found["memorisation"].uncertainty or 0))
    assert found["copies"].value < 0.04
    copied = torch.cat([train[:100] + 1e-4, fresh[:300]])
    found = {v.metric: v for v in Memorisation()(*sides(copied, train), 0)}
    assert 0.25 <= found["copies"].value < 0.29 and found["copies-pixels"].value >= 0.25
    assert found["memorisation"].value < 0.42
    closest = found["memorisation"].facts["closest"][0]
    assert closest["sample"] == closest["training"] < 100 and closest["distance"] < 1e-3
    exact = Memorisation()(*sides(train[:50], train), 0, held_out=sides(held_out, train)[0])
    assert exact[0].value == 0 and exact[1].value == 1
    assert exact[0].options["against"] == "400 held-out images" and exact[0].facts["median_distance"] == 0


def test_nearest_leaves_the_point_itself_out() -> None:
    x = torch.tensor([[0.0], [1.0], [5.0]])
    distance, index = nearest(x, x, itself=True)
    assert distance.tolist() == [1, 1, 4] and index.tolist() == [1, 0, 1]
    with pytest.raises(VgmError) as e:
        Memorisation(quantile=1.5)
    assert e.value.code == USAGE


def test_pixel_copies_are_small() -> None:
    x = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8)
    assert small(x).shape == (2, 32 * 32 * 3)
    expected = torch.from_numpy(x[0, :2, :2, 0].astype(np.float32)).mean() / 255
    assert float(small(x)[0, 0]) == pytest.approx(float(expected))
    assert small(x[:, :20, :20]).shape == (2, 1200)


# -- path length -----------------------------------------------------------------------------------------------------


def test_path_length_drops_the_outer_percentiles() -> None:
    d = torch.arange(201.0)
    mean, error = path_length(d * 1e-4, 1e-2)
    assert mean == pytest.approx(np.arange(2, 199).mean()) and error > 0  # percentiles 1 and 99 are kept themselves


def test_slerp_keeps_to_the_sphere_at_even_speed() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    for t in (0.0, 0.25, 1.0):
        angle = t * math.pi / 2
        found = slerp(a, b, torch.tensor([[t]]))[0].tolist()
        assert found == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


def test_faces_are_cropped_and_large_images_averaged() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(prepare(x, crop=True), x[:, :, 3:7, 2:6])
    assert prepare(torch.ones(1, 3, 1024, 1024)).shape == (1, 3, 256, 256)
