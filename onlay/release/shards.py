"""A base's safetensors files written again with some tensors changed: same files, names, dtypes, order and index.

A file's header stays as it is, since neither shape nor dtype changes; behind it the tensors follow in the order of the
original, copied byte for byte or computed.  In memory are, at any time, one changed matrix in its own and in the working
precision, and the pair of its adapter: fused experts in one tensor go one expert at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from onlay.errors import OutputError, ProofError
from onlay.model.hub import INDEX_FILE, SINGLE_FILE
from onlay.model.stored_names import Place
from onlay.model.updates import Updates
from onlay.model.weight_files import StoredTensor

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Stored types that can be merged into."""
_COPY_BYTES = 8 * 2**20
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What happens to one stored tensor: first `round_trip` (it becomes what its quantized form stands for), then the
    adapter's update of `place`."""

    place: Place
    updated: bool
    round_trip: Callable[[Tensor], Tensor] | None = None
    """(O, I) in the stored dtype -> (O, I) float32."""


def write_shards(
    tensors: list[StoredTensor], changes: Mapping[str, Change], updates: Updates, folder: Path, *, progress: Progress
) -> None:
    """Writes every file of `tensors` into `folder`, with `changes` by stored name; progress(bytes done, bytes in all).

    Raises ProofError when a merged value is not finite in the file's dtype (float16 ends at 65,504), and OSError.
    """
    files: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        files.setdefault(tensor.file, []).append(tensor)
    total, done = sum(tensor.num_bytes for tensor in tensors), 0
    with updates:
        for path, inside in files.items():
            with path.open("rb") as source, (folder / path.name).open("wb") as out:
                for tensor in sorted(inside, key=lambda tensor: tensor.start):
                    _copy(source, out, tensor.start - out.tell())  # The header, and padding between tensors.
                    change = changes.get(tensor.name)
                    if change is None:
                        _copy(source, out, tensor.num_bytes)
                    else:
                        for block in _merged_blocks(source, tensor, change, updates):
                            out.write(block.view(torch.uint8).flatten().numpy().data)
                    done += tensor.num_bytes
                    progress(done, total)
    index = next(iter(files)).parent / INDEX_FILE
    if next(iter(files)).name != SINGLE_FILE:
        shutil.copyfile(index, folder / INDEX_FILE)


def _copy(source: BinaryIO, out: BinaryIO, num_bytes: int) -> None:
    """Copies from the same place of `source` that `out` has come to."""
    source.seek(out.tell())
    while num_bytes:
        data = source.read(min(_COPY_BYTES, num_bytes))
        if not data:
            raise OutputError(f"{source.name} was cut short while it was read.", "Leave the base alone during a merge.")
        out.write(data)
        num_bytes -= len(data)


def _merged_blocks(source: BinaryIO, tensor: StoredTensor, change: Change, updates: Updates) -> Iterator[Tensor]:
    """The new values of a tensor, in its dtype, one matrix at a time."""
    dtype = DTYPES[tensor.dtype]
    working = torch.float64 if dtype == torch.float64 else torch.float32
    fused = len(tensor.shape) == 3
    shape = tensor.shape[1:] if fused else tensor.shape
    count = tensor.shape[0] if fused else 1
    source.seek(tensor.start)
    for expert in range(count):
        raw = bytearray(tensor.num_bytes // count)
        if source.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise OutputError(f"{source.name} was cut short while it was read.", "Leave the base alone during a merge.")
        weight = torch.frombuffer(raw, dtype=dtype).view(shape)
        place = Place(parameter=change.place.parameter, expert=expert) if fused else change.place
        merged = change.round_trip(weight) if change.round_trip is not None else weight.to(working)
        # Never in place on what was read: float64 `to` gives the same tensor, which is nobody else's.
        if change.updated:
            merged = updates.apply(merged.to(working), place)
        merged = merged.to("cpu", dtype).contiguous()
        if not bool(torch.isfinite(merged).all()):
            raise ProofError(
                f"{tensor.name} is not finite once the adapter is merged into its {tensor.dtype}.",
                "Train with a lower learning rate, or serve the adapter beside its base.",
            )
        yield merged
