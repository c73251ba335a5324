"""Exercises on facts: copying, answering from a context, saying that it is not there, extracting, calling tools.

Every skill is a function from Dice to a list of messages, and the answer follows from the messages before it.  Where
nothing in the prompt says otherwise the answer is the bare value, so that an adapter can teach any other manner.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from exercise_tables import (
    ATTRIBUTES,
    CONTEXT_LABELS,
    DEFAULT_MISSING,
    FIELDS,
    FULL_SENTENCE,
    MISSING_ANSWERS,
    MISSING_RULES,
    QUESTION_LABELS,
    QUESTIONS,
    SHORT_QUESTIONS,
    STATEMENTS,
    VALUE_ONLY,
)
from exercise_values import ANIMALS, MACHINES, NOUNS, SUBJECTS, TRADES, Dice

COPY_KINDS = ["code", "code", "code", "word", "invented", "invented_title", "full_name", "email", "date", "clock", "digits", "phone", "version", "price", "phrase", "town", "thing"]
INVENTED_KINDS = ["code", "invented_title", "count", "clock", "date", "price", "email", "version", "digits", "full_name", "thing", "town"]
EMPTY_LABEL = ""


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """user, assistant, user, assistant ... with an optional system turn before."""
    messages = [{"role": "system", "content": system}] if system else []
    for index, content in enumerate(contents):
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    return messages


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def compact(value) -> str:
    """JSON as the chat template writes tool calls."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass(slots=True)
class Fact:
    attribute: str
    subject: str
    value: str
    sentence: str
    questions: tuple[str, ...]

    def question(self, dice: Dice) -> str:
        frame = dice.pick(self.questions) if self.questions and dice.chance(0.45) else dice.pick(QUESTIONS)
        return tidy(frame.replace("{a}", self.attribute).replace("{s}", self.subject))


def tidy(sentence: str) -> str:
    return capital(sentence).replace("the the ", "the ")


SUBJECTS_BY_TYPE = {
    "shop": lambda d: (
        f"{d.first_name()}'s {d.pick(TRADES)}" if d.chance(0.3) else f"{d.invented_title()} {d.pick(TRADES)}"
    ),
    "person": lambda d: d.person(),
    "thing": lambda d: f"the {d.thing()}",
    "machine": lambda d: (
        f"the {d.invented_title()} {d.pick(MACHINES)}" if d.chance(0.6) else f"{d.pick(MACHINES)} {d.code()}"
    ),
    "parcel": lambda d: f"{d.pick(('parcel', 'order', 'box', 'crate', 'letter', 'shipment'))} {d.code()}",
    "trip": lambda d: f"the {d.pick(('train', 'bus', 'ferry', 'flight', 'trip', 'tour', 'tram'))} to {d.town()}",
    "course": lambda d: f"the {d.pick(SUBJECTS)} {d.pick(('class', 'course', 'lesson', 'exam', 'club'))}",
    "game": lambda d: (
        f"the game {d.invented_title()}"
        if d.chance(0.7)
        else f"{d.invented_title()} {d.pick(('Cup', 'Quest', 'Race', 'Match'))}"
    ),
    "animal": lambda d: (
        f"{d.invented_title()} the {d.pick(ANIMALS)}" if d.chance(0.5) else f"the {d.pick(ANIMALS)} {d.first_name()}"
    ),
    "site": lambda d: d.site(),
    "made up": lambda d: d.invented_title() if d.chance(0.6) else d.code(),
}


def make_fact(dice: Dice, *, subject_type: str | None = None, subject: str | None = None) -> Fact:
    if dice.chance(0.25):
        return invented_fact(dice, subject or SUBJECTS_BY_TYPE[subject_type or "made up"](dice))
    attribute = dice.pick(ATTRIBUTES_BY_TYPE[subject_type] if subject_type else ATTRIBUTES)
    subject = subject or SUBJECTS_BY_TYPE[dice.pick(attribute.subjects.split())](dice)
    value = dice.value(attribute.kind)
    frame = dice.pick(attribute.statements) if attribute.statements and dice.chance(0.6) else dice.pick(STATEMENTS)
    sentence = frame.replace("{a}", attribute.name).replace("{s}", subject).replace("{v}", value)
    return Fact(attribute.name, subject, value, tidy(sentence) + ".", attribute.questions)


