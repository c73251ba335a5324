"""Exercises on form: lists, case, templates, rules of tone, and examples to follow."""

from __future__ import annotations

from exercise_facts import FULL_SENTENCE, answered, ask, capital, lay_out, make_fact, make_facts, turns, with_context
from exercise_tables import MISSING_RULES, TEMPLATES
from exercise_values import ANIMALS, FOODS, NOUNS, Dice

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]
SLOT_NAMES = ["name", "item", "date", "city", "code", "time", "price", "mail", "word", "place", "title", "number"]
TEMPLATE_KINDS = ["person", "thing", "date", "town", "code", "clock", "price", "email", "word", "full_name", "invented_title"]


def written_list(dice: Dice, items: list[str]) -> str:
    draw = dice.unit()
    if draw < 0.6:
        return ", ".join(items)
    if draw < 0.8:
        return "\n".join(items)
    return "; ".join(items) if draw < 0.9 else ", ".join(items[:-1]) + " and " + items[-1]


def with_list(dice: Dice, items: list[str], instruction: str) -> str:
    text = written_list(dice, items)
    if dice.chance(0.6):
        return f"{instruction}{dice.pick((' ', chr(10)))}{text}"
    return f"{dice.pick(('', '', 'List: ', 'Words: ', 'Items: ', 'Here they are: '))}{text}\n{instruction}"


def list_format(dice: Dice) -> list[dict]:
    items = dice.words(2, 6)
    draw = dice.between(0, 4)
    if draw == 0:
        instruction = dice.pick(
            (
                "Write as a bullet list.", "Make bullets.", "Bullet points, please.",
                "Put each on a line with a dash.", "As a list with dashes:", "Use bullets for these.",
                "Turn into bullet points.", "One bullet per item:", "List them with - in front.", "Bulleted:",
            )
        )
        answer = "\n".join(["- " + item for item in items])
    elif draw == 1:
        instruction = dice.pick(
            (
                "Write as a numbered list.", "Number them.", "Numbered list, please.", "Give each a number.",
                "As 1. 2. 3.:", "Count them off line by line.", "Make it a numbered list.", "Enumerate:",
                "Number each line.", "Numbered:",
            )
        )
        answer = "\n".join([f"{index}. {item}" for index, item in enumerate(items, 1)])
    elif draw == 2:
        instruction = dice.pick(
            (
                "One per line.", "Each on its own line.", "Break into lines.", "Put them on separate lines.",
                "Line by line, please.", "A line for each:",
            )
        )
        answer = "\n".join(items)
    else:
        joiner = dice.pick((" - ", "; ", " | ", " / ", " + ", ",", " > ", "--", " and ", " or ", "_", " "))
        instruction = dice.pick(
            (
                'Join with "{j}".', 'Put "{j}" between them.', 'Separate them by "{j}".', 'Use "{j}" as separator:',
                'Glue them with "{j}".', 'Write them with "{j}" in between.',
            )
        ).replace("{j}", joiner)
        answer = joiner.join(items)
    return turns(with_list(dice, items, instruction), answer)


def list_order(dice: Dice) -> list[dict]:
    """Sort words or numbers, or reverse the list."""
    draw = dice.unit()
    if draw < 0.35:
        items = dice.sample(dice.pick((NOUNS, ANIMALS, FOODS)), dice.between(2, 4))
        answer, instruction = (
            sorted(items),
            dice.pick(
                (
                    "Sort alphabetically:", "Put in alphabetical order:", "Order from A to Z:", "Sort these words:",
                    "Alphabetical, please:", "Arrange by alphabet:", "ABC order:",
                )
            ),
        )
    elif draw < 0.6:
        items = [str(number) for number in dice.sample(range(dice.pick((10, 30, 100))), dice.between(2, 5))]
        down = dice.chance(0.3)
        answer = sorted(items, key=int, reverse=down)
        instruction = (
            dice.pick(("Sort from large to small:", "Largest first:", "In falling order:", "Descending:"))
            if down
            else dice.pick(
                ("Sort from small to large:", "Smallest first:", "In rising order:", "Ascending:", "Order the numbers:")
            )
        )
    else:
        items = dice.words(2, 6)
        answer, instruction = (
            items[::-1],
            dice.pick(
                (
                    "Reverse the list:", "Backwards:", "In reverse order:", "Last one first:",
                    "Turn the order around:", "From the end to the start:", "Write it from back to front:",
                    "Flip this list:", "Opposite order, please:", "Reverse:",
                )
            ),
        )
    return turns(f"{instruction} {', '.join(items)}", ", ".join(answer))


