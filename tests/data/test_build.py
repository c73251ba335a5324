"""The prepared data set: split by prompt, length policies, refusals, the cache, bounded memory."""

from __future__ import annotations

import json
import os
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onlay.data import chosen
from onlay.data.build import BUILD_NOTES, prepare_dataset, resolve_max_tokens, split_document
from onlay.data.material import read_material
from onlay.data.read import Conversation, Document, scan
from onlay.data.select import select_rows
from onlay.data.sources import Row
from onlay.data.split import coloured, open_split
from onlay.data.template import NOTES, ChatTemplate
from onlay.data.writer import SplitWriter
from onlay.errors import DataError, OutputError, RecipeError
from onlay.recipe import Recipe, parse_recipe
from onlay.records import Dataset


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int, answer: str = "Answer") -> list[dict[str, Any]]:
    return [{"prompt": f"Question {i}", "completion": f"{answer} {i}"} for i in range(count)]


def recipe_for(path: Path, **sections: Any) -> Recipe:
    data = {"train": str(path), **sections.pop("data", {})}
    return parse_recipe({"model": {"base": "x"}, "data": data, **sections})


def prepared(tmp_path: Path, recipe: Recipe, **options: Any) -> Dataset:
    template = ChatTemplate(
        options.pop("tokenizer", tokenizer()), template=recipe.data.template, loss_on=recipe.data.loss_on
    )
    keywords = {"tokenizer_digest": "tok", "context_tokens": 512, "cache_folder": tmp_path / "cache", **options}
    material = read_material(recipe)
    return prepare_dataset(recipe, material, select_rows(material, recipe), template, **keywords)


def text_of(ids: np.ndarray) -> str:
    text: str = tokenizer().decode(ids.tolist(), skip_special_tokens=False)
    return text


def found(dataset: Dataset) -> dict[str, int]:
    """What the build counted, without what the audit found in the rows."""
    return {one.code: one.count for one in dataset.findings if one.code in NOTES | BUILD_NOTES}


def removed(dataset: Dataset) -> list[dict[str, Any]]:
    lines = (Path(dataset.path) / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# -------------------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(40))
    dataset = prepared(tmp_path, recipe_for(path))
    train, evaluation = open_split(dataset, "train"), open_split(dataset, "evaluation")
    assert len(train) == 38
    assert len(evaluation) == 2
    assert dataset.splits["train"].model_dump() == {
        "rows": 38,
        "examples": 38,
        "tokens": int(train.lengths.sum()),
        "trained_tokens": int(train.trained_counts.sum()),
        "longest_tokens": int(train.lengths.max()),
    }
    assert (dataset.format, dataset.template, dataset.max_tokens, dataset.source) == (
        "prompt_completion",
        "plain",
        512,
        str(path),
    )
    assert dataset.stop_token_ids == [tokenizer().eos_token_id]
    for split in (train, evaluation):
        for index in range(len(split)):
            ids, trained = split.example(index)
            number = int(split.place(index).rsplit(":", 1)[1])
            assert split.place(index) == f"{path}:{number}"
            assert ids.dtype == np.int32
            assert trained.dtype == np.bool_
            assert text_of(ids) == f"<s>User: Question {number - 1}\nAssistant: Answer {number - 1}</s>\n"
            assert text_of(ids[trained]) == f" Answer {number - 1}</s>"
            assert split.lengths[index] == len(ids)
            assert split.trained_counts[index] == trained.sum()
    for index, row in enumerate(evaluation.rows()):
        assert isinstance(row, Conversation)
        assert row.place == evaluation.place(index)
        assert f"Assistant: {row.turns[-1].content}</s>" in text_of(evaluation.example(index)[0])
    assert sorted(p.name for p in Path(dataset.path).iterdir()) == sorted(
        ["dataset.json", "evaluation.jsonl", "removed.jsonl", "sources.json"]
        + [f"{s}.{a}.npy" for s in ("train", "evaluation") for a in ("tokens", "trained", "offsets", "places")]
    )
    assert Dataset.load(Path(dataset.path)) == dataset
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_evaluation_rows_come_back_whole(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q", "name": "ann"},
        {"role": "assistant", "content": "", "weight": 0},
        {"role": "user", "content": "Q2"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "i", "function": {"name": "f", "arguments": {"x": [1]}}}],
            "reasoning": "R",
        },
        {"role": "tool", "content": "r", "tool_call_id": "i"},
        {"role": "assistant", "content": "A"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows(3))
    held = write_rows(tmp_path / "b.jsonl", [{"messages": messages, "tools": [{"name": "f"}]}])
    recipe = recipe_for(path, evaluation={"file": str(held)})
    dataset = prepared(tmp_path, recipe)
    from onlay.data.read import read_items

    ((_, item),) = read_items(str(held), "messages", recipe.data)
    assert list(open_split(dataset, "evaluation").rows()) == [item]
    assert open_split(dataset, "evaluation").place(0) == f"{held}:1"
    assert dataset.sources["evaluation_data"] == scan(str(held), recipe.data).digest


