"""What is wrong with the text of one row: placeholders, broken characters, loops, refusals, other languages, listed terms.

Each detector passes by the ordinary row with a cheap question first.  They are made for precision: what is flagged in
good data costs trust.  Sources: the repetition filters of Gopher (Rae et al. 2021) for the idea of repeated sentences
over all text; ftfy's account of how UTF-8 read as Windows-1252 looks.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onlay.data.audit.languages import judge_languages, language_of, script_of
from onlay.data.audit.refusals import refuses
from onlay.data.read import Conversation, Document, Turn
from onlay.errors import DataError

__all__ = (
    "Terms", "check_texts", "judge_languages", "judge_openings", "language_of", "opening_of", "read_terms", "script_of",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------- placeholders

PLACEHOLDER_CHARACTERS = 60
PLACEHOLDER = re.compile(
    r"[\W_]*(?:(?:to ?do|tbd|tba|tbc|fixme)\b.*|n/a|n\.a\.|nan|null|placeholder(?: text| answer)?|xxx+|asdf\w*|qwerty|blah(?:[ ,]+blah)+"
    r"|(?:the |an? |your )?(?:answer|response|output|completion|content|text)(?: goes| comes)? here"
    r"|no (?:answer|response|output)(?: (?:provided|given|available))?|(?:to be|not yet) (?:written|filled in|done|answered|determined|decided|added)"
    r"|coming soon|\[?(?:redacted|removed|deleted|blank|empty)\]?)[\W_]*",
    re.IGNORECASE | re.DOTALL,
)
"""As the whole of a short answer.  `Na`, `none` and `undefined` are left out: they are true answers too often."""
DOTS = re.compile(r"[.…]+|-{3,}|_{2,}|\?{2,}")
GAP = re.compile(
    r"[\[<{](?:please )?(?:insert|enter|fill in)\b[^\[\]<>{}=\n]{1,60}[\]>}](?!\()"
    r"|[\[<{](?:the |an? )?(?:your |some )?(?:answer|response|text|code|content|output|completion)(?: goes| comes)? here[\]>}](?!\()"
    r"|(?<![{$\w>\"'=/])\{\{ ?[a-z][a-z_]* ?\}\}(?!\})",
    re.IGNORECASE,
)
"""A gap in a text that somebody was to fill in."""
MARKUP = re.compile(r"```|</|\{%|\{\{[#/]|v-|jinja|mustache|handlebars|\bvue\b|\btemplate\b", re.IGNORECASE)
"""Where {{name}} is code or is spoken of."""
OF_ITSELF = re.compile(
    r"\bas an? (?:ai\b(?! (?:engineer|researcher|expert|company|student|developer|practitioner|scientist|specialist|startup))"
    r"|artificial intelligence(?: language)? model|artificial intelligence,|(?:large |ai )?language model)"
    r"|\b(?:i am|i'm|i’m) (?:just |only |merely )an? (?:ai|(?:large )?language model|artificial intelligence)\b"
    r"|\bals (?:ein )?(?:ki(?:-\w+)?|(?:grosses |großes )?sprachmodell|künstliche intelligenz),? (?:habe|kann|bin|darf|verfüge|besitze)\b"
    r"|\ben tant qu(?:e modèle de langage|['’]ia|['’]intelligence artificielle|e modèle d['’]ia|['’]assistant ia)"
    r"|\bcomo (?:un |um )?(?:una? |uma )?(?:modelo de (?:lenguaje|linguagem|ia)|inteligencia artificial|inteligência artificial|ia),"
    r"|\bin quanto (?:modello linguistico|ia|intelligenza artificiale)|\bcome modello linguistico"
    r"|\bкак (?:языковая модель|искусственный интеллект|ии)\b"
    r"|作为(?:一个|一名|一款)?(?:ai|人工智能|大?型?语言模型)|aiとして|言語モデルとして|ai 언어 모델로서"
)
ITSELF_HINTS = ("as a", " ai", "i’m", "i'm", "i am", "modèle", "qu'i", "qu’i", "modelo", "como", "als ", "quanto", "modello", "как ", "作为", "として", "로서")  # fmt: skip


def is_placeholder(answer: str, *, prompt: str = "") -> bool:
    """Whether an answer stands for one that was never written, has a gap left open, or speaks of being a model."""
    text = answer.strip()
    if len(text) <= PLACEHOLDER_CHARACTERS and (PLACEHOLDER.fullmatch(text) or DOTS.fullmatch(text)):
        return True
    lower = text.lower()
    if ("{" in text or "[" in text or "<" in text) and (gap := GAP.search(text)):
        # A prompt that has the gap itself asks for it, and code has such gaps of its own.
        asked = gap.group(0).lower() in prompt.lower() or (
            gap.group(0).startswith("{{") and MARKUP.search(prompt + text)
        )
        if not asked:
            return True
    if "lorem ipsum" in lower and "lorem" not in prompt.lower() and "placeholder" not in prompt.lower():
        return True
    return any(hint in lower for hint in ITSELF_HINTS) and OF_ITSELF.search(lower) is not None


# ----------------------------------------------------------------------------------------------------------- encoding

CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
"""White space (also \\x0b and \\x0c) and the escape of terminals are left out: true text has them."""
_CONT = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
"""What bytes 0x80 to 0xBF become when read as Latin-1 or Windows-1252: all but the first byte of a UTF-8 character."""
_SAFE = "[\x80-\x9f\xa1-\xa7\xac\xad\xaf\xb1\xb4-\xb6\xb8\xbc-\xbf€ƒ†‡ˆ‰ŠŒŽ˜šœžŸ]"
"""Of these, the ones that no true text puts after a capital: no quotes, dashes, dots, degrees, marks of trade or ordinals."""
_CONT_1251 = "[ЂЃ‚ѓ„…†‡€‰Љ‹ЊЌЋЏђ‘’“”•–—™љ›њќћџ\xa0ЎўЈ¤Ґ¦§Ё©Є«¬\xad®Ї°±Ііґµ¶·ё№є»јЅѕї]"
MOJIBAKE = re.compile(
    "[\x80-\x84\x86-\x9f\ud800-\udfff\ufffd\ufffe\uffff]"  # C1 controls, halves of pairs, the replacement character
    f"|[ÂÃ]{_SAFE}"  # Â£ Ã© Ã¼
    f"|(?<=[a-zà-öø-ÿ])[ÂÃÄÅ]{_CONT}|[ÂÃÄÅ]{_CONT}(?=[a-zß-öø-ÿ])"  # a capital within a word: cafÃ©, piÄ™Ä‡
    "|(?<![A-ZÀ-Þ])Â[\xa0\xb0\xae\xa9\xab\xbb·²³ºª]"  # Â° Â» and Â before a space that does not break
    f"|â[€‚„ˆ\x80\x82\x84\x86]{_CONT}|â[€„][ \"'¢]"  # â€™ â€œ â‚¬ â„¢
    f"|ã[€‚ƒ\x80-\x83]{_CONT}|ðŸ|ï»¿|ï¿½|ï¼{_CONT}"  # kana, emoji, byte order mark, wide signs
    f"|(?:[ÐÑ]{_CONT}){{2}}|(?:[ÎÏ]{_CONT}){{2}}|(?:[ØÙ]{_CONT}){{2}}|(?:×{_CONT}){{2}}"  # Cyrillic, Greek, Arabic, Hebrew
    f"|(?:[ä-é]{_CONT}{{2}}){{2}}|(?:á[º»]{_CONT}|Æ°|Ä‘){_CONT}*[^\\s]*á[º»]{_CONT}"  # Han, Vietnamese
    f"|(?:[РС]{_CONT_1251}){{3}}"  # Cyrillic once more, read as Windows-1251
)


def is_broken(text: str) -> bool:
    """Whether a text holds characters that a wrong encoding left: mojibake, replacement or control characters, halves of pairs."""
    if not text.isprintable() and CONTROL.search(text):
        return True
    return not text.isascii() and MOJIBAKE.search(text) is not None


# --------------------------------------------------------------------------------------------------------- repetition

LONGEST_PERIOD = 60
"""Words, or letters of a text without spaces."""
LEAST_COPIES = 4
LEAST_LOOP_WORDS = 12
"""A loop is one stretch of words LEAST_COPIES times in a row, this many words in all beyond the first copy; for letters twice as many."""
LEAST_SENTENCE_CHARACTERS, LEAST_SENTENCE_WORDS = 24, 4
ONE_SENTENCE_SHARE, SENTENCES_SHARE = 0.5, 0.75
"""Or one sentence or line LEAST_COPIES times, anywhere, which together are this share of the text; or several such."""
LONG_WORD = 40
MARKS = ".,;:!?\"'()"
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
SENTENCES = re.compile(r"[\n.!?。！？]+")
ENUMERATION = re.compile(r"^\W*(?:\d+\W+)?")


def repeats_itself(text: str) -> bool:
    """Whether a text loops: the same words or letters over and over in a row, or one sentence as most of it.

    Tables, fenced code and stretches without letters are left out; lists whose lines begin alike and refrains are not loops.
    """
    words = text.split()
    if not _has_twins(words) and (len(text) < LONG_WORD or max(map(len, words), default=0) < LONG_WORD):
        return False
    if "```" in text:
        text = FENCED.sub(" ", text)
    lines = [line for line in text.splitlines() if line.count("|") < 2 and "\t" not in line.strip()]
    words = [word for line in lines for word in line.split() if word.isalnum() or any(map(str.isalnum, word))]
    if _loops(words, least=LEAST_LOOP_WORDS):
        return True
    if any(len(word) >= LONG_WORD and _loops(word, least=2 * LEAST_LOOP_WORDS) for word in words):
        return True
    return _says_the_same("\n".join(lines))


def _has_twins(words: Sequence[str]) -> bool:
    """Whether enough stretches of three words occur again for there to be a loop or a sentence said four times."""
    threes = max(0, len(words) - 2)
    return threes - len(set(zip(words, words[1:], words[2:], strict=False))) >= LEAST_COPIES + 1


def _loops(units: Sequence[str], *, least: int) -> bool:
    """Whether some stretch comes LEAST_COPIES times in a row, of which the copies have at least `least` units and a letter."""
    if len(units) <= least:
        return False
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(unit, len(numbers)) for unit in units], dtype=np.int32)
    for period in range(1, min(LONGEST_PERIOD, len(ids) // LEAST_COPIES) + 1):
        needed = max(least, (LEAST_COPIES - 1) * period)
        same = ids[period:] == ids[:-period]
        if np.count_nonzero(same) < needed:  # Most texts have no such period: no need to look for where it is.
            continue
        other = np.flatnonzero(~same)
        edges = np.concatenate(([-1], other, [len(ids) - period]))
        gaps = np.diff(edges) - 1
        for place in np.flatnonzero(gaps >= needed).tolist():
            began = int(edges[place]) + 1
            if any(unit.strip(MARKS).isalpha() for unit in units[began : began + period]):
                return True
    return False


def _says_the_same(text: str) -> bool:
    """Whether sentences said LEAST_COPIES times or more are most of a text."""
    sentences = [ENUMERATION.sub("", part, count=1).strip() for part in SENTENCES.split(text)]
    total = sum(map(len, sentences))
    shares = [
        copies * len(sentence) / total
        for sentence, copies in Counter(sentences).items()
        if copies >= LEAST_COPIES and len(sentence) >= LEAST_SENTENCE_CHARACTERS and _is_of_words(sentence)
    ]
    return max(shares, default=0.0) >= ONE_SENTENCE_SHARE or sum(shares) >= SENTENCES_SHARE


def _is_of_words(sentence: str) -> bool:
    """And not of numbers, markup or code."""
    return sum(word.strip(MARKS).isalpha() for word in sentence.split()) >= LEAST_SENTENCE_WORDS


# ---------------------------------------------------------------------------------------------------- openings, language

OPENING_WORDS = 4
LEAST_ANSWER_WORDS = 8
OPENING_SHARE = 0.02
LEAST_OPENINGS = 10
OTHER_LANGUAGE = re.compile(
    r"translat|übersetz|tradui|traduz|traduc|vertaal|przetłumacz|перевед|перевод|翻译|翻譯|翻訳|訳して|번역|language|sprache|langue|idioma|lingua"
    r"|\b(?:english|german|french|spanish|italian|portuguese|dutch|(?-i:Polish)|czech|swedish|danish|romanian|hungarian|turkish|russian"
    r"|chinese|mandarin|cantonese|japanese|korean|arabic|hebrew|greek|hindi|bengali|thai|vietnamese|latin|ukrainian|persian|urdu)\b"
    r"|englisch|deutsch|französisch|spanisch|anglais|allemand|français|espagnol|inglés|alemán|francés|español|inglês|inglese"
    r"|на английск|на русск|英语|英文|中文|汉语|英語|日本語|영어|한국어",
    re.IGNORECASE,
)
"""A prompt that speaks of a language may well want its answer in one."""


def opening_of(item: Conversation | Document) -> str | None:
    """The first OPENING_WORDS words of the row's first answer, lower case; None for documents and short answers."""
    answer = next((turn.content for turn in _answers(item)), "") if isinstance(item, Conversation) else ""
    words = answer[:400].split(maxsplit=LEAST_ANSWER_WORDS)
    if len(words) < LEAST_ANSWER_WORDS:
        return None
    return " ".join(words[:OPENING_WORDS]).casefold().strip(".,;:!?*#\"'“”")


