"""Names of persons by a model: what a finder is, and presidio's with a spaCy model that the user has installed.

presidio and spaCy would fetch a model, and a list of web suffixes, when they find none; nothing here lets them: the model is loaded by
its installed name or folder, and only its entities are read, without presidio's other recognisers.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from onlay.data.privacy.spans import Span, span_of
from onlay.errors import SetupError

INSTALL = 'pip install "onlay[privacy]"'
MODELS = ("en_core_web_trf", "en_core_web_lg", "en_core_web_md", "en_core_web_sm")
"""Looked for, in this order, where none is named."""
SCORE = 0.85
"""What presidio gives an entity of spaCy, which has no score of its own."""


class Names(Protocol):
    """Finds persons; must be picklable, since workers of `audit` and `prepare` get a copy."""

    @property
    def description(self) -> str:
        """Of what finds them: equal where the same names are found."""

    def find_names(self, text: str) -> list[Span]:
        """Spans of kind `name`."""


class PresidioNames:
    """Persons by presidio's spaCy recogniser.  The model is loaded when a process first needs it."""

    def __init__(self, model: str, *, language: str) -> None:
        self.model = model
        self.language = language
        self._analyzer: Any = None

    @property
    def description(self) -> str:
        return f"presidio {version('presidio-analyzer')} {self.model} {self.language}"

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "language": self.language, "_analyzer": None}

    def find_names(self, text: str) -> list[Span]:
        if not text.strip():
            return []
        if self._analyzer is None:
            self._analyzer = _analyzer(self.model, self.language)
        found = self._analyzer.analyze(text, language=self.language, entities=["PERSON"])
        return [span_of("name", text, one.start, one.end, one.score) for one in found]


def presidio_names(model: str | None = None, *, language: str = "en") -> PresidioNames:
    """`model`: an installed spaCy package or a folder of one; None: the best English one that is installed.

    Raises SetupError where presidio or a model is missing, or the model names no persons; nothing is downloaded.
    """
    for package in ("presidio_analyzer", "spacy"):
        if importlib.util.find_spec(package) is None:
            raise SetupError(
                f"Names by a model need {package}, which is not installed.", f"{INSTALL}, or leave the model out."
            )
    from spacy.util import is_package

    chosen = model or next((name for name in MODELS if is_package(name)), None)
    if chosen is None or not (Path(chosen).is_dir() or is_package(chosen)):
        what = f"The spaCy model {model} is" if model else f"None of the spaCy models {', '.join(MODELS)} is"
        raise SetupError(
            f"{what} not installed, and none is downloaded.",
            "Install one where there is a network: python -m spacy download en_core_web_lg; or name its folder.",
        )
    names = PresidioNames(chosen, language=language)
    names._analyzer = _analyzer(chosen, language)
    return names


def _analyzer(model: str, language: str) -> Any:
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    entities = NerModelConfiguration(
        model_to_presidio_entity_mapping={"PERSON": "PERSON", "PER": "PERSON"},
        labels_to_ignore=["CARDINAL", "DATE", "GPE", "LOC", "MISC", "MONEY", "NORP", "ORDINAL", "ORG", "PERCENT", "QUANTITY", "TIME"],
        default_score=SCORE,
    )  # fmt: skip
    engine = SpacyNlpEngine(models=[{"lang_code": language, "model_name": model}], ner_model_configuration=entities)
    engine.load()
    pipes = engine.nlp[language].pipe_names
    if not {"ner", "entity_ruler"} & set(pipes):
        raise SetupError(
            f"The spaCy model {model} finds no names: it has {', '.join(pipes) or 'no parts'}, and no `ner`.",
            "Install one that does: python -m spacy download en_core_web_lg.",
        )
    registry = RecognizerRegistry(supported_languages=[language])
    registry.add_recognizer(SpacyRecognizer(supported_language=language, supported_entities=["PERSON"]))
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[language])
