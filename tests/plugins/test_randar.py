"""RandAR against ziqipang/RandAR@d374a72 (golden cases), sizes, checkpoints, orders, passes, completion, training."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgm_plugins.llamagen.checkpoints import CONVERTER as LLAMAGEN
from vgm_plugins.llamagen.sampler import LlamaGenSampler
from vgm_plugins.randar.checkpoints import CONVERTER
from vgm_plugins.randar.decoding import decode, guided, passes
from vgm_plugins.randar.extrapolation import enlarge, large_positions, small_order
from vgm_plugins.randar.model import RandAR, orders_of
from vgm_plugins.randar.objective import RandARObjective
from vgm_plugins.randar.presets import RANDAR
from vgm_plugins.randar.sampler import ExtrapolationSampler, RandARSampler

from vgm_cli.api import Request, Step, generators
from vgm_cli.ar.orders import hierarchical_orders
from vgm_cli.ar.sampling import Decoding, Pick
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.train import optim
from vgm_cli.errors import VgmError
from vgm_cli.nets.llama import LlamaGen
from vgm_cli.registry import registry
from vgm_cli.settings import Optimizer, Skip
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("randar")
GREEDY: Pick = Decoding(greedy=True).picker(None)

# -- golden cases ------------------------------------------------------------------------------------------------------

RENAMED = {
    "token_dropout_p": "token_dropout",
    "attn_dropout_p": "attn_dropout",
    "resid_dropout_p": "resid_dropout",
    "ffn_dropout_p": "ffn_dropout",
    "drop_path_rate": "drop_path",
    "position_order": "order",
}
ELSEWHERE = ("block_size", "class_dropout_prob")
OFFICIAL = "RandARTransformer"
NOT_READ = (  # of the official constructor, in what these cases compare
    *("zero_class_qk", "num_inference_steps", "grad_checkpointing", "max_batch_size", "max_seq_len", "caption_dim"),
    *("initializer_range", "position_order"),
)


def keywords(args: dict[str, Any]) -> dict[str, Any]:
    """Official arguments of the transformer -> constructor keywords."""
    side = math.isqrt(args["block_size"])
    assert args.get("model_type", "c2i") == "c2i" and args.get("cls_token_num", 1) == 1
    skipped = (*ELSEWHERE, *NOT_READ, "model_type", "cls_token_num")
    own = {RENAMED.get(k, k): args[k] for k in args if k not in skipped}
    return {**own, "grid": (side, side), "null_class": args.get("class_dropout_prob", 0.1) > 0}


def load(case: GoldenCase, training: bool = False) -> RandAR:
    assert CONVERTER.recognise(case.state) and not LLAMAGEN.recognise(case.state)
    case.ignore("seed", "gain", "pos_gain", "output_gain", why="of weights that are stored")
    case.ignore(*(f"{OFFICIAL}.{k}" for k in NOT_READ), why="weights and orders are stored, caches do not count")
    if not training:
        dropped = [k for k in RENAMED if k != "position_order"]
        case.ignore(*(f"{OFFICIAL}.{k}" for k in dropped), why="evaluated without dropout")
    dropouts = {RENAMED[k]: 0.0 for k in RENAMED if k != "position_order"}  # all are 0, whatever the network's own are
    config = dropouts | keywords(case.config[OFFICIAL])
    model = RandAR(**config | dropouts if training and "run" in case.config else config)
    model.load_state_dict(CONVERTER.to_ours(case.state))
    return model


def official(case: GoldenCase) -> bool:
    return OFFICIAL in case.config


@golden.check(lambda c: official(c) and "in/idx" in c and "run" not in c.config)
def training_forward(case: GoldenCase) -> None:
    model = load(case, training=True).train()
    ids, y, order, out = case.inputs["idx"], case.inputs["cond"], case.inputs["token_order"], case.outputs
    dropped = y
    if "in/force_drop_ids" in case:
        dropped = torch.where(case.inputs["force_drop_ids"].bool(), model.null_condition({"y": y})["y"], y)
    raster = torch.arange(ids.shape[1]).expand_as(ids)
    cases = {"": (y, order), "_dropped": (dropped, order), "raster_": (y, raster), "eval_": (y, order)}
    assert_close(model.table(torch.device("cpu")), out["freqs_cis"], 1e-6, "freqs_cis")
    tokens = model.instructions(model.positions(order))
    assert_close(tokens, out["position_instruction_tokens"], 1e-5, "position_instruction_tokens")
    for name, (label, by) in cases.items():
        before, after = (name, "") if name.endswith("_") else ("", name)
        if f"out/{before}token_logits{after}" not in case:
            continue
        model.train(name != "eval_")
        logits = model(ids, label, by)
        assert_close(logits, out[f"{before}token_logits{after}"], 5e-5, f"logits {name}")
        loss = F.cross_entropy(logits.flatten(0, 1), ids.gather(1, by).flatten())
        assert_close(loss, out[f"{before}loss{after}"], 1e-5, f"loss {name}")
        if not name:
            loss.backward()
            gradients = CONVERTER.from_ours({k: p.grad for k, p in model.named_parameters()})
            for key, want in out.items():
                if key.startswith("grad/"):
                    assert_close(gradients[key.removeprefix("grad/")], want, 1e-4, key)
            parameters = list(model.parameters())
            assert_close(nn.utils.clip_grad_norm_(parameters, 1.0), out["grad_norm"], 1e-4, "grad_norm")
            statistic = torch.stack([p.grad.norm() for p in parameters]).sum()
            assert_close(statistic, out["grad_norm_skip_stat"], 1e-4, "grad_norm_skip_stat")


def setting_of(run: dict[str, Any]) -> Optimizer:
    """The official run as a recipe's optimizer node."""
    return Optimizer(
        lr=run["lr"],
        betas=tuple(run["betas"]),
        weight_decay=run["weight_decay"],
        decay="matrices",
        warmup=run["warm_up_iters"],
        warmup_from=0.0,
        schedule="cosine",
        final_lr=run["min_lr_ratio"] * run["lr"],
    )


