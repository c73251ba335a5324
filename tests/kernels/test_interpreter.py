"""The kernels' tests once more where Triton's interpreter runs the kernels, in a process that set it up before importing Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.compare import INTERPRETED

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
FILES = sorted(
    path.relative_to(ROOT)
    for path in FOLDER.glob("test_*.py")
    if path.name not in (Path(__file__).name, "test_compile.py")
    and re.search("INTERPRETED|in_each_place", path.read_text(encoding="utf-8"))
)
"""Those that hold a fast kernel against its reference."""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-q", "-rs", "-m", "not gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "SKIPPED" not in done.stdout, "a kernel was not run: " + done.stdout[-2000:]


def test_every_kernel_has_such_a_test() -> None:
    wanted = {path.stem.removesuffix("_triton") for path in (ROOT / "onlay/kernels").glob("*_triton.py")}
    assert wanted <= {path.stem.removeprefix("test_") for path in FILES}
