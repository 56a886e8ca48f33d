"""A picture of what a run logged: python docs/plot_log.py RUN variance,variance_cosine OUT.svg [--log]

Columns of RUN/metrics.jsonl over its steps, as lines with their names; --log for a logarithmic axis.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vgm_cli.atomic import write_text
from vgm_cli.engine.report.charts import svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("columns", help="names in metrics.jsonl, with commas between them")
    parser.add_argument("out", type=Path)
    parser.add_argument("--log", action="store_true", help="logarithmic axis of values")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = {c: [(r["step"], r[c]) for r in rows if c in r] for c in args.columns.split(",")}
    write_text(args.out, svg(lines, "step", args.log))


if __name__ == "__main__":
    main()