@golden.check(lambda c: c.kind == "randar_train_steps")
def training_steps(case: GoldenCase) -> None:
    """The host's optimizer, schedule and rule of skipping, through the objective's loss."""
    model, run, out = load(case, training=True).train(), case.config["run"], case.outputs
    setting = setting_of(run)
    params = dict(model.named_parameters())
    groups = optim.group(params, setting)
    assert set(groups[0].names) == set(run["decayed_parameters"])
    made = [{"params": [params[n] for n in g.names], "weight_decay": 0.0} for g in groups]
    adam = optim.make_optimizer(made, setting, torch.device("cpu"))
    optimizing = optim.Optimizing(model, adam, groups, setting, run["max_iters"])
    accelerator = SimpleNamespace(clip_grad_norm_=nn.utils.clip_grad_norm_)
    skip = Skip(above=run["skip_grad_norm"], after=run["skip_grad_iter"], norm="sum")
    assert case.inputs["idx"].shape[:2] == (run["steps"], run["batch"])
    assert f"out/step{run['steps'] - 1}.loss" in case and f"out/step{run['steps']}.loss" not in case
    share = case.config[OFFICIAL].get("class_dropout_prob", 0.1)
    labels = case.inputs["cond"]
    if share:
        labels = torch.where(case.inputs["drop_u"] < share, model.null_condition({"y": labels})["y"], labels)
    for k, (ids, y, order) in enumerate(zip(case.inputs["idx"], labels, case.inputs["token_order"])):
        optimizing.begin(k, {})
        assert math.isclose(adam.param_groups[0]["lr"], float(out[f"step{k}.lr"]), rel_tol=1e-9, abs_tol=1e-15)
        loss = F.cross_entropy(model(ids, y, order).flatten(0, 1), ids.gather(1, order).flatten())
        assert_close(loss, out[f"step{k}.loss"], 1e-4, f"loss {k}")
        loss.backward()
        clip = run["max_grad_norm"] or math.inf  # 0: nothing is clipped
        logs = optimizing.step(accelerator, k, clip, skip)
        assert_close(logs["grad_norm"], out[f"step{k}.grad_norm"], 1e-4, f"grad_norm {k}")
        assert_close(logs["grad_statistic"], out[f"step{k}.skip_stat"], 1e-4, f"skip_stat {k}")
        assert bool(logs["skipped"]) != bool(out[f"step{k}.taken"])
    for key, want in out.items():
        if key.startswith("final."):
            found = CONVERTER.from_ours(params)[key.removeprefix("final.")]
            assert_close(found, want, 0, key, floor=0.02 * run["lr"])


