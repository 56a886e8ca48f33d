"""VQ-VAE: golden cases of sonnet, the zalando notebook, pythae and taming; counts, checkpoints, priors, training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vgm_plugins.vqvae import checkpoints as ck
from vgm_plugins.vqvae.model import VQVAE, uniform_prior_bits
from vgm_plugins.vqvae.objective import PriorObjective, VQVAEObjective
from vgm_plugins.vqvae.presets import AUTOENCODER
from vgm_plugins.vqvae.prior import GatedPixelCNN, MaskedPixelCNN
from vgm_plugins.vqvae.sampler import InterpolationSampler, PriorSampler

from vgm_cli.api import Request, Step, Tokenizer, generators
from vgm_cli.ar.sampling import Decoding, generate
from vgm_cli.data import open_dataset
from vgm_cli.data.latents import open_latents
from vgm_cli.engine.checkpoint import load
from vgm_cli.engine.tokens import TokenCodec, as_output, compression_factor
from vgm_cli.errors import VgmError
from vgm_cli.nn.quantize import EMAVectorQuantizer, GroupedQuantizer, VectorQuantizer, code_usage
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("vqvae")

# -- golden cases: quantizers ------------------------------------------------------------------------------------------


def last(x: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, h, w, c)."""
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    """(B, h, w, c) -> (B, c, h, w)."""
    return x.permute(0, 3, 1, 2)


