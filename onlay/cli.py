"""The command line.  Each verb calls one function of `stages`; every verb has --json.

Results go to standard output, progress to standard error.  Exit codes: 0 done, 1 the work failed, 2 the input must
change, 130 interrupted.  torch is never loaded for --help.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from onlay import __version__
from onlay.errors import OnlayError

app = typer.Typer(
    help="LoRA fine-tuning of open language models: from a data file to a proven adapter.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output, progress on standard error.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override a recipe field; may be repeated."),
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; `onlay init DATA` writes one.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
SystemOption = Annotated[str | None, typer.Option("--system", help="System message. Default: the recipe's.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.01, max=1.0, help="Sample from the likeliest tokens that make up this share.")
]
PenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", min=1.0, help="Above 1, tokens said before become less likely.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")]
CompareOption = Annotated[bool, typer.Option("--compare", help="The base's answer beside the adapter's.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data file, or a hub data set owner/name.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the recipe. Default: DATA's name with .yaml.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a commented recipe for a data file.

    Looks at the data and the device and proposes an ungated base that fits.
    """
    from onlay import stages

    path, summary = stages.init(data, output=output)

    def display() -> None:
        print("\n".join([*summary, f"Wrote {path}.", ""]))
        _next(f"onlay prepare {path} --show 3, then onlay train {path}")

    _out({"recipe": str(path), "summary": " ".join(summary)}, as_json, display)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is missing here, and how to install it.

    Looks at Python, torch, CUDA, disk and packages.  Exits with 1 when something that every run needs is missing.
    """
    from dataclasses import asdict

    from onlay.doctor import examine

    checks = examine()
    well = all(check.ok for check in checks)

    def display() -> None:
        from onlay.console import doctor_view

        doctor_view(_console(stderr=False), checks)

    _out({"ok": well, "checks": [asdict(check) for check in checks]}, as_json, display)
    if not well:
        sys.exit(1)


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print this many rows with the trained tokens coloured.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Read, check, template and tokenize the data; cached by content."""
    from onlay import stages
    from onlay.console import Reporter

    with Reporter(_console()) as report:
        prepared = stages.prepare(recipe, overrides=overrides or (), report=report)
    dataset = prepared.dataset

    def display() -> None:
        from onlay.console import dataset_table, rows_coloured

        console = _console(stderr=False)
        console.print(dataset_table(dataset))
        if show:
            rows_coloured(console, prepared, show)
        _next(f"onlay train {recipe}")

    _out(dataset.model_dump(mode="json") | {"digest": dataset.digest}, as_json, display)


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe.")] = None,
    overrides: SetOption = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Go on with an interrupted run folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter, or go on with an interrupted run.

    Ends with a summary and the next command.  Ctrl-C saves; the exit code is then 130.
    """
    from onlay import stages
    from onlay.console import Reporter

    with Reporter(_console()) as report:
        run = stages.train(recipe, overrides=overrides or (), resume=resume, report=report)

    def display() -> None:
        from onlay.console import run_table

        _console(stderr=False).print(run_table(run))
        compare = "" if run.method == "full" else " --compare"
        use = f"generate {run.path} --prompt 'a text'" if run.method == "head" else f"chat {run.path}{compare}"
        _next(f"onlay train --resume {run.path}" if run.status == "interrupted" else f"onlay {use}")

    _out(run.model_dump(mode="json") | {"digest": run.digest}, as_json, display)
    if run.status == "interrupted":
        sys.exit(_INTERRUPTED)


@app.command()
def generate(
    run: RunArgument,
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
    from onlay.console import Reporter, answers_table

    piped = [] if prompt or sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    prompts = prompt or piped
    if not prompts:
        raise OnlayError("There is no prompt.", "Give --prompt '...', or one a line on standard input.")
    sampling = _sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    streams = len(prompts) == 1 and not as_json and not compare
    with Reporter(_console()) as report:
        results = stages.generate(
            run, prompts, sampling=sampling, system=system, compare=compare, report=report,
            on_text=_write if streams else None,
        )  # fmt: skip
    if streams:
        print()
        return
    _out({"run": str(run), "answers": results}, as_json, lambda: _console(stderr=False).print(answers_table(results)))


@app.command()
def chat(
    run: RunArgument,
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
    from onlay.console import Reporter, answers_table

    sampling = _sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    with Reporter(_console()) as report:
        conversation = stages.chat(run, sampling=sampling, system=system, compare=compare, report=report)
    said: list[dict[str, str]] = []
    while text := _ask(prompting=not as_json and sys.stdin.isatty()):
        streams = not as_json and not compare
        answer, base = conversation.say(text, on_text=_write if streams else None)
        said.append({"prompt": text, "answer": answer} | ({"base": base} if base is not None else {}))
        if streams:
            print()
        elif not as_json:
            _console(stderr=False).print(answers_table(said[-1:]))
    if as_json:
        print(json.dumps({"run": str(run), "answers": said}, ensure_ascii=False))


@app.command()
def merge(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    into: Annotated[
        str,
        typer.Option(
            "--into",
            metavar="auto|original|quantized",
            help="For a run on a quantized base: its original weights, or what the quantized ones stand for. auto: the nearer.",
        ),
    ] = "auto",
    max_difference: Annotated[
        float | None,
        typer.Option(
            "--max-difference", min=0.0, help="Largest logit difference allowed. Default: derived from rounding."
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Held-out rows to compare on.")] = 32,
    as_json: JsonOption = False,
) -> None:
    """Merge a run's adapter into its base.

    Writes a plain transformers model, loads it and compares it with base and adapter before it gets its name.
    """
    from onlay import stages
    from onlay.console import Reporter

    with Reporter(_console()) as report:
        merged = stages.merge(run, out, into=into, max_difference=max_difference, rows=rows, report=report)

    def display() -> None:
        from onlay.console import merge_table

        _console(stderr=False).print(merge_table(merged))

    _out(merged.model_dump(mode="json") | {"digest": merged.digest}, as_json, display)


@app.command()
def show(
    what: Annotated[
        str, typer.Argument(metavar="RUN|DIGEST", help="A run folder, or the start of any record's digest.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Show a record and the chain it was made from."""
    from onlay import stages
    from onlay.records import Record

    record, chain = stages.show(what)
    values = record.model_dump(mode="json") | {"digest": record.digest} if isinstance(record, Record) else record
    links = [{"kind": row.kind, "digest": row.digest, "path": row.path, "created_at": row.created_at} for row in chain]

    def display() -> None:
        from onlay.console import record_view

        record_view(_console(stderr=False), values, links, Path(what))

    _out({"record": values, "chain": links}, as_json, display)


