"""A classification head on a frozen base: what one text's last token means, as one of a few labels.

    h_TD = body(tokens);  logits_K = W_KD h_D of the last token

The body is the base without its language-model head and gets no gradient, so a step keeps no activation and the base
may be stored in any way: 16 bit, nf4, int8, fp8.  Only W (labels K, hidden size D) trains.  It is what transformers'
`...ForSequenceClassification` calls `score.weight`: for the same base and weight the logits are the same.

On disk: head.safetensors (score.weight) and head.json (labels, hidden size, the base's identity and storage).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onlay.errors import BaseModelError, OutputError
from onlay.model.adapter import base_identity
from onlay.records import ModelFacts, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT = "score.weight"
TEXTS_A_BATCH = 64


class ClassificationHead(nn.Module):
    """The body of a frozen base and a linear head of K labels, float32 (float64 over a float64 base).

    The head starts at zero: every label is equally likely then, whatever the base, and as the loss is convex in the
    head there is no symmetry that other values would have to break.
    Raises BaseModelError for a base whose body cannot be told from its language-model head.
    """

    def __init__(self, base: PreTrainedModel, *, num_labels: int) -> None:
        super().__init__()
        body, output = base.get_decoder(), base.get_output_embeddings()
        if body is base or not isinstance(output, nn.Linear):
            raise BaseModelError(
                f"{type(base).__name__} has no body that ends in one linear layer, so no place for a head.",
                "Name a decoder-only base, such as those of the Llama, Qwen, Gemma or GPT-2 families.",
            )
        self.body: Any = body
        # What the language-model head reads; OPT's is not config.hidden_size.
        self.score = nn.Linear(output.in_features, num_labels, bias=False, device=base.device)
        self.score.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
        nn.init.zeros_(self.score.weight)

    def train(self, mode: bool = True) -> Self:
        """The body stays in evaluation mode: a frozen base has no use for its own dropout."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, rows: Tensor, columns: Tensor, **arguments: Any) -> Tensor:
        """Logits (N, K) of the tokens at [rows[n], columns[n]], both (N,) int64; `arguments` are the body's own."""
        with torch.no_grad():
            hidden = self.body(**arguments, use_cache=False).last_hidden_state
            # A body that is spread over several devices ends on another one than it began.
            chosen = hidden[rows.to(hidden.device), columns.to(hidden.device)].to(self.score.weight)
        logits: Tensor = self.score(chosen)
        return logits

    @torch.no_grad()
    def probabilities(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Probability of each label for each text of token ids, none of them empty; in the order of the texts.

        Texts of one length go together: nothing is padded, so any base sees each as if it were alone.
        """
        device = self.score.weight.device
        found: list[list[float]] = [[] for _ in texts]
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(texts):
            by_length.setdefault(len(ids), []).append(i)
        for length, same in by_length.items():
            for start in range(0, len(same), TEXTS_A_BATCH):
                group = same[start : start + TEXTS_A_BATCH]
                rows = torch.arange(len(group), device=device)
                input_ids = torch.tensor([list(texts[i]) for i in group], device=device)
                logits = self(rows, torch.full_like(rows, length - 1), input_ids=input_ids)
                for i, row in zip(group, logits.softmax(-1).tolist(), strict=True):
                    found[i] = row
        return found


def attach_head(model: PreTrainedModel, labels: Sequence[str]) -> ClassificationHead:
    """A fresh head for these labels on a frozen base, in training mode; the head alone requires a gradient.

    Raises BaseModelError.
    """
    model.requires_grad_(False)
    return ClassificationHead(model, num_labels=len(labels)).train()


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedHead:
    """What head.json says beside the base's identity."""

    labels: list[str]
    """In the order of the head's rows."""
    storage: str
    """How the base was kept (bf16: not quantized, nf4, int8, fp8): the head was trained on that rounding of it."""


def save_head(
    head: ClassificationHead,
    folder: Path,
    *,
    facts: ModelFacts,
    labels: Sequence[str],
    storage: str,
    extra: dict[str, Any],
) -> None:
    """Writes head.safetensors and head.json into `folder`.  Raises OutputError."""
    weight = head.score.weight.detach().cpu().contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({WEIGHT: weight}, folder / "head.safetensors")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder} could not be written: {error}.", "Free disk space, then resume the run.") from None
    notes = {"labels": list(labels), "hidden_size": weight.shape[1], "storage": storage} | base_identity(facts) | extra
    write_whole(folder / "head.json", json.dumps(notes, indent=2, ensure_ascii=False) + "\n")


def read_head(folder: Path, *, facts: ModelFacts) -> SavedHead:
    """What a saved head is; reads no weights.

    Raises OutputError where there is no head, and BaseModelError where it was trained on another base.
    """
    path = folder / "head.json"
    if not path.is_file():
        raise OutputError(f"{folder} holds no head.", "Finish the run first: onlay train --resume RUN.")
    notes = json.loads(path.read_text(encoding="utf-8"))
    if notes["base_weight_fingerprint"] != facts.weight_fingerprint:
        raise BaseModelError(
            f"{folder} was trained on {notes['base']} with other weights than {facts.path}.",
            f"Use the base at revision {notes['base_revision']}, or train again on this one.",
        )
    return SavedHead(labels=notes["labels"], storage=notes["storage"])


def load_head(model: PreTrainedModel, folder: Path, *, facts: ModelFacts) -> ClassificationHead:
    """A saved head on its base, for use; `read_head` gives its labels.

    Raises OutputError where it is not there or cannot be read, and BaseModelError where it was trained on another base.
    """
    labels = read_head(folder, facts=facts).labels
    head = ClassificationHead(model, num_labels=len(labels))
    path = folder / "head.safetensors"
    try:
        weight = load_file(path)[WEIGHT]
    except (OSError, SafetensorError, KeyError) as error:
        raise OutputError(f"{path} cannot be read: {error}.", "Copy it again, or train again.") from None
    if weight.shape != head.score.weight.shape:
        saved, wanted = (" x ".join(map(str, shape)) for shape in (weight.shape, head.score.weight.shape))
        raise BaseModelError(
            f"{path} is {saved}; {len(labels)} labels on {facts.name} need {wanted}.",
            "Use the base that it was trained on, or train again on this one.",
        )
    with torch.no_grad():
        head.score.weight.copy_(weight)
    head.requires_grad_(False)
    return head.eval()
