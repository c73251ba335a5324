"""`prepare` from files to a data set: several sources, what is left out and why, personal data, what stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onlay.data.privacy.key import read_key
from onlay.data.privacy.pseudonyms import Pseudonyms, Vault, vault_path
from onlay.data.read import Conversation, Turn, prompt_key
from onlay.data.split import open_split
from onlay.errors import DataError, OutputError
from onlay.recipe import Recipe, parse_recipe
from onlay.records import Dataset, Run
from onlay.stages import contamination
from onlay.stages.preparing import Prepared, look, prepare
from tests.builders import save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = [
    "river",
    "boat",
    "seven",
    "mast",
    "weather",
    "harbour",
    "stone",
    "lamp",
    "winter",
    "copper",
    "field",
    "engine",
    "orange",
    "paper",
    "window",
]


def row(number: int, **more: Any) -> dict[str, Any]:
    """A row that is near none of another number."""
    draw = np.random.default_rng(number)
    prompt, answer = (" ".join(draw.choice(WORDS, 9)) for _ in range(2))
    return {"prompt": f"{number}: {prompt}?", "completion": f"{answer}.", **more}


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return name


def recipe_of(base: Path, **sections: Any) -> Recipe:
    values: dict[str, dict[str, Any]] = {"model": {"base": str(base)}, "evaluation": {"split": None}}
    return parse_recipe(values | {name: values.get(name, {}) | fields for name, fields in sections.items()})


def removed(dataset: Dataset) -> list[dict[str, Any]]:
    lines = (Path(dataset.path) / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def places(prepared: Prepared, name: str) -> list[str]:
    split = prepared.split(name)
    return [split.place(index) for index in range(len(split))]


def counts(dataset: Dataset) -> dict[str, int]:
    return {finding.code: finding.count for finding in dataset.findings}


# ------------------------------------------------------------------------------------------------------ several sources


def test_every_example_knows_its_file_and_row(base: Path, place: Path) -> None:
    write("a.jsonl", [row(i) for i in range(30)])
    Path("b.csv").write_text("question,answer\n" + "".join(f"{row(i)['prompt']},yes {i}\n" for i in range(100, 120)))
    train = ["a.jsonl", {"file": "b.csv", "weight": 2}]
    prepared = prepare(recipe_of(base, data={"train": train}, evaluation={"split": 0.2}))
    dataset, held = prepared.dataset, places(prepared, "evaluation")
    every = {f"a.jsonl:{i}" for i in range(1, 31)} | {f"b.csv:{i}" for i in range(2, 22)}
    assert set(held) | set(places(prepared, "train")) == every
    assert not set(held) & set(places(prepared, "train"))
    assert {place.split(":")[0] for place in held} == {"a.jsonl", "b.csv"}
    for place_of in every - set(held):
        assert places(prepared, "train").count(place_of) == (2 if place_of.startswith("b.csv") else 1)
    assert (dataset.splits["evaluation"].rows, dataset.splits["train"].rows) == (10, 40)
    assert dataset.source == "a.jsonl, b.csv"
    assert [item.place for item in prepared.split("evaluation").rows()] == held
    texts = {item.place: item.turns[-1].content for item in prepared.split("evaluation").rows() if isinstance(item, Conversation)}  # fmt: skip
    for place_of, text in texts.items():
        number = int(place_of.split(":")[1])
        assert text == (row(number - 1)["completion"] if place_of[0] == "a" else f"yes {number + 98}")


def test_rows_read_are_rows_that_train_that_are_held_out_and_that_were_left_out(base: Path, place: Path) -> None:
    rows = [row(i, topic="ab"[i % 3 % 2]) for i in range(60)] + [row(i, topic="a") for i in range(12)]
    rows += [{"prompt": "Long", "completion": "x" * 2000, "topic": "b"}]
    data = {
        "train": [write("a.jsonl", rows), {"file": write("b.jsonl", [row(i, topic="a") for i in range(200, 220)])}],
        "duplicates": "drop_exact", "balance": "equal", "domain_field": "topic", "max_tokens": 400,
        "general": write("g.jsonl", [row(i) for i in range(300, 310)]), "general_share": 0.1,
    }  # fmt: skip
    dataset = prepare(recipe_of(base, data=data, evaluation={"split": 0.1})).dataset
    gone, found = removed(dataset), counts(dataset)
    kept = sum(split.rows for split in dataset.splits.values())
    assert kept + len(gone) + found["general_not_drawn"] == len(rows) + 20 + 10
    assert {one["reason"] for one in gone} == {"duplicates_dropped", "balanced_away", "overlong_dropped"}
    for reason in ("duplicates_dropped", "balanced_away", "overlong_dropped"):
        assert found[reason] == sum(one["reason"] == reason for one in gone)
    doubles = {one["row"]: one["kept"] for one in gone if one["reason"] == "duplicates_dropped"}
    assert doubles == {61 + i: f"a.jsonl:{1 + i}" for i in range(12)}
    assert len({(one["file"], one["row"]) for one in gone}) == len(gone)


def test_the_order_of_the_rows_changes_nothing_but_the_order(base: Path, place: Path) -> None:
    rows = [row(i % 50, topic="ab"[i % 2]) for i in range(60)]
    data = {"duplicates": "drop_near", "balance": "cap", "domain_cap": 0.55, "domain_field": "topic"}

    def held_and_trained(name: str, rows: list[dict[str, Any]]) -> list[set[str]]:
        recipe = recipe_of(base, data={"train": write(name, rows), **data}, evaluation={"split": 0.2})
        prepared = prepare(recipe)
        return [
            {rows[int(place.rsplit(":", 1)[1]) - 1]["prompt"] for place in places(prepared, split)}
            for split in ("evaluation", "train")
        ]

    order = np.random.default_rng(5).permutation(60)
    assert held_and_trained("a.jsonl", rows) == held_and_trained("b.jsonl", [rows[i] for i in order])


def test_a_source_that_changes_makes_another_data_set(base: Path, place: Path) -> None:
    train = [write("a.jsonl", [row(i) for i in range(9)]), write("b.jsonl", [row(i) for i in range(20, 24)])]
    general = write("g.jsonl", [row(i) for i in range(40, 50)])
    recipe = recipe_of(base, data={"train": train, "general": general})
    folders = [prepare(recipe).dataset.path]
    assert prepare(recipe).dataset.path == folders[0]
    for name, start in (("b.jsonl", 60), ("g.jsonl", 80)):
        write(name, [row(i) for i in range(start, start + 10)])
        folders.append(prepare(recipe).dataset.path)
    folders.append(prepare(recipe_of(base, data={"train": [train[0], {"file": train[1], "weight": 2}], "general": general})).dataset.path)  # fmt: skip
    assert len(set(folders)) == 4


# -------------------------------------------------------------------------------------------------------- personal data

MAIL = "ann.weaver@harbour-mail.org"


def letters(count: int = 8) -> list[dict[str, Any]]:
    return [row(i) | {"prompt": f"{row(i)['prompt']} Write to {MAIL} or {i}@site{i}.net."} for i in range(count)]


def written(dataset: Dataset) -> bytes:
    return b"".join(path.read_bytes() for path in Path(dataset.path).iterdir())


@pytest.mark.parametrize("mode", ["pseudonyms", "redact"])
def test_no_planted_address_is_left(base: Path, place: Path, mode: str, onlay_home: Path) -> None:
    key = {"anonymise_key": "secrets/key"} if mode == "pseudonyms" else {}
    data = {"train": write("a.jsonl", letters()), "anonymise": mode, **key}
    prepared = prepare(recipe_of(base, data=data, evaluation={"split": 0.25}))
    assert counts(prepared.dataset)["anonymised"] == 8
    tokens = [prepared.template.shown(list(prepared.split(name).example(i)[0]), trained=False) for name in ("train", "evaluation") for i in range(len(prepared.split(name)))]  # fmt: skip
    mark = "<EMAIL_" if mode == "pseudonyms" else "[EMAIL]"
    assert len(tokens) == 8
    for text in tokens:
        assert mark in text
        assert "@" not in text
    everything = b"".join(path.read_bytes() for path in onlay_home.rglob("*") if path.is_file())
    assert MAIL.encode() not in everything
    if mode == "pseudonyms":
        first = {text[text.index("<EMAIL_") :].split(">")[0] for text in tokens}
        assert len(first) == 1, "one person, one token"
        secret = read_key("secrets/key")
        assert secret.secret.hex().encode() not in everything
        assert MAIL.encode() not in vault_path("secrets/key").read_bytes()
        restored = Vault(vault_path("secrets/key"), key=secret).restore(tokens[0])
        assert MAIL in restored


def test_another_key_makes_another_data_set_and_no_anonymising_a_third(base: Path, place: Path) -> None:
    train = write("a.jsonl", letters())
    made = [
        prepare(recipe_of(base, data={"train": train, **fields})).dataset.path
        for fields in (
            {}, {"anonymise": "redact"}, {"anonymise": "redact", "anonymise_kinds": ["phone"]},
            {"anonymise": "pseudonyms", "anonymise_key": "one"}, {"anonymise": "pseudonyms", "anonymise_key": "two"},
        )
    ]  # fmt: skip
    assert len(set(made)) == 5
    Path("moved").write_bytes(Path("one").read_bytes())
    Path("moved").chmod(0o600)
    again = recipe_of(base, data={"train": train, "anonymise": "pseudonyms", "anonymise_key": "moved"})
    assert prepare(again).dataset.path == made[3], "the same key in another place"


def test_a_lost_vault_is_filled_again_from_the_rows(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train": write("a.jsonl", letters()), "anonymise": "pseudonyms", "anonymise_key": "key"}
    first = prepare(recipe_of(base, data=data, evaluation={"split": 0.25})).dataset
    tokens = (Path(first.path) / "pseudonyms.txt").read_text().split()
    assert len(set(tokens)) == 9
    key, vault = read_key("key"), vault_path("key")
    known = Vault(vault, key=key).look_up(tokens)
    assert sorted(known.values()) == sorted([MAIL, *(f"{i}@site{i}.net" for i in range(8))])

    for path in place.glob("key.vault*"):
        path.unlink()
    monkeypatch.setattr("onlay.data.build._write", None)  # It comes from the cache.
    assert prepare(recipe_of(base, data=data, evaluation={"split": 0.25})).dataset == first
    assert Vault(vault, key=key).look_up(tokens) == known

    # One of another data set, made anew under the same key, does not hold them all.
    for path in place.glob("key.vault*"):
        path.unlink()
    some = Pseudonyms(key)
    some.add(dict([next(iter(known.items()))]))
    Vault(vault, key=key).add(some)
    prepare(recipe_of(base, data=data, evaluation={"split": 0.25}))
    assert Vault(vault, key=key).look_up(tokens) == known


def test_redacting_keeps_no_list_of_pseudonyms(base: Path, place: Path) -> None:
    dataset = prepare(recipe_of(base, data={"train": write("a.jsonl", letters()), "anonymise": "redact"})).dataset
    assert not (Path(dataset.path) / "pseudonyms.txt").exists()


def test_other_rules_make_another_data_set(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(base, data={"train": write("a.jsonl", letters()), "anonymise": "redact"})
    first = prepare(recipe).dataset.path
    monkeypatch.setattr("onlay.data.privacy.anonymise.VERSION", 1000)
    assert prepare(recipe).dataset.path != first


def test_what_cannot_be_replaced_stops_the_preparation(base: Path, place: Path) -> None:
    call = {"name": "send", "arguments": {MAIL: 1}}
    messages = [{"role": "user", "content": "Send it."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    recipe = recipe_of(base, data={"train": write("a.jsonl", [{"messages": messages}]), "anonymise": "redact"})
    with pytest.raises(DataError) as caught:
        prepare(recipe)
    assert caught.value.problem == "a.jsonl:1: personal data is left after data.anonymise = redact: email."
    assert MAIL not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- findings


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        (499, {}, 499),
        (500, {}, None),
        (600, {"data": {"train": [{"file": "a.jsonl", "weight": 0.5}]}}, 300),
        (520, {"evaluation": {"split": 0.5}}, 260),
        (520, {"data": {"general": "g.jsonl"}, "evaluation": {"split": 0.05}}, 494),
    ],
)
def test_few_rows_that_train_are_told_in_the_record(
    base: Path, place: Path, rows: int, changes: dict[str, Any], told: int | None
) -> None:
    write("g.jsonl", [row(1000 + i) for i in range(99)])
    train = write("a.jsonl", [row(i) for i in range(rows)])
    recipe = recipe_of(base, data={"train": train} | changes.get("data", {}), evaluation=changes.get("evaluation", {}))
    found = [one for one in prepare(recipe).dataset.findings if one.code == "few_rows"]
    assert [(one.severity, one.count) for one in found] == ([("warning", told)] if told is not None else [])
    assert all("fewer than 500; lora is usually given" in one.message for one in found)


SECRET = "AKIA" + "Q7XZ2MNB4KLP9RTV"


def test_rows_at_fault_stop_the_look_and_name_the_rows(base: Path, place: Path) -> None:
    rows = [row(i) for i in range(9)]
    rows[3]["completion"] = f"The key is {SECRET}."
    recipe = recipe_of(base, data={"train": write("a.jsonl", rows)})
    with pytest.raises(DataError) as caught:
        look(recipe)
    assert "(secret_key): a.jsonl:4" in caught.value.problem
    assert caught.value.exit_code == 2
    assert SECRET not in str(caught.value)
    data = {"train": "a.jsonl", "anonymise": "redact"}
    assert "secret_key" in counts(prepare(recipe_of(base, data=data)).dataset), "replaced, and still told"
    with pytest.raises(DataError, match="secret_key"):
        look(recipe_of(base, data={**data, "anonymise_kinds": ["email"]}))


def test_findings_of_the_audit_are_in_the_record(base: Path, place: Path) -> None:
    rows = [row(i) for i in range(20)] + [row(3)]
    dataset = prepare(recipe_of(base, data={"train": write("a.jsonl", rows)})).dataset
    (finding,) = [one for one in dataset.findings if one.code == "duplicates_exact"]
    assert ([one.place for one in finding.rows], finding.severity) == (["a.jsonl:21"], "warning")


# --------------------------------------------------------------------------------------------------------- contamination


def test_exactly_the_rows_that_trained_are_known(base: Path, place: Path) -> None:
    train = [
        write("a.jsonl", [row(i) for i in range(30)]),
        {"file": write("b.jsonl", [row(i) for i in range(50, 60)]), "weight": 0.5},
    ]
    recipe = recipe_of(
        base,
        data={"train": train, "general": write("g.jsonl", [row(i) for i in range(90, 95)])},
        evaluation={"split": 0.2},
    )
    prepared = prepare(recipe)
    records = place / "records"
    records.mkdir()
    prepared.dataset.save(records)
    (records / "recipe.yaml").write_text(recipe.to_yaml())
    run = Run(sources={"recipe": recipe.digest}, path=str(records), status="finished", started="", seconds=0, steps=0, total_steps=0, examples=0, trained_tokens=0)  # fmt: skip
    run.save(records)
    known = set(contamination._trained_keys(records).tolist())
    trained = set(places(prepared, "train"))
    for name, start, count in (("a.jsonl", 0, 30), ("b.jsonl", 50, 10), ("g.jsonl", 90, 5)):
        for i in range(count):
            item = Conversation((Turn("user", row(start + i)["prompt"]), Turn("assistant", "")))
            key = int(np.frombuffer(prompt_key(item), dtype="<u8")[0])
            assert (key in known) == (f"{name}:{i + 1}" in trained)
    write("b.jsonl", [row(i) for i in range(50, 61)])
    with pytest.raises(OutputError, match=r"a\.jsonl, b\.jsonl are not the files any more"):
        contamination._trained_keys(records)
    write("b.jsonl", [row(i) for i in range(50, 60)])
    write("g.jsonl", [row(i) for i in range(190, 195)])
    with pytest.raises(OutputError, match=r"g\.jsonl is not the file any more"):
        contamination._trained_keys(records)


def test_a_data_set_of_an_earlier_version_still_opens(base: Path, place: Path) -> None:
    """Then a place was a row number alone, and no list of sources was kept."""
    dataset = prepare(recipe_of(base, data={"train": write("a.jsonl", [row(i) for i in range(8)])}, evaluation={"split": 0.25})).dataset  # fmt: skip
    before = [open_split(dataset, name).place(0) for name in ("train", "evaluation")]
    (Path(dataset.path) / "sources.json").unlink()
    assert [open_split(dataset, name).place(0) for name in ("train", "evaluation")] == before
