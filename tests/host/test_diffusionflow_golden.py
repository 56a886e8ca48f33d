"""Golden checks of the Gaussian algebra: conversions in float64, and DDIM as the flow's Euler step."""

import torch

from vgm_cli.diffusion import solvers
from vgm_cli.diffusion.denoiser import convert
from vgm_cli.diffusion.path import CosinePath, EDMPath, LinearPath, VEPath, VPPath
from vgm_cli.testing.golden import GoldenChecks, assert_close

golden = GoldenChecks("diffusionflow")
RTOL = 1e-10
PATHS = {"vp_linear": VPPath, "cosine": CosinePath, "flow": LinearPath, "ve": VEPath, "edm": EDMPath}
KINDS = {"x0": "x0", "eps": "eps", "score": "score", "v": "v", "u": "velocity"}


@golden.check(lambda case: "schedule" in case.config)
def conversions(case):
    given = dict(case.config)
    schedule = given.pop("schedule")
    path = PATHS[schedule](**given)
    t, x0, eps, out = case.inputs["t"], case.inputs["x0"], case.inputs["eps"], dict(case.outputs)
    rate = path.t_max if schedule == "edm" else 1.0  # the file's EDM time is sigma / 80
    t = t * rate
    for name, function in {"alpha": path.alpha, "sigma": path.sigma, "lambda": path.logsnr}.items():
        assert_close(function(t), out.pop(name), RTOL, name)
    derivatives = {"dalpha": path.alpha_prime, "dsigma": path.sigma_prime, "f": path.f, "g2": path.g2}
    for name, function in derivatives.items():
        assert_close(function(t) * rate, out.pop(name), RTOL, name)
    slope = -path.g2(t) / path.sigma(t) ** 2 * rate
    assert_close(slope, out.pop("dlambda_dt"), RTOL, "dlambda_dt = -g2 / sigma^2")
    z = path.add_noise(x0, eps, t)
    assert_close(z, out.pop("z"), RTOL, "z")
    known = {"x0": x0, "eps": eps}
    for name in ("score", "v", "u"):
        known[name] = out.pop(name) / (rate if name == "u" else 1.0)
        assert_close(convert(eps, z, t, path, "eps", KINDS[name]), known[name], RTOL, name)
    assert out, "the file has conversions"
    for name, want in out.items():
        want = want / rate if name.startswith("u_") else want
        dst, _, src = name.partition("_from_")
        assert_close(convert(known[src], z, t, path, KINDS[src], KINDS[dst]), want, RTOL, name)


@golden.check(lambda case: "out/flow_euler" in case)
def ddim_is_flow_euler(case):
    z, t = case.inputs["z"], case.inputs["t"]
    assert_close(t, torch.tensor(case.config["times"], dtype=t.dtype), RTOL, "times")
    flow, vp = LinearPath(), VPPath()

    def x0_of(z, t):
        gate = torch.sigmoid(flow.logsnr(t).float())  # the file's network evaluates its gate in float32
        return 0.3 * z + 0.4 * torch.tanh(z) * gate

    def velocity(z, t):
        return convert(x0_of(z, t), z, t, flow, "x0", "velocity")

    def both(z, i):
        return x0_of(z, t[i]), convert(x0_of(z, t[i]), z, t[i], flow, "x0", "eps")

    states = trajectory(solvers.ODE["euler"][0], velocity, z, t)
    assert_close(torch.stack(states), case.outputs["flow_euler"], RTOL, "flow_euler")
    states = trajectory(solvers.ddim, both, z, flow.alpha(t), flow.sigma(t))
    assert_close(torch.stack(states), case.outputs["ddim_flow"], RTOL, "ddim_flow")

    # the same network under the VP schedule at equal noise level: it is fed its own z and asked at its own time
    t_vp = vp.t_of_logsnr(flow.logsnr(t))
    alpha, sigma = vp.alpha(t_vp), vp.sigma(t_vp)

    def both_vp(z, i):
        x0 = x0_of(z * flow.alpha(t[i]) / alpha[i], t[i])
        return x0, convert(x0, z, t_vp[i], vp, "x0", "eps")

    states = trajectory(solvers.ddim, both_vp, z * sigma[0] / t[0], alpha, sigma)
    back = [x * flow.alpha(t[i + 1]) / alpha[i + 1] for i, x in enumerate(states)]
    assert_close(torch.stack(back), case.outputs["ddim_vp_mapped_back"], RTOL, "ddim_vp_mapped_back")


def trajectory(solver, *args):
    """The states after every step."""
    seen = []
    end = solver(*args, callback=lambda i, x, x0: seen.append(x))
    return [*seen[1:], end]


def test_golden(golden_case):
    golden.run(golden_case)