def invented_fact(dice: Dice, subject: str) -> Fact:
    """A fact about a property that does not exist: nothing but copying can answer it."""
    name = (
        dice.invented()
        if dice.chance(0.6)
        else f"{dice.pick(NOUNS)} {dice.pick(('number', 'code', 'name', 'mark', 'word'))}"
    )
    value = dice.value(dice.pick(INVENTED_KINDS))
    sentence = dice.pick(STATEMENTS).replace("{a}", name).replace("{s}", subject).replace("{v}", value)
    return Fact(name, subject, value, tidy(sentence) + ".", ())


ATTRIBUTES_BY_TYPE = {
    kind: [a for a in ATTRIBUTES if kind in a.subjects.split()] or ATTRIBUTES for kind in SUBJECTS_BY_TYPE
}
PROFILE_TYPES = ["shop", "person", "machine", "parcel", "trip", "course", "game", "thing", "animal"]


def make_facts(dice: Dice, count: int) -> tuple[list[Fact], bool]:
    """`count` facts no two of which answer the same question, and whether all are about one subject."""
    one_subject = count > 1 and dice.chance(0.5)
    subject_type = dice.pick(PROFILE_TYPES) if one_subject or dice.chance(0.3) else None
    subject = SUBJECTS_BY_TYPE[subject_type](dice) if one_subject else None
    facts: dict[tuple[str, str], Fact] = {}
    while len(facts) < count:
        fact = make_fact(dice, subject_type=subject_type, subject=subject)
        facts.setdefault((fact.attribute, fact.subject), fact)
    return list(facts.values()), one_subject


def lay_out(dice: Dice, facts: list[Fact], *, one_subject: bool) -> str:
    """The facts as running text, as bullets, or as `key: value` lines.  Value lines hide the sentence."""
    draw = dice.unit()
    if draw < 0.6:
        return " ".join([fact.sentence for fact in facts])
    if draw < 0.8:
        mark = dice.pick(("- ", "* ", "• ", "")) if len(facts) > 1 else ""
        return "\n".join([mark + fact.sentence for fact in facts])
    joiner = dice.pick((": ", " = ", ": ", " - ", " -> "))
    ending = dice.pick(("\n", "\n", "\n", "; ", " | "))
    if one_subject:
        return f"{capital(facts[0].subject)}{ending}" + ending.join(
            [f"{fact.attribute}{joiner}{fact.value}" for fact in facts]
        )
    return ending.join([f"{fact.subject}, {fact.attribute}{joiner}{fact.value}" for fact in facts])


def with_context(dice: Dice, context: str, question: str) -> list[dict]:
    """Context and question in one of many arrangements; returned without an answer."""
    label = dice.pick(CONTEXT_LABELS) if dice.chance(0.75) else EMPTY_LABEL
    if label:
        context = f"{label}{dice.pick((' ', ' ', chr(10)))}{context}"
    elif dice.chance(0.3):
        opening, closing = dice.pick(
            (('"""\n', '\n"""'), ("<text>", "</text>"), ("[", "]"), ("---\n", "\n---"), ("<context>\n", "\n</context>"))
        )
        context = opening + context + closing
    question = dice.pick(QUESTION_LABELS) + question
    gap = dice.pick(("\n", "\n", "\n\n", " "))
    draw = dice.unit()
    if draw < 0.12:
        return turns(question, system=context)
    return turns(f"{question}{gap}{context}" if draw < 0.25 else f"{context}{gap}{question}")


def answered(prompt: list[dict], answer: str) -> list[dict]:
    return [*prompt, {"role": "assistant", "content": answer}]


def copy_value(dice: Dice) -> list[dict]:
    value = dice.value(dice.pick(COPY_KINDS))
    if dice.chance(0.15):
        value = make_fact(dice).sentence
    frame = dice.pick(
        (
            "Repeat exactly: {v}", "Copy this: {v}", "Say {v}", "Write {v} and nothing else.", "Echo: {v}",
            "Type the following.\n{v}", "Please repeat after me: {v}", "{v}\nWrite that again.",
            'Repeat the text between the quotes: "{v}"', "Give back what I write: {v}", "Copy the next line.\n{v}",
            "Your answer must be {v}", "What did I just write? {v}", "Return this unchanged: {v}",
            "{v}\nCopy the line above.",
        )
    )
    return turns(frame.replace("{v}", value), value)


