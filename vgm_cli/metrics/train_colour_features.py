"""Train the colour feature network that ships as vgm_cli/assets/colour-features.safetensors.

    python -m vgm_cli.metrics.train_colour_features [--data FILE.npz] [--out FILE.safetensors]

Data: the train split of the shipped `openmoji` (OpenMoji, CC BY-SA 4.0, which the weights carry on). Two losses: the
class of a changed picture, and which of the pictures it is. Seeded: the same machine and thread count give the same
file. About five minutes of one CPU core.
"""

from __future__ import annotations

import argparse
import time
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.metrics.train_features import fit
from vgm_cli.nets.colour_features import KIND, ColourCNN, to_small
from vgm_cli.nn import augment

PACKAGE = Path(str(resources.files("vgm_cli")))
DATA = PACKAGE / "data" / "assets" / "openmoji32.npz"
OUT = PACKAGE / "assets" / "colour-features.safetensors"
EPOCHS, BATCH, LR, WEIGHT_DECAY, SMOOTHING, AVERAGE, SCALE = 90, 128, 4e-3, 0.03, 0.05, 0.99, 20.0


def load_pictures(path: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (N, 3, 32, 32) pictures, int64 (N,) classes, and (N,) bool: held out."""
    with np.load(path, allow_pickle=False) as f:
        x, y, split = (torch.from_numpy(f[k]) for k in ("images", "labels", "split"))
    return x.permute(0, 3, 1, 2).contiguous(), y.long(), split == 1


def changed(x: Tensor, g: torch.Generator) -> Tensor:
    """x: (B, 3, 32, 32) in [-1, 1] as a small generative model might have drawn it: moved, off in colour, blurred,
    noisy, in part missing."""

    def draw(k: int) -> Tensor:
        return torch.rand(len(x), k, generator=g)

    x = augment.recolour(augment.move(x, draw(augment.MOVE)), draw(augment.RECOLOUR))
    x = augment.hole(augment.defocus(x, draw(augment.DEFOCUS)), draw(augment.HOLE))
    deviation = 0.3 * draw(1).square()[..., None, None]
    return (x + deviation * torch.randn(x.shape, generator=g)).clamp(-1, 1)


@torch.no_grad()
def scores(net: ColourCNN, x: Tensor, y: Tensor, out: Tensor, seed: int = 1) -> dict[str, float]:
    """class: accuracy on the pictures held out; top-1, top-5: shares of changed pictures whose own is (among) the
    nearest of all by cosine, held out ones apart."""
    g = torch.Generator().manual_seed(seed)
    plain, logits = net(x)
    queries = F.normalize(net(changed(x, g))[0])
    near = (queries @ F.normalize(plain).T).topk(5).indices
    right = near == torch.arange(len(x))[:, None]
    return {
        "class": float((logits.argmax(1) == y)[out].float().mean()),
        "top-1": float(right[:, 0][~out].float().mean()),
        "top-5": float(right.any(1)[~out].float().mean()),
        "held-out top-1": float(right[:, 0][out].float().mean()),
        "held-out top-5": float(right.any(1)[out].float().mean()),
    }


def train(
    pictures: Tensor, labels: Tensor, out: Tensor, epochs: int = EPOCHS, seed: int = 0, log: bool = True
) -> tuple[ColourCNN, dict[str, float]]:
    """The averaged network (weights rounded to fp16, as stored) and its scores. out: (N,) bool, not trained on."""
    torch.manual_seed(seed)  # initialisation
    g = torch.Generator().manual_seed(seed)  # order and changes
    every = to_small(pictures)
    x, y = every[~out], labels[~out]
    net, average = ColourCNN(), ColourCNN()
    which = torch.nn.Linear(net.dim, len(x), bias=False)  # a direction for each picture

    def loss_of(rows: Tensor) -> Tensor:
        features, logits = net(changed(x[rows], g))
        alike = SCALE * F.normalize(features) @ F.normalize(which.weight).T
        return F.cross_entropy(alike, rows) + F.cross_entropy(logits, y[rows], label_smoothing=SMOOTHING)

    def report(epoch: int, loss: float) -> None:
        if log and epoch % 10 == 0:
            found = {k: round(v, 3) for k, v in scores(average.eval(), every, labels, out).items()}
            print(f"epoch {epoch}: loss {loss:.3f}, {found}", flush=True)

    fit(
        net,
        average,
        loss_of,
        len(x),
        g,
        epochs=epochs,
        batch=BATCH,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        decay=AVERAGE,
        beside=which,
        report=report,
    )
    return average, scores(average, every, labels, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help=".npz with images uint8 (N, 32, 32, 3), labels, split")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    net, found = train(*load_pictures(args.data), args.epochs, args.seed)
    facts = {
        "data": "openmoji, train split: 1,704 emojis designed by OpenMoji (https://openmoji.org/), CC BY-SA 4.0",
        "licence": "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), as the pictures'",
        "held_out": "test split, 205 pictures, never trained on",
        "epochs": args.epochs,
        "batch_size": BATCH,
        "losses": f"class, label smoothing {SMOOTHING}; which picture, softmax of {SCALE} times the cosine",
        "optimizer": f"AdamW, lr {LR} one-cycle, weight decay {WEIGHT_DECAY}",
        "augmentation": "moves, colours, blur, holes (vgm_cli.nn.augment) and noise; no flips",
        "weights": f"average of decay {AVERAGE}, stored as fp16",
        "precision": "fp32",
        "seed": args.seed,
    }
    metadata = {
        "format": "pt",
        "vgm.features": KIND,
        "vgm.dim": str(net.dim),
        "vgm.scores": atomic.dump_json({k: round(v, 4) for k, v in found.items()}),
        "vgm.training": atomic.dump_json(facts),
    }
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    atomic.save_safetensors({k: v.contiguous() for k, v in state.items()}, args.out, metadata)
    seconds = time.perf_counter() - start
    print(f"{args.out}: {found}, {args.out.stat().st_size / 1e3:.0f} kB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