def passed(quantize: VectorQuantizer, z: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """One training pass of z (B, c, h, w): outputs, and gradients of the loss alone and with sum(codes * upstream)."""
    z = z.clone().requires_grad_()
    quantize.zero_grad()
    codes, loss, indices = quantize(z)
    (alone,) = torch.autograd.grad(loss, z, retain_graph=True)
    (loss + (codes * upstream).sum()).backward()
    assert z.grad is not None
    return {"codes": codes, "loss": loss, "indices": indices, "grad_loss": alone, "grad": z.grad,
            "perplexity": code_usage(indices, len(quantize.embedding.weight))["perplexity"]}  # fmt: skip


def steps_of(case: GoldenCase) -> list[dict[str, Tensor]]:
    """Outputs by step, of as many as there are inputs."""
    return [
        {k.partition(".")[2]: v for k, v in case.outputs.items() if k.startswith(f"step{i}.")}
        for i in range(len(case.inputs["z"]))
    ]


def by_reference(steps: list[dict[str, Tensor]], name: str) -> bool:
    """Whether a file holds a buffer that is written in place as it was after the last step, under every step."""
    return len(steps) > 1 and all(torch.equal(out[name], steps[-1][name]) for out in steps)


def averages_of(case: GoldenCase, flavour: str) -> dict[str, Any]:
    """Keywords of moving averages; the smoothing is the official default where a config names none."""
    c = case.config
    return {"decay": c["decay"], "eps": c.get("epsilon", c.get("eps", 1e-5)), "flavour": flavour}


def quantizer(config: Any, ema: bool, n: int, dim: int, **more: Any) -> VectorQuantizer:
    return (EMAVectorQuantizer if ema else VectorQuantizer)(n, dim, **more)


@golden.check(lambda c: c.kind == "sonnet_quantizer")
def sonnet_quantizer(case: GoldenCase) -> None:
    config, ema = case.config, case.config["ema"]
    if not ema:
        case.ignore("decay", "epsilon", why="this codebook follows its loss")
    more = averages_of(case, "sonnet") if ema else {"legacy": False}
    quantize = quantizer(config, ema, config["K"], config["D"], beta=config["beta"], **more)
    assert case.state["embeddings"].shape == (config["D"], config["K"])
    with torch.no_grad():
        quantize.embedding.weight.copy_(case.state["embeddings"].T)
    for z, out in zip(case.inputs["z"], steps_of(case)):
        got = passed(quantize, first(z), first(case.inputs["upstream"]))
        assert torch.equal(got["indices"], out["encoding_indices"])
        assert_close(last(got["codes"]), out["quantize"], 1e-5, "quantize")
        assert_close(got["loss"][None], out["loss"].view(1), 1e-5, "loss")
        assert_close(got["perplexity"][None], out["perplexity"].view(1), 1e-5, "perplexity")
        assert_close(last(got["grad_loss"]), out["grad_z_loss"], 1e-5, "grad_z_loss")
        assert_close(last(got["grad"]), out["grad_z_total"], 1e-5, "grad_z_total")
        book = quantize.embedding
        if not ema:
            assert_close(book.weight.grad.T, out["grad_embeddings"], 1e-5, "grad_embeddings")
            continue
        assert_close(book.cluster_size, out["ema_cluster_size.hidden"], 1e-5, "hidden counts")
        assert_close(book.cluster_size_debiased, out["ema_cluster_size.average"], 1e-5, "counts")
        assert_close(book.embed_avg.T, out["ema_dw.hidden"], 1e-5, "hidden sums")
        assert_close(book.embed_avg_debiased.T, out["ema_dw.average"], 1e-5, "sums")
        assert_close(book.weight.T, out["embeddings"], 1e-4, "embeddings")
    if "out/eval.loss" in case:
        codes, loss, _ = quantize.eval()(first(case.inputs["z"][0]))
        assert_close(last(codes), case.outputs["eval.quantize"], 1e-5, "eval.quantize")
        assert_close(loss[None], case.outputs["eval.loss"].view(1), 1e-5, "eval.loss")


@golden.check(lambda c: c.kind == "zalando_quantizer")
def zalando_quantizer(case: GoldenCase) -> None:
    config, ema = case.config, case.config["ema"]
    if not ema:
        case.ignore("decay", "epsilon", why="this codebook follows its loss")
    more = averages_of(case, "zalando") if ema else {"legacy": False}
    quantize = quantizer(config, ema, config["K"], config["D"], beta=config["beta"], **more)
    names = ck.ZALANDO_BOOK | (ck.ZALANDO_AVERAGES if ema else {})
    quantize.load_state_dict(ck.complete(case.state, names))
    for z, out in zip(case.inputs["z"], steps_of(case)):
        got = passed(quantize, z, case.inputs["upstream"])
        assert torch.equal(got["indices"].flatten(), out["indices"])
        for name, theirs in (("codes", "zq"), ("loss", "loss"), ("perplexity", "perplexity"), ("grad", "grad_z")):
            assert_close(got[name], out[theirs], 1e-5, theirs)
        if ema:
            for name, theirs in names.items():
                tolerance = 1e-4 if theirs == "_embedding.weight" else 1e-5
                assert_close(quantize.state_dict()[name], out[theirs], tolerance, theirs)
        else:
            assert_close(quantize.embedding.weight.grad, out["grad_embedding"], 1e-5, "grad_embedding")


@golden.check(lambda c: c.kind == "pythae_quantizer")
def pythae_quantizer(case: GoldenCase) -> None:
    config = case.config["q"]
    ema = config.get("use_ema", False)
    case.ignore("q.input_dim", "q.latent_dim", why="they are of the encoder before the quantizer")
    more: dict[str, Any] = {"beta": config.get("commitment_loss_factor", 0.25), "reduction": "sum"}
    if ema:
        more |= {"decay": config.get("decay", 0.99), "flavour": "pythae"}
        case.ignore("q.quantization_loss_factor", why="averages have no such term")
    else:
        more |= {"legacy": False, "codebook_weight": config.get("quantization_loss_factor", 1.0)}
        case.ignore("q.decay", why="this codebook follows its loss")
    quantize = quantizer(config, ema, config["num_embeddings"], case.config["embedding_dim"], **more)
    names = ck.PYTHAE_AVERAGES if ema else ck.PYTHAE_BOOK
    quantize.load_state_dict(ck.complete(case.state, names))
    steps = steps_of(case)
    for i, (z, out) in enumerate(zip(case.inputs["z"], steps)):
        got = passed(quantize, first(z), case.inputs["upstream"])
        assert torch.equal(got["indices"].flatten(), out["indices"].flatten())
        assert_close(got["codes"], out["quantized"], 1e-5, "quantized")
        assert_close(got["loss"], out["loss"].view(()), 1e-5, "loss")
        assert_close(last(got["grad"]), out["grad_z"], 1e-5, "grad_z")
        for name, theirs in names.items():
            if ema and (i == len(steps) - 1 or not by_reference(steps, theirs)):
                tolerance = 1e-4 if name == "embedding.weight" else 1e-5
                assert_close(quantize.state_dict()[name], out[theirs], tolerance, theirs)


@golden.check(lambda c: c.kind == "taming_ema")
def taming_ema(case: GoldenCase) -> None:
    config, steps = case.config, steps_of(case)
    quantize = EMAVectorQuantizer(config["K"], config["D"], **averages_of(case, "taming"))
    names = ("weight", "cluster_size", "embed_avg")
    quantize.load_state_dict({f"embedding.{n}": case.state[n] for n in names})
    for i, (z, out) in enumerate(zip(case.inputs["z"], steps)):
        codes, _, indices = quantize(z.T[None, :, :, None].requires_grad_())
        assert torch.equal(indices.flatten(), out["indices"])
        assert_close(codes[0, :, :, 0].T, out["zq"], 1e-5, "zq")
        for n in names:
            if i == len(steps) - 1 or not by_reference(steps, n):
                assert_close(getattr(quantize.embedding, n), out[n], 1e-4 if n == "weight" else 1e-5, n)


@golden.check(lambda c: c.kind == "paper_vqvae_equations")
def paper_equations(case: GoldenCase) -> None:
    """Equations 1 to 3, the appendix's averages without smoothing, the bound, the compression. fp32 beside float64."""
    config, inputs = case.config, case.inputs
    k, dim = case.state["e"].shape
    averages = EMAVectorQuantizer(k, dim, config["beta"], config["gamma"], eps=0.0, reduction="sum")
    averages.load_state_dict(
        {
            f"embedding.{a}": case.state[b].float()
            for a, b in (("weight", "e"), ("cluster_size", "N"), ("embed_avg", "m"))
        }
    )
    for z, out in zip(inputs["z"].float(), steps_of(case)):
        plain = VectorQuantizer(k, dim, config["beta"], legacy=False, reduction="sum", codebook_weight=1.0)
        plain.load_state_dict({"embedding.weight": averages.embedding.weight.clone()})
        latents = z.T[None, :, :, None]  # (1, D, N, 1)
        got = passed(averages, latents, inputs["upstream"].float().T[None, :, :, None])
        terms = plain.terms(latents)[3]
        terms["codebook"].backward()
        assert torch.equal(got["indices"].flatten(), out["indices"])
        assert_close(got["codes"][0, :, :, 0].T, out["zq"], 1e-5, "zq")
        assert_close(terms["codebook"], out["codebook_loss_sum"].view(()), 1e-5, "codebook_loss_sum")
        assert_close(config["beta"] * terms["commitment"], out["commitment_sum"].view(()), 1e-5, "commitment_sum")
        assert_close(plain.embedding.weight.grad, out["grad_e_codebook_sum"], 1e-5, "grad_e_codebook_sum")
        want = out["grad_z_straight_through_plus_commitment"]
        assert_close(got["grad"][0, :, :, 0].T, want, 1e-5, "grad_z")
        for name, theirs in (("cluster_size", "N"), ("embed_avg", "m"), ("weight", "e")):
            assert_close(getattr(averages.embedding, name), out[theirs], 1e-5, theirs)
    bits = uniform_prior_bits(inputs["nll_nats"], config["n_latents"], k, config["image_dims"])
    assert_close(bits, case.outputs["bits_per_dim_uniform_prior"], 1e-12, "bits")
    factor = compression_factor(config["image_dims"], config["n_latents"], k)
    assert_close(torch.tensor([factor]).double(), case.outputs["compression_factor"], 1e-6, "compression_factor")


# -- golden cases: whole models, and a prior ---------------------------------------------------------------------------


def network(case: GoldenCase, layout: Any, **more: Any) -> VQVAE:
    """The case's weights through the converter, which reads the same configuration off them as the case says."""
    assert layout.recognise(case.state)
    read = layout.config(case.state)
    assert {k: read[k] for k in more if k in read} == {k: v for k, v in more.items() if k in read}
    model = VQVAE(**{**read, **more})
    model.load_state_dict(layout.to_ours(case.state))
    again = layout.from_ours(model.state_dict())
    assert again.keys() == case.state.keys() and all(torch.equal(v, case.state[k]) for k, v in again.items())
    return model


def sizes(config: Any, n_embed: str, dim: str) -> dict[str, Any]:
    return {
        "channels": config["num_hiddens"],
        "residual_channels": config["num_residual_hiddens"],
        "residual_layers": config["num_residual_layers"],
        "embed_dim": config[dim],
        "n_embed": config[n_embed],
    }


@golden.check(lambda c: c.kind == "sonnet_autoencoder")
def sonnet_autoencoder(case: GoldenCase) -> None:
    """Outputs, gradients, and some steps of Adam."""
    config, out = case.config, case.outputs
    model = network(case, ck.SONNET, **sizes(config, "num_embeddings", "embedding_dim"),
                    beta=config["commitment_cost"], quantizer="ema" if config["ema"] else "loss",
                    ema_decay=config["decay"])  # fmt: skip
    if not config["ema"]:
        case.ignore("decay", why="this codebook follows its loss")
    objective = VQVAEObjective(model, data_variance=config["data_variance"])
    batches = [2 * first(x) for x in case.inputs["x"]]  # the case's images are in [-1/2, 1/2]
    assert len(batches) == config["steps"] and batches[0].shape[-1] == config["image_size"]
    with torch.no_grad():
        model.eval()
        assert_close(last(model.moments(batches[0])), out["eval.z"], 2e-5, "eval.z")
        recon, vq_loss, ids = model(batches[0])
        rec, _ = objective.reconstruction(batches[0], recon, ids)
        assert torch.equal(ids, out["eval.indices"])
        assert_close(last(recon) / 2, out["eval.x_recon"], 2e-5, "eval.x_recon")
        found = {"vq_loss": vq_loss, "recon_error": rec, "loss": rec + vq_loss, **code_usage(ids, model.codebook_size)}
        for name in ("vq_loss", "recon_error", "loss", "perplexity"):
            assert_close(found[name], out[f"eval.{name}"].view(()), 2e-5, f"eval.{name}")
    optimizer = torch.optim.Adam(model.train().parameters(), lr=config["learning_rate"])
    for i, x in enumerate(batches):
        loss, logs = objective.loss("main", {"x": x}, Step(i))
        optimizer.zero_grad()
        loss.backward()
        if i == 0:
            gradients = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
            gradients |= {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            for name, gradient in ck.SONNET.from_ours(gradients).items():
                if f"step0.grad.{name}" in out:
                    assert_close(gradient, out[f"step0.grad.{name}"], 1e-4, name)
        assert_close(loss, out[f"step{i}.loss"].view(()), 1e-4, f"step{i}.loss")
        assert_close(logs["rec_loss"], out[f"step{i}.recon_error"].view(()), 1e-4, f"step{i}.recon_error")
        assert_close(logs["perplexity"], out[f"step{i}.perplexity"].view(()), 1e-4, f"step{i}.perplexity")
        optimizer.step()
    final = ck.SONNET.from_ours(model.state_dict())
    for name, want in ((k.removeprefix("final."), v) for k, v in out.items() if k.startswith("final.")):
        # Adam divides gradients by their own size, rounding included
        assert_close(final[name], want, 1e-4, name, floor=0.05 * config["learning_rate"])
    with torch.no_grad():
        assert_close(last(model.eval()(batches[0])[0]) / 2, out["final_eval.x_recon"], 1e-4, "final_eval.x_recon")


@golden.check(lambda c: c.kind == "zalando_autoencoder")
@torch.no_grad()
def zalando_autoencoder(case: GoldenCase) -> None:
    config, out, x = case.config, case.outputs, 2 * case.inputs["x"]
    model = network(case, ck.ZALANDO, **sizes(config, "K", "D"), beta=config["beta"], ema_decay=config["decay"]).eval()
    case.ignore("decay", why="evaluated, so that no average moves")
    objective = VQVAEObjective(model, data_variance=config["data_variance"])
    assert_close(model.moments(x), out["pre_vq"], 1e-5, "pre_vq")
    recon, vq_loss, ids = model(x)
    rec, _ = objective.reconstruction(x, recon, ids)
    assert_close(recon / 2, out["recon"], 1e-5, "recon")
    found = {"vq_loss": vq_loss, "recon_loss": rec, "loss": rec + vq_loss, **code_usage(ids, model.codebook_size)}
    for name in ("vq_loss", "recon_loss", "loss", "perplexity"):
        assert_close(found[name], out[name].view(()), 1e-5, name)


@golden.check(lambda c: c.kind == "pythae_pixelcnn")
@torch.no_grad()
def pythae_pixelcnn(case: GoldenCase) -> None:
    config, codes = case.config, case.inputs["codes"]
    planes, *grid = config["input_dim"]
    read = ck.PIXELCNN.config(case.state)
    given = {"vocab_size": config["n_embeddings"], "n_layer": config["n_layers"], "kernel_size": config["kernel_size"],
             "planes": planes}  # fmt: skip
    assert ck.PIXELCNN.recognise(case.state) and {k: read[k] for k in given} == given
    assert codes.shape[1:] == (planes, *grid)
    model = MaskedPixelCNN(**{**read, **given, "grid": tuple(grid)})
    model.load_state_dict(ck.PIXELCNN.to_ours(case.state))
    logits = model.eval().logits(codes)
    assert_close(logits, case.outputs["logits"], 1e-5, "logits")
    assert_close(F.cross_entropy(logits, codes), case.outputs["loss"], 1e-5, "loss")
    if planes == 1:
        assert torch.equal(model(codes[:, 0]).movedim(-1, 1), logits[:, :, 0])


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("sonnet-cifar", 695_491), ("zalando-cifar", 727_619)])
def test_published_sizes(name: str, count: int) -> None:
    """sonnet: 662,723 trained and the codebook; zalando: with the moving sums, which the notebook counts as well."""
    with torch.device("meta"):
        model = VQVAE(**AUTOENCODER[name])
    trained = sum(p.numel() for p in model.parameters())
    book = model.quantize.embedding
    sums = book.embed_avg.numel() if name == "zalando-cifar" else 0
    assert trained + book.weight.numel() + sums == count
    layout = ck.SONNET if name == "sonnet-cifar" else ck.ZALANDO
    read = layout.config(layout.from_ours(model.state_dict()))
    assert {k: v for k, v in AUTOENCODER[name].items() if read[k] != v} == {}


