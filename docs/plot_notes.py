"""The pictures and tables of docs/notes: python docs/plot_notes.py [kl] [ddim] [density] [--out docs/images]

Nothing is trained: data are Gaussians, and mixtures of Gaussians in two dimensions, of which every network's perfect
answer is a formula. The solvers, paths, weights and likelihoods are those that every model of the house uses.
Numbers are printed as the rows of the notes' tables.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor
from vgm_plugins.vdmpp.weightings import elbo_density, make_weight

from vgm_cli.atomic import write_text
from vgm_cli.diffusion import likelihood, solvers
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.path import Path as GaussianPath
from vgm_cli.diffusion.path import make_path
from vgm_cli.diffusion.timesteps import time_grid
from vgm_cli.engine.report.charts import svg
from vgm_cli.images import make_grid, save_png
from vgm_cli.nn.shapes import expand

# -- every objective is a KL divergence --------------------------------------------------------------------------------

DATA, MODEL = 0.5, 1.5  # variances of two Gaussians about 0: what the data are, and what a model takes them for
MONOTONE = ("v-cosine", "sigmoid", "edm-monotonic", "indi")  # weights that are averages of likelihood bounds


def log_snrs(low: float = -20.0, high: float = 20.0, n: int = 8001) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def kl(p: Tensor | float, q: Tensor | float) -> Tensor:
    """KL(N(0, p) || N(0, q)) in nats; p, q are variances."""
    ratio = torch.as_tensor(p, dtype=torch.float64) / q
    return 0.5 * (ratio - 1 - ratio.log())


def noisy(l: Tensor, variance: float) -> Tensor:
    """Variance of alpha x + sigma eps at log-SNRs l, where alpha^2 + sigma^2 = 1."""
    return torch.sigmoid(l) * variance + torch.sigmoid(-l)


def gap(l: Tensor, p: float = DATA, q: float = MODEL) -> Tensor:
    """E ||eps_q - eps_p||^2 over noisy data: how much worse the denoiser of N(0, q) guesses the noise in data of
    N(0, p) than the best one does. The error of any denoiser is that of the best plus this."""
    noise, vp, vq = torch.sigmoid(-l), noisy(l, p), noisy(l, q)
    return noise * (1 / vq - 1 / vp) ** 2 * vp


def half_integral(values: Tensor, l: Tensor) -> float:
    """1/2 int values dlambda."""
    return 0.5 * float(torch.trapezoid(values, l))


def average_of_kls(name: str, l: Tensor, p: float = DATA, q: float = MODEL) -> Tensor:
    """-w'(lambda) KL(p_lambda || q_lambda) dlambda, the terms of which a monotone weighted loss is the sum."""
    weight, kls = make_weight(name), kl(noisy(l, p), noisy(l, q))
    between = torch.cat([(kls[:-1] + kls[1:]) / 2, kls[-1:]])  # where elbo_density puts its mass
    return weight(l[:1]) * elbo_density(weight, l) * between


def plot_kl(out: Path) -> None:
    l = log_snrs()
    shown = l[(l > -8) & (l < 12)]
    lines = {"1/2 E||eps_q - eps_p||²": list(zip(shown.tolist(), (gap(shown) / 2).tolist()))}
    lines["KL of noisy data"] = list(zip(shown.tolist(), kl(noisy(shown, DATA), noisy(shown, MODEL)).tolist()))
    write_text(out / "note-kl-identity.svg", svg(lines, "log-SNR: noise on the left, data on the right"))
    shares = {}
    for name in MONOTONE:
        terms = average_of_kls(name, l)
        density = terms / terms.sum() / (l[1] - l[0])
        inside = (l > -8) & (l < 12)
        shares[name] = list(zip(l[inside].tolist(), density[inside].tolist()))
    write_text(out / "note-kl-shares.svg", svg(shares, "log-SNR: noise on the left, data on the right"))
    print(f"| elbo | {half_integral(gap(l), l):.6f} | {float(kl(DATA, MODEL)):.6f} |")
    for name in MONOTONE:
        terms = average_of_kls(name, l)
        print(f"| {name} | {half_integral(make_weight(name)(l) * gap(l), l):.6f} | {float(terms.sum()):.6f} |")


