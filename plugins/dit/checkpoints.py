"""DiT weights: the official layout, which is ours (nets/dit_checkpoints.py), and diffusers' DiTTransformer2DModel.

Official files (facebookresearch/DiT@ed81ce2): a bare state dict (DiT-XL-2-256x256.pt) or train.py's dict with "model"
and "ema", see vgm_cli.convert_api.unwrap. diffusers (0.35): q, k, v apart; one copy of the timestep and label embedders
in every block (equal copies, the first is read); no position table, so config.json or the layout's name tells the size.
diffusers runs these weights with timestep frequencies 10000^(-k/127) instead of /128 and eps 1e-5 before the MLP:
outputs differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Diffusers, Layout, Proof, Published
from vgm_cli.errors import USAGE, VgmError, needs_extra
from vgm_cli.nets.dit import sincos_2d
from vgm_cli.nets.dit_checkpoints import assumes, config_from, converter, depth_of, latents, plain

State = Mapping[str, Tensor]


# -- official --------------------------------------------------------------------------------------------------------


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the published networks were trained on and are sampled by: recipes/dit/imagenet256.yaml."""
    learned = config.get("learn_sigma", True)
    variance: dict[str, Any] = {"learned_sigma": True, "variance": "learned_range"}
    view = {
        "name": "denoiser",
        "path": {"name": "vp-discrete", "schedule": "linear", "steps": 1000},
        "prediction": "eps",
        "time": "index",
        **(variance if learned else {"learned_sigma": False, "variance": "fixed_large"}),
    }
    sampler = {"name": "ddpm", "steps": 250, "cfg_channels": 3}
    recipe = {"paper": "dit", "sampler": sampler, "guidance_scale": 1.5}
    return {"view": view, "recipe": recipe, "data": latents(config)}


