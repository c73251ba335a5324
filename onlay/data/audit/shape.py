"""The shape of a row that could be read: the order of its turns.

What the parser cannot read (missing, empty, wrong type, another format) it says itself, by the `code` of its DataError.
"""

from __future__ import annotations

from onlay.data.read import Conversation, Document


def order_problem(item: Conversation | Document) -> str | None:
    """What is wrong with the order of a conversation's turns, in words; None: nothing.

    Held against: 18 templates of released models, of which 16 refuse every one of these, and our own eight.  An order that
    all of them take, such as a user's last turn without an answer, is none of them.
    """
    if isinstance(item, Document):
        return None
    before, called = "", False
    for number, turn in enumerate(item.turns):
        role = turn.role
        if role == "system":
            if number:
                return "a system message that is not the first"
        elif role == "tool":
            if not called:
                return "a tool's result without a call before it"
        elif role == before:
            return f"two {role} turns in a row"
        elif role == "assistant" and before in ("", "system"):
            return "an assistant turn before any user turn"
        if role == "assistant":
            called = bool(turn.tool_calls)
        elif role == "user":
            called = False
        before = role
    return None
