"""VAR: golden cases of the official code; counts, checkpoints, the tokenizer's pyramid, sampling, editing, training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from vgm_plugins.var import checkpoints as ck
from vgm_plugins.var.model import VAR
from vgm_plugins.var.objective import TokenizerObjective, VARObjective
from vgm_plugins.var.presets import LADDERS, TOKENIZER, ladder, squares
from vgm_plugins.var.presets import VAR as PRESETS
from vgm_plugins.var.sampler import VARSampler, filtered, kept_grids, next_scales, ratio_of, smooth_codes
from vgm_plugins.var.tokenizer import VARTokenizer, phi_of

from vgm_cli import recipe as recipes
from vgm_cli.api import PyramidTokenizer, Request, Step, generators
from vgm_cli.ar import pyramid
from vgm_cli.data import open_dataset
from vgm_cli.engine import build
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.checkpoint import load
from vgm_cli.engine.tokens import TokenCodec
from vgm_cli.engine.train.optim import group, learning_rate, weight_decay
from vgm_cli.errors import VgmError
from vgm_cli.settings import Optimizer
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

Vgm = Callable[..., tuple[int, str, str]]
golden = GoldenChecks("var")

# -- golden cases ------------------------------------------------------------------------------------------------------


def state_of(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Tensors of a second network in the file, which the case does not list."""
    with safe_open(case.path, "pt") as f:
        return {
            k.removeprefix(prefix): f.get_tensor(k).float().to(case.device) for k in f.keys() if k.startswith(prefix)
        }


def tokenizer_of(case: GoldenCase, state: dict[str, Tensor]) -> VARTokenizer:
    """The tokenizer of a state in the official layout, which reads the case's configuration off its shapes."""
    config, layout = case.config["VQVAE"], ck.TOKENIZER_CONVERTER
    assert layout.recognise(state)
    read = layout.config(state)
    given = {"n_embed": config["vocab_size"], "embed_dim": config["z_channels"], "ch": case.config["ch"],
             "ch_mult": tuple(case.config["ch_mult"]), "num_res_blocks": case.config["num_res_blocks"],
             "share_quant_resi": config["share_quant_resi"]}  # fmt: skip
    if not config["quant_resi"]:  # nothing is convolved, so that no tensor tells how many convolutions there are
        read["share_quant_resi"] = config["share_quant_resi"]
    assert {k: read[k] for k in given} == given
    case.ignore(
        "VQVAE.dropout", "VQVAE.test_mode", "VQVAE.default_qresi_counts", why="nothing is dropped or frozen here"
    )
    own = {"patch_nums": tuple(config["v_patch_nums"]), "quant_resi": config["quant_resi"],
           "using_znorm": config.get("using_znorm", False), "beta": config.get("beta", 0.25)}  # fmt: skip
    model = VARTokenizer(**{**read, **own})
    model.load_state_dict(layout.to_ours(state))
    again = layout.from_ours(model.state_dict())
    assert again.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in again.items())
    case.ignore("seed", "codebook_std", why="the weights are stored")
    return model.eval()


def transformer_of(case: GoldenCase) -> VAR:
    """The transformer of the case's state, which reads the case's configuration off its shapes."""
    config = case.config["VAR"]
    assert ck.CONVERTER.recognise(case.state)
    dropped = ("drop_rate", "attn_drop_rate", "flash_if_available", "fused_if_available")
    case.ignore(*(f"VAR.{k}" for k in dropped), why="nothing is dropped, and kernels make no difference")
    read = ck.CONVERTER.config(case.state)
    given = {"num_classes": config["num_classes"], "depth": config["depth"], "embed_dim": config["embed_dim"],
             "mlp_ratio": config["mlp_ratio"], "shared_aln": config["shared_aln"],
             "attn_l2_norm": config["attn_l2_norm"], "scales": squares(tuple(config["patch_nums"])),
             "channels": case.config["VQVAE"]["z_channels"], "vocab_size": case.config["VQVAE"]["vocab_size"]}  # fmt: skip
    if config["attn_l2_norm"]:
        given["num_heads"] = config["num_heads"]
    assert {k: read[k] for k in given} == given
    own = {"num_heads": config["num_heads"], "norm_eps": config["norm_eps"], "drop_path": config["drop_path_rate"]}
    model = VAR(**{**read, **own})
    model.load_state_dict(ck.CONVERTER.to_ours(case.state))
    again = ck.CONVERTER.from_ours(model.state_dict())
    assert again.keys() == case.state.keys() and all(torch.equal(v, case.state[k]) for k, v in again.items())
    return model.eval()


def features_of(tokenizer: VARTokenizer, ids: Tensor) -> list[Tensor]:
    return list(pyramid.features_after(tokenizer, ids, squares(tokenizer.patch_nums)))


