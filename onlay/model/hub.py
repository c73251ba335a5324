"""From the name of a base to a local folder that holds its files: bundled, a folder, or the hub at one commit.

Nothing heavy is downloaded before everything that can be known from small files has been checked: the commit,
config.json, whether there are safetensors, whether the disk has room.  Neither torch nor transformers is imported.
"""

from __future__ import annotations

import difflib
import errno
import importlib.resources
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlay.errors import BaseModelError
from onlay.recipe import ModelSection

Progress = Callable[[int, int], None]
"""Called with the bytes that are here and the bytes of the whole download."""

POCKET = "pocket"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_SHARD = re.compile(r"model[-.]\d+-of-\d+\.safetensors")
# The hub client resumes within a process; between processes it keeps whole files and drops parts.
_CONNECT = "Check the connection and run the same command again: files that came whole are kept."


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalBase:
    """Where a base lies on this disk, and the commit that its files are from (None for a folder of the user's)."""

    path: Path
    revision: str | None


def find_base(
    section: ModelSection, *, check_config: Callable[[dict[str, Any], str], None], progress: Progress | None = None
) -> LocalBase:
    """The folder with the base's files, downloaded if need be.

    `check_config(config, name)` raises BaseModelError for a config.json that cannot be used; it is called before the
    weights are downloaded.  Raises BaseModelError for everything that keeps a base from being found or fetched.
    """
    if section.base == POCKET:
        return LocalBase(path=_pocket_folder(), revision=None)
    folder = Path(section.base).expanduser()
    if folder.is_dir():
        return LocalBase(path=folder.resolve(), revision=None)
    _check_name(section.base, folder)
    return _from_hub(section, check_config, progress)


def _pocket_folder() -> Path:
    folder = Path(str(importlib.resources.files("onlay"))) / "model" / "pocket"
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"The bundled base is not part of this installation: {folder / 'config.json'} does not exist.",
            "Reinstall onlay from a complete wheel, or give model.base a hub name or a folder.",
        )
    return folder


def _check_name(base: str, path: Path) -> None:
    if path.is_file():
        raise BaseModelError(
            f"model.base = {base} is a file.", "Give the folder that holds config.json and the .safetensors files."
        )
    if difflib.get_close_matches(base.lower(), [POCKET], n=1, cutoff=0.75):
        raise BaseModelError(f"model.base = {base} is not a base.", f"Did you mean {POCKET} (the bundled base)?")
    if not _NAME.fullmatch(base) or base.endswith((".git", "/", ".")):
        raise BaseModelError(
            f"model.base = {base}: there is no such folder, and it is not a hub name.",
            "Give an existing folder, `pocket`, or a name such as Qwen/Qwen3-0.6B.",
        )


def wanted_files(names: Iterable[str], *, shards: Iterable[str] | None, remote_code: bool, weights: bool) -> list[str]:
    """Those of a repository's files that loading needs: the top folder's small files, and one set of weights.

    Repositories often hold the same weights twice more (`consolidated.safetensors`, `original/`, `onnx/`): left out.
    `shards` are the files named by the index; without one, those that look like shards.
    """
    top = [name for name in names if "/" not in name]
    wanted = [name for name in top if name.endswith(_SMALL_FILES) or name == "README.md" or name.startswith("LICENSE")]
    if remote_code:
        wanted += [name for name in names if name.endswith(".py")]
    if weights:
        if SINGLE_FILE in top:
            wanted = [name for name in wanted if name != INDEX_FILE] + [SINGLE_FILE]
        elif shards is not None:
            wanted += sorted(set(shards))
        else:
            wanted += [name for name in top if _SHARD.fullmatch(name)]
    # The chat templates of a folder `additional_chat_templates/` belong to the tokenizer.
    wanted += [name for name in names if name.startswith("additional_chat_templates/") and name.endswith(".jinja")]
    return sorted(set(wanted))


def _from_hub(
    section: ModelSection, check_config: Callable[[dict[str, Any], str], None], progress: Progress | None
) -> LocalBase:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionResolutionError

    # The hub client passes the errors of its HTTP library on; all share the base class of HfHubHTTPError.
    transport_error: Any = HfHubHTTPError.__bases__[0]
    name = section.base
    if section.revision is not None and _COMMIT.fullmatch(section.revision):
        # A commit never changes: with all of it here, nothing has to be asked.
        cached = _cached_snapshot(section, section.revision)
        if cached is not None:
            return cached
    commit: str | None = None
    try:
        commit = HfApi().resolve_revision(name, revision=section.revision).resolved
        info = HfApi().model_info(name, revision=commit, files_metadata=True, timeout=20)
        return _download(section, info, check_config, progress)
    except HfHubHTTPError as error:
        cached = _cached_snapshot(section, commit) if error.response.status_code >= 500 else None
        if cached is None:
            raise _refused(section, error) from None
        return cached
    except (transport_error, OfflineModeIsEnabled) as error:
        # Not reached: what was fetched before will do.
        cached = _cached_snapshot(section, commit)
        if cached is None:
            raise _unreachable(name, error) from None
        return cached
    except RevisionResolutionError as error:
        raise _unreachable(name, error.__cause__ or error) from None
    except OSError as error:
        raise _disk_problem(name, error) from None


