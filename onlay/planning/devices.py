"""GPUs that a plan can be made for, by name: what they can do, and what an hour of them has been offered for.

The table is gpus.yaml beside this file; the user's own is laid over it.  Names are read as people write them:
`rtx4090`, `NVIDIA GeForce RTX 4090`, `8xh200`.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onlay.errors import SetupError
from onlay.hardware import Device
from onlay.ledger import home
from onlay.recipe.numbers import Loader

FILE = "gpus.yaml"
SAME_MEMORY = 0.1
"""Share by which the memory of one card differs between drivers, ECC on and off, nvidia-smi and torch."""
OfferKind = Literal["on-demand", "spot"]
_MANY = re.compile(r"^\s*(\d{1,4})\s*x\s*(?=\D|\d{4})(.+)$", re.I)
"""`8xh200`, `2 x 4090`."""
_NOISE = re.compile(r"\b(nvidia|geforce|tesla|generation)\b|gpu|[^a-z0-9]")
"""What names of one card differ by: `NVIDIA A100-SXM4-80GB`, `a100 sxm4 80gb`."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Offer(_Entry):
    """What one GPU costs for an hour at one place, as seen on one day."""

    provider: str = Field(min_length=1)
    usd_per_hour: float = Field(gt=0)
    """For one GPU."""
    kind: OfferKind
    """spot: the provider may end it at any time."""
    least_count: int = Field(1, ge=1)
    """The price holds from that many GPUs on."""
    date: datetime.date
    source: str = Field(min_length=1)


class Gpu(_Entry):
    """One kind of GPU.  Rates are those of the data sheet: dense, without sparsity, summed in 32 bits."""

    name: str = Field(min_length=1)
    aliases: tuple[str | int, ...] = Field((), strict=False)
    memory_mib: int = Field(ge=1024)
    """As nvidia-smi reports it."""
    compute_capability: tuple[int, int] = Field(strict=False)
    tflops: float = Field(gt=0)
    """Dense TFLOP/s in bf16; in fp16 where `has_bf16` is false."""
    fp8_tflops: float | None = Field(None, gt=0)
    bandwidth_gb_s: float = Field(gt=0)
    efficiency_class: str = Field(alias="class", min_length=1)
    """Cards that reach similar shares of their rates."""
    offers: tuple[Offer, ...] = Field((), strict=False)

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * 2**20

    @property
    def has_bf16(self) -> bool:
        return self.device.has_bf16

    @property
    def has_fp8(self) -> bool:
        return self.fp8_tflops is not None

    @property
    def device(self) -> Device:
        """As `Hardware` holds the ones that were found."""
        return Device(name=self.name, memory_bytes=self.memory_bytes, compute_capability=self.compute_capability)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuGroup:
    """Some GPUs of one kind, in one machine."""

    gpu: Gpu
    count: int

    @property
    def name(self) -> str:
        return self.gpu.name if self.count == 1 else f"{self.count} x {self.gpu.name}"


def read_gpus(prices: str | Path | None = None) -> dict[str, Gpu]:
    """The table by name, smallest memory first; with the user's own laid over it.

    `prices`: the user's file; None: $ONLAY_HOME/gpus.yaml where there is one.  Raises SetupError for a file that is not
    there or not of this form.
    """
    table = {gpu.name: gpu for gpu in _parse(_read(Path(__file__).with_name(FILE)), FILE)}
    own = Path(prices) if prices is not None else home() / FILE
    if prices is not None or own.is_file():
        known = _by_key(table)
        for number, entry in enumerate(_entries(_read(own), str(own)), 1):
            given = dict(_mapping(entry, str(own), number))
            before = known.get(_key(str(given.get("name", ""))))
            if before is not None:
                given = before.model_dump(by_alias=True) | given | {"name": before.name}
            made = _gpu(given, str(own), number)
            table[made.name] = made
    return dict(sorted(table.items(), key=lambda item: (item[1].memory_mib, item[1].tflops, item[0])))


def find_gpu(name: str, *, gpus: Mapping[str, Gpu]) -> GpuGroup:
    """`rtx4090`, `NVIDIA H200`, `8xh200`.  Raises SetupError with the nearest names."""
    many = _MANY.match(name)
    count, wanted = (int(many[1]), many[2]) if many else (1, name)
    if not 1 <= count <= 1024:
        raise SetupError(f"{name} names {count} GPUs, which is outside 1..1024.", "Example: --gpu 8xh200")
    known = _by_key(gpus)
    found = known.get(_key(wanted))
    if found is None:
        near = difflib.get_close_matches(_key(wanted), list(known), n=2, cutoff=0.6)
        likely = list(dict.fromkeys(known[key].name for key in near))
        hint = f" Did you mean {' or '.join(likely)}?" if likely else ""
        raise SetupError(
            f"{wanted.strip() or repr(name)} is not a GPU that onlay has numbers for.{hint}",
            f"Known: {', '.join(gpus)}. Others can be added in $ONLAY_HOME/{FILE}.",
        )
    return GpuGroup(gpu=found, count=count)


def match_device(device: Device, *, gpus: Mapping[str, Gpu]) -> Gpu | None:
    """The table's entry for a GPU that was found in this machine; None where it has none.

    The memory has to be about the same: some cards are sold with more or less of it under one name.
    """
    found = _by_key(gpus).get(_key(device.name))
    if found is None or abs(found.memory_bytes - device.memory_bytes) > SAME_MEMORY * found.memory_bytes:
        return None
    return found


def _by_key(gpus: Mapping[str, Gpu]) -> dict[str, Gpu]:
    return {_key(str(name)): gpu for gpu in gpus.values() for name in (*gpu.aliases, gpu.name)}


def _key(name: str) -> str:
    return _NOISE.sub("", name.lower())


# --------------------------------------------------------------------------------------------------------------- file


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}.", "Give a table of GPUs: --prices FILE") from None
    except UnicodeDecodeError:
        raise SetupError(f"{path} is not UTF-8 text.", "Give a YAML table of GPUs.") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise SetupError(f"{path}{line}: {problem or 'not YAML'}.", "Correct it, or take the file away.") from None


def _parse(values: Any, file: str) -> list[Gpu]:
    return [_gpu(_mapping(entry, file, number), file, number) for number, entry in enumerate(_entries(values, file), 1)]


def _entries(values: Any, file: str) -> list[Any]:
    if not isinstance(values, dict) or set(values) != {"gpus"} or not isinstance(values["gpus"], list):
        raise SetupError(
            f"{file} does not hold one list named gpus.", "Begin with `gpus:` and one `- name: ...` a GPU."
        )
    return list(values["gpus"])


def _mapping(entry: Any, file: str, number: int) -> Mapping[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise SetupError(f"{file}, GPU {number} has no name.", "Each entry begins with `- name: RTX 4090`.")
    return entry


def _gpu(values: Mapping[str, Any], file: str, number: int) -> Gpu:
    try:
        return Gpu.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SetupError(
            f"{file}, GPU {number} ({values['name']}): {field}: {first['msg']}.",
            f"Fields: {', '.join(info.alias or name for name, info in Gpu.model_fields.items())}; "
            f"of an offer: {', '.join(Offer.model_fields)}.",
        ) from None
