"""Finite and moved, told from the bytes of every dtype that an adapter may have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from onlay.errors import OutputError, ProofError
from onlay.release import weights
from onlay.release.weights import check_weights, read_header

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
A, B = "m.0.q_proj.lora_A.weight", "m.0.q_proj.lora_B.weight"


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_weights_that_moved_are_well(file: Path, dtype: torch.dtype) -> None:
    # The largest finite value is one bit from infinity.
    b = torch.tensor([[torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).tiny]], dtype=dtype)
    assert check_weights(saved(file, {A: torch.randn(3, 4).to(dtype), B: b})) == []


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [A, B])
def test_one_value_that_is_not_finite_is_found(file: Path, dtype: torch.dtype, value: float, name: str) -> None:
    tensors = {A: torch.ones(300, 40, dtype=dtype), B: torch.ones(40, 300, dtype=dtype)}
    tensors[name][-1, -1] = value
    with pytest.raises(ProofError, match=f"{name} .* holds NaN or infinity"):
        check_weights(saved(file, tensors))


def test_values_are_looked_at_in_every_piece(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PIECE_BYTES", 64)
    tensors = {A: torch.ones(9, 9), B: torch.zeros(9, 9)}
    tensors[B][8, 8] = 1e-30
    assert check_weights(saved(file, tensors)) == []
    tensors[A][4, 4] = torch.nan
    with pytest.raises(ProofError):
        check_weights(saved(file, tensors))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_b_of_zeros_did_not_move(file: Path, dtype: torch.dtype, zero: float) -> None:
    b = torch.full((4, 2), zero, dtype=dtype)
    with pytest.raises(ProofError, match="did not move: B is zero in every module"):
        check_weights(saved(file, {A: torch.randn(2, 4).to(dtype), B: b}))


def test_a_head_of_zeros_did_not_move(file: Path) -> None:
    with pytest.raises(ProofError, match="did not move"):
        check_weights(saved(file, {"score.weight": torch.zeros(3, 8)}))
    assert check_weights(saved(file, {"score.weight": torch.ones(3, 8)})) == []


def test_some_modules_that_did_not_move_are_told(file: Path) -> None:
    tensors = {A: torch.ones(2, 4), B: torch.ones(4, 2), A.replace("q", "v"): torch.ones(2, 4)}
    (note,) = check_weights(saved(file, tensors | {B.replace("q", "v"): torch.zeros(4, 2)}))
    assert note.startswith("1 of 2 modules did not move, first m.0.v_proj")


def test_a_file_that_is_not_whole_is_two_lines(file: Path) -> None:
    saved(file, {A: torch.ones(2, 4), B: torch.ones(4, 2)})
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(OutputError, match="cannot be read") as caught:
        check_weights(file)
    assert len(str(caught.value).splitlines()) == 2


def test_a_dtype_that_cannot_be_checked_is_refused(file: Path) -> None:
    with pytest.raises(OutputError, match="stored as I8"):
        check_weights(saved(file, {A: torch.ones(2, 4, dtype=torch.int8), B: torch.ones(4, 2)}))


def test_headers_tell_where_the_bytes_lie(file: Path) -> None:
    tensors = {A: torch.arange(8.0).reshape(2, 4), B: torch.arange(8.0, 16.0).reshape(4, 2)}
    saved(file, tensors)
    for entry in read_header(file):
        data = file.read_bytes()[entry.start : entry.start + entry.num_bytes]
        found = np.frombuffer(data, "<f4").reshape(entry.shape)
        assert (found == tensors[entry.name].numpy()).all()
