"""Versions on the hub: a stand-in on this machine that takes uploads, in a process of its own (HF_ENDPOINT is read at
import)."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onlay.errors import OutputError, SetupError
from onlay.release.registry import Registry
from onlay.release.remote import pull, push
from tests import hub as stand_in
from tests.hub import GOOD_TOKEN, Hub, Repository, running_hub
from tests.release.test_registry import add, describe

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import json, sys
from pathlib import Path
from onlay.errors import OnlayError
from onlay.release.registry import Registry
from onlay.release.remote import pull, push
from tests.release.test_registry import add, describe

here, there = Registry(Path("here/registry")), Registry(Path("there/registry"))
results = []
for step in json.loads(sys.argv[1]):
    try:
        if step[0] == "add":
            results.append(add(here, step[1], evaluation_loss=float(step[2])).id)
        elif step[0] == "push":
            results.append(push(here, *step[1:])[1])
        else:
            version, new = pull(there, step[1], describe=lambda f, d: describe(f, d, evaluation_loss=float(step[2])))
            results.append([version.id, new, version.origin, (Path(version.path) / "adapter_model.safetensors").read_text()])
    except OnlayError as error:
        results.append([error.problem, error.remedy])
print(json.dumps(results))
"""


def _post(self: Any) -> None:
    """What an upload asks for: a repository, how to send each file (all within the commit), and the commit."""
    hub: Hub = self.server.hub
    path = self.path.partition("?")[0]
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    if not (self.headers.get("Authorization") or "").endswith(GOOD_TOKEN):
        return self._refuse(401, None, "Invalid credentials in Authorization header")
    if path == "/api/repos/create":
        values = json.loads(body)
        name = f"{values['organization']}/{values['name']}" if values.get("organization") else values["name"]
        hub.repositories.setdefault(name, Repository(files={}))
        assert values.get("private") or values.get("visibility") == "private"
        return self._send_json({"url": f"{hub.url}/{name}"})
    match = re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/(.+)", path)
    assert match is not None, path
    repository = hub.repositories[match[1]]
    if match[2] == "preupload":
        files = [file["path"] for file in json.loads(body)["files"]]
        return self._send_json(
            {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        )
    for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
            repository.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        elif entry["key"] == "deletedFile":
            del repository.files[entry["value"]["path"]]
    oid = repository.commit
    return self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{match[1]}/commit/{oid}"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(stand_in._Handler, "do_POST", _post, raising=False)
    with running_hub({}) as running:
        yield running


def work(hub: Hub, folder: Path, *steps: list[str], token: str = GOOD_TOKEN) -> list[Any]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token,
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, json.dumps(steps)]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_version_goes_to_the_hub_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    target = "hf://team/support"
    results = work(
        hub, tmp_path, ["add", "a", "1.5"], ["push", "support@1", target], ["add", "b", "1.25"],
        ["pull", target, "1.5"], ["push", "support@2", target], ["pull", target, "1.25"], ["pull", target, "1.25"],
    )  # fmt: skip
    first, second = results[1], results[4]
    assert re.fullmatch(r"hf://team/support@[0-9a-f]{40}", first) and first != second
    assert results[3] == ["support@1", True, f"{first} (support@1)", "a"]
    assert results[5] == ["support@2", True, f"{second} (support@2)", "b"]
    assert results[6][:2] == ["support@2", False]
    files = hub.repositories["team/support"].files
    assert sorted(files) == ["adapter_model.safetensors", "tokenizer/tokenizer.json", "version.json"]


def test_what_the_hub_does_not_have_whole_is_not_registered(hub: Hub, tmp_path: Path) -> None:
    work(hub, tmp_path, ["add", "a", "1.5"], ["push", "support@1", "hf://team/support"])
    files = hub.repositories["team/support"].files
    files["adapter_model.safetensors"] = b"other"
    changed, missing, malformed = work(
        hub,
        tmp_path,
        ["pull", "hf://team/support", "1.5"],
        ["pull", "hf://team/none", "1.5"],
        ["pull", "hf://x", "1.5"],
    )
    assert "SHA-256 differs" in changed[0]
    assert missing[0] == "hf://team/none: the hub refused (401)."
    assert "does not name a place" in malformed[0]


def test_a_token_that_may_not_write_is_told(hub: Hub, tmp_path: Path) -> None:
    _, refused = work(hub, tmp_path, ["add", "a", "1.5"], ["push", "support@1", "hf://team/support"], token="hf_other")
    assert "the hub refused (401)" in refused[0] and "hf auth login" in refused[1]
    assert hub.repositories == {}


# -------------------------------------------------------------------------------------------------------------- MLflow


def test_without_mlflow_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    registry = Registry(tmp_path / "registry")
    add(registry, "a")
    for work in (lambda: push(registry, "support@1", "mlflow://support"),
                 lambda: pull(registry, "mlflow://support", describe=describe)):  # fmt: skip
        with pytest.raises(SetupError) as caught:
            work()
        assert "pip install 'onlay[mlflow]'" in caught.value.remedy


def test_a_version_goes_to_mlflow_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    here, there = Registry(tmp_path / "a" / "registry"), Registry(tmp_path / "b" / "registry")
    add(here, "a"), add(here, "b")
    assert [push(here, f"support@{number}", "mlflow://support")[1] for number in (1, 2)] == [
        "mlflow://support@1", "mlflow://support@2",
    ]  # fmt: skip
    assert pull(there, "mlflow://support@1", describe=describe)[0].id == "support@1"
    newest, new = pull(there, "mlflow://support", describe=describe)
    assert (newest.id, new, newest.origin) == ("support@2", True, "mlflow://support@2 (support@2)")
    assert (Path(newest.path) / "adapter_model.safetensors").read_text() == "b"
    with pytest.raises(OutputError, match="refused"):
        pull(there, "mlflow://support@9", describe=describe)
    with pytest.raises(OutputError, match="has no version"):
        pull(there, "mlflow://none", describe=describe)
