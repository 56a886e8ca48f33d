"""Run directories: who may write into one, what a kill or a full disk leaves, what a resumed run refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

from vgm_cli import atomic


def test_json_holds_no_number_that_json_does_not_know() -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": (1, {"d": -math.inf}), "e": Path("x"), 1: True}
    text = atomic.dump_json(value)
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": [1, {"d": None}], "e": "x", "1": True}
