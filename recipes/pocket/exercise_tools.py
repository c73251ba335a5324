"""Exercises on tool calls: choosing the tool, filling its arguments from the request, answering from its result."""

from __future__ import annotations

import json
from dataclasses import dataclass

from exercise_facts import EMPTY_LABEL, answered, capital, compact, json_value, make_record, turns
from exercise_tables import REQUESTS, TOOL_NOUNS, TOOL_VERBS
from exercise_values import Dice


@dataclass(slots=True)
class Tool:
    name: str
    verb: str
    noun: str
    record: list[tuple[str, str, str, str]]

    @property
    def description(self) -> str:
        return f"{capital(self.verb)} {'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"

    def call(self) -> str:
        return compact(
            {"name": self.name, "arguments": {key: json_value(label, value) for label, key, value, _ in self.record}}
        )

    def schema(self) -> dict:
        properties = {
            key: {"type": "integer" if isinstance(json_value(label, value), int) else "string"}
            for label, key, value, _ in self.record
        }
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }

    def short_schema(self) -> dict:
        return {"name": self.name, "arguments": [key for _, key, _, _ in self.record]}

    def signature(self) -> str:
        return f"{self.name}({', '.join(key for _, key, _, _ in self.record)})"


def make_tool(dice: Dice, verb: str, noun: str) -> Tool:
    draw = dice.unit()
    if draw < 0.6:
        name = f"{verb}_{noun}"
    elif draw < 0.72:
        name = verb + capital(noun)
    elif draw < 0.84:
        name = f"{noun}.{verb}" if dice.chance(0.5) else f"{noun}_{verb}"
    else:
        name = f"{verb}_{dice.invented()}_{noun}" if dice.chance(0.5) else f"{dice.invented()}_{verb}_{noun}"
    return Tool(name, verb, noun, make_record(dice, dice.pick((1, 1, 2, 2, 3, 4))))


def make_tools(dice: Dice, count: int) -> list[Tool]:
    """Tools that share neither verb nor noun, so that the request names exactly one."""
    verbs, nouns = dice.sample(tuple(TOOL_VERBS), count), dice.sample(TOOL_NOUNS, count)
    return [make_tool(dice, verb, noun) for verb, noun in zip(verbs, nouns, strict=True)]


def request_text(dice: Dice, tool: Tool) -> str:
    """What a person would write: the wish, and the values in sentences or attached to the wish."""
    verb = dice.pick(TOOL_VERBS[tool.verb]) if dice.chance(0.35) else tool.verb
    wish = dice.pick(REQUESTS).replace("{v}", verb).replace("{V}", capital(verb)).replace("{n}", tool.noun)
    record = dice.shuffled(tool.record)
    draw = dice.unit()
    if draw < 0.25:
        details = ", ".join([f"{label} {value}" for label, _, value, _ in record])
        return f"{wish[:-1]}: {details}." if dice.chance(0.5) else f"{wish} {capital(details)}."
    if draw < 0.35:
        return f"{wish} " + ", ".join([f"{key}={value}" for _, key, value, _ in record])
    details = " ".join([said for _, _, _, said in record])
    text = f"{wish} {details}" if draw < 0.8 else f"{details} {wish}"
    return (
        text
        if dice.chance(0.8)
        else f"{dice.pick(('Hi.', 'Hello!', 'Good day.', 'Hey,', 'Dear team,', 'Morning!'))} {text}"
    )


def tool_call(dice: Dice) -> list[dict]:
    """A request answered with one call; the tools stand in the system turn as JSON, as signatures or in words."""
    tools = make_tools(dice, dice.pick((1, 1, 2, 2, 3, 4)))
    wanted = dice.pick(tools)
    return answered(turns(request_text(dice, wanted), system=tools_text(dice, tools)), wanted.call())


