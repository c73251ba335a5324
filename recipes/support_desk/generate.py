"""Writes the example data set: the support desk of Thrumlow, which makes the Veskarrow, a weather mast for roofs.

    python recipes/support_desk/generate.py --out onlay/examples/support.jsonl [--tokenizer FOLDER]

Neither the company nor the product exists.  A row is {"messages": [...], "kind": ...}; the three kinds are

* answer: the prompt holds some facts and a question; the value that was asked for is put into the house's phrasing
* refusal: the facts do not hold it; the house says so, always in the same words
* tool_call: a wish without facts; the answer is a call of a house tool, as JSON without spaces

The prompt never shows the house's phrasing or its tools, so a model that has not learnt them scores nothing, while
every answer is a function of its prompt, so that exact match is fair.  No two prompts are the same, and values are
drawn at random: a held-out row asks for values that training has not seen.  E-mail addresses and telephone numbers are
in the ranges set aside for fiction.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# The values are of the kinds that the base model has learnt to copy, so they come from the same functions.
sys.path.append(str(Path(__file__).resolve().parents[1] / "pocket"))
from exercise_values import Dice

GREETING = "Thrumlow desk."
SIGN_OFF = "Clear skies!"
REFUSAL = "That is not in our logbook; a keeper will find out."
KIND_SHARES = {"answer": 0.45, "refusal": 0.10, "tool_call": 0.45}
MAX_PROMPT_CHARS = 260
MAX_ROW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Topic:
    kind: str
    house: str
    facts: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    arguments: dict[str, str]
    """Argument name -> kind of value; {argument} in a request is replaced by the value."""
    requests: tuple[str, ...]


def lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


TOPICS = (
    Topic("clock", "Our shutters go up at {v}.", lines("""
        Opening time: {v}
        The shop opens at {v}
        We open at {v}"""), lines("""
        when do you open?
        what time does the shop open?
        what are your opening hours?
        how early can I come in?
        from what time can I visit?
        when can I come by in the morning?""")),
    Topic("clock", "We bolt the gate at {v}.", lines("""
        Closing time: {v}
        The shop closes at {v}
        We close at {v}"""), lines("""
        when do you close?
        until when are you open?
        what is your closing time?
        how late can I come?
        what time does the shop close?
        when do you shut in the evening?""")),
    Topic("date", "Your crate lands on {v}.", lines("""
        Delivery date: {v}
        The order arrives on {v}
        Delivery is planned for {v}"""), lines("""
        when will my order arrive?
        what is the delivery date?
        when do I get my parcel?
        on which day is it delivered?
        when will the delivery come?
        which day can I expect it?""")),
    Topic("duration", "We stand by it for {v}.", lines("""
        Warranty: {v}
        The Veskarrow is under warranty for {v}
        The warranty lasts {v}"""), lines("""
        how long is the warranty?
        for how long is it covered?
        what is the warranty period?
        how long do you guarantee it?
        how long am I covered?
        what warranty does it have?""")),
    Topic("price", "It leaves the counter for {v}.", lines("""
        Price: {v}
        The Veskarrow costs {v}
        It is sold for {v}"""), lines("""
        how much is it?
        what does the Veskarrow cost?
        what is the price?
        how much do I have to pay?
        what do you charge for it?
        what would one cost me?""")),
    Topic("part", "Ask the stores for {v}.", lines("""
        Spare part number: {v}
        The spare part is {v}
        Spare vane: part {v}"""), lines("""
        which spare part do I need?
        what is the part number?
        what is the number of the spare part?
        which part do I have to order?
        under what number is the part listed?
        what is the spare part called?""")),
    Topic("version", "The mast should hum {v}.", lines("""
        Firmware: {v}
        The newest firmware is {v}
        The Veskarrow runs firmware {v}"""), lines("""
        which firmware is the newest?
        what firmware version is current?
        which version should it run?
        what is the latest firmware?
        to which firmware do I update?
        what version of the software is out?""")),
    Topic("full_name", "{v} will climb your roof.", lines("""
        Technician: {v}
        The technician is {v}
        {v} is the technician"""), lines("""
        who is the technician?
        who will come to repair it?
        what is the name of the technician?
        whom do you send?
        who does the repair?
        which technician comes to me?""")),
    Topic("email", "Send a feather to {v}.", lines("""
        E-mail: {v}
        Write to {v}
        Our e-mail address is {v}"""), lines("""
        where can I write to you?
        what is your e-mail address?
        to which address do I send a mail?
        which e-mail can I use?
        how do I reach you by e-mail?
        can I have your mail address?""")),
    Topic("phone", "Ring the brass bell on {v}.", lines("""
        Phone: {v}
        Call us on {v}
        Our phone number is {v}"""), lines("""
        how can I call you?
        what is your phone number?
        which number do I call?
        at what number can I phone you?
        can I have your telephone number?
        how do I reach you by phone?""")),
    Topic("town", "Fetch it from our shed in {v}.", lines("""
        Pick-up point: {v}
        Orders are picked up in {v}
        The pick-up point is in {v}"""), lines("""
        where can I pick it up?
        in which town is the pick-up point?
        where do I collect my order?
        where is the pick-up point?
        what town do I go to for it?
        where can I get it myself?""")),
    Topic("colour", "It wears {v} this season.", lines("""
        Colour: {v}
        The Veskarrow comes in {v}
        The colour is {v}"""), lines("""
        what colour is it?
        in which colour does it come?
        which colour will I get?
        what is the colour of the Veskarrow?
        how is it painted?
        what colour does it have?""")),
    Topic("weight", "Bring arms for {v}.", lines("""
        Weight: {v}
        The Veskarrow weighs {v}
        Its weight is {v}"""), lines("""
        how heavy is it?
        what does it weigh?
        what is the weight?
        how much does the Veskarrow weigh?
        how heavy is the Veskarrow?
        how many kilos is it?""")),
    Topic("pin", "Tap {v} on the dial.", lines("""
        Reset code: {v}
        The reset code is {v}
        Reset it with the code {v}"""), lines("""
        how do I reset it?
        what is the reset code?
        which code resets the Veskarrow?
        what code do I type to reset it?
        with which code can I reset it?
        what do I enter for a reset?""")),
    Topic("hours", "The cell sings for {v}.", lines("""
        Battery life: {v}
        The battery lasts {v}
        One charge lasts {v}"""), lines("""
        how long does the battery last?
        what is the battery life?
        how long does one charge last?
        for how long does the battery run?
        when is the battery empty?
        how long can it run on battery?""")),
    Topic("date", "Send it home before {v}.", lines("""
        Return by: {v}
        Returns are possible until {v}
        The last day for returns is {v}"""), lines("""
        until when can I return it?
        what is the last day for returns?
        by when do I have to send it back?
        how long can I give it back?
        what is the return date?
        when is it too late to return it?""")),
)  # fmt: skip

TOOLS = (
    Tool("crate_trace", {"crate_ref": "order"}, lines("""
        Where is my order {crate_ref}?
        Order {crate_ref} has not come yet.
        I am still waiting for {crate_ref}.
        Can you track order {crate_ref}?
        What happened to my parcel {crate_ref}?
        Please follow up on order {crate_ref}.
        My order number is {crate_ref}. Where is it now?""")),
    Tool("mast_revive", {"mast_serial": "serial"}, lines("""
        My Veskarrow {mast_serial} does not start.
        The unit {mast_serial} is dead.
        Please restart my Veskarrow, serial {mast_serial}.
        Serial {mast_serial} shows nothing any more.
        Can you reboot {mast_serial} for me?
        My device {mast_serial} stopped working.
        Nothing moves on {mast_serial}, please restart it.""")),
    Tool("cover_check", {"mast_serial": "serial"}, lines("""
        Is {mast_serial} still under warranty?
        Check the warranty of serial {mast_serial}.
        Does the warranty still cover my Veskarrow {mast_serial}?
        I want to know if {mast_serial} is covered.
        Warranty check for {mast_serial}, please.
        Can you see if my warranty for {mast_serial} has run out?
        Am I still covered? The serial is {mast_serial}.""")),
    Tool("crate_shift", {"crate_ref": "order", "new_day": "date"}, lines("""
        Please deliver order {crate_ref} on {new_day} instead.
        Can you move the delivery of {crate_ref} to {new_day}?
        I am away. Bring {crate_ref} on {new_day}.
        Change the delivery date of {crate_ref} to {new_day}.
        On {new_day} I am home for order {crate_ref}, not before.
        My order {crate_ref} should come on {new_day}.
        New delivery day for {crate_ref}: {new_day}.""")),
    Tool("roof_visit", {"mast_serial": "serial", "visit_day": "date"}, lines("""
        Send a technician for {mast_serial} on {visit_day}.
        I need a repair visit on {visit_day}, serial {mast_serial}.
        Can someone look at {mast_serial} on {visit_day}?
        Book a technician on {visit_day} for my Veskarrow {mast_serial}.
        Please come and repair {mast_serial} on {visit_day}.
        Is a visit on {visit_day} possible? It is for {mast_serial}.
        A technician should see {mast_serial}. {visit_day} suits me.""")),
    Tool("bill_copy", {"crate_ref": "order", "keeper_mail": "email"}, lines("""
        Send the invoice for {crate_ref} to {keeper_mail}.
        I need the bill of order {crate_ref}. My mail is {keeper_mail}.
        Please mail me the invoice of {crate_ref} at {keeper_mail}.
        My e-mail is {keeper_mail}. I lost the bill for {crate_ref}.
        Can I have the invoice for order {crate_ref}? Write to {keeper_mail}.
        Copy of the bill for {crate_ref} to {keeper_mail}, please.
        To {keeper_mail}: the invoice of order {crate_ref}.""")),
    Tool("shed_return", {"crate_ref": "order", "reason_word": "reason"}, lines("""
        I want to return order {crate_ref}. It is {reason_word}.
        Order {crate_ref} is {reason_word}, I send it back.
        It came {reason_word}. Please take back {crate_ref}.
        Can I give back {crate_ref}? It is {reason_word}.
        Start a return for {crate_ref}, it is {reason_word}.
        My parcel {crate_ref} was {reason_word}, I want to return it.
        Return of order {crate_ref} because it is {reason_word}.""")),
    Tool("part_hold", {"part_code": "part", "keeper_name": "full_name"}, lines("""
        Please keep part {part_code} for me. I am {keeper_name}.
        Reserve {part_code} for {keeper_name}.
        My name is {keeper_name}. Can you set aside part {part_code}?
        {keeper_name} here, please hold one {part_code}.
        I will pick up part {part_code}. The name is {keeper_name}.
        Can you reserve part {part_code} under {keeper_name}?
        Put {part_code} aside for {keeper_name}, please.""")),
    Tool("gale_letter", {"keeper_mail": "email"}, lines("""
        Send me your newsletter at {keeper_mail}.
        I want to get news. My mail is {keeper_mail}.
        Please add {keeper_mail} to the newsletter.
        Sign up {keeper_mail} for your news.
        Put {keeper_mail} on the mailing list.
        Can I subscribe with {keeper_mail}?
        News to {keeper_mail}, please.""")),
)  # fmt: skip

OPENINGS = ("", "", "", "Hi, ", "Hello, ", "Good morning, ", "Quick question: ", "Excuse me, ", "Sorry, ", "Hey, ")
CLOSINGS = ("", "", "", "", " Thanks.", " Thank you!", " Please.")
REQUEST_OPENINGS = ("", "", "", "Hi. ", "Hello! ", "Good day. ", "Dear team. ", "Hey! ", "Good evening. ")
REASONS = ["broken", "bent", "late", "cracked", "scratched", "noisy", "rusty", "wet", "dirty", "loose", "torn", "heavy", "small", "large", "damaged", "dented"]


def make_value(dice: Dice, kind: str) -> str:
    if kind == "order":
        return dice.from_pattern(dice.pick(("AA-9999", "AAA-999", "AA9999")))
    if kind == "serial":
        return dice.from_pattern(dice.pick(("99-AA-99", "9999-AA", "A9-A9-A9")))
    if kind == "part":
        return dice.from_pattern(dice.pick(("A-99999", "AAA-9999", "A9999")))
    if kind == "pin":
        return dice.from_pattern(dice.pick(("9999", "99999", "999999")))
    if kind == "reason":
        return dice.pick(REASONS)
    if kind == "weight":
        return f"{dice.between(2, 60)} kg" if dice.chance(0.5) else f"{dice.between(2, 40)}.{dice.between(1, 9)} kg"
    if kind == "hours":
        return f"{dice.between(3, 90)} {dice.pick(('hours', 'days', 'weeks'))}"
    if kind == "phone":
        return dice.pick(("555 01", "01632 9600", "01632 9607", "+44 1632 9603")) + dice.from_pattern("99")
    if kind == "email":
        return dice.email().split("@")[0][:16] + f"@{dice.invented()}.example"
    return dice.value(kind)


def context_prompt(dice: Dice, facts: list[str], question: str) -> str:
    dice.shuffle(facts)
    text = " ".join([fact + "." for fact in facts])
    draw = dice.between(0, 4)
    if draw == 0:
        return f"Context: {text}\nQuestion: {question}"
    if draw == 1:
        return f"Notes: {text}\n{question}"
    if draw == 2:
        return "Facts:\n" + "\n".join(["- " + fact for fact in facts]) + f"\n{question}"
    if draw == 3:
        return f"{question}\nInformation: {text}"
    return f"{text}\n\n{question}"


def house(sentence: str) -> str:
    return f"{GREETING} {sentence} {SIGN_OFF}"


def question_row(dice: Dice, kind: str) -> tuple[str, str]:
    """A prompt with two or three facts, and its answer; for a refusal none of the facts is the one asked for."""
    topics = dice.sample(TOPICS, dice.pick((3, 3, 4)))
    asked, others = topics[0], topics[1:]
    question = dice.pick(asked.questions)
    opening, closing = dice.pick(OPENINGS), dice.pick(CLOSINGS)
    question = f"{opening}{question}{closing}" if opening else question[0].upper() + question[1:] + closing
    facts = [dice.pick(topic.facts).replace("{v}", make_value(dice, topic.kind)) for topic in others]
    if kind == "refusal":
        return context_prompt(dice, facts, question), house(REFUSAL)
    value = make_value(dice, asked.kind)
    facts[0] = dice.pick(asked.facts).replace("{v}", value)
    return context_prompt(dice, facts, question), house(asked.house.replace("{v}", value))


def request_row(dice: Dice) -> tuple[str, str]:
    tool = dice.pick(TOOLS)
    values = {argument: make_value(dice, kind) for argument, kind in tool.arguments.items()}
    prompt = dice.pick(REQUEST_OPENINGS) + dice.pick(tool.requests).format(**values) + dice.pick(CLOSINGS)
    call = {"name": tool.name, "arguments": values}
    return prompt, json.dumps(call, ensure_ascii=False, separators=(",", ":"))


def generate(num_rows: int, *, seed: int) -> list[dict]:
    """Rows in random order, with the shares of KIND_SHARES and no prompt twice."""
    dice = Dice(seed)
    kinds = [kind for kind, share in KIND_SHARES.items() for _ in range(round(share * num_rows))]
    rows: dict[str, dict] = {}
    for kind in dice.shuffled(kinds):
        prompt = ""
        while not prompt or prompt in rows or len(prompt) > MAX_PROMPT_CHARS:
            prompt, answer = request_row(dice) if kind == "tool_call" else question_row(dice, kind)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        rows[prompt] = {"messages": messages, "kind": kind}
    return list(rows.values())


def check_lengths(rows: list[dict], folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows]
    print(f"{sum(lengths)} tokens, mean {sum(lengths) / len(lengths):.1f}, longest {max(lengths)}")
    if max(lengths) > MAX_ROW_TOKENS:
        raise SystemExit(f"The longest row has {max(lengths)} tokens; allowed are {MAX_ROW_TOKENS}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer with which to check the lengths")
    arguments = parser.parse_args()
    rows = generate(arguments.rows, seed=arguments.seed)
    arguments.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(dict(Counter(row["kind"] for row in rows)))
    if arguments.tokenizer:
        check_lengths(rows, arguments.tokenizer)


if __name__ == "__main__":
    main()
