"""Flow-GRPO as an objective: one trainer step rolls out a batch, rewards it, and updates the policy on its steps.

Liu et al. 2025 (2505.05470), sections 4.1 to 4.3; yifan123/flow_grpo@ac4c86e scripts/train_sd3.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.api import Batch, HasParts, Movable, ObjectiveBase, Phase, Step, seed_of
from vgm_cli.conditioning import Conditions, Part
from vgm_cli.diffusion.denoiser import Denoiser, flow_velocity
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance
from vgm_cli.errors import DIVERGED, USAGE, VgmError, unknown
from vgm_cli.nn import lora as adapters
from vgm_cli.nn.collectives import gather
from vgm_cli.nn.precision import full_precision
from vgm_cli.nn.shapes import expand
from vgm_cli.ranges import Few, Fraction, NonNegative, Positive, Steps, Width

from .groups import Advantage, advantages, k_repeat, overall_advantages, worth_training
from .policy import Kind, kl_to, levels, log_prob, policy_loss, roll_out, transition

Reward = Callable[[Tensor, Mapping[str, Any]], Tensor]
DULL = 20  # roll-outs in a row whose groups are all equal: nothing left to learn
THUMBNAIL = 32  # pixels per side in which the spread of a group is measured


class FlowGRPO(ObjectiveBase):
    """GRPO on a diffusion or flow network.

    One step's batch holds groups of group_size images of one class each.

    VgmError: options that do not go together; collapse (exit code 5).
    """

    def __init__(
        self,
        model: nn.Module,  # the policy
        reference: Denoiser,  # the policy as it was at first, frozen; says how the network is read
        reward: Any,  # (images (B, C, H, W) in [-1, 1], {"label": (B,)} or {"text": B prompts}) -> (B,)
        codec: Any = None,  # decodes what the network samples; None: pixels
        conditions: Conditions | None = None,  # what the network is told: classes, or prompts
        group_size: Width = 24,  # images of one class that are compared with each other
        steps: Steps = 10,  # levels of a roll-out
        shift: Positive = 3.0,  # of the levels; above 1 more of them at high noise
        noise_level: NonNegative = 0.7,  # of the SDE or of CPS
        sde: Kind = "sde",  # how noise enters a step: sde, or cps (coefficients-preserving)
        timestep_fraction: Fraction = 0.99,  # share of the steps that train, the first ones, where window is None
        window: Width | None = None,  # noise and training on that many neighbouring steps only (Flow-GRPO-Fast)
        window_range: tuple[int, int] | None = None,  # first and last place of the window; None: anywhere
        same_latent: bool = False,  # a group shares its first noise
        guidance_scale: NonNegative | None = None,  # of roll-outs and training alike; None is 1
        advantage: Advantage = "grpo",  # grpo | rwr | sft | dpo
        per_class: bool = True,  # advantages among images of a class
        global_std: bool = True,  # divided by the standard deviation of the whole batch
        advantage_clip: Positive = 5.0,  # largest absolute advantage
        clip_range: Positive = 1e-4,  # of the surrogate's ratio
        beta: NonNegative = 0.04,  # weight of the KL to the frozen start
        updates: Width = 2,  # optimizer steps in a pass over a roll-out
        epochs: Few = 1,  # passes over a roll-out
        lora: dict[str, Any] | None = None,  # {rank, alpha, targets, init} trains adapters; None: everything
        chunk: Width | None = None,  # images per forward, recomputed in backward, so that memory stays; None: all
        max_level: Positive = 20.0,  # noisiest level at which a network that predicts noise is asked
        min_diversity: NonNegative = 0.1,  # stops when images of a class differ less than this share of the first
    ):
        positive: dict[str, float] = {"steps": steps, "group_size": group_size, "updates": updates, "epochs": epochs}
        positive |= {"noise_level": noise_level, "clip_range": clip_range}
        for name, value in positive.items():
            if value <= 0:
                raise VgmError(f"objective.{name}={value} must be above 0", code=USAGE)
        self.scale = 1.0 if guidance_scale is None else guidance_scale
        self.model, self.reward, self.codec = model, reward, codec
        self.conditions = conditions or Conditions()
        self.asked = next(iter(self.conditions.parts.values()), None)  # what differs between groups
        self.group_size, self.noise_level, self.kind, self.same_latent = group_size, noise_level, sde, same_latent
        self.advantage, self.per_class, self.global_std = advantage, per_class, global_std
        self.advantage_clip, self.clip_range, self.beta = advantage_clip, clip_range, beta
        self.updates, self.epochs, self.chunk, self.min_diversity = updates, epochs, chunk, min_diversity
        self.steps, self.sigmas, self.max_level = steps, levels(steps, shift), max_level
        self.windows = places(steps, timestep_fraction, window, window_range, sde)
        self.every_step = window is None
        self.adapted: list[str] = []
        if lora is not None:
            for key in lora.keys() - {"rank", "alpha", "targets", "init"}:
                raise unknown("key", key, ("rank", "alpha", "targets", "init"), "objective.lora")
            self.adapted = adapters.attach(model, **lora)
        self.networks: dict[str, nn.Module] = {"model": model}
        self.denoiser = Denoiser.from_config(model, reference.config())
        self.reference: Denoiser | None = None  # of a network with adapters: itself without them
        if beta > 0 and not self.adapted:
            self.reference = reference
            if isinstance(reference.network, nn.Module):
                self.networks["reference"] = reference.network
        self.first: Tensor | None = None  # reward's mean and spread, diversity: (3,), of the first roll-out
        self.dull = 0  # roll-outs in a row in which no group differed
        self.report: dict[str, Tensor] = {}

    def phases(self) -> list[Phase]:
        return [Phase("policy")]

    def to(self, device: torch.device) -> None:
        for part in (self.codec, self.reward):
            if isinstance(part, Movable):
                part.to(device)

    def view(self) -> dict[str, Any]:
        return self.denoiser.config()

    def export(self, role: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a checkpoint holds: adapters folded into the weights."""
        return adapters.merged_state(self.model, state) if self.adapted and role == "model" else state

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.first is None else {"first": self.first, "dull": torch.tensor(self.dull)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.first, self.dull = state["first"].clone(), int(state["dull"])

    def keywords_of(self, group: Tensor | None) -> dict[str, Tensor]:
        """Keywords of the network for prompts by number (B,)."""
        if group is None or self.asked is None:
            return {}
        parts = self.conditions.on(self.asked.condition.column)
        return self.conditions.encode({p.name: self.items(self.asked, group) for p in parts}, group.device)

    def items(self, asked: Part, group: Tensor) -> Any:
        """Prompts by number: classes as they are, others as a list."""
        choices = asked.items
        return group if isinstance(choices, range) else [choices[i] for i in group.tolist()]

    # -- the policy ---------------------------------------------------------------------------------------------------

    def velocity(self, denoiser: Denoiser, x: Tensor, index: Tensor, group: Tensor | None) -> Tensor:
        """Guided velocity at x (B, ...), level sigmas[index (B,)], of prompts number group (B,), None without any:
        float32 (B, ...). No gradient goes through the unconditional half."""
        cond = self.keywords_of(group)
        if self.scale != 1 and cond:
            null = self.conditions.null(x.device) if self.conditions else None
            denoiser = ClassifierFreeGuidance(denoiser, self.scale, detach=True, null=null)
        self.sigmas = self.sigmas.to(x.device)  # copied once
        return flow_velocity(denoiser, x, self.sigmas[index], self.max_level, **cond).float()

    def score(self, x: Tensor, x_next: Tensor, index: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability (B,) of x_next, mean (B, ...) and std (B, 1, ...) of the step, under the policy."""
        step = transition(
            x, self.velocity(self.denoiser, x, index, group), self.sigmas, index, self.noise_level, self.kind
        )
        return log_prob(x_next, step, self.kind), step.mean, step.std

    @torch.no_grad()
    def reference_mean(self, x: Tensor, index: Tensor, group: Tensor | None) -> Tensor:
        """Mean of the step (B, ...) under the network as it was at first."""
        if self.reference is not None:
            v = self.velocity(self.reference, x, index, group)
        else:
            with adapters.disabled(self.model):
                v = self.velocity(self.denoiser, x, index, group)
        return transition(x, v, self.sigmas, index, self.noise_level, self.kind).mean

    def pieces(self, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Rows of each in chunks of at most `chunk`; None stays None."""
        n = len(next(t for t in tensors if t is not None))
        size = self.chunk or n
        for start in range(0, n, size):
            yield tuple(None if t is None else t[start : start + size] for t in tensors)

    # -- roll-outs ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def experience(self, batch: Batch, step: Step) -> list[Batch]:
        """As many images as the batch has, rolled out for prompts (or classes) drawn anew and rewarded; then the parts
        of `updates` optimizer steps per epoch, each of images and steps in one. The batch's own images are not used."""
        if step.micros > 1:
            hint = "train.accumulate=1; objective.chunk=N bounds the memory instead"
            raise VgmError("groups are compared within one batch, which cannot be accumulated", hint, USAGE)
        self.model.eval()  # the policy is what is sampled: no dropout
        n, shape, device = len(batch["x"]), batch["x"].shape[1:], batch["x"].device
        prompts = len(self.asked.items) if self.asked is not None else 0
        seed = seed_of(step.seed, "classes", step.index)
        groups = k_repeat(max(prompts, 1), n, self.group_size, step.world, step.rank, seed)
        group = groups.to(device) if prompts else None
        noisy, trained = self.steps_of(step)
        if self.same_latent:
            noise = torch.randn(max(prompts, 1), *shape, generator=step.generator("x_T"))[groups].to(device)
        else:
            noise = step.randn((n, *shape), "x_T")

        def velocity(x: Tensor, i: int) -> Tensor:
            index = torch.full((n,), i, device=device)
            return torch.cat([self.velocity(self.denoiser, *rows) for rows in self.pieces(x, index, group)])

        def draw(i: int) -> Tensor:
            return step.randn((n, *shape), f"step {i}")

        run = roll_out(velocity, noise, self.sigmas, self.noise_level, noisy, draw, self.kind)
        images, rewards = self.rewarded(run.latents[-1], group)
        everyone, asked = gather(rewards).cpu(), gather(groups.to(device)).cpu()
        own = self.compare(everyone, asked)[step.rank * n : (step.rank + 1) * n]
        order = torch.randperm(int((own == 0).sum()), generator=step.generator(f"filler {step.rank}"))
        keep = worth_training(own, self.updates, order)
        self.watch(everyone, asked, gather(thumbnails(images)).cpu(), keep)
        rows = torch.where(keep if bool(keep.any()) else ~keep)[0]
        parts: list[Batch] = []
        for epoch in range(self.epochs):
            g = step.generator(f"shuffle {epoch} {step.rank}")
            for chosen in rows[torch.randperm(len(rows), generator=g)].tensor_split(self.updates):
                parts.append(
                    flatten(run.latents, run.log_probs, own.float().to(device), group, trained, chosen.to(device))
                )
        return parts

    def steps_of(self, step: Step) -> tuple[range, range]:
        """(steps that are noisy, steps to train on) of one roll-out."""
        place = int(torch.randint(len(self.windows), (), generator=step.generator("window")))
        return range(self.steps) if self.every_step else self.windows[place], self.windows[place]

    def rewarded(self, z: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
        """(images (B, C, H, W) in [-1, 1], rewards (B,)) of what was sampled, in full precision."""
        with full_precision(z.device):
            decode = self.codec.decode if self.codec is not None else lambda z: z
            images = torch.cat([decode(rows.float()) for (rows,) in self.pieces(z)]).clamp(-1, 1)
            asked = {} if group is None or self.asked is None else {self.asked.column: self.items(self.asked, group)}
            return images, self.reward(images, asked).float()

    def compare(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(N,) float64 advantages of the whole batch."""
        if not self.per_class:
            return overall_advantages(rewards)
        return advantages(rewards, groups, self.advantage, self.global_std)

    def watch(self, rewards: Tensor, groups: Tensor, images: Tensor, keep: Tensor) -> None:
        """Log a roll-out's rewards and diversity, and end a run that has collapsed. rewards, groups and images are
        those of all processes, so that every process decides alike."""
        members = [groups == g for g in groups.unique()]
        spreads = torch.stack([rewards[m].std(correction=0) for m in members])
        diversity = torch.stack([images[m].std(0, correction=0).mean() for m in members]).mean()
        now = torch.stack([rewards.mean(), rewards.std(correction=0), diversity])
        self.first = now.clone() if self.first is None else self.first
        self.dull = self.dull + 1 if bool((spreads == 0).all()) else 0
        terms = self.reward.parts if isinstance(self.reward, HasParts) else {}
        self.report = {
            "reward": now[0],
            "reward_std": now[1],
            "reward_gain": (now[0] - self.first[0]) / self.first[1].clamp_min(1e-12),
            "equal_groups": (spreads == 0).float().mean(),
            "diversity": diversity,
            "kept": keep.float().mean(),
            **({f"reward/{name}": value.mean() for name, value in terms.items()} if len(terms) > 1 else {}),
        }
        if diversity < self.min_diversity * self.first[2]:
            raise VgmError(
                f"the policy collapsed: images of a class differ by {float(diversity):.3g}, at first by "
                f"{float(self.first[2]):.3g}; the last checkpoint stays",
                "a larger objective.beta, a smaller optimizer.lr, or another reward",
                DIVERGED,
            )
        if self.dull >= DULL:
            raise VgmError(
                f"the reward tells no images of a class apart, {DULL} roll-outs in a row; the last checkpoint stays",
                "a finer reward, or a larger objective.noise_level",
                DIVERGED,
            )

    # -- training -----------------------------------------------------------------------------------------------------

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: a part that `experience` made. A batch of images stands for one of the same size, see `rehearsal`."""
        part = batch if "next" in batch else self.rehearsal(batch, step)
        pieces = list(self.pieces(part["x"], part["next"], part["index"], part.get("group")))
        if len(pieces) == 1:
            scores = [self.score(*pieces[0])]
        else:
            scores = [checkpoint(self.score, *rows, use_reentrant=False) for rows in pieces]
        log_p = torch.cat([s[0] for s in scores])
        loss, logs = policy_loss(log_p, part["old"], part["advantage"], self.clip_range, self.advantage_clip)
        if self.beta > 0:
            kl = [
                kl_to(m, self.reference_mean(x, i, group), std) for (x, _, i, group), (_, m, std) in zip(pieces, scores)
            ]
            logs["kl"] = torch.cat(kl).detach().mean()
            loss = loss + self.beta * torch.cat(kl).mean()
        return loss, {**logs, **self.report}

    @torch.no_grad()
    def rehearsal(self, batch: Batch, step: Step) -> Batch:
        """A training batch without a roll-out, for planning a run's cost and for tests: one step per image, noised
        to a level, with a random advantage."""
        x0, n = batch["x"], len(batch["x"])
        index = step.randint(len(self.windows[0]), n, "index")
        sigma = expand(self.sigmas.to(x0.device)[index], x0)
        x = (1 - sigma) * x0 + sigma * step.randn(x0.shape, "noise")
        group = batch.get("label") if self.asked is not None else None
        v = self.velocity(self.denoiser, x, index, group)
        moved = transition(x, v, self.sigmas, index, self.noise_level, self.kind)
        following = moved.mean + moved.scale * step.randn(x.shape, "step")
        part = {"x": x, "next": following, "index": index, "old": log_prob(following, moved, self.kind)}
        part["advantage"] = 2.0 * step.randint(2, n, "advantage") - 1
        return part if group is None else {**part, "group": group}


# -- small pieces ----------------------------------------------------------------------------------------------------


def places(steps: int, fraction: float, window: int | None, within: Sequence[int] | None, kind: Kind) -> list[range]:
    """All windows of steps that a roll-out may train on, of which one is drawn. VgmError: there is none, or one
    would hold CPS's last step, which has no noise."""
    if window is None:
        found = [range(int(steps * fraction))]
    else:
        low, high = within if within is not None else (0, max(steps // 2, window))
        found = [range(i, i + window) for i in range(max(low, 0), min(high, steps) - window + 1)] if window > 0 else []
    if not found or not len(found[0]):
        hint = f"at least one of the {steps} steps is needed, window within window_range"
        raise VgmError("there are no steps to train on", hint, USAGE)
    if kind == "cps" and found[-1][-1] == steps - 1:
        raise VgmError("the last step of cps has no noise and cannot be trained", "a smaller timestep_fraction", USAGE)
    return found


def flatten(
    latents: Sequence[Tensor],
    log_probs: Mapping[int, Tensor],
    advantage: Tensor,
    group: Tensor | None,
    trained: Sequence[int],
    rows: Tensor,
) -> Batch:
    """Images `rows` at every trained step as one batch of len(trained) * len(rows), steps slowest."""
    part: Batch = {
        "x": torch.cat([latents[j][rows] for j in trained]),
        "next": torch.cat([latents[j + 1][rows] for j in trained]),
        "index": torch.tensor(list(trained), device=rows.device).repeat_interleave(len(rows)),
        "old": torch.cat([log_probs[j][rows] for j in trained]),
        "advantage": advantage[rows].repeat(len(trained)),
    }
    return part if group is None else {**part, "group": group[rows].repeat(len(trained))}


def thumbnails(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w) of at most THUMBNAIL pixels per side."""
    return F.adaptive_avg_pool2d(images, tuple(min(THUMBNAIL, side) for side in images.shape[-2:]))  # type: ignore[arg-type]
