"""The functions behind the verbs: each brings the parts of the lower layers together and returns one record.

One file for each arrow from record to record; nothing below composes siblings.
"""

from __future__ import annotations

from onlay.stages.answering import Chat, LoadedHead, LoadedRun, chat, generate, open_head, open_run
from onlay.stages.demonstrating import Demo, demo, held_out_rows
from onlay.stages.events import Loading, Report
from onlay.stages.merging import merge
from onlay.stages.preparing import Prepared, Source, look, prepare, prepare_source
from onlay.stages.showing import log, schema, show
from onlay.stages.starting import init
from onlay.stages.training import train

__all__ = [
    "Chat", "Demo", "LoadedHead", "LoadedRun", "Loading", "Prepared", "Report", "Source",
    "chat", "demo", "generate", "held_out_rows", "init", "log", "look", "merge", "open_head", "open_run",
    "prepare", "prepare_source", "schema", "show", "train",
]  # fmt: skip
