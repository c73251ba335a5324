"""The documents are true: generated parts are what the code says, commands and options exist, recipes parse, links lead
somewhere.  torch is not loaded."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import onlay
from onlay.cli import app
from onlay.data.read import detect_format, parse
from onlay.data.sources import Row
from onlay.recipe import DataSection, Recipe, field_paths, read_recipe

PROJECT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *PROJECT.glob("*.md"),
        *PROJECT.glob("docs/*.md"),
        *PROJECT.glob("recipes/**/README.md"),
        *PROJECT.glob("bench/**/README.md"),
        *PROJECT.glob("onlay/**/README.md"),
    ]
)
PICTURE = PROJECT / "docs" / "run.svg"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
BEGINS = re.compile(r"(onlay|make|python|accelerate|torchrun) +\S")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def command_lines(path: Path) -> Iterator[str]:
    """Lines of code blocks without a language, and inline code, that begin like a command."""
    text = path.read_text(encoding="utf-8")
    for language, block in FENCE.findall(text):
        if not language:
            yield from (line.strip() for line in block.splitlines() if BEGINS.match(line.strip()))
    yield from (code for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if BEGINS.match(code))


def onlay_calls() -> Iterator[Any]:
    for path in DOCUMENTS:
        for line in command_lines(path):
            words = shlex.split(line, comments=True)
            begins = next((i for i, word in enumerate(words) if word in ("onlay", "onlay.cli")), None)
            if begins is not None and re.match(r"(onlay|accelerate|torchrun)\b", line):
                yield pytest.param(words[begins + 1 :], id=f"{name_of(path)}: {line[:60]}")


@pytest.mark.parametrize("words", onlay_calls())
def test_commands_of_the_documents_exist(words: list[str]) -> None:
    verb = words[0]
    if verb.startswith("-"):
        assert verb in ("--help", "--version")
        return
    assert verb in COMMANDS
    options = {option for parameter in COMMANDS[verb].params for option in parameter.opts} | {"--help", "-h"}
    assert [word for word in words[1:] if word.startswith("-") and word not in options] == []
    for option, value in itertools.pairwise(words):
        if option == "--set":
            assert value.split("=")[0] in field_paths()


def test_every_verb_has_a_section_and_is_in_the_readme() -> None:
    sections = re.findall(r"^## (\w+)$", (PROJECT / "docs/verbs.md").read_text(encoding="utf-8"), re.M)
    assert sections == list(COMMANDS)
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in COMMANDS if f"`{verb}`" not in readme] == []


def test_generated_parts_are_what_the_code_says() -> None:
    done = subprocess.run([sys.executable, "docs/reference.py"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_loads_no_torch() -> None:
    code = "import runpy, sys; runpy.run_path('docs/reference.py'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


@pytest.mark.parametrize("page", ["recovery.md", "numerics.md"])
def test_constants_that_are_named_are_in_the_tables(page: str) -> None:
    tables = (PROJECT / "docs/recovery.md").read_text(encoding="utf-8")
    text = (PROJECT / "docs" / page).read_text(encoding="utf-8")
    for name in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", text):
        assert f"| `{name}` (" in tables, name


def test_every_field_is_in_the_recipe_page() -> None:
    page = (PROJECT / "docs/recipe.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+\.\w+)` \|", page, re.M) == list(field_paths())
    assert [section for section in Recipe.model_fields if f"\n## {section}\n" not in page] == []


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {line.split()[1] for path in DOCUMENTS for line in command_lines(path) if re.match(r"make \w", line)}
    assert {"demo", "test"} <= named <= targets


def script_calls() -> Iterator[Any]:
    for path in DOCUMENTS:
        for line in command_lines(path):
            words = shlex.split(line, comments=True)
            script = next((word for word in words[1:2] if word.endswith(".py")), None)
            if words and words[0] == "python" and script is not None:
                yield pytest.param(script, words[2:], id=f"{name_of(path)}: {line[:60]}")


@pytest.mark.parametrize(("script", "words"), script_calls())
def test_programs_of_the_documents_have_their_options(script: str, words: list[str]) -> None:
    path = PROJECT / script.replace("../", "")
    assert path.is_file()
    strings = {
        node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)
    }
    assert [word for word in words if word.startswith("--") and word not in strings] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        assert not anchor, f"{link}: anchors are not checked, so they are not used"
        if "://" not in target and path.parent / target != PICTURE:
            assert (path.parent / target).exists(), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:onlay|docs|tests|recipes|bench)/[\w/.-]+\.\w+)`", text):
        assert (PROJECT / name).exists(), name


def test_the_picture_is_drawn_and_fetches_nothing() -> None:
    assert PICTURE.is_file(), "python docs/picture.py draws it (it runs the demo)"
    picture = PICTURE.read_text(encoding="utf-8").replace("&#160;", " ")
    assert "onlay demo" in picture
    assert "held-out" in picture
    assert not re.search(r"url\(\"?http|@import|<image", picture)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_recipes_in_the_documents_are_recipes(path: Path, tmp_path: Path) -> None:
    for language, block in FENCE.findall(path.read_text(encoding="utf-8")):
        if language == "yaml":
            (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
            read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_and_json_in_the_documents(path: Path) -> None:
    for language, block in FENCE.findall(path.read_text(encoding="utf-8")):
        if language == "json":
            json.loads(block)
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "onlay":
                    assert node.attr in onlay.__all__


def test_example_rows_are_of_their_format() -> None:
    page = (PROJECT / "docs/data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", page, re.M)
    formats = yaml.safe_load(json.dumps(DataSection.model_json_schema()))["properties"]["format"]["enum"]
    assert {name for name, _ in rows} == set(formats) - {"auto"}
    section = DataSection(train="rows.jsonl")
    for name, text in rows:
        row = Row("rows.jsonl", 1, json.loads(text))
        assert detect_format([row], section) == name
        parse(row, name, section)


def test_first_budgets_are_those_of_the_code() -> None:
    code = (PROJECT / "onlay/training/session.py").read_text(encoding="utf-8")
    assert "CPU_BUDGET_TOKENS = 2048" in code
    assert "16384 if gigabytes > 60 else 8192 if gigabytes > 20 else 4096" in code


def test_the_probe_is_as_strict_as_the_page_says() -> None:
    code = (PROJECT / "onlay/model/attention.py").read_text(encoding="utf-8")
    assert "math.sqrt(torch.finfo(dtype).eps)" in code
    assert "2 * _difference(padded[1], padded[0])" in code


def test_the_documents_stay_short_and_speak_of_the_project_alone() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(work|home|root|tmp)/|\.\./shared", text), name_of(path)