@pytest.mark.parametrize(("name", "side", "grid", "factor"), [
    ("sonnet-cifar", 32, (8, 8), 42.67), ("paper-imagenet128", 128, (32, 32), 42.67), ("paper-cifar", 32, (8, 80), 4.267),
])  # fmt: skip
def test_published_grids(name: str, side: int, grid: tuple[int, int], factor: float) -> None:
    with torch.device("meta"):
        model = VQVAE(**AUTOENCODER[name])
        heads, loss, ids = model(torch.empty(2, 3, side, side))
    assert isinstance(model, Tokenizer) and model.token_shape((3, side, side)) == grid == ids.shape[1:]
    assert heads.shape == (2, 6 if name == "paper-cifar" else 3, side, side) and loss.shape == ()
    got = compression_factor(3 * side * side, grid[0] * grid[1], model.codes_each)
    assert abs(got / factor - 1) < 1e-3  # the paper says 42.6 of ImageNet
    with pytest.raises(VgmError, match="divide"):
        model.token_shape((3, side + 2, side))


# -- quantizers --------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"channels": 8, "residual_channels": 4, "residual_layers": 1, "embed_dim": 4, "n_embed": 12}


def tiny(**more: Any) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(**{**SMALL, "image_channels": 1, **more})


def blobs(n: int, size: int = 16, channels: int = 1) -> Tensor:
    coarse = torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).clamp(-1, 1)