@golden.check(lambda c: "in/idx_given" in c)
def vqvae(case: GoldenCase) -> None:
    model, x, out = tokenizer_of(case, case.state), case.inputs["x"], case.outputs
    scales = squares(model.patch_nums)
    own, phis = model.quantize.quant_resi, case.config["VQVAE"]["share_quant_resi"]
    places = [phi_of(k, len(scales), phis or len(scales)) if phis != 1 else 0 for k in range(len(scales))]
    if case.config["VQVAE"]["quant_resi"]:
        assert len(dict(own.named_parameters())) == 2 * (phis or len(scales))
    assert places == out["phi_index_per_scale"].tolist()
    with torch.no_grad():
        assert_close(model.moments(x), out["f"], 1e-4, "f")
        ids = model.tokens(x)
        assert torch.equal(ids, out["idx"])
        features = features_of(model, ids)
        for name, k in (("f_hat_scale0", 0), ("f_hat_mid", len(scales) // 2), ("f_hat_last", -1)):
            assert_close(features[k], out[name], 1e-4, name)
        assert_close(model.quantize.lookup(ids), out["f_hat_last"], 1e-4, "lookup")
        assert_close(model.decode_tokens(ids), out["rec_last"], 1e-4, "rec_last")
        assert_close(model.decode(model.moments(x)), out["rec_last"], 1e-4, "decode")
        assert_close(pyramid.teacher_inputs(model, ids, scales), out["var_input"], 1e-4, "var_input")
        given = case.inputs["idx_given"]
        assert_close(pyramid.teacher_inputs(model, given, scales), out["given/var_input"], 1e-4, "given/var_input")
        assert_close(model.decode_tokens(given), out["given/img_last"], 1e-4, "given/img_last")
        assert_close(model.decode_tokens(given), out["given/img_last_one"], 1e-4, "given/img_last_one")
        first = scales[0][0] * scales[0][1]
        assert_close(model.decode_tokens(given[:, :first]), out["given/img_scale0"], 1e-4, "given/img_scale0")
        assert_close(model.decode_features(case.inputs["f_hat_given"]), out["given/fhat_to_img"], 1e-4, "fhat_to_img")
    rec, loss, _ = model.train()(x)
    assert_close(rec, out["train/rec"], 1e-4, "train/rec")
    assert_close(loss, out["train/vq_loss"], 1e-5, "train/vq_loss")
    (F.mse_loss(rec, x) + loss).backward()
    theirs = dict(model.named_parameters())
    for name, want in ((k.removeprefix("train/grad/"), v) for k, v in out.items() if k.startswith("train/grad/")):
        gradient = theirs[name].grad
        assert gradient is not None
        assert_close(gradient, want, 1e-3, name)


@golden.check(lambda c: "out/logits_null" in c)
def training_forward(case: GoldenCase) -> None:
    model, tokenizer = transformer_of(case), tokenizer_of(case, state_of(case, "state_vae/"))
    ids, label, out, config = case.inputs["idx"], case.inputs["label"], case.outputs, case.config
    case.ignore("VAR.cond_drop_rate", "VAR.drop_path_rate", why="no label and no branch was dropped")
    case.ignore("head_gain", why="the weights are stored")
    objective = VARObjective(model, tokenizer, label_smoothing=config["label_smooth"])
    seen = pyramid.teacher_inputs(tokenizer, ids, model.scales)
    assert_close(seen, out["x_BLCv_wo_first_l"], 5e-5, "teacher inputs")
    assert_close(model(seen, label), out["logits"], 5e-5, "logits")
    null = model.null_condition({"y": label})["y"]
    assert_close(model(seen, null), out["logits_null"], 5e-5, "logits_null")
    for stage in (s for s in config["prog_si"] if s >= 0):
        assert_close(objective.of(ids, label, stage)[1], out[f"logits_prog{stage}"], 5e-5, f"logits_prog{stage}")
    loss, logits, _ = objective.of(ids, label, len(model.sizes) - 1)
    assert_close(loss, out["loss"], 1e-5, "loss")
    logs = VARObjective(model, tokenizer).logs(logits.detach(), ids)
    sizes = torch.tensor(model.sizes)
    every = torch.stack([logs[f"loss_{h}x{w}"] for h, w in model.scales])
    assert_close((every * sizes).sum() / sizes.sum(), out["val_L_mean"], 1e-5, "val_L_mean")
    assert_close(every[-1], out["val_L_tail"], 1e-5, "val_L_tail")
    loss.backward()
    parameters = dict(model.named_parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1e9)
    for name in config["grads"]:
        gradient = parameters[name].grad
        assert gradient is not None
        assert_close(gradient, out[f"grad/{name}"], 1e-4, name)
    assert_close(norm, out["grad_norm"], 1e-4, "grad_norm")


@golden.check(lambda c: "calls" in c.config)
@torch.no_grad()
def sampling(case: GoldenCase) -> None:
    """Every call: logits after guidance and before the filter, codes, features, images."""
    model, tokenizer = transformer_of(case), tokenizer_of(case, state_of(case, "state_vae/"))
    case.ignore("VAR.cond_drop_rate", "VAR.drop_path_rate", "label_smooth", "prog_si", "grads", why="of training")
    case.ignore("head_gain", why="the weights are stored")
    for name, call in case.config["calls"].items():
        if call.get("top_k") != 1 and not call.get("more_smooth"):
            case.ignore(f"calls.{name}", why="drawn from torch's generator; the filters have a case of their own")
            continue
        sampled_as_published(case, model, tokenizer, name, call)


def sampled_as_published(case: GoldenCase, model: VAR, tokenizer: VARTokenizer, name: str, call: Any) -> None:
    smooth = call.get("more_smooth", False)
    if "g_seed" in call:
        case.ignore(f"calls.{name}.g_seed", why="drawn from torch's generator")
    y = case.inputs["label"]
    sampler = VARSampler(top_k=call.get("top_k") or 0, top_p=call.get("top_p") or 0.0)
    request = Request((sum(model.sizes),), generators(range(len(y))), {"y": y}, codec=tokenizer)
    if edit := call.get("edit"):
        side = model.scales[-1][0]
        rows, columns = (slice(round(edit[a] * side), round(edit[b] * side)) for a, b in (("y0", "y1"), ("x0", "x1")))
        kept = torch.full((side, side), edit["inpainting"])
        kept[rows, columns] = not edit["inpainting"]
        assert torch.equal(kept.float(), case.outputs[f"{name}/mask"])
        request.images = case.inputs["edit_idx"]
        request.mask = kept.repeat_interleave(tokenizer.factor, 0).repeat_interleave(tokenizer.factor, 1).expand(
            len(y), 1, -1, -1
        )  # fmt: skip
    choose, logits = sampler.chooser(model, request, tokenizer), []
    noise = case.inputs["gumbel"].split(model.sizes, dim=1) if smooth else None

    def watched(given: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        logits.append(given)
        ids, codes = choose(given, k)
        if noise is not None:
            left = filtered(given, sampler.top_k, sampler.top_p)
            codes = smooth_codes(left, noise[k], tokenizer.code_vectors(), ratio_of(k, len(model.sizes)))
            if request.mask is not None:
                own, kept = (part[k] for part in sampler.given(model, request))
                codes = torch.where(kept[..., None], tokenizer.code_vectors()[own], codes)
        return ids, codes

    null = model.null_condition({"y": y})["y"]
    ids, features = next_scales(model, tokenizer, y, watched, 1 + call["cfg"], null)
    out = {k.removeprefix(f"{name}/"): v for k, v in case.outputs.items() if k.startswith(f"{name}/")}
    assert_close(torch.cat(logits, dim=1), out["logits"], 5e-5, f"{name} logits")
    assert_close(features, out["f_hat"], 1e-4, f"{name} f_hat")
    assert_close((tokenizer.decode_features(features) + 1) / 2, out["img"], 1e-4, f"{name} img")
    if smooth:
        return
    if request.mask is None:
        assert torch.equal(ids, out["idx"])
        assert torch.equal(VARSampler(guidance_scale=1 + call["cfg"], top_k=1, top_p=0.0)(model, request), ids)
    else:  # the notebook keeps code vectors, and tells what was drawn in their places
        kept = torch.cat(sampler.given(model, request)[1], dim=1)
        assert torch.equal(ids[~kept], out["idx"][~kept]) and torch.equal(ids[kept], request.images[kept])


@golden.check(lambda c: "settings" in c.config)
def filters(case: GoldenCase) -> None:
    for name, (top_k, top_p) in case.config["settings"].items():
        assert_close(filtered(case.inputs["logits"], top_k, top_p), case.outputs[f"filtered/{name}"], 0, name)


T = {"cos": 0.0, "lin00": 0.0, "lin0": 0.05, "lin": 0.15}


def setting_of(
    kind: str, peak: float, wd: float, wd_end: float, wp: int, steps: int, wp0: float, wpe: float
) -> Optimizer:
    """The optimizer node of a recipe for an official schedule."""
    share = T[kind]
    return dataclasses.replace(
        recipes.load("var/imagenet256").optimizer("main"),
        lr=peak,
        weight_decay=wd,
        final_weight_decay=wd_end,
        warmup=wp,
        warmup_from=wp0,
        schedule="cosine" if kind == "cos" else "linear",
        decay_from=(wp + share * (steps - 1 - wp)) / (steps - 1),
        final_lr=wpe * peak,
    )


@golden.check(lambda c: "schedules" in c.config)
def schedules(case: GoldenCase) -> None:
    for name, (kind, peak, wd, wd_end, wp, steps, wp0, wpe) in case.config["schedules"].items():
        setting = setting_of(kind, peak, wd, wd_end, wp, steps, wp0, wpe)
        places = case.inputs["its"].tolist()
        rates = torch.tensor([learning_rate(setting, i, steps) for i in places], dtype=torch.float64)
        decays = torch.tensor([weight_decay(setting, i, steps) for i in places], dtype=torch.float64)
        assert_close(rates, case.outputs[f"{name}/lr"], 1e-9, f"{name}/lr")
        assert_close(decays, case.outputs[f"{name}/wd"], 1e-9, f"{name}/wd")
    for phis, scales in case.config["phi"]:
        assert [phi_of(k, scales, phis) for k in range(scales)] == case.outputs[f"phi_K{phis}_S{scales}"].tolist()


@golden.check(lambda c: c.kind == "var_train_steps")
def training_steps(case: GoldenCase) -> None:
    """Whole steps: labels dropped, scales that are added, learning rate, weight decay, clipping, AdamW."""
    run, config, out = case.config["run"], case.config["VQVAE"], case.outputs
    model = transformer_of(case).train()
    tokenizer = VARTokenizer(**{**TOKENIZER["small"], "n_embed": config["vocab_size"],
                                "embed_dim": config["z_channels"], "patch_nums": tuple(config["v_patch_nums"]),
                                "share_quant_resi": config["share_quant_resi"], "quant_resi": config["quant_resi"],
                                "ch_mult": (1,)})  # fmt: skip
    part = {k: v for k, v in case.inputs.items() if k.startswith("quantize.")}
    missing = tokenizer.load_state_dict(part, strict=False)
    assert not missing.unexpected_keys and {k for k in missing.missing_keys if k.startswith("quantize.")} == {ck.HITS}
    objective = VARObjective(model, tokenizer.to(case.device), label_smoothing=run["label_smooth"])
    steps, accumulate, last = run["steps"], run["accumulate"], len(model.sizes) - 1
    setting = setting_of(
        run["sche"], run["peak_lr"], run["wd"], run["wd_end"], run["wp_it"], steps, run["wp0"], run["wpe"]
    )
    parameters = {f"model.{k}": p for k, p in model.named_parameters()}
    if not case.config["VAR"]["shared_aln"]:
        assert setting.groups[0]["match"].count("ada_gss") == 1
    groups = group(parameters, setting, [model])
    decayed = {n.removeprefix("model.") for g in groups for n in g.names if g.weight_decay is None}
    assert decayed == set(run["decayed_parameters"])
    optimizer = torch.optim.AdamW([{"params": [parameters[n] for n in g.names]} for g in groups], betas=setting.betas)
    assert run["batch"] == case.inputs["idx"].shape[1] and steps == len(case.inputs["idx"])
    warm = {stage for stage in run["prog_si"] if 0 <= stage < last and stage != run["prog_si"][0]}
    if not warm:
        case.ignore("run.prog_wp_it", why="no scale is added to others")
    before = 0
    for k in range(steps):
        for mine, theirs in zip(groups, optimizer.param_groups):
            theirs["lr"] = learning_rate(setting, k, steps)
            decay = weight_decay(setting, k, steps)
            theirs["weight_decay"] = decay if mine.weight_decay is None else mine.weight_decay
        assert_close(torch.tensor(theirs["lr"]).double(), out[f"step{k}.lr"], 1e-6, f"step{k}.lr")
        assert_close(torch.tensor(decay).double(), out[f"step{k}.wd"], 1e-6, f"step{k}.wd")
        drop = case.inputs["drop_u"][k] < case.config["VAR"]["cond_drop_rate"]
        y = torch.where(drop, model.num_classes, case.inputs["label"][k])
        stage = run["prog_si"][k]
        before = k if k and stage != run["prog_si"][k - 1] else before
        ramp = 1.0 if before == 0 or stage in (-1, last) else max(min((k - before + 1) / run["prog_wp_it"], 1.0), 0.01)
        loss, _, _ = objective.of(case.inputs["idx"][k], y, last if stage < 0 else stage, ramp)
        assert_close(loss, out[f"step{k}.loss"], 1e-4, f"step{k}.loss")
        (loss / accumulate).backward()
        if (k + 1) % accumulate == 0:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip"])
            assert_close(norm, out[f"step{k}.grad_norm"], 1e-3, f"step{k}.grad_norm")
            optimizer.step()
            optimizer.zero_grad()
    case.ignore("VAR.drop_path_rate", why="no branch was dropped")
    for name, want in ((k.removeprefix("final."), v) for k, v in out.items() if k.startswith("final.")):
        # Adam divides gradients by their own size, rounding included
        assert_close(parameters[f"model.{name}"], want, 1e-5, name, floor=0.02 * run["peak_lr"])


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes and layouts -------------------------------------------------------------------------------------------------

COUNTS = {"VAR-d16": (310_283_520, 680), "VAR-d20": (600_917_136, 680), "VAR-d24": (1_033_399_360, 680),
          "VAR-d30": (2_010_020_356, 680), "VAR-d36-s": (2_353_893_904, 2240)}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = VAR(**PRESETS[name])
    assert (sum(p.numel() for p in model.parameters()), sum(model.sizes)) == COUNTS[name]
    assert (model.heads, model.head_dim) == (PRESETS[name]["depth"], 64)
    read = ck.CONVERTER.config(ck.CONVERTER.from_ours(model.state_dict()))
    assert read["scales"] == model.scales and read["drop_path"] == PRESETS[name]["drop_path"]


def test_published_tokenizer() -> None:
    with torch.device("meta"):
        model = VARTokenizer(**TOKENIZER["var-vq"])
    parts = (model, model.encoder, model.decoder, model.quantize)
    assert [sum(p.numel() for p in m.parameters()) for m in parts] == [108_948_355, 44_107_872, 64_653_923, 168_064]
    read = ck.TOKENIZER_CONVERTER.config(ck.TOKENIZER_CONVERTER.from_ours(model.state_dict()))
    assert {k: v for k, v in TOKENIZER["var-vq"].items() if read[k] != v} == {}
    assert read["patch_nums"] == model.patch_nums == LADDERS[16]


def test_grids_of_other_sizes() -> None:
    assert [ladder(n) for n in (1, 7, 8, 16)] == [(1,), (1, 2, 4, 7), (1, 2, 4, 8), LADDERS[16]]
    tokenizer = tiny_tokenizer()
    with pytest.raises(VgmError, match="28x28, not 32x32") as e:
        tokenizer.scales((1, 32, 32))
    assert e.value.hint == "patch_nums=[1,2,4,8]"
    with pytest.raises(VgmError, match="coarse to fine"):
        tiny_tokenizer(patch_nums=(2, 2, 7))
    with pytest.raises(VgmError, match="one grid"):
        VAR(scales=())
    with pytest.raises(VgmError, match="several scales"):
        VARObjective(tiny(), torch.nn.Identity())


def test_a_training_checkpoint_holds_both(vgm: Vgm) -> None:
    """trainer.var_wo_ddp and trainer.vae_local of ar-ckpt-last.pth, beside optimizer and arguments."""
    model, tokenizer = tiny(), tiny_tokenizer(ch=32, norm_groups=32, attn_type="vanilla")
    trainer = {
        "config": {"patch_nums": [1, 2, 4, 7], "prog_it": 0},
        "var_wo_ddp": ck.CONVERTER.from_ours(model.state_dict()),
        "vae_local": ck.TOKENIZER_CONVERTER.from_ours(tokenizer.state_dict()),
        "var_opt": {"optimizer": {"state": {}, "param_groups": []}},
    }
    torch.save({"epoch": 3, "iter": 0, "trainer": trainer, "args": {"depth": 2}}, "ar-ckpt-last.pth")
    for name, network, more in (("var", model, ()), ("var-tokenizer", tokenizer, ("patch_nums=[1,2,4,7]",))):
        code, _, err = vgm("convert", "ar-ckpt-last.pth", f"{name}.safetensors", *more, "--from", name)
        assert code == 0, err
        loaded = load(Path(f"{name}.safetensors")).model.state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in network.state_dict().items())


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def tiny_tokenizer(**more: Any) -> VARTokenizer:
    torch.manual_seed(0)
    own = {"n_embed": 16, "embed_dim": 4, "ch": 8, "norm_groups": 4, "in_channels": 1, "resolution": 28}
    model = VARTokenizer(**{**TOKENIZER["small"], **own, **more})
    suites.randomise(model)
    return model.eval()


def tiny(**more: Any) -> VAR:
    torch.manual_seed(0)
    own = {"scales": squares((1, 2, 4, 7)), "vocab_size": 16, "channels": 4, "num_classes": 3}
    model = VAR(**{**own, "depth": 2, "embed_dim": 32, "num_heads": 2, **more})
    suites.randomise(model, scale=0.2)
    return model.eval()


def blobs(n: int) -> Tensor:
    return F.interpolate(torch.randn(n, 1, 5, 5, generator=torch.Generator().manual_seed(3)), 28, mode="bicubic").tanh()


@torch.no_grad()
def test_a_pyramid_of_tokens() -> None:
    """Every beginning of the ids that ends with a scale is decoded, to what the features of these scales are."""
    tokenizer, x = tiny_tokenizer(), blobs(3)
    assert isinstance(tokenizer, PyramidTokenizer) and tokenizer.token_shape((1, 28, 28)) == (70,)
    codec = TokenCodec(tokenizer)
    ids = codec.encode(x)
    images = [codec.decode(f) for f in features_of(tokenizer, ids)]
    for end, image in zip((1, 5, 21, 70), images):
        torch.testing.assert_close(codec.decode(ids[:, :end]), image)
    assert not torch.equal(images[0], images[-1])
    with pytest.raises(VgmError, match="whole number of scales"):
        codec.decode(ids[:, :6])


def test_gradients_pass_straight_through() -> None:
    """Those of a coarse sum reach what a coarse grid sees, and no detail that its codes can't follow."""
    tokenizer = tiny_tokenizer()
    z = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    gradient = {k: torch.autograd.grad((tokenizer.quantize(z, keep=k)[0] * weight).sum(), z)[0] for k in (None, 4, 1)}
    assert torch.equal(gradient[None], weight) and torch.equal(gradient[4], weight)
    torch.testing.assert_close(gradient[1], weight.mean((2, 3), keepdim=True).expand_as(weight))
    two = tokenizer.quantize(z, keep=2)
    torch.testing.assert_close(two[0], tokenizer.quantize.lookup(two[2][:, :5]))


def test_codes_move_onto_what_is_left() -> None:
    """Dead codes, and at the start all of them, lie on features of some scale; others stay."""
    tokenizer, x = tiny_tokenizer(), blobs(8)
    quantize = tokenizer.quantize
    far = torch.tensor([3, 7])
    with torch.no_grad():
        z = tokenizer.moments(x)
        for name, p in quantize.quant_resi.named_parameters():
            p.mul_(not name.endswith("bias"))  # what phi makes of codes of zero is zero
    quantize.place(z)
    means = torch.cat([F.adaptive_avg_pool2d(z, p).permute(0, 2, 3, 1).flatten(0, 2) for p in quantize.patch_nums])
    assert (quantize.codebook.detach()[:, None] - means).norm(dim=-1).min(1).values.max() < 1e-5
    objective = TokenizerObjective(tokenizer.train(), restart_every=2, truncation=0.5)
    with torch.no_grad():
        quantize.embedding.weight[far] += 100
    before = quantize.embedding.weight.clone()
    for i in range(2):
        _, logs = objective.loss("autoencoder", {"x": x}, Step(i))
        objective.after_step(Step(i))
    unused = quantize.ema_vocab_hit_SV.sum(0) == 0
    assert unused[far].all() and not unused.all()
    same = (quantize.embedding.weight == before).all(1)
    assert torch.equal(same, ~unused)
    assert logs["perplexity_1x1"] >= 1 and logs["perplexity_7x7"] > logs["perplexity_1x1"]
    assert logs["usage_4x4"] == (quantize.ema_vocab_hit_SV[2] > 0).float().mean()
    again = TokenizerObjective(tokenizer, place_after=(1,))
    with torch.no_grad():
        quantize.embedding.weight.zero_()
    again.loss("autoencoder", {"x": x}, Step(0))
    again.after_step(Step(0))
    assert quantize.embedding.weight.any(1).all(), "all codes moved"
    assert {objective.kept(Step(i)) for i in range(40)} == {None, 1, 2, 3}


# -- the transformer ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sampling_sees_what_training_saw() -> None:
    """The cached logits of every grid are those of the whole sequence under the mask, guided or not."""
    model, tokenizer = tiny(), tiny_tokenizer()
    y = torch.tensor([0, 1, 2])
    found: list[Tensor] = []

    def largest(logits: Tensor, k: int) -> tuple[Tensor, None]:
        found.append(logits)
        return logits.argmax(-1), None

    for w in (1.0, 3.0):
        found.clear()
        null = model.null_condition({"y": y})["y"]
        ids, features = next_scales(model, tokenizer, y, largest, w, null)
        seen = pyramid.teacher_inputs(tokenizer, ids, model.scales)
        wanted, worse = (model(seen, label).split(model.sizes, dim=1) for label in (y, null))
        for k, logits in enumerate(found):
            t = (w - 1) * k / 3
            torch.testing.assert_close(logits, (1 + t) * wanted[k] - t * worse[k], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features, tokenizer.quantize.lookup(ids))


def asked(n: int, first: int = 0, **more: Any) -> Request:
    items = range(first, first + n)
    return Request(
        (70,),
        generators(items),
        {"y": torch.tensor([i % 3 for i in items])},
        codec=TokenCodec(tiny_tokenizer()),
        **more,
    )


@torch.no_grad()
@pytest.mark.parametrize("smooth", [False, True])
def test_an_item_does_not_depend_on_its_batch(smooth: bool) -> None:
    model, film = tiny(), []
    sampler = VARSampler(more_smooth=smooth, guidance_scale=2.0)
    request = asked(4, callback=lambda i, total, x, x0: film.append((i, total, x)))
    before = torch.get_rng_state()
    together = sampler(model, request)
    assert torch.equal(torch.get_rng_state(), before), "a draw from the global stream"
    alone = torch.cat([sampler(model, asked(1)), sampler(model, asked(3, 1))])
    torch.testing.assert_close(together, alone)
    assert not torch.equal(together[0], together[3]), "items of one class"
    assert request.info["nfe"] == 4 and [(i, total) for i, total, _ in film] == [(k, 4) for k in range(4)]
    images = request.codec.decode(together)
    assert images.shape == (4, 1, 28, 28)
    torch.testing.assert_close(request.codec.decode(film[-1][2]), images)
    with pytest.raises(VgmError, match="without its tokenizer"):
        sampler(model, Request((70,), generators([0])))


@torch.no_grad()
@pytest.mark.parametrize("smooth", [False, True])
def test_what_is_kept_stays(smooth: bool) -> None:
    """On every scale; the first grid too, unless it is told to follow the mask."""
    model = tiny()
    ids = asked(3).codec.encode(blobs(3))
    mask = torch.ones(3, 1, 28, 28, dtype=torch.bool)
    mask[..., :14, :] = False  # the upper half is made anew
    made = {}
    for coarsest in (True, False):
        request = asked(3, images=ids, mask=mask)
        sampler = VARSampler(keep_coarsest=coarsest, more_smooth=smooth)
        made[coarsest] = sampler(model, request)
        kept = sampler.given(model, request)[1]
        assert [k.view(3, *s)[0].tolist() for k, s in zip(kept, model.scales)][:2] == [
            [[coarsest]], [[False, False], [True, True]]]  # fmt: skip
        assert kept[3].view(3, 7, 7)[0].all(1).tolist() == [False] * 4 + [True] * 3
        if not smooth:
            every = torch.cat(kept, dim=1)
            assert torch.equal(made[coarsest][every], ids[every])
            assert not torch.equal(made[coarsest][~every], ids[~every])
    assert not torch.equal(made[True], made[False])
    whole = VARSampler(more_smooth=smooth)(model, asked(3, images=ids, mask=torch.ones_like(mask)))
    codec = asked(3).codec
    torch.testing.assert_close(codec.decode(whole), codec.decode(ids))


def test_half_a_code_is_not_kept() -> None:
    kept = torch.tensor([[[True, False], [False, False]]])
    assert [g.tolist() for g in kept_grids(kept, squares((1, 2)))] == [[[True]], [[True, False, False, False]]]
    assert kept_grids(kept, squares((1,)), coarsest=False)[0].tolist() == [[False]]


# -- training ----------------------------------------------------------------------------------------------------------


def released_stages(
    steps: int, scales: int, first: int, begin: int, share: float, warm: int
) -> list[tuple[int, float]]:
    """What the released loop keeps between steps: the stage, and how long it has lasted."""
    found, last, lasted, is_first = [], -1, 0, True
    for i in range(steps):
        if i <= begin:
            stage = first
        elif i >= steps * share:
            stage = scales - 1
        else:
            progress = min(max((i - begin) / (steps * share - begin), 0), 1)
            stage = first + round(progress * (scales - 1 - first))
        if stage != last:
            is_first, last, lasted = last == -1, stage, 0
        lasted += 1
        weight = 1.0 if is_first else max(min(lasted / warm, 1), 0.01)
        found.append((stage, 1.0 if stage == scales - 1 else weight))
    return found


@pytest.mark.parametrize(("first", "begin", "share", "warm"), [(0, 3, 0.8, 5), (1, 0, 1.0, 200), (3, 2, 0.5, 1)])
def test_scales_are_added_one_after_the_other(first: int, begin: int, share: float, warm: int) -> None:
    objective = VARObjective(tiny(), tiny_tokenizer(), progressive=share, progressive_first=first,
                             progressive_begin=begin, progressive_warmup=warm)  # fmt: skip
    got = [objective.stage(Step(i, total=50)) for i in range(50)]
    want = released_stages(50, 4, first, begin, share, warm)
    assert [stage for stage, _ in got] == [stage for stage, _ in want]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in want])
    ids = torch.randint(16, (2, 70), generator=torch.Generator().manual_seed(0))
    loss, logs = objective.loss("main", {"tokens": ids}, Step(0, total=50))
    assert loss.isfinite() and [k for k in logs if k.startswith("loss_")] == [
        f"loss_{p}x{p}" for p in (1, 2, 4, 7)[: first + 1]
    ]


