"""Shell completion from the static index: no torch."""

from __future__ import annotations

from pathlib import Path


def papers(incomplete: str) -> list[str]:
    from vgm_cli.recipe import shipped

    names = set(shipped()) | {n.split("/")[0] for n in shipped()}
    return sorted(n for n in names if n.startswith(incomplete))


def recipes(incomplete: str) -> list[str]:
    from vgm_cli.recipe import shipped

    return sorted({n.partition("/")[2] for n in shipped() if n.partition("/")[2].startswith(incomplete)})


def samplers(incomplete: str) -> list[str]:
    return names("sampler", incomplete)


def names(kind: str, incomplete: str) -> list[str]:
    from vgm_cli.registry import registry

    return [n for n in registry().names(kind) if n.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    from vgm_cli.registry import registry

    found = [n for (k, n), c in registry().components.items() if k == "objective" and "distill" in c.verbs]
    return sorted(n for n in found if n.startswith(incomplete))


def rl_methods(incomplete: str) -> list[str]:
    from vgm_cli.registry import registry

    found = [n for (k, n), c in registry().components.items() if k == "objective" and "finetune-rl" in c.verbs]
    return sorted(n for n in found if n.startswith(incomplete))


def rewards(incomplete: str) -> list[str]:
    return names("reward", incomplete)


def layouts(incomplete: str) -> list[str]:
    return [*(n for n in ("vgm",) if n.startswith(incomplete)), *names("converter", incomplete)]


def runs(incomplete: str) -> list[str]:
    found = [str(p.parent) for p in Path("runs").glob("*/*/config.yaml")] if Path("runs").is_dir() else []
    return sorted(f for f in found if f.startswith(incomplete))


def keys(incomplete: str) -> list[str]:
    import dataclasses

    from vgm_cli.recipe import NODES

    known = [f"{n}.{f.name}=" for n, cls in NODES.items() for f in dataclasses.fields(cls)]
    return [k for k in known if k.startswith(incomplete)]