class Seen:
    """What a decoding tells: positions, ids and logits of its passes."""

    def __init__(self) -> None:
        self.passes: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, positions: Tensor, ids: Tensor, logits: Tensor) -> None:
        self.passes.append((positions, ids, logits))

    def logits(self, start: int = 0) -> Tensor:
        return torch.cat([logits for *_, logits in self.passes[start:]], dim=1)


def read_call(case: GoldenCase, name: str, call: dict[str, Any]) -> tuple[int | None, tuple[float, float]]:
    """(passes, scale of guidance) of a greedy call; what it does not say is the official functions' default."""
    scale = tuple(call.get("cfg_scales", (1.0, 1.0)))
    steps = call.get("num_inference_steps", 512 if "ntk" in case.config else 88)
    case.ignore(*(f"calls.{name}.{k}" for k in ("temperature", "top_p", "top_k")), why="the largest logit is taken")
    if scale[1] <= 1:
        case.ignore(f"calls.{name}.cfg_scales", why="nothing is guided where the last scale is 1")
    return None if steps == -1 else steps, scale


@golden.check(lambda c: official(c) and "calls" in c.config and "ntk" not in c.config)
def generation(case: GoldenCase) -> None:
    """Greedy ids exactly, and the logits that every one of them was taken from; one at a time as without a cache."""
    model, y, order = load(case).eval(), case.inputs["cond"], case.inputs["token_order"]
    for name, call in case.config["calls"].items():
        (steps, scale), seen, out = read_call(case, name, call), Seen(), case.outputs
        counts = passes(order.shape[1], steps)
        ids = decode(model, y, order, counts, GREEDY, scale, watch=seen)
        assert torch.equal(ids, out[f"{name}/tokens"]), name
        assert_close(seen.logits(), out[f"{name}/logits"], 5e-5, name)
        assert counts == [n for n in out[f"{name}/counts"].tolist() if n], name
        if f"out/naive_{name.removeprefix('seq_')}/tokens" in case:
            assert torch.equal(ids, out[f"naive_{name.removeprefix('seq_')}/tokens"])
        if steps is None:
            assert torch.equal(decode_naively(model, y, order, scale), ids), f"{name}: without a cache"


@golden.check(lambda c: "pairs" in c.config)
def schedule(case: GoldenCase) -> None:
    assert len(case.outputs) == 2 * len(case.config["pairs"])
    for total, steps in case.config["pairs"]:
        counts = passes(total, None if steps == -1 else steps)
        name = f"block{total}_steps{steps}"
        assert counts == case.outputs[f"counts_{name}"].tolist()
        assert len(counts) == int(case.outputs[f"num_forward_{name}"]) and sum(counts) == total


@golden.check(lambda c: "num_known" in c.config)
def completion(case: GoldenCase) -> None:
    """Known codes first, the rest decided one at a time with a constant scale."""
    model, k = load(case).eval(), case.config["num_known"]
    order, known, y = case.inputs["token_order"], case.inputs["known"], case.inputs["cond"]
    for name, scale in case.config["scales"].items():
        seen, counts = Seen(), passes(order.shape[1] - k)
        ids = decode(model, y, order, counts, GREEDY, (scale, scale), known=known.gather(1, order[:, :k]), watch=seen)
        assert torch.equal(ids, case.outputs[f"{name}/tokens"]), name
        assert_close(seen.logits(), case.outputs[f"{name}/logits"], 5e-5, name)
        assert torch.equal(ids.gather(1, order[:, :k]), known.gather(1, order[:, :k]))


