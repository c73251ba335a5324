"""Texts with labels as examples: the number of the label is the last entry, and the only one that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from onlay.data.build import prepare_dataset
from onlay.data.labels import LabelledText, find_labels
from onlay.data.material import read_material
from onlay.data.pack import collate
from onlay.data.select import select_rows
from onlay.data.split import coloured, open_split
from onlay.data.template import ChatTemplate
from onlay.errors import DataError
from onlay.recipe import Recipe, parse_recipe
from onlay.records import Dataset
from tests.builders import VOCABULARY, tiny_tokenizer


def write(path: Path, pairs: list[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    return path


def recipe_on(rows: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"base": "base"},
        "adapter": {"method": "head"},
        "data": {"train": str(rows), "format": "classification"},
        "evaluation": {"split": None},
    }
    return parse_recipe({name: fields | sections.get(name, {}) for name, fields in values.items()})


def labels_of(recipe: Recipe, **options: Any) -> list[str]:
    material = read_material(recipe, audit=False)
    selection = select_rows(material, recipe)
    return find_labels(recipe, material, selection, **({"vocabulary_size": VOCABULARY} | options))


def prepared(recipe: Recipe, cache: Path, *, words: bool = False) -> tuple[Dataset, LabelledText]:
    encoding = LabelledText(tiny_tokenizer(), labels_of(recipe))
    template = ChatTemplate(tiny_tokenizer()) if words else encoding
    material = read_material(recipe, audit=False)
    dataset = prepare_dataset(
        recipe, material, select_rows(material, recipe), template, tokenizer_digest="t", context_tokens=512,
        cache_folder=cache / "cache",
    )  # fmt: skip
    return dataset, encoding


PAIRS = [("it pours", "wet"), ("sun", "dry"), ("a drizzle", " wet "), ("dust", "dry"), ("ice", "cold")]


def test_labels_are_the_different_texts_sorted_without_white_space(tmp_path: Path) -> None:
    assert labels_of(recipe_on(write(tmp_path / "rows.jsonl", PAIRS))) == ["cold", "dry", "wet"]
    assert labels_of(recipe_on(write(tmp_path / "n.jsonl", [("a", 10), ("b", 9)]))) == ["10", "9"]
    assert labels_of(recipe_on(tmp_path / "rows.jsonl", data={"max_rows": 4})) == ["dry", "wet"]


def test_only_the_label_trains_and_it_is_the_target_at_the_texts_last_token(tmp_path: Path) -> None:
    dataset, encoding = prepared(recipe_on(write(tmp_path / "rows.jsonl", PAIRS)), tmp_path)
    assert dataset.labels == encoding.labels == ["cold", "dry", "wet"]
    split = open_split(dataset, "train")
    for index, (text, label) in enumerate(PAIRS):
        ids, trained = split.example(index)
        assert ids[:-1].tolist() == tiny_tokenizer()(text)["input_ids"]
        assert dataset.labels[ids[-1]] == label.strip()
        assert trained.tolist() == [False] * len(text) + [True]
    for packed in (False, True):
        batch = collate([split.example(i) for i in range(len(PAIRS))], packed=packed, pad_token_id=256)
        rows, places = (batch.targets >= 0).nonzero(as_tuple=True)
        last = batch.input_ids[rows, batch.columns[places]].tolist()
        found = dict(zip(last, batch.targets[rows, places].tolist(), strict=True))
        ends = {tiny_tokenizer()(text)["input_ids"][-1]: dataset.labels.index(label.strip()) for text, label in PAIRS}
        assert (len(rows), found) == (len(PAIRS), ends)


def test_the_tokenizers_own_special_tokens_are_there() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 258)]
    )
    [ids] = LabelledText(tokenizer, ["a", "b"]).encode_texts(["x"])
    assert ids == [258, *tiny_tokenizer()("x")["input_ids"]]


def test_a_cut_keeps_the_texts_beginning_and_the_label(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [("abcdefghijkl", "wet"), ("abc", "dry")])
    dataset, _ = prepared(recipe_on(data, data={"max_tokens": 8, "overlong": "cut"}), tmp_path)
    ids, trained = open_split(dataset, "train").example(0)
    assert (len(ids), ids[-1]) == (8, dataset.labels.index("wet"))
    assert ids[:-1].tolist() == tiny_tokenizer()("abcdefg")["input_ids"]
    assert trained.tolist() == [False] * 7 + [True]
    assert [(f.code, f.count) for f in dataset.findings] == [("few_rows", 2), ("overlong_cut", 1)]
    dropped, _ = prepared(recipe_on(data, data={"max_tokens": 8}), tmp_path)
    assert dropped.splits["train"].examples == 1


def test_the_same_rows_are_prepared_apart_for_a_head_and_for_words(tmp_path: Path) -> None:
    recipe = recipe_on(write(tmp_path / "rows.jsonl", PAIRS))
    (head, _), (words, _) = prepared(recipe, tmp_path), prepared(recipe, tmp_path, words=True)
    assert head.path != words.path
    assert (head.stop_token_ids, words.labels) == ([], [])
    other = LabelledText(tiny_tokenizer(), ["cold", "dry", "hot", "wet"])
    assert other.digest != LabelledText(tiny_tokenizer(), head.labels).digest == head.template_digest


def test_shown_rows_name_the_label(tmp_path: Path) -> None:
    dataset, encoding = prepared(recipe_on(write(tmp_path / "rows.jsonl", PAIRS)), tmp_path)
    assert coloured(encoding, *open_split(dataset, "train").example(0)).plain == "it pours → wet"


# ------------------------------------------------------------------------------------------------------ what is refused


def test_one_label_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [("a", "wet"), ("b", "wet")])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: its label 'wet' is that of every training row") as caught:
        labels_of(recipe_on(data))
    assert str(caught.value).count("\n") == 1


def test_a_held_out_label_must_be_known_from_training(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS[:4])
    held_out = write(tmp_path / "held.jsonl", [("fog", "wet"), ("snow", "white")])
    with pytest.raises(DataError, match=r"held\.jsonl:2: its label 'white' is held out") as caught:
        labels_of(recipe_on(data, evaluation={"file": str(held_out)}))
    assert str(caught.value).count("\n") == 1


def test_rows_that_are_held_out_by_a_share_do_not_name_labels(tmp_path: Path) -> None:
    """Whatever rows the seed holds out: a label of theirs alone is refused, at its own row."""
    data = write(tmp_path / "rows.jsonl", [(f"text {i}", f"label {i}") for i in range(10)])
    recipe = recipe_on(data, evaluation={"split": 0.2})
    held = np.flatnonzero(select_rows(read_material(recipe, audit=False), recipe).held_out)
    with pytest.raises(DataError, match=rf"rows\.jsonl:{held[0] + 1}: its label 'label {held[0]}' is held out"):
        labels_of(recipe)


def test_answers_are_no_labels(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [(str(i), f"answer {i}") for i in range(9)])
    with pytest.raises(DataError, match="9 different labels; at most 8"):
        labels_of(recipe_on(data), vocabulary_size=8)


@pytest.mark.parametrize("label", [None, "", True])
def test_a_row_without_a_label_is_named(tmp_path: Path, label: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [("a", "wet"), ("b", label), ("c", "dry")])
    with pytest.raises(DataError, match=r"rows\.jsonl:2, field label") as caught:
        labels_of(recipe_on(data))
    assert str(caught.value).count("\n") == 1


def test_a_text_without_tokens_is_dropped_and_counted() -> None:
    from onlay.data.read import Conversation, Turn

    class Deaf:
        def __call__(self, texts: list[str], **_options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] for _ in texts]}

    row = Conversation((Turn("user", "\u200b"), Turn("assistant", "b")))
    [encoded] = LabelledText(Deaf(), ["a", "b"]).encode_batch([row])  # type: ignore[arg-type]
    assert (encoded.ids, encoded.trained) == ([1], [False])
