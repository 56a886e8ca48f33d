"""Flow-GRPO: online reinforcement learning of flow-matching models. Liu et al. 2025 (arXiv 2505.05470).

Official code: yifan123/flow_grpo@ac4c86e (CPS, Flow-GRPO-Fast: @54809b5 and later). The flow's ODE becomes an SDE with
the same marginals, so that each denoising step is a Gaussian policy; images of one prompt are compared with each other.
Prompts are the model's classes, or texts where it reads some; networks of other paths are asked at equal noise level.
Deviations: one optimizer step is one backward over its images and steps (objective.chunk bounds the memory, not
accumulation); the average of the weights is updated once per roll-out; a roll-out without any advantage trains on the
KL term alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="flow-grpo",
            title="Flow-GRPO: Training Flow Matching Models via Online RL",
            year=2025,
            arxiv="2505.05470",
            repository="https://github.com/yifan123/flow_grpo",
            family="flow",
            summary="Policy gradients on a flow's denoising steps, with group-relative advantages.",
            expects={
                "GenEval (SD3.5-medium, 40 steps, from 0.63)": 0.95,
                "OCR accuracy (SD3.5-medium, from 0.59)": 0.92,
            },
        ),
        Component(
            kind="objective",
            name="flow-grpo",
            target="vgm_plugins.flow_grpo.objective:FlowGRPO",
            verbs=("finetune-rl",),
            summary="GRPO on the steps of a flow SDE, against any reward",
        ),
    ]