@pytest.mark.parametrize("options", [
    {}, {"flavour": "zalando"}, {"flavour": "pythae"}, {"flavour": "taming"}, {"quantizer": "loss"}, {"groups": 2},
    {"layout": "paper"}, {"layout": "zalando"}, {"layout": "pythae", "image_size": 16, "reduction": "sum"},
    {"likelihood": "discretised-logistic"},
], ids=lambda o: "-".join(map(str, o.values())) or "sonnet")  # fmt: skip
def test_every_form_trains(options: dict[str, Any]) -> None:
    model, x = tiny(**options).train(), blobs(8)
    objective = VQVAEObjective(model, place_codes=True)
    objective.prepare({"x": x}, Step(0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("quantize.")}
    losses = []
    for i in range(30):
        loss, logs = objective.loss("main", {"x": x}, Step(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(Step(i))
        losses.append(logs["rec_loss"].item())
        assert all(v.isfinite().all() for v in logs.values())
    assert losses[-1] < 0.95 * losses[0]
    assert {"perplexity", "cluster_usage", "codebook_usage", "quant_loss"} <= logs.keys()
    after = model.state_dict()
    assert any(not torch.equal(v, after[k]) for k, v in before.items()), "the codebook moves"
    with torch.no_grad():
        frozen = {k: v.clone() for k, v in after.items()}
        model.eval()(x)
        assert all(torch.equal(v, frozen[k]) for k, v in model.state_dict().items()), "not in evaluation"
        ids = model.tokens(x)
        assert model.decode_tokens(ids).shape == x.shape and ids.max() < model.codebook_size
        torch.testing.assert_close(model.decode(model.latents(model.encode(x))), model.decode_tokens(ids))


def test_a_codebook_that_begins_dead_moves() -> None:
    """All codes far away: the first latents pick one, which jumps to their mean, and others follow within 100 steps."""
    quantize = EMAVectorQuantizer(16, 2, flavour="sonnet").train()
    quantize.embedding.weight.add_(50.0)
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 2, generator=g) * 3
    for _ in range(100):
        z = centres[torch.randint(16, (256,), generator=g)] + 0.1 * torch.randn(256, 2, generator=g)
        quantize(z.T[None, :, :, None].clone().requires_grad_())
    chosen = quantize.tokens(centres.T[None, :, :, None])
    assert len(chosen.unique()) >= 4 and quantize.embedding.weight.abs().max() < 20


def test_codes_placed_on_latents_stay_there() -> None:
    """As if a batch had chosen every code once: the debiased averages do not send the others to the origin."""
    z = torch.randn(1, 3, 8, 8)
    for flavour in ("sonnet", "zalando", "pythae", "taming"):
        quantize = EMAVectorQuantizer(20, 3, flavour=flavour).train()
        quantize.place(z)
        placed = quantize.embedding.weight.clone()
        quantize(placed[:1].view(1, 3, 1, 1).requires_grad_())
        torch.testing.assert_close(quantize.embedding.weight, placed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"quantizer": "loss"}, {"groups": 2}, {"flavour": "taming"}], ids=str)
