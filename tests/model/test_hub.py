"""Fetching a base from a hub: against a stand-in on this machine, in processes of their own (HF_ENDPOINT is read at import)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import BAD_TOKEN, GOOD_TOKEN, Hub, Repository, repository_of, running_hub
from tests.model.test_facts import CONFIG, weights, write_base

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import json, sys, time
from onlay.errors import OnlayError
from onlay.model.facts import read_facts
from onlay.recipe import ModelSection

results = []
for section in json.loads(sys.argv[1]):
    seen, started = [], time.perf_counter()
    try:
        facts = read_facts(ModelSection(**section), progress=lambda *at: seen.append(at))
        results.append({"facts": facts.model_dump(mode="json"), "progress": seen})
    except OnlayError as error:
        results.append({"problem": error.problem, "remedy": error.remedy})
    results[-1]["seconds"] = time.perf_counter() - started
print(json.dumps({"results": results, "heavy": [name for name in ("torch", "transformers") if name in sys.modules]}))
"""


BLOCK = 10 * 2**20
"""The hub client writes blocks of this size; a break within one loses that part."""


def make_large(hub: Hub, tmp_path: Path) -> Repository:
    """A base of more than two blocks, so that half of it is worth resuming."""
    tensors = {**weights(), "model.embed_tokens.weight": ((BLOCK // 16, 10), bytes(BLOCK // 16 * 40))}
    hub.repositories["org/large"] = repository_of(write_base(tmp_path / "made" / "large", tensors))
    return hub.repositories["org/large"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    single = repository_of(write_base(tmp_path / "made" / "single"))
    single.files |= {
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        "consolidated.safetensors": b"x" * 1000,
        "onnx/model.onnx": b"x",
        "onnx/config.json": b"{}",
        "original/params.json": b"{}",
        "evil.py": b"raise SystemExit('ran')",
        "pytorch_model.bin": b"x",
        "chat_template.jinja": b"{{ messages }}",
    }
    sharded = repository_of(write_base(tmp_path / "made" / "sharded", shards=3))
    pickled = Repository(files={name: body for name, body in single.files.items() if not name.endswith(".safetensors")})
    gated = repository_of(write_base(tmp_path / "made" / "gated"), gated=True)
    with running_hub({"org/single": single, "org/sharded": sharded, "org/pickled": pickled, "org/gated": gated}) as hub:
        yield hub


def read(hub: Hub, tmp_path: Path, *sections: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """What read_facts gives for each section, all in one fresh process."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(sections)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["heavy"] == []
    return list(answer["results"])


def test_a_base_is_fetched_at_a_commit_and_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repositories["org/single"].commit
    single, sharded = read(hub, tmp_path, {"base": "org/single"}, {"base": "org/sharded"})
    facts = single["facts"]
    assert facts["revision"] == commit
    assert facts["licence"] == "apache-2.0"
    assert Path(facts["path"]).name == commit
    files = {str(path.relative_to(facts["path"])) for path in Path(facts["path"]).rglob("*") if path.is_file()}
    assert files == {"README.md", "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    total = sum(len(hub.repositories["org/single"].files[name]) for name in files)
    assert single["progress"][-1] == [total, total]
    # The same weights in shards, fetched and local, are the same base.
    assert sharded["facts"]["weight_fingerprint"] == facts["weight_fingerprint"]
    assert sharded["facts"]["linear_shapes"] == facts["linear_shapes"]


def test_what_was_fetched_is_used_without_a_network(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/single"].branches["v1"] = commit = hub.repositories["org/single"].commit
    sections = ({"base": "org/single"}, {"base": "org/single", "revision": "v1"}, {"base": "org/sharded"})
    online = read(hub, tmp_path, *sections)
    asked = len(hub.requests)
    # A whole commit that is here is not asked about.
    (pinned,) = read(hub, tmp_path, {"base": "org/single", "revision": commit})
    assert len(hub.requests) == asked
    offline = read(hub, tmp_path, *sections, HF_HUB_OFFLINE="1")
    unreachable = Hub(url="http://127.0.0.1:9", repositories={}, requests=[])
    cut_off = read(unreachable, tmp_path, *sections)
    for results in (offline, cut_off, [pinned]):
        for before, after in zip(online, results, strict=False):
            assert after["facts"] == before["facts"]
    absent = read(unreachable, tmp_path, {"base": "org/other"})[0]
    assert "could not be fetched from http://127.0.0.1:9" in absent["problem"]
    assert "run the same command again" in absent["remedy"]
    assert "HF_HUB_OFFLINE is set" in read(hub, tmp_path, {"base": "org/x"}, HF_HUB_OFFLINE="1")[0]["problem"]


def test_a_part_of_a_snapshot_is_not_taken_for_a_base(hub: Hub, tmp_path: Path) -> None:
    (fetched,) = read(hub, tmp_path, {"base": "org/sharded"})
    (Path(fetched["facts"]["path"]) / "model-00002-of-00003.safetensors").unlink()
    (offline,) = read(hub, tmp_path, {"base": "org/sharded"}, HF_HUB_OFFLINE="1")
    assert "not (wholly) in the cache" in offline["problem"]
    (again,) = read(hub, tmp_path, {"base": "org/sharded"})
    assert again["facts"]["weight_fingerprint"] == fetched["facts"]["weight_fingerprint"]


def test_wrong_names_revisions_and_contents_are_told_at_once(hub: Hub, tmp_path: Path) -> None:
    config = json.dumps(CONFIG | {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "evil.X"}}).encode()
    single = hub.repositories["org/single"]
    hub.repositories["org/code"] = Repository(files={**single.files, "config.json": config})
    hub.repositories["org/text"] = Repository(files={**single.files, "config.json": b"<html>"})
    hub.repositories["org/adapter"] = Repository(files={"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    cases = [
        ({"base": "org/unknown"}, "is not on the hub, or it is private", "Names look like"),
        ({"base": "org/single", "revision": "nope"}, "model.revision = nope does not exist", "delete the line"),
        ({"base": "org/pickled"}, "only pickled weights (pytorch_model.bin)", "safetensors"),
        ({"base": "org/code"}, "Python code of its own (evil.X)", "model.trust_remote_code: true"),
        ({"base": "org/text"}, "config.json is not JSON", "Download the base again"),
        ({"base": "org/adapter"}, "is an adapter, not a base", "base_model_name_or_path"),
        ({"base": "org/pickled", "weights": "random"}, None, None),
    ]
    results = read(hub, tmp_path, *(section for section, _, _ in cases))
    for (section, problem, remedy), result in zip(cases, results, strict=True):
        assert result["seconds"] < 2, section
        if problem is None:
            assert result["facts"]["linear_shapes"] == {}
        else:
            assert problem in result["problem"], section
            assert remedy in result["remedy"], section
            assert "\n" not in result["problem"] + result["remedy"]
    # None of these downloaded weights, and code only comes when it was asked for.
    fetched = {path for _, path, _ in hub.requests if "/resolve/" in path}
    assert not any(path.endswith((".safetensors", ".bin", ".py")) for path in fetched)
    (trusted,) = read(hub, tmp_path, {"base": "org/code", "trust_remote_code": True})
    assert (Path(trusted["facts"]["path"]) / "evil.py").is_file()


def test_a_gated_base_and_tokens(hub: Hub, tmp_path: Path) -> None:
    section = {"base": "org/gated"}
    (without,) = read(hub, tmp_path, section)
    assert "org/gated is gated" in without["problem"]
    assert "there is no access token" in without["problem"]
    assert f"{hub.url}/org/gated" in without["remedy"]
    assert "hf auth login" in without["remedy"]
    (stranger,) = read(hub, tmp_path, section, HF_TOKEN="hf_stranger")
    assert "your token has no access" in stranger["problem"]
    (bad,) = read(hub, tmp_path, section, HF_TOKEN=BAD_TOKEN)
    assert "does not accept the access token" in bad["problem"]
    for result in (stranger, bad):
        assert "hf_stranger" not in str(result)
        assert BAD_TOKEN not in str(result)
    (good,) = read(hub, tmp_path, section, HF_TOKEN=GOOD_TOKEN)
    assert good["facts"]["num_layers"] == 2


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    make_large(hub, tmp_path).breaks["model.safetensors"] = 1
    (result,) = read(hub, tmp_path, {"base": "org/large"})
    assert result["facts"]["num_layers"] == 2
    spans = [span for method, path, span in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert spans == [None, f"bytes={BLOCK}-"]


def test_a_run_that_ends_while_downloading_keeps_the_files_that_came_whole(hub: Hub, tmp_path: Path) -> None:
    # Broken at every try, as when the network is gone for long.
    hub.repositories["org/sharded"].breaks["model-00002-of-00003.safetensors"] = 10**6
    (broken,) = read(hub, tmp_path, {"base": "org/sharded"})
    assert "could not be fetched" in broken["problem"]
    assert "files that came whole are kept" in broken["remedy"]
    (offline,) = read(hub, tmp_path, {"base": "org/sharded"}, HF_HUB_OFFLINE="1")
    assert "not (wholly) in the cache" in offline["problem"]
    hub.repositories["org/sharded"].breaks.clear()
    hub.requests.clear()
    (result,) = read(hub, tmp_path, {"base": "org/sharded"})
    assert result["facts"]["num_layers"] == 2
    fetched = [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert fetched == ["model-00002-of-00003.safetensors"]


def test_a_disk_without_room_is_told_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/single"].sizes["model.safetensors"] = 2**60
    (result,) = read(hub, tmp_path, {"base": "org/single"})
    assert f"{2**60:,}"[:6] in result["problem"]
    assert "free" in result["problem"]
    assert "HF_HOME" in result["remedy"]
    assert not any(path.endswith("model.safetensors") for _, path, _ in hub.requests)


def test_files_that_are_here_already_need_no_room(hub: Hub, tmp_path: Path) -> None:
    read(hub, tmp_path, {"base": "org/single"})
    hub.repositories["org/single"].sizes["model.safetensors"] = 2**60
    (result,) = read(hub, tmp_path, {"base": "org/single"})
    assert "facts" in result


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (result,) = read(hub, tmp_path, {"base": "org/single"}, HF_HOME=str(tmp_path / "file"))
    assert "could not be stored" in result["problem"]
    assert "Set HF_HOME" in result["remedy"]
