"""Bits per dimension: against densities that are known, and the contract with models of every kind."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vgm_cli.api import generators
from vgm_cli.conditioning import ClassLabel, Conditions, Part
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.likelihood import CLEANEST, Bound, elbo, pixel_levels
from vgm_cli.diffusion.path import DiscreteVPPath, make_path
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Subject
from vgm_cli.metrics.likelihood import BitsPerDim, denoiser_bound, denoiser_likelihood, dequantise
from vgm_cli.nn.shapes import expand

MEAN, STD = -0.1, 0.4  # of every pixel, on the training scale


class Exact(torch.nn.Module):
    """The velocity of the linear path between N(MEAN, STD^2) and N(0, 1): z_t is Gaussian at every t."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1).to(z.dtype)
        mean, var = (1 - t) * MEAN, (1 - t) ** 2 * STD**2 + t**2
        slope = t - (1 - t) * STD**2  # half the variance's derivative
        return -MEAN + slope / var * (z - mean)


def nats_of(x: Tensor) -> Tensor:
    """log N(x; MEAN, STD^2) summed."""
    return torch.distributions.Normal(MEAN, STD).log_prob(x.double()).flatten(1).sum(1)


def gaussian_images(n: int, c: int = 1, size: int = 3) -> Tensor:
    x = MEAN + STD * torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(0))
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def seeds(n: int) -> list[torch.Generator]:
    return generators(range(100, 100 + n))


def test_dequantisation_spreads_each_level_about_itself() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    centre = dequantise(x, torch.full((1, 1, 16, 16), 0.5))
    torch.testing.assert_close(centre, x.float() / 127.5 - 1)
    low, high = (dequantise(x, torch.full((1, 1, 16, 16), u)).flatten() for u in (0.0, 1.0))
    torch.testing.assert_close(high[:-1], low[1:])  # levels tile the line
    assert float(high[0] - low[0]) == pytest.approx(1 / 127.5, rel=1e-5)


@pytest.mark.parametrize("probes", [1, None])
def test_nats_of_a_gaussian_are_known(probes: int | None) -> None:
    x = gaussian_images(4)
    nats, kind = denoiser_likelihood(Denoiser(Exact(), "linear"), x, seeds(4), probes=probes)
    u = torch.stack([torch.rand(1, 3, 3, generator=g) for g in seeds(4)])
    expected = nats_of(dequantise(x, u)) - 9 * math.log(127.5)
    torch.testing.assert_close(nats, expected, rtol=2e-4, atol=2e-3)  # a linear field: one probe has no variance
    assert "uniform dequantisation" in kind and ("exact trace" if probes is None else "1 Hutchinson probe") in kind


def test_bits_per_dim_of_a_gaussian_is_its_entropy() -> None:
    n = 400
    data = FakeData(gaussian_images(n))
    (value,) = BitsPerDim(n=n)(subject(Denoiser(Exact(), "linear"), data), seed=0)
    # the discrete entropy at this width is the differential one plus log2 of the levels per unit
    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2) + math.log2(127.5)
    assert value.metric == "bits-per-dim" and value.n == n
    assert value.value == pytest.approx(entropy, abs=4 * (value.uncertainty or 0))
    assert value.uncertainty is not None and value.uncertainty < 0.02
    assert value.options["dimensions"] == 9


def exact_noise(path: str) -> Denoiser:
    """The optimal eps of N(0, STD^2) on any path, from the log-SNR that the network is told."""
    own = make_path(path)

    def network(z: Tensor, l: Tensor) -> Tensor:
        t = own.t_of_logsnr(l.double())
        alpha, sigma = expand(own.alpha(t), z), expand(own.sigma(t), z)
        return (sigma * z / (alpha**2 * STD**2 + sigma**2)).to(z.dtype)

    return Denoiser(network, path, "eps", time="logsnr")


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "edm", "vp-discrete"])
def test_the_bound_of_a_gaussian_is_its_entropy(path: str) -> None:
    """With the optimal denoiser of continuous data the ELBO is tight, wherever a path begins and ends."""
    g = torch.Generator().manual_seed(0)
    x = STD * torch.randn(64, 1, 4, 4, generator=g)
    u = (torch.rand(64, generator=g) + torch.arange(200)[:, None] / 200) % 1
    found = elbo(exact_noise(path), x, u, lambda: torch.randn(x.shape, generator=g))
    nats = -torch.distributions.Normal(0.0, STD).log_prob(x.double()).flatten(1).sum(1)
    assert all(part.shape == (64,) for part in found) and (found.prior >= 0).all() and (found.diffusion > 0).all()
    assert float(sum(found).mean()) == pytest.approx(float(nats.mean()), abs=0.04 * 16)