def judge_openings(counts: Mapping[str, int], *, rows: int) -> set[str]:
    """The openings that LEAST_OPENINGS rows or more, and OPENING_SHARE of all `rows`, have."""
    least = max(LEAST_OPENINGS, OPENING_SHARE * rows)
    return {opening for opening, count in counts.items() if count >= least}


def mixes_languages(prompt: str, answer: str) -> bool:
    """Whether an answer is in another language or script than its prompt, which does not ask for one.

    Code and short texts have no language here.
    """
    answered = language_of(FENCED.sub(" ", answer) if "```" in answer else answer)
    if answered is None or (asked := language_of(prompt)) is None or asked == answered:
        return False
    return OTHER_LANGUAGE.search(prompt) is None


# -------------------------------------------------------------------------------------------------------------- terms

WORDS = re.compile(r"\w+")
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
)
"""Scripts that put no space between words: there a term is found anywhere in the text."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Words and phrases to flag, folded; picklable.  Made by `read_terms`."""

    by_word: dict[str, tuple[str, ...]]
    """First word of a term to the terms that begin with it."""
    by_sign: dict[str, tuple[str, ...]]
    """First character of a term without word limits (no letters, or a script without spaces) to the terms."""

    def found_in(self, text: str) -> list[str]:
        """The terms that a text holds, folded, as whole words and in order of the alphabet."""
        folded = fold(text)
        found = []
        for word in self.by_word.keys() & set(WORDS.findall(folded)):
            for term in self.by_word[word]:
                if term == word or re.search(rf"(?<!\w){re.escape(term)}(?!\w)", folded):
                    found.append(term)
        for sign in self.by_sign.keys() & set(folded) if self.by_sign else ():
            found += [term for term in self.by_sign[sign] if term in folded]
        return sorted(found)