# -- a density whose scores are known ----------------------------------------------------------------------------------


class Mixture:
    """Equal Gaussians of one standard deviation about points (K, 2), and the same after noise of any path."""

    def __init__(self, means: Tensor, std: float):
        self.means, self.std = means.double(), std

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, 2)."""
        which = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[which] + self.std * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def parts(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of noisy points z (B, 2): what lies between them and each mean (B, K, 2), the variance of every noisy part
        (B, 1), and the log-density of each part there, without its share 1 / K: (B, K)."""
        alpha, sigma = (c.reshape(-1, 1) for c in (alpha.double(), sigma.double()))
        away = z.double()[:, None] - alpha[..., None] * self.means
        variance = (alpha * self.std) ** 2 + sigma**2
        return away, variance, -away.square().sum(-1) / (2 * variance) - (2 * math.pi * variance).log()

    def log_density(self, z: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """log p(z) after noise: (B,)."""
        alpha, sigma = (torch.as_tensor(c, dtype=torch.float64) for c in (alpha, sigma))
        return self.parts(z, alpha, sigma)[2].logsumexp(1) - math.log(len(self.means))

    def expected(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E[x0 | z] and E[eps | z], which are what perfect networks predict: (B, 2) each."""
        away, variance, log_parts = self.parts(z, alpha, sigma)
        share = log_parts.softmax(1)[..., None]
        scale = share * away / variance[..., None]
        x0 = (share * self.means + alpha.reshape(-1, 1, 1) * self.std**2 * scale).sum(1)
        return x0, sigma.reshape(-1, 1) * scale.sum(1)

    def denoiser(self, path: str | GaussianPath) -> Denoiser:
        """The house's view of a perfect network, which predicts the velocity."""
        path = make_path(path)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            t = t.double()
            x0, eps = self.expected(z, path.alpha(t), path.sigma(t))
            return expand(path.alpha_prime(t), z) * x0 + expand(path.sigma_prime(t), z) * eps

        return Denoiser(velocity, path, "velocity")


CLUSTERS = Mixture(torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]]), 0.35)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, 2, generator=seeded(seed), dtype=torch.float64)


# -- DDIM is flow matching's Euler -------------------------------------------------------------------------------------


def levels_of(path: str, steps: int, schedule: str = "uniform") -> tuple[Tensor, Tensor, Tensor]:
    """Times, alphas and sigmas of a path, in equal steps of time or (logsnr) of the log-SNR."""
    p = make_path(path)
    times = time_grid(p, steps, schedule, low=max(p.t_min, 1e-3), high=min(p.t_max, 1 - 1e-3))
    return times, p.alpha(times), p.sigma(times)