@golden.check(lambda c: "ntk" in c.config)
def extrapolation(case: GoldenCase) -> None:
    model, y, order = load(case).eval(), case.inputs["cond"], case.inputs["token_order"]
    small, large = model.block_size, order.shape[1]
    for boundary in case.config["ntk"]:
        assert_close(large_positions(model, boundary), case.outputs[f"freqs_ntk{boundary}"][1:], 1e-6, "freqs")
    for name, call in case.config["calls"].items():
        assert call.get("extrapolation_factor", 2.0) == 2.0
        (steps, scale), spatial = read_call(case, name, call), tuple(call.get("spatial_cfg_scales", (1.0, 1.0)))
        masked = int(small * call.get("spatial_masking_ratio", 0.5))
        blanked = torch.zeros(len(y), small, dtype=torch.bool)
        if "in/spatial_perm" in case:
            blanked.scatter_(1, case.inputs["spatial_perm"][:, :masked], True)
        seen, boundary = Seen(), call.get("ntk_boundary", 2)
        counts = passes(small, steps), passes(large, steps, small)[:-1]  # the official loop ends before the last pass
        ids = enlarge(model, y, order, counts, (GREEDY, GREEDY), scale, spatial, blanked, boundary=boundary, watch=seen)
        assert torch.equal(ids, case.outputs[f"{name}/tokens"]), name
        assert_close(seen.logits(len(counts[0])), case.outputs[f"{name}/logits"], 5e-5, name)
        assert sum(counts[1]) == int(case.outputs[f"{name}/num_high_res_decoded"])


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


@torch.no_grad()
def decode_naively(model: RandAR, y: Tensor, order: Tensor, scale: tuple[float, float]) -> Tensor:
    """Greedy decoding by the training forward, one code at a time, everything computed again for each."""
    ids, n = torch.zeros_like(order), order.shape[1]
    for i in range(n):
        logits = model(ids, y, order[:, : i + 1])[:, -1]
        if scale[1] > 1:
            away = model(ids, model.null_condition({"y": y})["y"], order[:, : i + 1])[:, -1]
            logits = away + (scale[0] + (scale[1] - scale[0]) * i / n) * (logits - away)
        ids.scatter_(1, order[:, i : i + 1], logits.argmax(-1, keepdim=True))
    return ids


# -- sizes and checkpoints ---------------------------------------------------------------------------------------------

SIZES = {  # parameters, guidance of the published FID
    "RandAR-L": (342_912_000, 3.4),
    "RandAR-L-maskgit": (311_454_720, 4.0),
    "RandAR-XL": (774_700_800, 4.0),
    "RandAR-XXL": (1_410_974_208, 4.0),
}


def test_every_preset_is_counted() -> None:
    assert set(SIZES) == set(RANDAR)


@pytest.mark.parametrize("name", SIZES)
def test_preset_size(name: str) -> None:
    """Published counts; an official file of that size is read as that network, with its published guidance."""
    count, scale = SIZES[name]
    with torch.device("meta"):
        model = registry().build("model", {"name": "randar", "preset": name})
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == count
    assert state["pos_instruct_embeddings"].shape == (1, RANDAR[name]["dim"])
    read = CONVERTER.config(state)
    assert read == {"vocab_size": 16384, "grid": (16, 16), "num_classes": 1000, **RANDAR[name]}
    found = CONVERTER.published.header(read)
    assert found["recipe"]["guidance_scale"] == scale and found["data"]["image_size"] == 256
    assert CONVERTER.published.assumes(state, read) == {}
    with pytest.raises(KeyError):
        CONVERTER.to_ours({k: v for k, v in state.items() if k != "pos_instruct_embeddings"})


# -- the sequence ------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "dim": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 20,
    "grid": (2, 5),
    "num_classes": 5,
    "multiple_of": 32,
}
N = 10


