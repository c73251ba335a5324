"""Are there enough rows for the method that trains on them?"""

from __future__ import annotations

from onlay.data.audit.catalogue import finding
from onlay.records import Finding

FEW_ROWS = 500
TYPICAL_ROWS = {
    "head": "100 rows of each label and more",
    "full": "10,000 rows and more",
}
"""What a method is usually given; the adapters of the LoRA family learn a manner or a task from fewer."""
TYPICAL_ADAPTER_ROWS = "500 to 10,000 rows of one task"


def few_rows(rows: int, *, method: str) -> list[Finding]:
    """`few_rows` where `rows` training rows are fewer than FEW_ROWS, but some; else nothing."""
    if not 0 < rows < FEW_ROWS:
        return []
    told = {"least": FEW_ROWS, "method": method, "typical": TYPICAL_ROWS.get(method, TYPICAL_ADAPTER_ROWS)}
    return [finding("few_rows", count=rows, told=told)]
