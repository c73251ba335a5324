"""Orders of turns: those that most released templates refuse are named, those that all take are not."""

from __future__ import annotations

import pytest

from onlay.data.audit.shape import order_problem
from onlay.data.read import Conversation, Document, ToolCall, Turn

U, A, S = Turn("user", "u"), Turn("assistant", "a"), Turn("system", "s")
T = Turn("tool", "t")
C = Turn("assistant", "", (ToolCall("f", {}),))


@pytest.mark.parametrize(
    "turns",
    [
        (U, A), (S, U, A), (U, A, U, A), (U, A, U), (U, C, T, A), (U, C, T, T, A), (S, U, C, T, C, T, A, U, A), (U,),
        (U, C, T, U, A),
    ],
)  # fmt: skip
def test_usual_orders_are_well(turns: tuple[Turn, ...]) -> None:
    assert order_problem(Conversation(turns)) is None


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ((U, S, A), "system message that is not the first"),
        ((S, S, U, A), "system message that is not the first"),
        ((U, U, A), "two user turns in a row"),
        ((U, A, A), "two assistant turns in a row"),
        ((A, U, A), "an assistant turn before any user turn"),
        ((S, A), "an assistant turn before any user turn"),
        ((U, T, A), "a tool's result without a call"),
        ((T, U, A), "a tool's result without a call"),
        ((U, C, T, A, T), "a tool's result without a call"),
        ((U, C, U, T), "a tool's result without a call"),
    ],
)
def test_others_are_named(turns: tuple[Turn, ...], problem: str) -> None:
    assert problem in (order_problem(Conversation(turns)) or "")


def test_a_document_has_no_order() -> None:
    assert order_problem(Document("text")) is None
