"""Which script a text is in, and which of the large European languages: by code points and by stop words, without a model.

Only what can be told with confidence is told: a text with few letters or few stop words has no language here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from string import ascii_letters

import numpy as np

LEAST_LETTERS = 12
"""Fewer letters than this say nothing of the script."""
LEAST_STOP_WORDS = 3
"""Different stop words of one language, and twice as many as of any other, name the language."""
LOOKED_AT_CHARACTERS = 2000
MAIN_SHARE = 0.9
"""A language that this share of the rows is in is the data's language; the others are then worth a look."""
SCRIPTS = (
    (0x0000, ""), (0x0041, "latin"), (0x005B, ""), (0x0061, "latin"), (0x007B, ""), (0x00C0, "latin"), (0x0250, ""),
    (0x0370, "greek"), (0x0400, "cyrillic"), (0x0530, "armenian"), (0x0590, "hebrew"), (0x0600, "arabic"), (0x0700, ""),
    (0x0750, "arabic"), (0x0780, ""), (0x08A0, "arabic"), (0x0900, "devanagari"), (0x0980, "bengali"),
    (0x0A00, "gurmukhi"), (0x0A80, "gujarati"), (0x0B00, "oriya"), (0x0B80, "tamil"), (0x0C00, "telugu"),
    (0x0C80, "kannada"), (0x0D00, "malayalam"), (0x0D80, "sinhala"), (0x0E00, "thai"), (0x0E80, "lao"),
    (0x0F00, "tibetan"), (0x1000, "burmese"), (0x10A0, "georgian"), (0x1100, "hangul"), (0x1200, "ethiopic"),
    (0x1380, ""), (0x1780, "khmer"), (0x1800, ""), (0x1E00, "latin"), (0x1F00, "greek"), (0x2000, ""),
    (0x3041, "kana"), (0x3130, "hangul"), (0x3190, ""), (0x3400, "han"), (0x4DC0, ""), (0x4E00, "han"), (0xA000, ""),
    (0xAC00, "hangul"), (0xD7B0, ""), (0xF900, "han"), (0xFB00, ""), (0xFB50, "arabic"), (0xFE00, ""),
    (0xFE70, "arabic"), (0xFF00, ""), (0xFF66, "kana"), (0xFFA0, ""), (0x20000, "han"), (0x32000, ""),
)  # fmt: skip
"""First code point of each block and its script; the empty name is for digits, marks, symbols and the rest."""
STOP_WORDS = {
    "en": "the and of to is in that it for with as was on are this be by from or an at which not have has you your they"
    " their what how can will would there when who if but we he she his her all more about into these some than"
    " my me do does did one no so too very been were could should may any each only just then before after over out up"
    " because without between while where why also such it's don't i'm please give tell make like get need know want",
    "de": "der die das und ist nicht ein eine einen einem einer zu den dem des mit von für auf im sich als auch es wird"
    " sind wie oder ich sie wir ihr bei nach kann aus werden aber wenn noch durch um über dass haben hat zum zur",
    "fr": "le la les des et est un une dans que qui pour pas sur ne se au aux avec ce cette ces il elle nous vous je par"
    " plus sont ou mais comme être leur son ses du sa en à où été votre peut fait c'est d'un d'une",
    "es": "el la los las y es en un una que de del para por con no se su sus al lo como más pero este esta son ser está"
    " fue o cuando muy sin sobre también hay yo tu mi qué cómo donde porque entre desde todo ha",
    "pt": "o os as e é em um uma que do da dos das para por com não se na no nas nos ao à mais mas como seu sua são ser"
    " foi ou quando muito sem sobre também você eu meu isso este esta pelo pela está tem ele ela",
    "it": "il lo la gli le è un una che di del della dei delle in per con non si da al alla sono come più ma anche questo"
    " questa essere o nel nella suo sua cosa perché quando io tu ha ho dal dalla sul ogni ci",
    "nl": "de het een en van is dat die in te op met voor niet zijn er aan ook als bij door maar om naar uit of wordt dit"
    " kan worden deze hebben heeft ik je hij zij wij wat hoe nog over tot meer geen dan werd",
    "pl": "i w na z do nie się jest to że o jak dla od po ale czy który która które są przez co tym oraz lub może być ma"
    " tak za ich jego jej był była było przy też tylko już gdy we ze bardzo jako",
    "cs": "a v na je se že to s z do o k pro jako ale by jsou si po od jeho její která který které také jak nebo být bude"
    " byl byla bylo za při podle více co tak už než jen může aby u ve ze mezi když",
    "sv": "och att är ett som för till inte jag från eller så ska hur vad när också mycket denna detta finns nu över mer"
    " alla bara där här hade skulle blir vara mycket andra några sig än",
    "da": "og at er et af for til ikke jeg fra eller så skal hvordan hvad når også meget denne dette nu over mere bare"
    " blev blive der her havde skulle være andre nogle sig end",
    "ro": "și în de la cu pe nu este un o că se din pentru care mai sau ce sunt fi a ai ale lui ei au fost dar ca prin"
    " această acest cum când după foarte între fie toate poate să",
    "hu": "a az és hogy nem egy van is de ez meg csak mint már vagy be volt ki ha el fel még azt aki ami kell lehet nagyon"
    " itt ott minden után között szerint pedig mert így úgy",
    "tr": "ve bir bu da de için ile olarak çok daha olan gibi en ne ya veya ama kadar sonra var değil mi her ise o ben sen"
    " biz şu göre nasıl neden diye olduğu ancak tüm",
}
"""The commonest words; one may be in several languages and then counts for each.  Norwegian counts as Danish here."""