def test_a_missing_split_is_told(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, recipe_for(write_rows(tmp_path / "a.jsonl", rows(5)), evaluation={"split": None}))
    assert list(dataset.splits) == ["train"]
    assert not list(Path(dataset.path).glob("evaluation*"))
    with pytest.raises(OutputError, match="has no split evaluation"):
        open_split(dataset, "evaluation")
    (Path(dataset.path) / "train.tokens.npy").unlink()
    with pytest.raises(OutputError, match="does not exist"):
        open_split(dataset, "train")


# -------------------------------------------------------------------------------------------------------------- cache


def test_the_second_call_only_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(write_rows(tmp_path / "a.jsonl", rows(30)))
    first = prepared(tmp_path, recipe)
    monkeypatch.setattr("onlay.data.build._write", None)
    assert prepared(tmp_path, recipe) == first


def test_what_the_tokens_depend_on_makes_another_folder(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(30))
    folders = [
        prepared(tmp_path, recipe_for(path)).path,
        prepared(tmp_path, recipe_for(path, data={"template": "alpaca"})).path,
        prepared(tmp_path, recipe_for(path, data={"loss_on": "all"})).path,
        prepared(tmp_path, recipe_for(path, data={"max_tokens": 100})).path,
        prepared(tmp_path, recipe_for(path, data={"system": "S"})).path,
        prepared(tmp_path, recipe_for(path, training={"seed": 1})).path,
        prepared(tmp_path, recipe_for(path, evaluation={"split": 0.2})).path,
        prepared(tmp_path, recipe_for(path), tokenizer_digest="other").path,
        prepared(tmp_path, recipe_for(write_rows(path, rows(31)))).path,
    ]
    assert len(set(folders)) == len(folders)
    same = prepared(tmp_path, recipe_for(path, training={"learning_rate": 0.001}, adapter={"rank": 4}))
    assert same.path == folders[-1]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(5))
    with pytest.raises(DataError):
        prepared(tmp_path, recipe_for(path, data={"max_tokens": 8}))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SplitWriter, "add", full)
    with pytest.raises(OutputError, match="No space left on device"):
        prepared(tmp_path, recipe_for(write_rows(tmp_path / "a.jsonl", rows(5))))
    assert list((tmp_path / "cache").iterdir()) == []


def test_progress_counts_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "CHUNK_ROWS", 10)
    seen: list[tuple[int, int]] = []
    recipe = recipe_for(
        write_rows(tmp_path / "a.jsonl", rows(25)),
        evaluation={"file": str(write_rows(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}]))},
    )
    prepared(tmp_path, recipe, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 26), (20, 26), (25, 26), (26, 26)]


def test_chunks_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(write_rows(tmp_path / "a.jsonl", rows(25)))
    one = prepared(tmp_path / "one", recipe)
    monkeypatch.setattr(chosen, "CHUNK_ROWS", 3)
    two = prepared(tmp_path / "two", recipe)
    for name in ("train.tokens.npy", "train.offsets.npy", "evaluation.places.npy", "evaluation.jsonl"):
        assert (Path(one.path) / name).read_bytes() == (Path(two.path) / name).read_bytes()