def tiny(**more: Any) -> RandAR:
    """A small network whose output is not zero."""
    torch.manual_seed(0)
    model = RandAR(**{**TINY, **more})
    suites.randomise(model, scale=0.3)
    return model.eval()


def items(model: RandAR, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n, N) in raster order, labels, and an order for each."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (n, model.block_size), generator=g)
    return ids, torch.arange(n) % 5, orders_of("random", torch.rand(ids.shape, generator=g), model.grid)


def test_dropout_of_tokens_takes_codes_alone() -> None:
    """Where every code's embedding is dropped, logits still follow the class and the position asked for."""
    model = tiny(token_dropout=1.0, resid_dropout=0.0, ffn_dropout=0.0).train()
    ids, y, order = items(model)
    with torch.no_grad():
        logits = model(ids, y, order)
        assert torch.equal(model((ids + 1) % 20, y, order), logits)
        assert not torch.allclose(model(ids, y.flip(0), order), logits)
        assert not torch.allclose(model(ids, y, order.flip(1)), logits)


@torch.no_grad()
def test_logits_see_what_comes_before_and_where_they_are() -> None:
    model = tiny()
    ids, y, order = items(model)
    logits = model(ids, y, order)
    changed = ids.scatter(1, order[:, 4:5], (ids.gather(1, order[:, 4:5]) + 1) % 20)
    again = model(changed, y, order)
    assert torch.equal(again[:, :5], logits[:, :5]) and not torch.allclose(again[:, 5], logits[:, 5])
    torch.testing.assert_close(model(ids, y, order[:, :6]), logits[:, :6])
    swapped = order.clone()
    swapped[:, [5, 6]] = order[:, [6, 5]]
    assert not torch.allclose(model(ids, y, swapped)[:, 5], logits[:, 5]), "the position that is asked for"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["raster", "random"])
def test_likelihoods(kind: Any) -> None:
    """Of one order exact: all images' sum to one. Of drawn orders a bound, and each image's own order."""
    model = tiny(vocab_size=3, grid=(2, 2), order=kind)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    nats, said = model.log_likelihood(every, generators([7] * len(every)), torch.full((81,), 2))
    assert math.isclose(nats.double().exp().sum().item(), 1.0, rel_tol=1e-5)
    assert ("exact" in said) == (kind == "raster") and "given the class" in said
    other = model.log_likelihood(every, generators(range(81)))
    assert "null class" in other[1]
    assert torch.equal(model.log_likelihood(every[5:6], generators([5]))[0], other[0][5:6]) or kind == "raster"


@torch.no_grad()
def test_features_of_the_second_pass_know_all_codes() -> None:
    model = tiny()
    ids, y, order = items(model)
    grid = ids.unflatten(1, model.grid)
    for by in (None, order):
        features = model.bidirectional_features(grid, y, by)
        assert features.shape == (3, 2, 5, 32)
        first = torch.zeros(3, dtype=torch.long) if by is None else by[:, 0]
        last = (torch.full((3,), N - 1) if by is None else by[:, -1])[:, None]
        changed = ids.scatter(1, last, (ids.gather(1, last) + 1) % 20).unflatten(1, model.grid)
        moved = (model.bidirectional_features(changed, y, by) - features).flatten(1, 2).norm(dim=-1)
        assert (moved[torch.arange(3), first] > 1e-4).all(), "the first code knows the last"
    assert not torch.allclose(model.bidirectional_features(grid, depth=2), model.bidirectional_features(grid, depth=1))
    with pytest.raises(VgmError, match="depth=3"):
        model.bidirectional_features(grid, depth=3)


# -- orders and passes -------------------------------------------------------------------------------------------------