def assumes_training(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells of the network, and of the training of one that is not a published one."""
    found = assumes(state, config)
    remark = "schedule=linear over 1000 steps, as published (schedule=cosine tells otherwise)"
    return {**found, "schedule": remark} if found else found


CONVERTER = converter(
    "dit", header, "facebookresearch/DiT (bare state, or train.py's model/ema)", assumes=assumes_training
)


# -- diffusers -------------------------------------------------------------------------------------------------------

BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
OUTER = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
EMBEDDER = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
}
TABLE = "class_embedder.embedding_table.weight"
KINDS = ("weight", "bias")


def diffusers_recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    return {f"transformer_blocks.0.norm1.emb.{TABLE}", "proj_out_2.weight", "pos_embed.proj.weight"} <= keys


def diffusers_to_ours(state: State, input_size: int) -> dict[str, Tensor]:
    """diffusers' layout -> ours. input_size: side of x, for the positions that this layout does not store."""
    ours: dict[str, Tensor] = {}
    for kind in KINDS:
        for a, b in OUTER.items():
            ours[f"{a}.{kind}"] = state[f"{b}.{kind}"]
        for a, b in EMBEDDER.items():
            ours[f"{a}.{kind}"] = state[f"transformer_blocks.0.norm1.emb.{b}.{kind}"]
        ours[f"final_layer.adaLN_modulation.1.{kind}"] = state[f"proj_out_1.{kind}"]
        for i in range(depth_of(state, "transformer_blocks.")):
            theirs = f"transformer_blocks.{i}."
            for a, b in BLOCK.items():
                ours[f"blocks.{i}.{a}.{kind}"] = state[f"{theirs}{b}.{kind}"]
            qkv = [state[f"{theirs}attn1.to_{x}.{kind}"] for x in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    ours["y_embedder.embedding_table.weight"] = state[f"transformer_blocks.0.norm1.emb.{TABLE}"]
    hidden, _, patch, _ = state["pos_embed.proj.weight"].shape
    grid = input_size // patch
    ours["pos_embed"] = torch.from_numpy(sincos_2d(hidden, grid, grid)).float()[None]
    return ours


def diffusers_from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> diffusers' layout; the embedders are copied into every block."""
    theirs: dict[str, Tensor] = {}
    for kind in KINDS:
        for a, b in OUTER.items():
            theirs[f"{b}.{kind}"] = state[f"{a}.{kind}"]
        theirs[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        for i in range(depth_of(state)):
            block = f"transformer_blocks.{i}."
            for a, b in BLOCK.items():
                theirs[f"{block}{b}.{kind}"] = state[f"blocks.{i}.{a}.{kind}"]
            for a, b in EMBEDDER.items():
                theirs[f"{block}norm1.emb.{b}.{kind}"] = state[f"{a}.{kind}"]
            for x, part in zip("qkv", state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)):
                theirs[f"{block}attn1.to_{x}.{kind}"] = part
            theirs[f"{block}norm1.emb.{TABLE}"] = state["y_embedder.embedding_table.weight"]
    return theirs


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor keywords -> config.json of diffusers' DiTTransformer2DModel."""
    hidden, heads, channels = config["hidden_size"], config["num_heads"], config.get("in_channels", 4)
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "in_channels": channels,
        "out_channels": channels * (2 if config.get("learn_sigma", True) else 1),
        "num_layers": config["depth"],
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config.get("num_classes", 1000),
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,  # its default of 1e-5 is not the official one
    }


def at_start(config: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y at t = 0, where diffusers' other frequencies do not matter."""
    shape = (1, config.get("in_channels", 4), config["input_size"], config["input_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.zeros(1).long(), torch.ones(1).long()


def forward(network: Any, config: Mapping[str, Any]) -> Tensor:
    x, t, y = at_start(config)
    return network(x, t, y)  # type: ignore[no-any-return]


def diffusers_forward(state: State, config: Mapping[str, Any]) -> Tensor:
    """The same by diffusers. VgmError: not installed."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as e:
        raise needs_extra("this proof", "diffusers", "hf") from e
    network = DiTTransformer2DModel.from_config(diffusers_config(config)).eval()
    network.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)  # its position table is no weight
    x, t, y = at_start(config)
    with torch.no_grad():
        return network(x, timestep=t, class_labels=y).sample  # type: ignore[no-any-return]


def allows(config: Mapping[str, Any], input_size: int) -> None:
    """VgmError: the layout's name says another size, or no file of a DiT is of such a network."""
    plain(config)
    if config["input_size"] != input_size:
        raise VgmError(
            f"this layout is of {input_size}x{input_size} inputs, the network takes {config['input_size']}",
            "dit-diffusers is of 32 (256 pixels), dit-diffusers-512 of 64; a folder (config.json) is of any size",
            USAGE,
        )


def diffusers(name: str, input_size: int) -> Layout:
    def to_ours(state: State) -> dict[str, Tensor]:
        return diffusers_to_ours(state, input_size)

    def adapt(layout: Layout, json: Mapping[str, Any]) -> Layout:
        """diffusers' 256-pixel layout is that of every size, which config.json tells."""
        return layout if input_size == 64 else diffusers(name, json.get("sample_size", input_size))

    return Layout(
        name=name,
        component="dit",
        summary=f"diffusers DiTTransformer2DModel, {8 * input_size} pixels",
        recognise=diffusers_recognise,
        to_ours=to_ours,
        from_ours=diffusers_from_ours,
        config=lambda state: config_from(to_ours(state)),
        allows=lambda config: allows(config, input_size),
        published=Published(header=header, assumes=lambda state, config: assumes_training(to_ours(state), config)),
        diffusers=Diffusers(
            config_json=diffusers_config,
            from_json=lambda json: {"num_heads": json["num_attention_heads"]} if "num_attention_heads" in json else {},
            matches=lambda json: (json.get("sample_size") == 64) == (input_size == 64),
            adapt=adapt,
        ),
        proof=Proof(reference=diffusers_forward, forward=forward),
    )


DIFFUSERS = diffusers("dit-diffusers", input_size=32)
DIFFUSERS_512 = diffusers("dit-diffusers-512", input_size=64)
