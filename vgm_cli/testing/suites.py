"""Conformance suites for plugin authors: subclass, say what is tested, get the tests.

    from vgm_cli.testing import suites

    class TestModel(suites.ModelSuite):
        model = {"name": "mynet", "channels": 1, "num_classes": 10}
        shape = (1, 28, 28)

    class TestTraining(suites.ObjectiveSuite):
        recipe = "mynet/mnist"

The fixtures they use (tiny_dataset, tmp_run, vgm) come with vgm's pytest plugin, which pytest finds by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from vgm_cli import recipe as recipes
from vgm_cli.api import Batch, HasClasses, HasExample, NullCondition, Request, Step, generators, seed_of
from vgm_cli.conditioning import Conditions, build_parts
from vgm_cli.engine import build
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.train.optim import trained
from vgm_cli.nn.meta import on_meta
from vgm_cli.recipe import Recipe
from vgm_cli.registry import registry
from vgm_cli.testing.golden import assert_close
from vgm_cli.validation import check
from vgm_cli.weights.layout import full_config


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Add noise to every parameter: a network that starts at zero output would pass many checks for nothing."""
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.add_(torch.randn(p.shape, generator=g).to(p) * scale)


def tensor_of(output: Any) -> Tensor:
    """The first tensor of what a network returns."""
    return output if isinstance(output, Tensor) else tensor_of(next(iter(output)))