def test_as_many_passes_as_are_asked_for() -> None:
    for total in range(1, 70):
        for steps in range(2, total + 1):
            counts = passes(total, steps)
            assert len(counts) == steps and sum(counts) == total and min(counts) == counts[0] == 1, (total, steps)
        assert passes(total) == [1] * total
        assert passes(total, 1) == ([1] if total == 1 else [1, total - 1])
        assert sum(passes(total, 9, total // 3)) == total - total // 3
    assert passes(256, 88)[:24] == [1] * 24 and max(passes(256, 88)) == 5


def test_hierarchical_orders_begin_with_the_coarse_grid() -> None:
    u = torch.rand(4, 49, generator=torch.Generator().manual_seed(0))
    orders = hierarchical_orders(u, 7, 7)
    coarse = [7 * i + j for i in range(0, 7, 2) for j in range(0, 7, 2)]
    assert all(sorted(row[:16]) == coarse for row in orders.tolist()), "an odd side has one more even row"
    assert all(sorted(row) == list(range(49)) for row in orders.tolist())
    assert len({tuple(row) for row in orders.tolist()}) == 4
    raster = small_order(hierarchical_orders(u[:, :24], 4, 6)[:, :6], (2, 3))
    assert all(sorted(row) == list(range(6)) for row in raster.tolist())


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"n_kv_head": 2}])
def test_the_cache_holds_the_training_sequence(more: dict[str, Any]) -> None:
    """Codes of earlier passes are seen as if they had been decided one at a time: the logits of a pass of one code are
    those of the training forward, whatever the passes before it."""
    model = tiny(**more)
    _, y, order = items(model)
    assert torch.equal(decode(model, y, order, [1] * N, GREEDY), decode_naively(model, y, order, (1.0, 1.0)))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    ids = decode(model, y, order, [1, 3, 1, 4, 1], GREEDY, watch=lambda *told: seen.append(told))
    logits = model(ids, y, order)
    for at, (positions, chosen, found) in zip((0, 1, 4, 5, 9), seen):
        assert torch.equal(positions, order[:, at : at + chosen.shape[1]])
        assert torch.equal(ids.gather(1, positions), chosen)
        assert_close(found[:, 0], logits[:, at], 1e-5, f"code {at}")
    assert not torch.allclose(seen[1][2][:, 2], logits[:, 3]), "codes of one pass do not see each other"


def test_guidance_changes_with_the_share_of_codes() -> None:
    a, b, c = (torch.randn(2, 3, 4) for _ in range(3))
    torch.testing.assert_close(guided([(1.0, 3.0)])(torch.cat([b, a]), 0.5), a + 2.0 * (b - a))
    three = guided([(2.5, 2.5), (1.0, 2.0)])(torch.cat([c, b, a]), 0.25)
    torch.testing.assert_close(three, a + 2.5 * (b - a) + 1.25 * (c - b))
    assert torch.equal(guided([])(a, 0.3), a)


def ask(model: RandAR, seeds: Sequence[int] = (1, 2, 3), **more: Any) -> Request:
    y = torch.arange(len(seeds))
    return Request(model.grid, generators(seeds), cond={"y": y}, **{"guidance_scale": 2.0, **more})


def test_orders_of_a_sampler() -> None:
    model = tiny()
    for order in (None, "raster", "hierarchical", "halton", tuple(reversed(range(N)))):
        told: list[Tensor] = []
        request = ask(model, callback=lambda i, total, x, x0, told=told: told.append(x))
        ids = RandARSampler(steps=4, order=order)(model, request)
        assert ids.shape == (3, 2, 5) and request.info["nfe"] == len(told) == 4
        assert sum(request.info["codes_per_pass"]) == N and torch.equal(told[-1], ids)
    (first, *_) = told
    assert (first.flatten(1)[:, :-1] == 20).all(), "given backwards: the last position is decided first"
    with pytest.raises(VgmError, match="every position") as e:
        RandARSampler(order=(0, 1, 1))(model, ask(model))
    assert e.value.code == 2