def test_every_position_weighs_the_same() -> None:
    model, tokenizer = tiny(), tiny_tokenizer()
    ids, y = torch.randint(16, (3, 70), generator=torch.Generator().manual_seed(0)), torch.arange(3)
    loss, logs = VARObjective(model, tokenizer).loss("main", {"tokens": ids, "cond": {"y": y}}, Step(0))
    sizes = (1, 4, 16, 49)
    mean = sum(n * logs[f"loss_{p}x{p}"] for n, p in zip(sizes, (1, 2, 4, 7))) / 70
    torch.testing.assert_close(loss, mean)
    nats, kind = model.log_likelihood(ids, generators(range(3)), y, codec=TokenCodec(tokenizer))
    torch.testing.assert_close(nats.mean() / -70, loss)
    assert kind == "exact, of the codes given the class"
    with pytest.raises(VgmError, match="without the tokenizer"):
        model.log_likelihood(ids, generators(range(3)))
    right = sum(n * logs[f"accuracy_{p}x{p}"] for n, p in zip(sizes, (1, 2, 4, 7))) / 70
    torch.testing.assert_close(logs["accuracy"], right)


QUICK = ("train.steps=2", "train.save_every=2", "train.preview_n=0", "train.batch_size=8")
LITTLE = ("model.n_embed=16", "model.embed_dim=4", "model.ch=8", "model.norm_groups=4")
SMALL = ("model.depth=2", "model.embed_dim=32", "model.num_heads=2")


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "tokenizer.safetensors"
    own = {"n_embed": 16, "embed_dim": 4, "ch": 8, "norm_groups": 4, "in_channels": 1, "resolution": 28}
    component = {"kind": "codec", "name": "var-tokenizer", "kwargs": {**TOKENIZER["small"], **own}}
    ckpt.save_network(path, tiny_tokenizer().state_dict(), ckpt.Header(component=component))
    return path


class TestTokenizerTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "var/mnist-tokenizer"
    overrides: ClassVar[tuple[str, ...]] = (*LITTLE, "objective.restart_every=3", "objective.place_codes=false")


class TestTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "var/mnist"

    @pytest.fixture(autouse=True)
    def with_codec(self, tokenizer_file: Path) -> None:
        self.codec = ckpt.read_codec(tokenizer_file, output="tokens")
        node = f"codec={{name: var-tokenizer, weights: {tokenizer_file}, output: tokens}}"
        self.overrides = (*SMALL, node, "codec.fallback=null")  # type: ignore[misc]

    def built(self, *more: str) -> Any:
        """With the codec itself, through which inputs are computed."""
        r = self.load(*more)
        facts = build.declared_facts(r.node("data")).after(self.codec)
        torch.manual_seed(0)
        made = build.build_objective(r, facts, {"codec": self.codec})
        suites.randomise(made.networks["model"])
        return r, made, facts


def test_shipped_tokenizer() -> None:
    """Digits that it never saw come back; every grid's codes are used; the recipe takes it."""
    node = recipes.load("var", None).config["codec"]
    path = ckpt.resolve(node["weights"])
    codec = ckpt.read_codec(path, output=node["output"])
    assert codec.latent_shape((1, 28, 28)) == (70,) and path.stat().st_size < 700_000
    x = open_dataset("mnist5k", split="test", quiet=True).pixels(range(500))
    with torch.no_grad():
        ids = codec.encode(x)
        mse = (codec.decode(ids).clamp(-1, 1) - x).square().mean() / 4
    assert -10 * mse.log10() > 20
    assert len(ids.unique()) > 0.9 * codec.vocab_size
    assert all(len(ids[:, k].unique()) > 16 for k in (0, 1, 5, 21))


