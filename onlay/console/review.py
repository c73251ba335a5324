"""Reviewing rows in a terminal: one row at a time, one key each; editing in the person's own editor."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from onlay.data.read import Conversation, Document
from onlay.data.review import Check, Said, Shown
from onlay.errors import SetupError
from onlay.evaluation.blind import UNSAFE

KEYS = {"a": "accept", "e": "edit", "r": "reject", "s": "skip", "b": "back", "q": "quit"}
HOW = "a accept   e edit   r reject   s skip   b back   q quit and go on later"
ROLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
EDITORS = ("nano", "vi")
"""Tried in this order where neither VISUAL nor EDITOR is set."""
LINE_CHARACTERS = 60
"""Text longer than this, or of several lines, is laid out as a block in the editor."""
ESCAPE, INTERRUPT_CHARACTERS = "\x1b", ("\x04", "")


class Desk:
    """Shows a row and returns what the person says to it."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, shown: Shown, number: int, total: int, check: Check) -> Said:
        self.console.print()
        self.console.print(Rule(Text(f"{number:,} of {total:,}  {shown.row.place}"), align="left"))
        for part in _parts(shown):
            self.console.print(part, soft_wrap=False)
        while True:
            word = KEYS.get(read_key(lambda: self.console.print(Text(HOW, style="bold"))))
            if word == "edit":
                edited = self._edit(shown, check)
                if edited is not None:
                    self.console.print(Text("edited", style="green"))
                    return Said(word="edit", edited=edited)
            elif word == "accept" and not shown.writable:
                self._say("It cannot be written as it is: edit or reject it.")
            elif word == "back" and number == 1:
                self.console.print(Text("This is the first row.", style="dim"))
            elif word is not None:
                self.console.print(Text(word, style="dim"))
                return Said(word=word)  # type: ignore[arg-type]

    def _edit(self, shown: Shown, check: Check) -> dict[str, Any] | None:
        """The row as it comes back from the editor; None where it is left as it was."""
        editor = find_editor()
        if editor is None:
            self._say("There is no editor: set the environment variable EDITOR.")
            return None
        text = row_text(shown.row.values)
        while True:
            again = edit_text(text, editor=editor)
            if again is None:
                self._say(f"{editor[0]} ended with an error; the row is as it was.")
                return None
            values, problem = row_of(again)
            problem = problem or check(values)
            if problem is None:
                if values == shown.row.values:
                    self._say("Nothing was changed.")
                    return None
                return dict(values)
            question = f"{problem}\ne edit again   any other key: leave the row as it was"
            if read_key(partial(self._say, question)) != "e":
                return None
            text = again

    def _say(self, text: str) -> None:
        self.console.print(Text(safe(text), style="yellow"))


def safe(text: str) -> str:
    """Without characters by which a row could move the cursor, change colours or turn the text round."""
    return UNSAFE.sub("\ufffd", text).encode("utf-8", "replace").decode()


def _parts(shown: Shown) -> Iterator[Text]:
    if shown.codes:
        yield Text("found: " + ", ".join(shown.codes), style="yellow")
    if shown.before is not None:
        yield Text(
            f"{shown.before.who} decided `{shown.before.decision}` before the row's content changed", style="yellow"
        )
    if shown.problem is not None:
        yield Text(safe(shown.problem), style="red")
    if isinstance(shown.item, Document):
        yield Text(safe(shown.item.text))
    elif isinstance(shown.item, Conversation):
        for tool in shown.item.tools:
            yield Text(safe(json.dumps(tool, ensure_ascii=False)), style="dim")
        for turn in shown.item.turns:
            yield Text(
                turn.role + ("" if turn.trained or turn.role != "assistant" else " (not trained)"), ROLES[turn.role]
            )
            if turn.reasoning:
                yield Text(safe(turn.reasoning), style="dim")
            if turn.content:
                yield Text(safe(turn.content))
            for call in turn.tool_calls:
                yield Text(safe(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})"))
    else:
        yield Text(safe(row_text(shown.row.values)))


# ---------------------------------------------------------------------------------------------------------------- keys


def read_key(ask: Callable[[], None]) -> str:
    """One key as it is pressed, in lower case; `q` at the end of the input, nothing for an arrow or another such key.

    `ask` prints the question, once single keys are read: what is pressed sooner would be taken as a line's.
    """
    import termios
    import tty

    place = sys.stdin.fileno()
    before = termios.tcgetattr(place)
    try:
        # What was typed already is not thrown away, as it would be by default.
        tty.setcbreak(place, termios.TCSADRAIN)
        ask()
        key = os.read(place, 1).decode("utf-8", "replace")
        if key in INTERRUPT_CHARACTERS:
            return "q"
        if key == ESCAPE:
            while select.select([place], [], [], 0.05)[0]:
                os.read(place, 32)
            return ""
        return key.lower()
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)


# ------------------------------------------------------------------------------------------------------------- editing


def find_editor() -> list[str] | None:
    """The command in VISUAL or EDITOR, or one that is there; None without any."""
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if named:
        try:
            return shlex.split(named)
        except ValueError as error:
            raise SetupError(f"The editor's command {named!r} cannot be read: {error}.", "Set EDITOR again.") from None
    return next(([name] for name in EDITORS if shutil.which(name)), None)


def edit_text(text: str, *, editor: list[str]) -> str | None:
    """The text as the editor leaves it; None where the editor cannot be started or ends with an error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            done = subprocess.run([*editor, str(path)], check=False)
        except OSError:
            return None
        return path.read_text(encoding="utf-8", errors="replace") if done.returncode == 0 else None


def row_text(values: dict[str, Any]) -> str:
    """A row for an editor: YAML with texts as blocks; JSON for a row that YAML does not give back as it is."""

    class Dumper(yaml.SafeDumper):
        """Every text is quoted or a block, so that what is typed into it stays text; names of fields are as plain as can be."""

        def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
            node = super().represent_mapping(tag, mapping, flow_style)
            for name, _ in node.value:
                name.style = None
            return node

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        block = "\n" in text or len(text) > LINE_CHARACTERS
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if block else '"')

    Dumper.add_representer(str, represent)
    try:
        text = yaml.dump(values, Dumper=Dumper, allow_unicode=True, sort_keys=False, width=10**9)
    except yaml.representer.RepresenterError:  # A Parquet file's own kinds of numbers, say.
        text = ""
    return text if row_of(text) == (values, None) else json.dumps(values, indent=2, default=str) + "\n"


def row_of(text: str) -> tuple[Any, str | None]:
    """What an edited text holds, and why it cannot be read."""
    try:
        return (json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)), None
    except (ValueError, yaml.YAMLError) as error:
        return None, f"The edited row cannot be read: {' '.join(str(error).split())}."
