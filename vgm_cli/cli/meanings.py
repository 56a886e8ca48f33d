"""What the keys of a recipe mean, read where it is said: in comments beside fields and parameters, or in docstrings."""

from __future__ import annotations

import functools
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from typing import Any


def of_class(cls: type, names: Iterable[str]) -> dict[str, str]:
    """{field: meaning} of a dataclass; the nearest class of its ancestry that explains a field counts."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if base is not object:
            for name, text in comments(base, names).items():
                found.setdefault(name, text)
    return found


def of_target(target: Any, names: Iterable[str]) -> dict[str, str]:
    """{constructor keyword: meaning} of a component's class or function."""
    names = list(names)
    classes = [c for c in target.__mro__ if c is not object] if inspect.isclass(target) else [target]
    found: dict[str, str] = {}
    for part in classes:
        places: tuple[Any, ...] = (part.__dict__.get("__init__") if inspect.isclass(part) else None, part)
        for place in places:
            if place is not None:
                for name, text in {**from_docstring(place, names), **comments(place, names)}.items():
                    found.setdefault(name, text)
    return found


def comments(place: type | Callable[..., Any], names: Iterable[str]) -> dict[str, str]:
    """{name: the comment on the line that introduces it}."""
    found = _comments(place)
    return {name: found[name] for name in found.keys() & set(names)}


@functools.cache
def _comments(place: type | Callable[..., Any]) -> dict[str, str]:
    """The comments of all lines that a word opens."""
    try:
        source = textwrap.dedent(inspect.getsource(place))
    except (OSError, TypeError):
        return {}
    found: dict[str, str] = {}
    line_name = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            before = token.line[: token.start[1]]
            if token.type == tokenize.NAME and not before.strip():
                line_name = token.string
            elif token.type == tokenize.COMMENT and line_name and before.strip() and "noqa" not in token.string:
                found.setdefault(line_name, token.string.lstrip("# "))
            elif token.type in (tokenize.NL, tokenize.NEWLINE):
                line_name = ""
    except tokenize.TokenError:
        pass
    return found


def from_docstring(place: Any, names: Iterable[str]) -> dict[str, str]:
    """{name: text} of docstrings that explain keywords as `name: text.` or `a, b: text.`, one sentence or more each."""
    text = " ".join(inspect.cleandoc(place.__doc__ or "").split())
    wanted = set(names)
    starts = [
        (m, [n for n in re.split(r",\s*(?:and\s+)?", m["names"]) if n in wanted])
        for m in re.finditer(r"(?:^|(?<=[.;:)]\s))(?P<names>\w+(?:,\s\w+)*):\s", text)
    ]
    starts = [(m, known) for m, known in starts if known]
    ends = [m.start() for m, _ in starts[1:]] + [len(text)]
    stop = re.compile(r"\s(?:VgmError|Raises|Shapes?|The attribute)\b.*")
    found: dict[str, str] = {}
    for (m, known), end in zip(starts, ends):
        for name in known:
            found.setdefault(name, stop.sub("", text[m.end() : end]).strip().rstrip(".;"))
    return found