def test_dead_codes_restart(options: dict[str, Any]) -> None:
    """Only where it is asked for, only codes unused since the last time, onto latents of the batch."""
    model, x = tiny(**options).train(), blobs(8)
    objective = VQVAEObjective(model, data_variance=0.1, restart_every=3)
    _, _, ids = model.eval()(x)
    used = torch.zeros(model.codebook_size, dtype=torch.bool)
    used[ids.unique()] = True
    assert used.sum() < 12
    model.train()
    with torch.no_grad():  # nothing else moves a codebook here
        for i in range(3):
            objective.loss("main", {"x": x}, Step(i))
            before = model.quantize.lookup(torch.arange(model.codebook_size).view(1, 1, -1)).clone()
            objective.after_step(Step(i))
            after = model.quantize.lookup(torch.arange(model.codebook_size).view(1, 1, -1))
            assert torch.equal(before, after) == (i < 2)
    latents = model.moments(x).permute(0, 2, 3, 1).unflatten(-1, (model.codes_per_position, -1))  # (B, h, w, G, c)
    for g in range(model.codes_per_position):
        quantize = model.quantize.groups[g] if options.get("groups") else model.quantize
        dead = ~used.view(model.codes_per_position, -1)[g]
        moved = quantize.embedding.weight[dead][:, None] - latents[..., g, :].flatten(0, 2)
        assert moved.norm(dim=-1).min(1).values.max() < 1e-6
    state = objective.state_dict()
    again = VQVAEObjective(model)
    again.load_state_dict(state)
    assert torch.equal(again.last_used, objective.last_used) and float(again.variance) == pytest.approx(0.1)


