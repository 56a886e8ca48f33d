"""vgm: train, sample, distill, RL-finetune, restore, evaluate and convert visual generative models.

Importing this package never imports torch.
"""

from vgm_cli.hookspecs import Component, Paper, hookimpl

__version__ = "0.1.0"
__all__ = ["Component", "Paper", "__version__", "hookimpl"]