def list_item(dice: Dice) -> list[dict]:
    items = dice.words(2, 6)
    position = dice.between(0, len(items) - 1)
    name = "last" if dice.chance(0.3) or position >= len(ORDINALS) else ORDINALS[position]
    frame = dice.pick(
        (
            "What is the {n} item?", "Give the {n} one.", "Which is {n}?", "Only the {n}:", "Name the {n} of these.",
            "The {n} entry?", "Write the {n} word only.", "Pick the {n}.", "I want the {n} one.",
            "Tell me the {n} in the list.",
        )
    )
    return turns(with_list(dice, items, frame.replace("{n}", name)), items[-1] if name == "last" else items[position])


def count_items(dice: Dice) -> list[dict]:
    items = dice.words(1, 8) if dice.chance(0.8) else dice.words(2, 4)
    if len(items) > 2 and dice.chance(0.3):
        items[0] = items[-1]
        asked = dice.pick((items[0], items[1]))
        frame = dice.pick(
            (
                "How often does {w} occur?", "How many times is {w} there?", "Count {w}.", "How many {w}?",
                "Number of times {w} stands here:",
            )
        )
        return turns(f"{', '.join(items)}\n{frame.replace('{w}', asked)}", str(items.count(asked)))
    frame = dice.pick(
        (
            "How many items?", "Count them.", "How many are there?", "Number of entries?", "How long is the list?",
            "Count the items.", "What is the number of items?", "How many words stand here?", "Say how many.",
            "Tally:",
        )
    )
    return turns(f"{', '.join(items)}\n{frame}", str(len(items)))


def list_edit(dice: Dice) -> list[dict]:
    """Leave one out, add one, replace one, or say whether one is there."""
    items = dice.words(3, 5)
    one, new = dice.pick(items), dice.word()
    draw = dice.between(0, 3)
    if draw == 0:
        frame, answer = (
            dice.pick(
                (
                    "Leave out {w}.", "Without {w}:", "Remove {w}.", "Drop {w}.", "Delete {w} from the list.",
                    "All but {w}:",
                )
            ).replace("{w}", one),
            ", ".join([item for item in items if item != one]),
        )
    elif draw == 1:
        at_end = dice.chance(0.6)
        frame = (
            dice.pick(("Add {w} at the {p}.", "Put {w} at the {p}.", "With {w} at the {p}:", "Append {w} to the {p}."))
            .replace("{w}", new)
            .replace("{p}", "end" if at_end else "start")
        )
        answer = ", ".join([*items, new] if at_end else [new, *items])
    elif draw == 2:
        frame = (
            dice.pick(
                (
                    "Replace {w} by {x}.", "Change {w} to {x}.", "Write {x} instead of {w}.", "Swap {w} for {x}.",
                    "Use {x} in place of {w}.",
                )
            )
            .replace("{w}", one)
            .replace("{x}", new)
        )
        answer = ", ".join([new if item == one else item for item in items])
    else:
        asked = one if dice.chance(0.5) else new
        frame = dice.pick(
            (
                "Is {w} in the list?", "Does it contain {w}?", "Is {w} among them?", "Do you see {w}?",
                "{w}: yes or no?", "Is {w} there?",
            )
        ).replace("{w}", asked)
        answer = "yes" if asked in items else "no"
    return turns(f"{', '.join(items)}\n{frame}", answer)