def test_kept_codes_stay_and_are_seen_by_all_others() -> None:
    """Rows with other numbers of kept codes in one batch, each as alone."""
    model = tiny(grid=(4, 4), num_classes=3)
    ids, _, _ = items(model)
    mask = torch.ones(3, 1, 8, 8, dtype=torch.bool)
    mask[0, :, 2:5, 2:5] = False  # 4 codes
    mask[1, :, 7, 7] = False  # 1 code
    images, kept = ids.unflatten(1, (4, 4)), F.avg_pool2d(mask.float(), 2)[:, 0] == 1
    sampler, told = RandARSampler(steps=3, temperature=5.0), list[tuple[int, int]]()
    shown: list[Tensor] = []
    request = ask(
        model,
        images=images,
        mask=mask,
        callback=lambda i, total, x, x0: (told.append((i, total)), shown.append(x)),
    )
    given = images.clone()
    made = sampler(model, request)
    assert torch.equal(images, given), "a request is left as it is"
    assert torch.equal(made[kept], images[kept]) and not torch.equal(made, images)
    assert all(torch.equal(x[kept], images[kept]) for x in shown) and torch.equal(shown[-1], made)
    assert int((shown[0] == 20).sum()) == 4, "one of 5 missing codes is decided"
    assert request.info["nfe"] == 3 and request.info["codes_per_pass"] == passes(4, 3)
    assert told == [(i, 4) for i in range(4)], "3 passes of the first image, 1 of the second, none of the third"
    for i in range(3):
        own = Request((4, 4), generators([i + 1]), cond={"y": torch.tensor([i])}, guidance_scale=2.0)
        own.images, own.mask = images[i : i + 1], mask[i : i + 1]
        assert torch.equal(sampler(model, own), made[i : i + 1])
    other = images.clone()
    other[1, 0, 0] = (other[1, 0, 0] + 1) % 20
    seen: list[Tensor] = []
    for known in (images, other):
        order = torch.arange(16).expand(3, -1)
        logits = Seen()
        decode(model, torch.zeros(3).long(), order, [1], GREEDY, known=known.flatten(1)[:, :15], watch=logits)
        seen.append(logits.logits())
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.allclose(seen[0][1], seen[1][1])


def test_twice_the_size() -> None:
    """The coarse codes are those of an image of the trained size; every code is decided, but with compat."""
    model = tiny(grid=(3, 2), num_classes=3)
    seen: list[Tensor] = []
    request = ask(model, callback=lambda i, total, x, x0: seen.append(x))
    ids = ExtrapolationSampler()(model, request)
    assert ids.shape == (3, 6, 4) and request.info["nfe"] == 24 == len(seen)
    assert (seen[5][:, 1::2] == 20).all() and (seen[5][:, :, 1::2] == 20).all()
    assert torch.equal(seen[5][:, ::2, ::2], ids[:, ::2, ::2])
    less = ExtrapolationSampler(compat=True)(model, request.drawn_by(generators([1, 2, 3])))
    assert (less != ids).flatten(1).sum(1).le(1).all() and (less != ids).any()
    assert request.info["nfe"] == 23
    plain = ExtrapolationSampler(guidance_scale=1.0)(model, ask(model, guidance_scale=None))
    spatial = ExtrapolationSampler(spatial_scale=50.0)(model, ask(model))
    assert not torch.equal(plain, ids) and not torch.equal(spatial, ids)
    few = ask(model, steps=4)
    assert ExtrapolationSampler()(model, few).shape == (3, 6, 4) and few.info["nfe"] < 15
    with pytest.raises(VgmError, match="RandAR"):
        ExtrapolationSampler()(LlamaGen(**TINY), ask(model))
    with pytest.raises(VgmError, match="LlamaGen"):
        LlamaGenSampler()(model, ask(model))


# -- training and the command line -------------------------------------------------------------------------------------

SMALL = (
    "model.dim=32",
    "model.n_layer=1",
    "model.n_head=2",
    "model.token_dropout=0",
    "model.resid_dropout=0",
    "model.ffn_dropout=0",
    "codec.fallback=null",
)
QUICK = ("data.count=null", "train.batch_size=8", "train.preview_n=2", "train.precision=fp32", "train.compile=off")


