from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from onlay.data.audit.catalogue import KINDS, RANK
from onlay.data.audit.page import MOST_GROUPS, MOST_ROWS, MOST_VALUES, page, tiles, write_page
from onlay.data.audit.plots import MOST_BARS, share
from onlay.errors import OutputError
from onlay.pages.frame import MOST_CHARACTERS
from onlay.records import Audit, AuditedFile, Distribution, Finding, Group, RowAt
from tests.pages.parsing import EVIL, Parsed, no_script_and_nothing_fetched, readable_without_eyes


def finding(code: str, count: int = 12, *, rows: int | None = None, **changes: Any) -> Finding:
    kind = KINDS[code]
    names = dict.fromkeys(re.findall(r"{(\w+)}", kind.message), "0.8")
    values = {
        "code": code, "severity": kind.severity, "count": count, "message": kind.message.format(**names), "remedy": kind.remedy,
        "rows": [RowAt(file="support.jsonl", row=7 * number + 1) for number in range(count if rows is None else rows)],
    }  # fmt: skip
    return Finding(**(values | changes))


def distribution(name: str, unit: str, values: list[float], *, bars: int = 20) -> Distribution:
    ordered, least, most = sorted(values), min(values), max(values)
    edges = (
        [least + (most - least) * number / bars for number in range(bars + 1)] if most > least else [least, least + 1]
    )
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[next((place for place, edge in enumerate(edges[1:]) if value < edge), len(counts) - 1)] += 1

    def at(share: float) -> float:
        return ordered[int(share * (len(ordered) - 1))]

    return Distribution(
        name=name, unit=unit, count=len(values), least=least, p05=at(0.05), median=at(0.5), mean=sum(values) / len(values),
        p95=at(0.95), most=most, edges=edges, counts=counts,
    )  # fmt: skip


def bare_audit(**changes: Any) -> Audit:
    """One clean row, nothing asked for."""
    one = AuditedFile(path="one.jsonl", digest="0" * 64, format="alpaca", rows=1, unreadable=0, role="train")
    return Audit(**({"files": [one], "rows": 1, "unreadable": 0, "findings": []} | changes))


def full_audit(**changes: Any) -> Audit:
    """Something of everything."""
    source = random.Random(3)
    rows = 1200
    prompts = [source.lognormvariate(5, 0.6) for _ in range(rows)]
    answers = [source.lognormvariate(5.6, 0.8) for _ in range(rows)]
    codes = [
        "missing_field", "secret_key", "leakage_exact", "duplicates_near", "duplicates_exact", "contradictory_answers",
        "personal_email", "repetition", "overlong_rows", "length_outliers", "personal_name", "little_trained",
    ]  # fmt: skip
    values: dict[str, Any] = {
        "files": [
            AuditedFile(path="data/support.jsonl", digest="a1" * 32, format="prompt_completion", rows=rows, unreadable=3, role="train"),
            AuditedFile(path="data/held_out.jsonl", digest="b2" * 32, format="prompt_completion", rows=150, unreadable=0, role="evaluation"),
        ],
        "rows": rows, "unreadable": 3, "base": "Qwen/Qwen3-8B", "tokens": 180_000, "trained_tokens": 111_000,
        "findings": sorted((finding(code, 3 + 5 * place) for place, code in enumerate(codes)), key=lambda one: (RANK[one.severity], -one.count)),
        "distributions": [
            distribution("prompt_characters", "characters", prompts),
            distribution("answer_characters", "characters", answers),
            distribution("row_tokens", "tokens", [(a + b) / 4 for a, b in zip(prompts, answers, strict=True)]),
            distribution("trained_share", "share", [b / (a + b) for a, b in zip(prompts, answers, strict=True)]),
            distribution("cluster_rows", "rows", [float(source.choice([2, 2, 2, 3, 5])) for _ in range(40)]),
            distribution("base_loss", "nats per token", [source.gauss(2, 0.4) for _ in range(200)]),
        ],
        "shares": {
            "domains": {"billing": 500, "shipping": 400, "returns": 250, "account": 50},
            "scripts": {"Latin": 1190, "Cyrillic": 10}, "personal_data": {"email": 38, "phone": 4},
            "openings": {"Thank you for": 120, "Sure, I can": 80},
        },
        "measures": {"domain_entropy_bits": 1.71, "near_threshold": 0.8},
        "groups": [
            Group(
                code="contradictory_answers", count=3, prompt="How long does a refund take?",
                rows=[RowAt(file="data/support.jsonl", row=row) for row in (17, 90, 411)],
                texts=["A refund takes five working days.", "A refund takes ten working days.", "We do not give refunds."],
            ),
            Group(
                code="duplicates_near", count=5, rows=[RowAt(file="data/support.jsonl", row=row) for row in (8, 9)],
                texts=["Write to anna.berg@example.org and ask her.", "Write to anna.berg@example.org, and ask him."],
            ),
        ],
        "seconds": 3.2,
    }  # fmt: skip
    return Audit(**(values | changes))