def fold(text: str) -> str:
    """NFKC, case folded, single spaces."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def read_terms(path: Path | str) -> Terms:
    """Terms of a UTF-8 file, one a line; empty lines and lines that begin with `#` are passed by.  Raises DataError."""
    remedy = "A file of terms is UTF-8 text with one word or phrase a line."
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"The file of terms {path} is not UTF-8 text.", remedy) from None
    except OSError as error:
        raise DataError(f"The file of terms {path} cannot be read: {error.strerror}.", remedy) from None
    by_word: dict[str, list[str]] = {}
    by_sign: dict[str, list[str]] = {}
    for term in dict.fromkeys(fold(line) for line in lines if not line.lstrip().startswith("#")):
        word = WORDS.search(term)
        if term and (word is None or UNSPACED.search(term)):
            by_sign.setdefault(term[0], []).append(term)
        elif word:
            by_word.setdefault(word.group(), []).append(term)
    if not by_word and not by_sign:
        raise DataError(f"The file of terms {path} holds no terms.", remedy)
    return Terms(
        {word: tuple(terms) for word, terms in by_word.items()}, {sign: tuple(terms) for sign, terms in by_sign.items()}
    )


# ---------------------------------------------------------------------------------------------------------------- row


def check_texts(item: Conversation | Document, *, terms: Terms | None = None) -> list[str]:
    """The codes (onlay.data.audit.catalogue) of what is wrong with this row's texts, each once.

    Answers that are not trained are not judged as answers; every text of the row is searched for broken characters and terms.
    """
    codes = dict.fromkeys(_of_document(item.text) if isinstance(item, Document) else _of_answers(item))
    texts = list(_texts(item))
    if any(map(is_broken, texts)):
        codes["broken_encoding"] = None
    if terms is not None and any(terms.found_in(text) for text in texts):
        codes["listed_terms"] = None
    return list(codes)


def _of_document(text: str) -> Iterator[str]:
    if len(text) <= PLACEHOLDER_CHARACTERS and (PLACEHOLDER.fullmatch(text.strip()) or DOTS.fullmatch(text.strip())):
        yield "placeholder_answer"
    if repeats_itself(text):
        yield "repetition"


def _of_answers(item: Conversation) -> Iterator[str]:
    prompt = ""
    for turn in item.turns:
        if turn.role == "user":
            prompt = turn.content
        if turn.role != "assistant" or not turn.trained:
            continue
        if (turn.content and repeats_itself(turn.content)) or (turn.reasoning and repeats_itself(turn.reasoning)):
            yield "repetition"
        if not turn.content.strip():
            continue
        if is_placeholder(turn.content, prompt=prompt):
            yield "placeholder_answer"
        if refuses(turn.content):
            yield "refusals"
        if mixes_languages(prompt, turn.content):
            yield "language_mix"


def _answers(item: Conversation) -> Iterator[Turn]:
    return (turn for turn in item.turns if turn.role == "assistant" and turn.trained and turn.content.strip())


def _texts(item: Conversation | Document) -> Iterator[str]:
    if isinstance(item, Document):
        yield item.text
        return
    for turn in item.turns:
        yield turn.content
        if turn.reasoning:
            yield turn.reasoning
