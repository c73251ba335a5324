"""Exercises on small judgements and talk: sums, comparisons, yes or no, choices, rewriting, definitions, greetings."""

from __future__ import annotations

from exercise_facts import answered, capital, make_fact, make_facts, tidy, turns, with_context
from exercise_tables import DEFINITIONS, OPPOSITES
from exercise_values import ANIMALS, COLOURS, FOODS, JOBS, MATERIALS, NOUNS, SITES, Dice

POOLS = {"animal": ANIMALS, "food": FOODS, "colour": COLOURS, "job": JOBS, "material": MATERIALS, "place": SITES}


def arithmetic(dice: Dice) -> list[dict]:
    top = dice.pick((9, 9, 20, 50))
    left, right = dice.between(0, top), dice.between(0, top)
    name, item = dice.first_name(), dice.pick(NOUNS)
    if dice.chance(0.5):
        frame = dice.pick(
            (
                "{a} + {b} =", "What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b}", "Sum of {a} and {b}?",
                "How much is {a} and {b}?", "{n} has {a} {i}s and gets {b} more. How many now?",
                "{a} {i}s and {b} {i}s make how many?", "Calculate {a}+{b}.",
                "There are {a} {i}s here and {b} there. How many in all?",
            )
        )
        answer = left + right
    else:
        left, right = max(left, right), min(left, right)
        frame = dice.pick(
            (
                "{a} - {b} =", "What is {a} minus {b}?", "Take {b} from {a}.", "{a} - {b}",
                "{n} has {a} {i}s and loses {b}. How many are left?", "{a} less {b}?", "Calculate {a}-{b}.",
                "From {a} {i}s {n} gives away {b}. How many remain?", "Difference of {a} and {b}?",
                "Subtract {b} from {a}.",
            )
        )
        answer = left - right
    return turns(frame.format(a=left, b=right, n=name, i=item), str(answer))


def compare(dice: Dice) -> list[dict]:
    """The larger or smaller of two numbers, or of two things with numbers."""
    top = dice.pick((10, 100, 1000))
    left, right = dice.sample(range(top), 2)
    larger = dice.chance(0.5)
    if dice.chance(0.5):
        frame = dice.pick(
            (
                "Which is larger, {a} or {b}?", "The larger of {a} and {b}?", "Bigger: {a} or {b}?",
                "{a} or {b}: which is more?", "Maximum of {a} and {b}?",
            )
            if larger
            else (
                "Which is smaller, {a} or {b}?", "The smaller of {a} and {b}?", "Less: {a} or {b}?",
                "{a} or {b}: which is less?", "Minimum of {a} and {b}?",
            )
        )
        return turns(frame.format(a=left, b=right), str(max(left, right) if larger else min(left, right)))
    first, second = dice.distinct(dice.first_name, 2)
    item = dice.pick(NOUNS)
    frame = dice.pick(
        (
            "{p} has {a} {i}s, {q} has {b}. Who has {w}?", "{p}: {a} {i}s. {q}: {b} {i}s. Who has {w}?",
            "Who has {w} {i}s, {p} with {a} or {q} with {b}?", "{p} counts {a} {i}s and {q} counts {b}. {w}: who?",
        )
    )
    answer = first if (left > right) == larger else second
    return turns(
        capital(frame.format(p=first, q=second, a=left, b=right, i=item, w="more" if larger else "fewer")), answer
    )


def entailment(dice: Dice) -> list[dict]:
    """Is a statement true by the facts: yes or no."""
    facts, _ = make_facts(dice, dice.between(1, 4))
    fact = dice.pick(facts)
    claim, answer = fact.sentence, "yes"
    if dice.chance(0.5):
        others = [other.value for other in facts if other.value != fact.value] or [dice.code(), dice.invented_title()]
        claim, answer = fact.sentence.replace(fact.value, dice.pick(others), 1), "no"
        answer = "yes" if any(claim == other.sentence for other in facts) else answer
    frame = dice.pick(
        (
            "Is it true that {c}", "True or not: {c} Answer yes or no.", "Yes or no: {c}",
            "Does the text say this? {c}", "Claim: {c} Right?", "Someone says: {c} Is that so?", "Check this: {c}",
            "Correct? {c}", "Is this right? {c}", "Do we know that {c}",
        )
    )
    return answered(
        with_context(dice, " ".join([fact.sentence for fact in facts]), frame.replace("{c}", claim)), answer
    )