def parsed(audit: Audit) -> Parsed:
    return Parsed(page(audit))


def test_the_first_page_says_whether_and_how_much() -> None:
    found = parsed(full_audit())
    assert "Not ready 3 rows cannot be read. 3 errors must be corrected first." in found.text(found.find("header")[0])
    first = found.text(found.find("section")[0])
    for told in (
        "1,200",
        "150 evaluation rows",
        "0.2 %",
        "180,000",
        "61.7 % of them train",
        "Qwen/Qwen3-8B",
        "data/support.jsonl",
    ):
        assert told in first
    assert "41 rows repeat another" in first


def test_every_finding_has_severity_count_remedy_and_rows() -> None:
    audit = full_audit()
    found = parsed(audit)
    cards = found.find("article", class_="finding")
    assert len(cards) == len(audit.findings)
    for one, place in zip(audit.findings, cards, strict=True):
        text = found.text(place)
        assert f"{one.count:,} {one.message}" in text and one.code in text and one.remedy.replace("`", "") in text
        assert one.severity in str(found.elements[place][1]["class"])
        assert f"support.jsonl: {', '.join(str(row.row) for row in one.rows)}" in text
    assert [found.text(place).split()[1] for place in found.find("h3", class_="severity")] == [
        "Errors",
        "Warnings",
        "Notes",
    ]


def test_the_charts_are_all_there() -> None:
    found = parsed(full_audit())
    titles = [found.text(place) for place in found.find("title")][1:]
    for title in (
        "Findings by count", "Prompts, characters", "Answers, characters", "Rows, tokens", "Tokens that train, % of the row",
        "Rows in a cluster of duplicates, rows", "Loss of the base on the answers, nats per token", "Domains",
        "Scripts and languages", "Personal data and secrets, occurrences by type", "Training rows that are also elsewhere", "Tokens",
        "How answers begin",
    ):  # fmt: skip
        assert title in titles
    assert {"lengths", "duplicates", "masks", "base", "leakage", "groups", "made"} <= {
        found.elements[place][1].get("id") for place in found.find("section")
    }


def test_what_the_record_names_anew_is_shown_too() -> None:
    audit = full_audit(
        distributions=[distribution("turns", "turns", [1.0, 2.0, 4.0])],
        shares={"formats": {"alpaca": 2}, "severities": {"note": 1}},
    )
    text = parsed(audit).text()
    assert "Other numbers" in text and "Turns, turns" in text and "Formats" in text and "Severities" not in text


def test_groups_stand_side_by_side_with_their_differences() -> None:
    found = parsed(full_audit())
    groups = found.find("article", class_="example")
    first, second = (found.text(place) for place in groups)
    assert "How long does a refund take?" in first and "support.jsonl:411We do not give refunds." in first
    assert [found.text(place) for place in found.find("ins") if found.within(place, groups[0])] == ["ten"]
    assert [found.text(place) for place in found.find("del") if found.within(place, groups[0])] == ["five"]
    assert "5 rows" in second and "3 more of this group are not shown" in second


def test_names_in_backticks_are_code() -> None:
    found = parsed(full_audit(findings=[finding("refusals", remedy="Set `data.<b>`.")]))
    (card,) = found.find("article", class_="finding")
    assert "data.<b>" in [found.text(place) for place in found.find("code") if found.within(place, card)]


