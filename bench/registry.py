"""The registry under many writers that are killed: 8 processes register, promote and roll back, SIGKILL at random.

    python bench/registry.py --seconds 60 [--out bench/results/registry.json]

What a process was told before it died must be there afterwards: every version with its number and content, every move in
the history.  No number is given twice or left out, every version's files are whole, every alias points at one of them and
is where the history says, and what the killed left behind is gone after the next registration.  Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from onlay.errors import OutputError
from onlay.records import AdapterVersion
from onlay.release.history import Event
from onlay.release.registry import Registry
from onlay.release.store import file_digest

Told = dict[str, Any]
"""What a process noted of one thing that was done."""
NAMES, ALIASES = ("support", "billing"), ("live", "canary")
SHARED = b"the same tokenizer in every version" * 100


def describe(folder: Path, files: dict[str, str]) -> AdapterVersion:
    return AdapterVersion(
        method="lora", files=files, weight_digest=files["adapter_model.safetensors"], rank=4, base="base",
        base_revision=None, base_weight_fingerprint="0" * 64, storage="bf16", tokenizer_digest="0" * 64,
        template_digest="0" * 64, evaluation_loss=None, scores={}, gates=[], verdict=None,
        sources={"run": file_digest(folder / "adapter_model.safetensors")},
    )  # fmt: skip


def work(root: Path, seed: int) -> None:
    """Until killed: one thing after another; each is noted, on disk, once the registry said that it is done."""
    registry, draw = Registry(root / "registry"), random.Random(seed)
    inputs = root / "inputs" / str(seed)
    inputs.mkdir(parents=True)
    (inputs / "tokenizer.json").write_bytes(SHARED)
    with (root / "told" / f"{seed}.jsonl").open("w", encoding="utf-8") as told:
        for number in range(10**9):
            reason = f"{seed}.{number}"
            done = one_thing(registry, draw, inputs, reason)
            told.write(json.dumps(done) + "\n")
            told.flush()


def one_thing(registry: Registry, draw: random.Random, inputs: Path, reason: str) -> Told:
    name, alias, what = draw.choice(NAMES), draw.choice(ALIASES), draw.choice(("register", "promote", "rollback"))
    if what == "register" or name not in registry.names():
        # Now and then content that someone else may be registering at this moment.
        content = f"common {draw.randrange(40)}" if draw.random() < 0.3 else f"own {reason}"
        weights = inputs / "adapter_model.safetensors"
        weights.write_bytes(content.encode() * 2000)
        files = {"adapter_model.safetensors": weights, "tokenizer/tokenizer.json": inputs / "tokenizer.json"}
        version, new = registry.add(name, files, describe=describe, origin=reason)
        return {"what": "register", "name": name, "version": version.version, "digest": version.digest, "new": new}
    try:
        if what == "promote":
            number = draw.choice(registry.versions(name)[-5:]).version
            version, moved = registry.promote(f"{name}@{number}", alias=alias, force=True, reason=reason)
        else:
            version, moved = registry.rollback(name, alias=alias, reason=reason), True
    except OutputError as error:  # Nothing to go back to yet.
        return {"what": "refused", "why": error.problem}
    if not moved:
        return {"what": "stays"}
    return {"what": what, "name": name, "alias": alias, "version": version.version, "reason": reason}


def run(root: Path, *, seconds: float, processes: int) -> Counter[str]:
    """Lets the processes work and be killed; what was told, what is there, and what is wrong with it."""
    (root / "told").mkdir(parents=True)
    draw, counts = random.Random(0), Counter[str]()
    alive: list[int] = []
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            while len(alive) < processes:
                counts["processes"] += 1
                alive.append(_start(root, counts["processes"]))
            time.sleep(draw.uniform(0.01, 0.25))
            _kill(alive.pop(draw.randrange(len(alive))))
            counts["killed at work"] += 1
    finally:
        while alive:
            _kill(alive.pop())
    told = [json.loads(line) for path in (root / "told").iterdir() for line in _whole_lines(path)]
    counts.update(f"told: {entry['what']}" for entry in told)
    counts.update(check(root, told))
    return counts


def _start(root: Path, seed: int) -> int:
    process = os.fork()
    if process == 0:
        try:
            work(root, seed)
        finally:
            os._exit(1)  # Only an error comes here; what it told is looked at.
    return process


def _kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), f"process {process} ended by itself: its error is above"


def _whole_lines(path: Path) -> list[str]:
    """Without a last line that was being written when the process died."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def check(root: Path, told: list[Told]) -> Counter[str]:
    """What is there, and what is wrong with it; `wrong` is their sum."""
    registry, counts = Registry(root / "registry"), Counter[str]()
    counts["left lying, before sweeping"] = len(list((root / "registry" / "staging").iterdir()))
    registry.store.sweep(known=registry.digests)
    versions = registry.versions()
    there = {(version.name, version.version): version.digest for version in versions}
    whole, damaged = registry.verify()
    wrong = Counter[str](lost=0, torn=len(damaged) + len(versions) - len(whole), duplicated=0, astray=0, litter=0)
    wrong["lost"] += sum(
        there.get((entry["name"], entry["version"])) != entry["digest"] for entry in told if entry["what"] == "register"
    )
    for name in NAMES:
        mine = [version for version in versions if version.name == name]
        wrong["duplicated"] += len(mine) - len({version.digest for version in mine})
        # Numbers go up by one: one that is missing was given to a version that is gone.
        wrong["lost"] += len(set(range(1, len(mine) + 1)) ^ {version.version for version in mine})
        moves = [event for event in registry.history(name) if event.action != "register"]
        wrong["astray"] += count_astray(registry, name, moves)
        noted = {(event.reason, event.action, event.to_version) for event in moves}
        wrong["lost"] += sum(
            (entry["reason"], entry["what"], entry["version"]) not in noted
            for entry in told
            if "reason" in entry and entry["name"] == name
        )
        counts["moves"] += len(moves)
    wrong["litter"] += count_litter(root / "registry", {version.digest for version in versions})
    counts["versions"] = len(versions)
    counts.update({"wrong": wrong.total(), **wrong})  # With the zeros, which adding counters would leave out.
    return counts


