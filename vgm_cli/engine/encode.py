"""`vgm data encode`: a latent cache, built by one process or by all that take part."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from vgm_cli.data.latent_cache import build_cache, remove_cache
from vgm_cli.data.latents import Latents, open_latents
from vgm_cli.engine import processes


def encode(dataset: Any, codec: Any, folder: Path, key: str, *, overwrite: bool = False, **how: Any) -> Latents:
    """See `build_cache`. The processes share the shards; the first one then makes the cache whole."""
    rank, world = processes.rank_world()
    if world > 1:
        if overwrite:
            processes.on_main(partial(remove_cache, folder))
        build_cache(dataset, codec, folder, key, share=(rank, world), **how)
        processes.shares(range(world), lambda r: r)  # all shards are there

    def whole() -> None:
        build_cache(dataset, codec, folder, key, overwrite=overwrite and world == 1, **how)

    processes.on_main(whole)
    return open_latents(folder)