def test_a_table_stands_where_a_chart_cannot_tell_all() -> None:
    for values, tables in (({"a": 3, "b": 2}, 0), ({"a" * 40: 3, "b": 2}, 1), ({f"v{n}": 1 for n in range(40)}, 1)):
        found = parsed(bare_audit(shares={"domains": values}))
        assert len(found.find("details", class_="table")) == tables
        assert tables == 0 or all(value in found.text() for value in values)


def test_files_of_one_name_are_told_apart() -> None:
    rows = [RowAt(file="a/rows.jsonl", row=1), RowAt(file="b/rows.jsonl", row=2), RowAt(file="c/others.jsonl", row=3)]
    found = parsed(full_audit(groups=[Group(code="duplicates_near", count=3, rows=rows, texts=["x"] * 3)]))
    places = [found.text(place) for place in found.find("span", class_="who")]
    assert places == ["a/rows.jsonl:1", "b/rows.jsonl:2", "others.jsonl:3"]


def test_why_a_row_was_found_stands_with_the_finding() -> None:
    group = Group(
        code="missing_field",
        count=1,
        rows=[RowAt(file="a.jsonl", row=4)],
        texts=["a.jsonl:4, there is no `completion` in ann@example.org"],
    )
    found = parsed(full_audit(groups=[group]))
    cards = [found.text(place) for place in found.find("article", class_="finding")]
    assert ["a.jsonl:4 there is no `completion` in [EMAIL]" in card for card in cards].count(True) == 1
    assert "Side by side" not in found.text()


def test_a_single_text_of_leakage_stands_with_the_finding() -> None:
    row = [RowAt(file="a.jsonl", row=9)]
    groups = [Group(code=code, count=1, rows=row, texts=["13 words"]) for code in ("leakage_ngrams", "secret_key")]
    found = parsed(full_audit(groups=groups, findings=[finding("leakage_ngrams"), finding("secret_key")]))
    cards = [found.text(place) for place in found.find("article", class_="finding")]
    assert sum("a.jsonl:9 13 words" in card for card in cards) == 1 and found.find("article", class_="example") == []
    assert found.text().count("13 words") == 1


def test_personal_data_and_secrets_are_nowhere_on_the_page() -> None:
    secret, mail, key = "hunter2hunter2", "anna.berg@example.org", "AKIAIOSFODNN7EXAMPLZ"
    row = [RowAt(file="a.jsonl", row=1)]
    groups = [
        Group(code="personal_email", count=1, rows=row, texts=[f"only here: {secret}"], prompt=secret),
        Group(code="secret_key", count=1, rows=row, texts=[secret]),
        Group(
            code="duplicates_exact",
            count=2,
            rows=row * 2,
            texts=[f"ask {mail} now", f"ask {mail} and {key} now"],
            prompt=mail,
        ),
    ]
    found_domains = {mail: 4, "billing": 3}
    html = page(
        full_audit(
            groups=groups,
            shares={"domains": found_domains},
            findings=[finding("domain_imbalance", message=f"rows of the domain {mail}")],
        )
    )
    assert secret not in html and mail not in html and key not in html
    text = Parsed(html).text()
    assert (
        "ask [EMAIL] and [KEY] now" in text and "2 groups of rows with personal data or secrets are not shown" in text
    )


