"""The loop that trains the shipped feature networks, of digits and of colour pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit(
    net: nn.Module,
    average: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    rows: int,
    generator: torch.Generator,
    *,
    epochs: int,
    batch: int,
    lr: float,
    weight_decay: float,
    decay: float,
    beside: nn.Module | None = None,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """AdamW with a one-cycle rate on whole batches; `average` follows with `decay`, and ends with weights rounded to
    fp16, as they are stored. loss_of: the loss of the rows (batch,) of `rows`. beside: what is trained besides the
    network and not kept. Biases and norms do not decay. report(epoch, the last loss) is called after each epoch."""
    average.load_state_dict(net.state_dict())
    trained = [*net.parameters(), *(beside.parameters() if beside is not None else ())]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * (rows // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        net.train()
        for chosen in torch.randperm(rows, generator=generator).split(batch):
            if len(chosen) < batch:
                continue
            loss = loss_of(chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for a, b in zip(average.state_dict().values(), net.state_dict().values()):
                    a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)
        report(epoch + 1, loss.item())
    average.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in average.state_dict().items()}
    )
    average.eval().requires_grad_(False)
