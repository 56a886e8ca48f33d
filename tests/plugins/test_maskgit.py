"""MaskGIT against google-research/maskgit and valeoai/Halton-MaskGIT (golden cases), sizes, decoding, editing, training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from vgm_plugins.maskgit import checkpoints as ck
from vgm_plugins.maskgit.decoding import by_confidence, by_cumulative_confidence, by_order
from vgm_plugins.maskgit.model import HaltonMaskGIT, MaskedTransformer, MaskGIT
from vgm_plugins.maskgit.objective import MaskedCodes, masked_cross_entropy
from vgm_plugins.maskgit.presets import BERT, HALTON, TOKENIZER
from vgm_plugins.maskgit.sampler import HaltonConfidenceSampler, HaltonSampler, MaskGITSampler, scale_at, windows
from vgm_plugins.maskgit.tokenizer import MaskGITTokenizer

from vgm_cli.api import Request, Step, generators
from vgm_cli.ar.masking import kept_codes, known_after, mask_rate
from vgm_cli.ar.orders import order_of, rolled
from vgm_cli.ar.sampling import filter_logits
from vgm_cli.convert_api import Layout
from vgm_cli.data import open_dataset
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.engine.checkpoint import load
from vgm_cli.engine.train.optim import learning_rate, make_optimizer
from vgm_cli.errors import VgmError
from vgm_cli.images import blended, to_uint8
from vgm_cli.losses.adversarial import discriminator_loss, generator_loss
from vgm_cli.nn.quantize import entropy_loss
from vgm_cli.registry import registry
from vgm_cli.settings import Optimizer
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, adam_floor, assert_close

golden = GoldenChecks("maskgit")
Cli = Callable[..., tuple[int, str, str]]


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- golden cases: toy networks ----------------------------------------------------------------------------------------


def toy(case: GoldenCase) -> Callable[[Tensor], Tensor]:
    """The logits (B, N, V) of codes (B, N) that the cases state in their notes."""
    base = case.inputs["base"]
    v = torch.arange(base.shape[-1]).float()

    def logits(codes: Tensor) -> Tensor:
        own = 0.5 * torch.cos(0.7 * codes.float()[..., None] + 0.3 * v)
        return base + own + 0.2 * torch.sin(0.1 * codes.sum(1).float()[:, None, None] + v)

    return logits


def toy_guided(case: GoldenCase, scale: Callable[[int], float], factor: Callable[[int], float]) -> Any:
    """The same with what the label adds, guided, times a factor."""
    null_of, v = toy(case), torch.arange(case.inputs["base"].shape[-1]).float()
    own = 0.8 * torch.cos(0.5 * case.inputs["labels"].float()[:, None, None] + 0.2 * v)

    def logits(ids: Tensor, k: int) -> Tensor:
        null = null_of(ids)
        return Guidance(scale(k)).combine(null + own, null) * factor(k)

    return logits


class Film:
    """What a decoding function shows of its steps."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.drawn: list[Tensor] = []

    def __call__(self, k: int, ids: Tensor, drawn: Tensor) -> None:
        assert k == len(self.ids)
        self.ids.append(ids)
        self.drawn.append(drawn)


# -- golden cases: google-research/maskgit -----------------------------------------------------------------------------