def _download(
    section: ModelSection, info: Any, check_config: Callable[[dict[str, Any], str], None], progress: Progress | None
) -> LocalBase:
    """Downloads the commit of `info`: first the small files that decide, then, if the disk has room, the rest."""
    from huggingface_hub import get_token, hf_hub_download, snapshot_download

    name, commit = section.base, str(info.sha)
    if info.gated and not get_token():
        raise _gated(name, with_token=False)
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
    weights = section.weights == "pretrained"
    if "config.json" not in sizes:
        raise BaseModelError(*why_no_config(name, set(sizes)))
    if weights:
        _check_safetensors(name, sizes)

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=commit, tqdm_class=_bar_class(None)))

    check_config(read_json(fetch("config.json"), name), name)
    shards = None
    if weights and SINGLE_FILE not in sizes and INDEX_FILE in sizes:
        shards = shards_of_index(fetch(INDEX_FILE), name)
        missing = sorted(set(shards) - set(sizes))
        if missing:
            raise BaseModelError(
                f"{name}: {INDEX_FILE} names {missing[0]}, which is not in the repository.", "Choose another revision."
            )
    wanted = wanted_files(sizes, shards=shards, remote_code=section.trust_remote_code, weights=weights)
    total = sum(sizes[file] for file in wanted)
    to_fetch = _missing_bytes(name, commit, {file: sizes[file] for file in wanted})
    _check_room(name, to_fetch)
    folder = snapshot_download(
        name,
        revision=commit,
        allow_patterns=[_literal(file) for file in wanted],
        tqdm_class=_bar_class(progress, here=total - to_fetch, total=total),
    )
    return LocalBase(path=Path(folder), revision=commit)


def _cached_snapshot(section: ModelSection, commit: str | None) -> LocalBase | None:
    """The snapshot in the cache when all its needed files are there, without asking the network."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    revision = commit or section.revision
    weights = section.weights == "pretrained"
    patterns: list[str] | None = None
    try:
        names = [file.path for file in get_cached_repo_tree(section.base, revision=revision)]
        wanted = wanted_files(names, shards=None, remote_code=section.trust_remote_code, weights=weights)
        patterns = [_literal(file) for file in wanted]
    except CachedRepoTreeNotFoundError:
        pass  # Fetched by an older hub client: what the folder holds is checked when it is read.
    try:
        folder = snapshot_download(section.base, revision=revision, local_files_only=True, allow_patterns=patterns)
    except LocalEntryNotFoundError:
        return None
    path = Path(folder)
    if weights and not (path / SINGLE_FILE).exists() and not (path / INDEX_FILE).exists():
        return None
    return LocalBase(path=path, revision=path.name)


def shards_of_index(path: Path, name: str) -> list[str]:
    """The safetensors files that an index names.  Raises BaseModelError when it is not one."""
    index = read_json(path, name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise BaseModelError(
            f"{name}: {path.name} has no weight_map.", "Download the base again, or choose another revision."
        )
    return sorted(set(weight_map.values()))


def read_json(path: Path, name: str) -> dict[str, Any]:
    """An object from a JSON file of the base.  Raises BaseModelError naming the base and the file."""
    again = "Download the base again, or name another one."
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BaseModelError(f"{name}: {path.name} is not JSON (line {error.lineno}: {error.msg}).", again) from None
    except UnicodeDecodeError:
        raise BaseModelError(f"{name}: {path.name} is not UTF-8 text.", again) from None
    if not isinstance(value, dict):
        raise BaseModelError(f"{name}: {path.name} does not hold an object.", again)
    return value


def why_no_config(name: str, files: set[str]) -> tuple[str, str]:
    if "adapter_config.json" in files:
        return f"{name} is an adapter, not a base.", "Name the base it was trained on (base_model_name_or_path)."
    if any(file.endswith(".gguf") for file in files):
        return f"{name} holds GGUF files, which cannot be trained.", "Name the repository that they were made from."
    return f"{name} has no config.json.", "Name a causal language model in the transformers format."


def _check_safetensors(name: str, files: Iterable[str]) -> None:
    top = [file for file in files if "/" not in file]
    if SINGLE_FILE in top or INDEX_FILE in top or any(_SHARD.fullmatch(file) for file in top):
        return
    raise BaseModelError(*no_safetensors(name, top))


def no_safetensors(name: str, files: Iterable[str]) -> tuple[str, str]:
    """The two lines about a base without safetensors."""
    files = list(files)
    pickled = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return (
            f"{name} has no safetensors, only pickled weights ({pickled[0]}), which run code when they are loaded.",
            "Name a base with .safetensors files, or convert it with save_pretrained where you trust its author.",
        )
    if any(file.endswith(".gguf") for file in files):
        return f"{name} has no safetensors, only GGUF files.", "Name the repository that they were made from."
    return f"{name} has no safetensors.", "Name a base with .safetensors files, or set model.weights: random."


def _missing_bytes(name: str, commit: str, sizes: dict[str, int]) -> int:
    """Bytes of the files that are not in the cache yet."""
    from huggingface_hub import try_to_load_from_cache

    return sum(
        size for file, size in sizes.items() if not isinstance(try_to_load_from_cache(name, file, revision=commit), str)
    )


def _check_room(name: str, missing: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    free = _free_bytes(cache)
    if missing > free:
        raise BaseModelError(
            f"{name} needs {missing:,} bytes of disk ({_size(missing)}); {cache} has {free:,} free ({_size(free)}).",
            "Free disk space, or set HF_HOME to a folder on a larger disk.",
        )


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _literal(name: str) -> str:
    """A file name as a pattern that matches only itself."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")