# -------------------------------------------------------------------------------------------------------------- split


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    doubled = [{"prompt": f"Question {i % 20}", "completion": f"Answer {i}"} for i in range(100)]
    dataset = prepared(tmp_path, recipe_for(write_rows(tmp_path / "a.jsonl", doubled), evaluation={"split": 0.2}))
    sides = [
        {text_of(open_split(dataset, name).example(i)[0]).split("\n")[0] for i in range(dataset.splits[name].examples)}
        for name in dataset.splits
    ]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [16, 4]


def test_an_evaluation_file_is_used_whole(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(10))
    held = write_rows(tmp_path / "b.jsonl", [{"question": f"Other {i}", "answer": "A"} for i in range(4)])
    dataset = prepared(tmp_path, recipe_for(path, evaluation={"file": str(held)}))
    assert {name: split.rows for name, split in dataset.splits.items()} == {"train": 10, "evaluation": 4}


def test_an_evaluation_file_that_shares_prompts_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(10))
    held = write_rows(
        tmp_path / "b.jsonl",
        [*rows(2), {"prompt": "New", "completion": "A"}, {"prompt": "Question  9 ", "completion": "B"}],
    )
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, recipe_for(path, evaluation={"file": str(held)}))
    assert "3 of 4 evaluation rows" in caught.value.problem
    assert f"{held}:1, {held}:2, {held}:4" in caught.value.problem


# ----------------------------------------------------------------------------------------------------------- refusals


def test_no_evaluation_rows(tmp_path: Path) -> None:
    same = [{"prompt": "Q", "completion": f"A{i}"} for i in range(9)]
    with pytest.raises(DataError, match="9 rows with one prompt, so no rows are left for evaluation"):
        prepared(tmp_path, recipe_for(write_rows(tmp_path / "a.jsonl", same)))
    with pytest.raises(DataError, match="has 1 row, so no rows"):
        prepared(tmp_path, recipe_for(write_rows(tmp_path / "a.jsonl", same[:1])))
    assert (
        prepared(tmp_path, recipe_for(write_rows(tmp_path / "a.jsonl", same), evaluation={"split": None}))
        .splits["train"]
        .rows
        == 9
    )


def test_all_evaluation_rows_too_long(tmp_path: Path) -> None:
    held = write_rows(tmp_path / "b.jsonl", [{"prompt": "p" * 200, "completion": "c"}])
    recipe = recipe_for(
        write_rows(tmp_path / "a.jsonl", rows(5)), data={"max_tokens": 64}, evaluation={"file": str(held)}
    )
    with pytest.raises(DataError, match=r"No evaluation rows are left of 1 \(1 overlong_dropped"):
        prepared(tmp_path, recipe)


def test_nothing_to_train(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(9))
    with pytest.raises(DataError, match="no token would be trained"):
        prepared(tmp_path, recipe_for(path, data={"max_tokens": 10}))
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]
    path = write_rows(tmp_path / "b.jsonl", [{"messages": messages}] * 3)
    with pytest.raises(DataError, match="3 nothing_trained"):
        prepared(tmp_path, recipe_for(path, evaluation={"split": None}))


def test_no_end_token_to_train(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(9, answer="a" * 100))
    with pytest.raises(DataError, match="no end token would be trained"):
        prepared(tmp_path, recipe_for(path, data={"max_tokens": 64, "overlong": "cut"}))


def test_max_tokens(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "a.jsonl")
    assert [resolve_max_tokens(recipe, context) for context in (512, 4096, 32768, None)] == [512, 4096, 4096, 4096]
    recipe = recipe_for(tmp_path / "a.jsonl", data={"max_tokens": 600})
    assert resolve_max_tokens(recipe, 600) == resolve_max_tokens(recipe, None) == 600
    with pytest.raises(RecipeError, match=r"data.max_tokens = 600 is more than the base's context of 512"):
        resolve_max_tokens(recipe, 512)


# ------------------------------------------------------------------------------------------------------------- length


def lengthy(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "a.jsonl",
        [*rows(6), {"prompt": "Long", "completion": "b" * 100}, {"prompt": "p" * 100, "completion": "c"}],
    )


