"""Pictures of a VDM++ run's adaptive schedule: python docs/plot_schedule.py RUN OUT

OUT-schedule.svg: the log-SNR over the draw u. OUT-density.svg: over the log-SNR, the loss w ||eps_hat - eps||^2 in each
bin, to which the density is proportional, the weight w, and the cosine schedule's density; the highest of each is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from vgm_plugins.vdmpp.densities import Adaptive, cosine
from vgm_plugins.vdmpp.weightings import make_weight, shift_of

from vgm_cli.atomic import write_text
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.report.charts import svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", help="path of the pictures without their ends")
    args = parser.parse_args()
    folder = args.run / "checkpoints/last"
    node = ckpt.read_header(folder / "model.safetensors").recipe["objective"]
    low, high = node.get("logsnr_min", -15.0), node.get("logsnr_max", 15.0)
    shift = shift_of(node.get("resolution"))
    histogram = load_file(folder / "trainer.safetensors")["objective.histogram"]
    adaptive = Adaptive(low, high, len(histogram))
    adaptive.load_state_dict({"histogram": histogram})
    usual = cosine(low, high, shift)

    u = torch.linspace(0, 1, 201, dtype=torch.float64)[:-1]
    schedules = {"adaptive": adaptive.draw(u)[0], "cosine": usual.draw(u)[0]}
    lines = {name: list(zip(u.tolist(), l.tolist())) for name, l in schedules.items()}
    write_text(Path(f"{args.out}-schedule.svg"), svg(lines, "u"))

    l = low + (torch.arange(300, dtype=torch.float64) + 0.5) / 300 * (high - low)
    curves = {
        "loss of each bin": adaptive.density(l),
        "weight": make_weight(node.get("weighting", "sigmoid"), shift)(l),
        "cosine schedule": usual.density(l),
    }
    shown = {name: list(zip(l.tolist(), (y / y.max()).tolist())) for name, y in curves.items()}
    write_text(Path(f"{args.out}-density.svg"), svg(shown, "log-SNR"))


if __name__ == "__main__":
    main()
