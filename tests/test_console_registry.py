"""What the verbs of the registry print; contents are a few bytes, and nothing is trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onlay.cli.app import main
from onlay.release.registry import Registry
from onlay.stages import fitting, registering
from tests.release.test_registry import add

Say = Callable[..., str]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return Registry()


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["onlay", *arguments])
        found = 0
        try:
            main()
        except SystemExit as error:
            found = int(error.code or 0)
        out = capsys.readouterr().out
        assert found == code, out
        return out

    return run


def test_a_damaged_version_is_listed_beside_the_others(registry: Registry, say: Say) -> None:
    first, second = add(registry, "a", name="csv"), add(registry, "b", name="csv")
    registry.promote("csv@1")
    manifest = Path(first.path) / "manifest.json"
    manifest.unlink()
    for arguments in (("versions",), ("versions", "csv")):
        rows: list[dict[str, Any]] = json.loads(say(*arguments, "--json"))["versions"]
        told = [(row["id"], row["aliases"], row["digest"]) for row in rows]
        assert told == [("csv@1", ["live"], first.digest), ("csv@2", [], second.digest)]
        assert [row["damaged"] for row in rows] == [f"{manifest} is missing or was changed", None]
        table = say(*arguments)
        line = next(line for line in table.splitlines() if line.startswith("csv@1"))
        assert "damaged" in line and first.digest[:12] in line
        assert "Register runs/a again" in table
    assert json.loads(say("verify", "csv@2", "--json"))["damaged"] == []
    assert say("verify", code=1).splitlines()[0] == f"csv@1: {manifest} is missing or was changed"
    add(registry, "a", name="csv")
    assert "damaged" not in say("versions")


def test_after_a_head_no_evaluation_is_named(registry: Registry, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    head = add(registry, "a", name="head", rank=None, verdict=None, gates=[])
    adapter = add(registry, "b", verdict=None, gates=[])
    versions = {"head": head, "support": adapter}
    monkeypatch.setattr(
        registering, "register", lambda run, *, name, **_: registering.Registered(version=versions[name], new=True)
    )
    told = say("register", "runs/head", "--name", "head").splitlines()[-1]
    assert told == "Next: onlay promote head@1 --as live --force --reason 'REASON'"
    assert say("register", "runs/a", "--name", "support").splitlines()[-1].startswith("Next: onlay evaluate runs/a")
    refused = json.loads(say("promote", "head@1", "--json", code=2))
    assert "onlay evaluate" not in refused["remedy"] and "onlay show runs/a" in refused["remedy"]
    assert say("promote", "head@1", "--force", "--reason", "accuracy 0.9") == "head@live is now head@1.\n"


def test_an_adapter_is_called_what_the_user_called_it(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fitting.Compatibility(adapter="/store/versions/ab12", base="tiny", fits=True, notes=[], servers=[])
    monkeypatch.setattr(fitting, "compatible", lambda *_, **__: found)
    assert say("compatible", "support@1") == "support@1 fits tiny.\n"