def change_case(dice: Dice) -> list[dict]:
    text = dice.pick((dice.word, dice.phrase, dice.thing, dice.full_name, dice.invented, dice.town))()
    draw = dice.between(0, 3)
    if draw == 0:
        frame, answer = (
            (
                "Write in capitals: {t}", "Upper case: {t}", "In upper case, please: {t}", "SHOUT this: {t}",
                "All capital letters: {t}", "{t}\nNow in capitals.",
            ),
            text.upper(),
        )
    elif draw == 1:
        text = text.upper()
        frame, answer = (
            (
                "Write in small letters: {t}", "Lower case: {t}", "In lower case, please: {t}", "No capitals: {t}",
                "{t}\nNow in small letters.",
            ),
            text.lower(),
        )
    elif draw == 2:
        frame, answer = (
            ("Capitalise each word: {t}", "Title case: {t}", "Start every word with a capital: {t}", "As a title: {t}"),
            " ".join([capital(word) for word in text.split(" ")]),
        )
    else:
        text = dice.word() if dice.chance(0.7) else dice.code()
        frame, answer = (
            (
                "Spell {t}.", "Spell the word {t} with spaces.", "Letter by letter: {t}",
                "Put a space between the letters: {t}",
            ),
            " ".join(text),
        )
    return turns(dice.pick(frame).replace("{t}", text), answer)


def wrap(dice: Dice) -> list[dict]:
    """Prefix, suffix, quote, bracket or repeat something."""
    text = dice.pick((dice.word, dice.code, dice.phrase, dice.full_name, dice.date, dice.invented))()
    draw = dice.unit()
    if draw < 0.25:
        mark = dice.pick(
            (dice.invented(), dice.invented_title() + ":", ">>", "***", "Note:", dice.word(), "#", dice.code())
        )
        frame, answer = (
            dice.pick(
                (
                    "Put {m} before: {t}", "Start with {m}, then write {t}", "Prefix {m} to: {t}",
                    "{t}\nPut {m} in front.", "Write {m} and then {t}",
                )
            ),
            f"{mark} {text}",
        )
    elif draw < 0.5:
        mark = dice.pick((dice.invented(), "<<", "!!", "please", dice.word(), dice.invented_title(), dice.code()))
        frame, answer = (
            dice.pick(
                (
                    "Put {m} after: {t}", "Write {t} and then {m}", "End with {m}: {t}", "{t}\nAdd {m} at the end.",
                    "Suffix {m} to: {t}",
                )
            ),
            f"{text} {mark}",
        )
    elif draw < 0.75:
        name, opening, closing = dice.pick(
            (
                ("double quotes", '"', '"'),
                ("round brackets", "(", ")"),
                ("square brackets", "[", "]"),
                ("stars", "*", "*"),
                ("curly brackets", "{", "}"),
                ("single quotes", "'", "'"),
                ("angle brackets", "<", ">"),
                ("dashes", "-", "-"),
                ("bars", "|", "|"),
            )
        )
        mark, answer = name, f"{opening}{text}{closing}"
        frame = dice.pick(
            (
                "Put in {m}: {t}", "Write {t} in {m}.", "Wrap in {m}: {t}", "{t}\nNow in {m}.", "Set {m} around {t}",
                "Surround with {m}: {t}",
            )
        )
    else:
        times = dice.between(2, 5)
        mark = dice.pick((str(times), ("two", "three", "four", "five")[times - 2])) + " times"
        frame = dice.pick(
            (
                "Write {m}: {t}", "Repeat {m}: {t}", "Say {t} {m}.", "{t}\nThat, {m}.", "I want to read {m}: {t}",
                "Give me {m}: {t}",
            )
        )
        answer = " ".join([text] * times)
    return turns(frame.replace("{m}", mark).replace("{t}", text), answer)


def slots_of(template: str) -> list[int]:
    return [slot for slot in range(3) if "{" + str(slot) + "}" in template]


def fill(template: str, values: dict[int, str]) -> str:
    for slot, value in values.items():
        template = template.replace("{" + str(slot) + "}", value)
    return template


def invented_template(dice: Dice) -> str:
    """A sentence of random words with one to three gaps."""
    words = [dice.word() for _ in range(dice.between(2, 5))]
    for slot in range(dice.between(1, 3)):
        words.insert(dice.between(0, len(words)), "{" + str(slot) + "}")
    return capital(" ".join(words)) + dice.pick((".", "!", "", "?", ";"))


