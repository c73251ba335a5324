"""What only a base can tell of rows: their tokens and masks, and which answers it knows already.

Each scored row is told by two numbers of one forward pass, with the base's own template and over the trained tokens alone:

    loss    nats per trained token
    greedy  whether every trained token is the likeliest one at its place; then the base's greedy answer is this answer,
            token for token, and no generation is needed to know it

A row is known to the base when it is greedy, or its loss is at most KNOWN_NATS.  Else it is beyond the base's reach when
its loss is far above those of the file's other rows: a modified z-score, (loss - median) / (1.4826 MAD), above FAR, the usual
bound of Iglewicz and Hoaglin (1993).  A median and its deviation are not moved by the rows that they are to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from onlay.errors import DataError
from onlay.recipe import DataSection, ModelSection, Recipe
from onlay.records import Distribution, Finding
from onlay.stages.events import Loading, Report, silent

if TYPE_CHECKING:
    import numpy as np

    from onlay.data.audit.catalogue import Tally
    from onlay.data.audit.masks import PlacedItem
    from onlay.data.template import ChatTemplate

KNOWN_NATS = 0.1
"""A mean probability of 0.9 a token: what the base writes anyway but for a word."""
FAR = 3.5
FEWEST_ROWS = 20
"""Of fewer losses no spread is worth a judgement; then no row is called beyond reach."""
MOST_ROWS = 1000
"""Rows scored, drawn with the seed from all: a file is judged well by a thousand, and a base is slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFindings:
    """What goes into the Audit beside what the Tally was given."""

    base: str
    """The base's name, for Audit.base."""
    tokens: int
    """Of the rows as `prepare` would keep them."""
    trained_tokens: int
    findings: list[Finding]
    """About the template, and what it had to change in rows."""
    distributions: list[Distribution]
    """tokens, answer_tokens, trained_share; with `known` base_loss."""
    measures: dict[str, float]
    """trained_share, max_tokens, ...; with `known` base_rows_scored, base_loss_median, known_share, beyond_base_nats."""
    told: dict[str, dict[str, object]]
    """By code, what fills the {names} of the catalogue's messages."""