def count_astray(registry: Registry, name: str, moves: list[Event]) -> int:
    """Moves that are not what the history before them says, and aliases that are not where it ends: a promotion puts a
    version on top, a rollback takes the top away."""
    stacks: dict[str | None, list[int]] = {}
    astray = 0
    for event in moves:
        stack = stacks.setdefault(event.alias, [])
        astray += event.from_version != (stack[-1] if stack else None)
        if event.action == "promote":
            stack.append(event.to_version)
        else:
            stack.pop()
        astray += stack[-1] != event.to_version
    numbers = {version.version for version in registry.versions(name)}
    aliases = registry.aliases(name)
    return astray + sum(
        stack[-1] != aliases.get(str(alias)) or stack[-1] not in numbers for alias, stack in stacks.items()
    )


def count_litter(root: Path, digests: set[str]) -> int:
    """Folders that are no version's, contents that no version has or that are not what they are called."""
    folders = {path.name for path in (root / "versions").iterdir()} ^ digests
    linked = {path.stat().st_ino for path in (root / "versions").rglob("*") if path.is_file()}
    blobs = list((root / "blobs").glob("*/*"))
    odd = [path for path in blobs if path.stat().st_ino not in linked or file_digest(path) != path.name]
    return len(folders) + len(odd) + len(list((root / "staging").iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    assert "torch" not in sys.modules
    folder = Path(tempfile.mkdtemp())
    try:
        counts = run(folder, seconds=arguments.seconds, processes=arguments.processes)
    finally:
        shutil.rmtree(folder)
    result = {
        "command": f"bench/registry.py --seconds {arguments.seconds:g} --processes {arguments.processes}",
        **counts, "cores": os.cpu_count(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
