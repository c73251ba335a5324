from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from onlay.errors import DataError
from onlay.evaluation.material import Name, bundled, rows_of


@pytest.mark.parametrize("name", get_args(Name))
def test_bundled_sets_are_there(name: Name) -> None:
    assert len(list(rows_of(bundled(name)))) > 50


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no evaluation file at owner/name"):
        list(rows_of("owner/name"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        list(rows_of(tmp_path / "empty.jsonl"))