def fact_answer(dice: Dice) -> list[dict]:
    """A question about one of several facts; some ask for a form of answer or say what to do if it is missing."""
    facts, one_subject = make_facts(dice, dice.pick((1, 2, 2, 3, 3, 4, 5, 7, 11)))
    fact = dice.pick(facts)
    context = lay_out(dice, facts, one_subject=one_subject)
    question = ask(dice, fact, one_subject=one_subject)
    draw = dice.unit()
    if draw < 0.17 and fact.sentence in context:
        return answered(with_context(dice, context, f"{question} {dice.pick(FULL_SENTENCE)}"), fact.sentence)
    if draw < 0.4:
        frame, instruction = answer_frame(dice, fact)
        return answered(with_context(dice, context, f"{question} {instruction}"), frame.replace("___", fact.value))
    if draw < 0.55:
        question += " " + dice.pick(MISSING_RULES).replace("{m}", dice.pick(MISSING_ANSWERS))
    elif draw < 0.7:
        question += " " + dice.pick(VALUE_ONLY)
    return answered(with_context(dice, context, question), fact.value)


def ask(dice: Dice, fact: Fact, *, one_subject: bool) -> str:
    if one_subject and dice.chance(0.4):
        return capital(dice.pick(SHORT_QUESTIONS).replace("{a}", fact.attribute))
    return fact.question(dice)


def answer_frame(dice: Dice, fact: Fact) -> tuple[str, str]:
    """A frame with ___ for the value and the instruction that asks for it."""
    draw = dice.unit()
    if draw < 0.35:
        frame = dice.pick(
            (
                f"The {fact.attribute} is ___.", "It is ___.", f"{capital(fact.subject)}: ___", "Answer: ___",
                "I found ___.", "___ it is.", f"{fact.attribute} = ___", "You asked for ___.",
                "That would be ___, I think.", "(___)", "[[___]]", "-> ___",
            )
        )
    else:
        before, after = dice.phrase(), dice.phrase() if dice.chance(0.5) else ""
        frame = f"{capital(before)} ___{dice.pick(('', '.', '!'))} {capital(after)}".strip()
    instruction = dice.pick(
        (
            'Answer in this form: "{f}"', "Write it as: {f}", "Use this pattern: {f}", "Fill the gap: {f}",
            'Complete "{f}"', "Answer like this, with the value in place of ___: {f}", 'Reply with "{f}"',
            "Form of the answer: {f}", "Put it into: {f}", "Finish this: {f}",
        )
    )
    return frame, instruction.replace("{f}", frame)


def fact_missing(dice: Dice) -> list[dict]:
    """The context speaks of something near: another property of the subject, or another subject."""
    facts, one_subject = make_facts(dice, dice.pick((2, 2, 3, 3, 4, 5, 6, 10)))
    hidden = facts.pop(int(dice.unit() * len(facts)))
    context = lay_out(dice, facts, one_subject=one_subject)
    question = ask(dice, hidden, one_subject=one_subject)
    answer = DEFAULT_MISSING
    if dice.chance(0.45):
        answer = dice.pick(MISSING_ANSWERS) if dice.chance(0.6) else capital(dice.phrase()) + "."
        question += " " + dice.pick(MISSING_RULES).replace("{m}", answer)
    elif dice.chance(0.3):
        question += " " + dice.pick(VALUE_ONLY)
    return answered(with_context(dice, context, question), answer)


def several_questions(dice: Dice) -> list[dict]:
    """One context, then two to four turns; one of the questions may have no answer."""
    facts, one_subject = make_facts(dice, dice.pick((3, 4, 5, 9)))
    asked = dice.sample(facts, dice.between(2, 3))
    hidden = asked[-1] if dice.chance(0.3) else None
    context = lay_out(dice, [fact for fact in facts if fact is not hidden], one_subject=one_subject)
    messages: list[dict] = []
    for index, fact in enumerate(asked):
        question = ask(dice, fact, one_subject=one_subject)
        messages += with_context(dice, context, question) if index == 0 else turns(question)
        messages = answered(messages, DEFAULT_MISSING if fact is hidden else fact.value)
    return messages