def test_nothing_from_outside_becomes_markup_and_nothing_is_fetched() -> None:
    one = AuditedFile(path=EVIL, digest=EVIL, format=EVIL, rows=1, unreadable=0, role="train")
    html = page(
        full_audit(
            files=[one, one], base=EVIL, measures={EVIL: 1.0}, sources={EVIL: EVIL}, shares={"domains": {EVIL: 3}, EVIL: {EVIL: 1}},
            distributions=[distribution(EVIL, EVIL, [1.0, 2.0])],
            findings=[finding("repetition", message=EVIL, remedy=EVIL, rows=0), finding("refusals", rows=0, message="x")],
            groups=[Group(code=EVIL, count=1, prompt=EVIL, rows=[RowAt(file=EVIL, row=1)] * 2, texts=[EVIL, EVIL + "x"])],
        )
    )  # fmt: skip
    no_script_and_nothing_fetched(html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert Parsed(html).text().count("<script>alert('x')</script>") > 12


def test_it_can_be_read_without_eyes() -> None:
    readable_without_eyes(parsed(full_audit()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Ready Nothing was found that stands against"),
        (
            {"findings": [finding("few_rows", 1, rows=0)]},
            "Look first Nothing stops training; 1 warning should be looked at.",
        ),
        ({"findings": [finding("rare_domains", 1)]}, "Ready"),
        ({"unreadable": 1}, "Not ready 1 row cannot be read."),
        ({"rows": 0, "unreadable": 2}, "Not ready 2 rows cannot be read. There is no row to train on."),
        ({"rows": 0, "files": []}, "Not ready There is no row to train on."),
        ({"findings": [finding("secret_key", 1)]}, "Not ready 1 error must be corrected first."),
    ],
)
def test_the_verdict_is_that_of_the_exit_code(changes: dict[str, Any], words: str) -> None:
    audit = bare_audit(**changes)
    told = parsed(audit).text()
    assert words in told
    assert ("Not ready" in told) == (not audit.ok or not audit.rows)


def test_an_audit_with_little_in_it() -> None:
    found = parsed(bare_audit())
    readable_without_eyes(found)
    assert found.find("svg") == [] and "Nothing was found." in found.text() and "Side by side" not in found.text()
    empty = parsed(bare_audit(rows=0, unreadable=1, files=[], tokens=0, trained_tokens=0, base="x"))
    assert "NaN" not in empty.text() and "no file" in empty.text()


def test_an_audit_with_much_in_it_stays_small_and_counts_what_it_leaves_out() -> None:
    codes = list(KINDS)[:40]
    groups = [
        Group(code=code, count=9, rows=[RowAt(file="a.jsonl", row=n) for n in range(3)], texts=[f"{code} {n} " + "word " * 20_000 for n in range(3)])
        for code in ("duplicates_near", "contradictory_answers") for _ in range(MOST_GROUPS + 8)
    ]  # fmt: skip
    audit = full_audit(
        findings=[finding(code, 500_000, rows=5_000) for code in codes],
        shares={"domains": {f"domain {number}": 1000 - number for number in range(MOST_VALUES + 200)}},
        groups=groups,
    )
    html = page(audit)
    found = Parsed(html)
    text = found.text()
    assert len(html) < 3_000_000
    assert len(found.find("article", class_="finding")) == 40 and f"The first {MOST_ROWS} of 500,000 rows" in text
    assert f"{MOST_VALUES + 200 - MOST_BARS} others together" in text and "200 rarer ones are in the record" in text
    assert text.count("8 more groups are in the record.") == 2
    assert len(found.find("article", class_="example")) == 2 * MOST_GROUPS
    assert re.search(r"more characters are in the data", text)
    length = len(groups[0].texts[0])
    assert f"… {length - MOST_CHARACTERS:,} more characters are in the data" in text


def test_the_same_record_gives_the_same_page(tmp_path: Path) -> None:
    path = write_page(full_audit(), tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == page(full_audit())


def test_characters_that_no_file_can_hold_do_not_stop_it(tmp_path: Path) -> None:
    group = Group(code="broken_encoding", count=1, prompt="a\x7f", rows=[RowAt(file="a", row=1)], texts=["\x00\x1b[2J"])
    path = write_page(bare_audit(groups=[group]), tmp_path / "report.html")
    assert "\x1b" not in path.read_text(encoding="utf-8")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html could not be written"):
        write_page(bare_audit(), tmp_path / "report.html")


def test_tiles_judge_only_what_can_be_judged() -> None:
    by_label = {tile.label: tile for tile in tiles(full_audit())}
    assert [tile.outcome for tile in by_label.values()] == ["none", "worse", "worse", "open", "none", "none"]
    assert "Tokens" not in {tile.label for tile in tiles(bare_audit())}


@pytest.mark.parametrize(
    ("part", "whole", "told"),
    [(0, 10, "0.0 %"), (1, 1_000_000, "< 0.1 %"), (999_999, 1_000_000, "> 99.9 %"), (10, 10, "100.0 %"), (3, 0, "–")],
)
def test_shares_never_round_to_nothing_or_all(part: int, whole: int, told: str) -> None:
    assert share(part, whole) == told