class ModelSuite:
    """A denoising network `forward(x, t, y=None, ...)` by its recipe node.

    model: the node, with every keyword that the host would fill in from the data. shape: (C, H, W) of one sample.
    conditions: nodes of what the network is told, as in a recipe; None: the class, where it has classes. rtol:
    tolerance of comparisons between batch sizes, relative to the largest output.
    """

    model: ClassVar[Mapping[str, Any]]
    shape: ClassVar[tuple[int, int, int]]
    conditions: ClassVar[Mapping[str, Any] | None] = None
    rtol: ClassVar[float] = 1e-4

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        network = registry().build("model", dict(self.model))
        randomise(network, seed)
        return network.eval()

    def inputs(self, network: nn.Module, n: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x: (n, C, H, W), t: (n,) inside (0, 1), cond: what it is told, in another way for every row."""
        g = torch.Generator().manual_seed(1)
        x, t = torch.randn(n, *self.shape, generator=g), torch.linspace(0.2, 0.8, n)
        return x, t, self.told(network, range(n))

    def told(self, network: nn.Module, items: Sequence[int]) -> dict[str, Tensor]:
        """Keywords of the network's conditions for items by number; of conditions without choices, example values and
        noise."""
        facts = {"image_size": self.shape[-1], "image_channels": self.shape[0]}
        facts["num_classes"] = network.num_classes if isinstance(network, HasClasses) else 0
        conditions = Conditions(build_parts({"class": {}} if self.conditions is None else self.conditions, facts))
        cond: dict[str, Tensor] = {}
        for name, part in conditions.parts.items():
            if len(part.items):
                cond |= conditions.encode({name: part.in_turn(items)}, torch.device("cpu"))
                continue
            noise = [torch.Generator().manual_seed(i) for i in items]
            for k, v in part.condition.example(len(items), torch.device("cpu")).items():
                drawn = torch.stack([torch.randn(v.shape[1:], generator=g) for g in noise])
                cond[k] = v + drawn if v.is_floating_point() else v
        return cond

    def test_builds_without_memory(self) -> None:
        """On the meta device, with the tensors that a real one has: what validate, --plan and loading rely on."""
        with on_meta():
            meta = registry().build("model", dict(self.model))
        real = self.build().state_dict()
        assert all(p.is_meta for p in meta.parameters()), "a parameter was made on a fixed device"
        assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in real.items()}

    @torch.no_grad()
    def test_forward_keeps_the_shape(self) -> None:
        """(B, C, H, W) in, (B, C, H, W) out, or 2C channels when the variance is learned."""
        network = self.build()
        x, t, cond = self.inputs(network)
        out = tensor_of(network(x, t, **cond))
        assert out.shape[0] == x.shape[0] and out.shape[2:] == x.shape[2:]
        assert out.shape[1] in (x.shape[1], 2 * x.shape[1])
        assert torch.isfinite(out).all() and out.abs().max() > 0

    @torch.no_grad()
    def test_its_example_fits(self) -> None:
        """What `example(config)` gives can be fed to forward (api.HasExample)."""
        network = self.build()
        if not isinstance(network, HasExample):
            pytest.skip("the network is fed images, times and labels")
        component, config = registry().config("model", dict(self.model))
        given = network.example(full_config({"name": component.name, "kwargs": config}))
        assert torch.isfinite(tensor_of(network(**given))).all()

    @torch.no_grad()
    def test_eval_is_deterministic(self) -> None:
        """No random draw hides in a forward, and no state changes."""
        network = self.build()
        x, t, cond = self.inputs(network)
        before = {k: v.clone() for k, v in network.state_dict().items()}
        torch.manual_seed(0)
        first = tensor_of(network(x, t, **cond))
        torch.manual_seed(1)
        assert torch.equal(first, tensor_of(network(x, t, **cond)))
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

    @torch.no_grad()
    def test_rows_are_independent(self) -> None:
        """An item's output does not depend on the others of its batch."""
        network = self.build()
        x, t, cond = self.inputs(network)
        together = tensor_of(network(x, t, **cond))
        alone = torch.cat(
            [tensor_of(network(x[i : i + 1], t[i : i + 1], **_rows(cond, i, i + 1))) for i in range(len(x))]
        )
        assert_close(alone, together, self.rtol, "one by one")

    @torch.no_grad()
    def test_depends_on_time_and_condition(self) -> None:
        network = self.build()
        x, t, cond = self.inputs(network)
        out = tensor_of(network(x, t, **cond))
        assert not torch.equal(out, tensor_of(network(x, t.flip(0), **cond))), "t is not used"
        other = self.told(network, range(1, len(x) + 1))
        for k in cond:
            if not torch.equal(cond[k], other[k]):
                assert not torch.equal(out, tensor_of(network(x, t, **{**cond, k: other[k]}))), f"{k} is not used"

    @torch.no_grad()
    def test_state_dict_round_trip(self) -> None:
        """Another instance with the same state gives the same output: everything that matters is in the state."""
        network, other = self.build(0), self.build(1)
        other.load_state_dict(network.state_dict())
        x, t, cond = self.inputs(network)
        assert torch.equal(tensor_of(network(x, t, **cond)), tensor_of(other(x, t, **cond)))

    @torch.no_grad()
    def test_null_condition(self) -> None:
        """Guidance: the unconditional version of a condition has its shape, is another one."""
        network = self.build()
        x, t, cond = self.inputs(network)
        if not cond or not isinstance(network, NullCondition):
            pytest.skip("the network is told nothing or cannot drop it")
        null = network.null_condition(cond)
        assert {k: v.shape for k, v in null.items()} == {k: v.shape for k, v in cond.items()}
        before = self.inputs(network)[2]
        assert all(torch.equal(v, before[k]) for k, v in cond.items()), "null_condition changed its argument"
        assert not torch.equal(tensor_of(network(x, t, **null)), tensor_of(network(x, t, **cond)))


class _OnRecipe:
    """recipe: PAPER/NAME or a YAML file. overrides: KEY=VALUE that make it small enough for a test."""

    recipe: ClassVar[str]
    overrides: ClassVar[Sequence[str]] = ()

    def load(self, *more: str) -> Recipe:
        return recipes.load(self.recipe, None, [*self.overrides, *more])

    def built(self, *more: str) -> tuple[Recipe, build.Built, build.Facts]:
        """Recipe, live objects for the recipe's own data, and facts. A recipe behind a codec sees its latents."""
        r = self.load(*more)
        facts = build.declared_facts(r.node("data"))
        if r.config.get("codec"):
            facts = facts.after(build.meta_codec(r.config["codec"], facts))
        torch.manual_seed(0)
        made = build.build_objective(r, facts)
        for network in made.networks.values():
            randomise(network)
        return r, made, facts


class ObjectiveSuite(_OnRecipe):
    """An objective, through a recipe that uses it. rtol: of losses between splits; None for an objective that takes
    statistics over its batch, whose loss does depend on the split."""

    batch_size: ClassVar[int] = 8
    rtol: ClassVar[float | None] = 1e-4

    def batch(self, facts: build.Facts, conditions: Conditions) -> Batch:
        """x: (B, C, H, W) in [-1, 1] (or tokens: (B, *grid)), index: (B,), and what the conditions add."""
        n, g = self.batch_size, torch.Generator().manual_seed(2)
        batch: Batch = {"index": torch.arange(n)}
        if facts.vocab_size:
            batch["tokens"] = torch.randint(facts.vocab_size, (n, *facts.sample_shape), generator=g)
        else:
            batch["x"] = torch.randn(n, *facts.sample_shape, generator=g).clamp(-1, 1)
        given = {k: p.in_turn(range(n)) for k, p in conditions.parts.items() if len(p.items)}
        cond = {**conditions.example(n, torch.device("cpu"))["cond"], **conditions.encode(given, torch.device("cpu"))}
        batch |= {k: torch.as_tensor(v) for k, v in conditions.asked(given).items() if k == "label"}
        return conditions.known(batch, cond, Step(0))

    def test_loss_is_finite_and_a_function_of_the_step(self) -> None:
        _, made, facts = self.built()
        batch = self.batch(facts, made.conditions)
        made.objective.prepare(batch, Step(0))
        for phase in made.objective.phases():
            losses = []
            for index in (0, 0, 1):
                torch.manual_seed(index)
                loss, logs = made.objective.loss(phase.name, batch, Step(index))
                assert loss.shape == () and torch.isfinite(loss), phase.name
                assert all(torch.isfinite(torch.as_tensor(v)).all() for v in logs.values()), phase.name
                losses.append(loss.item())
            assert losses[0] == losses[1], f"{phase.name}: the same step gave two losses"

    def test_gradients_reach_every_parameter(self) -> None:
        """Whatever a phase trains and may be trained receives a gradient that is not zero, over a few steps."""
        _, made, facts = self.built()
        batch = self.batch(facts, made.conditions)
        made.objective.prepare(batch, Step(0))
        parts = trained(made.networks, made.objective.phases())
        waiting = {name: p for part in parts.values() for name, p in part.items()}
        for index in range(8):
            for phase in made.objective.phases():
                made.objective.loss(phase.name, batch, Step(index))[0].backward()
            waiting = {k: p for k, p in waiting.items() if p.grad is None or not p.grad.abs().sum() > 0}
            if not waiting:
                return
        raise AssertionError(f"no gradient reaches {sorted(waiting)[:5]}")

    def test_loss_does_not_depend_on_the_split(self) -> None:
        """The mean of what two processes (or two micro-batches) compute is what one computes."""
        if self.rtol is None:
            pytest.skip("this objective takes statistics over its batch")
        _, made, facts = self.built()
        batch, half = self.batch(facts, made.conditions), self.batch_size // 2
        made.objective.prepare(batch, Step(0))
        for phase in made.objective.phases():
            whole = made.objective.loss(phase.name, batch, Step(3))[0].detach()
            for split in (lambda i: Step(3, rank=i, world=2), lambda i: Step(3, micro=i, micros=2)):
                parts = [
                    made.objective.loss(phase.name, _rows(batch, i * half, (i + 1) * half), split(i))[0].detach()
                    for i in range(2)
                ]
                assert_close(torch.stack(parts).mean(), whole, self.rtol, phase.name)

    def test_resume_is_bit_exact(self, tiny_dataset: Path, tmp_run: Path) -> None:
        """2 + 2 steps with a resume in between leave, bit for bit, what 4 steps leave."""
        from vgm_cli.engine.train.loop import train

        small = (
            f"data.path={tiny_dataset}",
            "data.size=null",
            "data.channels=null",
            "train.steps=4",
            "train.log_every=1",
            f"train.batch_size={self.batch_size}",
            "train.save_every=2",
            "train.preview_n=0",
            "train.precision=fp32",
            "train.compile=off",
        )
        train(self.load(*small), tmp_run / "whole", quiet_end=True)
        train(self.load(*small), tmp_run / "parts", stop_after=2, quiet_end=True)
        train(self.load(*small), tmp_run / "parts", resume=True, quiet_end=True)
        files = sorted(p.name for p in (tmp_run / "whole/checkpoints/step-00000004").glob("*.safetensors"))
        assert "model.safetensors" in files
        for file in files:
            states = [
                ckpt.read_tensors(tmp_run / run / "checkpoints/step-00000004" / file)[0] for run in ("whole", "parts")
            ]
            assert states[0].keys() == states[1].keys(), file
            different = [k for k in states[0] if not torch.equal(states[0][k], states[1][k])]
            assert not different, f"{file}: {different[:5]}"


class SamplerSuite(_OnRecipe):
    """A sampler, through a recipe that uses it. sampler: another node than the recipe's. steps: of each sampling."""

    sampler: ClassVar[Mapping[str, Any] | None] = None
    steps: ClassVar[int | None] = None
    rtol: ClassVar[float] = 1e-3

    @torch.no_grad()
    def sample(self, items: Sequence[int], seed: int = 0) -> Tensor:
        """Samples of the items by number, as `vgm sample` seeds them: (len(items), C, H, W)."""
        r, made, facts = self.built()
        network = made.networks["model"].eval()
        view = ckpt.build_view(network, made.objective.view())
        asked = {name: part.in_turn(items) for name, part in made.conditions.parts.items()}
        cond = made.conditions.encode(asked, torch.device("cpu"))
        request = Request(
            shape=facts.sample_shape,
            generators=generators(seed_of("sample", 0, i) for i in items),
            cond=cond,
            null=made.conditions.null(torch.device("cpu")),
            asked=made.conditions.asked(asked),
            steps=self.steps,
            guidance_scale=r.config.get("guidance_scale") if cond else None,
        )
        torch.manual_seed(seed)
        return registry().build("sampler", dict(self.sampler or r.config["sampler"]))(view, request)

    def test_an_item_does_not_depend_on_its_batch(self) -> None:
        together = self.sample(range(4))
        assert len(together) == 4 and torch.isfinite(together).all()
        assert_close(torch.cat([self.sample([0]), self.sample([1, 2, 3])]), together, self.rtol, "1 + 3 items")
        assert not torch.equal(together[0], together[1])

    def test_draws_only_from_the_requests_generators(self) -> None:
        """The global seed changes nothing, and sampling leaves the global stream where it was."""
        first = self.sample(range(2), seed=0)
        untouched = torch.Generator().manual_seed(0).get_state()
        assert torch.equal(torch.get_rng_state(), untouched), "the sampler drew from the global stream"
        assert torch.equal(first, self.sample(range(2), seed=1))


class RecipeSuite(_OnRecipe):
    """A recipe: known keys, components that fit, networks that build on the meta device."""

    def test_validates_and_builds(self) -> None:
        numbers, reason = check(self.load())
        assert numbers, reason
        assert all(n > 0 for n in numbers.values()), numbers

    def test_opens_with_what_it_is(self) -> None:
        """The first line is a comment that says what the recipe reproduces."""
        text = recipes.locate(self.recipe)[1].read_text(encoding="utf-8")
        assert text.startswith("# ") and len(text.splitlines()[0]) > 10


def _rows(values: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    cut = {k: _rows(v, start, stop) if isinstance(v, dict) and k != "null" else v for k, v in values.items()}
    return {k: v[start:stop] if isinstance(v, Tensor) else v for k, v in cut.items()}
