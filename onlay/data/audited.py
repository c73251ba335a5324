"""What reading and auditing a recipe's rows gave, kept for the next start of the same recipe on the same data.

    <folder>/<digest16>.npz    the arrays of the RowTable, the clusters, and files, findings and domains as JSON

The name is a digest of everything that they depend on, the code that made them included.  Numbers and findings are kept, no
text of the rows.  A file that is damaged is made again; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from onlay.data.material import Material, Progress, read_material, row_section, sources_of
from onlay.data.rows import RowTable
from onlay.data.sources import source_digest
from onlay.errors import OutputError
from onlay.recipe import Recipe, digest_of
from onlay.records import AuditedFile, Finding

LIBRARIES = ("numpy", "rensa")
"""Whose results the material depends on."""
ARRAYS = (
    "source", "number", "prompt_key", "loose_prompt_key", "answer_key", "row_key", "prompt_characters",
    "answer_characters", "domain",
)  # fmt: skip


def read_audited(recipe: Recipe, *, folder: Path, progress: Progress | None = None) -> Material:
    """`read_material(recipe)`, from `folder` where the same was read before.  Raises as it does, and OutputError."""
    digests = [source_digest(one.path, recipe.data) for one in sources_of(recipe)]
    path = folder / f"{_key(recipe, digests)[:16]}.npz"
    kept = _load(path, recipe)
    if kept is not None:
        return kept
    material = read_material(recipe, progress=progress)
    # Not what was read of a file that somebody wrote to.
    if [file.digest for file in material.files] == digests:
        _save(path, material)
    return material


def _key(recipe: Recipe, digests: list[str]) -> str:
    terms = recipe.data.terms
    return digest_of(
        {
            "code": _code_digest(),
            "sources": [[one.path, one.use, one.weight, one.limit] for one in sources_of(recipe)],
            "digests": digests,
            "section": row_section(recipe).model_dump(mode="json"),
            "method": recipe.adapter.method,
            "terms": None if terms is None else _digest_of_file(terms),
        }
    )


def _digest_of_file(path: str) -> str | None:
    """None where it cannot be read, which `read_material` then tells."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


@functools.cache
def _code_digest() -> str:
    """Of the code itself, so that no change of a rule can be forgotten."""
    whole = hashlib.sha256()
    place = Path(__file__).parent
    for path in sorted(place.rglob("*.py")):
        whole.update(f"{path.relative_to(place)}\0".encode())
        whole.update(path.read_bytes())
    return digest_of([whole.hexdigest(), *(f"{name} {version(name)}" for name in LIBRARIES)])


def _load(path: Path, recipe: Recipe) -> Material | None:
    """None where nothing was kept, or what was kept is damaged (every part has a check sum)."""
    try:
        with np.load(path, allow_pickle=False) as parts:
            told: dict[str, Any] = json.loads(parts["told"].tobytes())
            arrays = {name: parts[name] for name in ARRAYS}
            clusters = parts["clusters"]
        files = tuple(AuditedFile.model_validate(one) for one in told["files"])
        findings = tuple(Finding.model_validate(one) for one in told["findings"])
        domains = tuple(told["domains"])
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return None
    table = RowTable(**arrays, domains=domains)
    return Material(sources=sources_of(recipe), files=files, table=table, clusters=clusters, findings=findings)


def _save(path: Path, material: Material) -> None:
    told = {
        "files": [one.model_dump(mode="json") for one in material.files],
        "findings": [one.model_dump(mode="json") for one in material.findings],
        "domains": material.table.domains,
    }
    arrays = {name: getattr(material.table, name) for name in ARRAYS}
    content = np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            np.savez(out, told=content, clusters=material.clusters, **arrays)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}.",
            "Free disk space, or set ONLAY_HOME to another folder.",
        ) from None
    finally:
        with contextlib.suppress(OSError):  # Its folder may be none.
            temporary.unlink()
