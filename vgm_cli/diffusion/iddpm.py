"""IDDPM's objective and samplers on any network: what DiT and ADM are trained with and sampled by.

Nichol & Dhariwal 2021 (arXiv 2102.09672), Dhariwal & Nichol 2021 (2105.05233), Peebles & Xie 2022 (2212.09748);
behaviour of openai/guided-diffusion@22e0df8 and facebookresearch/DiT@ed81ce2, whose process is in discrete.py.
Deviation: each image has its own noise stream, so a sample does not depend on the batch it is made in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, LearnsVariance, ObjectiveBase, Request, Step
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.discrete import DiscreteDiffusion, Loss, Mean, Network, Variance, named_betas, space_timesteps
from vgm_cli.diffusion.guidance import Guidance, classifier_gradient
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.diffusion.resample import UniformResampler, build_resampler, draw
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.collectives import gather
from vgm_cli.nn.shapes import each
from vgm_cli.ranges import NonNegative, Steps


class IDDPM(ObjectiveBase):
    """Denoising loss plus, with a learned variance, the variational bound of the variance channels.

    VgmError: the network's channels or classes do not agree.
    """

    shardable = True

    def __init__(
        self,
        model: nn.Module,  # the network that is trained: (x, t, y) -> (B, C or 2C, H, W)
        schedule: str = "linear",  # of the betas, see discrete.named_betas
        steps: Steps = 1000,  # of the process
        learn_sigma: bool = True,  # the network gives twice the channels, the second half for the variance
        prediction: Mean = "eps",  # what the network gives
        variance: Variance | None = None,  # of a reverse step; None: learned_range with learn_sigma, else fixed_large
        loss: Loss = "mse",  # what is minimised, see DiscreteDiffusion.losses
        resampler: Literal["uniform", "loss-second-moment"] = "uniform",  # how timesteps are drawn
        rescale_timesteps: bool = False,  # the network is told t * 1000 / steps
        beta_start: NonNegative | None = None,  # the first beta; None: the schedule's
        beta_end: NonNegative | None = None,  # the last beta; None: the schedule's
    ):
        if isinstance(model, LearnsVariance) and model.learn_sigma != learn_sigma:
            raise VgmError(
                f"learn_sigma is {str(learn_sigma).lower()} in the objective and not in the model",
                "set objective.learn_sigma and model.learn_sigma alike",
                USAGE,
            )
        self.model, self.networks = model, {"model": model}
        variance = variance or ("learned_range" if learn_sigma else "fixed_large")
        betas = named_betas(schedule, steps, beta_start, beta_end)
        self.process = DiscreteDiffusion(betas, prediction, variance, loss, rescale_timesteps=rescale_timesteps)
        if self.process.learned != learn_sigma:
            raise VgmError(f"variance={variance} contradicts learn_sigma={str(learn_sigma).lower()}", code=USAGE)
        self.path = {"name": "vp-discrete", "schedule": schedule, "steps": steps}
        self.path |= {k: v for k, v in (("beta_start", beta_start), ("beta_end", beta_end)) if v is not None}
        self.resampler = build_resampler(resampler, steps)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def keywords_of(self, batch: Batch) -> dict[str, Tensor]:
        """What the network is told besides x_t and t."""
        return dict(batch.get("cond", {}))

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), y: (B,) optional. Logs mse and vb (bits per dimension) where they exist."""
        x0 = batch["x"]
        if isinstance(self.resampler, UniformResampler):
            t, weight = step.randint(self.process.steps, len(x0), "t"), None
        else:
            t, weight = draw(self.resampler.weights(), step.rand(len(x0), "t"))
        noise = step.randn(x0.shape, "noise")
        cond = self.keywords_of(batch)
        terms = self.process.losses(lambda x, s: self.model(x, s, **cond), x0, t, noise)
        loss = terms.pop("loss")
        if weight is not None:
            self._seen.append((t, loss.detach()))
            loss = loss * weight
        return loss.mean(), {k: v.detach().mean() for k, v in terms.items()}

    def after_step(self, step: Step) -> None:
        """Hand the losses of the whole batch, in its order, to the resampler of every process."""
        if not self._seen:
            return
        pairs = torch.stack([torch.stack([t.double(), loss.double()]) for t, loss in self._seen])  # (micros, 2, B)
        self._seen.clear()
        # (micros * processes, 2, B): the order of Step's rows
        pairs = gather(pairs[None]).transpose(0, 1).flatten(0, 1)
        t, loss = pairs.transpose(0, 1).flatten(1).cpu()
        self.resampler.update(t.long(), loss)

    def view(self) -> dict[str, Any]:
        view = {
            "name": "denoiser",
            "path": self.path,
            "prediction": self.process.mean,
            "time": "index",
            "learned_sigma": self.process.learned,
            "variance": self.process.variance,
        }
        return view | ({"time_scale": 1000.0 / self.process.steps} if self.process.rescale_timesteps else {})

    def state_dict(self) -> dict[str, Tensor]:
        return self.resampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.resampler.load_state_dict(state)


