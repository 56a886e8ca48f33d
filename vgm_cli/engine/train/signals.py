"""Signals during training: the first one finishes the step, saves and leaves; the second stops at once."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch

from vgm_cli.ui import ui


class Guard:
    """First SIGINT, SIGTERM or SIGHUP (unless nohup has it ignored): finish the step, save, leave. Second: at once.
    Meanwhile nothing depends on who reads the output."""

    def __enter__(self) -> Guard:
        self.own: int | None = None  # what came to this process
        self.signal: int | None = None  # what came to any of them
        self.before: dict[int, Any] = {}
        self.lasting, ui.lasting = ui.lasting, True
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = signal.Signals.__members__.get(name)  # Windows has no SIGHUP
                if number is not None and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: Any) -> None:
        if self.own is not None:  # not self.signal, which the others may have told of before the launcher's came here
            raise KeyboardInterrupt
        self.own = number
        ui.info("stopping after this step (once more to stop at once)")

    def came(self, accelerator: Any) -> bool:
        """Whether a signal has come to any process. All processes agree on the answer."""
        self.signal = self.own
        if accelerator.num_processes > 1:
            seen = torch.tensor([self.own or 0], device=accelerator.device)
            self.signal = int(accelerator.gather(seen).max()) or None
        return self.signal is not None

    def __exit__(self, *exc: object) -> None:
        ui.lasting = self.lasting
        for s, handler in self.before.items():
            signal.signal(s, handler)