def test_the_bound_of_pixels() -> None:
    """A denoiser that knows nothing of 8-bit levels pays what it loses by not guessing them, log2(step / (sigma
    sqrt(2 pi e))) a pixel; images keep their numbers whatever their batch; the parts add up."""
    n, view = 200, Denoiser(Exact(), "linear")
    values = BitsPerDim(n=n, method="elbo", steps=30)(subject(view, FakeData(gaussian_images(n))), seed=0)
    whole, *parts = values
    assert [v.metric for v in values] == ["bits-per-dim", *(f"bits-per-dim-{p}" for p in Bound._fields)]
    assert whole.value == pytest.approx(sum(p.value for p in parts)) and "ELBO" in whole.options["likelihood"]
    assert {v.metric for v in values} <= set(BitsPerDim.gives)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2) + math.log2(127.5)
    blind = math.log2(1 / 127.5 / (math.exp(-CLEANEST / 2) * math.sqrt(2 * math.pi * math.e)))
    assert whole.value == pytest.approx(entropy + blind, abs=0.05 + 4 * (whole.uncertainty or 0))
    x = gaussian_images(5)
    together, _ = denoiser_bound(view, x, seeds(5), steps=3)
    alone, _ = denoiser_bound(view, x[3:4], [seeds(5)[3]], steps=3)
    for a, b in zip(together, alone):
        torch.testing.assert_close(a[3:4], b)


def test_where_the_decoder_looks() -> None:
    """Least noise above half a level: the pixels are read off the network's estimate, not off the noisy image."""
    g = torch.Generator().manual_seed(0)
    x = gaussian_images(4).float() / 127.5 - 1
    told: list[Tensor] = []

    def knows(z: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return x

    u, path = torch.rand(1, 4, generator=g), {"name": "ve", "sigma_min": 0.05}
    found = elbo(Denoiser(knows, path, "x0"), x, u, lambda: torch.randn(x.shape, generator=g), pixel_levels())
    logits = -0.5 * ((x[..., None] - pixel_levels()) / 0.05) ** 2
    torch.testing.assert_close(found.reconstruction, -logits.log_softmax(-1).amax(-1).flatten(1).sum(1).double())
    assert len(told) == 2


class Eps(torch.nn.Module):
    """The noise of a discrete process over N(MEAN, STD^2): eps = sigma (x_t - alpha MEAN) / var(x_t)."""

    def __init__(self, path: DiscreteVPPath):
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (f(self.path.t_of_timestep(t)).view(-1, 1, 1, 1) for f in (self.path.alpha, self.path.sigma))
        return (sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)).float()


def test_the_bound_of_a_discrete_process_is_above_the_entropy() -> None:
    """Ten times as many steps come nearer to it."""
    data, bits = FakeData(gaussian_images(64)), []
    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2) + math.log2(127.5)
    for steps in (100, 1000):
        path = DiscreteVPPath("linear", steps)
        view = Denoiser(Eps(path), path, "eps", time="index", variance="fixed_small")
        (value,) = BitsPerDim(method="vlb")(subject(view, data), seed=0)
        assert value.options["likelihood"] == f"variational bound, {steps} steps"
        bits.append(value.value)
    assert entropy < bits[1] < bits[0] < entropy + 3
    with pytest.raises(VgmError, match="discrete steps"):
        BitsPerDim(method="vlb")(subject(Denoiser(Exact(), "linear"), data), seed=0)


def test_an_image_does_not_depend_on_the_batch() -> None:
    x = gaussian_images(5)
    view = Denoiser(Exact(), "linear")
    together, _ = denoiser_likelihood(view, x, seeds(5))
    alone, _ = denoiser_likelihood(view, x[3:4], [seeds(5)[3]])
    torch.testing.assert_close(together[3:4], alone, rtol=1e-6, atol=1e-5)


# -- the contract ----------------------------------------------------------------------------------------------------