@torch.no_grad()
def test_several_codes_per_position() -> None:
    """Ids say which codebook they are of, and lie side by side."""
    model, x = tiny(groups=3).eval(), blobs(2)
    assert isinstance(model.quantize, GroupedQuantizer) and model.codebook_size == 36 and model.embed_dim == 12
    ids = model.tokens(x)
    assert ids.shape == (2, 4, 12) and torch.equal(ids // 12, torch.arange(3).repeat(4).expand(2, 4, -1))
    z = model.moments(x)
    alone = [q.indices(part) for q, part in zip(model.quantize.groups, z.chunk(3, 1))]
    assert all(torch.equal(ids[..., g::3] % 12, n) for g, n in enumerate(alone))
    torch.testing.assert_close(model.quantize.lookup(ids), model.quantize(z)[0])
    assert torch.equal(model.quantize.lookup((ids + 12) % 36), model.quantize.lookup(ids)), "another codebook's id"


# -- objective ---------------------------------------------------------------------------------------------------------


def test_the_variance_is_that_of_the_data() -> None:
    """Of pixels in [0, 1], as sonnet's; what gives no finite loss is refused before the first step."""
    x = blobs(64)
    objective = VQVAEObjective(tiny())
    objective.prepare({"x": x}, Step(0))
    assert float(objective.variance) == pytest.approx(float(((x + 1) / 2).var()), rel=1e-3)
    with pytest.raises(VgmError, match="variance is 0"):
        objective.prepare({"x": torch.zeros(4, 1, 16, 16)}, Step(0))
    x[1, 0, 2, 3] = torch.nan
    with pytest.raises(VgmError, match="NaN"):
        objective.prepare({"x": x}, Step(0))
    with pytest.raises(VgmError, match="no half"):
        tiny(channels=1)
    assert tiny(channels=7)(torch.zeros(1, 1, 16, 16))[0].shape == (1, 1, 16, 16)
    with pytest.raises(VgmError, match="perceptrons"):
        tiny(layout="pythae", groups=2)


def test_usage_is_counted_over_an_epoch_and_not_over_a_batch() -> None:
    objective = VQVAEObjective(tiny(), usage_over=40)
    ids = [torch.tensor([[[0, 1]]] * 10), torch.tensor([[[2, 2]]] * 10)]
    seen = [float(objective.usage(ids[min(i, 1)], Step(i))["codebook_usage"]) for i in range(6)]
    assert seen == pytest.approx([2 / 12, 3 / 12, 3 / 12, 3 / 12, 1 / 12, 1 / 12])


# -- priors ------------------------------------------------------------------------------------------------------------


def tiny_prior(**more: Any) -> GatedPixelCNN:
    torch.manual_seed(0)
    model = GatedPixelCNN(**{"vocab_size": 7, "grid": (4, 5), "channels": 8, "n_layer": 4, "head_channels": 16, **more})
    suites.randomise(model, scale=0.2)
    return model.eval()


def masked_prior(**more: Any) -> MaskedPixelCNN:
    torch.manual_seed(0)
    return MaskedPixelCNN(
        **{"vocab_size": 7, "grid": (4, 5), "channels": 16, "n_layer": 3, "kernel_size": 3, **more}
    ).eval()


PRIORS: dict[str, Any] = {
    "gated": (tiny_prior, {}),
    "by class": (tiny_prior, {"num_classes": 3}),
    "wide kernel": (tiny_prior, {"kernel_size": 5, "n_layer": 2}),
    "masked": (masked_prior, {}),
}


def example(model: Any, n: int) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(n) % model.num_classes if model.num_classes else None
    return torch.randint(7, (n, *model.grid), generator=g), y


@torch.no_grad()
@pytest.mark.parametrize("name", PRIORS)
def test_a_code_depends_on_all_before_it_and_on_none_after(name: str) -> None:
    """Of every position: no change at it or after it reaches its logits, every change before it does (no blind spot; the
    plain masked network has one)."""
    make, options = PRIORS[name]
    model = make(**options).double()
    ids, y = example(model, 1)
    n = ids.numel()
    changed = ids.flatten().repeat(n, 1)
    changed[torch.arange(n), torch.arange(n)] = (changed[torch.arange(n), torch.arange(n)] + 3) % 7
    y = y if y is None else y.repeat(n)
    logits = model(changed.view(n, *model.grid), y).flatten(1, 2)
    base = model(ids, y if y is None else y[:1]).flatten(1, 2)
    reached = ((logits - base).abs() > 1e-12).any(-1)  # (changed at, seen from)
    before = torch.ones(n, n).triu(1).bool()
    assert not (reached & ~before).any()
    if name == "masked":
        assert (before & ~reached).any(), "this is what the gated network mends"
    else:
        assert (reached == before).all()


@torch.no_grad()
@pytest.mark.parametrize("name", PRIORS)
def test_the_cache_says_what_the_whole_grid_says(name: str) -> None:
    make, options = PRIORS[name]
    model = make(**options)
    ids, y = example(model, 3)
    whole = model(ids, y).flatten(1, 2)
    decoder, codes = model.decoder(3, y), ids.flatten(1).unbind(1)
    steps = [decoder.first(), *(decoder.step(c) for c in codes[:-1])]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-5)
    decoder = model.decoder(3, y)
    greedy = generate(decoder.first(), decoder.step, len(codes), Decoding(greedy=True).picker(None))
    assert torch.equal(model(greedy.view_as(ids), y).argmax(-1).flatten(1), greedy)


