"""Host components of the Gaussian family: the samplers and the objective that work on every path. Torch-free."""

from __future__ import annotations

from vgm_cli.hookspecs import Component

SAMPLERS = {
    "ddim": ("DDIMSampler", "DDIM, deterministic (eta 0) to ancestral (eta 1)"),
    "ancestral": ("AncestralSampler", "DDPM's ancestral sampling, variance fixed_small or fixed_large"),
    "euler": ("EulerSampler", "probability-flow ODE, Euler"),
    "heun": (
        "ODESampler",
        "probability-flow ODE; method: euler, midpoint, heun, heun3, rk4, rk38, dopri5",
    ),
    "dopri5": ("Dopri5Sampler", "probability-flow ODE, adaptive Runge-Kutta 5(4), per image"),
    "sde": ("SDESampler", "reverse SDE with a free diffusion coefficient"),
    "dpm-solver": ("DPMSolverSampler", "multistep DPM-Solver and DPM-Solver++, ODE and SDE, orders 1 to 3"),
    "unipc": ("UniPCSampler", "UniPC predictor-corrector, orders 1 to 3"),
    "dpmpp-2m": ("DPMpp2MSampler", "DPM-Solver++(2M), Karras levels"),
    "dpmpp-2m-sde": ("DPMpp2MSDESampler", "DPM-Solver++(2M) SDE"),
    "dpmpp-3m-sde": ("DPMpp3MSDESampler", "DPM-Solver++(3M) SDE"),
    "euler-ancestral": ("EulerAncestralSampler", "ancestral Euler"),
    "k-diffusion": ("KDiffusionSampler", "any k-diffusion solver and schedule by name"),
    "edm": ("EDMSampler", "EDM's Heun, stochastic with S_churn"),
    "edm-ablation": ("EDMAblationSampler", "EDM's generalised sampler: solver, steps, schedule and scaling by name"),
    "flow-euler": ("FlowEulerSampler", "flow-matching Euler with SD3's shift"),
    "pc": ("PCSampler", "score-SDE predictor-corrector"),
}


def host_components() -> list[Component]:
    """What the host brings for Gaussian paths."""
    samplers = [
        Component(kind="sampler", name=name, target=f"vgm_cli.diffusion.samplers:{attr}", summary=summary)
        for name, (attr, summary) in SAMPLERS.items()
    ]
    objective = Component(
        kind="objective",
        name="gaussian",
        target="vgm_cli.diffusion.objectives:GaussianObjective",
        presets={
            "ddpm": {"path": "vp-discrete", "prediction": "eps"},
            "v-cosine": {"path": "cosine", "prediction": "v"},
            "edm": {"path": "edm", "prediction": "F", "weighting": "edm", "time_sampling": "edm-lognormal"},
            "sd3": {"path": "linear", "prediction": "velocity", "time_sampling": "logit-normal"},
        },
        verbs=("train",),
        summary="denoising on any Gaussian path: DDPM, v, EDM, flow matching by keywords",
        denoiser=True,
    )
    view = Component(
        kind="view",
        name="denoiser",
        target="vgm_cli.diffusion.denoiser:Denoiser",
        summary="a network on a Gaussian path, whatever it predicts",
        denoiser=True,
    )
    flow_map = Component(
        kind="view",
        name="flow-map",
        target="vgm_cli.diffusion.flow_map:FlowMap",
        summary="a few-step network: jumps along the flow, to data or to any cleaner time",
        denoiser=True,
    )
    few_step = Component(
        kind="sampler",
        name="few-step",
        target="vgm_cli.diffusion.flow_map:FewStepSampler",
        summary="a few jumps of a few-step network, with fresh noise between them or without",
    )
    return [*samplers, few_step, objective, view, flow_map]
