"""Low-rank adapters: nothing changes at first, merged equals attached, and files in PEFT's and kohya's names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vgm_cli.errors import VgmError
from vgm_cli.nn import lora
from vgm_cli.registry import registry
from vgm_cli.testing.suites import randomise


class Mixed(nn.Module):
    """Every kind of layer, strides, paddings, a layer that is called through its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.conv1 = nn.Conv1d(8, 6, 1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.circular(self.conv2(x))).flatten(2)  # (B, 8, T)
        x = self.conv1(x).transpose(1, 2)  # (B, T, 6)
        x = x + self.attention(x, x, x)[0]
        return self.mlp(self.norm(x))


def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    node = {"name": "adm-unet", "image_size": 8, "in_channels": 1, "model_channels": 32, "out_channels": 1,
            "num_res_blocks": 1, "attention_resolutions": [2], "channel_mult": [1, 2], "num_classes": 4}  # fmt: skip
    network = registry().build("model", node)
    return network, (torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([0, 3]))


def dit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    node = {"name": "dit", "input_size": 8, "in_channels": 1, "patch_size": 2, "hidden_size": 32, "depth": 2,
            "num_heads": 2, "num_classes": 4}  # fmt: skip
    return registry().build("model", node), (torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([0, 3]))


def mixed() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Mixed(), (torch.randn(2, 3, 8, 8),)


NETWORKS = {"mixed": mixed, "dit": dit, "adm-unet": unet}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = NETWORKS[request.param]()
    randomise(model)
    return model.eval(), inputs


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Adapters that do something."""
    g = torch.Generator().manual_seed(1)
    for module in lora.adapted(model).values():
        module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=g) * 0.1)


def test_attached_adapters_change_nothing(network) -> None:
    model, inputs = network
    before = model(*inputs)
    names = set(model.state_dict())
    layers = lora.attach(model, rank=3)
    torch.testing.assert_close(model(*inputs), before, rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) - names == {f"{n}.{p}" for n in layers for p in (lora.A, lora.B)}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{p}" for n in layers for p in (lora.A, lora.B)}


def test_every_adapter_is_reached_by_the_gradient(network) -> None:
    model, inputs = network
    lora.attach(model, rank=3)
    move(model)
    model(*inputs).square().sum().backward()
    dead = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not dead, dead


def test_merged_equals_attached(network) -> None:
    """In place, and as a state dict that the plain network loads."""
    model, inputs = network
    plain = copy.deepcopy(model)
    before = model(*inputs)
    lora.attach(model, rank=3, alpha=6)
    move(model)
    attached = model(*inputs)
    assert (attached - before).abs().max() > 1e-3
    with lora.disabled(model):
        torch.testing.assert_close(model(*inputs), before)
    plain.load_state_dict(lora.merged_state(model))
    torch.testing.assert_close(plain(*inputs), attached, rtol=1e-4, atol=1e-5)
    lora.merge(model)
    torch.testing.assert_close(model(*inputs), attached, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys() and not lora.adapted(model)
    lora.attach(model, rank=2)  # again on the merged network


def test_scale_is_alpha_over_rank() -> None:
    layer = nn.Linear(4, 4, bias=False)
    lora.attach(layer, rank=2, alpha=8)
    layer.lora_A.data.fill_(0.5)
    layer.lora_B.data.fill_(0.25)
    x = torch.randn(3, 4)
    plain = layer.state_dict()["weight"]
    torch.testing.assert_close(layer(x), x @ plain.T + 8 / 2 * x @ (layer.lora_B @ layer.lora_A).T)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)  # who reads the weight sees the same


def test_copies_are_independent() -> None:
    model, inputs = dit()
    lora.attach(model, rank=2)
    other = copy.deepcopy(model)
    move(other)
    assert not torch.equal(other(*inputs), model(*inputs))
    with lora.disabled(other):
        assert torch.equal(other(*inputs), model(*inputs))


def test_targets() -> None:
    model = dit()[0]
    assert lora.attach(model, 2, targets=["attn.qkv"]) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    for wrong, message in ((["atn.qkv"], "no layer"), ([], "no layer")):
        with pytest.raises(VgmError, match=message) as e:
            lora.attach(dit()[0], 2, targets=wrong)
        assert e.value.code == 2
    with pytest.raises(VgmError, match="adapters already"):
        lora.attach(model, 2)
    with pytest.raises(VgmError, match="at least 1"):
        lora.attach(dit()[0], 0)
    everything = lora.attach(Mixed(), 2)
    assert everything == ["conv2", "circular", "conv1", "attention.out_proj", "mlp.0", "mlp.2"]


def test_both_initialisations() -> None:
    spreads = {}
    for init in ("gaussian", "kaiming"):
        layer = nn.Sequential(nn.Linear(400, 10))
        lora.attach(layer, rank=8, init=init)  # type: ignore[arg-type]
        assert layer[0].lora_B.abs().max() == 0
        spreads[init] = layer[0].lora_A.std().item()
    assert spreads["gaussian"] == pytest.approx(1 / 8, rel=0.05)
    assert spreads["kaiming"] == pytest.approx(1 / (3 * 400) ** 0.5, rel=0.05)


def test_adapter_files_of_other_tools(network) -> None:
    """Every adapter once, under PEFT's names."""
    model, _ = network
    layers = lora.attach(model, rank=3, alpha=6)
    move(model)
    state = {k: v for k, v in model.state_dict().items() if k.endswith((".lora_A", ".lora_B"))}
    peft = lora.to_peft(state)
    assert len(peft) == len(state) == 2 * len(layers)
    for name in layers:
        own = model.get_submodule(name)
        assert torch.equal(peft[f"base_model.model.{name}.lora_A.weight"], own.lora_A)
        assert torch.equal(peft[f"base_model.model.{name}.lora_B.weight"], own.lora_B)
    config = lora.peft_config(3, 6, layers)
    assert config["r"] == 3 and config["lora_alpha"] == 6 and config["target_modules"] == sorted(layers)


def test_adapters_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = dit()[0]
        lora.attach(model, 2)
    assert all(p.is_meta for p in model.parameters())
