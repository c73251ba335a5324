"""Stored tensors as a stream: each is read when its turn comes near, straight to the device where it will be used.

transformers takes what it calls a state dict and asks each value for its tensor, one after another in a known order.  The
values here are tickets: asking for one hands the tensor over, and meanwhile a few threads read what comes next.  What was read
and not yet asked for never exceeds a window, so the host holds no more than a few tensors, however large the base.

    CPU    threads read from the files into the tensor's own memory
    CUDA   each thread has two page-locked buffers: one is read into while the other is copied to the device, on a stream
           of the thread's own; whoever asks for the tensor makes the device's own stream wait, not the host

Order is a hint: tensors that are asked for in another one arrive all the same, only later.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from onlay.errors import BaseModelError
from onlay.model.weight_files import StoredTensor

WINDOW_BYTES = 2**28
"""Most bytes that are read ahead; a single tensor may be larger."""
CHUNK_BYTES = 2**23
"""Bytes of one read, and of each page-locked buffer."""
READERS = 8
"""Most threads.  Two buffers each: 128 MiB of page-locked memory."""
_NEAR = 8
"""Positions by which several threads that ask at once may overtake each other."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
_REPORTS = 200
"""Progress is told about this many times."""
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

Progress = Callable[[int, int], None]


def reading_order(tensors: Sequence[StoredTensor], *, by_target: bool) -> list[StoredTensor]:
    """The order in which transformers asks for stored tensors: by natural name.

    When it quantizes (`by_target`) it asks for all tensors that make one weight together: those that differ in the number
    of an expert only.
    """
    from transformers.core_model_loading import dot_natural_key

    ordered = sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name))
    if not by_target:
        return ordered
    first: dict[str, int] = {}
    for place, tensor in enumerate(ordered):
        first.setdefault(_EXPERT.sub(".experts.*.", tensor.name), place)
    return sorted(ordered, key=lambda tensor: first[_EXPERT.sub(".experts.*.", tensor.name)])


class Ticket:
    """Stands for a tensor that is not in memory, as safetensors' own slices do: `ticket[...]` is the tensor."""

    def __init__(self, stream: TensorStream, place: int) -> None:
        self._stream, self._place = stream, place

    def __getitem__(self, index: object) -> Tensor:
        if index is not Ellipsis:
            raise TypeError("a ticket is for a whole tensor: ticket[...]")
        return self._stream.take(self._place)

    def get_shape(self) -> list[int]:
        return list(self._stream.tensors[self._place].shape)

    def get_dtype(self) -> str:
        return self._stream.tensors[self._place].dtype


class _Reading:
    """A tensor on its way."""

    def __init__(self, tensor: Tensor, num_bytes: int) -> None:
        self.tensor, self.num_bytes = tensor, num_bytes
        self.parts: list[Future[torch.cuda.Event | None]] = []

    def finish(self) -> Tensor:
        """Waits for the reads; on CUDA the current stream waits for the copies.  Raises what went wrong in a thread."""
        for part in self.parts:
            arrived = part.result()
            if arrived is not None:
                torch.cuda.current_stream(self.tensor.device).wait_event(arrived)
        return self.tensor

    def abandon(self) -> None:
        """Returns once nothing writes into the tensor's memory any more."""
        running = [part for part in self.parts if not part.cancel()]
        wait(running)
        for part in running:
            arrived = part.result() if part.exception() is None else None
            if arrived is not None:
                arrived.synchronize()


