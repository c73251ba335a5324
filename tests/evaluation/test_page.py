from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from onlay.errors import OutputError
from onlay.evaluation.compare import verdict
from onlay.evaluation.likelihood import NATS
from onlay.evaluation.page import MOST_EXAMPLES, page, tiles, write_page
from onlay.evaluation.scores import SCORES
from onlay.evaluation.units import outcome, unit_of
from onlay.pages.frame import MOST_CHARACTERS
from onlay.records import Report
from tests.evaluation.reports import answer_row, bare_report, comparison, full_report, metrics
from tests.pages.parsing import EVIL, Parsed, no_script_and_nothing_fetched, readable_without_eyes


def parsed(report: Report, *, answers: Any = (), events: Any = ()) -> Parsed:
    return Parsed(page(report, answers=list(answers), metrics=list(events)))


def a_row_of_each_kind() -> list[dict[str, Any]]:
    wrong, right = "No.", "Open the settings and press Reset."
    kinds = [(wrong, right), (right, wrong), (wrong, wrong), (right, right)]
    return [
        answer_row(
            number,
            answers={"base": base, "adapter": ours},
            scores={"base": {"exact_match": float(base == right)}, "adapter": {"exact_match": float(ours == right)}},
        )
        for number, (base, ours) in enumerate(kinds)
    ]


def test_the_first_page_says_whether_why_against_what_and_at_what_risk() -> None:
    report = full_report()
    found = parsed(report, answers=a_row_of_each_kind(), events=metrics())
    first = found.text(found.find("section")[0])
    assert "Do not ship 2 of 4 gates are not passed." in found.text(found.find("header")[0])
    for told in [*report.reasons, *report.risks, *report.systems, *report.systems.values(), report.data]:
        assert told in first
    for gate in report.gates:
        assert gate.reason in first
    assert "300 rows" in first and first.count("✓ passed") == 2 and first.count("✕ failed") == 2
    assert "not measured" in first  # the latency gate


def test_what_follows_is_all_there() -> None:
    report = full_report()
    found = parsed(report, answers=a_row_of_each_kind(), events=metrics())
    assert [found.elements[place][1].get("id") for place in found.find("section")][1:] == [
        "scores", "judged", "forgetting", "safety", "likelihood", "training", "causes", "examples", "made",
    ]  # fmt: skip
    text = found.text()
    for one in [*report.comparisons, *report.forgetting, *report.safety]:
        assert one.verdict in text
    for likelihood in report.likelihood:
        assert f"{likelihood.nats_per_token:.4f}" in text
    for told in [
        *report.likely_causes,
        *report.sources.values(),
        *report.environment.values(),
        report.digest,
        report.data_digest,
    ]:
        assert told in text
    assert "bleu 3.1 points" in text
    assert len(found.find("svg")) == 5


def test_how_many_answers_are_concerned_is_no_cause() -> None:
    found = parsed(full_report())
    numbered = [found.text(place) for place in found.find("ol")]
    assert len(numbered) == 1 and numbered[0].startswith("Too many epochs")
    assert "6% of the answers end in a loop" in found.text()


def test_a_report_with_almost_nothing() -> None:
    found = parsed(bare_report())
    text = found.text()
    assert "Not decided" in text and "The recipe has no gates" in text and "Exact match" not in text
    assert "One system answered" in text and text.count("not measured") == 2
    assert len(found.find("svg")) == 1 and found.find("article") == []
    nothing = parsed(bare_report(scores={}))
    assert nothing.find("svg") == [] and nothing.text().count("not measured") == 3


@pytest.mark.parametrize(
    ("passed", "told"),
    [
        ([True], "The gate is passed."),
        ([True, True], "All 2 gates"),
        ([True, False], "1 of 2 gates is not"),
        ([False], "The gate is not passed."),
    ],
)
def test_gates_in_a_sentence(passed: list[bool], told: str) -> None:
    gates = [full_report().gates[0].model_copy(update={"passed": one}) for one in passed]
    verdict = "ship" if all(passed) else "do not ship"
    assert told in parsed(bare_report(gates=gates, verdict=verdict)).text()


def test_nothing_from_outside_becomes_markup_and_nothing_is_fetched() -> None:
    names = {f"base{EVIL}": EVIL, f"adapter{EVIL}": EVIL}
    base, ours = names
    one = comparison(f"score{EVIL}", against=base, system=ours, verdict=EVIL)
    report = full_report(
        system=ours, systems=names, data=EVIL, base=EVIL, reasons=[EVIL], risks=[EVIL], likely_causes=[EVIL],
        comparisons=[one], forgetting=[one], safety=[one], environment={EVIL: EVIL, "command": EVIL}, path=EVIL,
        scores={base: {one.score: 0.2}, ours: {one.score: 0.3}}, smallest_difference={one.score: 0.1}, sources={EVIL: EVIL},
        gates=[full_report().gates[0].model_copy(update={"name": EVIL, "reason": EVIL})],
        judged=[full_report().judged[0].model_copy(update={"judge": EVIL, "system": ours, "against": base})],
        likelihood=[full_report().likelihood[0].model_copy(update={"text": EVIL, "system": ours})],
    )  # fmt: skip
    row = answer_row(
        0,
        place=EVIL,
        prompt=[{"role": EVIL, "content": EVIL}, {"role": "assistant", "content": None, "tool_calls": [{"name": EVIL}]}]
        * 2,
        expected=f"{EVIL} one two",
        answers={base: f"{EVIL} three", ours: EVIL * 40},
        scores={base: {one.score: 0.0}, ours: {one.score: 1.0}},
    )
    recovery = {"event": "recovery", "step": 3, "reason": EVIL, "detail": EVIL, "action": EVIL}
    html = page(report, answers=[row], metrics=[*metrics(9), recovery])
    found = Parsed(html)
    # The text is there, as text.
    assert found.text().count("<script>alert('x')</script>") > 30
    no_script_and_nothing_fetched(html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}


