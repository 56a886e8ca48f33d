"""Latent diffusion's own text encoder and class table, alone or inside its checkpoints (`cond_stage_model.*`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Proof
from vgm_cli.nets.clip_text_checkpoints import State, Table, highest, renamed
from vgm_cli.nn.example import tokens

BERT: Table = (
    (r"transformer\.token_emb\.weight", "token.weight"),
    (r"transformer\.pos_emb\.emb\.weight", "pos.weight"),
    (r"transformer\.norm\.(\w+)", r"norm.\1"),
)

OURS_OF = {"0.weight": "norm1.weight", "0.bias": "norm1.bias", "1.to_q.weight": "attn.to_q.weight",
           "1.to_k.weight": "attn.to_k.weight", "1.to_v.weight": "attn.to_v.weight",
           "1.to_out.weight": "attn.to_out.0.weight", "1.to_out.bias": "attn.to_out.0.bias"}  # fmt: skip
OURS_OF_SECOND = {"0.weight": "norm2.weight", "0.bias": "norm2.bias", "1.net.0.0.weight": "mlp.0.weight",
                  "1.net.0.0.bias": "mlp.0.bias", "1.net.2.weight": "mlp.2.weight",
                  "1.net.2.bias": "mlp.2.bias"}  # fmt: skip
LAYERS = "transformer.attn_layers.layers."


def bert_names(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    prefix = "cond_stage_model." if f"cond_stage_model.{LAYERS}0.0.weight" in names else ""
    own = {n.removeprefix(prefix): n for n in names if n.startswith(prefix + "transformer.")}
    return {a: b for a, b in own.items() if a.startswith(LAYERS) or renamed(a, BERT) or ".to_logits." in a}


def bert_to_ours(state: State) -> dict[str, Tensor]:
    """BERTEmbedder -> ours, without the last layer to logits. KeyError: a tensor is missing."""
    own = {ours: state[theirs] for ours, theirs in bert_names(state).items()}
    ours = {new: own[name] for name in own if (new := renamed(name, BERT))}
    for i in range(highest(own, re.escape(LAYERS) + r"(\d+)\.")):
        table = OURS_OF_SECOND if i % 2 else OURS_OF
        ours |= {f"blocks.{i // 2}.{b}": own[f"{LAYERS}{i}.{a}"] for a, b in table.items()}
    for name in ("token.weight", "pos.weight", "norm.weight", "norm.bias"):
        if name not in ours:
            raise KeyError(name)
    return ours


def bert_from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> BERTEmbedder, whose last layer nothing uses: it is zero."""
    plain = {"token.weight": "token_emb.weight", "pos.weight": "pos_emb.emb.weight"}
    theirs = {}
    for name, tensor in state.items():
        if m := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            second = m[2] in OURS_OF_SECOND.values()
            table = OURS_OF_SECOND if second else OURS_OF
            own = next(a for a, b in table.items() if b == m[2])
            theirs[f"{LAYERS}{2 * int(m[1]) + second}.{own}"] = tensor
        else:
            theirs[f"transformer.{plain.get(name, name)}"] = tensor
    token = state["token.weight"]
    return theirs | {"transformer.to_logits.weight": token.new_zeros(token.shape),
                     "transformer.to_logits.bias": token.new_zeros(len(token))}  # fmt: skip


def bert_config(state: State) -> dict[str, Any]:
    """Keywords that the shapes tell; heads are eight, as published."""
    ours = bert_to_ours(state)
    (vocabulary, width), inner = ours["token.weight"].shape, len(ours["blocks.0.attn.to_q.weight"])
    sizes = {"width": width, "depth": highest(ours, r"blocks\.(\d+)\."), "vocabulary": vocabulary}
    return sizes | {"length": len(ours["pos.weight"]), "heads": 8, "head_channels": inner // 8}


def bert_forward(network: Any, config: Mapping[str, Any]) -> Tensor:
    return network(tokens(config["length"], config["vocabulary"]))  # type: ignore[no-any-return]


BERT_TEXT = Layout(
    name="bert-text",
    component="bert-text",
    kind="condition",
    recognise=lambda names: {f"{LAYERS}0.0.weight", f"{LAYERS}1.1.net.0.0.weight"} <= bert_names(names).keys(),
    to_ours=bert_to_ours,
    from_ours=bert_from_ours,
    config=bert_config,
    files=Files(wrapper="state_dict", names=bert_names, unused=(r"\.to_logits\.",)),
    proof=Proof(forward=bert_forward),
    summary="latent diffusion's trained text encoder, also inside its checkpoints (cond_stage_model.*)",
)


TABLE = "embedding.weight"


def token_names(names: Iterable[str]) -> dict[str, str]:
    found = next((n for n in names if n in (TABLE, f"cond_stage_model.{TABLE}")), None)
    return {} if found is None else {TABLE: found}


CLASS_TOKEN = Layout(
    name="class-token",
    component="class-token",
    kind="condition",
    recognise=lambda names: f"cond_stage_model.{TABLE}" in set(names) or set(names) == {TABLE},
    to_ours=lambda state: {ours: state[theirs] for ours, theirs in token_names(state).items()},
    from_ours=dict,
    config=lambda state: class_config(state[token_names(state)[TABLE]]),
    files=Files(wrapper="state_dict", names=token_names),
    proof=Proof(forward=lambda network, config: network.embedding.weight),
    summary="latent diffusion's class table, also inside its checkpoints (cond_stage_model.*)",
)


def class_config(table: Tensor) -> dict[str, Any]:
    """Of 1001 vectors the last is that of no class, as in the model with guidance."""
    null = len(table) % 10 == 1
    return {"num_classes": len(table) - null, "width": table.shape[1], "null_class": null}
