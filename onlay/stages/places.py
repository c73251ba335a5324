"""Where a run or a registered version lies, and whether its files are still as they were recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onlay.errors import OutputError, ProofError
from onlay.recipe import read_recipe
from onlay.records import AdapterVersion, Run

PEFT_CARD = "README.md"
"""PEFT's: empty but for the base's place on this machine; no part of a version."""
WEIGHTS = {"adapter": "adapter_model.safetensors", "head": "head.safetensors"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A run folder, or a folder that is an adapter with its records beside it: a version's, or what `push` wrote."""

    records: Path
    artefact: Path
    """What was trained: adapter, head or model."""

    @property
    def is_version(self) -> bool:
        return self.artefact == self.records


def is_adapter(folder: Path) -> bool:
    """Whether an adapter or a head lies at its top: with a run.json beside it, that is a version and no run."""
    return (folder / "adapter_config.json").is_file() or (folder / "head.json").is_file()


def is_reference(what: str | Path) -> bool:
    """Whether it can only be a registered version, such as `support@4`."""
    return "@" in str(what) and "/" not in str(what) and not Path(what).exists()


def resolve(reference: str | Path) -> AdapterVersion:
    from onlay.release.registry import Registry

    return Registry().resolve(str(reference))


def find_place(what: str | Path) -> Place:
    """Of a run folder, a version's folder or `name@4`.  Raises OnlayError; a folder is not looked into beyond its kind."""
    folder = Path(resolve(what).path) if is_reference(what) else Path(what)
    if is_adapter(folder):
        Run.load(folder)  # An adapter without its records answers to no recipe.
        return Place(records=folder, artefact=folder)
    Run.load(folder)
    return Place(records=folder, artefact=folder / read_recipe(folder / "recipe.yaml").adapter.artefact)


# ------------------------------------------------------------------------------------------------------ as recorded


def check_adapter(folder: Path, *, run: Run | None = None, version: AdapterVersion | None = None) -> str:
    """The SHA-256 of an adapter's weights, after they were found sound and as they were recorded.

    `run`: what it was trained by; `version`: what it is registered as.  With neither, a version.json, manifest.json or
    run.json beside it says it, as a version's folder has them.  Raises ProofError for a file that was changed and for
    weights that are not finite or did not move, and OutputError for what cannot be read.
    """
    from onlay.release.store import file_digest
    from onlay.release.weights import check_weights

    weights = folder / WEIGHTS["adapter"]
    if not weights.is_file():
        raise OutputError(f"{folder} has no {weights.name}.", "Save the adapter in the safetensors format.")
    for name, digest in _recorded(folder, run, version).items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            what = "was changed" if path.is_file() else "is missing"
            since = "the run saved it" if run is not None else "it was registered or saved"
            raise ProofError(f"{path} {what} on disk since {since}.", "Restore it, or train again.")
    check_weights(weights)
    return file_digest(weights)


def _recorded(folder: Path, run: Run | None, version: AdapterVersion | None) -> Mapping[str, str]:
    """Name to SHA-256 of the files at the top of a folder; a tokenizer below it is not what is evaluated."""
    if version is None and run is None:
        path = next((path for path in (folder / "version.json", folder / "manifest.json") if path.is_file()), None)
        if path is not None:
            version = read_version(path)
        elif (folder / "run.json").is_file():
            run = Run.load(folder)
    if version is not None:
        return {name: digest for name, digest in version.files.items() if "/" not in name}
    saved: Mapping[str, str] = run.proofs.get("artefact_sha256", {}) if run is not None else {}
    return {name: digest for name, digest in saved.items() if name != PEFT_CARD}


def read_version(path: Path) -> AdapterVersion:
    """The description that lies in a version's folder.  Raises OutputError."""
    from pydantic import ValidationError

    try:
        return AdapterVersion.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise OutputError(f"{path} cannot be read.", "Push or pull the version again.") from None