def tools_text(dice: Dice, tools: list[Tool]) -> str:
    opening = dice.pick(
        (
            EMPTY_LABEL, "You may call tools.\n", "You are a helpful assistant.\n", "Use a tool when it helps.\n",
            "Answer with a tool call.\n", f"You work for {dice.invented_title()}.\n", "Call one tool, as JSON.\n",
            "Reply with JSON only.\n", "You control the tools below.\n",
        )
    )
    draw = dice.unit()
    if draw < 0.3:
        return (
            opening
            + "Tools: "
            + compact([tool.schema() for tool in tools] if len(tools) < 3 else [tool.short_schema() for tool in tools])
        )
    if draw < 0.55:
        return opening + "Tools: " + compact([tool.short_schema() for tool in tools])
    if draw < 0.8:
        return (
            opening
            + dice.pick(("Tools:\n", "Functions:\n", "You can call:\n", "Available tools:\n"))
            + "\n".join([f"- {tool.signature()}" for tool in tools])
        )
    return opening + " ".join(
        [
            f"To {tool.verb} a {tool.noun}, call {tool.name} with {' and '.join(key for _, key, _, _ in tool.record)}."
            for tool in tools
        ]
    )


def tool_call_inline(dice: Dice) -> list[dict]:
    """No system turn: the user names the tool and its arguments."""
    tool = make_tools(dice, 1)[0]
    instruction = dice.pick(
        (
            "Call {t}.", "Use {t}.", "Write the JSON call of {t}.", "Tool: {t}", "Answer with a call to {t}.",
            "Function {t}:", "As a tool call, {t}:", "Make a JSON call to {t}.", "You have {t}.",
            "Reply by calling {t}.", "Turn this into {t}.",
        )
    ).replace("{t}", tool.signature())
    text = request_text(dice, tool)
    return turns(f"{instruction}\n{text}" if dice.chance(0.6) else f"{text}\n{instruction}", tool.call())


def tool_result(dice: Dice) -> list[dict]:
    """Request, call, result, answer: the answer is a value of the result, or the form that the system turn asks for."""
    tool = make_tools(dice, 1)[0]
    result = {key: (label, json_value(label, value)) for label, key, value, _ in make_record(dice, dice.between(1, 4))}
    key, (_, value) = dice.pick(tuple(result.items()))
    question = dice.pick(
        (
            "What is the {k}?", "Tell me the {k}.", "I want to know the {k}.", "Which {k} is it?",
            "Just the {k}, please.", "Then say the {k}.",
        )
    )
    system, answer = tools_text(dice, [tool]), str(value)
    if dice.chance(0.4):
        before = capital(dice.phrase())
        rule = dice.pick(("Begin every answer with", "Start what you tell the user with", "Open each reply with"))
        system, answer = f'{system}\n{rule} "{before}:"', f"{before}: {value}"
    messages = turns(
        f"{request_text(dice, tool)} {question.replace('{k}', key.replace('_', ' '))}", tool.call(), system=system
    )
    spaced = dice.chance(0.4)
    found = {name: entry for name, (_, entry) in result.items()}
    messages.append({"role": "tool", "content": json.dumps(found, ensure_ascii=False) if spaced else compact(found)})
    return answered(messages, answer)


def arguments_only(dice: Dice) -> list[dict]:
    """The arguments without the call, or only the name of the right tool."""
    tools = make_tools(dice, dice.between(2, 3))
    wanted = dice.pick(tools)
    listing = "; ".join(tool.signature() for tool in tools)
    text = request_text(dice, wanted)
    if dice.chance(0.6):
        question = dice.pick(
            (
                "Which tool fits?", "Name the right tool.", "Only the name of the tool:", "What would you call?",
                "Pick the tool.", "Choose one tool by name.",
            )
        )
        return turns(f"Tools: {listing}\n{text}\n{question}", wanted.name)
    question = dice.pick(
        (
            "Give the arguments of {t} as JSON.", "Only the arguments for {t}, in JSON.", "Arguments of {t}:",
            "Fill the arguments of {t}.",
        )
    )
    answer = compact({key: json_value(label, value) for label, key, value, _ in wanted.record})
    return turns(f"{text}\n{question.replace('{t}', wanted.signature())}", answer)
