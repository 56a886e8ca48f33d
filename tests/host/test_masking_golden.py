"""Schedules and the choice of masked positions against google-research/maskgit and valeoai/Halton-MaskGIT (golden)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vgm_cli.ar.masking import confidence, known_after, least_confident, mask_rate, still_masked
from vgm_cli.ar.orders import order_of, rolled
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("maskgit", partial="orders, schedules and masks")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


def toy(case: GoldenCase, offset: int = 0) -> Callable[[Tensor], Tensor]:
    """The logits (B, N, V) of codes (B, N) that the cases state in their notes."""
    base = case.inputs["base"]
    v = torch.arange(base.shape[-1]).float()

    def logits(codes: Tensor) -> Tensor:
        own = 0.5 * torch.cos(0.7 * codes.float()[..., None] + 0.3 * v)
        return base + own + 0.2 * torch.sin(0.1 * codes.sum(1).float()[:, None, None] + v)

    return logits


def class_logits(case: GoldenCase) -> Tensor:
    """(B, 1, V): what the label adds."""
    labels = case.inputs["labels"].float()[:, None, None]
    return 0.8 * torch.cos(0.5 * labels + 0.2 * torch.arange(case.inputs["base"].shape[-1]).float())


# -- google-research/maskgit ---------------------------------------------------------------------------------------


@golden.check(lambda c: c.kind == "maskgit_jax_schedules")
def jax_schedules(case: GoldenCase) -> None:
    ratio, total = case.inputs["ratio"], case.config["total_unknown"]
    for method in case.config["methods"]:
        rate = mask_rate(ratio, "linear" if method == "uniform" else method, total)
        assert_close(rate, case.outputs[method], 1e-6, method)
        product = rate.double() * total
        certain = (product - product.round()).abs() > 1e-3
        assert certain.any()
        assert torch.equal(product.floor()[certain], case.outputs[f"floor_{method}"].double()[certain]), method


@golden.check(lambda c: c.kind == "maskgit_jax_decode" and not c.state)
def jax_decode(case: GoldenCase) -> None:
    """Parallel decoding with a toy network: which positions are masked again after every step."""
    logits_of, steps, start = toy(case), case.config["num_iter"], case.config["start_iter"]
    codes = case.inputs["inputs"].long()
    total = (codes == -1).sum(1)
    for k, step in enumerate(range(start, steps)):
        unknown = codes == -1
        logits = logits_of(codes)
        drawn = torch.where(unknown, (logits + case.inputs["gumbel_token"][k]).argmax(-1), codes)
        assert torch.equal(drawn, case.outputs["final_seqs"][:, step].long()), step
        ratio = torch.tensor((step + 1) / steps)
        left = still_masked(total, unknown.sum(1), mask_rate(ratio, case.config["method"], int(total[0])))
        assert torch.equal(left, case.outputs["mask_len"][k].flatten().long()), step
        # a class token at the front is no code; it is known, so what is said of it counts for nothing
        log_p = logits.log_softmax(-1).gather(-1, drawn.clamp(max=logits.shape[-1] - 1)[..., None]).squeeze(-1)
        temperature = case.config["choice_temperature"] * (1 - ratio)
        assert_close(temperature, case.outputs["choice_temperature_per_step"][k], 1e-5, "temperature")
        sure = confidence(log_p, ~unknown, case.inputs["gumbel_choice"][k], temperature)
        again = least_confident(sure, left)
        assert torch.equal(again, case.outputs["masking"][k]), step
        codes = torch.where(again, -1, drawn)


# -- valeoai/Halton-MaskGIT ----------------------------------------------------------------------------------------


@golden.check(lambda c: c.kind == "halton_order")
def halton_order(case: GoldenCase) -> None:
    for n in case.config["sizes"]:
        order = order_of("halton", n, n)
        assert torch.equal(torch.stack([order // n, order % n], dim=1), case.outputs[f"order_{n}"])
    for n, steps in case.config["schedules"]:
        ratios = torch.arange(1, steps + 1) / steps
        assert torch.equal(known_after(ratios, "arccos", n * n), case.outputs[f"revealed_{n}_{steps}"])


@golden.check(lambda c: c.kind == "halton_train_mask")
def halton_train_mask(case: GoldenCase) -> None:
    names = [k.removeprefix("mask_") for k in case.outputs if k.startswith("mask_")]
    n = case.config["input_size"] ** 2
    assert len(names) == 5
    for name in names:
        mask = case.inputs["u"] < mask_rate(case.inputs["r"], name, n)[:, None, None]
        assert torch.equal(mask, case.outputs[f"mask_{name}"])
        masked = torch.where(mask, case.config["value"], case.inputs["code"])
        assert torch.equal(masked, case.outputs[f"masked_{name}"])
        assert bool(case.outputs[f"loss_mask_{name}"].all()), "the loss is of all positions"
        for steps in case.config["steps"]:
            want = case.outputs[f"confidence_schedule_{name}_{steps}"].long()
            least = torch.arange(1, steps + 1)
            assert torch.equal(known_after(torch.linspace(0, 1, steps), name, n), want.maximum(least)), (name, steps)


@golden.check(lambda c: c.kind.startswith("halton_confidence_decode"))
def halton_confidence(case: GoldenCase) -> None:
    """The confidence sampler with a toy network. As in the release, codes that are known are drawn anew."""
    options, size, mask_id = case.config["sampler"], case.config["input_size"], case.config["codebook_size"]
    steps, n, logits_of = options["step"], size * size, toy(case)
    noise = case.inputs["gumbel_choice"] if "in/gumbel_choice" in case else case.inputs["conf_noise"]
    codes = case.inputs["init_code"] if "in/init_code" in case else torch.full((len(case.inputs["labels"]), n), mask_id)
    known = known_after(torch.linspace(0, 1, steps), options["sched_mode"], n)
    for k in range(steps):
        w = options["w"] * k / (steps - 1)
        null = logits_of(codes)
        logits = (1 + w) * (null + class_logits(case)) - w * null
        log_p = (logits * options["sm_temp"]).log_softmax(-1)
        drawn = (log_p + case.inputs["gumbel_token"][k]).argmax(-1)
        assert torch.equal(drawn.view(-1, size, size), case.outputs["pred_codes"][k])
        log_p = log_p.gather(-1, drawn[..., None]).squeeze(-1).double()
        temperature = options["r_temp"] * (1 - k / (steps - 1))
        if options["randomize"] == "random" or (options["randomize"] == "warm_up" and k < 2):
            log_p, temperature = noise[k].double(), 0.0
        elif options["randomize"] == "warm_up":
            log_p, temperature = log_p.exp(), 0.0
        sure = confidence(log_p, codes != mask_id, noise[k].double(), temperature)
        codes = torch.where(least_confident(sure, n - int(known[k])), codes, drawn)
        unknown = (codes == mask_id).float().view(-1, size, size)
        assert torch.equal(unknown, case.outputs["masks_after"][k]), k
    # the official decoder clamps codes to the codebook
    final = (case.outputs["final_codes"] * 1000).round().long()
    assert torch.equal(codes.clamp(max=mask_id - 1).view(-1, size, size), final)


@golden.check(lambda c: c.kind == "halton_halton_decode")
def halton_decode(case: GoldenCase) -> None:
    """Which positions each step of the Halton sampler fills."""
    options, n = case.config["sampler"], case.config["input_size"]
    order = order_of("halton", n, n)
    batch = len(case.inputs["labels"])
    orders = rolled(order, case.inputs["roll"]) if options["randomize"] else order.expand(batch, -1)
    ratios = torch.arange(1, options["step"] + 1) / options["step"]
    known = [0, *known_after(ratios, "arccos", n * n).tolist()]
    assert known[-1] == n * n
    for k, want in enumerate(case.outputs["step_masks"]):
        filled = torch.zeros(batch, n * n)
        filled.scatter_(1, orders[:, known[k] : known[k + 1]], 1.0)
        assert torch.equal(filled.view(-1, n, n), want), k