def _bar_class(progress: Progress | None, *, here: int = 0, total: int = 0) -> type[Any]:
    """A tqdm class that prints nothing; what arrives, after `here` bytes, is reported to `progress`."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    base: Any = tqdm

    class QuietBar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Two bars count bytes: received and written.  Written ones include the part of an earlier try.
            self._reports = progress is not None and str(kwargs.get("desc", "")).startswith("Reconstructing")
            self._done = here
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> Any:
            if self._reports and progress is not None:
                self._done += int(n or 0)
                progress(self._done, max(total, self._done))
            return super().update(n)

    return QuietBar


def _gated(name: str, *, with_token: bool) -> BaseModelError:
    page = f"its page on the hub ({_endpoint()}/{name})"
    if with_token:
        return BaseModelError(
            f"{name} is gated, and your token has no access to it.",
            f"Ask for access on {page}, with the account that the token belongs to.",
        )
    return BaseModelError(
        f"{name} is gated: its licence must be accepted, and there is no access token here.",
        f"Accept it on {page}, then log in with `hf auth login` or set HF_TOKEN.",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _refused(section: ModelSection, error: Any) -> BaseModelError:
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, status = section.base, error.response.status_code
    token = get_token() is not None
    message = error.response.headers.get("X-Error-Message", "")
    if isinstance(error, GatedRepoError):
        return _gated(name, with_token=token)
    if status == 401 and "Invalid credentials" in message:
        return BaseModelError(
            f"The hub does not accept the access token (asked for {name}).",
            "Log in again with `hf auth login`, or correct or unset HF_TOKEN.",
        )
    if isinstance(error, RevisionNotFoundError):
        return BaseModelError(
            f"model.revision = {section.revision} does not exist in {name}.",
            "Give a branch, a tag or a whole commit (40 characters), or delete the line to get the newest.",
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return BaseModelError(f"{name} lacks a file that its own listing names.", "Choose another revision.")
    if isinstance(error, RepositoryNotFoundError):
        return BaseModelError(
            f"model.base = {name} is not on the hub, or it is private; there is no folder of that name either.",
            "Names look like Qwen/Qwen3-0.6B. For a private one, log in with `hf auth login` or set HF_TOKEN.",
        )
    if status == 429:
        return BaseModelError(f"The hub limits how often it may be asked ({name}).", "Wait a few minutes, or log in.")
    if status >= 500:
        return BaseModelError(f"The hub has a problem of its own (status {status}, asked for {name}).", _CONNECT)
    return BaseModelError(f"The hub refuses {name} (status {status}).", "Check the name, the token and its rights.")


def _unreachable(name: str, error: BaseException) -> BaseModelError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return BaseModelError(
            f"{name} is not (wholly) in the cache, and HF_HUB_OFFLINE is set.",
            "Unset HF_HUB_OFFLINE to download it, or give model.base a local folder.",
        )
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return BaseModelError(f"{name} could not be fetched from {_endpoint()} ({what}).", _CONNECT)


def _disk_problem(name: str, error: OSError) -> BaseModelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BaseModelError(
            f"The disk became full while {name} was downloaded.",
            "Free disk space, or set HF_HOME to a folder on a larger disk; files that came whole are kept.",
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return BaseModelError(f"{name} could not be stored: {error}.", "Set HF_HOME to a folder you may write to.")
    if isinstance(error, ConnectionError) or error.errno is None:
        return BaseModelError(f"The download of {name} broke off: {str(error).splitlines()[0]}", _CONNECT)
    return BaseModelError(f"{name} could not be fetched: {os.strerror(error.errno)}.", _CONNECT)
