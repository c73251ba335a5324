"""The rounds of a synthesis: ask for tasks, refuse what is poor or known, ask for answers, refuse again, write.

    seeds + tasks made so far ──8 prompts──▶ tasks ──filter──▶ answers ──filter──▶ (judge) ──▶ rows

A round is a function of its number, the settings and the rows made before it, whatever number of rows was asked for: so a
second call with more rows goes on where the first ended.  After Self-Instruct (Wang et al. 2022, arXiv 2212.10560).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onlay.data.audit.texts import check_texts
from onlay.data.read import Conversation, Turn
from onlay.data.synthesis.filters import Filter, LongestCommon, Words, answer_refusal
from onlay.data.synthesis.prompts import (
    Written,
    answer_prompt,
    judge_prompt,
    read_answer,
    read_score,
    read_tasks,
    tasks_prompt,
    template_digest,
)
from onlay.data.synthesis.replies import Replies, Voice
from onlay.data.synthesis.seeds import Seeds, Task
from onlay.errors import DataError, OutputError
from onlay.records import write_whole

REQUESTS_A_ROUND = 8
MADE_SHARE = 4
"""Of the tasks that a prompt shows, one in so many is a made one, as soon as there are any."""
WORKED_EXAMPLES = 3
"""Seeds that are shown with their answers when an answer is asked for."""
DRY_ROUNDS = 3
"""So many rounds in a row without a new row end the synthesis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the rows depend on, besides the seeds and who is asked."""

    seed: int = 0
    shown: int = 8
    """Tasks that a prompt shows, at most."""
    temperature: float = 0.7
    """Of the tasks; answers and grades are asked for at 0."""
    max_new_tokens: int = 1024
    most_alike: float = 0.7
    """ROUGE-L's F with any other task from which on a task is no new one."""
    least_score: int = 4
    """Of the judge's grades 1 to 5, the least that is accepted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """Who is asked, and how texts are compared: handed down."""

    model: Voice
    judge: Voice | None = None
    words: Words
    longest_common: LongestCommon


@dataclass(kw_only=True, slots=True)
class Made:
    """Rows made so far, and what was refused."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0
    shortened: int = 0
    """Prompts that show fewer tasks than the settings say, for want of room."""
    stopped: str | None = None
    """Why there are fewer rows than asked for."""

    @property
    def reasons(self) -> dict[str, int]:
        """Refused ones by reason, most often first."""
        return dict(Counter(one["reason"] for one in self.rejected).most_common())


def make_rows(
    seeds: Seeds,
    *,
    settings: Settings,
    rows: int,
    asking: Asking,
    replies: Replies,
    output: Path,
    rejected: Path,
    tell: Callable[[Made], None],
) -> Made:
    """Goes on until there are `rows` rows, or DRY_ROUNDS rounds brought none.  Both files are written after each round.

    `tell(what is made)` is called after each reply.  Raises what `asking` raises, DataError when not
    even one seed fits into a prompt, and OutputError for a file that holds something else than what is made.
    """
    maker = _Maker(seeds.tasks, settings=settings, asking=asking, replies=replies, tell=tell)
    made, dry = maker.made, 0
    while len(made.rows) < rows and dry < DRY_ROUNDS:
        before = len(made.rows)
        maker.do_round(rows)
        dry = dry + 1 if len(made.rows) == before else 0
        _write_on(output, made.rows)
        _write_on(rejected, made.rejected)
    if len(made.rows) < rows:
        made.stopped = f"{DRY_ROUNDS} rounds in a row brought no new row"
    return made


