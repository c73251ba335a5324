"""The hardware table of the guides, computed."""

from __future__ import annotations

from onlay.planning.devices import find_gpu, read_gpus
from onlay.planning.memory import room_bytes
from onlay.planning.table import BASES, hardware_table


def test_every_base_has_three_methods_in_the_order_of_memory() -> None:
    rows = hardware_table()
    assert [row.base for row in rows] == [base for base in BASES for _ in range(3)]
    for full, lora, qlora in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert (full.method, lora.method, qlora.method) == ("full", "lora", "qlora")
        assert full.needed_bytes > lora.needed_bytes > qlora.needed_bytes
        assert full.trainable == full.parameters and lora.trainable == qlora.trainable


def test_the_gpu_is_the_smallest_that_has_as_much() -> None:
    gpus = read_gpus()
    for row in hardware_table():
        if row.gpu is None:
            assert all(room_bytes(gpu.memory_bytes) < row.needed_bytes for gpu in gpus.values())
            continue
        memory = find_gpu(row.gpu, gpus=gpus).gpu.memory_bytes
        assert room_bytes(memory) >= row.needed_bytes
        assert all(
            room_bytes(gpu.memory_bytes) < row.needed_bytes for gpu in gpus.values() if gpu.memory_bytes < memory
        )


def test_numbers_that_guides_give() -> None:
    """8B in 16 bit is no job for 16 GB; in NF4 it is one for 8; full tuning takes 18 bytes a parameter and more."""
    rows = {(row.base, row.method): row.needed_bytes for row in hardware_table()}
    assert rows["llama-3.1-8b", "lora"] > 16e9 and rows["llama-3.1-8b", "qlora"] < 8.6e9
    assert rows["llama-3.1-70b", "qlora"] < 50e9
    assert rows["llama-2-7b", "full"] > 18 * 6.74e9