def examine_with_base(
    items: Iterable[PlacedItem],
    *,
    files: Sequence[str],
    rows: int,
    base: ModelSection,
    section: DataSection,
    tally: Tally,
    known: bool = False,
    limit: int = MOST_ROWS,
    seed: int = 0,
    report: Report = silent,
) -> BaseFindings:
    """Tokenizes rows with the base's tokenizer and template, checks their masks and, with `known`, what the base knows.

    `items`: the readable training rows as (source, row number, item), read once; `files`: the sources' paths, by
    `source`; `rows`: how many items there will be.  `section`: its template, loss_on, max_tokens and overlong are used.
    Rows go into `tally` under overlong_rows, no_trained_tokens, end_not_trained, little_trained, template_refused and
    round_trip_failed; with `known` also known_by_base and beyond_base, of at most `limit` rows drawn with `seed`.
    Without `known` no weights are read.  A classification head reads texts and labels, not turns: not for that method.
    Raises OnlayError for a base or template that cannot be used, and data.max_tokens beyond the base's context.
    """
    from onlay.data.audit.masks import check_masks
    from onlay.data.build import resolve_max_tokens
    from onlay.data.template import ChatTemplate
    from onlay.model.facts import read_facts
    from onlay.model.tokenizer import load_tokenizer
    from onlay.stages.answering import open_model

    facts = read_facts(base, progress=lambda done, total: report(Loading("fetching the base", done, total)))
    max_tokens = resolve_max_tokens(Recipe(model=base, data=section), facts.context_tokens)
    # A base that does not fit is told before a large file is tokenized.
    opened = open_model(base, {}, report=report) if known else None
    tokenizer = opened.tokenizer if opened else load_tokenizer(facts, trust_remote_code=base.trust_remote_code)
    template = ChatTemplate(tokenizer, template=section.template, loss_on=section.loss_on)
    sample: list[PlacedItem] = []
    wanted = _draw(rows, limit=limit, seed=seed) if known else set()
    masks = check_masks(
        _noting(items, wanted, sample), template, max_tokens=max_tokens, overlong=section.overlong, tally=tally,
        progress=lambda done: report(Loading("tokenizing rows", done, rows)),
    )  # fmt: skip
    distributions, measures, told = list(masks.distributions), dict(masks.measures), dict(masks.told)
    if opened is not None:
        scored = known_rows(
            sample, template, model=opened.model, max_tokens=max_tokens, overlong=section.overlong, tally=tally,
            progress=lambda done, total: report(Loading("asking the base", done, total)),
        )  # fmt: skip
        distributions += scored.distributions
        measures |= scored.measures
        told |= {code: {"scored": f"{len(scored.losses):,}"} for code in ("known_by_base", "beyond_base")}
    return BaseFindings(
        base=facts.name, tokens=masks.tokens, trained_tokens=masks.trained_tokens, findings=masks.findings(files),
        distributions=distributions, measures=measures, told=told,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Knowledge:
    """Arrays with one entry for each scored row, in the order of `places`."""

    places: list[tuple[int, int]]
    """(source, row number)."""
    losses: np.ndarray
    """float64: nats per trained token."""
    greedy: np.ndarray
    """bool"""
    known: np.ndarray
    """bool"""
    beyond: np.ndarray
    """bool"""
    beyond_nats: float | None
    """The loss above which a row is beyond reach; None where there were too few rows, or no spread, to say."""

    @property
    def distributions(self) -> list[Distribution]:
        from onlay.data.audit.statistics import distribution_of

        found = distribution_of(self.losses, name="base_loss", unit="nats a token")
        return [found] if found is not None else []

    @property
    def measures(self) -> dict[str, float]:
        import numpy as np

        found = {"base_rows_scored": float(len(self.losses))}
        if len(self.losses):
            found["base_loss_median"] = float(np.median(self.losses))
            found["known_share"] = float(self.known.mean())
        if self.beyond_nats is not None:
            found["beyond_base_nats"] = self.beyond_nats
        return found


def known_rows(
    items: Sequence[PlacedItem],
    template: ChatTemplate,
    *,
    model: Any,
    max_tokens: int,
    overlong: str,
    tally: Tally,
    progress: Callable[[int, int], None] | None = None,
) -> Knowledge:
    """How well a loaded base expects the answers of rows.  Rows that `prepare` would drop, and such that train nothing,
    are not scored.  Adds known_by_base and beyond_base to the tally.  Raises ProofError for losses that are not finite."""
    import numpy as np

    from onlay.data.audit.beginnings import encode_beginnings
    from onlay.data.audit.masks import examples_of
    from onlay.evaluation.likelihood import Passage, passages_of_examples, row_nats
    from onlay.model.tokenizer import pad_token_id

    refused: dict[int, DataError] = {}
    decode = partial(template.tokenizer.decode, skip_special_tokens=True)
    encoded, _ = encode_beginnings(template, [item for _, _, item in items], max_tokens=max_tokens, refused=refused)
    places: list[tuple[int, int]] = []
    passages: list[Passage] = []
    for (source, number, _), one in zip(items, encoded, strict=True):
        windows = examples_of(one, max_tokens=max_tokens, overlong=overlong)
        if any(any(trained) for _, trained in windows):
            parts = passages_of_examples(windows, decode=decode)
            places.append((source, number))
            passages.append(Passage(tuple(windows), sum(part.bytes for part in parts)))
    nats = row_nats(model, passages, pad_token_id=pad_token_id(template.tokenizer), progress=progress)
    losses = nats.nats / nats.tokens if passages else np.zeros(0)
    known = nats.greedy | (losses <= KNOWN_NATS)
    bound = far_above(losses)
    beyond = (losses > bound) & ~known if bound is not None else np.zeros(len(losses), dtype=bool)
    for code, flags in (("known_by_base", known), ("beyond_base", beyond)):
        for index in np.flatnonzero(flags).tolist():
            tally.add(code, source=places[index][0], number=places[index][1])
    return Knowledge(places=places, losses=losses, greedy=nats.greedy, known=known, beyond=beyond, beyond_nats=bound)


def far_above(losses: np.ndarray) -> float | None:
    """The loss whose modified z-score is FAR; None for fewer than FEWEST_ROWS losses, or where half of them are equal."""
    import numpy as np

    if len(losses) < FEWEST_ROWS:
        return None
    median = float(np.median(losses))
    deviation = float(np.median(np.abs(losses - median)))
    return median + FAR * 1.4826 * deviation if deviation > 0 else None


def _draw(rows: int, *, limit: int, seed: int) -> set[int]:
    """Which of `rows` are scored: all, or `limit` of them."""
    import numpy as np

    if rows <= limit:
        return set(range(rows))
    return set(np.random.default_rng(seed).choice(rows, limit, replace=False).tolist())


def _noting(items: Iterable[PlacedItem], wanted: set[int], into: list[PlacedItem]) -> Iterator[PlacedItem]:
    """Passes items on, and keeps those whose place in the order is wanted."""
    for index, item in enumerate(items):
        if index in wanted:
            into.append(item)
        yield item
