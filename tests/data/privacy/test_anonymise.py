from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest

from onlay.data.privacy.anonymise import Anonymiser, restore_item, texts_of
from onlay.data.privacy.key import Key
from onlay.data.privacy.pseudonyms import Vault
from onlay.data.privacy.spans import KINDS
from onlay.data.read import Conversation, Document, ToolCall, Turn
from onlay.errors import DataError, SetupError

KEY, OTHER = Key(bytes(range(32))), Key(bytes(32))
ITEM = Conversation(
    turns=(
        Turn("system", "You help customers."),
        Turn("user", "My name is Sara Schwarz, mail Sara@Example.org or sara@example.org.", name="Sara Schwarz"),
        Turn(
            "assistant", "Thanks, Sara!", (ToolCall("send_mail", {"to": ["sara@example.org"], "cc": {"phone": "202-555-0143"}, "n": 3}, "1"),),
            reasoning="Call (202) 555-0143 first.",
        ),
        Turn("tool", '{"sent_to": "sara@example.org"}', name="send_mail", tool_call_id="1"),
        Turn("assistant", "Done, Ms. Schwarz."),
    ),
    tools=({"type": "function", "function": {"name": "send_mail", "description": "Sends mail, as from boss@example.org"}},),
    place="support.jsonl:3",
)  # fmt: skip


def pseudonymiser(key: Key = KEY) -> Anonymiser:
    return Anonymiser("pseudonyms", key=key)


def test_every_text_is_replaced_and_nothing_else() -> None:
    anonymiser = pseudonymiser()
    made = anonymiser.anonymise(ITEM)
    assert isinstance(made, Conversation)
    whole = " ".join(texts_of(made))
    for value in ("sara", "schwarz", "example.org", "555"):
        assert value not in whole.lower()
    assert made.place == ITEM.place and made.turns[0] == ITEM.turns[0]
    assert (
        made.turns[2].tool_calls[0].name == made.turns[3].name == "send_mail"
        and made.turns[2].tool_calls[0].arguments["n"] == 3
    )
    assert anonymiser.remaining(made) == [] and anonymiser.remaining(ITEM)
    assert anonymiser.counts == {"name": 4, "email": 5, "phone": 2}


def test_one_person_is_one_token_wherever_and_however_written() -> None:
    made = pseudonymiser().anonymise(ITEM)
    assert isinstance(made, Conversation)
    person = made.turns[1].name
    assert person and person.startswith("<PERSON_") and "." not in person
    assert person in made.turns[1].content
    for turn in (made.turns[2], made.turns[4]):  # "Sara" and "Schwarz" alone.
        assert person[:-1] + "." in turn.content
    mail = made.turns[2].tool_calls[0].arguments["to"][0]
    assert mail in made.turns[1].content and mail[:-1] + "." in made.turns[1].content and mail in made.turns[3].content


def test_two_persons_of_one_first_name_are_not_joined() -> None:
    made = pseudonymiser().anonymise(Document("Sara Schwarz met Sara Weiss. Sara left."))
    assert isinstance(made, Document)
    first, second, third = made.text.split("<PERSON_")[1:]
    assert len({first[:10], second[:10], third[:10]}) == 3


def test_the_round_trip_is_exact_and_needs_the_key(tmp_path: Path) -> None:
    anonymiser = pseudonymiser()
    made = anonymiser.anonymise(ITEM)
    assert anonymiser.pseudonyms
    vault = Vault(tmp_path / "a.vault", key=KEY)
    vault.add(anonymiser.pseudonyms)
    assert restore_item(made, vault) == ITEM
    with pytest.raises(SetupError):
        restore_item(made, Vault(tmp_path / "a.vault", key=OTHER))


def test_two_files_share_pseudonyms_under_one_key_and_no_other() -> None:
    first = pseudonymiser().anonymise(Document("Sara Schwarz called."))
    second = pseudonymiser().anonymise(Document("We wrote to Sara Schwarz."))
    assert isinstance(first, Document) and isinstance(second, Document)
    assert first.text.split(" ")[0] == second.text.split(" ")[-1][:-1]
    assert pseudonymiser(OTHER).anonymise(Document("Sara Schwarz called.")) != first
    assert pseudonymiser().digest == pseudonymiser().digest != pseudonymiser(OTHER).digest


