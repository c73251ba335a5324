"""The functions behind the verbs: each brings the parts of the lower layers together and returns one record.

One file for each arrow from record to record; nothing below composes siblings.
"""

from __future__ import annotations

from onlay.stages.advising import Advising, advise
from onlay.stages.answering import Chat, LoadedHead, LoadedRun, chat, generate, open_head, open_run
from onlay.stages.auditing import audit
from onlay.stages.checking import check
from onlay.stages.comparing import compare
from onlay.stages.demonstrating import Demo, demo, held_out_rows
from onlay.stages.evaluating import evaluate
from onlay.stages.events import Loading, Report
from onlay.stages.fitting import compatible
from onlay.stages.merging import merge
from onlay.stages.planning import Compared, Declared, compare_plans, plan, plan_all_gpus
from onlay.stages.preparing import Prepared, Source, look, prepare, prepare_source
from onlay.stages.registering import (
    diff,
    find_version,
    history,
    promote,
    pull,
    push,
    register,
    rollback,
    verify,
    versions,
)  # fmt: skip
from onlay.stages.restoring import Restored, restore
from onlay.stages.reviewing import Chosen, Review, review
from onlay.stages.showing import log, schema, show
from onlay.stages.starting import init
from onlay.stages.synthesizing import Speaker, Synthesis, synthesize
from onlay.stages.training import train

__all__ = [
    "Advising", "Chat", "Chosen", "Compared", "Declared", "Demo", "LoadedHead", "LoadedRun", "Loading", "Prepared", "Report", "Restored", "Review", "Source", "Speaker", "Synthesis",
    "advise", "audit", "chat", "check", "compare", "compare_plans", "compatible", "demo", "diff", "evaluate", "find_version", "generate", "held_out_rows", "history",
    "init", "log", "look", "merge", "open_head", "open_run", "plan", "plan_all_gpus", "prepare", "prepare_source", "promote", "pull", "push",
    "register", "restore", "review", "rollback", "schema", "show", "synthesize", "train", "verify", "versions",
]  # fmt: skip