def test_overlong_rows_are_dropped_and_listed(tmp_path: Path) -> None:
    path = lengthy(tmp_path)
    dataset = prepared(tmp_path, recipe_for(path, data={"max_tokens": 64}, evaluation={"split": None}))
    assert dataset.splits["train"].model_dump(include={"rows", "examples"}) == {"rows": 6, "examples": 6}
    (finding,) = [one for one in dataset.findings if one.code in BUILD_NOTES]
    places = [f"{path}:7", f"{path}:8"]
    assert (finding.code, finding.count, [row.place for row in finding.rows]) == ("overlong_dropped", 2, places)
    assert removed(dataset) == [{"file": str(path), "row": number, "reason": "overlong_dropped"} for number in (7, 8)]
    assert "64 tokens" in finding.message


def test_overlong_rows_are_cut_and_counted(tmp_path: Path) -> None:
    dataset = prepared(
        tmp_path, recipe_for(lengthy(tmp_path), data={"max_tokens": 64, "overlong": "cut"}, evaluation={"split": None})
    )
    assert found(dataset) == {"overlong_cut": 2, "nothing_trained": 1}
    ids, trained = open_split(dataset, "train").example(6)
    assert len(ids) == 64
    assert set(text_of(ids[trained]).strip()) == {"b"}


def test_overlong_rows_may_be_an_error(tmp_path: Path) -> None:
    path = lengthy(tmp_path)
    with pytest.raises(DataError, match=rf"{path}:7: it has more tokens than data.max_tokens = 64"):
        prepared(tmp_path, recipe_for(path, data={"max_tokens": 64, "overlong": "error"}, evaluation={"split": None}))


def test_documents_are_split_and_no_token_is_lost(tmp_path: Path) -> None:
    texts = ["x" * n for n in (1, 6, 7, 13, 14, 15, 16, 100)]
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    dataset = prepared(
        tmp_path, recipe_for(path, data={"max_tokens": 8, "overlong": "error"}, evaluation={"split": None})
    )
    split = open_split(dataset, "train")
    assert split.lengths.max() == 8
    assert split.lengths.min() >= 2
    joined = text_of(np.concatenate([split.example(i)[0] for i in range(len(split))]))
    assert joined == "".join(f"<s>{text}</s>" for text in texts)
    assert all(
        trained[0] == np.False_ and trained[1:].all() for _, trained in (split.example(i) for i in range(len(split)))
    )
    assert [split.place(i) for i in range(3)] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert found(dataset)["documents_split"] == 6


@pytest.mark.parametrize("length", range(1, 40))
def test_pieces(length: int) -> None:
    ids = list(range(length))
    pieces = split_document(ids, 8)
    assert [token for piece in pieces for token in piece] == ids
    assert all(len(piece) <= 8 for piece in pieces)
    assert length == 1 or all(len(piece) >= 2 for piece in pieces)


def test_documents_of_the_evaluation_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"Text {i}"} for i in range(20)])
    dataset = prepared(tmp_path, recipe_for(path, evaluation={"split": 0.2}))
    assert dataset.format == "text"
    assert all(isinstance(row, Document) for row in open_split(dataset, "evaluation").rows())


def test_long_rows_are_tokenized_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "CHUNK_CHARACTERS", 100)
    row = Row("f", 1, {})
    rows = (chosen.Chosen(index=0, row=row, item=Document("x" * n)) if n else None for n in (30, 0, 30, 60, 500, 10))
    assert [(len(chunk), read) for chunk, read in chosen.chunks(rows)] == [(3, 4), (1, 1), (1, 1)]


def test_max_rows(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, recipe_for(write_rows(tmp_path / "a.jsonl", rows(50)), data={"max_rows": 20}))
    assert sum(split.rows for split in dataset.splits.values()) == 20


# ------------------------------------------------------------------------------------------------------------- general


def with_general(tmp_path: Path, *, train: int, general: list[dict[str, Any]], **data: Any) -> Recipe:
    train_path = write_rows(tmp_path / "a.jsonl", rows(train))
    fields = {"general": str(write_rows(tmp_path / "g.jsonl", general)), **data}
    return recipe_for(train_path, data=fields, evaluation={"split": None})