class TensorStream:
    """Reads `tensors`, best asked for in this order, onto `device` (any other than CUDA: the CPU).  Use it with `with`.

    `progress(bytes handed over, bytes in all)` is called by whichever thread asks, one call at a time.
    """

    def __init__(
        self, tensors: Sequence[StoredTensor], device: torch.device, *, readers: int = READERS, progress: Progress | None = None
    ) -> None:  # fmt: skip
        unknown = next((tensor for tensor in tensors if tensor.dtype not in _DTYPES), None)
        if unknown is not None:
            raise BaseModelError(
                f"{unknown.name} in {unknown.file.name} is stored as {unknown.dtype}, which cannot be read.",
                "Name the 16-bit base that it was made from.",
            )
        self.tensors = list(tensors)
        self._device = device if device.type == "cuda" else torch.device("cpu")
        self._pool = ThreadPoolExecutor(max_workers=max(1, min(READERS, readers)), thread_name_prefix="weights")
        self._files: dict[Path, int] = {}
        self._own = threading.local()
        self._lock = threading.Lock()
        self._ahead: dict[int, _Reading] = {}
        self._taken: set[int] = set()
        self._next = 0
        self._closed = False
        self._progress = progress
        self._telling = threading.Lock()
        self._total_bytes = sum(tensor.num_bytes for tensor in tensors)
        self._done_bytes = self._told_bytes = 0

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            for reading in self._ahead.values():
                reading.abandon()
            self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if kind is None and self._done_bytes < self._total_bytes:
            self._tell(self._total_bytes - self._done_bytes)  # What nobody asked for.

    def tickets(self) -> dict[str, Ticket]:
        """What transformers takes as a state dict.  Each ticket is good for as long as the stream is open."""
        return {tensor.name: Ticket(self, place) for place, tensor in enumerate(self.tensors)}

    def take(self, place: int) -> Tensor:
        """The tensor at this place of the order.  Raises OSError when its file cannot be read."""
        with self._lock:
            if self._closed:
                raise ValueError("the stream is closed")
            reading = self._ahead.pop(place, None)
            if reading is None:
                if not self._next <= place < self._next + _NEAR:
                    self._start_over(place)
                reading = self._begin(place)
            new = place not in self._taken
            self._taken.add(place)
            self._read_ahead()
        tensor = reading.finish()
        if new:
            self._tell(reading.num_bytes)
        return tensor

    def _start_over(self, place: int) -> None:
        """The asking went on elsewhere: what was read ahead in the old place would only fill the window."""
        for reading in self._ahead.values():
            reading.abandon()
        self._ahead.clear()
        self._next = place

    def _read_ahead(self) -> None:
        held = sum(reading.num_bytes for reading in self._ahead.values())
        while self._next < len(self.tensors):
            if self._next not in self._taken and self._next not in self._ahead:
                size = self.tensors[self._next].num_bytes
                if self._ahead and held + size > WINDOW_BYTES:
                    return
                self._ahead[self._next] = self._begin(self._next)
                held += size
            self._next += 1

    def _begin(self, place: int) -> _Reading:
        stored = self.tensors[place]
        tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype], device=self._device)
        reading = _Reading(tensor, stored.num_bytes)
        allocated: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # The memory may have belonged to something that the device still works on.
            allocated = torch.cuda.current_stream(tensor.device).record_event()
        file = self._file(stored.file)
        flat = tensor.view(-1).view(torch.uint8)
        for start in range(0, stored.num_bytes, CHUNK_BYTES):
            part = flat[start : start + CHUNK_BYTES]
            reading.parts.append(self._pool.submit(self._fill, file, stored, start, part, allocated))
        return reading

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def _fill(
        self, file: int, stored: StoredTensor, start: int, part: Tensor, allocated: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """In a thread: the bytes of `stored` from `start` on into `part`; on CUDA, the end of the copy."""
        if allocated is None:
            _read(file, stored, start, part)
            return None
        buffers = self._buffers()
        buffer = buffers.turn()[: part.numel()]
        _read(file, stored, start, buffer)
        buffers.stream.wait_event(allocated)
        with torch.cuda.stream(buffers.stream):
            part.copy_(buffer, non_blocking=True)
        return buffers.copied()

    def _buffers(self) -> _Buffers:
        buffers: _Buffers | None = vars(self._own).get("buffers")
        if buffers is None:
            buffers = self._own.buffers = _Buffers(self._device)
        return buffers

    def _tell(self, more_bytes: int) -> None:
        if self._progress is None:
            return
        with self._telling:
            self._done_bytes += more_bytes
            last = self._done_bytes == self._total_bytes
            if last or self._done_bytes - self._told_bytes >= self._total_bytes / _REPORTS:
                self._told_bytes = self._done_bytes
                self._progress(self._done_bytes, self._total_bytes)


class _Buffers:
    """A reading thread's two page-locked buffers, used in turn, and the CUDA stream that it copies on."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self._memory = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def turn(self) -> Tensor:
        """The next buffer, once the copy out of it has ended."""
        self._turn = 1 - self._turn
        self._copied[self._turn].synchronize()
        return self._memory[self._turn]

    def copied(self) -> torch.cuda.Event:
        """Marks the end of the copy that was begun last."""
        event: torch.cuda.Event = self.stream.record_event()
        self._copied[self._turn] = event
        return event


def _read(file: int, stored: StoredTensor, start: int, into: Tensor) -> None:
    """Fills `into` (bytes, on the host) with the bytes of `stored` from its byte `start` on.  Raises OSError."""
    memory = memoryview(into.numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], stored.start + start + done)
        if count == 0:
            raise OSError(f"{stored.file.name} ends within {stored.name}")
        done += count
