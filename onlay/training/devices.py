"""One or several devices, through Accelerate: where this process runs, and sums over all of them.

There is no DistributedDataParallel: gradients are summed once a step, after all micro-batches, so ranks may split their
share differently and one that runs out of memory is agreed on before anything is summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET_BYTES = 64 * 2**20


class Devices:
    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, text: str) -> str:
        """The first rank's text on every rank: names of folders hold the time of day."""
        if self.world == 1:
            return text
        from accelerate.utils import broadcast_object_list

        return str(broadcast_object_list([text])[0])

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def sum(self, value: float) -> float:
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return float(tensor)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values: how ranks agree that one of them is in trouble."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums .grad over all ranks in flat buckets.  A rank whose share did not touch a weight counts as zero."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = parameter.grad
            if bucket and (size + grad.nbytes > BUCKET_BYTES or grad.dtype != bucket[0].dtype):
                self._sum_bucket(bucket)
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        torch.distributed.all_reduce(flat)
        for grad, piece in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(piece.view_as(grad))


def find_devices(*, trackers: Sequence[str] = (), folder: Path) -> Devices:
    """Where this process runs, by Accelerate; `folder` is where trackers write."""
    from accelerate import Accelerator

    # Without `cpu`, Accelerate takes several ranks on a machine without accelerators for as many runs of one process.
    on_cpu = not torch.accelerator.is_available()
    return Devices(Accelerator(cpu=on_cpu, log_with=list(trackers) or None, project_dir=str(folder)))  # type: ignore[arg-type]