def choose_category(dice: Dice) -> list[dict]:
    names = dice.sample(tuple(POOLS), dice.between(2, 4))
    asked = dice.pick(names)
    word = dice.pick(POOLS[asked])
    while sum(word in POOLS[name] for name in names) > 1:
        word = dice.pick(POOLS[asked])
    options = ", ".join(names)
    if dice.chance(0.3):
        words = dice.shuffled(
            [word, *[dice.pick([w for w in POOLS[name] if w not in POOLS[asked]]) for name in names if name != asked]]
        )
        frame = dice.pick(
            (
                "Which of these is of the kind {k}: {o}?", "Pick the {k}: {o}", "Find the {k}. {o}",
                "One is a {k}: {o}", "{o}: which one is the {k}?",
            )
        )
        return turns(frame.replace("{k}", asked).replace("{o}", ", ".join(words)), word)
    frame = dice.pick(
        (
            "Is {w} one of: {o}?", "Choose a label for {w}: {o}", "{w}\nLabels: {o}", "Which group fits {w}: {o}?",
            "Classify {w}. Options: {o}", "{o}: which is right for {w}?", "What kind is {w}? Choose: {o}",
            "Sort {w} into one of {o}.", "Pick one of {o} for {w}.", "Category of {w} ({o}):",
        )
    )
    return turns(frame.replace("{w}", word).replace("{o}", options), asked)


def route_message(dice: Dice) -> list[dict]:
    """Choose the label whose rule, given in the prompt, names a word of the message."""
    labels = dice.distinct(dice.pick((dice.invented, dice.invented_title, dice.word)), dice.between(2, 4))
    keys = dice.distinct(lambda: dice.pick(NOUNS), len(labels))
    index = dice.between(0, len(labels) - 1)
    arrows = (" -> ", ": ", " goes to ", " = ")
    rules = "; ".join([key + dice.pick(arrows) + label for key, label in zip(keys, labels, strict=True)])
    message = dice.pick(
        (
            "The {k} is broken.", "I lost my {k}.", "Where can I get a {k}?", "My {k} came late.",
            "Is the {k} still there?", "I want to give back the {k}.", "Who has seen the {k}?",
            "The {k} makes a noise.", "I never got the {k}.", "A {k}, please.",
        )
    ).replace("{k}", keys[index])
    rules = dice.pick(("Rules: ", "Labels: ", "", "Use: ", "Choose: ")) + rules
    message = dice.pick(("Message: ", "Text: ", "", "Mail: ")) + message
    return turns(f"{rules}\n{message}", labels[index])


def rewrite(dice: Dice) -> list[dict]:
    """One templated sentence said another way, with the way named."""
    giver, taker = dice.distinct(dice.first_name, 2)
    thing, place, day, time = dice.thing(), dice.site(), dice.weekday(), dice.clock()
    verb = dice.pick(["sold", "painted", "cleaned", "carried", "repaired", "moved", "opened", "closed", "packed", "opened", "lifted", "washed"])
    draw = dice.between(0, 5)
    if draw == 0:
        text, how, answer = (
            f"{giver} {verb} the {thing}.",
            ("Make it passive.", "Say it in the passive.", "Passive voice:", "Start with the thing."),
            f"The {thing} was {verb} by {giver}.",
        )
    elif draw == 1:
        text, how, answer = (
            f"The {thing} was {verb} by {giver}.",
            ("Make it active.", "Say it in the active.", "Active voice:", "Start with the person."),
            f"{giver} {verb} the {thing}.",
        )
    elif draw == 2:
        text, how, answer = (
            f"{giver} met {taker} in {place} on {day}.",
            ("Start with the day.", "Put the day first.", "Begin with the day."),
            f"On {day} {giver} met {taker} in {place}.",
        )
    elif draw == 3:
        text, how, answer = (
            f"{giver} {verb} the {thing} at {time}.",
            ("Make it a question.", "Ask when.", "Turn into a question about the time."),
            f"When was the {thing} {verb} by {giver}?",
        )
    elif draw == 4:
        text, how, answer = (
            f"{giver} {verb} the {thing}.",
            ("Say the opposite.", "Negate it.", "Say that it was not so.", "Deny it."),
            f"{giver} has not {verb} the {thing}.",
        )
    else:
        text, how, answer = (
            f"{giver} {verb} the {thing}.",
            (f"Replace {giver} by {taker}.", f"Say it of {taker}.", f"Now {taker} does it.", f"Same with {taker}."),
            f"{taker} {verb} the {thing}.",
        )
    return turns(f"{text}\n{dice.pick(how)}" if dice.chance(0.6) else f"{dice.pick(how)} {text}", answer)


