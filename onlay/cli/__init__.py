"""The command line.  Each verb calls one function of `stages`; every verb has --json.

Results go to standard output, progress to standard error.  Exit codes: 0 done, 1 the work failed, 2 the input must
change, 130 interrupted.  torch is never loaded for --help.
"""

from __future__ import annotations

# Each module adds its verbs to the app; --help lists them in this order.
from onlay.cli import data, auditing, synthesizing, reviewing, restoring, advising, planning, training, answers, evaluation, checking, registry, merging, showing, demonstrating  # isort: skip  # fmt: skip
from onlay.cli.app import app, main

__all__ = [
    "advising", "answers", "app", "auditing", "checking", "data", "demonstrating", "evaluation", "main", "merging", "planning", "registry", "restoring", "reviewing", "showing", "synthesizing", "training",
]  # fmt: skip