class _Maker:
    def __init__(
        self,
        seeds: Sequence[Task],
        *,
        settings: Settings,
        asking: Asking,
        replies: Replies,
        tell: Callable[[Made], None],
    ) -> None:
        self.seeds, self.settings, self.asking, self.replies, self.tell = seeds, settings, asking, replies, tell
        self.made, self.tasks, self.template = Made(), list[Task](), template_digest()[:12]
        self.places: dict[str, str] = {}
        """Of a task that became a row: `request/task` to `made:number`."""
        self.filter = Filter(
            seeds, words=asking.words, longest_common=asking.longest_common, most_alike=settings.most_alike
        )

    def do_round(self, rows: int) -> None:
        self.made.rounds += 1
        candidates = self._new_tasks()
        while candidates and (left := rows - len(self.made.rows)) > 0:
            wave, candidates = candidates[:left], candidates[left:]
            self._answer(wave)

    # ----------------------------------------------------------------------------------------------------------- tasks

    def _new_tasks(self) -> list[tuple[Written, dict[str, Any]]]:
        """Tasks of one round that are not refused, each with where it comes from."""
        number = self.made.rounds
        shown = {
            f"tasks/{number}/{place}": self._draw(random.Random(f"{self.settings.seed}/{number}/{place}"))
            for place in range(REQUESTS_A_ROUND)
        }
        prompts = {key: tasks_prompt(tasks) for key, tasks in shown.items()}
        found = []
        for key, reply in self.replies.ask(
            prompts, ask=self.asking.model.ask(self.settings.temperature), done=self._done
        ).items():
            provenance = {
                "round": number, "request": key, "shown": [task.place for task in shown[key]], "template": self.template,
                "seed": self.settings.seed, "temperature": self.settings.temperature,
            }  # fmt: skip
            written = read_tasks(reply.text)
            if reply.refused is not None:
                self._reject("refused_by_server", provenance | {"status": reply.refused})
            elif not written:
                self._reject("unreadable_reply", provenance, reply=reply.text)
            for place, one in enumerate(written):
                reason, alike = self.filter.refusal(one)
                if reply.cut and place == len(written) - 1:
                    reason = "cut_off"
                told = provenance | {"task": place} | alike
                if reason is not None:
                    self._reject(reason, told, one)
                    continue
                self.filter.add(one, place=f"{key}/{place}")
                found.append((one, told))
        return found

    def _draw(self, stream: random.Random) -> list[Task]:
        """Seeds and made tasks to show, in random order; fewer where the prompt would not fit."""
        made = stream.sample(self.tasks, min(len(self.tasks), self.settings.shown // MADE_SHARE))
        seeds = stream.sample(list(self.seeds), min(len(self.seeds), self.settings.shown - len(made)))
        drawn = made + seeds
        stream.shuffle(drawn)
        shown = self._that_fit(drawn, tasks_prompt)
        if not shown:
            raise DataError(
                f"{drawn[0].place}: not even this one task fits into a prompt beside {self.settings.max_new_tokens:,} new tokens.",
                "Lower --max-new-tokens, shorten the seed tasks, or take a model with a longer context.",
            )
        self.made.shortened += len(shown) < len(drawn)
        return shown

    def _that_fit(self, drawn: Sequence[Task], prompt: Callable[[Sequence[Task]], str]) -> list[Task]:
        """The first of them, as many as leave room for the reply."""
        count = len(drawn)
        while count and not self.asking.model.fits(prompt(drawn[:count])):
            count -= 1
        return list(drawn[:count])

    # --------------------------------------------------------------------------------------------------------- answers

    def _answer(self, wave: Sequence[tuple[Written, dict[str, Any]]]) -> None:
        """Rows and refused ones come out in the order of the tasks, so that it does not depend on where a wave ends."""
        answered = self._answers(wave)
        accepted = [
            (place, written, answer)
            for place, ((written, _), (answer, reason)) in enumerate(zip(wave, answered, strict=True))
            if reason is None
        ]
        grades = self._grades({_key("judge", wave[place][1]): (written, answer) for place, written, answer in accepted})
        for (written, provenance), (answer, reason) in zip(wave, answered, strict=True):
            grade = grades.get(_key("judge", provenance), {})
            reason = reason or grade.pop("reason", None)
            if reason is None:
                self._accept(written, answer, provenance | grade)
            else:
                self._reject(reason, provenance | grade, written, **({} if answer is None else {"answer": answer}))

    def _answers(self, wave: Sequence[tuple[Written, dict[str, Any]]]) -> list[tuple[Any, str | None]]:
        """The answer of each task (None where there is none), and why it is refused.  Their provenance gets the examples."""
        prompts = {}
        for written, provenance in wave:
            stream = random.Random(f"{self.settings.seed}/{written.instruction}/{written.input}")
            drawn = stream.sample(list(self.seeds), min(len(self.seeds), WORKED_EXAMPLES))
            examples = self._that_fit(drawn, lambda shown, one=written: answer_prompt(one, shown=shown))  # type: ignore[misc]
            provenance["examples"] = [task.place for task in examples]
            prompt = answer_prompt(written, shown=examples)
            if self.asking.model.fits(prompt):
                prompts[_key("answers", provenance)] = prompt
        replies = self.replies.ask(prompts, ask=self.asking.model.ask(0.0), done=self._done)
        found: list[tuple[Any, str | None]] = []
        for written, provenance in wave:
            reply = replies.get(_key("answers", provenance))
            if reply is None:
                found.append((None, "no_room"))
            elif reply.refused is not None:
                provenance["status"] = reply.refused
                found.append((None, "refused_by_server"))
            else:
                answer = read_answer(reply.text)
                reason = answer_refusal(written, answer, cut=reply.cut, codes=_codes(written, answer))
                found.append((answer, reason))
        return found

    def _grades(self, answered: dict[str, tuple[Written, str]]) -> dict[str, dict[str, Any]]:
        """{"judge", "score"} of each, and "reason" where it is refused; nothing without a judge."""
        judge = self.asking.judge
        if judge is None:
            return {}
        every = {key: judge_prompt(written, answer) for key, (written, answer) in answered.items()}
        prompts = {key: prompt for key, prompt in every.items() if judge.fits(prompt)}
        replies = self.replies.ask(prompts, ask=judge.ask(0.0), done=self._done)
        found = {}
        for key in every:
            reply = replies.get(key)
            score = read_score(reply.text) if reply is not None else None
            grade: dict[str, Any] = {"judge": judge.name, "score": score}
            if reply is None:
                grade["reason"] = "no_room"
            elif reply.refused is not None:
                grade |= {"reason": "refused_by_server", "status": reply.refused}
            elif score is None:
                grade["reason"] = "judge_unreadable"
            elif score < self.settings.least_score:
                grade["reason"] = "judged_low"
            found[key] = grade
        return found

    # -------------------------------------------------------------------------------------------------------- outcomes

    def _accept(self, written: Written, answer: str, provenance: dict[str, Any]) -> None:
        self.made.rows.append({
            "instruction": written.instruction, "input": written.input, "output": answer,
            "source": f"synthetic:{self.asking.model.name}", "provenance": self._traced(provenance),
        })  # fmt: skip
        place = f"made:{len(self.made.rows)}"
        self.places[f"{provenance['request']}/{provenance['task']}"] = place
        self.tasks.append(Task(instruction=written.instruction, input=written.input, answer=answer, place=place))

    def _reject(self, reason: str, provenance: dict[str, Any], written: Written | None = None, **more: str) -> None:
        texts = {} if written is None else {"instruction": written.instruction, "input": written.input}
        self.made.rejected.append({"reason": reason, **texts, **more, "provenance": self._traced(provenance)})

    def _traced(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """The nearest task is named as the row that it has become by now, or else by its request and number in it."""
        if provenance.get("nearest") in self.places:
            return provenance | {"nearest": self.places[provenance["nearest"]]}
        return provenance

    def _done(self) -> None:
        self.tell(self.made)


def _key(kind: str, provenance: dict[str, Any]) -> str:
    return f"{kind}/{provenance['request'].partition('/')[2]}/{provenance['task']}"


def _codes(written: Written, answer: str) -> list[str]:
    """What the audit would say of the row."""
    prompt = f"{written.instruction}\n\n{written.input}" if written.input else written.instruction
    return check_texts(Conversation((Turn("user", prompt), Turn("assistant", answer))), terms=None)


def _write_on(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The file then holds these rows.  While an interrupted synthesis is gone through again, it may hold more than them."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.exists():
        before = path.read_bytes()
        if before.startswith(text.encode()):
            return
        if not text.encode().startswith(before):
            raise OutputError(
                f"{path} is not as it was written: it was edited since.",
                "Choose another output, or move the file away and give the same command again.",
            )
    write_whole(path, text)