def definition(dice: Dice) -> list[dict]:
    draw = dice.unit()
    if draw < 0.25:
        word, other = dice.pick(tuple(OPPOSITES.items()))
        if dice.chance(0.5):
            word, other = other, word
        return turns(
            dice.pick(
                (
                    "What is the opposite of {w}?", "Opposite of {w}:", "Not {w}, but", "{w}: the contrary?",
                    "The reverse of {w}?", "Give the opposite: {w}",
                )
            ).replace("{w}", word),
            other,
        )
    word = dice.pick(tuple(DEFINITIONS))
    meaning = capital(DEFINITIONS[word]) + "."
    if draw < 0.45:
        return turns(
            dice.pick(
                (
                    "Which word means: {d}", "What is the word for this? {d}", "{d} What is it?", "Name it: {d}",
                    "One word: {d}",
                )
            ).replace("{d}", meaning),
            word,
        )
    if draw < 0.6:
        word, size = dice.invented(), dice.pick(("kind of", "small", "large", "very old", "strange"))
        meaning = f"{size} {dice.pick(NOUNS)} made of {dice.material()}."
        question = dice.pick(("What is a {w}?", "Define {w}.", "Explain {w}.", "{w}?", "What does {w} mean?"))
        return turns(f"{capital(word)} means: a {meaning} {question.replace('{w}', word)}", f"A {meaning}")
    return turns(
        dice.pick(
            (
                "What is a {w}?", "Define {w}.", "What does {w} mean?", "Explain the word {w}.", "Meaning of {w}?",
                "Tell me what a {w} is.", "{w}: what is that?", "What do you call a {w}?",
                "Describe a {w} in a few words.", "Say what {w} means.",
            )
        ).replace("{w}", word),
        meaning,
    )


GREETINGS = {
    said: f"{said}! How can I help you?" for said in ("Hello", "Hi", "Good morning", "Good evening", "Good day", "Hey")
}
SMALL_TALK = (
    (
        ("Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Many thanks", "That helped, thank you"),
        "You are welcome.",
    ),
    (("Bye", "Goodbye", "See you", "Good night", "I have to go", "Until tomorrow"), "Goodbye!"),
    (("How are you", "How is it going", "Are you well", "How do you feel"), "I am fine, thank you."),
    (
        ("Who are you", "What is your name", "What are you", "Tell me who you are", "Introduce yourself"),
        "I am pocket, a small language model.",
    ),
    (
        ("What can you do", "How can you help me", "What are you good for", "What are you able to do"),
        "I can answer short questions about a text you give me.",
    ),
    (("Can you help me", "I need help", "Help me please", "May I ask you something"), "Of course. What do you need?"),
    (("Are you a person", "Are you human", "Is there a person I am talking to"), "No, I am a computer program."),
)


def dialogue(dice: Dice) -> list[dict]:
    """Greetings, thanks, and remembering what was said earlier in the conversation."""
    draw = dice.unit()
    end = dice.pick((".", "!", "", "?"))
    if draw < 0.1:
        greeting = dice.pick(tuple(GREETINGS))
        return turns(greeting + dice.pick((".", "!", "", ",")), GREETINGS[greeting])
    if draw < 0.25:
        said, answer = dice.pick(SMALL_TALK)
        return turns(dice.pick(said) + end, answer)
    if draw < 0.4:
        name = dice.person()
        said = dice.pick(
            (
                "My name is {n}.", "I am {n}.", "Call me {n}.", "Hello, {n} here.", "This is {n}.",
                "They call me {n}.", "I'm {n}, hello.", "You can call me {n}.", "{n} is my name.", "Hi, I am {n}.",
            )
        ).replace("{n}", name)
        messages = turns(said, f"Nice to meet you, {name}.")
        if dice.chance(0.7):
            messages += turns(
                dice.pick(
                    (
                        "What is my name?", "Who am I?", "Do you remember my name?", "What did I say I am called?",
                        "My name?",
                    )
                ),
                f"Your name is {name}.",
            )
        return messages
    fact = make_fact(dice)
    said = (
        dice.pick(
            (
                "Remember this: ", "Please note: ", "For later: ", "Keep in mind: ", "Note that down: ",
                "Do not forget: ", "Mark this: ",
            )
        )
        + fact.sentence
    )
    messages = turns(said, "Noted.")
    if dice.chance(0.5):
        talk, answer = dice.pick(SMALL_TALK)
        messages += turns(dice.pick(talk) + end, answer)
    return messages + turns(fact.question(dice), fact.value)


def pick_by_rule(dice: Dice) -> list[dict]:
    """If-then rules on one word: the answer is the phrase that the rule gives for this case."""
    cases = dice.distinct(dice.word, dice.between(2, 4))
    answers = dice.distinct(dice.phrase, len(cases))
    index = dice.between(0, len(cases) - 1)
    frame = dice.pick(
        (
            "If I say {c}, you say {a}.", "When you read {c}, answer {a}.", "To {c} the answer is {a}.",
            "{c} means {a}.", "On {c} reply {a}.", "{c}? Then {a}.",
        )
    )
    rules = " ".join(
        [tidy(frame.replace("{c}", case).replace("{a}", answer)) for case, answer in zip(cases, answers, strict=True)]
    )
    if dice.chance(0.5):
        return turns(cases[index], answers[index], system=rules)
    return turns(f"{rules}\n{dice.pick(('Now: ', 'I say ', '', 'Then: '))}{cases[index]}", answers[index])