# words that mean the same wherever they stand; a component's own explanation goes before
WORDS = {
    "adaptive": "the adversarial weight balances the gradients at the last layer",
    "channel_mult_emb": "width of the embedding, as a multiple of the first channels",
    "autoguidance": "RUN of a worse version of the network (smaller, or trained for shorter), to be guided away from",
    "autoguidance_scale": "1 is the network itself, above it is guided",
    "classifier": "RUN of a classifier of noisy images, whose gradient guides towards the class",
    "classifier_scale": "of classifier guidance",
    "conditional": "the noise level is an input",
    "conv_resample": "levels are halved and doubled by convolutions",
    "form": "of the diffusion coefficient",
    "latent_stats": "mean and deviation of the latents are measured in training",
    "norm": "factor on the diffusion coefficient",
    "num_scales": "number of noise levels",
    "progressive_combine": "how skip and main branch are joined: sum or cat",
    "sample_eps": "where the SDE ends; none given: the path's own",
    "sampler": "ddpm or ddim",
    "P_mean": "mean of ln sigma in training",
    "P_std": "standard deviation of ln sigma in training",
    "activation": "nonlinearity of the layers",
    "attention_resolutions": "down-sampling factors at which there is attention",
    "attn_dropout": "share of attention weights dropped in training",
    "attn_pdrop": "share of attention weights dropped in training",
    "attn_type": "vanilla, linear or none",
    "atol": "absolute tolerance of the adaptive solver",
    "beta_end": "the last beta",
    "beta_start": "the first beta",
    "cfg_channels": "leading channels that guidance applies to; none given: all",
    "ch_mult": "channels of each level, as multiples of the first",
    "channel_mult": "channels of each level, as multiples of the first",
    "channels": "channels of the images; read off the data",
    "depth": "number of blocks",
    "dim": "width",
    "disc_loss": "loss of the discriminator",
    "disc_weight": "weight of the adversarial loss",
    "discriminator": "the role's network",
    "dropout": "share of activations dropped in training, in [0, 1]",
    "embd_pdrop": "share of embeddings dropped in training",
    "entropy_weight": "weight of the codebook's entropy loss",
    "ema_decay": "decay of the codebook's running averages",
    "fake_score": "the network that follows the generator's distribution",
    "ffn_dim_multiplier": "factor on the feed-forward width",
    "ffn_dropout": "share of feed-forward activations dropped in training",
    "fir_kernel": "taps of the resampling filter",
    "fourier_scale": "scale of the random Fourier features of the noise level",
    "gen_loss": "adversarial loss of the generator",
    "greedy": "the most probable code instead of a draw",
    "grid": "where on the way from noise to data the network is evaluated",
    "guidance_rescale": "pulls the guided standard deviation back towards the conditional one's, in [0, 1]",
    "guidance_scale": "1 is no guidance",
    "hidden": "width of the hidden layers",
    "hidden_size": "width",
    "image_size": "side of the images in pixels; read off the data",
    "in_channels": "channels of the input; read off the data",
    "initializer_range": "standard deviation of the initial weights",
    "latent_size": "length of z",
    "learn_sigma": "the network gives the variance, too: twice the channels",
    "legacy": "the published (transposed) weighting of the commitment loss",
    "logvar": "initial log-variance of the reconstruction loss",
    "loss": "which of the objective's losses",
    "lpips": "the role's perceptual network",
    "lr_multiplier": "factor on the learning rate of these layers",
    "mapping_activation": "nonlinearity of the mapping network",
    "mapping_layers": "layers of the mapping network",
    "mapping_width": "width of the mapping network",
    "max_steps": "most steps of the adaptive solver",
    "method": "which solver",
    "model": "the network that is trained",
    "model_channels": "channels of the first level",
    "multiple_of": "the feed-forward width is rounded up to a multiple of this",
    "n_embd": "width",
    "n_head": "attention heads",
    "n_layer": "number of blocks",
    "nf": "channels of the first level",
    "nonlinearity": "of the layers",
    "norm_eps": "added to the variance in normalisations",
    "norm_groups": "groups of the group normalisations",
    "num_classes": "number of classes, 0 for none; read off the data",
    "num_head_channels": "channels of an attention head; -1: num_heads counts",
    "num_heads": "attention heads",
    "num_res_blocks": "residual blocks of a level",
    "null_class": "the label table has a row for no class, which guidance needs",
    "ode_tol": "tolerance of the adaptive solver",
    "order": "in which order codes are written",
    "pairs": "noise and the teacher's images for it",
    "patch_size": "side of the patches that become channels or tokens; 1: none",
    "perceptual": "weight of the perceptual loss",
    "perceptual_weight": "weight of the perceptual loss",
    "pixel_loss": "l1 or l2",
    "prediction": "what the network gives",
    "quantizer": "how encodings become codes",
    "resamp_with_conv": "levels are halved and doubled by convolutions",
    "resblock_updown": "levels are halved and doubled by residual blocks",
    "resid_dropout": "share of residual branches' activations dropped in training",
    "resid_pdrop": "share of residual branches' activations dropped in training",
    "reward": "what the samples are scored by",
    "rho": "exponent of the noise levels (Karras et al. 2022, eq. 5)",
    "rope_base": "base of the rotary positions' frequencies",
    "rtol": "relative tolerance of the adaptive solver",
    "scale_factor": "latents are multiplied by this",
    "shift": "time shift, above 1 towards noise",
    "shift_factor": "subtracted from latents before scaling",
    "sigma_max": "highest noise level",
    "sigma_min": "lowest noise level",
    "size": "side of the images in pixels; read off the data",
    "skip_rescale": "sums of two branches are divided by sqrt(2)",
    "steps": "number of steps",
    "tanh_out": "images end in a tanh",
    "teacher": "the trained network that is distilled",
    "temperature": "of the draws: below 1 likelier, above 1 more varied",
    "tile_overlap": "overlap of tiles when large images are decoded in pieces",
    "time_mean": "mean of the logit of t in training",
    "time_std": "standard deviation of the logit of t in training",
    "token_dropout": "share of tokens dropped in training",
    "top_k": "draw among the k likeliest codes; 0: all",
    "top_p": "draw among the likeliest codes of this total probability; 1: all",
    "unknown_index": "which code takes the place of unused ones",
    "use_new_attention_order": "q, k, v are split before the heads",
    "use_noise": "layers add noise",
    "use_scale_shift_norm": "the time embedding scales and shifts, instead of being added",
    "w_dim": "length of w",
    "z_channels": "channels of the latents",
}


def of_keys(target: Any, names: Iterable[str]) -> dict[str, str]:
    """{keyword: meaning} for a component: its own explanations, then the words that mean the same everywhere."""
    names = list(names)
    own = of_target(target, names)
    return {n: own.get(n) or WORDS.get(n, "") for n in names}
