"""Bayes' rule turns a class-conditional likelihood into a classifier: the class under which an image is likeliest."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vgm_cli.api import generators, seed_of
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Subject, Value
from vgm_cli.metrics.likelihood import IMAGES, BitsPerDim, encode


class BayesAccuracy(BitsPerDim):
    """Share of labelled images whose class has the largest likelihood log p(x | y), all classes being as frequent. An
    image is measured once for every class, by the same draws. Options are those of bits-per-dim.

    VgmError: the data has no labels, the model takes none or offers no likelihood.
    """

    gives = ("bayes-accuracy",)

    def __call__(self, subject: Subject, seed: int) -> list[Value]:
        part, classes = subject.conditions.of_column("label"), 0
        if part is not None:
            classes = len(part.condition.choices)
        if not classes:
            raise VgmError("bayes-accuracy needs a model of classes", "bits-per-dim measures any likelihood", USAGE)
        if subject.dataset is None or not subject.dataset.facts.num_classes:
            raise VgmError("bayes-accuracy needs labelled images", "give --reference with class sub-folders", USAGE)
        ask = self.answerer(subject)
        count = len(subject.dataset)
        n = min(self.n or subject.n or IMAGES, count)
        rows = (np.arange(n) * count) // n
        spans = [rows[i : i + subject.batch_size] for i in range(0, n, subject.batch_size)]

        @torch.no_grad()
        def work(own: np.ndarray) -> tuple[str, Tensor]:
            """Whether each of these images is recognised, and how its likelihoods were had."""
            batch = subject.dataset.gather(own.tolist())
            x = batch["x"].to(subject.device)
            gens = generators(seed_of("likelihood", seed, int(row)) for row in own)
            found, kind = [], ""
            if subject.codec is not None:
                x = encode(subject.codec, x, gens)
            state = [g.get_state() for g in gens]
            for y in range(classes):
                for g, before in zip(gens, state):
                    g.set_state(before)
                cond = {"y": torch.full((len(x),), y, device=subject.device)}
                nats, kind = ask(x, gens, cond)
                found.append(nats.view(len(x), -1)[:, 0].double().cpu())
            best = torch.stack(found, dim=1).argmax(1)
            return kind, best == torch.as_tensor(batch["label"]).cpu()

        parts = subject.shares(spans, work)
        right = torch.cat([hit for _, hit in parts]).double()
        value = float(right.mean())
        options = {"likelihood": parts[0][0], "classes": classes}
        return [Value("bayes-accuracy", value, (value * (1 - value) / n) ** 0.5, options, n=n)]