@cache
def _blocks() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """First code points, the number of each block's script, and the scripts' names."""
    names = tuple(dict.fromkeys(name for _, name in SCRIPTS))
    starts = np.array([start for start, _ in SCRIPTS], dtype=np.uint32)
    return starts, np.array([names.index(name) for _, name in SCRIPTS], dtype=np.int64), names


@cache
def _stop_words() -> tuple[frozenset[str], dict[str, tuple[str, ...]]]:
    languages: dict[str, list[str]] = {}
    for language, words in STOP_WORDS.items():
        for word in words.split():
            languages.setdefault(word, []).append(language)
    return frozenset(languages), {word: tuple(names) for word, names in languages.items()}


def script_of(text: str) -> str | None:
    """The script that most letters of the text's beginning are in, such as `latin` or `han`; `japanese` for kana with han.

    None where there are fewer than LEAST_LETTERS letters; every sign of a script without an alphabet counts as three.
    """
    text = text[:LOOKED_AT_CHARACTERS]
    if text.isascii():
        # As good as all of it is letters: no need to count what is plainly enough.
        letters = len(text) - len(text.encode().translate(None, ascii_letters.encode()))
        return "latin" if letters >= LEAST_LETTERS else None
    starts, numbers, names = _blocks()
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    counts = np.bincount(numbers[np.searchsorted(starts, points, side="right") - 1], minlength=len(names))
    counts[0] = 0
    by_name = dict(zip(names, counts.tolist(), strict=True))
    signs = by_name["han"] + by_name["kana"] + by_name["hangul"]
    if sum(by_name.values()) + 2 * signs < LEAST_LETTERS:
        return None
    if by_name["kana"] * 10 >= by_name["kana"] + by_name["han"] > by_name["latin"] // 3:
        return "japanese"
    by_name.update({name: 3 * by_name[name] for name in ("han", "kana", "hangul")})
    return max(by_name, key=by_name.__getitem__)


@lru_cache(maxsize=2)  # Of an answer it is asked twice: beside its prompt, and for its row.
def language_of(text: str) -> str | None:
    """The language of a Latin text (`en`, `de` ..., see STOP_WORDS), the script of any other; None where it is not clear."""
    script = script_of(text)
    if script != "latin":
        return script
    known, languages = _stop_words()
    found = known.intersection(text[:LOOKED_AT_CHARACTERS].lower().split())
    if len(found) < LEAST_STOP_WORDS:
        return None
    counts: dict[str, int] = {}
    for word in found:
        for language in languages[word]:
            counts[language] = counts.get(language, 0) + 1
    best = max(counts, key=counts.__getitem__)
    most = counts.pop(best)
    return best if most >= LEAST_STOP_WORDS and most >= 2 * max(counts.values(), default=0) else None


def judge_languages(counts: Mapping[str, int]) -> set[str]:
    """Of the rows' languages, those that are not the data's own: none where no language has MAIN_SHARE of the rows."""
    rows = sum(counts.values())
    main = max(counts, key=counts.__getitem__, default=None)
    if main is None or counts[main] < MAIN_SHARE * rows:
        return set()
    return set(counts) - {main}