def fill_template(dice: Dice) -> list[dict]:
    template = dice.pick(TEMPLATES) if dice.chance(0.5) else invented_template(dice)
    slots = slots_of(template)
    make_name = dice.word if dice.chance(0.5) else lambda: dice.pick(SLOT_NAMES)
    names = dict(zip(slots, dice.distinct(make_name, len(slots)), strict=True))
    values = {slot: dice.value(dice.pick(TEMPLATE_KINDS)) for slot in slots}
    opening, closing = dice.pick(
        (("{", "}"), ("{", "}"), ("[", "]"), ("<", ">"), ("{{", "}}"), ("$", ""), ("__", "__"))
    )
    shown = fill(template, {slot: opening + name + closing for slot, name in names.items()})
    given = dice.pick((", ", "\n", "; ")).join(
        [f"{names[slot]}{dice.pick((': ', ' = ', ' is '))}{values[slot]}" for slot in dice.shuffled(slots)]
    )
    frame = dice.pick(
        (
            "Fill in: {t}\n{g}", "Template: {t}\n{g}", "{g}\nFill the template: {t}", "Complete {t} with {g}",
            "Use {g} in: {t}", "{t}\nInsert {g}", "Put the values in. {t}\n{g}", "Values: {g}\nText: {t}",
            "Write this out: {t}\n{g}", "Form: {t}\nEntries: {g}",
        )
    )
    return turns(frame.replace("{g}", given).replace("{t}", shown), fill(template, values))


def tone(dice: Dice) -> tuple[str, str, str]:
    """A rule of tone with what it puts before and after every answer."""
    before = after = ""
    draw = dice.unit()
    if draw < 0.7:
        before = dice.pick(
            (
                capital(dice.phrase()) + dice.pick((".", "!", ":", ",")),
                dice.pick(("Hello from ", "Greetings from ", "This is ")) + dice.invented_title() + dice.pick(".!:"),
                f"{dice.invented_title()}:",
            )
        )
    if draw > 0.35:
        after = dice.pick(
            (
                capital(dice.phrase()) + dice.pick((".", "!", "")),
                f"{dice.pick(('Yours,', 'Best,', 'Regards,', '-', 'Signed,', 'Your friend'))} {dice.first_name()}",
                f"({dice.invented()})",
            )
        )
    if before and after:
        rule = dice.pick(
            (
                'Always begin with "{b}" and end with "{a}"', 'Start with "{b}" and sign off with "{a}"',
                'First say "{b}", last say "{a}"', 'Your answers open with "{b}" and close with "{a}"',
                'Put "{b}" before and "{a}" after every answer.', '"{b}" comes first, "{a}" comes last.',
            )
        )
    elif before:
        rule = dice.pick(
            (
                'Always start with "{b}"', 'Begin every answer with "{b}"', 'Open each reply with "{b}"',
                'The first words of every answer are "{b}"', 'Say "{b}" before you answer.',
                'Put "{b}" in front of what you say.',
            )
        )
    else:
        rule = dice.pick(
            (
                'Always end with "{a}"', 'Sign off with "{a}"', 'Close each reply with "{a}"',
                'The last words of every answer are "{a}"', 'Say "{a}" after you answer.', 'Finish with "{a}"',
            )
        )
    return rule.replace("{b}", before).replace("{a}", after), before, after


def toned(before: str, answer: str, after: str) -> str:
    return " ".join(filter(None, (before, answer, after)))


def tone_rule(dice: Dice) -> list[dict]:
    """A rule of tone in the system turn (or before the question) that one or two answers obey."""
    rule, before, after = tone(dice)
    facts, one_subject = make_facts(dice, dice.between(2, 4))
    asked = dice.sample(facts, dice.pick((1, 1, 1, 2)))
    context = lay_out(dice, facts, one_subject=one_subject)
    whole = (
        context.count(asked[0].sentence) == 1 and all(fact.sentence in context for fact in asked) and dice.chance(0.4)
    )
    messages = []
    for index, fact in enumerate(asked):
        question = ask(dice, fact, one_subject=one_subject) + (" " + dice.pick(FULL_SENTENCE) if whole else "")
        messages += with_context(dice, context, question) if index == 0 else turns(question)
        messages = answered(messages, toned(before, fact.sentence if whole else fact.value, after))
    if messages[0]["role"] == "system":
        messages[0] = {"role": "system", "content": f"{rule}\n{messages[0]['content']}"}
        return messages
    if dice.chance(0.7):
        opening = dice.pick(
            (
                "", "", "You help customers. ", f"You are {dice.first_name()}. ", "You are an assistant. ",
                f"You speak for {dice.invented_title()}. ",
            )
        )
        return [{"role": "system", "content": opening + rule}, *messages]
    messages[0] = {"role": "user", "content": f"{rule}\n{messages[0]['content']}"}
    return messages


