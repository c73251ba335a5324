"""Runs the demo and draws what a terminal shows of it: docs/run.svg, the picture in the README.

    python docs/picture.py [--out docs/run.svg]

Nothing in the picture is written by hand: the demo runs through `onlay.stages.demo`, and the lines and tables come from
the same functions as the command line's.  Takes as long as `onlay demo`.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from onlay.console.runs import Reporter, demo_view, run_table
from onlay.records import Run
from onlay.stages import Demo, demo

WIDTH = 100
FOLDER = "runs/demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "run.svg")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        # A folder and a ledger of its own, so that paths in the picture are short and nobody's log grows.
        os.environ["ONLAY_HOME"] = folder
        os.chdir(folder)
        try:
            picture = draw(lambda report: demo(output=FOLDER, report=report), Run.load)
        finally:
            os.chdir(before)
    out.write_text(picture, encoding="utf-8")
    print(f"{out}: {len(picture):,} characters")


def draw(run_demo: Callable[[Reporter], Demo], load_run: Callable[[Path], Run]) -> str:
    """SVG of the demo's output, then of the summary of its run that `onlay train` ends with."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print("[bold]$ onlay demo --output runs/demo[/]", highlight=False)
    with Reporter(console) as report:
        result = run_demo(report)
    demo_view(console, result)
    console.print()
    console.print(run_table(load_run(Path(result.run))))
    svg = console.export_svg(title="onlay demo")
    # rich's picture fetches a font from the net; without that rule the reader's own monospace font is used.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)


if __name__ == "__main__":
    main()
