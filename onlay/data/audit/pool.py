"""Worker processes for the audit, started only once there is enough to do.

Plain processes with pipes rather than multiprocessing: no guard is needed in the user's script, and threads of the caller
are not forked.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from onlay.data.audit.worker import Chunk, Result, Setup, receive, send, work
from onlay.errors import OnlayError

IN_PROCESS_CHUNKS = 6
"""So many chunks are worked off here first: a small file is done before a worker would have started."""


class WorkerError(OnlayError):
    """A worker process ended before its work was done."""

    exit_code = 1


class _Worker:
    """One process.  Only one thread at a time may use it."""

    def __init__(self) -> None:
        # The caller's own path, so that the same onlay is found; -P keeps files in the working folder out of it.  A session
        # of its own: Ctrl-C is for the main process alone, also while this one starts; when that dies, its pipe ends.
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from onlay.data.audit.worker import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        self._setup: Setup | None = None

    def work(self, chunk: Chunk, setup: Setup) -> Result:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            if setup is not self._setup:
                send(self.process.stdin, setup)  # type: ignore[arg-type]
                self._setup = setup
            try:
                send(self.process.stdin, chunk)  # type: ignore[arg-type]
            except RecursionError:  # A row is nested too deeply to be handed on; nothing was sent yet.
                return work(chunk, setup)
            result: Result = receive(self.process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError):
            first, last = chunk.rows[0].place, chunk.rows[-1].number
            code = self.process.wait()
            raise WorkerError(
                f"A worker process of the audit ended ({_told(code)}) between {first} and row {last}.",
                "Its last words are above, if it had any; when memory ran out, give --workers 1.",
            ) from None
        return result

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # What was not sent is not wanted any more.
                pipe.close()


def _told(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


class Pool:
    """Works chunks off, in order, in `workers` processes (None: one for each core); in this one where that is 1."""

    def __init__(self, workers: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self.workers = workers or cores
        self._here = IN_PROCESS_CHUNKS
        self._started: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._started:
            worker.end()

    def map(self, chunks: Iterable[Chunk], setup: Setup) -> Iterator[Result]:
        """The result of every chunk, in their order; chunks are taken a few ahead."""
        waiting: deque[Future[Result]] = deque()
        chunks = iter(chunks)
        while self.workers == 1 or self._here:
            chunk = next(chunks, None)
            if chunk is None:
                return
            self._here = max(0, self._here - 1)
            yield work(chunk, setup)
        self._start()
        with ThreadPoolExecutor(self.workers) as threads:
            try:
                for chunk in chunks:
                    waiting.append(threads.submit(self._work, chunk, setup))
                    if len(waiting) > 2 * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                if waiting:  # An error, or nobody asks any more: the threads wait for answers that are not needed.
                    for future in waiting:
                        future.cancel()
                    for worker in self._started:
                        worker.process.kill()

    def _start(self) -> None:
        while len(self._started) < self.workers:
            worker = _Worker()
            self._started.append(worker)
            self._idle.put(worker)

    def _work(self, chunk: Chunk, setup: Setup) -> Result:
        worker = self._idle.get()
        try:
            return worker.work(chunk, setup)
        finally:
            self._idle.put(worker)