def by_ddim(x: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
    """DDIM on any path, from noise x."""
    return solvers.ddim(lambda z, i: CLUSTERS.expected(z, alphas[i], sigmas[i]), x, alphas, sigmas)


def by_flow(x: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
    """The same steps by flow matching: rescaled to the line (1 - t) x0 + t eps, Euler there, and scaled back."""
    t, total = sigmas / (alphas + sigmas), alphas + sigmas

    def velocity(z: Tensor, i: int) -> Tensor:
        x0, eps = CLUSTERS.expected(z, 1 - t[i], t[i])
        return eps - x0

    return solvers.flow_euler(velocity, x / total[0], t) * total[-1]


def by_sigma(x: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
    """The same steps by k-diffusion's Euler in x / alpha, whose noise level is sigma / alpha."""
    one = torch.ones((), dtype=torch.float64)
    denoise = lambda z, s: CLUSTERS.expected(z, one, s)[0]
    return solvers.K_DIFFUSION["euler"](denoise, x / alphas[0], sigmas / alphas) * alphas[-1]


def by_time(x: Tensor, path: str, times: Tensor, method: str = "euler") -> Tensor:
    """Euler (or heun, …) on dx/dt in the path's own time."""
    view = CLUSTERS.denoiser(path)
    return solvers.ODE[method][0](lambda z, t: view.predict(z, t, "velocity"), x, times)


def end_of_flow(x: Tensor, path: str, times: Tensor) -> Tensor:
    """Where the probability flow leads, to nine digits."""
    view = CLUSTERS.denoiser(path)
    field = lambda z, t: view.predict(z, t, "velocity")
    return solvers.dopri5(field, x, float(times[0]), float(times[-1]), rtol=1e-9, atol=1e-9)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square distance of points (B, 2)."""
    return float((a - b).square().sum(1).mean().sqrt())


def plot_ddim(out: Path) -> None:
    path = "vp"
    lines: dict[str, list[tuple[float, float]]]
    lines = {"DDIM = flow's Euler": [], "Euler in vp's time": [], "Heun in vp's time": [], "DDIM, equal log-SNR": []}
    for steps in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96):
        times, alphas, sigmas = levels_of(path, steps)
        x = normal(500, 0) * sigmas[0]
        end = end_of_flow(x, path, times)
        made = by_ddim(x, alphas, sigmas)
        lines["DDIM = flow's Euler"].append((steps, distance(made, end)))
        lines["Euler in vp's time"].append((steps, distance(by_time(x, path, times), end)))
        if steps % 2 == 0:
            half = levels_of(path, steps // 2)[0]
            lines["Heun in vp's time"].append((steps, distance(by_time(x, path, half, "heun"), end)))
        even = levels_of(path, steps, "logsnr")
        lines["DDIM, equal log-SNR"].append((steps, distance(by_ddim(x, *even[1:]), end)))
        if steps in (4, 8, 16, 32, 64):
            others = [float((f(x, alphas, sigmas) - made).abs().max()) for f in (by_flow, by_sigma)]
            print(f"| {steps} | {distance(made, end):.3f} | {others[0]:.0e} | {others[1]:.0e} |")
    write_text(out / "note-ddim.svg", svg(lines, "evaluations of the network; distance from the exact end", log=True))


# -- SDE, ODE and likelihood of one density ----------------------------------------------------------------------------

PATH = "vp"


def forward(x: Tensor, times: Tensor, seed: int) -> list[Tensor]:
    """States at ascending times of dx = f x dt + g dW, by Euler and Maruyama, from data x at times[0]."""
    path, g, states = make_path(PATH), seeded(seed), [x]
    for t, s in itertools.pairwise(times):
        draw = torch.randn(x.shape, generator=g, dtype=torch.float64)
        x = x + path.f(t) * x * (s - t) + (path.g2(t) * (s - t)).sqrt() * draw
        states.append(x)
    return states


def backward(x: Tensor, times: Tensor, seed: int | None) -> list[Tensor]:
    """States at descending times, from noise x at times[0]: of the reverse SDE, or without a seed of the ODE."""
    view, states = CLUSTERS.denoiser(PATH), []
    keep = lambda i, z, x0: states.append(z)
    if seed is None:
        field = lambda z, t: view.predict(z, t, "velocity")
        end = solvers.ODE["heun"][0](field, x, times, callback=keep)
        return [*states, end]
    g = seeded(seed)
    both = lambda z, t: (view.predict(z, t, "velocity"), view.predict(z, t, "score"))
    noise = lambda: torch.randn(x.shape, generator=g, dtype=torch.float64)
    end = solvers.reverse_sde(both, x, times, lambda t: view.path.g2(t).sqrt(), noise=noise, callback=keep)
    return [*states, end]


def histogram(x: Tensor, side: int = 45, reach: float = 3.2) -> Tensor:
    """Points (N, 2) as a picture (1, side, side) in [-1, 1], dark where they are many."""
    cell = ((x / reach + 1) / 2 * side).floor().long()
    cell = cell[((cell >= 0) & (cell < side)).all(1)]
    flat = (side - 1 - cell[:, 1]) * side + cell[:, 0]
    count = torch.bincount(flat, minlength=side * side).view(1, side, side).double()
    return 1 - 2 * (count / torch.quantile(count.flatten(), 0.995).clamp(min=1)).clamp(max=1)


def at_times(density: Mixture, t: float, n: int, seed: int) -> Tensor:
    """Exact draws (n, 2) at time t: data, scaled, with noise."""
    path = make_path(PATH)
    return path.alpha(t) * density.draw(n, seeded(seed)) + path.sigma(t) * normal(n, seed + 1)


def likelihoods(x: Tensor, path: str, method: str = "dopri5", **options: float) -> tuple[Tensor, int]:
    """log p of points (B, 2) by the ODE with an exact divergence, and the evaluations that it took."""
    found = likelihood.log_likelihood(CLUSTERS.denoiser(path), x, method=method, **options)  # type: ignore[arg-type]
    return found.log_prob, found.nfe


def plot_density(out: Path) -> None:
    path = make_path(PATH)
    times = time_grid(path, 400)
    noise = normal(20_000, 3)
    ode, sde = backward(noise, times, None), backward(noise, times, 4)
    there = forward(CLUSTERS.draw(20_000, seeded(5)), times.flip(0), 6)[::-1]

    lines = {f"{name} {k + 1}": [(float(t), float(x[k, 0])) for t, x in zip(times, states)]
             for k in range(3) for name, states in (("ODE", ode), ("SDE", sde))}  # fmt: skip
    write_text(out / "note-density-paths.svg", svg(lines, "t: data at 0, noise at 1; the first coordinate"))

    chosen = [0, 200, 300, 360, 400]
    rows = {
        "exact": [at_times(CLUSTERS, float(times[i]), 20_000, 7) for i in chosen],
        "forward SDE": [there[i] for i in chosen],
        "reverse SDE": [sde[i] for i in chosen],
        "ODE": [ode[i] for i in chosen],
    }
    tiles = torch.stack([histogram(x) for row in rows.values() for x in row])
    names = [f"t {float(times[i]):.2g}" for i in chosen]
    save_png(make_grid(tiles, len(chosen), rows=list(rows), columns=names), out / "note-density-marginals.png")

    y = torch.linspace(-3, 3, 121, dtype=torch.float64)
    x = torch.stack([torch.full_like(y, -1.0), y], 1)  # through two of the three clusters
    through = {"exact": CLUSTERS.log_density(x).exp(), "by the ODE": likelihoods(x, "linear")[0].exp()}
    coarse, nfe = likelihoods(x, "linear", "euler", steps=20)
    through[f"Euler, {nfe} evaluations"] = coarse.exp()
    shown = {name: list(zip(y.tolist(), p.tolist())) for name, p in through.items()}
    write_text(out / "note-density-likelihood.svg", svg(shown, "y; the density at (-1, y)"))

    points = CLUSTERS.draw(200, seeded(8))
    exact = CLUSTERS.log_density(points)
    for name, method, options in (
        ("Euler, 25 steps", "euler", {"steps": 25}),
        ("Euler, 100 steps", "euler", {"steps": 100}),
        ("Heun, 50 steps", "heun", {"steps": 50}),
        ("Runge-Kutta 4, 25 steps", "rk4", {"steps": 25}),
        ("Dormand-Prince, 1e-5", "dopri5", {}),
        ("Dormand-Prince, 1e-8", "dopri5", {"rtol": 1e-8, "atol": 1e-8}),
    ):
        found, nfe = likelihoods(points, "linear", method, **options)
        wrong = (found - exact).abs()
        print(f"| {name} | {nfe} | {float(found.mean()):.4f} | {float(wrong.mean()):.1e} | {float(wrong.max()):.1e} |")
    print(f"exact mean log p: {float(exact.mean()):.4f}")


PICTURES = {"kl": plot_kl, "ddim": plot_ddim, "density": plot_density}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notes", nargs="*", metavar="note", help=f"{', '.join(PICTURES)}; all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.notes or PICTURES:
        PICTURES[name](args.out)


if __name__ == "__main__":
    main()
