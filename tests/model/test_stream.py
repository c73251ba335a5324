"""The stream of stored tensors: every byte arrives, in any order, from threads, and no more is held than the window."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from onlay.errors import BaseModelError
from onlay.model import stream
from onlay.model.stream import TensorStream, reading_order
from onlay.model.weight_files import StoredTensor, read_tensors

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with every dtype, sizes from nothing to a few hundred bytes, and names whose natural order is not ASCII's."""
    tensors = {
        f"layers.{i}.{dtype}": random_tensor((3, i % 5 * 7), dtype, i) for i, dtype in enumerate(DTYPES * 3)
    } | {"scalar": torch.tensor(2.5), "line": torch.arange(11, dtype=torch.float32)}  # fmt: skip
    names = sorted(tensors)
    half = len(names) // 2
    shards = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
    index = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(str({"weight_map": index}).replace("'", '"'))
    return tmp_path


def expected_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "a.safetensors") | load_file(folder / "b.safetensors")


def opened(folder: Path, **options: Any) -> TensorStream:
    return TensorStream(reading_order(read_tensors(folder, "base"), by_target=False), CPU, **options)


ORDERS: dict[str, Callable[[list[int]], list[int]]] = {
    "in order": lambda places: places,
    "backwards": lambda places: places[::-1],
    "shuffled": lambda places: random.Random(0).sample(places, len(places)),
    "every third first": lambda places: sorted(places, key=lambda place: place % 3),
    "some never": lambda places: places[:3] + places[20:],
    "some twice": lambda places: places[:9] + places[5:],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("window", "chunk"), [(2**28, 2**23), (200, 16), (1, 1)])
def test_every_tensor_arrives_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, order: str, window: int, chunk: int
) -> None:
    monkeypatch.setattr(stream, "WINDOW_BYTES", window)
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
    expected = expected_of(folder)
    with opened(folder) as opening:
        tickets = list(opening.tickets().items())
        assert len(tickets) == len(expected)
        for place in ORDERS[order](list(range(len(tickets)))):
            name, ticket = tickets[place]
            tensor = ticket[...]
            assert tensor.dtype == expected[name].dtype
            assert tensor.shape == expected[name].shape
            assert torch.equal(tensor, expected[name])
            assert ticket.get_shape() == list(tensor.shape)


def test_several_threads_may_ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW_BYTES", 300)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 32)
    expected = expected_of(folder)
    for _ in range(5):
        with opened(folder, readers=3) as opening, ThreadPoolExecutor(4) as pool:
            tickets = opening.tickets()
            found = dict(zip(tickets, pool.map(lambda ticket: ticket[...], tickets.values()), strict=True))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_read_ahead_stays_within_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"w.{i}": torch.full((25,), i, dtype=torch.float32) for i in range(50)}, tmp_path / "model.safetensors")
    read: set[str] = set()
    lock, really = threading.Lock(), stream._read

    def noted(file: int, stored: StoredTensor, start: int, into: Tensor) -> None:
        with lock:
            read.add(stored.name)
        really(file, stored, start, into)

    monkeypatch.setattr(stream, "_read", noted)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 350)  # three tensors of 100 bytes and a half
    with opened(tmp_path) as opening:
        for place in (0, 1, 2, 30, 31):
            assert opening.take(place)[0] == place
            held = [reading.num_bytes for reading in opening._ahead.values()]
            assert sum(held) <= 350
            assert len(held) == 3
    # The three asked for first, two that follow a jump, and at most three ahead of each.
    assert read <= {f"w.{i}" for i in (*range(6), *range(30, 35))}
    assert {"w.0", "w.1", "w.2", "w.30", "w.31"} <= read


def test_progress_counts_bytes_up_to_the_whole(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    tensors = read_tensors(folder, "base")
    total = sum(tensor.num_bytes for tensor in tensors)
    with opened(folder, progress=lambda done, all: told.append((done, all))) as opening:
        for place in range(len(tensors)):
            opening.take(place)
            opening.take(place)
    assert {all for _, all in told} == {total}
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done[-1] == total
    told.clear()
    with opened(folder, progress=lambda done, all: told.append((done, all))) as opening:
        opening.take(3)
    assert told[-1] == (total, total)


def test_a_file_cut_short_while_loading_is_an_error(folder: Path) -> None:
    with opened(folder) as opening:
        (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-1])
        last = max(
            range(len(opening.tensors)), key=lambda place: (opening.tensors[place].file, opening.tensors[place].start)
        )
        with pytest.raises(OSError, match=r"b\.safetensors ends within"):
            opening.take(last)


def test_files_and_threads_are_gone_afterwards(folder: Path) -> None:
    def state() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    before = state()
    with opened(folder) as opening:
        tickets = opening.tickets()
        opening.take(0)
    assert state() == before
    with pytest.raises(IndexError), opened(folder) as failing:
        failing.take(1_000)
    assert state() == before
    with pytest.raises(ValueError, match="closed"):
        next(iter(tickets.values()))[...]


def test_a_dtype_that_there_is_not() -> None:
    odd = StoredTensor(name="w", dtype="F4", shape=(2,), file=Path("x.safetensors"), start=0, num_bytes=1)
    with pytest.raises(BaseModelError, match=r"w in x\.safetensors is stored as F4"):
        TensorStream([odd], CPU)


def test_the_order_is_that_of_transformers() -> None:
    def names(*given: str, by_target: bool) -> list[str]:
        tensors = [
            StoredTensor(name=name, dtype="F32", shape=(1,), file=Path("x"), start=0, num_bytes=4) for name in given
        ]
        return [tensor.name for tensor in reading_order(tensors, by_target=by_target)]

    layers = ["h.10.w", "h.9.w", "h.9.b"]
    assert names(*layers, by_target=False) == names(*layers, by_target=True) == ["h.9.b", "h.9.w", "h.10.w"]
    experts = [f"h.0.experts.{i}.{leaf}" for i in (0, 1, 10) for leaf in ("down", "up")]
    assert names(*experts, by_target=False) == experts
    assert names(*experts, by_target=True) == experts[::2] + experts[1::2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS)
def test_tensors_arrive_whole_on_a_gpu_that_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """With memory that goes from one tensor to the next while the device still works: a copy too early would be seen."""
    monkeypatch.setattr(stream, "WINDOW_BYTES", 2**22)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 2**18)
    expected = {f"w.{i}": random_tensor((300 + i, 1000), torch.bfloat16, i) for i in range(40)}
    save_file(expected, tmp_path / "model.safetensors")
    device = torch.device("cuda:0")
    with TensorStream(reading_order(read_tensors(tmp_path, "base"), by_target=False), device) as opening:
        tickets = list(opening.tickets().items())
        sums: dict[str, Tensor] = {}
        for place in ORDERS[order](list(range(len(tickets)))):
            name, ticket = tickets[place]
            work = torch.randn(2000, 2000, device=device)
            for _ in range(20):
                work = work @ work / 2000
            tensor = ticket[...]
            sums[name] = tensor.view(torch.int16).long().sum() + tensor[-1].view(torch.int16).long().sum()
            del tensor
            torch.empty(300_000, dtype=torch.bfloat16, device=device).fill_(1)
    for name, found in sums.items():
        bits = expected[name].view(torch.int16).long()
        assert found.item() == bits.sum() + bits[-1].sum()