class FakeData:
    """What the metric asks of a data set."""

    def __init__(self, x: Tensor, labels: np.ndarray | None = None):
        self.x, self.own = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, rows: list[int]) -> dict[str, Tensor]:
        batch = {"x": self.x[rows]}
        return batch if self.own is None else {**batch, "label": torch.from_numpy(self.own[rows])}


def subject(view: Any, data: Any, codec: Any = None, classes: int = 0, batch_size: int = 64) -> Subject:
    header = SimpleNamespace(component={"name": "toy"}, data={"num_classes": classes})
    told = Conditions([Part("class", ClassLabel(classes), "label")] if classes else [])
    shares = lambda items, work: [work(i) for i in items]
    return Subject(view, codec, header, data, torch.device("cpu"), batch_size, None, shares, told)


class Uniform:
    """All 8-bit images are equally likely: 8 bits per dimension exactly."""

    def log_likelihood(self, x: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, str]:
        assert x.dtype == torch.uint8 and len(generators) == len(x)
        return torch.full((len(x),), -x[0].numel() * 8 * math.log(2)), "exact"


def test_a_view_with_a_likelihood_is_asked() -> None:
    (value,) = BitsPerDim(n=10)(subject(Uniform(), FakeData(gaussian_images(30))), seed=0)
    assert value.value == pytest.approx(8) and value.uncertainty == 0 and value.options["likelihood"] == "exact"


class Noisy:
    """One draw per image, given back as nats: shows which generator an image gets."""

    def log_likelihood(
        self, x: Tensor, generators: list[torch.Generator], y: Tensor | None = None
    ) -> tuple[Tensor, str]:
        assert y is not None and torch.equal(y, x[:, 0, 0, 0].long() % 3)
        return torch.stack([torch.rand((), generator=g) for g in generators]), "a draw"


def test_draws_depend_on_seed_and_image_and_labels_arrive() -> None:
    x = gaussian_images(20)
    data = FakeData(x, (x[:, 0, 0, 0].numpy() % 3).astype(np.int64))

    def measure(batch_size: int, seed: int) -> float:
        return BitsPerDim(n=20)(subject(Noisy(), data, classes=3, batch_size=batch_size), seed)[0].value

    assert measure(20, 0) == pytest.approx(measure(3, 0), rel=1e-6) and measure(20, 0) != measure(20, 1)


def test_images_are_taken_evenly_from_a_sorted_set() -> None:
    seen: list[Tensor] = []

    class Spy(Uniform):
        def log_likelihood(self, x: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, str]:
            seen.append(x[:, 0, 0, 0])
            return super().log_likelihood(x, generators)

    x = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    BitsPerDim(n=10)(subject(Spy(), FakeData(x)), seed=0)
    assert torch.cat(seen).tolist() == list(range(0, 100, 10))


class Codec:
    """(1, 3, 3) images to (1, 1, 1) latents: their mean plus posterior noise."""

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return (1, 1, 1)

    def encode(self, x: Tensor) -> Tensor:
        assert x.min() >= -1 and x.max() <= 1
        return x.mean((2, 3), keepdim=True)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        assert noise is not None
        return moments + 0.1 * noise


def test_behind_a_codec_only_latents_have_a_likelihood() -> None:
    data = FakeData(gaussian_images(12))
    with pytest.raises(VgmError, match="no likelihood of pixels") as e:
        BitsPerDim(n=5)(subject(Uniform(), data, Codec()), seed=0)
    assert e.value.code == USAGE

    class Latent:
        latent_likelihood = True

        def log_likelihood(self, x: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, str]:
            assert x.shape[1:] == (1, 1, 1) and x.is_floating_point()
            return torch.full((len(x),), -math.log(2)), "exact"

    (value,) = BitsPerDim(n=5)(subject(Latent(), data, Codec()), seed=0)
    assert (value.metric, value.value) == ("bits-per-latent-dim", pytest.approx(1))
    (ode,) = BitsPerDim(n=12)(subject(Denoiser(Exact(), "linear"), data, Codec()), seed=0)
    assert ode.metric == "bits-per-latent-dim" and "dequantisation" not in ode.options["likelihood"]


def test_models_without_a_likelihood_are_named() -> None:
    with pytest.raises(VgmError, match="toy offers no likelihood"):
        BitsPerDim()(subject(torch.nn.Linear(1, 1), FakeData(gaussian_images(4))), seed=0)
    with pytest.raises(VgmError, match="needs images"):
        BitsPerDim()(subject(Uniform(), None), seed=0)
