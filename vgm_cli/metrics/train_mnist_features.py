"""Train the digit feature network that ships as vgm_cli/assets/mnist-features.safetensors.

    python -m vgm_cli.metrics.train_mnist_features [--data FILE.npz] [--out FILE.safetensors]

Data: the shipped 5,000 MNIST images (LeCun, Cortes, Burges; CC BY-SA 3.0); every tenth image (50 per digit) is held
out. Seeded: the same machine and thread count give the same file. About two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import time
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.metrics.train_features import fit
from vgm_cli.nets.mnist_features import KIND, MnistCNN

PACKAGE = Path(str(resources.files("vgm_cli")))
DATA = PACKAGE / "data" / "assets" / "mnist5k.npz"
OUT = PACKAGE / "assets" / "mnist-features.safetensors"
EPOCHS, BATCH, LR, WEIGHT_DECAY, SMOOTHING, AVERAGE = 40, 100, 3e-3, 0.02, 0.05, 0.99


def held_out(n: int) -> Tensor:
    """(n,) bool: every tenth image, in a file sorted by digit the same number of each."""
    return torch.arange(n) % 10 == 9


def load_digits(path: str | Path) -> tuple[Tensor, Tensor]:
    """uint8 (N, 1, 28, 28) images and int64 (N,) labels of an .npz with `images` and `labels`."""
    with np.load(path, allow_pickle=False) as f:
        return torch.from_numpy(f["images"])[:, None], torch.from_numpy(f["labels"]).long()


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """x: (B, 1, 28, 28) in [0, 1]: shifts to 2.5 pixels, rotation to 12 degrees, scale and shear to 12 %."""
    n = len(x)
    draw = (torch.rand(n, 6, generator=g) * 2 - 1) * torch.tensor(
        [math.radians(12), 0.12, 0.12, 0.12, 2.5 / 14, 2.5 / 14]
    )
    angle, sx, sy, shear, dx, dy = draw.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    rows = [(1 + sx) * cos, -sin + shear, dx, sin, (1 + sy) * cos, dy]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


@torch.no_grad()
def accuracy(net: MnistCNN, x: Tensor, y: Tensor) -> float:
    """Fraction of x: (N, 1, 28, 28) in [0, 1] classified as y: (N,)."""
    right = sum(int((net(a)[1].argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500)))
    return right / len(y)


def train(
    images: Tensor, labels: Tensor, epochs: int = EPOCHS, seed: int = 0, log: bool = True
) -> tuple[MnistCNN, float]:
    """The averaged network (weights rounded to fp16, as stored) and its accuracy on the held-out tenth."""
    torch.manual_seed(seed)  # initialisation
    g = torch.Generator().manual_seed(seed)  # order and augmentation
    out = held_out(len(images))
    x, y = images[~out].float() / 255, labels[~out]
    net, average = MnistCNN(), MnistCNN()

    def loss_of(rows: Tensor) -> Tensor:
        return F.cross_entropy(net(augment(x[rows], g))[1], y[rows], label_smoothing=SMOOTHING)

    def report(epoch: int, loss: float) -> None:
        if log and epoch % 5 == 0:
            score = accuracy(average.eval(), images[out].float() / 255, labels[out])
            print(f"epoch {epoch}: loss {loss:.4f}, held-out accuracy {score:.4f}", flush=True)

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
        report=report,
    )
    return average, accuracy(average, images[out].float() / 255, labels[out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help=".npz with images uint8 (N, 28, 28) and labels")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    images, labels = load_digits(args.data)
    net, score = train(images, labels, args.epochs, args.seed)
    facts = {
        "data": "mnist5k: 5,000 MNIST training images, 500 per digit (LeCun, Cortes, Burges; CC BY-SA 3.0)",
        "held_out": f"every tenth image, {int(held_out(len(images)).sum())} in all, never trained on",
        "epochs": args.epochs,
        "batch_size": BATCH,
        "optimizer": f"AdamW, lr {LR} one-cycle, weight decay {WEIGHT_DECAY}, label smoothing {SMOOTHING}",
        "augmentation": "shifts to 2.5 pixels, rotation to 12 degrees, scale and shear to 12 %",
        "weights": f"average of decay {AVERAGE}, stored as fp16",
        "precision": "fp32",
        "seed": args.seed,
    }
    metadata = {
        "format": "pt",
        "vgm.features": KIND,
        "vgm.dim": str(net.dim),
        "vgm.accuracy": f"{score:.4f}",
        "vgm.training": atomic.dump_json(facts),
    }
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    atomic.save_safetensors({k: v.contiguous() for k, v in state.items()}, args.out, metadata)
    seconds = time.perf_counter() - start
    print(f"{args.out}: held-out accuracy {score:.4f}, {args.out.stat().st_size / 1e3:.0f} kB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
