from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest

from onlay.data.privacy.detect import find
from onlay.data.privacy.names import presidio_names
from onlay.errors import SetupError


@pytest.mark.parametrize("missing", ["presidio_analyzer", "spacy"])
def test_a_missing_package_is_told_with_the_line_that_installs_it(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(SetupError, match=f"{missing}, which is not installed") as told:
        presidio_names()
    assert 'pip install "onlay[privacy]"' in told.value.remedy


@pytest.fixture
def spacy() -> Any:
    pytest.importorskip("presidio_analyzer", reason="the extra `privacy` is not installed")
    return pytest.importorskip("spacy")


def test_models_that_cannot_be_used(spacy: Any, tmp_path: Path) -> None:
    for name in ("no_such_model", "no.such.model", str(tmp_path / "none")):
        with pytest.raises(SetupError, match="is not installed, and none is downloaded"):
            presidio_names(name)
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(SetupError, match="finds no names"):
        presidio_names(str(tmp_path / "blank"))


def test_persons_of_a_model_are_found_beside_the_rules(spacy: Any, tmp_path: Path) -> None:
    """A stand-in for a model: it knows one person and one company."""
    model = spacy.blank("en")
    patterns = [{"label": "PERSON", "pattern": "zyxa qorvin"}, {"label": "ORG", "pattern": "Acme"}]
    model.add_pipe("entity_ruler").add_patterns(patterns)
    model.to_disk(tmp_path / "model")
    names = presidio_names(str(tmp_path / "model"))
    text = "then zyxa qorvin of Acme wrote to a@example.org"
    for one in (names, pickle.loads(pickle.dumps(names))):
        assert [(span.kind, span.text) for span in find(text, names=one)] == [
            ("name", "zyxa qorvin"),
            ("email", "a@example.org"),
        ]
    assert names.find_names(" ") == [] and str(tmp_path / "model") in names.description