def test_initial_loss_is_that_of_guessing_and_orders_are_the_steps() -> None:
    model = RandAR(**TINY)
    batch = {"tokens": torch.randint(20, (4, 2, 5)), "cond": {"y": torch.arange(4)}}
    loss, _ = RandARObjective(model).loss("main", batch, Step(0))
    assert math.isclose(loss.item(), math.log(20), rel_tol=1e-6)
    unlabelled = RandAR(**{**TINY, "num_classes": 0})
    assert RandARObjective(unlabelled).loss("main", {"tokens": batch["tokens"]}, Step(0))[0].isfinite()
    losses = {k: RandARObjective(tiny(order=k)) for k in ("random", "raster")}
    found = {k: {o.loss("main", batch, Step(i))[0].item() for i in range(3)} for k, o in losses.items()}
    assert len(found["random"]) == 3 and len(found["raster"]) == 1


def test_from_the_command_line(tiny_dataset: Path, tmp_run: Path, vgm: Callable[..., tuple[int, str, str]]) -> None:
    """A LlamaGen run to start from, training with skipped updates, passes, orders, larger images, likelihood."""
    before, run = tmp_run / "llamagen", tmp_run / "randar"
    common = (f"data.path={tiny_dataset}", *SMALL, *QUICK[1:], "model.multiple_of=64")
    code, _, err = vgm("train", "llamagen", *common, "train.steps=2", "--out", before)
    assert code == 0, err
    start = (f"model.weights={before}", "model.partial=true", "train.skip={above: 1.0e-9, norm: sum}")
    code, _, err = vgm("train", "randar", *common, *start, "train.steps=2", "train.log_every=1", "--out", run)
    assert code == 0, err
    theirs, ours = (ckpt.read_tensors(ckpt.resolve(str(r)))[0] for r in (before, run))
    assert ours.keys() - theirs.keys() == {"pos_instruct_embeddings"}
    assert all(torch.equal(ours[k], v) for k, v in theirs.items()), "every update was left out"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("skipped") == 1 for row in rows)
    code, out, err = vgm("sample", run, "-n", 3, "--steps", 7, "order=raster", "--json", "--trace", "--out", "a.png")
    assert code == 0, err
    said = json.loads(out)
    assert said["nfe"] == 7 and sum(said["codes_per_pass"]) == 49
    code, out, err = vgm("sample", run, "-n", 2, "--sampler", "randar-extrapolate", "--steps", 5, "--out", "b.npz")
    assert code == 0, err
    assert np.load("b.npz")["arr_0"].shape[1:3] == (56, 56)
    code, out, err = vgm("evaluate", run, "--metrics", "bits-per-dim", "-n", 4, "--json")
    assert code == 0 and "lower bound, one random order each" in out, err
    code, _, err = vgm("sample", run, "-n", 1, "order=zigzag", "--out", "c.png")
    assert code == 2 and "order" in err


@pytest.mark.slow
def test_it_learns_digits(vgm: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: Any) -> None:
    """The recipe on a smaller network and shortened: the loss falls, and digits in 12 passes come nearer to real ones."""
    monkeypatch.chdir(tmp_path)
    few = ("train.steps=160", "train.batch_size=48", "model.dim=96", "model.n_layer=2", "model.n_head=3",
           "optimizer.warmup=10", "optimizer.lr=4e-3", "train.ema=[{decay: 0.95, warmup: 1}]", "train.save_every=20",
           "train.keep=9", "train.preview_n=0", "train.log_every=20")  # fmt: skip
    assert vgm("train", "randar", *few, "--out", "run")[0] == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * math.log(256), losses
    found = []
    for name in ("run/checkpoints/step-00000020", "run"):
        code, out, err = vgm("evaluate", name, "--reference", "mnist5k", "--metrics", "fid", "-n", 300, "--json")
        assert code == 0, err
        found.append(json.loads(out)["metrics"]["fid"]["value"])
    assert found[1] < 0.7 * found[0], found


class TestTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "randar/mnist"
    overrides: ClassVar[tuple[str, ...]] = SMALL


class TestSampling(suites.SamplerSuite):
    recipe: ClassVar[str] = "randar/mnist"
    overrides: ClassVar[tuple[str, ...]] = SMALL
    steps: ClassVar[int] = 6
