"""The import law: which file may import which, checked on the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "onlay"

LAYERS = {
    "errors": 0, "recipe": 0, "records": 0,
    "hardware": 1, "database": 1, "ledger": 1, "kernels": 1, "pages": 1,
    "model": 2,
    "planning": 3, "data": 3, "generation": 3,
    "training": 4, "evaluation": 4,
    # starter looks at data for `init`, doctor at the machine; each is a file beside these folders.
    "release": 5, "serving": 5, "rag": 5, "web": 5, "starter": 5, "doctor": 5,
    "stages": 6,
    "cli": 7, "console": 7,
}  # fmt: skip
"""Layer of each file or folder.  A unit imports lower layers and itself; siblings never each other, but for:"""
ORDER_WITHIN = {
    ("recipe", "errors"),
    ("records", "errors"),
    ("records", "recipe"),
    ("ledger", "database"),
    ("cli", "console"),
}
HEAVY = {"transformers", "peft", "bitsandbytes", "accelerate"}
HEAVY_PLACES = ("model/", "data/template.py", "generation/", "training/")
LIGHT_UNITS = (
    "errors",
    "recipe",
    "records",
    "hardware",
    "database",
    "ledger",
    "stages",
    "cli",
    "console",
    "starter",
    "doctor",
)
"""Files that `onlay VERB --help` or a wrong recipe may touch: nothing heavy at their top level."""


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    top_level: bool
    typing_only: bool

    @property
    def root(self) -> str:
        return self.module.split(".")[0]


def unit_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path, root: Path = PACKAGE) -> Iterator[Import]:
    name = str(path.relative_to(root))
    tree = tree_of(path) if root == PACKAGE else ast.parse(path.read_text())

    def walk(node: ast.AST, top_level: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, child.lineno, alias.name, top_level, typing_only)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno}: relative import"
                module = str(child.module)
                if module == "onlay":  # `from onlay import stages` imports a file
                    for alias in child.names:
                        inner = f"onlay.{alias.name}" if alias.name in LAYERS else "onlay"
                        yield Import(name, child.lineno, inner, top_level, typing_only)
                else:
                    yield Import(name, child.lineno, module, top_level, typing_only)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, top_level and not inside, typing_only or checking)

    yield from walk(tree, True, False)


def violations(path: Path, root: Path = PACKAGE) -> list[str]:
    """What in a file is against the law."""
    found = []
    name = str(path.relative_to(root))
    mine = path.relative_to(root).parts[0].removesuffix(".py")
    if mine in ("__init__", "__main__"):
        return []
    for one in imports_of(path, root):
        where = f"{one.file}:{one.line}"
        # An op may use a library's kernel, and imports it when it is first called.
        lazily = one.root == "bitsandbytes" and name.startswith("kernels/") and not one.top_level
        if one.root in HEAVY and not one.typing_only and not lazily and not name.startswith(HEAVY_PLACES):
            found.append(f"{where}: {one.root} is for {', '.join(HEAVY_PLACES)}")
        if one.root == "torch" and one.top_level and not one.typing_only and mine in LIGHT_UNITS:
            found.append(f"{where}: torch at the top of a light file")
        if one.root != "onlay":
            continue
        other = unit_of(one.module)
        if other in ("__init__", mine) or (mine, other) in ORDER_WITHIN:
            continue
        if LAYERS[other] >= LAYERS[mine]:
            found.append(f"{where}: {mine} (L{LAYERS[mine]}) imports {other} (L{LAYERS[other]})")
    return found


def test_every_file_has_a_layer() -> None:
    units = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files()} - {"__init__", "__main__"}
    assert units <= set(LAYERS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    assert violations(path) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/build.py", "from onlay.generation.engine import generate"),
        ("data/build.py", "def f():\n    from onlay.planning import x"),
        ("model/load.py", "from onlay import stages"),
        ("training/loop.py", "import onlay.evaluation.scores"),
        ("ledger.py", "from onlay.hardware import Device"),
        ("stages/training.py", "def f():\n    import transformers"),
        ("data/read.py", "from peft import LoraConfig"),
        ("stages/training.py", "import torch"),
        ("evaluation/scores.py", "from transformers import AutoConfig"),
    ],
)
def test_the_check_finds_what_is_against_the_law(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert len(violations(path, tmp_path)) == 1


def test_no_cycles_among_files() -> None:
    """Also within a folder, also through imports in functions and those for types only in one direction."""
    graph: dict[str, set[str]] = {}
    names = {"onlay." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files()}
    for name, path in names.items():
        graph[name] = {one.module for one in imports_of(path) if one.module in names and not one.typing_only}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        if name != "onlay.__init__":
            visit(name, ())


def broad_handlers(tree: ast.AST) -> list[int]:
    broad = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = (
                [] if node.type is None else [ast.unparse(part) for part in getattr(node.type, "elts", [node.type])]
            )
            if node.type is None or set(caught) & {"Exception", "BaseException"}:
                broad.append(node.lineno)
    return broad


def swallowing(tree: ast.AST) -> list[int]:
    """contextlib.suppress(Exception) is a broad except by another name."""
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
    ]
    return [call.lineno for call in calls if {ast.unparse(arg) for arg in call.args} & {"Exception", "BaseException"}]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_caught_broadly(path: Path) -> None:
    assert broad_handlers(tree_of(path)) == []
    assert swallowing(tree_of(path)) == []


def test_the_check_finds_broad_handlers() -> None:
    for kind in ("", " Exception", " (ValueError, BaseException)", " Exception as error"):
        assert broad_handlers(ast.parse(f"try:\n    f()\nexcept{kind}:\n    pass"))
    assert not broad_handlers(ast.parse("try:\n    f()\nexcept (OSError, ValueError):\n    pass"))
    assert swallowing(ast.parse("with contextlib.suppress(Exception):\n    f()"))


AT_IMPORT = {
    "re.compile", "frozenset", "str", "Candidate", "LoraAdapter", "TrainingSection",
    "EvaluationSection", "Field", "ConfigDict", "date", "typer.Typer", "typer.Option", "typer.Argument", "np.dtype",
    "Kind", "Score", "AnswerScore", "Unit", "ReleaseSection", "Loader.add_implicit_resolver", "Dumper.add_implicit_resolver", "app.command", "app.callback", "Progress", "TorchVersion",
}  # fmt: skip
"""Calls that may run at the top level of a file: they make constants and declare."""


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_importing_does_no_work(path: Path) -> None:
    """No loops, files or calls at import, apart from those that make constants."""
    work = []
    for node in tree_of(path).body:
        if isinstance(node, ast.For | ast.While | ast.With | ast.Try):
            work.append(f"line {node.lineno}: {type(node).__name__}")
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
            calls = [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
            work += [f"line {node.lineno}: {name}()" for name in calls if name not in AT_IMPORT]
    assert work == []
