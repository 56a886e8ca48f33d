"""VQ-VAE: an encoder, a codebook, a decoder. van den Oord et al., NeurIPS 2017 (arXiv 1711.00937), sec. 3 and 4.

The authors published their library's quantizer and an example (google-deepmind/sonnet@26b0518 sonnet/src/nets/vqvae.py,
examples/vqvae_example.ipynb), no repository of the experiments; zalandoresearch/pytorch-vq-vae@b98fde9 and
clementchadebec/benchmark_VAE@6419e21 (pythae) are others' versions. All of them are `layout`s of one network.
The quantizers are the host's, vgm_cli/nn/quantize.py. Images come in [-1, 1] and are halved inside, as all of them do
but pythae, which takes [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.losses.pixels import LEVELS, DiscretisedLogistic
from vgm_cli.nets.first_stage import QuantizedStage
from vgm_cli.nn.example import noise
from vgm_cli.nn.quantize import EMAVectorQuantizer, FlavourName, GroupedQuantizer, VectorQuantizer
from vgm_cli.ranges import Blocks, Decay, NonNegative, Side, Vocabulary, Width

# -- encoders and decoders ---------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """What the published convolutional networks differ in.

    narrow: the outermost convolutions have half of the hidden channels. third: a 3x3 convolution follows the two
    strided ones; rectified: with a ReLU behind it. biases: in the residual blocks. rectified_skip: what a residual
    block adds to is relu(h), not h (an in-place ReLU in the zalando notebook).
    """

    narrow: bool
    third: bool
    rectified: bool
    biases: bool
    rectified_skip: bool


FORMS = {
    "sonnet": Form(narrow=True, third=True, rectified=True, biases=True, rectified_skip=False),
    "zalando": Form(narrow=True, third=True, rectified=False, biases=False, rectified_skip=True),
    "paper": Form(narrow=False, third=False, rectified=False, biases=True, rectified_skip=False),
}
LayoutName = Literal["sonnet", "zalando", "paper", "pythae"]


class Residual(nn.Module):
    """h + conv1x1(relu(conv3x3(relu(h))))."""

    def __init__(self, channels: int, hidden: int, form: Form):
        super().__init__()
        self.conv3 = nn.Conv2d(channels, hidden, 3, padding=1, bias=form.biases)
        self.conv1 = nn.Conv2d(hidden, channels, 1, bias=form.biases)
        self.rectified_skip = form.rectified_skip

    def forward(self, h: Tensor) -> Tensor:
        active = F.relu(h)
        return (active if self.rectified_skip else h) + self.conv1(F.relu(self.conv3(active)))


def residual_stack(channels: int, hidden: int, layers: int, form: Form) -> nn.Sequential:
    return nn.Sequential(*(Residual(channels, hidden, form) for _ in range(layers)), nn.ReLU())


class Encoder(nn.Module):
    """Two convolutions of stride 2, residual blocks: (B, C, H, W) -> (B, channels, H / 4, W / 4)."""

    def __init__(self, in_channels: int, channels: int, hidden: int, layers: int, form: Form):
        super().__init__()
        outer = channels // 2 if form.narrow else channels
        self.conv_in = nn.Conv2d(in_channels, outer, 4, stride=2, padding=1)
        self.conv_down = nn.Conv2d(outer, channels, 4, stride=2, padding=1)
        self.conv_mid = nn.Conv2d(channels, channels, 3, padding=1) if form.third else None
        self.rectified = form.rectified
        self.stack = residual_stack(channels, hidden, layers, form)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_down(F.relu(self.conv_in(x)))  # (B, channels, H/4, W/4)
        if self.conv_mid is not None:
            h = self.conv_mid(F.relu(h))
        return self.stack(F.relu(h) if self.rectified else h)


class Decoder(nn.Module):
    """The mirror image: (B, D, h, w) -> (B, C, 4 h, 4 w)."""

    def __init__(self, out_channels: int, dim: int, channels: int, hidden: int, layers: int, form: Form):
        super().__init__()
        outer = channels // 2 if form.narrow else channels
        self.conv_in = nn.Conv2d(dim, channels, 3, padding=1)
        self.stack = residual_stack(channels, hidden, layers, form)
        self.conv_up = nn.ConvTranspose2d(channels, outer, 4, stride=2, padding=1)
        self.conv_out = nn.ConvTranspose2d(outer, out_channels, 4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(F.relu(self.conv_up(self.stack(self.conv_in(z)))))


class PerceptronEncoder(nn.Module):
    """pythae's default: a whole image becomes one latent, (B, C, H, W) -> (B, D, 1, 1)."""

    def __init__(self, values: int, channels: int, dim: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(values, channels), nn.Linear(channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(x.flatten(1))))[:, :, None, None]


