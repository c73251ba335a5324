"""How an audit is shown in a terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from onlay.console.audit import TEXT_CHARACTERS, audit_view
from onlay.records import Audit, AuditedFile, Finding, Group, RowAt

IBAN = "GB82WEST12345698765432"


def shown(text: str) -> str:
    rows = [RowAt(file="a.jsonl", row=1), RowAt(file="a.jsonl", row=2)]
    finding = Finding(
        code="contradictory_exact", severity="warning", count=2, message="contradict each other", rows=rows
    )
    group = Group(code=finding.code, count=2, rows=rows, texts=["short", text], prompt="")
    file = AuditedFile(path="a.jsonl", role="train", format="prompt_completion", digest="0" * 64, rows=2, unreadable=0)
    audit = Audit(sources={"data 1": "0" * 64}, files=[file], rows=2, unreadable=0, findings=[finding], groups=[group], seconds=0.1)  # fmt: skip
    console = Console(width=10 * TEXT_CHARACTERS, record=True)
    with console.capture() as capture:
        console.print(audit_view(audit))
    return capture.get()


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("within", [4, 12, 20])
def test_no_part_of_an_identifier_is_left_where_a_text_is_cut(cut: int, within: int) -> None:
    # White space counts before it is taken together: the identifier stands across the cut, and is shown.
    spaces = " " * (cut * TEXT_CHARACTERS - within - 5)
    text = shown(f"Pay {spaces}{IBAN} now and then")
    assert IBAN[:4] not in text
    assert "Pay [IBAN] now" in text