@app.command()
def log(as_json: JsonOption = False) -> None:
    """List the runs on this machine, newest first."""
    from onlay import stages

    runs = [row.values | {"digest": row.digest} for row in stages.log()]

    def display() -> None:
        from onlay.console import log_table

        _console(stderr=False).print(log_table(runs) if runs else "No run yet. Start with: onlay demo")

    _out({"runs": runs}, as_json, display)


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema."""
    from onlay import stages

    print(json.dumps(stages.schema(), indent=2))


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder. Default: runs/demo-DATE-TIME.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train the bundled base and show what it learned.

    Uses bundled examples; ends with base and adapter side by side on rows that were held out.
    """
    from dataclasses import asdict

    from onlay import stages
    from onlay.console import Reporter, demo_view

    with Reporter(_console()) as report:
        result = stages.demo(output=str(output) if output else None, report=report)

    def display() -> None:
        demo_view(_console(stderr=False), result)
        _next(f"onlay chat {result.run} --compare")

    _out(asdict(result), as_json, display)


def _sampling(max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float, seed: int) -> Any:
    from onlay.generation.engine import Sampling

    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


def _ask(*, prompting: bool) -> str:
    try:
        return input("> " if prompting else "").strip()
    except EOFError:
        return ""


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _next(command: str) -> None:
    """The next command, on one line however long, so that it can be copied."""
    print(f"\nNext: {command}")


def _console(*, stderr: bool = True) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _out(values: dict[str, Any], as_json: bool, display: Callable[[], None]) -> None:
    if os.environ.get("RANK", "0") != "0":  # Of several ranks the first speaks.
        return
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        display()


_INTERRUPTED = 130


def main() -> None:
    """Entry point: what a user can put right becomes two lines on standard error and an exit code."""
    # Deprecations in transformers and peft speak to those who call them, not to those who train.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|accelerate")
    try:
        # Without Typer's own error page; Ctrl-C in a verb comes back as its exit code.
        if app(prog_name="onlay", standalone_mode=False) == _INTERRUPTED:
            _fail("Interrupted.", "What was saved before is kept; `onlay log` lists the runs.", _INTERRUPTED)
    except OnlayError as error:
        _fail(error.problem, error.remedy, error.exit_code)
    except typer.TyperException as error:
        verb = next((word for word in sys.argv[1:2] if word in _verbs()), "")
        _fail(" ".join(error.format_message().split()), f"See: onlay {verb} --help".replace("  ", " "), error.exit_code)


def _verbs() -> list[str]:
    return [command.callback.__name__ for command in app.registered_commands if command.callback is not None]


def _fail(problem: str, remedy: str, exit_code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": problem, "remedy": remedy}, ensure_ascii=False))
    print(f"{problem}\n{remedy}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