def test_redaction() -> None:
    anonymiser = Anonymiser("redact")
    made = anonymiser.anonymise(Document("Maria Qorvin, a@b.org, https://u:pa55w0rd@h.org/x and https://h.org"))
    assert made == Document("[PERSON], [EMAIL], [URL_CREDENTIALS] and https://h.org")
    assert anonymiser.remaining(made) == [] and anonymiser.anonymise(made) is made


def test_what_stands_in_keys_and_names_of_functions_is_told() -> None:
    item = Conversation((Turn("assistant", "", (ToolCall("f", {"a@example.org": "yes"}),)),))
    anonymiser = pseudonymiser()
    made = anonymiser.anonymise(item)
    assert made == item and [span.text for span in anonymiser.remaining(made)] == ["a@example.org"]


def test_only_some_kinds() -> None:
    anonymiser = Anonymiser("redact", kinds=frozenset({"email"}))
    assert anonymiser.anonymise(Document("Maria Qorvin, a@b.org")) == Document("Maria Qorvin, [EMAIL]")
    assert Anonymiser("redact", kinds=frozenset({"email"})).digest != Anonymiser("redact").digest


def test_wrong_settings() -> None:
    with pytest.raises(DataError, match=r"data\.anonymise = 'hide' is not known"):
        Anonymiser("hide")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="mail is no kind"):
        Anonymiser("redact", kinds=frozenset({"mail"}))
    with pytest.raises(SetupError, match="need a key"):
        Anonymiser("pseudonyms")


def test_workers_bring_back_what_they_replaced() -> None:
    here, whole = pseudonymiser(), pseudonymiser()
    made = []
    for text in ("Sara Schwarz called.", "Maria Qorvin, a@b.org"):
        worker = pickle.loads(pickle.dumps(pseudonymiser()))
        made.append(worker.anonymise(Document(text)))
        here.merge(*worker.taken())
        assert worker.taken() == ({}, {})
    assert made == [whole.anonymise(Document(text)) for text in ("Sara Schwarz called.", "Maria Qorvin, a@b.org")]
    assert here.pseudonyms and whole.pseudonyms
    assert (here.counts, here.pseudonyms.texts) == (whole.counts, whole.pseudonyms.texts)


def random_texts(count: int) -> list[str]:
    draw = random.Random(7)
    pieces = ["Maria ", "Dr. Qorvin", "+49 151 2345678", "4111 1111 1111 1111", "a@b.org", "A@B.org", "https://u:x9y8z7@h.io ", "12 Main Street", "é😀", "\n", "1.2.3.4",
              "password: aB3dE6gH9", "GB82WEST12345698765432", "123-45-6789", "<PERSON_", "[EMAIL]", "<", ">", ", ", " and ", ".", "x", "<EMAIL_abcdefghij>",
              "sara schwarz", "Sara Schwarz", "Sara", "SARA SCHWARZ", "7", "-", "\ufdd0"]  # fmt: skip
    return ["".join(draw.choices(pieces, k=draw.randint(1, 18))) for _ in range(count)]


def test_whatever_the_text_nothing_remains_again_changes_nothing_and_it_can_be_restored(tmp_path: Path) -> None:
    anonymiser = Anonymiser("pseudonyms", key=KEY, kinds=frozenset(KINDS))
    redactor = Anonymiser("redact")
    items = [Document(text) for text in random_texts(600)]
    made = [anonymiser.anonymise(item) for item in items]
    assert anonymiser.pseudonyms
    vault = Vault(tmp_path / "a.vault", key=KEY)
    vault.add(anonymiser.pseudonyms)
    for number, (item, one) in enumerate(zip(items, made, strict=True)):
        assert anonymiser.remaining(one) == [] and anonymiser.anonymise(one) == one
        redacted = redactor.anonymise(item)
        assert redactor.remaining(redacted) == [] and redactor.anonymise(redacted) == redacted
        if number < 150:  # Each opens the vault anew.
            assert restore_item(one, vault) == item


def test_real_rows_are_restored_exactly(data_folder: Path, tmp_path: Path) -> None:
    path = data_folder / "pii_presidio" / "generated_small.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    items = [Document(row["full_text"]) for row in json.loads(path.read_text(encoding="utf-8"))]
    anonymiser = pseudonymiser()
    made = [anonymiser.anonymise(item) for item in items]
    assert sum(one != item for one, item in zip(made, items, strict=True)) > 50
    assert anonymiser.pseudonyms
    vault = Vault(tmp_path / "a.vault", key=KEY)
    vault.add(anonymiser.pseudonyms)
    assert [restore_item(one, vault) for one in made] == items
    assert all(anonymiser.remaining(one) == [] for one in made)