def test_it_can_be_read_without_eyes_or_colours() -> None:
    found = parsed(full_report(), answers=a_row_of_each_kind(), events=metrics())
    readable_without_eyes(found)


def test_examples_show_every_answer_with_its_differences() -> None:
    row = answer_row(
        0, expected="press the red button", answers={"base": "push a lever", "adapter": "press the blue button"}
    )
    found = parsed(full_report(), answers=[row])
    (article,) = found.find("article")
    assert [found.text(place) for place in found.find("ins") if found.within(place, article)] == ["blue"]
    assert [found.text(place) for place in found.find("del") if found.within(place, article)] == ["red"]
    text = found.text(article)
    assert "Question 0?" in text and "push a lever" in text and "exact match 1" in text and "support.jsonl:1" in text


def test_examples_are_filtered_by_kind_and_the_rest_is_counted() -> None:
    rows = [dict(row, row=4 * turn + row["row"]) for turn in range(30) for row in a_row_of_each_kind()]
    html = page(full_report(), answers=rows, metrics=[])
    found = Parsed(html)
    assert len(found.find("article")) == MOST_EXAMPLES
    for kind in ("fixed", "broken", "neither"):
        assert len(found.find("article", class_=kind)) == 20
        assert f".filter:has(#kind-{kind}:checked) .example:not(.{kind})" in html
    assert (
        "fixed 20 of 30" in found.text()
        and "30 both right not shown" in found.text()
        and "all 60 of 120" in found.text()
    )
    assert html == page(full_report(), answers=rows, metrics=[])


def test_long_texts_fold_and_very_long_ones_are_cut_and_counted() -> None:
    row = answer_row(0, answers={"base": "word " * 200, "adapter": "x" * (MOST_CHARACTERS + 5)})
    found = parsed(full_report(), answers=[row])
    folded = found.find("details", class_="long")
    assert len(folded) == 2
    assert "(1,000 characters)" in found.text(folded[0]) and "5 more characters are in answers.jsonl" in found.text(
        folded[1]
    )


def test_an_empty_answer_and_white_space_are_named() -> None:
    row = answer_row(0, expected="a b", answers={"base": " ", "adapter": "a\n\nb"})
    text = parsed(full_report(), answers=[row]).text()
    assert "empty answer" in text and "differs from the expected answer in white space alone" in text


def test_characters_that_no_file_can_hold_do_not_stop_it(tmp_path: Path) -> None:
    row = answer_row(0, expected="\ud800", answers={"base": "\x00\x1b[2J", "adapter": "ok"})
    path = write_page(full_report(), folder=tmp_path / "new", answers=[row], metrics=[])
    assert path == tmp_path / "new" / "report.html"
    assert "\x1b" not in path.read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html could not be written"):
        write_page(bare_report(), folder=tmp_path, answers=[], metrics=[])


def test_a_judge_that_was_asked_once_has_no_consistency() -> None:
    one = full_report().judged[0].model_copy(update={"consistency": None, "first_slot_wins": None})
    text = parsed(full_report(judged=[one])).text()
    assert "not asked–" in text


def test_many_systems() -> None:
    names = [f"adapter-{number}" for number in range(24)]
    report = full_report(
        systems=dict.fromkeys(names, "x"), scores={name: {"exact_match": 0.5} for name in names}, system=names[0],
        comparisons=[comparison(against=name, system=names[0]) for name in names[1:]],
    )  # fmt: skip
    found = parsed(report)
    assert len(found.find("g", class_="bar")) >= 24 and len(found.find("g", class_="better")) >= 23


def test_tiles_name_the_worst_and_say_what_is_missing() -> None:
    by_label = {tile.label: tile for tile in tiles(full_report())}
    assert by_label["exact match against base"].number == "+12.4 points"
    assert by_label["Forgetting: nats per token"].outcome == "worse"
    assert by_label["Detectable"].number == "5.1 points"
    assert "any true difference this large or larger shows in 300 rows" in by_label["Detectable"].told
    assert "Detectable" not in {tile.label for tile in tiles(full_report(smallest_difference={}))}
    # None is worse: the one that is nearest to it.
    assert by_label["Safety: refused harmful"].outcome == "same"


def test_units() -> None:
    share, bleu, nats = (
        unit_of("exact_match", [0.5, 1.0, None]),
        unit_of("bleu", [0.5]),
        unit_of("nats_per_token", [0.5]),
    )
    assert (share.value(0.713), share.number(-0.0284), share.difference(0.1)) == ("71.3 %", "−2.8", "+10.0 points")
    assert (share.number(-0.0001), share.value(None)) == ("0.0", "–")
    assert (bleu.value(31.23), nats.difference(0.0212)) == ("31.2", "+0.021 nats")
    assert unit_of("word_perplexity", [12.5]).value(1234.5) == "1,234.500"


def test_units_and_outcomes_are_those_of_the_scores_and_of_the_verdicts() -> None:
    for score in [*SCORES.values(), NATS]:
        values = [0.5] if score.unit == "share" else [31.2]
        assert unit_of(score.name, values).factor == (100.0 if score.unit == "share" else 1.0)
        for difference, p_value in ((0.2, 0.01), (-0.2, 0.01), (0.2, 0.05), (0.0, 0.01)):
            told = verdict(score, difference, low=difference - 0.1, high=difference + 0.1, p_value=p_value)
            one = comparison(
                score.name, difference=difference, p_value=p_value, higher_is_better=score.higher_is_better
            )
            assert told.startswith({"same": "no difference"}.get(outcome(one), outcome(one)))
