"""The model card of a run, written from its records; nothing is left for people to fill in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from vgm_cli import __version__, atomic
from vgm_cli.engine.run import Run
from vgm_cli.registry import registry
from vgm_cli.ui import duration


def write_card(run: Run, recipe: Any, outcome: Any, components: Mapping[str, Any]) -> None:
    """card.md: front matter that model hubs read, then data, training, use, source."""
    paper = registry().papers.get(recipe.paper)
    data = json.loads((run.path / "data.json").read_text()) if (run.path / "data.json").exists() else {}
    env = json.loads((run.path / "env.json").read_text()) if (run.path / "env.json").exists() else {}
    front = {
        "library_name": "vgm",
        "tags": [recipe.paper, paper.family if paper else "", "image-generation"],
        "datasets": [str(data.get("root") or data.get("kind") or "unknown")],
    }
    opts, path = recipe.node("train"), shlex.quote(str(run.path))
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {recipe.paper} trained with `{recipe.name}`",
        "",
        f"- Network: `{atomic.dump_json(components.get('model', {}))}`",
        f"- Objective: `{atomic.dump_json(recipe.config.get('objective'))}`",
        f"- Data: {data.get('count', '?')} images, {data.get('image_size')}×{data.get('image_size')}×"
        f"{data.get('image_channels')}, {data.get('num_classes') or 'no'} classes, "
        f"fingerprint {data.get('fingerprint')}",
        f"- Training: {outcome.step} steps of {opts.batch_size} images in {duration(outcome.seconds)} "
        f"({outcome.images_per_second:.0f} images/s), seed {opts.seed}, vgm {__version__}",
        f"- Hardware: {', '.join(env.get('gpus', [])) or env.get('cpu', 'unknown')}",
        "",
        f"Samples: `samples/`. Use: `vgm sample {path}`, `vgm evaluate {path}`.",
        "",
        "It learned from the data above alone and reproduces its biases; it was not checked for memorised training "
        "images.",
    ]
    if paper:
        lines += ["", f"Paper: {paper.title} ({paper.year})" + (f", arXiv {paper.arxiv}" if paper.arxiv else "") + "."]
        if paper.repository:
            lines.append(f"Official code: {paper.repository}.")
    atomic.write_text(run.path / "card.md", "\n".join(lines) + "\n")