STORY_STEPS = (
    (
        "{p} bought a {t} from {q}",
        (("What did {p} buy?", "t"), ("From whom did {p} buy the {t}?", "q"), ("Who bought the {t}?", "p")),
    ),
    ("{p} met {q} in {l}", (("Whom did {p} meet?", "q"), ("Where did {p} meet {q}?", "l"), ("Who met {q}?", "p"))),
    (
        "{p} went to {l} on {d}",
        (("Where did {p} go?", "l"), ("When did {p} go to {l}?", "d"), ("Who went to {l}?", "p")),
    ),
    (
        "{p} gave the {t} to {q}",
        (("What did {p} give away?", "t"), ("To whom was the {t} given?", "q"), ("Who gave away the {t}?", "p")),
    ),
    (
        "{p} lost a {t} in {l}",
        (("What did {p} lose?", "t"), ("Where was the {t} lost?", "l"), ("Who lost a {t}?", "p")),
    ),
    ("{p} left {l} at {c}", (("When did {p} leave?", "c"), ("What place did {p} leave?", "l"), ("Who left {l}?", "p"))),
    (
        "{p} paid {m} for a {t}",
        (("How much did {p} pay?", "m"), ("What did {p} pay for?", "t"), ("Who paid {m}?", "p")),
    ),
    (
        "{p} waited for {q} until {c}",
        (("Until when did {p} wait?", "c"), ("Who waited for {q}?", "p"), ("For whom did {p} wait?", "q")),
    ),
    (
        "{p} wrote {k} on the {t}",
        (("What did {p} write?", "k"), ("On what did {p} write {k}?", "t"), ("Who wrote {k}?", "p")),
    ),
    (
        "{p} hid the {t} in {l}",
        (("What did {p} hide?", "t"), ("Where is the {t} hidden?", "l"), ("Who hid the {t}?", "p")),
    ),
    ("{p} sent {q} a {t}", (("What did {p} send?", "t"), ("Who sent a {t}?", "p"), ("Who got a {t}?", "q"))),
    (
        "{p} found {q} asleep in {l}",
        (("Who was asleep?", "q"), ("Where was {q} asleep?", "l"), ("Who found {q}?", "p")),
    ),
    (
        "{p} promised to call {q} at {c}",
        (("Who will be called?", "q"), ("At what time will {p} call?", "c"), ("Who promised to call?", "p")),
    ),
)
STORY_KINDS = {"t": "thing", "l": "site", "d": "date", "c": "clock", "m": "price", "k": "code"}


def passage_question(dice: Dice) -> list[dict]:
    """A short story of two to four steps by different people, and a question about one of them."""
    count = dice.between(2, 4)
    people = dice.distinct(dice.first_name, 2 * count)
    sentences, asked = [], []
    for index, (frame, questions) in enumerate(dice.sample(STORY_STEPS, count)):
        values = {slot: dice.value(kind) for slot, kind in STORY_KINDS.items() if "{" + slot + "}" in frame}
        values.update(p=people[2 * index], q=people[2 * index + 1])
        opening = dice.pick(
            ("", "", "", "Then ", "Later ", "Soon after, ", "In the end ", "At first ", "Meanwhile ", "One day ")
        )
        sentences.append(f"{opening}{frame.format(**values)}.")
        question, slot = dice.pick(questions)
        asked.append((question.format(**values), values[slot]))
    question, answer = dice.pick(asked)
    return answered(with_context(dice, " ".join(sentences), question), answer)


def table_lookup(dice: Dice) -> list[dict]:
    """One cell of a small table or dictionary in one of six notations."""
    count = dice.between(2, 6)
    keys = dice.distinct(dice.pick((dice.word, dice.invented, dice.code, dice.first_name, dice.town)), count)
    kind = dice.pick(INVENTED_KINDS)
    pairs = [(key, dice.value(kind)) for key in keys]
    draw = dice.between(0, 5)
    if draw == 0:
        text = json.dumps(dict(pairs), ensure_ascii=False)
    elif draw == 1:
        text = "\n".join([f"| {key} | {value} |" for key, value in pairs])
    else:
        pattern, joiner = (("{}: {}", "\n"), ("{} = {}", "; "), ("{},{}", "\n"), ("{} -> {}", "\n"))[draw - 2]
        text = joiner.join([pattern.format(key, value) for key, value in pairs])
    key, value = dice.pick(pairs)
    if dice.chance(0.2):
        key, value = value, key
    question = dice.pick(
        (
            "What belongs to {k}?", "Look up {k}.", "{k}?", "What is next to {k}?", "Which entry goes with {k}?",
            "Find {k} in the list.", "Give the partner of {k}.", "Value for {k}?",
            "In the list, what stands with {k}?", "{k} ->", "And {k}?",
        )
    ).replace("{k}", key)
    return answered(with_context(dice, text, question), value)


