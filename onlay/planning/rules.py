"""Rules as data: conditions on named quantities, and of those that hold the one with the highest precedence.

Nothing in a rule is run.  A file of rules is checked when it is read: names, types, that every setting has one rule
without conditions, and that no two rules of one precedence can hold at once with different values.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Known: TypeAlias = str | bool | int | float
Situation: TypeAlias = Mapping[str, Known | None]
"""Name of each quantity to its value; None: unknown."""
UNKNOWN = "unknown"
_PLACE = re.compile(r"{(\w+)}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Quantity(_Strict):
    """What rules may speak of."""

    meaning: str = Field(min_length=1)
    words: tuple[str, ...] = Field((), strict=False)
    """That it may be; none: it is a number, or yes and no."""
    form: Literal["word", "count", "number", "share", "yes"] = "word"

    def show(self, value: Known) -> str:
        if isinstance(value, str | bool):
            return str(value)
        if self.form == "share":
            return f"{value:.0%}"
        return f"{value:,.0f}" if self.form == "count" else f"{value:.3g}"


class Bounds(_Strict):
    """Of a number."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def exclude(self, other: Bounds) -> bool:
        """Whether no number is within both.  `above: 3` and `at_most: 3` exclude each other."""
        low = max(self._low(), other._low())
        high = min(self._high(), other._high())
        return low > high

    def _low(self) -> tuple[float, int]:
        """With 1 where the number itself is left out: it then begins just above."""
        return max((_or(self.at_least, -math.inf), 0), (_or(self.above, -math.inf), 1))

    def _high(self) -> tuple[float, int]:
        return min((_or(self.at_most, math.inf), 0), (_or(self.below, math.inf), -1))


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


Condition: TypeAlias = Bounds | str | bool | list[str]


class Computed(_Strict):
    """A value that is made from a quantity."""

    quantity: str
    times: float = 1.0
    least: float | None = None
    most: float | None = None

    def made(self, value: float) -> float | int:
        number = min(max(value * self.times, _or(self.least, -math.inf)), _or(self.most, math.inf))
        # Two digits: nobody tells a learning rate of 2.86e-4 from one of 2.9e-4.
        return int(number) if float(number).is_integer() else float(f"{number:.2g}")


class Rule(_Strict):
    id: str = Field(min_length=1)
    setting: str
    when: dict[str, Condition] = {}
    needs: list[str] = []
    value: Computed | Known
    precedence: int = Field(0, ge=0)
    reason: str = Field(min_length=1)
    source: str = Field(min_length=1)

    @property
    def is_conditional(self) -> bool:
        return bool(self.when or self.needs)

    def holds(self, situation: Situation) -> bool:
        computed = [self.value.quantity] if isinstance(self.value, Computed) else []
        return all(situation[name] is not None for name in (*self.needs, *computed)) and all(
            _meets(situation[name], condition) for name, condition in self.when.items()
        )

    def advised(self, situation: Situation) -> Known:
        if not isinstance(self.value, Computed):
            return self.value
        number = situation[self.value.quantity]
        assert isinstance(number, int | float)
        return self.value.made(number)

    def explain(self, situation: Situation, *, quantities: Mapping[str, Quantity]) -> str:
        def shown(match: re.Match[str]) -> str:
            value = situation[match[1]]
            assert value is not None
            return quantities[match[1]].show(value)

        return _PLACE.sub(shown, self.reason)

    def contradicts(self, other: Rule) -> bool:
        """Whether both could hold, with different values, and neither has precedence."""
        if self.precedence != other.precedence or self.value == other.value:
            return False
        both = self.when.keys() & other.when.keys()
        return not any(_exclude(self.when[name], other.when[name]) for name in both)


def _meets(value: Known | None, condition: Condition) -> bool:
    if isinstance(condition, Bounds):
        return isinstance(value, int | float) and not isinstance(value, bool) and condition.hold(value)
    word: Known = UNKNOWN if value is None else value
    return word in condition if isinstance(condition, list) else word == condition