class PerceptronDecoder(nn.Module):
    """(B, D, 1, 1) -> (B, C, H, W) in [0, 1]."""

    def __init__(self, shape: tuple[int, int, int], channels: int, dim: int):
        super().__init__()
        self.shape = shape
        self.hidden, self.out = nn.Linear(dim, channels), nn.Linear(channels, math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(z.flatten(1)))).sigmoid().unflatten(1, self.shape)


# -- the model ---------------------------------------------------------------------------------------------------------


def uniform_prior_bits(nll: Tensor, latents: int, codes: int, dims: int) -> Tensor:
    """Bits per dimension of the bound log p(x) >= log p(x | z) - n ln K: the divergence of a sure choice from the
    uniform prior is the constant ln K per latent. nll: nats of -log p(x | z), any shape."""
    return (nll + latents * math.log(codes)) / (dims * math.log(2))


class VQVAE(QuantizedStage):
    """Codec of tokens, or of latents before they are quantised; a model of 8-bit images where its likelihood is one.

    Ids are numbered over all codebooks: with G of them a position has G ids side by side in its row, see
    GroupedQuantizer. VgmError: half of the hidden channels is no whole number, or perceptrons are to have what they
    have not.
    """

    def __init__(
        self,
        image_channels: Width = 3,  # 1 or 3
        image_size: Side = 32,  # of perceptrons only; convolutions take any sides that divide by 4
        layout: LayoutName = "sonnet",  # whose network: see FORMS, or pythae's perceptrons
        channels: Width = 128,  # hidden channels
        residual_channels: Width = 32,  # inside the residual blocks
        residual_layers: Blocks = 2,  # residual blocks, in the encoder and in the decoder
        embed_dim: Width = 64,  # D, dimensions of a code
        n_embed: Vocabulary = 512,  # K, codes of a codebook
        groups: Width = 1,  # codes per position, each with a codebook of its own
        quantizer: Literal["ema", "loss"] = "ema",  # the codebook follows averages, or its part of the loss
        flavour: FlavourName = "sonnet",  # whose averages
        ema_decay: Decay = 0.99,  # of the averages
        beta: NonNegative = 0.25,  # weight of the commitment
        codebook_weight: NonNegative = 1.0,  # of the codebook's part of the loss
        reduction: Literal["mean", "sum"] = "mean",  # of both parts, over all elements
        likelihood: Literal["gaussian", "discretised-logistic"] = "gaussian",  # of pixels; gaussian: squared error
        latent_stats: bool = False,  # measure the latents while training, so that diffusion finds them at unit scale
    ):
        logistic = likelihood == "discretised-logistic"
        dim, heads = groups * embed_dim, 2 if logistic else 1
        encoder: nn.Module
        decoder: nn.Module
        if layout == "pythae":
            if logistic or groups > 1:
                raise VgmError("pythae's perceptrons have one code and no distribution of pixels", code=USAGE)
            shape = (image_channels, image_size, image_size)
            encoder = PerceptronEncoder(math.prod(shape), channels, dim)
            decoder = PerceptronDecoder(shape, channels, dim)
        else:
            form = FORMS[layout]
            if form.narrow and channels < 2:  # an odd number's half is rounded down, as officially
                raise VgmError(f"channels={channels} has no half, which layout={layout} wants", code=USAGE)
            encoder = Encoder(image_channels, channels, residual_channels, residual_layers, form)
            decoder = Decoder(heads * image_channels, dim, channels, residual_channels, residual_layers, form)
        super().__init__(
            encoder,
            decoder,
            (nn.Identity() if layout == "pythae" else nn.Conv2d(channels, dim, 1), nn.Identity()),
            image_channels,
            dim,
            image_size if layout == "pythae" else 4,
            (1.0, 0.0),
            latent_stats,
            None,
            0.25,
        )
        self.layout, self.codes_each, self.codes_per_position = layout, n_embed, groups

        def codebook() -> VectorQuantizer:
            more: dict[str, Any] = {"codebook_weight": codebook_weight, "reduction": reduction}
            if quantizer == "ema":
                return EMAVectorQuantizer(n_embed, embed_dim, beta, ema_decay, flavour, **more)
            plain = VectorQuantizer(n_embed, embed_dim, beta, legacy=False, **more)
            if layout in ("sonnet", "paper"):  # the others begin within 1 / K, as the host's quantizers do
                nn.init.uniform_(plain.embedding.weight, -math.sqrt(3 / embed_dim), math.sqrt(3 / embed_dim))
            return plain

        self.quantize = codebook() if groups == 1 else GroupedQuantizer([codebook() for _ in range(groups)])
        self.likelihood = DiscretisedLogistic() if logistic else None
        if logistic:  # of the protocols of api.py; a squared error is no likelihood
            self.log_likelihood, self.pixel_log_likelihood = self._bound, self._given_tokens

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        side = config["image_size"] if config["layout"] == "pythae" else 8
        return {"x": noise(1, config["image_channels"], side, side).clamp(-1, 1)}

    def token_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """(C, H, W) of an image -> (h, w G)."""
        _, h, w = self.latent_shape(image_shape)
        return h, w * self.codes_per_position

    def moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder((x + 1) / 2 if self.layout == "pythae" else x / 2))

    def heads(self, codes: Tensor) -> Tensor:
        """Codes (B, c, h, w) -> images (B, C, H, W) in [-1, 1], or a likelihood's parameters (B, 2 C, H, W)."""
        out = self.decoder(codes)
        if self.likelihood is not None:
            return out
        return 2 * out - 1 if self.layout == "pythae" else 2 * out

    def pixels(self, heads: Tensor) -> Tensor:
        """The images that heads say: (B, C, H, W)."""
        return heads if self.likelihood is None else 2 * self.likelihood.mean(heads.chunk(2, 1)[0]) - 1

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.pixels(self.heads(z))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, H, W) in [-1, 1] -> heads, the quantizer's loss (), ids (B, h, w G)."""
        h = self.moments(x)
        self.follow(h)
        z, loss, ids = self.quantize(h)
        return self.heads(z), loss, ids

    # -- likelihood

    def nll(self, x: Tensor, heads: Tensor) -> Tensor:
        """-log p(x | z) of 8-bit images x (B, C, H, W), levels k / 255, in nats: (B,)."""
        assert self.likelihood is not None
        h, s = heads.float().chunk(2, 1)
        return -self.likelihood.log_prob(x, h, s)

    def _given_tokens(self, x: Tensor, ids: Tensor) -> Tensor:
        """api.HasPixelLikelihood."""
        return -self.nll(x.float() / LEVELS, self.heads(self.quantize.lookup(ids)))

    def _bound(self, x: Tensor, generators: list[Any]) -> tuple[Tensor, str]:
        """x: uint8 (B, C, H, W) -> nats (B,); the contract of vgm_cli/metrics/likelihood.py. Nothing is drawn: the
        encoder's choice is sure."""
        ids = self.tokens(x.float() / LEVELS * 2 - 1)
        nats = self._given_tokens(x, ids) - ids[0].numel() * math.log(self.codes_each)
        return nats, f"ELBO, uniform prior of {ids[0].numel()} codes of {self.codes_each}"
