"""The input embedding in host memory: the same rows, off the GPU and back; and left alone where it cannot go."""

from __future__ import annotations

import pytest
import torch

from onlay.model.host_embedding import HostEmbedding
from tests.builders import tiny_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_are_the_same_and_the_gpu_holds_none_of_them() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).to("cuda")
    model.requires_grad_(False)
    ids = torch.randint(200, (2, 17), device="cuda")
    expected = model(input_ids=ids).logits
    host = HostEmbedding(model)
    host.move_out()
    embedding = model.get_input_embeddings()
    assert host.is_out and not embedding.weight.is_cuda and embedding.weight.is_pinned()
    assert torch.equal(model(input_ids=ids).logits, expected)
    host.put_back()
    assert embedding.weight.is_cuda and "forward" not in vars(embedding)
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_on_a_cpu_nothing_moves(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.requires_grad_(False)
    host = HostEmbedding(model)
    host.move_out()
    assert not host.is_out
    host.put_back()
    assert "forward" not in vars(model.get_input_embeddings())


@pytest.mark.parametrize(("tied", "trains"), [(True, False), (False, True)])
def test_a_shared_or_trained_embedding_is_not_taken(tied: bool, trains: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.requires_grad_(trains)
    assert HostEmbedding(model)._embedding is None
    model = tiny_model("llama", tie_word_embeddings=False)
    model.requires_grad_(False)
    assert HostEmbedding(model)._embedding is model.get_input_embeddings()
