"""Errors that a user can act on: each says what is wrong and what to do, in two lines and without a traceback."""

from __future__ import annotations


class OnlayError(Exception):
    """`problem` names the thing, what was given and what is allowed; `remedy` is the next step.

    `exit_code` is what the command line exits with: 2 for input that must change, 1 for work that failed.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy


class RecipeError(OnlayError):
    """A recipe field or `--set` override is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(OnlayError):
    """A data file cannot be read, or a row in it cannot be used.  The problem names file, row and field.

    `code` is that of the audit's finding where a row (or the rest of a file) is at fault, `row` its number where known.
    """

    def __init__(self, problem: str, remedy: str, *, code: str | None = None, row: int | None = None) -> None:
        super().__init__(problem, remedy)
        self.code = code
        self.row = row


class BaseModelError(OnlayError):
    """The base model cannot be found, fetched, trusted or used as asked."""


class OutputError(OnlayError):
    """A folder exists already, a disk is full, or a run folder does not hold what is needed."""


class SetupError(OnlayError):
    """A package or device that the work needs is missing."""


class TrainingError(OnlayError):
    """Training could not go on; everything up to the last checkpoint is kept."""

    exit_code = 1


class ProofError(TrainingError):
    """A run finished but did not do what it claims: a module did not move, a value is not finite, the base changed."""