@torch.no_grad()
@pytest.mark.parametrize("name", PRIORS)
def test_likelihoods_of_all_grids_sum_to_one(name: str) -> None:
    make, options = PRIORS[name]
    model = make(**{**options, "vocab_size": 3, "grid": (2, 2)}).double()
    every = torch.cartesian_prod(*[torch.arange(3)] * 4).view(-1, 2, 2)
    y = torch.full((81,), 1) if model.num_classes else None
    nats, kind = model.log_likelihood(every, generators(range(81)), y)
    assert float(nats.exp().sum()) == pytest.approx(1.0, rel=1e-6) and "codes" in kind


def test_priors_refuse_what_they_cannot_be() -> None:
    with pytest.raises(VgmError, match="middle"):
        tiny_prior(kernel_size=4)
    with pytest.raises(VgmError, match="rows and columns"):
        tiny_prior(grid=(20,))
    with pytest.raises(VgmError, match="class"):
        tiny_prior(num_classes=3)(torch.zeros(1, 4, 5, dtype=torch.long))
    with pytest.raises(VgmError, match="no grid"):
        masked_prior(planes=2)(torch.zeros(1, 4, 5, dtype=torch.long))


def test_accuracy_leaves_the_background_out() -> None:
    model = tiny_prior()
    ids = torch.zeros(4, 4, 5, dtype=torch.long)
    ids[:, 2, 2] = 3
    _, logs = PriorObjective(model).loss("main", {"tokens": ids}, Step(0))
    right = (model(ids).argmax(-1) == ids).float()
    assert logs["accuracy"] == right.mean() and logs["accuracy_rest"] == right[:, 2, 2].mean()


def test_completion_keeps_the_rows_that_are_given() -> None:
    model = tiny_prior()
    given, _ = example(model, 2)
    request = Request((4, 5), generators(range(5)), images=given)
    ids = PriorSampler(keep=0.5)(model, request)
    assert torch.equal(ids[:, :2], given[[0, 1, 0, 1, 0], :2]) and request.info["nfe"] == 10
    assert not torch.equal(ids[0, 2:], ids[2, 2:]), "two completions of one image"
    again = PriorSampler(keep=0.5)(model, Request((4, 5), generators([3]), images=given, index=[3]))
    assert torch.equal(again[0], ids[3])
    with pytest.raises(VgmError, match="given images"):
        PriorSampler(keep=0.5)(model, Request((4, 5), generators([0])))


def test_interpolation_goes_from_one_image_to_the_other() -> None:
    model, x = tiny(n_embed=64).eval(), blobs(4)
    model.quantize.place(model.moments(x))
    codec = TokenCodec(model)
    ids = codec.encode(x)
    ends = codec.codec.quantize.tokens(codec.codec.quantize.lookup(ids))  # equal codes are one
    request = Request((4, 4), generators(range(10)), images=ids, codec=codec)
    rows = InterpolationSampler(columns=5)(None, request)
    assert torch.equal(rows[[0, 4, 5, 9]], ends) and codec.decode(rows).shape == (10, 1, 16, 16)
    assert rows[:5].flatten(1).unique(dim=0).shape[0] > 2
    for bad in (Request((4, 4), generators([0]), codec=codec), Request((4, 4), generators([0]), images=ids)):
        with pytest.raises(VgmError):
            InterpolationSampler()(None, bad)


# -- from the command line ---------------------------------------------------------------------------------------------

QUICK = ("train.steps=2", "train.save_every=2", "train.preview_n=0", "train.batch_size=8")
LITTLE = ("model.channels=8", "model.residual_channels=4", "model.n_embed=16", "model.embed_dim=4")
ON_SHIPPED = "codec={name: vqgan, weights: mnist-tokenizer, output: tokens}"
LITTLE_PRIOR = ("model.channels=8", "model.n_layer=2", "model.head_channels=8")