# -- samplers --------------------------------------------------------------------------------------------------------


def process_of(view: Any, steps: int | str | None = None, variance: Variance | None = None) -> DiscreteDiffusion:
    """The discrete process that a Denoiser's network was trained on. steps: respaced to so many, see space_timesteps;
    None: all. variance: None is the training's. VgmError: the network was not trained on discrete steps."""
    if not isinstance(getattr(view, "path", None), DiscreteVPPath):
        raise VgmError(
            "this needs a network trained on discrete steps",
            "choose a sampler for continuous time (`vgm ls samplers`), or another method",
            USAGE,
        )
    betas = view.path.betas.double().cpu().numpy()
    own: Variance = "learned_range" if view.learned_sigma else "fixed_large"
    return DiscreteDiffusion(
        betas,
        mean=view.prediction,
        variance=variance or view.variance or own,
        keep=None if steps is None else space_timesteps(len(betas), steps),
        rescale_timesteps=view.time_scale != 1.0,
    )


class DDPMSampler:
    """Ancestral (or DDIM) sampling over a respaced discrete process."""

    def __init__(
        self,
        steps: Steps | str = 250,  # N, "a,b,c" per section, or "ddimN" for an integer stride; a request's go before
        clip_denoised: bool | float = False,  # x0 to [-1, 1], or to +-that, in every step
        variance: Variance | None = None,  # None: the training's
        cfg_channels: int | None = None,  # leading channels that guidance applies to, None for all (3 in DiT's numbers)
        sampler: Literal["ddpm", "ddim"] = "ddpm",  # ancestral steps, or DDIM's
        eta: NonNegative = 0.0,  # DDIM's share of noise
        classifier: Any = None,  # RUN of a classifier of noisy images, (x, t) -> logits, towards the class asked for
        classifier_scale: NonNegative = 1.0,  # 1: exactly its gradient
    ):
        self.steps, self.clip_denoised, self.variance, self.cfg_channels = steps, clip_denoised, variance, cfg_channels
        self.sampler, self.eta = sampler, eta
        self.classifier, self.classifier_scale = classifier, classifier_scale

    def process(self, view: Any, steps: int | None = None) -> DiscreteDiffusion:
        """The respaced process of a discrete denoiser's view. VgmError: the view is of another kind."""
        wanted: int | str = self.steps
        if steps is not None:
            wanted = f"ddim{steps}" if str(self.steps).startswith("ddim") else steps
        return process_of(view, wanted, self.variance)

    def __call__(self, view: Any, request: Request) -> Tensor:
        """view: a Denoiser (its network and path are used). Gives (N, *request.shape)."""
        process, network, cond = self.process(view, request.steps), view.network, request.cond
        scale = 1.0 if request.guidance_scale is None else request.guidance_scale
        guidance = Guidance(scale, self.cfg_channels, request.guidance_interval)
        guides = scale != 1.0 and bool(cond)
        if guides:
            null = unconditional(network, cond, request.null)
        nfe = 0

        def visiting(timesteps: Iterable[int]) -> Network:
            """The network, guided, as it is asked at these of the original timesteps one after the other."""
            visited = iter(timesteps)

            def model(x: Tensor, t: Tensor) -> Tensor:
                nonlocal nfe
                times = each(x, next(visited) / process.original_steps)
                nfe += 2 if guides and guidance.active(times) else 1
                if not guides:
                    return network(x, t, **cond)
                return guidance(network, x, t, cond, null, times)

            return model

        cond_fn = None
        if self.classifier is not None:
            cond_fn = classifier_gradient(self.classifier, request.classes(), self.classifier_scale)
        x = request.randn()
        if self.sampler == "ddim" and request.images is not None:  # encoded to the noise that gives them again
            rows = torch.tensor(request.index, device=x.device) % len(request.images)
            encode = visiting(process.timestep_map)
            data = request.images.to(x)[rows]
            x, _ = deque(process.ddim_reverse_loop(encode, data, self.clip_denoised, cond_fn=cond_fn), maxlen=1).pop()
        model, clip = visiting(reversed(process.timestep_map)), self.clip_denoised
        loop = process.sample_loop(model, x, request.randn, self.sampler, self.eta, clip, cond_fn=cond_fn)
        for i, (x, x0) in enumerate(loop):
            if request.callback is not None:
                view.asked_at = torch.tensor([(process.timestep_map[-1 - i] + 1) / process.original_steps])
                request.callback(i, process.steps, x, x0)
        request.info["nfe"] = nfe
        return x


class DDIMSampler(DDPMSampler):
    """The same with DDIM steps by default: fewer of them, deterministic at eta = 0. Given images (--input) are encoded
    to noise by the reversed steps first, and come back as the network sees them."""

    def __init__(
        self,
        steps: Steps | str = 50,
        eta: NonNegative = 0.0,
        clip_denoised: bool | float = False,
        cfg_channels: int | None = None,
        classifier: Any = None,
        classifier_scale: NonNegative = 1.0,
    ):
        super().__init__(steps, clip_denoised, None, cfg_channels, "ddim", eta, classifier, classifier_scale)