def flax(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the host's reader of msgpack joins them, below "params"."""
    return {k.removeprefix("params/").replace("/", "."): v for k, v in state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def through(layout: Layout, state: dict[str, Tensor], model: nn.Module, config: dict[str, Any]) -> Any:
    """The model with a state of the layout, which reads the same configuration off the shapes and gives it back."""
    assert layout.recognise(state)
    read = layout.config(state)
    assert {k: read[k] for k in config if k in read} == {k: v for k, v in config.items() if k in read}
    model.load_state_dict(layout.to_ours(state))
    assert same(layout.from_ours(model.state_dict()), state)
    return model.eval()


def bert(case: GoldenCase) -> MaskGIT:
    own, codes, classes = case.config["model"], case.config["codebook_size"], case.config["num_class"]
    assert own["vocab_size"] == codes + classes + 1
    positions = own["max_position_embeddings"] - 1
    side = math.isqrt(positions)
    grid = (side, side) if side * side == positions else (1, positions)
    case.ignore("model.hidden_dropout_prob", "model.attention_probs_dropout_prob", why="evaluated without dropout")
    case.ignore("model.initializer_range", why="weights are stored")
    sizes = {"hidden_size": own["hidden_size"], "num_hidden_layers": own["num_hidden_layers"]}
    sizes |= {"num_attention_heads": own["num_attention_heads"], "intermediate_size": own["intermediate_size"]}
    model = MaskGIT(vocab_size=codes, num_classes=classes, grid=grid, **sizes)
    if grid[0] == 1:  # the layout asks which grid it is
        with pytest.raises(VgmError, match="no square"):
            ck.BERT.config(flax(case.state))
        return through(dataclasses.replace(ck.BERT, config=lambda state: sizes), flax(case.state), model, sizes)
    return through(ck.BERT, flax(case.state), model, {**sizes, "grid": grid})


@golden.check(lambda c: c.kind == "maskgit_jax_transformer")
@torch.no_grad()
def jax_transformer(case: GoldenCase) -> None:
    model = bert(case)
    ids = case.inputs["ids"].long()
    logits = model.sequence(torch.where(ids < 0, model.mask_id, ids))
    assert_close(logits, case.outputs["logits"], 2e-5, "logits")
    assert torch.equal(ids[:, 0] >= model.vocab_size, torch.ones(len(ids), dtype=torch.bool))
    inner = model(torch.where(ids < 0, model.mask_id, ids)[:, 1:], ids[:, 0] - model.vocab_size)
    assert_close(inner, logits[:, 1:], 1e-6, "the class in front")
    smoothing = case.config["label_smoothing"]
    loss = masked_cross_entropy(logits, case.inputs["labels"].long(), case.inputs["weights"], smoothing)
    assert_close(loss[None], case.outputs["loss"], 2e-5, "loss")


@golden.check(lambda c: c.kind == "maskgit_jax_decode")
@torch.no_grad()
def jax_decode(case: GoldenCase) -> None:
    """Parallel decoding, edits included; what is drawn, what is masked again after every step, and the result."""
    config, inputs = case.config, case.inputs
    case.ignore("seed", why="of draws that are stored")
    if case.state:
        model, mask_id = bert(case), -1
        of = lambda ids, k: model.of_codes(model.sequence(torch.where(ids < 0, model.mask_id, ids)))
    else:
        case.ignore("num_class", why="the toy network has no classes, and their ids are part of the inputs")
        plain, mask_id = toy(case), -1
        of = lambda ids, k: plain(ids)
        assert inputs["base"].shape[-1] == config["codebook_size"]
    steps, start, film = config["num_iter"], config["start_iter"], Film()
    pick = lambda logits, k: (logits + inputs["gumbel_token"][k]).argmax(-1)
    given = inputs["inputs"].long()
    method = {"uniform": "linear"}.get(config["method"], config["method"])
    result = by_confidence(of, pick, given, mask_id, inputs["gumbel_choice"], steps, start, method,
                           config["choice_temperature"], film)  # fmt: skip
    final = case.outputs["final_seqs"].long()
    assert torch.equal(result, final[:, -1]) and torch.equal(torch.stack(film.drawn, 1), final[:, start:])
    assert (final[:, :start] == given[:, None]).all() and len(film.ids) == steps - start
    assert torch.equal(torch.stack(film.ids) == mask_id, case.outputs["masking"])
    some = (given == mask_id).any(1)  # one is counted even where none can be masked
    left = (torch.stack(film.ids) == mask_id).sum(-1)
    assert torch.equal(left[:, some], case.outputs["mask_len"][:, some, 0].long()) and not left[:, ~some].any()
    ratios = torch.arange(start + 1, steps + 1) / steps
    wanted = case.outputs["choice_temperature_per_step"]
    assert_close(config["choice_temperature"] * (1 - ratios), wanted, 1e-5, "temperature", 1e-6)


@golden.check(lambda c: c.kind == "maskgit_jax_schedules")
def jax_schedules(case: GoldenCase) -> None:
    ratio, total = case.inputs["ratio"], case.config["total_unknown"]
    for method in case.config["methods"]:
        rate = mask_rate(ratio, "linear" if method == "uniform" else method, total)
        assert_close(rate.clamp(min=1e-6), case.outputs[method], 1e-6, method)  # officially never 0
        each = mask_rate(ratio[:, None], "linear" if method == "uniform" else method, torch.tensor([total]))
        assert torch.equal(rate, each.expand(-1, 1)[:, 0]), "one number of positions for all, or each its own"
        product = rate.double() * total
        near = (product - product.round()).abs() < 1e-3  # of a whole number, where the last bit decides
        assert ((product.floor() - case.outputs[f"floor_{method}"]).abs() <= near).all(), method


@golden.check(lambda c: c.kind == "maskgit_jax_losses")
def jax_losses(case: GoldenCase) -> None:
    inputs, out, config = case.inputs, case.outputs, case.config
    for targets in ("softmax", "argmax"):
        found = entropy_loss(inputs["affinity"], config["temperature"], targets)  # type: ignore[arg-type]
        assert_close(found[None], out[f"entropy_{targets}"], 1e-5, targets)
    for theirs, ours in (("hinge", "hinge"), ("non-saturating", "vanilla")):
        loss = 2 * discriminator_loss(ours, inputs["real"], inputs["fake"])  # type: ignore[arg-type]  # a sum, no mean
        assert_close(loss[None], out[f"d_{theirs}"], 1e-5, f"d_{theirs}")
        assert_close(generator_loss(inputs["fake"], ours)[None], out[f"g_{theirs}"], 1e-5, f"g_{theirs}")  # type: ignore[arg-type]
    weights = inputs["weights"]  # the plain loss is of every position
    for name, own, smoothing in (
        ("plain", torch.ones_like(weights), 0.0),
        ("smoothed", weights, config["label_smoothing"]),
    ):
        loss = masked_cross_entropy(inputs["logits"], inputs["labels"].long(), own, smoothing)
        assert_close(loss[None], out[f"ce_{name}"], 1e-5, name)


@golden.check(lambda c: c.kind == "maskgit_jax_edit")
def jax_edit(case: GoldenCase) -> None:
    """The demo's box: which codes are made anew, and how the picture is put together."""
    top, left, height, width = map(int, case.config["bbox"].split("_"))
    size, batch = case.config["image_size"], case.config["batch"]
    side = size // 16
    assert len(case.inputs["image_tokens"]) == batch
    kept = torch.ones(batch, 1, size, size, dtype=torch.bool)
    whole = [n // 16 * 16 for n in (top, left, height, width)]  # the demo counts whole codes of the box's sides
    kept[..., whole[0] : whole[0] + whole[2], whole[1] : whole[1] + whole[3]] = False
    made = ~kept_codes(kept, (side, side), margin=1)
    assert torch.equal(made.float(), case.outputs["latent_mask"])
    ids = torch.where(made, -1, case.inputs["image_tokens"]).flatten(1)
    assert torch.equal(ids, case.outputs["input_tokens"][:, 1:].long())
    assert (
        case.outputs["input_tokens"][:, 0] == case.config.get("codebook_size", 1024) + case.config["target_label"]
    ).all()
    large = lambda x: x.repeat_interleave(16, -3).repeat_interleave(16, -2).movedim(-1, -3)
    new, old = large(case.inputs["outputs_small"]), large(case.inputs["image_small"]).expand(batch, -1, -1, -1)
    radius = size // 16 - 1
    found = blended(new, old, made, radius).movedim(1, -1)
    assert_close(found[:, ::8, ::8], case.outputs["composite_sub8"], 1e-5, "composite")
    share = blended(torch.ones(batch, 1, size, size), torch.zeros(batch, 1, size, size), made, radius)
    assert_close(share[:1, 0, ::4, ::4, None], case.outputs["composite_mask_sub4"], 1e-5, "mask")


@golden.check(lambda c: c.kind == "maskgit_jax_tokenizer")
@torch.no_grad()
def jax_tokenizer(case: GoldenCase) -> None:
    config, out = case.config, case.outputs
    assert config["quantizer"] == "vq" and config["norm_type"] in ("GN", "LN"), "not brought"
    sizes = {"n_embed": config["codebook_size"], "embed_dim": config["embedding_dim"], "ch": config["filters"]}
    sizes |= {"ch_mult": tuple(config["channel_multipliers"]), "num_res_blocks": config["num_res_blocks"]}
    sizes |= {"norm_groups": 0} if config["norm_type"] == "LN" else {}
    sizes |= {"conv_downsample": True} if config["conv_downsample"] and len(sizes["ch_mult"]) > 1 else {}
    model = MaskGITTokenizer(**sizes, activation=config["activation_fn"], beta=config["commitment_cost"],
                             entropy_weight=config["entropy_loss_ratio"],
                             entropy_targets=config["entropy_loss_type"],
                             entropy_temperature=config["entropy_temperature"])  # fmt: skip
    model = through(ck.TOKENIZER, flax(case.state), model, sizes)
    last = lambda x: x.permute(0, 2, 3, 1)
    x = 2 * case.inputs["image"].permute(0, 3, 1, 2) - 1
    z = model.moments(x)
    assert_close(last(z), out["encoded"], 1e-4, "encoded")
    codes, loss, ids = model.quantize(z)
    assert torch.equal(ids, out["indices"].long()) and torch.equal(ids, model.tokens(x))
    terms = model.quantize.terms(z)[3]
    found = {"quantized": last(codes), "decoded": last(model.decoder(codes)), "quantizer_loss": loss[None]}
    found |= {"e_latent_loss": model.quantize.beta * terms["commitment"][None]}
    found |= {"q_latent_loss": terms["codebook"][None]}
    found |= {"entropy_loss": model.quantize.entropy_weight * terms.get("entropy", loss.new_zeros(()))[None]}
    for name, value in found.items():
        assert_close(value, out[name], 1e-4, name)
    assert_close((model.decode_tokens(ids) + 1) / 2, model.decoder(model.quantize.lookup(ids)), 1e-5, "decode_tokens")


@golden.check(lambda c: c.kind == "maskgit_torch_tokenizer")
@torch.no_grad()
def torch_tokenizer(case: GoldenCase) -> None:
    config, out = case.config, case.outputs
    sizes = {"n_embed": config["num_embeddings"], "embed_dim": config["embedding_dim"], "ch": config["hidden_channels"]}
    sizes |= {"ch_mult": tuple(config["channel_mult"]), "num_res_blocks": config["num_res_blocks"]}
    sizes |= {"in_channels": config["num_channels"]}
    assert config["z_channels"] == config["embedding_dim"] and config["num_resolutions"] == len(config["channel_mult"])
    model = through(ck.TOKENIZER_PORT, case.state, MaskGITTokenizer(**sizes), sizes)
    x = 2 * case.inputs["x"] - 1
    assert x.shape[-1] == config["resolution"]
    assert_close(model.moments(x), out["hidden"], 1e-4, "hidden")
    ids = model.tokens(x)
    assert torch.equal(ids.flatten(1), out["indices"])
    raw = (model.decode_tokens(ids) + 1) / 2
    assert_close(raw, out["decoder_raw"], 1e-4, "decoder_raw")
    assert_close(raw.clamp(0, 1), out["decoded"], 1e-4, "decoded")


# -- golden cases: valeoai/Halton-MaskGIT ------------------------------------------------------------------------------


def adaptive(case: GoldenCase, own: Any) -> HaltonMaskGIT:
    sizes = {"hidden_dim": own["hidden_dim"], "vocab_size": own["codebook_size"], "depth": own["depth"]}
    sizes |= {"num_classes": own["nclass"], "register": own["register"], "grid": (own["input_size"],) * 2}
    assert own["proj"] == 1
    more = {"heads": own["heads"], "mlp_dim": own["mlp_dim"], "dropout": own["dropout"]}
    inner = case.state["transformer.layers.0.ff.w1.weight"].shape[0]
    assert inner == 256 * -(-int(2 * own["mlp_dim"] / 3) // 256)
    case.ignore(*(f"{p}mlp_dim" for p in ("", "model.")), why="it is rounded up to 256, which the shapes say")
    return through(ck.HALTON, case.state, HaltonMaskGIT(**sizes, **more), sizes)


def dropped(model: HaltonMaskGIT, labels: Tensor, drop: Tensor) -> Tensor:
    return torch.where(drop, model.null_condition({"y": labels})["y"], labels)


@golden.check(lambda c: c.kind == "halton_transformer")
@torch.no_grad()
def halton_transformer(case: GoldenCase) -> None:
    model = adaptive(case, case.config)
    case.ignore("dropout", why="evaluated without dropout")
    y = dropped(model, case.inputs["labels"], case.inputs["drop_label"])
    logits = model(case.inputs["codes"].flatten(1), y)
    assert_close(logits, case.outputs["logits"], 2e-5, "logits")
    target = case.inputs["target"].flatten(1)
    loss = masked_cross_entropy(logits, target, torch.ones_like(target))
    assert_close(loss, case.outputs["loss"], 2e-5, "loss")


@golden.check(lambda c: c.kind == "halton_train_steps")
def halton_train_steps(case: GoldenCase) -> None:
    """AdamW with warm-up, the last cosine, clipping and the average, by the host's optimizer and schedule."""
    config, inputs, out = case.config, case.inputs, case.outputs
    model = adaptive(case, config["model"]).train()
    lr, total, decay = config["lr"], config["max_iter"], config.get("ema_decay")
    setting = Optimizer(name="adamw", lr=lr, betas=list(config["betas"]), weight_decay=config["weight_decay"],
                        warmup=config["warm_up"], warmup_from=0.0, schedule="cosine", decay_from=0.9,
                        least_lr=0.01 * lr)  # fmt: skip
    optimizer = make_optimizer(list(model.parameters()), setting, torch.device("cpu"))
    average = {k: v.clone() for k, v in model.state_dict().items()}
    steps = len(inputs["code"])
    for k in range(steps):
        rate = learning_rate(setting, k, total)
        assert_close(torch.tensor(rate).double(), out[f"step{k}.lr"], 1e-6, f"step{k}.lr", 1e-12)
        optimizer.param_groups[0]["lr"] = rate
        ids = inputs["code"][k].flatten(1)
        y = dropped(model, inputs["labels"][k], inputs["drop_label"][k])
        logits = model(inputs["masked_code"][k].flatten(1), y)
        loss = masked_cross_entropy(logits, ids, torch.ones_like(ids))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"] or math.inf)  # 0: nothing is clipped
        assert_close(loss, out[f"step{k}.loss"], 1e-4, f"step{k}.loss")
        assert_close(norm, out[f"step{k}.grad_norm"], 1e-4, f"step{k}.grad_norm")
        optimizer.step()
        for n, v in model.state_dict().items() if decay is not None else ():
            for _ in range(1 + (n == "tok_emb.weight")):  # officially averaged under both of its names
                average[n] = decay * average[n] + (1 - decay) * v
    floor = adam_floor(lr, steps)
    for prefix, state in (("final", model.state_dict()), ("ema", average))[: 1 if decay is None else 2]:
        found = ck.HALTON.from_ours(state)
        wanted = {n.removeprefix(f"{prefix}."): v for n, v in out.items() if n.startswith(f"{prefix}.")}
        assert found.keys() == wanted.keys()
        for name, want in wanted.items():
            assert_close(found[name], want, 1e-4, f"{prefix}.{name}", floor)


@golden.check(lambda c: c.kind == "halton_order")
def halton_order(case: GoldenCase) -> None:
    for n in case.config["sizes"]:
        order = order_of("halton", n, n)
        assert torch.equal(torch.stack([order // n, order % n], dim=1), case.outputs[f"order_{n}"])
    for n, steps in case.config["schedules"]:
        ratios, wanted = torch.arange(1, steps + 1) / steps, case.outputs[f"revealed_{n}_{steps}"]
        assert torch.equal(known_after(ratios, "arccos", n * n), wanted)
        assert torch.equal(known_after(ratios, "arccos", torch.tensor([n * n]))[:, 0], wanted)


@golden.check(lambda c: c.kind == "halton_train_mask")
def halton_train_mask(case: GoldenCase) -> None:
    names = [k.removeprefix("mask_") for k in case.outputs if k.startswith("mask_")]
    n = case.config["input_size"] ** 2
    assert len(names) == 5
    for name in names:
        mask = case.inputs["u"] < mask_rate(case.inputs["r"], name, n)[:, None, None]
        assert torch.equal(mask, case.outputs[f"mask_{name}"])
        value = case.config["value"]  # 0 and less mask nothing
        masked = torch.where(mask, value, case.inputs["code"]) if value > 0 else case.inputs["code"]
        assert torch.equal(masked, case.outputs[f"masked_{name}"])
        assert bool(case.outputs[f"loss_mask_{name}"].all()), "the loss is of all positions"
        for steps in case.config["steps"]:
            want = case.outputs[f"confidence_schedule_{name}_{steps}"].long()
            least = torch.arange(1, steps + 1)
            assert torch.equal(known_after(torch.linspace(0, 1, steps), name, n), want.maximum(least)), (name, steps)


@golden.check(lambda c: c.kind.startswith("halton_confidence_decode"))
def halton_confidence(case: GoldenCase) -> None:
    """The confidence sampler as it was released: codes that are known are drawn anew."""
    options, size, mask_id = case.config["sampler"], case.config["input_size"], case.config["codebook_size"]
    steps, n, mode = options["step"], size * size, options["randomize"]
    noise = case.inputs["gumbel_choice"] if "in/gumbel_choice" in case else case.inputs["conf_noise"]
    assert len(noise) == steps and case.inputs["base"].shape[1:] == (n, mask_id + 1)
    if mode != "linear":
        case.ignore("sampler.r_temp", why="of noise that is added, which there is none of")
    given = torch.full((len(case.inputs["labels"]), n), mask_id)
    given = case.inputs["init_code"] if "in/init_code" in case else given
    of = toy_guided(case, lambda k: scale_at(1 + options["w"], "linear", k, steps), lambda k: options["sm_temp"])
    pick = lambda logits, k: (logits.log_softmax(-1) + case.inputs["gumbel_token"][k]).argmax(-1)
    film = Film()
    ids = by_cumulative_confidence(of, pick, given, mask_id, noise, options["sched_mode"], mode, options["r_temp"],
                                   rewrite_known=True, watch=film)  # fmt: skip
    assert torch.equal(torch.stack(film.drawn).view(steps, -1, size, size), case.outputs["pred_codes"])
    unknown = (torch.stack(film.ids) == mask_id).float().view(steps, -1, size, size)
    assert torch.equal(unknown, case.outputs["masks_after"])
    # the official decoder clamps codes to the codebook
    final = (case.outputs["final_codes"] * 1000).round().long()
    assert torch.equal(ids.clamp(max=mask_id - 1).view(-1, size, size), final)


@golden.check(lambda c: c.kind == "halton_halton_decode")
def halton_decode(case: GoldenCase) -> None:
    options, n, mask_id = case.config["sampler"], case.config["input_size"], case.config["codebook_size"]
    case.ignore("sampler.sched_pow", why="the official sampler does not use it")
    steps, top_k, batch = options["step"], options["top_k"], len(case.inputs["labels"])
    first, last, power = options["sm_temp_min"], options["sm_temp_max"], options["temp_pow"]
    if first == last == 1:
        case.ignore("sampler.temp_pow", why="1 to any power is 1")
    own = HaltonSampler(steps, first, last, power, options["temp_warmup"])
    factors = own.factors(steps).tolist()
    order = order_of("halton", n, n)
    orders = rolled(order, case.inputs["roll"]) if options["randomize"] else order.expand(batch, -1)

    def pick(logits: Tensor, k: int) -> Tensor:
        if top_k <= 0:
            return (logits.log_softmax(-1) + case.inputs["gumbel_token"][k]).argmax(-1)
        values, places = filter_logits(logits, top_k).topk(top_k)
        return places.gather(-1, (values.log_softmax(-1) + case.inputs["gumbel_token"][k]).argmax(-1)[..., None])[
            ..., 0
        ]

    film = Film()
    of = toy_guided(case, lambda k: scale_at(1 + options["w"], "constant", k, steps), lambda k: factors[k])
    given = torch.full((batch, n * n), mask_id)
    assert case.inputs["base"].shape[1:] == (n * n, mask_id + 1)
    ids = by_order(of, pick, given, mask_id, orders, steps, watch=film)
    assert torch.equal(torch.stack(film.drawn).view(steps, -1, n, n), case.outputs["pred_codes"])
    before = given
    for now, drawn, filled in zip(film.ids, film.drawn, case.outputs["step_masks"].flatten(2)):
        assert torch.equal(now, torch.where(filled.bool(), drawn, before))
        before = now
    final = (case.outputs["final_codes"] * 1000).round().long()
    assert torch.equal(ids.clamp(max=mask_id - 1).view(-1, n, n), final)


# -- sizes -------------------------------------------------------------------------------------------------------------

COUNTS = {
    ("maskgit", "imagenet256"): 172_457_193,
    ("maskgit", "imagenet512"): 173_047_017,
    ("maskgit-tokenizer", "f16-1024"): 54_515_587,
    ("halton-maskgit", "tiny"): 23_031_425,
    ("halton-maskgit", "tiny-384"): 23_154_305,
    ("halton-maskgit", "small"): 69_344_769,
    ("halton-maskgit", "small-384"): 69_508_609,
    ("halton-maskgit", "base"): 142_224_641,
    ("halton-maskgit", "large"): 479_656_961,
    ("halton-maskgit", "large-384"): 479_984_641,
    ("halton-maskgit", "xlarge"): 692_118_401,
}


@pytest.mark.parametrize(("name", "preset"), COUNTS)
def test_preset_size(name: str, preset: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": name, "preset": preset})
        layout = {"maskgit": ck.BERT, "maskgit-tokenizer": ck.TOKENIZER, "halton-maskgit": ck.HALTON}[name]
        state = layout.from_ours(model.state_dict())
        assert layout.recognise(state)
        read = layout.config(state)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name, preset]
    wanted = {"maskgit": BERT, "maskgit-tokenizer": TOKENIZER, "halton-maskgit": HALTON}[name][preset]
    assert {k: read[k] for k in wanted} == wanted


# -- decoding ----------------------------------------------------------------------------------------------------------

TINY: dict[str, dict[str, Any]] = {
    "maskgit": {"vocab_size": 12, "grid": (3, 4), "num_classes": 4, "null_class": True, "hidden_size": 32,
                "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "halton-maskgit": {"vocab_size": 12, "grid": (3, 4), "num_classes": 4, "hidden_dim": 32, "depth": 2, "heads": 3},
}  # fmt: skip
SAMPLERS: dict[str, Any] = {
    "maskgit": MaskGITSampler(steps=5, guidance_scale=2.0),
    "maskgit-log": MaskGITSampler(steps=4, schedule="log", choice_temperature=0.5, top_k=3, temperature=0.7),
    "halton-confidence": HaltonConfidenceSampler(steps=4),
    "halton-confidence-warm": HaltonConfidenceSampler(steps=4, noise="warm_up", schedule="square"),
    "halton": HaltonSampler(steps=5, roll=True, temperature_last=1.3, warmup=1, top_k=5),
}


def tiny(name: str = "halton-maskgit", **more: Any) -> Any:
    torch.manual_seed(0)
    model = registry().build("model", {"name": name, **TINY[name], **more})
    suites.randomise(model, scale=0.3)
    return model.eval()


def request(n: int, seed: int = 0, **more: Any) -> Request:
    return Request((3, 4), generators(range(seed, seed + n)), cond={"y": torch.arange(seed, seed + n) % 4}, **more)


@pytest.mark.parametrize(("name", "which"), [("maskgit", "maskgit"), *(("halton-maskgit", w) for w in SAMPLERS)])
@torch.no_grad()
def test_every_sampler_fills_the_grid_and_keeps_what_is_given(name: str, which: str) -> None:
    """On both networks: items do not depend on their batch; all codes are codes; those under pixels that are kept, and
    far enough from a hole, come back bit for bit, and the others differ between seeds."""
    model, sampler = tiny(name), SAMPLERS[which]
    ids = sampler(model, whole := request(4))
    assert ids.shape == (4, 3, 4) and 0 <= ids.min() and ids.max() < 12 and whole.info["nfe"] == sampler.steps
    assert torch.equal(torch.cat([sampler(model, request(1)), sampler(model, request(3, seed=1))]), ids)
    mask = torch.ones(4, 1, 12, 16, dtype=torch.bool)
    mask[:2, :, :, 8:] = False  # the right half
    mask[2, :, 5, 5] = False  # one pixel
    images = torch.randint(12, (4, 3, 4), generator=torch.Generator().manual_seed(1))
    for grow in (0, 1):
        sampler.grow = grow
        kept = kept_codes(mask, (3, 4), grow)
        runs = [sampler(model, request(4, seed, images=images, mask=mask)) for seed in (0, 4, 8)]
        for found in runs:
            assert torch.equal(found[kept], images[kept]) and torch.equal(found[3], images[3])
            assert 0 <= found.min() and found.max() < 12
        assert any(not torch.equal(a[0], runs[0][0]) for a in runs[1:])
    sampler.grow = 0
    assert sampler.accepts(model, object()) is None and sampler.accepts(model, None) is not None


@torch.no_grad()
def test_the_release_rewrites_what_is_known() -> None:
    model = tiny()
    images = torch.randint(12, (3, 3, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 1, 3, 4, dtype=torch.bool)
    mask[:, :, 0, 0] = False
    own, release = (HaltonConfidenceSampler(steps=4, rewrite_known=flag) for flag in (False, True))
    kept = mask[:, 0]
    assert torch.equal(own(model, request(3, images=images, mask=mask))[kept], images[kept])
    assert not torch.equal(release(model, request(3, images=images, mask=mask))[kept], images[kept])


@pytest.mark.parametrize("which", ["maskgit", "halton-confidence", "halton"])
@pytest.mark.parametrize("steps", [1, 2, 15])
@torch.no_grad()
def test_any_number_of_steps_ends(which: str, steps: int) -> None:
    """Also more steps than codes, and one alone."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    watch = lambda i, total, x, x0: seen.append((x, x0))
    model = tiny()
    ids = SAMPLERS[which](model, request(2, steps=steps, callback=watch))
    assert 0 <= ids.min() and ids.max() < 12 and len(seen) == steps
    unknown = [int((x == model.mask_id).sum()) for x, _ in seen]
    assert sorted(unknown, reverse=True) == unknown and (which == "maskgit" or unknown[-1] == 0)
    assert torch.equal(seen[-1][1] if which == "maskgit" else seen[-1][0], ids)


@torch.no_grad()
def test_an_edit_starts_later_and_counts_what_is_unknown() -> None:
    seen: list[Tensor] = []
    sampler = MaskGITSampler(steps=6, start=2)
    r = request(2, callback=lambda i, total, x, x0: seen.append(x))
    sampler(tiny(), r)
    assert r.info["nfe"] == len(seen) == 4
    rate = mask_rate(torch.tensor(3 / 6), "cosine", 12)
    assert int((seen[0][0] == 16 - 4).sum()) == int(12 * rate)
    with pytest.raises(VgmError, match="behind the last"):
        MaskGITSampler(steps=2, start=2)
    with pytest.raises(VgmError, match="behind the last"):
        sampler(tiny(), request(1, steps=2))
    with pytest.raises(VgmError, match="no mask schedule"):
        MaskGITSampler(schedule="sine")


@torch.no_grad()
def test_guidance_grows_or_is_the_same() -> None:
    """Constant or growing from none; a scale of 1 asks for no null class, and a network without one refuses others."""
    assert [scale_at(3.0, "linear", k, 5) for k in range(5)] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert [scale_at(3.0, "constant", k, 5) for k in range(5)] == [3.0] * 5 and scale_at(3.0, "linear", 0, 1) == 1
    plain = tiny("maskgit", null_class=False)
    assert MaskGITSampler(steps=3)(plain, request(2)).shape == (2, 3, 4)
    with pytest.raises(VgmError, match="without a null class"):
        MaskGITSampler(steps=3)(plain, request(2, guidance_scale=2.0))
    with pytest.raises(VgmError, match="needs a class"):
        MaskGITSampler(steps=3)(plain, Request((3, 4), generators([0])))
    model = tiny()
    same = [HaltonSampler(steps=3)(model, request(8, guidance_scale=s)) for s in (1.0, 6.0)]
    assert not torch.equal(*same)


@torch.no_grad()
def test_pictures_grow_beyond_the_models_grid() -> None:
    """Window by window, the middle first; an image given is kept in the middle."""
    places = windows((3, 10), (3, 4))
    assert places[0] in ((0, 2), (0, 4)) and {left for _, left in places} == {0, 2, 4, 6}
    model, sampler = tiny(), HaltonSampler(steps=3, grid=(5, 8))
    assert sampler(model, request(2)).shape == (2, 5, 8)
    images = torch.randint(12, (1, 3, 4), generator=torch.Generator().manual_seed(1))
    ids = sampler(model, request(3, images=images))
    assert (ids[:, 1:4, 2:6] == images).all() and 0 <= ids.min() and ids.max() < 12
    assert not torch.equal(ids[0], ids[1])
    with pytest.raises(VgmError, match="smaller than the model's"):
        HaltonSampler(grid=(2, 4))(model, request(1))
    with pytest.raises(VgmError, match="nothing is left"):
        HaltonSampler()(model, request(1, images=images))
    with pytest.raises(VgmError, match="has no place"):
        sampler(model, request(1, images=torch.zeros(1, 9, 9, dtype=torch.long)))


# -- training ----------------------------------------------------------------------------------------------------------


def test_masks_of_a_step() -> None:
    """So many codes of an image or each with its probability, never below the least; in the Halton order what is left is
    its end; every row is its own."""
    model, n = tiny(), 400
    draw = lambda **more: MaskedCodes(model, **more).mask(n, Step(0), torch.device("cpu"))
    count = draw()
    ratio = Step(0).rand(n, "mask ratio")
    assert torch.equal(count.sum(1), (12 * mask_rate(ratio, "cosine", 12)).ceil().long().clamp(1, 12))
    assert count.sum(1).min() >= 1 and abs(count.float().mean() - 2 / torch.pi) < 0.08
    each = draw(masks="bernoulli", schedule="arccos")
    assert abs(each.float().mean() - 2 / torch.pi) < 0.06 and len(each.unique(dim=0)) > 200
    assert draw(least_masked=0.5).sum(1).min() >= 6
    halton = draw(order="halton")
    order = order_of("halton", 3, 4)
    turned = [{tuple(sorted(order.roll(s)[12 - k :].tolist())) for s in range(12)} for k in range(13)]
    assert all(tuple(row.nonzero().flatten().tolist()) in turned[int(row.sum())] for row in halton)
    with pytest.raises(VgmError, match="no mask schedule"):
        MaskedCodes(model, schedule="sine")


def test_the_loss_is_of_masked_codes_or_of_all() -> None:
    """Codes that are not masked change the loss only where all are counted; the mask's row is what the network sees."""
    batch = {"tokens": torch.randint(12, (4, 3, 4), generator=torch.Generator().manual_seed(0)),
             "cond": {"y": torch.arange(4)}}  # fmt: skip

    class Copies(MaskedTransformer):
        """Says the code that it sees."""

        def __init__(self) -> None:
            super().__init__(12, (3, 4), 4, True, 12)

        def forward(self, ids: Tensor, y: Tensor) -> Tensor:
            return 50.0 * nn.functional.one_hot(ids, 13).float()

    masked, every = (MaskedCodes(Copies(), counted=c, label_smoothing=0)  # type: ignore[arg-type]
                     for c in ("masked", "all"))  # fmt: skip
    (a, logs), (b, _) = masked.loss("main", batch, Step(0)), every.loss("main", batch, Step(0))
    assert a == pytest.approx(50, abs=1e-3) and b == pytest.approx(50 * float(logs["masked"]), abs=1e-3)
    assert logs["accuracy"] < 0.5


class TestTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "maskgit/mnist"
    overrides: ClassVar[tuple[str, ...]] = ("model.hidden_dim=32", "model.depth=1", "model.heads=2", "model.dropout=0")


class TestTrainingBert(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "maskgit/mnist-bert"
    overrides: ClassVar[tuple[str, ...]] = (
        *("model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"),
        *("model.intermediate_size=32", "model.hidden_dropout=0", "model.attn_dropout=0", "objective.counted=all"),
    )

    def test_resume_is_bit_exact(self, tiny_dataset: Path, tmp_run: Path) -> None:
        """Shown by the other network."""


@torch.no_grad()
def test_dropout_and_checkpointing_change_nothing_else() -> None:
    for name in TINY:
        model = tiny(name, checkpointing=True).train()
        ids = torch.randint(12, (2, 12), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        with torch.enable_grad():
            model(ids, torch.arange(2)).square().mean().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.checkpointing = False
        model.zero_grad()
        torch.manual_seed(0)
        with torch.enable_grad():
            model(ids, torch.arange(2)).square().mean().backward()
        for n, p in model.named_parameters():
            torch.testing.assert_close(found[n], p.grad)


# -- through the commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network on the shipped tokenizer's codes, trained for a few steps on twenty digits."""
    from vgm_cli import recipe
    from vgm_cli.engine.train.loop import train

    digits, data = open_dataset("mnist5k"), tmp_path_factory.mktemp("digits")
    labels = digits.labels()
    for y in range(10):
        (data / str(y)).mkdir()
        for i in np.flatnonzero(labels == y)[:2]:
            x = to_uint8(digits.pixels([int(i)]))[0, 0].numpy()
            Image.fromarray(x).save(data / str(y) / f"{i}.png")
    small = (f"data.path={data}", "model.hidden_dim=32", "model.depth=1", "model.heads=2", "train.steps=4", "train.batch_size=16",
             "train.preview_n=0", "train.save_every=0", "train.precision=fp32", "sampler.steps=3")  # fmt: skip
    folder = tmp_path_factory.mktemp("maskgit") / "run"
    train(recipe.load("maskgit/mnist", None, list(small)), folder, quiet_end=True)
    return folder


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted((folder / "restored").glob("*.png"))])


def test_images_are_completed_edited_and_blended(vgm: Cli, run: Path, tmp_path: Path) -> None:
    """By every sampler; the codes that are kept are those of the image; blended, its pixels are the image's own."""
    given = ("restore", "--model", run, "--input", "mnist5k", "-n", 3, "--mask", "right")
    codec = load(str(run)).codec
    truth = None
    for method, *more in (["maskgit", "start=1", "grow=1"], ["halton-confidence"], ["halton"]):
        code, out, err = vgm(*given, "--method", method, *more, "--label", "7", "--out", tmp_path / method, "--json")
        assert code == 0, err
        result = json.loads(out)
        assert result["labels"] == [7, 7, 7] and result["method"]["name"] == method
        assert result["nfe"] == {"maskgit": 2, "halton-confidence": 12, "halton": 32}[method]
    from vgm_cli.engine.restore.inputs import open_truth

    truth = open_truth("mnist5k", (1, 28, 28), 3, None).truth
    assert truth is not None
    with torch.no_grad():
        again = codec.decode(codec.tokens(truth))
    left = np.abs(pictures(tmp_path / "halton")[:, :, :4] / 127.5 - 1 - again[:, 0, :, :4].clamp(-1, 1).numpy())
    assert left.mean() < 0.05, "what is far from the hole is the tokenizer's picture"
    code, _, err = vgm(*given, "--method", "halton", "--blend", "1.5", "--out", tmp_path / "blended")
    assert code == 0, err
    mixed = pictures(tmp_path / "blended")[:, :, :4] / 127.5 - 1
    assert np.abs(mixed - truth[:, 0, :, :4].numpy()).max() < 0.01
    code, _, err = vgm(*given, "--method", "dps")
    assert code == 2 and "--method maskgit" in err and "Traceback" not in err
    code, _, err = vgm("sample", run, "--input", "mnist5k", "-n", 1, "--out", tmp_path / "ignored.png")
    assert code == 2 and "--mask lower" in err


def test_candidates_are_rejected_by_a_judge(vgm: Cli, run: Path, tmp_path: Path) -> None:
    """The best of four is kept, image by image; the picture is made again; a folder of other candidates is refused."""
    sample = ("sample", run, "-n", 6, "--label", "1,7", "--steps", 2)

    def shown(folder: Path) -> Tensor:
        files = sorted(folder.glob("[0-9]*.png"))
        return torch.stack([torch.from_numpy(np.asarray(Image.open(p)).copy()) for p in files])[:, None] / 127.5 - 1

    assert vgm(*sample, "--out", tmp_path / "plain")[0] == 0
    code, out, err = vgm(*sample, "--accept", "0.25", "--out", tmp_path / "best", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["accept"] == {"candidates": 4, "judge": "confidence"}
    assert found["accepted"]["of"] == 24 and found["accepted"]["kept"] > found["accepted"]["all"]
    judge = registry().build("reward", {"name": "confidence"})
    labels = {"label": torch.tensor([1, 7] * 3)}
    plain, best = (judge(shown(tmp_path / name), labels) for name in ("plain", "best"))
    assert bool((best >= plain - 1e-3).all()) and best.mean() > plain.mean()
    code, _, err = vgm(*sample, "--accept", "0.25", "--batch-size", "4", "--out", tmp_path / "grid.png")
    assert code == 0 and "accepted 6 of 24 candidates (25.0%): confidence" in err, err
    code, out, err = vgm("rerun", tmp_path / "grid.png", "--json")
    assert code == 0 and json.loads(out)["identical"], err
    assert vgm(*sample, "--out", tmp_path / "best")[0] == 2 and vgm(*sample, "--accept", "0")[0] == 2
    assert vgm(*sample, "--accept", "0.5", "--judge", "nobody")[0] == 2


def test_steps_become_a_film(vgm: Cli, run: Path, tmp_path: Path) -> None:
    """Codes that are still masked are grey; pictures wider than the model's grid are sampled, too."""
    code, _, err = vgm("sample", run, "-n", 4, "--trace", "--out", tmp_path / "s.png")
    assert code == 0, err
    assert (tmp_path / "s-trace.png").is_file()
    code, _, err = vgm("sample", run, "-n", 2, "--sampler", "halton", "grid=[7,12]", "--out", tmp_path / "wide")
    assert code == 0, err
    assert Image.open(tmp_path / "wide/000000.png").size == (48, 28)
    code, _, err = vgm("sample", run, "-n", 1, "grid=[3,7]", "--out", tmp_path / "x.png")
    assert code == 2 and "smaller than the model's" in err


class TestSampling(suites.SamplerSuite):
    recipe: ClassVar[str] = "maskgit/mnist"
    overrides: ClassVar[tuple[str, ...]] = ("model.hidden_dim=32", "model.depth=1", "model.heads=2", "sampler.steps=3")


def test_a_training_checkpoint_of_the_halton_release(vgm: Cli, tmp_path: Path) -> None:
    """As its trainer saves it, under the words of DDP and torch.compile; what it says is enough to sample with."""
    model = tiny(grid=(4, 4), heads=1)
    state = {f"module._orig_mod.{k}": v for k, v in ck.HALTON.from_ours(model.state_dict()).items()}
    more = {"iter": 3, "global_epoch": 1, "optimizer_state_dict": {"state": {}, "param_groups": []}}
    torch.save({**more, "model_state_dict": state}, tmp_path / "ImageNet_64_mine.pth")
    code, out, err = vgm("convert", tmp_path / "ImageNet_64_mine.pth", tmp_path / "m.safetensors", "--verify", "--json")
    assert code == 0, err
    assert json.loads(out)["from"] == "halton-maskgit"
    loaded = load(str(tmp_path / "m.safetensors"))
    assert loaded.header.recipe["sampler"]["name"] == "halton" and loaded.header.data["image_size"] == 64
    assert same(dict(loaded.model.state_dict()), dict(model.state_dict()))