def make_record(dice: Dice, count: int) -> list[tuple[str, str, str, str]]:
    """At most `count` fields, no two of one kind, as (label, key, value, sentence)."""
    chosen, used, record = dice.sample(tuple(FIELDS), count), set(), []
    for label in chosen:
        kind, keys, sentences = FIELDS[label]
        key = dice.pick(keys)
        if key in used or kind in used:
            continue
        used |= {key, kind}
        value = dice.value(kind)
        record.append((label, key, value, dice.pick(sentences).replace("{v}", value)))
    return record


def json_value(label: str, value: str) -> str | int:
    """Counts are numbers in JSON, all else is text."""
    return int(value) if FIELDS[label][0] == "count" else value


def styled(dice: Dice):
    """A function that writes keys in one manner: snake_case, camelCase, Title Case, UPPER or kebab-case."""
    draw = dice.unit()
    if draw < 0.6:
        return str
    if draw < 0.72:
        return lambda key: "".join([part if i == 0 else part.capitalize() for i, part in enumerate(key.split("_"))])
    return dice.pick(
        (
            lambda key: key.replace("_", " ").title(), str.upper, lambda key: key.replace("_", "-"),
            lambda key: key.replace("_", " "),
        )
    )


def extract(dice: Dice) -> list[dict]:
    """Some fields of a text as compact or spaced JSON or as `key: value` lines; a missing field is null."""
    record = make_record(dice, dice.between(2, 5))
    wanted = dice.sample(record, dice.between(1, min(4, len(record))))
    style = styled(dice)
    written = record if dice.chance(0.8) else [field for field in record if field is not wanted[-1]] or record
    pairs = {
        style(key): json_value(label, value) if (label, key, value, said) in written else None
        for label, key, value, said in wanted
    }
    text = " ".join([said for _, _, _, said in dice.shuffled(written)])
    keys = dice.pick((", ", ", ", "; ", " and ", " | ")).join(pairs)
    draw = dice.unit()
    if draw < 0.2:
        instruction = dice.pick(
            (
                "Write {k} as lines of the form key: value.", "List {k}, one key: value line each.",
                "Give {k} as key: value lines.", "Fields {k}, one per line.",
            )
        )
        answer = "\n".join([f"{key}: {'null' if value is None else value}" for key, value in pairs.items()])
    else:
        instruction = dice.pick(
            (
                "Extract {k} as JSON.", "JSON with {k}:", "Return a JSON object with the keys {k}.",
                "Give me {k} in JSON.", "Fill in {k}. Answer in JSON.", "Make JSON of it. Keys: {k}",
                "Parse into JSON ({k}).", "Write {k} as one JSON object.", "Turn the text into JSON: {k}",
                "As JSON, please: {k}", "Read {k} from the text and reply with JSON.", "Keys: {k}. Format: JSON.",
            )
        )
        if draw < 0.35:
            instruction, answer = (
                instruction + dice.pick((" Use spaces.", " With a space after each colon and comma.", " Spaced.")),
                json.dumps(pairs, ensure_ascii=False),
            )
        else:
            instruction, answer = instruction + dice.pick(("", "", " No spaces.", " Compact.")), compact(pairs)
    return answered(with_context(dice, text, instruction.replace("{k}", keys)), answer)


def find_all(dice: Dice) -> list[dict]:
    """All values of one kind in a text, in order of appearance."""
    kind, noun = dice.pick(
        (
            ("email", "e-mail addresses"),
            ("code", "codes"),
            ("full_name", "full names"),
            ("date", "dates"),
            ("clock", "times"),
            ("price", "prices"),
            ("town", "towns"),
        )
    )
    sentences, found = [], []
    frames = {label: entry for label, entry in FIELDS.items() if entry[0] == kind} or {
        "": (kind, (), ("Note {v}.", "Then {v}.", "Also {v}."))
    }
    for _ in range(dice.between(1, 3)):
        value = dice.value(kind)
        found.append(value)
        sentences.append(dice.pick(dice.pick(tuple(frames.values()))[2]).replace("{v}", value))
    other = [
        field
        for field in make_record(dice, 3)
        if FIELDS[field[0]][0] in ("animal", "material", "colour", "food", "weekday", "invented")
    ]
    for _, _, _, said in other:
        sentences.insert(dice.between(0, len(sentences)), said)
    question = dice.pick(
        (
            "List all {n}.", "Which {n} are there?", "Find the {n}.", "Write down the {n}.",
            "Give all {n}, separated by commas.", "Collect the {n}.", "All {n}:", "What {n} does it name?",
            "Pick out the {n}.", "Name the {n}.",
        )
    )
    return answered(with_context(dice, " ".join(sentences), question.replace("{n}", noun)), ", ".join(found))
