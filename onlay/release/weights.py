"""What a trained file's bytes tell without torch: finite or not, moved or not.

The checks read every value once, in pieces, through a memory map.  bf16, which numpy does not have, is looked at as
16-bit integers: infinity and NaN are the values whose eight exponent bits are all ones.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import OutputError, ProofError

if TYPE_CHECKING:
    import numpy as np

_PIECE_BYTES = 8 * 2**20
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_BF16_EXPONENT = 0x7F80


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A tensor of a safetensors file: name, dtype as the format calls it, shape, and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file, by name; no weight is read.  Raises OutputError for a file that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # Its own reader checks shapes, offsets and the length of the file.
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be read: {error}.", "Copy the adapter again.") from None
    header.pop("__metadata__", None)
    return [
        Tensor(
            name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=8 + length + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in sorted(header.items())
    ]  # fmt: skip


def check_weights(path: Path) -> list[str]:
    """Refuses weights that are not finite or did not move from where they began; returns in words what is odd.

    LoRA's B and a classification head begin at zero, so all zeros means that nothing was learned.
    Raises ProofError naming the tensor, and OutputError for a file that is not whole.
    """
    tensors = read_header(path)
    updates = [tensor for tensor in tensors if _begins_at_zero(tensor)]
    still = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for tensor in tensors:
            moved = False
            for piece in _pieces(data, tensor):
                _check_finite(piece, tensor, path)
                moved = moved or _any(piece, tensor)
            if tensor in updates and not moved:
                still.append(tensor.name)
    if len(still) == len(updates):
        what = "B is zero in every module" if updates else "it holds no weight that begins at zero, such as LoRA's B"
        raise ProofError(
            f"{path} did not move: {what}.", "It says what the base says; train it, then register the run."
        )
    return [f"{len(still)} of {len(updates)} modules did not move, first {still[0]}"] if still else []


def _begins_at_zero(tensor: Tensor) -> bool:
    return ".lora_B" in tensor.name or ".lora_embedding_B" in tensor.name or tensor.name == "score.weight"


def _pieces(data: mmap.mmap, tensor: Tensor) -> Iterator[np.ndarray]:
    """The values, in pieces; bf16 as the integers that it is stored as."""
    import numpy as np

    if tensor.dtype not in _FLOATS and tensor.dtype != "BF16":
        raise OutputError(
            f"{tensor.name} is stored as {tensor.dtype}, in which values cannot be checked.",
            "Save the adapter in 16 or 32 bit floats.",
        )
    kind = np.dtype(_FLOATS.get(tensor.dtype, "<u2"))
    for offset in range(0, tensor.num_bytes, _PIECE_BYTES):
        length = min(_PIECE_BYTES, tensor.num_bytes - offset)
        # A copy: a view would keep the file mapped.
        yield np.frombuffer(data[tensor.start + offset : tensor.start + offset + length], dtype=kind)


def _check_finite(piece: np.ndarray, tensor: Tensor, path: Path) -> None:
    import numpy as np

    if tensor.dtype == "BF16":
        finite = not bool(((piece & _BF16_EXPONENT) == _BF16_EXPONENT).any())
    else:
        finite = bool(np.isfinite(piece).all())
    if not finite:
        raise ProofError(
            f"{path}: {tensor.name} ({' x '.join(f'{size:,}' for size in tensor.shape)}) holds NaN or infinity.",
            "It would answer nothing: lower training.learning_rate and train again.",
        )


def _any(piece: np.ndarray, tensor: Tensor) -> bool:
    """Whether a value is not zero; minus zero, whose bits are not all zero, is zero too."""
    return bool((piece & 0x7FFF).any()) if tensor.dtype == "BF16" else bool(piece.any())
