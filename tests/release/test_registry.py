"""Versions, aliases, history and the files under them; no torch, no run: the contents are a few bytes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from onlay.errors import OnlayError, OutputError, ProofError
from onlay.records import AdapterVersion, Gate
from onlay.release.history import MIGRATIONS
from onlay.release.registry import DamagedVersion, Registry
from onlay.release.remote import pull, push
from onlay.release.store import Stage, file_digest

PASSED = Gate(name="exact_match_gain", limit=0.02, found=0.1, passed=True, reason="gained 10 points")
FAILED = Gate(name="forgetting", limit=0.05, found=0.2, passed=False, reason="lost 0.2 nats of 0.05 allowed")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "home" / "registry")


def describe(folder: Path, files: dict[str, str], **changes: Any) -> AdapterVersion:
    values: dict[str, Any] = {
        "method": "lora", "files": files, "weight_digest": files["adapter_model.safetensors"], "rank": 4, "base": "tiny",
        "base_revision": None, "base_weight_fingerprint": "f" * 64, "storage": "bf16", "tokenizer_digest": "t" * 64,
        "template_digest": "c" * 64, "evaluation_loss": 1.5, "scores": {"exact_match": 0.9}, "gates": [PASSED],
        "verdict": "ship",
    }  # fmt: skip
    return AdapterVersion(**(values | changes))


def add(registry: Registry, content: str, *, name: str = "support", **changes: Any) -> AdapterVersion:
    folder = registry.root.parent / "run"
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(content)
    (folder / "tokenizer" / "tokenizer.json").write_text("shared")
    files = {path: folder / path for path in ("adapter_model.safetensors", "tokenizer/tokenizer.json")}
    version, _ = registry.add(name, files, describe=lambda f, d: describe(f, d, **changes), origin="runs/a")
    return version


# --------------------------------------------------------------------------------------------------------- registering


def test_versions_are_numbered_and_keep_what_they_were_made_of(registry: Registry) -> None:
    one, two = add(registry, "a"), add(registry, "b")
    assert [one.id, two.id] == ["support@1", "support@2"]
    assert (Path(two.path) / "adapter_model.safetensors").read_text() == "b"
    assert registry.versions("support") == [one, two]
    assert registry.resolve("support@1") == one
    assert two.origin == "runs/a" and "@" in two.registered_by and two.registered_at.endswith("+00:00")


def test_the_same_content_is_the_version_that_is_there(registry: Registry) -> None:
    first = add(registry, "a")
    add(registry, "b")
    again, other = add(registry, "a"), add(registry, "a", name="billing")
    assert again == first
    assert (other.id, other.digest) == ("billing@1", first.digest)
    assert len(registry.versions()) == 3
    assert len(list((registry.root / "versions").iterdir())) == 2


def test_other_scores_on_the_same_weights_are_another_version(registry: Registry) -> None:
    assert add(registry, "a").version == 1
    assert add(registry, "a", gates=[FAILED], verdict="do not ship").version == 2


def test_each_content_lies_on_the_disk_once_and_read_only(registry: Registry) -> None:
    paths = [Path(add(registry, content).path) / "tokenizer/tokenizer.json" for content in "abc"]
    assert len({path.stat().st_ino for path in paths}) == 1
    blob = registry.root / "blobs" / file_digest(paths[0])[:2] / file_digest(paths[0])
    assert blob.samefile(paths[0])
    assert not blob.stat().st_mode & 0o222


def test_what_is_refused_leaves_nothing(registry: Registry) -> None:
    def refuse(folder: Path, files: dict[str, str]) -> AdapterVersion:
        raise ProofError("no", "no")

    path = registry.root.parent / "weights"
    path.parent.mkdir(parents=True)
    path.write_text("a")
    with pytest.raises(ProofError):
        registry.add("support", {"adapter_model.safetensors": path}, describe=refuse, origin="x")
    assert registry.versions() == []
    assert [p for p in registry.root.rglob("*") if p.is_file() and p.name != "lock"] == []


def test_a_damaged_blob_is_not_inherited(registry: Registry) -> None:
    old = add(registry, "a")
    shared = Path(old.path) / "tokenizer/tokenizer.json"
    shared.chmod(0o644)
    shared.write_text("rotten")
    new = add(registry, "b")
    assert (Path(new.path) / "tokenizer/tokenizer.json").read_text() == "shared"
    _, damaged = registry.verify()
    assert [(one.version, one.problems) for one in damaged] == [("support@1", ["tokenizer/tokenizer.json was changed"])]


@pytest.mark.parametrize("name", ["", "Support", "../etc", "a/b", ".hidden", "a" * 65, "a@1", "a b"])
def test_names_that_could_be_paths_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(OutputError, match="not a name"):
        add(registry, "a", name=name)
    assert not registry.root.exists()


@pytest.mark.parametrize("file", ["../out", "/etc/passwd", "a/../../b", "manifest.json", ".hidden", "a/b/c/d", ""])
def test_files_stay_in_the_versions_folder(registry: Registry, file: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(OutputError, match="cannot be a file of a version"):
        registry.add("support", {file: tmp_path / "x"}, describe=describe, origin="x")


def test_what_a_killed_process_left_is_swept_by_the_next(registry: Registry) -> None:
    add(registry, "a")
    left = registry.root / "staging" / "dead"
    (left / "version").mkdir(parents=True)
    (registry.root / "versions" / ("0" * 64)).mkdir()
    orphans = [registry.root / "blobs" / "00" / (digit * 64) for digit in "01"]
    for orphan in orphans:
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_text("orphan")
    os.link(orphans[1], left / "version" / "weights")  # Killed between the two: shared, not published.
    add(registry, "b")
    assert not any(path.exists() for path in (left, *orphans))
    assert len(list((registry.root / "versions").iterdir())) == 2
    assert registry.verify()[1] == []


# -------------------------------------------------------------------------------------------------------------- moving


def test_promoting_and_rolling_back_step_by_step(registry: Registry) -> None:
    for content in "abc":
        version = add(registry, content)
        assert registry.promote(version.id) == (version, True)
    assert registry.aliases("support") == {"live": 3}
    assert registry.promote("support@live") == (version, False)
    assert registry.rollback("support").version == 2
    assert registry.rollback("support").version == 1
    with pytest.raises(OutputError, match="never another one before"):
        registry.rollback("support")
    registry.promote("support@3")
    assert registry.rollback("support", reason="too slow").version == 1
    assert registry.aliases("support") == {"live": 1}


def test_aliases_are_apart(registry: Registry) -> None:
    add(registry, "a"), add(registry, "b")
    registry.promote("support@1")
    registry.promote("support@2", alias="canary")
    assert registry.aliases("support") == {"canary": 2, "live": 1}
    assert registry.resolve("support@canary").version == 2
    with pytest.raises(OutputError, match="has no alias staging"):
        registry.rollback("support", alias="staging")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"verdict": None, "gates": [], "scores": {}}, "without a Report"),
        ({"verdict": "no gates", "gates": []}, "no gates"),
        ({"verdict": "do not ship", "gates": [PASSED, FAILED]}, "1 of 2 gates failed: forgetting"),
        ({"verdict": "do not ship"}, "do not ship"),
    ],
)
def test_only_what_passed_its_gates_is_promoted_unless_forced(
    registry: Registry, changes: dict[str, Any], why: str
) -> None:
    version = add(registry, "a", **changes)
    with pytest.raises(OutputError, match=why) as caught:
        registry.promote(version.id)
    assert "onlay evaluate runs/a" in caught.value.remedy
    with pytest.raises(OutputError, match="needs a reason"):
        registry.promote(version.id, force=True, reason="  ")
    assert registry.aliases("support") == {}
    registry.promote(version.id, force=True, reason="shown to the team")
    (_, move) = registry.history("support")
    assert (move.forced, move.reason, move.to_version, move.from_version) == (True, "shown to the team", 1, None)


def test_force_is_not_noted_where_it_was_not_needed(registry: Registry) -> None:
    registry.promote(add(registry, "a").id, force=True, reason="in a hurry")
    assert [event.forced for event in registry.history("support")] == [False, False]


@pytest.mark.parametrize("alias", ["latest", "4", "../x", "LIVE", ""])
def test_aliases_that_mean_something_else_are_refused(registry: Registry, alias: str) -> None:
    with pytest.raises(OutputError, match="not an alias"):
        registry.promote(add(registry, "a").id, alias=alias)


def test_history_tells_who_when_and_why(registry: Registry) -> None:
    add(registry, "a"), add(registry, "b")
    registry.promote("support@1"), registry.promote("support@2")
    registry.rollback("support", reason="complaints")
    events = registry.history("support")
    assert [(e.action, e.alias, e.from_version, e.to_version) for e in events] == [
        ("register", None, None, 1), ("register", None, None, 2), ("promote", "live", None, 1),
        ("promote", "live", 1, 2), ("rollback", "live", 2, 1),
    ]  # fmt: skip
    assert events[-1].reason == "complaints"
    assert all(event.by and event.at.endswith("+00:00") for event in events)


def test_rows_can_be_neither_changed_nor_removed(registry: Registry) -> None:
    registry.promote(add(registry, "a").id)
    database = sqlite3.connect(registry.root / "registry.sqlite")
    for table in ("versions", "moves"):
        for statement in (f"UPDATE {table} SET name = 'x'", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match=r"never change|append-only"):
                database.execute(statement)
    database.close()


def test_a_registry_of_a_newer_version_is_refused(registry: Registry) -> None:
    add(registry, "a")
    database = sqlite3.connect(registry.root / "registry.sqlite")
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(OutputError, match="Upgrade onlay"):
        registry.versions()


# ------------------------------------------------------------------------------------------------------------- looking


def test_an_empty_registry_has_nothing_and_makes_no_file(registry: Registry) -> None:
    assert (registry.names(), registry.versions(), registry.aliases("x"), registry.verify()) == ([], [], {}, ([], []))
    assert not registry.root.exists()


def test_what_is_not_there_is_told_with_what_is(registry: Registry) -> None:
    for content in "ab":
        registry.promote(add(registry, content).id)
    for reference, said in [
        ("suport", "Did you mean support"),
        ("support@9", r"support@1, support@2, support@live is support@2"),
        ("support@canary", "support@1"),
        ("support@", "support@1"),
        ("support@../1", "support@1"),
        ("support@²", "support@1"),
    ]:
        with pytest.raises(OutputError, match=said):
            registry.resolve(reference)
    assert registry.resolve("support").version == registry.resolve("support@latest").version == 2


def test_verify_finds_every_kind_of_damage_and_promotion_stops_at_it(registry: Registry) -> None:
    sound = [add(registry, content) for content in "abcd"]
    registry.promote("support@4"), registry.promote("support@1")
    paths = [Path(version.path) for version in sound]
    (paths[0] / "adapter_model.safetensors").chmod(0o644)
    (paths[0] / "adapter_model.safetensors").write_text("changed")
    (paths[1] / "adapter_model.safetensors").unlink()
    (paths[2] / "extra").write_text("x")
    (paths[3] / "manifest.json").chmod(0o644)
    (paths[3] / "manifest.json").write_text((paths[3] / "manifest.json").read_text().replace("tiny", "tiny2"))
    _, damaged = registry.verify("support")
    assert [(one.version, one.problems[0].split(": ")[-1]) for one in damaged] == [
        ("support@1", "adapter_model.safetensors was changed"),
        ("support@2", "adapter_model.safetensors is missing"),
        ("support@3", "extra does not belong to it"),
        ("support@4", f"{paths[3] / 'manifest.json'} is missing or was changed"),
    ]
    assert not [one for one in damaged if one.problems[0].startswith("support@")]
    with pytest.raises(ProofError, match="not as it was registered"):
        registry.promote("support@2")
    with pytest.raises(ProofError, match=r"support@4: .*changed"):
        registry.rollback("support")
    assert registry.aliases("support") == {"live": 1}


@pytest.mark.parametrize("damage", ["missing", "changed", "not JSON"])
def test_one_damaged_manifest_hides_no_other_version(registry: Registry, damage: str) -> None:
    sound = [add(registry, content) for content in "abc"]
    manifest = Path(sound[1].path) / "manifest.json"
    manifest.chmod(0o644)
    if damage == "missing":
        manifest.unlink()
    else:
        manifest.write_text("x" if damage == "not JSON" else manifest.read_text().replace("tiny", "tiny2"))
    listed = registry.versions("support")
    assert (
        [one.id for one in listed] == [one.id for one in registry.versions()] == ["support@1", "support@2", "support@3"]
    )
    assert [isinstance(one, DamagedVersion) for one in listed] == [False, True, False]
    assert isinstance(listed[1], DamagedVersion)
    assert (listed[1].digest, listed[1].origin, listed[1].registered_at) == (
        sound[1].digest, sound[1].origin, sound[1].registered_at,
    )  # fmt: skip
    for reference in ("support", "support@latest", "support@3", "support@1"):
        assert isinstance(registry.resolve(reference), AdapterVersion)
    with pytest.raises(ProofError, match=r"support@2: .*manifest.json is missing or was changed") as caught:
        registry.resolve("support@2")
    assert "Register runs/a again" in caught.value.remedy
    assert [one.version for one in registry.verify("support@2")[1]] == ["support@2"]
    assert registry.verify("support@3") == ([sound[2]], [])


@pytest.mark.parametrize("damage", ["manifest.json", "adapter_model.safetensors", "tokenizer/tokenizer.json", "."])
def test_registering_again_puts_a_damaged_version_back(registry: Registry, damage: str) -> None:
    one, other = add(registry, "a"), add(registry, "b")
    path = Path(one.path) / damage
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.chmod(0o644)
        path.write_text("changed")
    assert registry.verify()[1]
    assert add(registry, "a") == one and add(registry, "b") == other
    assert registry.verify() == ([one, other], [])
    assert registry.promote("support@1")[1]
    assert not list((registry.root / "staging").iterdir())


def test_where_putting_back_fails_what_was_there_stays(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    one = add(registry, "a")
    (Path(one.path) / "manifest.json").unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Stage, "publish", full)
    with pytest.raises(OutputError) as caught:
        add(registry, "a")
    assert caught.value.problem.endswith("cannot be written: the disk is full.")
    assert (Path(one.path) / "adapter_model.safetensors").read_text() == "a"


# ------------------------------------------------------------------------------------------------------ passing it on


def test_a_pushed_folder_is_pulled_elsewhere_as_it_was(registry: Registry, tmp_path: Path) -> None:
    add(registry, "a"), add(registry, "b")
    version, place = push(registry, "support@2", str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_text() == "b"
    assert str(registry.root) not in (tmp_path / "out" / "version.json").read_text()
    other = Registry(tmp_path / "other")
    pulled, new = pull(other, place, describe=describe)
    assert (new, pulled.id, pulled.digest, pulled.gates) == (True, "support@2", version.digest, [PASSED])
    assert pulled.origin == f"{place} (support@2)"
    assert other.promote("support@2")[1]
    assert pull(other, place, describe=describe) == (pulled, False)
    renamed, _ = pull(other, place, describe=describe, name="desk")
    assert renamed.id == "desk@2"


def test_a_pulled_version_whose_number_is_taken_gets_the_next(registry: Registry, tmp_path: Path) -> None:
    add(registry, "a")
    push(registry, "support@1", str(tmp_path / "out"))
    other = Registry(tmp_path / "other" / "registry")
    add(other, "mine")
    assert pull(other, str(tmp_path / "out"), describe=describe)[0].id == "support@2"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_text("x"), "SHA-256 differs"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "is missing"),
        (lambda f: (f / "version.json").unlink(), "does not exist"),
        (lambda f: _replace(f, '"tiny"', '"other"'), "says something else than the files do: base"),
        (lambda f: _replace(f, '"tokenizer/tokenizer.json"', '"../../outside"'), "cannot be a file of a version"),
        (lambda f: _link(f / "tokenizer" / "tokenizer.json"), "no plain file"),
    ],
)
def test_a_folder_that_was_changed_is_not_pulled(registry: Registry, tmp_path: Path, damage: Any, said: str) -> None:
    add(registry, "a")
    push(registry, "support@1", str(tmp_path / "out"))
    damage(tmp_path / "out")
    other = Registry(tmp_path / "other")
    with pytest.raises(OnlayError, match=said):
        pull(other, str(tmp_path / "out"), describe=describe)
    assert other.versions() == []


def _replace(folder: Path, old: str, new: str) -> None:
    text = (folder / "version.json").read_text()
    assert old in text
    (folder / "version.json").write_text(text.replace(old, new))


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def test_pushing_refuses_a_folder_that_exists_and_a_damaged_version(registry: Registry, tmp_path: Path) -> None:
    version = add(registry, "a")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        push(registry, version.id, str(tmp_path / "out"))
    (Path(version.path) / "adapter_model.safetensors").unlink()
    with pytest.raises(ProofError, match="missing"):
        push(registry, version.id, str(tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


# ---------------------------------------------------------------------------------------------------------------- both


def _register_some(root: str, who: int) -> None:
    registry = Registry(Path(root))
    folder = Path(root).parent / f"worker{who}"
    folder.mkdir(parents=True)
    for number in range(6):
        # Every second content is also the other process's.
        (folder / "w").write_text(f"common {number}" if number % 2 else f"{who} {number}")
        files = {"adapter_model.safetensors": folder / "w"}
        registry.add("support", files, describe=describe, origin="x")


def test_processes_register_at_once_and_each_content_gets_one_number(registry: Registry) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_register_some, args=(str(registry.root), who)) for who in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [version.version for version in registry.versions("support")] == list(range(1, 10))
    assert registry.verify()[1] == []


def test_a_user_without_a_name_is_a_number(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert add(registry, "a").registered_by.startswith(f"uid{os.getuid()}@")
