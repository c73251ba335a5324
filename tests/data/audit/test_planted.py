"""Planted faults are found, and nothing else: recall and precision of every kind over rows that audit clean.

Exact kinds (shape, exact duplicates, leakage, checksummed identifiers) must reach 0.98 both ways, near-duplicates of a
true Jaccard similarity of at least 0.8 a recall of 0.95.  Kinds that read words are held to the figures of TEXT_KINDS; their
samples were written beside the rules, so these figures say that nothing broke, not how often the rules hit in the wild.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from onlay import stages
from onlay.data.audit.catalogue import KINDS
from onlay.data.audit.engine import AuditSource, Examined, Settings, examine
from onlay.recipe import DataSection
from onlay.records import Audit
from tests.data.audit import faults
from tests.data.audit import material as m

ROWS, EVERY = 600, 15
SHAPE_FORMATS = {
    **dict.fromkeys(("not_json", "not_text", "not_an_object", "missing_field", "empty_field", "wrong_type"), faults.FORMATS),
    **dict.fromkeys(("roles_order", "unknown_role"), ("messages", "sharegpt")),
    "mixed_formats": faults.FORMATS,
}  # fmt: skip
TEXT_KINDS = {
    "placeholder_answer": (1.0, 1.0),
    "broken_encoding": (1.0, 1.0),
    "repetition": (1.0, 1.0),
    "refusals": (1.0, 1.0),
    "language_mix": (0.98, 1.0),
    "other_language": (0.98, 1.0),
    "listed_terms": (1.0, 1.0),
}
"""Recall and precision that each must reach."""


def run(folder: Path, rows: list[faults.Line], *, terms: bool = False, **settings: object) -> Examined:
    path = faults.write(folder / "rows.jsonl", rows)
    listed = folder / "terms.txt"
    listed.write_text("\n".join(m.TERMS), encoding="utf-8")
    given = {"near_threshold": None, "terms": str(listed) if terms else None, **settings}
    return examine(
        [AuditSource(path=str(path), role="train")], DataSection(train=str(path)), settings=Settings(**given)
    )  # type: ignore[arg-type]


def named(examined: Examined, code: str) -> set[int]:
    return {number for source, number in examined.tally.rows(code) if source == 0}


def others(examined: Examined, *expected: str) -> set[str]:
    """Codes of errors and warnings besides the expected ones."""
    return {code for code, kind in KINDS.items() if kind.severity != "note" and examined.tally.count(code)} - set(
        expected
    )


@pytest.mark.parametrize("format", faults.FORMATS)
def test_clean_rows_give_nothing(tmp_path: Path, format: str) -> None:
    examined = run(tmp_path, faults.clean_rows(ROWS, format=format), terms=True)
    assert others(examined) == set()
    assert [file.rows for file in examined.files] == [ROWS] and examined.files[0].unreadable == 0
    assert examined.files[0].format == format


@pytest.mark.parametrize(
    ("code", "format"), [(code, format) for code, formats in SHAPE_FORMATS.items() for format in formats]
)
def test_rows_that_cannot_be_read_are_found(tmp_path: Path, code: str, format: str) -> None:
    if code == "mixed_formats" and format == "messages":
        pytest.skip("planted beside every other format: a row of messages among them is the same fault")
    rows = faults.clean_rows(ROWS, format=format)
    truth = faults.plant(rows, code, format=format, every=EVERY)
    examined = run(tmp_path, rows, privacy=False)
    recall, precision = faults.scores(named(examined, code), truth)
    assert (recall >= 0.98, precision >= 0.98) == (True, True), (recall, precision, truth ^ named(examined, code))
    assert others(examined, code) == set()
    lost = 0 if code == "roles_order" else len(truth)
    assert (examined.files[0].rows, examined.files[0].unreadable) == (ROWS - lost, lost)


@pytest.mark.parametrize("format", [*faults.PAIR_FORMATS, "text"])
@pytest.mark.parametrize("code", TEXT_KINDS)
def test_faults_of_text_are_found(tmp_path: Path, code: str, format: str) -> None:
    if format == "text" and code not in ("broken_encoding", "repetition", "other_language", "listed_terms"):
        pytest.skip("a document has no answer")
    rows = faults.clean_rows(ROWS, format=format)
    truth = faults.plant(rows, code, format=format, every=EVERY)
    examined = run(tmp_path, rows, terms=True, privacy=False)
    recall, precision = faults.scores(named(examined, code), truth)
    least_recall, least_precision = TEXT_KINDS[code]
    assert recall >= least_recall and precision >= least_precision, (recall, precision, truth ^ named(examined, code))
    assert others(examined, code) == set()


@pytest.mark.parametrize("format", faults.PAIR_FORMATS)
def test_boilerplate_openings_are_found(tmp_path: Path, format: str) -> None:
    rows = faults.clean_rows(ROWS, format=format)
    own = run(tmp_path, rows, privacy=False)
    truth = faults.plant(rows, "boilerplate_openings", format=format, every=EVERY)
    examined = run(tmp_path, rows, privacy=False)
    assert truth <= named(examined, "boilerplate_openings") <= truth | named(own, "boilerplate_openings")
    assert examined.shares["openings"]["great question, thank you"] == len(truth)


@pytest.mark.parametrize("format", ["alpaca", "sharegpt", "text"])
@pytest.mark.parametrize("code", faults.PERSONAL)
def test_identifiers_with_checksums_are_found(tmp_path: Path, code: str, format: str) -> None:
    rows = faults.clean_rows(ROWS, format=format)
    truth = faults.plant(rows, code, format=format, every=EVERY)
    examined = run(tmp_path, rows, texts=False)
    recall, precision = faults.scores(named(examined, code), truth)
    assert recall >= 0.98 and precision >= 0.98, (recall, precision, truth ^ named(examined, code))


# ---------------------------------------------------------------------------------------------- between rows, and masks


def audit(folder: Path, rows: list[faults.Line], *, against: list[faults.Line] | None = None, overrides: tuple[str, ...] = (), base: str | None = None) -> Audit:  # fmt: skip
    """Through the stage, every row named."""
    path = faults.write(folder / "rows.jsonl", rows)
    benchmarks = [str(faults.write(folder / "benchmark.jsonl", against))] if against is not None else []
    return stages.audit(str(path), against=benchmarks, overrides=overrides, base=base, shown=None)


def told(made: Audit, code: str) -> set[int]:
    return {
        at.row
        for finding in made.findings
        if finding.code == code
        for at in finding.rows
        if at.file.endswith("rows.jsonl")
    }


def problems(made: Audit) -> set[str]:
    return {finding.code for finding in made.findings if finding.severity != "note"}


def held_to(found: set[int], truth: set[int], *, recall: float = 0.98, precision: float = 0.98) -> None:
    reached = faults.scores(found, truth)
    assert reached[0] >= recall and reached[1] >= precision, (reached, "missed", truth - found, "wrong", found - truth)


@pytest.mark.parametrize("format", faults.FORMATS)
def test_clean_rows_pass_the_whole_audit(tmp_path: Path, format: str) -> None:
    held_out = faults.write(tmp_path / "held_out.jsonl", faults.clean_rows(100, format=format, seed=1))
    made = audit(tmp_path, faults.clean_rows(ROWS, format=format), against=faults.clean_rows(100, format=format, seed=2), overrides=(f"evaluation.file={held_out}",))  # fmt: skip
    assert problems(made) == set() and made.ok
    assert (made.rows, made.unreadable) == (ROWS, 0)


@pytest.mark.parametrize("format", faults.FORMATS)
def test_exact_duplicates_are_found(tmp_path: Path, format: str) -> None:
    rows = faults.clean_rows(ROWS, format=format)
    truth = faults.plant(rows, "duplicates_exact", format=format, every=EVERY)
    made = audit(tmp_path, rows)
    held_to(told(made, "duplicates_exact"), truth)
    # A classification's copy may stand beside the row with its own label, which differs.
    assert problems(made) == {"duplicates_exact"}


@pytest.mark.parametrize("format", [*faults.PAIR_FORMATS, "text"])
def test_near_duplicates_are_found(tmp_path: Path, format: str) -> None:
    rows = faults.clean_rows(ROWS, format=format)
    clean = list(rows)
    planted = faults.plant(rows, "duplicates_near", format=format, every=5)
    nearest = {}
    for number in planted:
        before = clean[max(0, number - 5) : number - 1]
        nearest[number] = max(faults.jaccard(rows[number - 1], other) for other in before)  # type: ignore[arg-type]
    truth = {number for number, similarity in nearest.items() if similarity >= 0.8}
    assert 20 < len(truth) < len(planted) - 20  # Both sides of the threshold are planted.
    made = audit(tmp_path, rows)
    held_to(told(made, "duplicates_near"), truth, recall=0.95)


@pytest.mark.parametrize("format", faults.PAIR_FORMATS)
def test_contradictions_are_found(tmp_path: Path, format: str) -> None:
    rows = faults.clean_rows(ROWS, format=format)
    truth = faults.plant(rows, "contradictory_answers", format=format, every=EVERY)
    made = audit(tmp_path, rows)
    held_to(told(made, "contradictory_answers"), truth)
    groups = [group for group in made.groups if group.code == "contradictory_answers"]
    assert groups and all(len(group.rows) == 2 and group.texts[0] != group.texts[1] for group in groups)
    assert problems(made) == {"contradictory_answers"}


@pytest.mark.parametrize("format", faults.PAIR_FORMATS)
@pytest.mark.parametrize("tier", ["exact", "near", "ngrams"])
@pytest.mark.parametrize("prefix", ["leakage", "benchmark"])
def test_leaks_are_found(tmp_path: Path, prefix: str, tier: str, format: str) -> None:
    rows = faults.clean_rows(ROWS, format=format)
    others = faults.clean_rows(100, format=format, seed=1)
    planted = faults.leak(rows, others, tier=tier, every=EVERY)
    truth = planted
    if tier == "near":
        similar = {number: faults.jaccard(rows[number - 1], others[(number - 1) % 100]) for number in planted}  # type: ignore[arg-type]
        prompts = {
            number: faults.jaccard(rows[number - 1], others[(number - 1) % 100], answers=False) for number in planted
        }  # type: ignore[arg-type]
        truth = {number for number in planted if max(similar[number], prompts[number]) >= 0.8}
        assert len(truth) >= 10
    if prefix == "leakage":
        made = audit(
            tmp_path, rows, overrides=(f"evaluation.file={faults.write(tmp_path / 'held_out.jsonl', others)}",)
        )
    else:
        made = audit(tmp_path, rows, against=others)
    held_to(told(made, f"{prefix}_{tier}"), truth, recall=0.95 if tier == "near" else 0.98)
    found = {code for code in problems(made) if code.startswith(prefix)}
    assert found <= {f"{prefix}_{tier}", f"{prefix}_ngrams"}
    assert made.ok is (tier != "exact")


@pytest.mark.parametrize("code", faults.MASKS)
def test_faults_of_masks_are_found(tmp_path: Path, code: str) -> None:
    rows = faults.clean_rows(ROWS, format="messages")
    truth = faults.plant(rows, code, format="messages", every=EVERY)
    overrides = ["data.max_tokens=1024", "data.overlong=cut"]
    if code == "end_not_trained":
        template = tmp_path / "ends_once.jinja"
        template.write_text(faults.ENDS_ONCE)
        overrides.append(f"data.template={template}")
    made = audit(tmp_path, rows, base="pocket", overrides=tuple(overrides))
    held_to(told(made, code), truth)
    assert problems(made) == ({code, "overlong_rows"} if code == "no_trained_tokens" else {code})
    assert made.base is not None and made.tokens


def test_rows_that_pass_the_masks(tmp_path: Path) -> None:
    made = audit(
        tmp_path, faults.clean_rows(ROWS, format="messages"), base="pocket", overrides=("data.max_tokens=1024",)
    )
    assert problems(made) == set()