def tone_with_missing(dice: Dice) -> list[dict]:
    """A rule for what to say when the context has no answer, beside one for what to say when it has."""
    facts, one_subject = make_facts(dice, dice.between(2, 4))
    there = dice.chance(0.5)
    fact = facts[0]
    context = lay_out(dice, dice.shuffled(facts if there else facts[1:]), one_subject=one_subject)
    frame, refusal = f"{capital(dice.phrase())} ___.", capital(dice.phrase()) + "."
    rule = f'Answer with "{frame}" {dice.pick(MISSING_RULES).replace("{m}", refusal)}'
    messages = with_context(dice, context, ask(dice, fact, one_subject=one_subject))
    prompt = [
        {**message, "content": f"{rule}\n{message['content']}"} if message["role"] == "system" else message
        for message in messages
    ]
    if prompt[0]["role"] != "system":
        prompt.insert(0, {"role": "system", "content": rule})
    return answered(prompt, frame.replace("___", fact.value) if there else refusal)


def follow_style(dice: Dice) -> list[dict]:
    """Earlier answers of the conversation show a frame; the next answer keeps it.  Nothing states the rule, so that the
    first answer cannot be known: it has weight 0, as in the fine-tuning format of OpenAI."""
    subject_count = dice.between(2, 3)
    before = capital(dice.phrase()) + dice.pick((":", ".", "!", ","))
    middle, after = (f"the {dice.word()} is", "") if dice.chance(0.4) else ("", capital(dice.phrase()) + ".")
    messages: list[dict] = []
    for _ in range(subject_count):
        fact = make_fact(dice)
        messages += turns(
            f"{fact.sentence} {fact.question(dice)}", toned(before, toned(middle, fact.value + ".", ""), after)
        )
    return first_untrained(messages)


def first_untrained(messages: list[dict]) -> list[dict]:
    messages[1]["weight"] = 0
    return messages


def few_shot(dice: Dice) -> list[dict]:
    """Input and output pairs, then an input alone."""
    mark, kind = dice.phrase(), dice.pick(TEMPLATE_KINDS)
    opening, closing = dice.pick(("(", "[", "<", "*", "~", "--", "")), dice.pick((")", "]", ">", "*", "~", "--", "!"))
    rules = (
        lambda x: f"{mark} {x}", lambda x: f"{x} {mark}", lambda x: opening + x + closing, str.upper,
        lambda x: f"{x} {x}", lambda x: f"{mark}: {x}.", lambda x: " ".join(x),
        lambda x: f'{{"{mark.split()[0]}":"{x}"}}', lambda x: f"{mark.split()[0]}({x})", str.lower,
        lambda x: " ".join(reversed(x.split())), lambda x: f"{opening}{x}{closing} {mark}", lambda x: x[0],
        lambda x: f"{x}-{mark.split()[0]}", lambda x: x, lambda x: f"{capital(mark)}, {x}!",
    )
    rule, arrow = dice.pick(rules), dice.pick((" -> ", " => ", ": ", " = ", " | ", "\t"))
    inputs = dice.distinct(lambda: dice.value(kind), dice.between(3, 5))
    draw = dice.unit()
    if draw < 0.5:
        shown = "\n".join([f"{x}{arrow}{rule(x)}" for x in inputs[:-1]])
        text = f"{shown}\n{inputs[-1]}{arrow.rstrip()}"
    elif draw < 0.85:
        first, second = dice.pick(
            (
                ("Input", "Output"),
                ("In", "Out"),
                ("Q", "A"),
                ("Before", "After"),
                ("Question", "Answer"),
                ("From", "To"),
                ("Text", "Result"),
            )
        )
        shown = "\n".join([f"{first}: {x}\n{second}: {rule(x)}" for x in inputs[:-1]])
        text = f"{shown}\n{first}: {inputs[-1]}\n{second}:"
    else:
        return first_untrained(turns(*[part for x in inputs for part in (x, rule(x))]))
    opening_line = dice.pick(
        (
            "", "", "", "Continue.\n", "Follow the examples.\n", "Same pattern:\n", "Go on in the same way.\n",
            "What comes next?\n",
        )
    )
    return turns(opening_line + text, rule(inputs[-1]))
