"""Asking a run."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from onlay.cli.app import (
    AnsweringArgument,
    CompareOption,
    JsonOption,
    PenaltyOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TokensOption,
    TopPOption,
    app,
    emit,
    sampling_of,
    terminal,
    write,
)
from onlay.errors import OnlayError


@app.command()
def generate(
    run: AnsweringArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="May be repeated. Without it, one prompt a line from standard input."),
    ] = None,
    system: SystemOption = None,
    compare: CompareOption = False,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts with a run's adapter."""
    from onlay import stages
    from onlay.console.runs import Reporter, answers_table

    piped = [] if prompt or sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    prompts = prompt or piped
    if not prompts:
        raise OnlayError("There is no prompt.", "Give --prompt '...', or one a line on standard input.")
    sampling = sampling_of(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    streams = len(prompts) == 1 and not as_json and not compare
    with Reporter(terminal()) as report:
        results = stages.generate(
            run, prompts, sampling=sampling, system=system, compare=compare, report=report,
            on_text=write if streams else None,
        )  # fmt: skip
    if streams:
        print()
        return
    emit({"run": str(run), "answers": results}, as_json, lambda: terminal(stderr=False).print(answers_table(results)))


@app.command()
def chat(
    run: AnsweringArgument,
    system: SystemOption = None,
    compare: CompareOption = False,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Talk with a run's adapter.

    An empty line or Ctrl-D ends it.  With --json, messages are read from standard input, one a line.
    """
    from onlay import stages
    from onlay.console.runs import Reporter, answers_table

    sampling = sampling_of(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    with Reporter(terminal()) as report:
        conversation = stages.chat(run, sampling=sampling, system=system, compare=compare, report=report)
    said: list[dict[str, str]] = []
    while text := _ask(prompting=not as_json and sys.stdin.isatty()):
        streams = not as_json and not compare
        answer, base = conversation.say(text, on_text=write if streams else None)
        said.append({"prompt": text, "answer": answer} | ({"base": base} if base is not None else {}))
        if streams:
            print()
        elif not as_json:
            terminal(stderr=False).print(answers_table(said[-1:]))
    if as_json:
        print(json.dumps({"run": str(run), "answers": said}, ensure_ascii=False))


def _ask(*, prompting: bool) -> str:
    try:
        return input("> " if prompting else "").strip()
    except EOFError:
        return ""