def test_from_pixels_to_an_edited_image(tmp_run: Path, tiny_dataset: Path, vgm: Vgm) -> None:
    """Both stages, samples coarse to fine, and the lower half of an image made anew."""
    codec, run, data = tmp_run / "codec", tmp_run / "var", f"data.path={tiny_dataset}"
    code, _, err = vgm("train", "var", "--recipe", "mnist-tokenizer", *QUICK, *LITTLE, data, "--out", codec)
    assert code == 0, err
    code, out, err = vgm("inspect", codec)
    assert code == 0 and "70 of 16 codes an image" in out, out
    code, _, err = vgm("train", "var", "--codec", codec, *QUICK, *SMALL, data, "--out", run)
    assert code == 0, err
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"loss_{p}x{p}" for p in (1, 2, 4, 7)} <= row.keys()
    own = ckpt.read_header(ckpt.resolve(run)).component["kwargs"]
    assert own["scales"] == [[p, p] for p in (1, 2, 4, 7)] and (own["vocab_size"], own["channels"]) == (16, 4)
    code, out, err = vgm("evaluate", run, "--metrics", "bits-per-dim", "-n", 4, "--json")
    assert code == 0, err
    assert json.loads(out)[0]["metric"] == "bits-per-latent-dim" and json.loads(out)[0]["value"] == pytest.approx(
        4, 0.2
    )
    code, _, err = vgm("sample", run, "-n", 2, "--label", 1, "--trace", "--out", tmp_run / "a.png")
    assert code == 0, err
    with Image.open(tmp_run / "a-trace.png") as film:
        assert film.width > 3 * 28 and film.height > 2 * 28
    code, _, err = vgm("sample", run, "-n", 2, "--steps", 7, "more_smooth=true", "--out", tmp_run / "b.npz")
    assert code == 0 and "steps" in err, err
    args = ("--method", "var", "--mask", "lower", "--input", tiny_dataset, "-n", 2, "--out", tmp_run / "edited")
    code, _, err = vgm("restore", "--model", run, *args)
    assert code == 0, err
    found = json.loads((tmp_run / "edited/results.json").read_text())
    assert found["nfe"] == 4 and found["method"]["name"] == "var" and found["labels"] is None


@pytest.mark.parametrize("name", ["mnist", "mnist-tokenizer", "tokenizer", "imagenet256", "imagenet512"])
def test_recipe(name: str) -> None:
    suite = suites.RecipeSuite()
    suite.recipe = f"var/{name}"
    suite.test_opens_with_what_it_is()
    suite.test_validates_and_builds()
