"""A version on its way to another registry: a folder that holds everything, here, on the hub or in MLflow.

What is sent is compared with the digests that were registered, before and after it is copied; what comes is described
anew from its files and compared with the description that came with it.  Digests say that nothing changed on the way,
not who sent it: pull from folders and repositories that you trust.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onlay.errors import OutputError, ProofError
from onlay.records import AdapterVersion, Record
from onlay.release.names import check_files
from onlay.release.registry import Registry
from onlay.release.store import file_digest

HUB, MLFLOW = "hf://", "mlflow://"
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_MODEL = re.compile(r"([\w.-]+)(?:@([\w.-]+))?")
Describe = Callable[[Path, dict[str, str]], AdapterVersion]


def push(registry: Registry, reference: str, target: str) -> tuple[AdapterVersion, str]:
    """Writes a version into a new folder, `hf://owner/name` or `mlflow://name`; the version and where it now is.

    The folder is a PEFT adapter with its tokenizer and records beside it, and version.json.  Raises OutputError, and
    ProofError when what arrived is not what was registered.
    """
    version = registry.resolve(reference)
    _compare(Path(version.path), version.files, what=version.id)
    if target.startswith(HUB):
        return version, _push_hub(version, *_parts(_REPOSITORY, target, HUB))
    if target.startswith(MLFLOW):
        return version, _push_mlflow(version, *_parts(_MODEL, target, MLFLOW))
    folder = Path(target)
    if folder.exists():
        raise OutputError(f"{folder} exists already.", "Choose another folder, or move it away.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        _write(version, temporary)
        temporary.rename(folder)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror or error}.", "Free disk space, or choose another folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return version, str(folder)


def pull(
    registry: Registry, source: str, *, describe: Describe, name: str | None = None
) -> tuple[AdapterVersion, bool]:
    """Registers what `push` wrote, under its own name or another; the version, and whether it is new here.

    It keeps its number where that is free.  `describe` checks the files and tells what they are.  Raises OutputError and
    ProofError.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, origin = Path(temporary), str(Path(source).absolute())
        if source.startswith(HUB):
            repository, revision = _parts(_REPOSITORY, source, HUB)
            origin = f"{HUB}{repository}@{_fetch_hub(repository, revision, folder)}"
        elif source.startswith(MLFLOW):
            from onlay.release.mlflow_registry import fetch

            model, selector = _parts(_MODEL, source, MLFLOW)
            number, folder = fetch(model, selector, folder)
            origin = f"{MLFLOW}{model}@{number}"
        else:
            folder = Path(source)
        return _pull_folder(registry, folder, origin=origin, describe=describe, name=name)


def _pull_folder(
    registry: Registry, folder: Path, *, origin: str, describe: Describe, name: str | None
) -> tuple[AdapterVersion, bool]:
    sent = AdapterVersion.load(folder)
    check_files(sent.files)
    _compare(folder, sent.files, what=str(folder))

    def check(copies: Path, digests: dict[str, str]) -> AdapterVersion:
        found = describe(copies, digests)
        wrong = differing_fields(found, sent)
        if wrong:
            raise ProofError(
                f"{folder}: version.json says something else than the files do: {', '.join(wrong)}.", "Push it again."
            )
        return found

    files = {path: folder / path for path in sent.files}
    return registry.add(
        name or sent.name, files, describe=check, origin=f"{origin} ({sent.id})", version=sent.version or None
    )


def differing_fields(one: Record, other: Record) -> list[str]:
    """Names of the fields that differ, those of where something lies left out."""
    fields = set(type(one).model_fields) - one.elsewhere
    return sorted(field for field in fields if getattr(one, field) != getattr(other, field))


def _write(version: AdapterVersion, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in version.files:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(version.path) / name, folder / name)
    # Where it lay here is of no use elsewhere, and nobody's business.
    version.model_copy(update={"path": "", "origin": ""}).save(folder)
    _compare(folder, version.files, what=str(folder))


def _compare(folder: Path, files: dict[str, str], *, what: str) -> None:
    """Raises ProofError unless every file is there, is a plain file and has its digest."""
    for name, digest in files.items():
        path = folder / name
        inside = path.resolve().is_relative_to(folder.resolve()) and not path.is_symlink()
        if not inside or not path.is_file():
            raise ProofError(f"{what}: {name} is missing, or is no plain file.", "Push it again from a whole registry.")
        if file_digest(path) != digest:
            raise ProofError(
                f"{what}: {name} is not what was registered: its SHA-256 differs.",
                "Push it again from a whole registry.",
            )


def _parts(pattern: re.Pattern[str], target: str, scheme: str) -> tuple[str, str | None]:
    """What `scheme` is followed by: a name, and what may stand after an @."""
    match = pattern.fullmatch(target.removeprefix(scheme))
    if match is None:
        named = "owner/name" if scheme == HUB else "name"
        raise OutputError(f"{target} does not name a place.", f"{scheme}{named}, or {scheme}{named}@revision")
    return match[1], match[2]


def _push_mlflow(version: AdapterVersion, name: str, selector: str | None) -> str:
    from onlay.release.mlflow_registry import fetch, send

    if selector is not None:
        raise OutputError(f"{MLFLOW}{name}@{selector}: MLflow numbers versions itself.", f"{MLFLOW}{name}")
    with tempfile.TemporaryDirectory() as temporary:
        _write(version, Path(temporary) / "sent")
        number = send(version, Path(temporary) / "sent", name)
        (Path(temporary) / "back").mkdir()
        _, back = fetch(name, number, Path(temporary) / "back")
        _compare(back, version.files, what=f"{MLFLOW}{name}@{number}")
    return f"{MLFLOW}{name}@{number}"


# ------------------------------------------------------------------------------------------------------------ the hub


def _push_hub(version: AdapterVersion, repository: str, revision: str | None) -> str:
    """Uploads in one commit (to a private repository, where there was none), fetches it back and compares."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def upload(folder: Path) -> str:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=f"onlay: {version.id}",
            delete_patterns=["*"],  # What an earlier version had and this one has not.
        )  # fmt: skip
        return str(commit.oid)

    with tempfile.TemporaryDirectory() as temporary:
        _write(version, Path(temporary) / "sent")
        commit = _with_hub(lambda: upload(Path(temporary) / "sent"), repository, HfHubHTTPError)
        _fetch_hub(repository, commit, Path(temporary) / "back")
        _compare(Path(temporary) / "back", version.files, what=f"{HUB}{repository}@{commit}")
    return f"{HUB}{repository}@{commit}"


def _fetch_hub(repository: str, revision: str | None, folder: Path) -> str:
    """Downloads what a pushed version may hold; the commit."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def fetch() -> str:
        commit = str(HfApi().model_info(repository, revision=revision).sha)
        snapshot_download(repository, revision=commit, local_dir=folder)
        return commit

    return str(_with_hub(fetch, repository, HfHubHTTPError))


def _with_hub(work: Callable[[], str], repository: str, http_error: Any) -> str:
    # The hub client passes the errors of its HTTP library on; all share the base class of its own.
    transport_error: Any = http_error.__bases__[0]
    try:
        return work()
    except http_error as error:
        status = error.response.status_code
        raise OutputError(
            f"{HUB}{repository}: the hub refused ({status}).",
            "Log in with an account that may do this: hf auth login"
            if status in (401, 403)
            else "Check the name and the revision.",
        ) from None
    except (transport_error, OSError) as error:
        raise OutputError(
            f"{HUB}{repository} cannot be reached: {error}.", "Check the connection and that HF_HUB_OFFLINE is not set."
        ) from None
