"""Published text towers of CLIP, as transformers and as OpenCLIP name them, alone or inside a diffusion checkpoint, and
SDXL's two.

Inside a checkpoint of Stable Diffusion 1 lies `cond_stage_model.transformer.text_model.*`, of 2
`cond_stage_model.model.*`, of SDXL `conditioner.embedders.0.transformer.text_model.*` and
`conditioner.embedders.1.model.*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Diffusers, Files, Layout, Proof, Published
from vgm_cli.errors import USAGE, VgmError, needs_extra
from vgm_cli.nets.text_presets import CLIP
from vgm_cli.nn.example import tokens

State = Mapping[str, Tensor]
Table = tuple[tuple[str, str], ...]
SDXL_CLIP, SDXL_OPEN = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

TRANSFORMERS: Table = (  # theirs -> ours; what stands behind / is a third of ours
    (r"text_model\.embeddings\.token_embedding\.weight", "token.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "pos"),
    (r"text_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", r"blocks.\1.qkv.\3/\2"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"blocks.\1.proj.\2"),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.(fc\d)\.(\w+)", r"blocks.\1.\2.\3"),
    (r"text_model\.final_layer_norm\.(\w+)", r"norm.\1"),
    (r"text_projection\.weight", "head.weight"),
)
OPEN_CLIP: Table = (
    (r"token_embedding\.weight", "token.weight"),
    (r"positional_embedding", "pos"),
    (r"transformer\.resblocks\.(\d+)\.ln_(\d)\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", r"blocks.\1.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"blocks.\1.proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"blocks.\1.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"blocks.\1.fc2.\2"),
    (r"ln_final\.(\w+)", r"norm.\1"),
    (r"text_projection", "head.weight"),  # transposed
)


def renamed(name: str, table: Table) -> str | None:
    """Our name of a tensor, with what part of it this is; None: it is no tensor of ours."""
    return next((re.sub(theirs, ours, name) for theirs, ours in table if re.fullmatch(theirs, name)), None)


def named(table: Table, prefixes: tuple[str, ...]) -> Any:
    """{layout's name: name in the file} of the tensors below the first prefix that there is, as Files.names."""

    def names(found: Iterable[str]) -> dict[str, str]:
        found = list(found)
        for prefix in prefixes:
            own = {n.removeprefix(prefix): n for n in found if n.startswith(prefix)}
            own = {a: b for a, b in own.items() if renamed(a, table) is not None}
            if own:
                return own
        return {}

    return names


def highest(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds."""
    return 1 + max((int(m[1]) for n in names if (m := re.match(pattern, n))), default=-1)


# -- CLIP --------------------------------------------------------------------------------------------------------------

LDM_CLIP = ("cond_stage_model.transformer.", SDXL_CLIP, "")
LDM_OPEN = ("cond_stage_model.model.", SDXL_OPEN, "")
transformers_names, open_names = named(TRANSFORMERS, LDM_CLIP), named(OPEN_CLIP, LDM_OPEN)


def both(names: Iterable[str]) -> bool:
    """Whether a file holds both of SDXL's towers, which another layout reads together."""
    return {SDXL_CLIP + "text_model.final_layer_norm.weight", SDXL_OPEN + "ln_final.weight"} <= set(names)


def transformers_to_ours(state: State) -> dict[str, Tensor]:
    """transformers' CLIPTextModel -> ours. KeyError: a tensor is missing."""
    ours: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for theirs, name in transformers_names(state).items():
        target, _, third = str(renamed(theirs, TRANSFORMERS)).partition("/")
        if third:
            thirds.setdefault(target, {})[third] = state[name]
        else:
            ours[target] = state[name]
    return complete(ours | {k: torch.cat([v["q"], v["k"], v["v"]]) for k, v in thirds.items()})


def complete(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same. KeyError: a tensor of a tower is missing."""
    layers = ("norm1", "norm2", "qkv", "proj", "fc1", "fc2")
    depth = highest(ours, r"blocks\.(\d+)\.")
    blocks = [f"blocks.{i}.{part}.{kind}" for i in range(depth) for part in layers for kind in ("weight", "bias")]
    for name in ("token.weight", "pos", "norm.weight", "norm.bias", *blocks):
        if name not in ours:
            raise KeyError(name)
    return ours


def transformers_from_ours(state: State) -> dict[str, Tensor]:
    theirs: dict[str, Tensor] = {}
    plain = {"norm1": "layer_norm1", "norm2": "layer_norm2", "proj": "self_attn.out_proj", "fc1": "mlp.fc1",
             "fc2": "mlp.fc2"}  # fmt: skip
    for name, tensor in complete(dict(state)).items():
        if m := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", name):
            block = f"text_model.encoder.layers.{m[1]}"
            if m[2] == "qkv":
                parts = zip("qkv", tensor.chunk(3))
                theirs |= {f"{block}.self_attn.{part}_proj.{m[3]}": own for part, own in parts}
            else:
                theirs[f"{block}.{plain[m[2]]}.{m[3]}"] = tensor
        elif name == "head.weight":
            theirs["text_projection.weight"] = tensor
        elif name.startswith("norm."):
            theirs[f"text_model.final_layer_norm.{name[5:]}"] = tensor
        else:
            kind = "token" if name == "token.weight" else "position"
            theirs[f"text_model.embeddings.{kind}_embedding.weight"] = tensor
    return theirs


def open_to_ours(state: State) -> dict[str, Tensor]:
    """OpenCLIP's text tower -> ours. KeyError: a tensor is missing."""
    ours = {str(renamed(theirs, OPEN_CLIP)): state[name] for theirs, name in open_names(state).items()}
    return complete(ours | ({"head.weight": ours["head.weight"].T.contiguous()} if "head.weight" in ours else {}))


def open_from_ours(state: State) -> dict[str, Tensor]:
    theirs = {}
    names = {"norm1": "ln_1", "norm2": "ln_2", "proj": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    for name, tensor in complete(dict(state)).items():
        if m := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", name):
            own = f"attn.in_proj_{m[3]}" if m[2] == "qkv" else f"{names[m[2]]}.{m[3]}"
            theirs[f"transformer.resblocks.{m[1]}.{own}"] = tensor
        elif name == "head.weight":
            theirs["text_projection"] = tensor.T.contiguous()
        elif name.startswith("norm."):
            theirs[f"ln_final.{name[5:]}"] = tensor
        else:
            theirs["token_embedding.weight" if name == "token.weight" else "positional_embedding"] = tensor
    return theirs


def tower_config(ours: State) -> dict[str, Any]:
    """Keywords that the shapes of a tower tell. Heads are 64 wide, as in every published one; three that divide the
    width otherwise."""
    vocabulary, width = ours["token.weight"].shape
    hidden = ours["blocks.0.fc1.weight"].shape[0]
    return {
        "width": width,
        "depth": highest(ours, r"blocks\.(\d+)\."),
        "heads": width // 64 if width % 64 == 0 else next(h for h in (3, 2, 1) if width % h == 0),
        "vocabulary": vocabulary,
        "length": ours["pos"].shape[0],
        "head": ours["head.weight"].shape[0] if "head.weight" in ours else 0,
    } | ({"hidden": hidden} if hidden != 4 * width else {})


def transformers_config(state: State) -> dict[str, Any]:
    """Keywords of a tower in transformers' names; inside SDXL's file it stops a block early."""
    own = tower_config(transformers_to_ours(state))
    inside = any(n.startswith(SDXL_CLIP) for n in state)
    quick = own["width"] <= 768  # OpenAI's; wider ones are OpenCLIP's
    return own | {"activation": "quick-gelu" if quick else "gelu", "skip": int(inside), "norm": not inside}


def open_config(state: State) -> dict[str, Any]:
    """Keywords of a tower in OpenCLIP's names: the last but one block's work, which SDXL does not normalise."""
    inside = any(n.startswith(SDXL_OPEN) for n in state)
    return tower_config(open_to_ours(state)) | {"activation": "gelu", "skip": 1, "norm": not inside, "pad": 0}


def taken(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What of a tower's work is taken is in no tensor."""
    if any(n.startswith(("cond_stage_model.", "conditioner.")) for n in state):
        return {}
    which = "skip=1: all but the last block" if config["skip"] else "skip=0: all blocks"
    last = "normalised" if config["norm"] else "not normalised"
    return {"skip": f"{which}, {last} (Stable Diffusion 1 skip=0, 2 skip=1, SDXL skip=1 norm=false)"}


def given(config: Mapping[str, Any]) -> Tensor:
    """Tokens of one text, of which the last ends it."""
    ids = tokens(config["length"], config["vocabulary"] - 1)
    ids[:, -1] = config["vocabulary"] - 1
    return ids


def forward(network: Any, config: Mapping[str, Any]) -> Tensor:
    context, whole = network.both(given(config))
    return torch.cat([context.flatten(), whole.flatten()])


def transformers_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor keywords -> config.json of transformers' CLIPTextModel, with a projection where it has a head."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.get("head") else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.get("vocabulary", 49408),
        "hidden_size": config["width"],
        "intermediate_size": config.get("hidden") or 4 * config["width"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["heads"],
        "max_position_embeddings": config.get("length", 77),
        "hidden_act": {"quick-gelu": "quick_gelu", "gelu": "gelu"}[config.get("activation", "quick-gelu")],
        "projection_dim": config.get("head") or config["width"],
        "layer_norm_eps": 1e-5,
        "bos_token_id": config.get("vocabulary", 49408) - 2,
        "eos_token_id": config.get("vocabulary", 49408) - 1,
    }


def from_transformers_json(json: Mapping[str, Any]) -> dict[str, Any]:
    if "hidden_act" not in json:
        return {}
    kinds = {"quick_gelu": "quick-gelu", "gelu": "gelu"}
    if json["hidden_act"] not in kinds:
        raise VgmError(f"a text tower with {json['hidden_act']} has no counterpart", "quick_gelu or gelu has", USAGE)
    return {"activation": kinds[json["hidden_act"]], "heads": json["num_attention_heads"]}


def transformers_forward(state: State, config: Mapping[str, Any]) -> Tensor:
    """The same by transformers' own code. VgmError: not installed."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    except ImportError as e:
        raise needs_extra("this proof", "transformers", "hf") from e
    full = {"vocabulary": 49408, "length": 77, **config}
    network: Any = CLIPTextModelWithProjection(CLIPTextConfig(**transformers_json(full))).eval()
    own = {k: v.float() for k, v in state.items()}
    if "text_projection.weight" not in own:
        own["text_projection.weight"] = torch.eye(config["width"])
    network.load_state_dict(own)
    with torch.no_grad():
        out = network(given(full), output_hidden_states=True)
        context = out.hidden_states[-1 - config.get("skip", 0)]
        context = network.text_model.final_layer_norm(context) if config.get("norm", True) else context
        return torch.cat([context.flatten(), out.text_embeds.flatten()])


CLIP_TEXT = Layout(
    name="clip-text",
    component="clip-text",
    kind="condition",
    recognise=lambda names: (
        not both(names := set(names)) and "text_model.embeddings.token_embedding.weight" in transformers_names(names)
    ),
    to_ours=transformers_to_ours,
    from_ours=transformers_from_ours,
    config=transformers_config,
    files=Files(names=transformers_names, unused=(r"position_ids$",)),
    published=Published(assumes=taken),
    diffusers=Diffusers(
        config_json=transformers_json,
        from_json=from_transformers_json,
        matches=lambda json: any(a.startswith("CLIPText") for a in json.get("architectures") or ()),
    ),
    proof=Proof(reference=transformers_forward, forward=forward),
    summary="CLIP's text tower in transformers' names, also inside Stable Diffusion 1 and SDXL files",
)
OPEN_CLIP_TEXT = Layout(
    name="open-clip-text",
    component="clip-text",
    kind="condition",
    recognise=lambda names: (
        not both(names := set(names)) and {"token_embedding.weight", "ln_final.weight"} <= open_names(names).keys()
    ),
    to_ours=open_to_ours,
    from_ours=open_from_ours,
    config=open_config,
    files=Files(wrapper="state_dict", names=open_names, unused=(r"attn_mask$", r"logit_scale$")),
    published=Published(assumes=taken),
    proof=Proof(forward=forward),
    summary="OpenCLIP's text tower, also inside Stable Diffusion 2 and SDXL files",
)

# -- SDXL --------------------------------------------------------------------------------------------------------------


def sdxl_names(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    own = [SDXL_CLIP + n for n in named(TRANSFORMERS, (SDXL_CLIP,))(names)]
    own += [SDXL_OPEN + n for n in named(OPEN_CLIP, (SDXL_OPEN,))(names)]
    return {n: n for n in own}


def below(state: State, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def sdxl_to_ours(state: State) -> dict[str, Tensor]:
    """The two towers of SDXL's file -> ours. KeyError: a tensor is missing."""
    clip = transformers_to_ours(below(state, SDXL_CLIP))
    return {f"clip.{k}": v for k, v in clip.items()} | {
        f"open_clip.{k}": v for k, v in open_to_ours(below(state, SDXL_OPEN)).items()
    }


def sdxl_from_ours(state: State) -> dict[str, Tensor]:
    clip = transformers_from_ours(below(state, "clip."))
    return {SDXL_CLIP + k: v for k, v in clip.items()} | {
        SDXL_OPEN + k: v for k, v in open_from_ours(below(state, "open_clip.")).items()
    }


def sdxl_config(state: State) -> dict[str, Any]:
    ours = sdxl_to_ours(state)
    clip = {**tower_config(below(ours, "clip.")), **{k: CLIP["sdxl-l"][k] for k in ("activation", "skip", "norm")}}
    other = {k: CLIP["sdxl-g"][k] for k in ("activation", "skip", "norm", "pad")}
    return {"clip": clip, "open_clip": {**tower_config(below(ours, "open_clip.")), **other}}


def sdxl_forward(network: Any, config: Mapping[str, Any]) -> Tensor:
    context, whole = network.open_clip.both(given({"length": 77, "vocabulary": 49408, **config["open_clip"]}))
    first = network.clip(given({"length": 77, "vocabulary": 49408, **config["clip"]}))
    return torch.cat([first.flatten(), context.flatten(), network.vector(whole).flatten()])


SDXL_TEXT = Layout(
    name="sdxl-text",
    component="sdxl-text",
    kind="condition",
    recognise=both,
    to_ours=sdxl_to_ours,
    from_ours=sdxl_from_ours,
    config=sdxl_config,
    files=Files(wrapper="state_dict", names=sdxl_names, unused=(r"position_ids$", r"logit_scale$", r"attn_mask$")),
    proof=Proof(forward=sdxl_forward),
    summary="both text towers of SDXL's single files",
)