def test_both_stages_and_their_bounds(
    tmp_run: Path, tiny_dataset: Path, vgm: Callable[..., tuple[int, str, str]]
) -> None:
    """A codec with a likelihood is measured alone (uniform prior) and behind a prior, whose codes cost less or more; then
    it is looked into, its images completed and mixed."""
    codec, run, data = tmp_run / "codec", tmp_run / "prior", f"data.path={tiny_dataset}"
    more = ("model.likelihood=discretised-logistic", data)
    code, _, err = vgm("train", "vqvae", *QUICK, *LITTLE, *more, "--out", codec)
    assert code == 0, err
    code, out, err = vgm("evaluate", codec, "--metrics", "bits-per-dim", "-n", 6, "--json")
    assert code == 0, err
    (alone,) = json.loads(out)
    assert (
        alone["metric"] == "bits-per-dim"
        and "uniform prior of 49 codes of 16" in alone["protocol"]["options"]["likelihood"]
    )
    code, out, _ = vgm("inspect", codec)
    assert code == 0 and "7×7 of 16 codes an image: 32 times fewer bits" in out
    tokens = as_output(load(codec).model, "tokens").encode(open_dataset(str(tiny_dataset)).pixels(range(24)))
    for cache in ("a", "b"):  # what a prior is trained on: the same ids in the same order, with their labels
        code, _, err = vgm("data", "encode", tiny_dataset, "--codec", codec, "--tokens", "--out", tmp_run / cache)
        assert code == 0, err
        kept = open_latents(tmp_run / cache).gather(range(24))
        assert torch.equal(kept["moments"].long(), tokens) and [int(k) for k in kept["label"]] == [0] * 12 + [1] * 12
    train = ("train", "vqvae", "--recipe", "mnist-prior", "--codec", codec, data, *QUICK, *LITTLE_PRIOR)
    code, _, err = vgm(*train, "--out", run)
    assert code == 0, err
    code, out, err = vgm("evaluate", run, "--metrics", "bits-per-dim", "-n", 6, "--json")
    assert code == 0, err
    codes, pixels = json.loads(out)
    assert (codes["metric"], pixels["metric"]) == ("bits-per-latent-dim", "bits-per-dim")
    assert "trained prior" in pixels["protocol"]["options"]["likelihood"]
    difference = 49 * (codes["value"] - 4) / 784  # of log2 16 = 4 bits a code
    assert pixels["value"] == pytest.approx(alone["value"] + difference, rel=1e-4)
    for options, n in ((("keep=0.5",), 4), (("--sampler", "vqvae-interpolate", "columns=3"), 6)):
        target = tmp_run / f"{n}.npz"
        code, _, err = vgm("sample", run, "--input", tiny_dataset, "-n", n, *options, "--out", target)
        assert code == 0, err
        with np.load(target) as f:
            assert f["arr_0"].shape == (n, 28, 28, 1)
    code, _, err = vgm("sample", run, "-n", 1, "keep=0.5", "--out", tmp_run / "x.npz")
    assert code == 2 and "--input" in err


def test_a_squared_error_is_no_likelihood(tmp_run: Path, vgm: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = vgm("train", "vqvae", *QUICK, *LITTLE, "--out", tmp_run / "a")
    assert code == 0, err
    code, _, err = vgm("evaluate", tmp_run / "a", "--metrics", "bits-per-dim", "-n", 2)
    assert code == 2 and "codec" in err


def half_of_the_latents(rank: int, world: int, folder: str) -> None:
    """One process of the test below: a rank's share of every batch, and its codebook into a file."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    torch.save(trained_on_share(rank, world), f"{folder}/{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


def trained_on_share(rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {}
    for flavour in ("sonnet", "zalando", "pythae", "taming"):
        quantize = EMAVectorQuantizer(12, 3, flavour=flavour).train()
        for i in range(4):
            z = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(i)).chunk(world)[rank]
            quantize(z.requires_grad_())
            quantize.restart(torch.arange(12) == i, z.detach(), torch.linspace(0, 0.9, 12))
        state |= {f"{flavour}.{k}": v for k, v in quantize.state_dict().items()}
    return state


@pytest.mark.slow
def test_two_processes_keep_one_codebook(tmp_path: Path) -> None:
    """Counts and sums are added up, and codes restart on latents of both: one codebook, that of a single process."""
    torch.multiprocessing.spawn(half_of_the_latents, (2, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, want in trained_on_share(0, 1).items():
        assert torch.equal(both[0][name], both[1][name]), name
        torch.testing.assert_close(both[0][name], want, rtol=1e-4, atol=1e-5)


class TestTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "vqvae/mnist"
    overrides: ClassVar[tuple[str, ...]] = (*LITTLE, "objective.restart_every=3", "objective.place_codes=false")
    rtol: ClassVar[float | None] = None  # every pass moves the codebook

    def test_loss_is_finite_and_a_function_of_the_step(self) -> None:
        """And of the codebook, which the first call moved (test_every_form_trains)."""


class TestTrainingByLoss(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "vqvae/mnist"
    overrides: ClassVar[tuple[str, ...]] = (*LITTLE, "model.quantizer=loss", "model.groups=2")


class TestPriorTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "vqvae/mnist-prior"
    overrides: ClassVar[tuple[str, ...]] = (*LITTLE_PRIOR, "model.dropout=0", ON_SHIPPED)


class TestPriorSampling(suites.SamplerSuite):
    recipe: ClassVar[str] = "vqvae/mnist-prior"
    overrides: ClassVar[tuple[str, ...]] = (*LITTLE_PRIOR, ON_SHIPPED)


@pytest.mark.parametrize(
    "name",
    ["mnist", "mnist-prior", "mnist-likelihood", "cifar10", "cifar10-likelihood", "imagenet128", "imagenet128-prior"],
)
def test_recipe(name: str) -> None:
    suite = suites.RecipeSuite()
    suite.recipe = f"vqvae/{name}"
    suite.test_opens_with_what_it_is()
    suite.test_validates_and_builds()