def _exclude(one: Condition, other: Condition) -> bool:
    if isinstance(one, Bounds) and isinstance(other, Bounds):
        return one.exclude(other)
    if isinstance(one, Bounds) or isinstance(other, Bounds):
        return True  # Bounds hold for numbers alone; of a number the other can only be `unknown`.
    return not set(_words(one)) & set(_words(other))


def _words(condition: Condition) -> list[Any]:
    return condition if isinstance(condition, list) else [condition]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    setting: str
    value: Known
    rule: str
    reason: str
    source: str
    overruled: tuple[Decision, ...] = ()
    """Other rules that held and said something else; the one without conditions is not among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    quantities: Mapping[str, Quantity]
    rules: tuple[Rule, ...]


def decide(setting: str, situation: Situation, *, rules: Rules) -> Decision:
    """The advice for one setting.  `situation` has every quantity."""
    holding = sorted(
        (rule for rule in rules.rules if rule.setting == setting and rule.holds(situation)),
        key=lambda rule: -rule.precedence,
    )

    def told(rule: Rule, overruled: tuple[Decision, ...] = ()) -> Decision:
        return Decision(
            setting=setting, value=rule.advised(situation), rule=rule.id, overruled=overruled,
            reason=rule.explain(situation, quantities=rules.quantities), source=rule.source,
        )  # fmt: skip

    winner = told(holding[0])
    others = (told(rule) for rule in holding[1:] if rule.is_conditional)
    return told(holding[0], tuple(other for other in others if other.value != winner.value))


def read_rules(values: Any, *, settings: Sequence[str]) -> Rules:
    """Rules from a parsed YAML file.  Raises ValueError for what is not sound."""
    try:
        quantities = {name: Quantity.model_validate(one) for name, one in values["quantities"].items()}
        rules = tuple(Rule.model_validate(one) for one in values["rules"])
    except ValidationError as error:
        raise ValueError(f"neither a rule nor a quantity: {error}") from None
    for name, quantity in quantities.items():
        if (quantity.form == "word") != bool(quantity.words):
            raise ValueError(f"{name} is either one of some words, or of another form")
    for rule in rules:
        _check(rule, quantities, settings)
    ids = [rule.id for rule in rules]
    if twice := next((one for one in ids if ids.count(one) > 1), None):
        raise ValueError(f"two rules are named {twice}")
    for setting in settings:
        mine = [rule for rule in rules if rule.setting == setting]
        if sum(not rule.is_conditional for rule in mine) != 1:
            raise ValueError(f"{setting} needs one rule without conditions")
        for one, other in itertools.combinations(mine, 2):
            if one.contradicts(other):
                raise ValueError(f"{one.id} and {other.id} can hold at once, with different values and one precedence")
    return Rules(quantities=quantities, rules=rules)


def _check(rule: Rule, quantities: Mapping[str, Quantity], settings: Sequence[str]) -> None:
    """Raises ValueError for names, words and bounds that mean nothing."""
    if rule.setting not in settings:
        raise ValueError(f"{rule.id}: {rule.setting} is not a setting")
    computed = [rule.value.quantity] if isinstance(rule.value, Computed) else []
    places = _PLACE.findall(rule.reason)
    for name in (*rule.when, *rule.needs, *computed, *places):
        if name not in quantities:
            raise ValueError(f"{rule.id}: {name} is not a quantity")
    for name, condition in rule.when.items():
        _check_condition(rule, name, condition, quantities[name])
    certain = {name for name, condition in rule.when.items() if UNKNOWN not in _words(condition)}
    for name in places:
        if name not in {*certain, *rule.needs, *computed}:
            raise ValueError(f"{rule.id}: the reason speaks of {name}, which may be unknown")


def _check_condition(rule: Rule, name: str, condition: Condition, quantity: Quantity) -> None:
    if isinstance(condition, Bounds):
        if quantity.form in ("word", "yes"):
            raise ValueError(f"{rule.id}: {name} is not a number")
        if condition == Bounds():
            raise ValueError(f"{rule.id}: {name} has no bound")
        return
    for word in _words(condition):
        fits = quantity.form == "yes" if isinstance(word, bool) else word in (*quantity.words, UNKNOWN)
        if not fits:
            raise ValueError(f"{rule.id}: {name} is never {word}")