def missed(dataset: Dataset) -> list[tuple[int, str, str]]:
    return [(one.count, one.severity, one.message) for one in dataset.findings if one.code == "general_share_missed"]


def test_a_share_that_could_not_be_kept_is_told(tmp_path: Path) -> None:
    short = [{"prompt": f"General {i}", "completion": "Yes."} for i in range(20)]
    assert missed(prepared(tmp_path, with_general(tmp_path, train=95, general=short))) == []
    [(count, severity, message)] = missed(prepared(tmp_path, with_general(tmp_path, train=3, general=short)))
    assert (count, severity) == (1, "warning")
    assert message.endswith("make 25.0% of the training examples, not the 5.0% of data.general_share")
    long = [{"prompt": f"General {i}", "completion": "Yes. " * 400} for i in range(20)]
    [(count, _, message)] = missed(prepared(tmp_path, with_general(tmp_path, train=95, general=long)))
    assert (count, "make 0.0% of" in message) == (0, True), "rows that are too long are not mixed in"


def test_general_rows_alone_are_not_trained_on(tmp_path: Path) -> None:
    general = [{"prompt": f"G {i}", "completion": "Yes."} for i in range(5)]
    write_rows(tmp_path / "long.jsonl", rows(9, answer="long " * 99))
    recipe = recipe_for(
        tmp_path / "long.jsonl",
        data={"general": str(write_rows(tmp_path / "g.jsonl", general)), "max_tokens": 64},
        evaluation={"split": None},
    )
    with pytest.raises(DataError, match=r"no token would be trained .*9 overlong_dropped"):
        prepared(tmp_path, recipe)


# ------------------------------------------------------------------------------------------------------ shown, bounded


def test_coloured_shows_trained_text_and_reads_no_markup(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "[red]Q[/red] \x1b[31m", "completion": "[bold]A ü 👍"}])
    dataset = prepared(tmp_path, recipe_for(path, evaluation={"split": None}))
    text = coloured(ChatTemplate(tokenizer()), *open_split(dataset, "train").example(0))
    assert text.plain == "<s>User: [red]Q[/red] ␛[31m\nAssistant: [bold]A ü 👍</s>\n"
    assert [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)] == [
        " [bold]A ü 👍</s>"
    ]


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("w") as out:
        for i in range(20_000):
            out.write(json.dumps({"prompt": f"{i} " + "why? " * 4, "completion": "so. " * 5}) + "\n")
    recipe = recipe_for(path)
    template = ChatTemplate(tokenizer())
    material = read_material(recipe, audit=False)
    selection = select_rows(material, recipe)
    tracemalloc.start()
    dataset = prepare_dataset(
        recipe, material, selection, template, tokenizer_digest="t", context_tokens=512,
        cache_folder=tmp_path / "cache",
    )  # fmt: skip
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(split.tokens for split in dataset.splits.values())
    assert tokens > 1_000_000
    assert peak < 40_000_000, f"{peak} bytes for {tokens} tokens"


def test_real_rows(tmp_path: Path) -> None:
    folder = os.environ.get("ONLAY_TEST_DATA")
    if not folder:
        pytest.skip("ONLAY_TEST_DATA is not set: real rows are not prepared")
    real = AutoTokenizer.from_pretrained(Path(folder) / "models" / "stories260K" / "hf")
    recipe = recipe_for(Path(folder) / "gsm8k" / "train.jsonl", data={"max_rows": 720})
    dataset = prepared(tmp_path, recipe, tokenizer=real)
    assert 0.08 < found(dataset)["overlong_dropped"] / 720 < 0.2
    assert "boundary_merges" not in found(dataset)
    assert "masked_turns" not in found(dataset)
    split = open_split(dataset, "train")
    for index in range(0, len(split), 50):
        ids, trained = split.example(index)
        assert ids[0] == real.bos_token_id
        assert (ids == real.bos_token_id).sum() == 1
        assert ids[trained][-1] == real.eos_token_id
        assert real.decode(ids[trained]).strip().endswith("</s>")
