"""What every test runs in: a home of its own, no hub, and markers and data that may be absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports huggingface_hub or tokenizers, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "80"


@pytest.fixture(autouse=True)
def onlay_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ONLAY_HOME in a temporary folder: no test reads or writes the user's ledger and prepared data."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("ONLAY_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data that ONLAY_TEST_DATA names; tests that need it are skipped without."""
    named = os.environ.get("ONLAY_TEST_DATA")
    if not named:
        pytest.skip("ONLAY_TEST_DATA does not name the folder of real data")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"ONLAY_TEST_DATA = {folder} is not a folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
