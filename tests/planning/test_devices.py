"""The table of GPUs: names as people write them, the user's own laid over it, and nothing that is not known."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlay.errors import SetupError
from onlay.hardware import Device
from onlay.planning.devices import find_gpu, match_device, read_gpus

GIB = 2**30


@pytest.mark.parametrize(
    ("written", "name", "count"),
    [
        ("rtx4090", "RTX 4090", 1),
        ("4090", "RTX 4090", 1),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 1),
        ("8xh200", "H200", 8),
        ("2 x 4090", "RTX 4090", 2),
        ("h100", "H100 SXM", 1),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 1),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 1),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", 1),
        ("a100", "A100 80GB", 1),
        ("Tesla T4", "T4", 1),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 1),
        ("rtx-a6000", "RTX A6000", 1),
    ],
)
def test_names_are_read_as_people_write_them(written: str, name: str, count: int) -> None:
    group = find_gpu(written, gpus=read_gpus())
    assert (group.gpu.name, group.count) == (name, count)
    assert group.name == (name if count == 1 else f"{count} x {name}")


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(SetupError) as raised:
        find_gpu("rtx4091", gpus=read_gpus())
    assert "rtx4091 is not a GPU that onlay has numbers for. Did you mean RTX 4090" in raised.value.problem
    assert "gpus.yaml" in raised.value.remedy
    with pytest.raises(SetupError, match="names 0 GPUs"):
        find_gpu("0xh200", gpus=read_gpus())


def test_no_two_cards_answer_to_one_name() -> None:
    gpus = read_gpus()
    names = [str(name).lower().replace(" ", "") for gpu in gpus.values() for name in {gpu.name, *gpu.aliases}]
    assert len(set(names)) == len(names)
    assert len(gpus) >= 20


def test_the_numbers_agree_with_each_other() -> None:
    """FP8 runs at twice the rate of 16 bits, and only from Ada on; bf16 is known from Ampere on."""
    for gpu in read_gpus().values():
        assert gpu.has_bf16 == (gpu.name != "T4")
        assert gpu.has_fp8 == (gpu.compute_capability >= (8, 9)), gpu.name
        if gpu.fp8_tflops is not None:
            assert gpu.fp8_tflops == pytest.approx(2 * gpu.tflops, rel=0.02), gpu.name
        assert 7 <= gpu.memory_bytes / GIB <= 180
        for offer in gpu.offers:
            assert 0.05 < offer.usd_per_hour < 15
            assert (2026, 8) <= (offer.date.year, offer.date.month) <= (2026, 11)


def test_a_found_device_is_matched_by_name_and_memory() -> None:
    gpus = read_gpus()
    found = Device(name="NVIDIA H200", memory_bytes=int(139.8 * GIB), compute_capability=(9, 0))
    assert match_device(found, gpus=gpus) is gpus["H200"]
    eight = Device(name="NVIDIA GeForce RTX 4060 Ti", memory_bytes=8188 * 2**20, compute_capability=(8, 9))
    assert match_device(eight, gpus=gpus) is None, "the table's card of this name has 16 GB"
    assert match_device(found.model_copy(update={"name": "Other 1"}), gpus=gpus) is None


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


OWN = """
gpus:
  - name: h200
    offers:
      - {provider: ours, usd_per_hour: 2.0, kind: spot, date: 2026-11-01, source: contract}
  - name: Ours 96
    memory_mib: 98304
    compute_capability: [9, 0]
    tflops: 500
    bandwidth_gb_s: 3000
    class: hopper
"""


def test_the_users_table_is_laid_over(tmp_path: Path, onlay_home: Path) -> None:
    for gpus in (
        read_gpus(write(tmp_path / "mine.yaml", OWN)),
        (write(onlay_home / "gpus.yaml", OWN), read_gpus())[1],
    ):
        h200 = gpus["H200"]
        assert h200.memory_mib == 143771, "what is not given stays"
        assert [offer.provider for offer in h200.offers] == ["ours"]
        assert find_gpu("ours96", gpus=gpus).gpu.offers == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpus: [{name: Other, memory_mib: 8192}]", "compute_capability: Field required"),
        ("gpus: [{name: H200, memory: 8192}]", "memory: Extra inputs are not permitted"),
        ("gpus: [{memory_mib: 8192}]", "GPU 1 has no name"),
        ("gpus: {}", "does not hold one list named gpus"),
        ("gpus: [{name: H200, name: H100}]", "name is given twice"),
        ("gpus: [{name: H200, offers: [{provider: a, usd_per_hour: 0, kind: spot, date: 2026-01-01, source: b}]}]",
         "offers.0.usd_per_hour: Input should be greater than 0"),
        ("gpus: [{name: H200, offers: [{provider: a, usd_per_hour: 1, kind: spot, source: b}]}]", "offers.0.date: Field required"),
    ],
)  # fmt: skip
def test_a_wrong_table_says_where(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SetupError) as raised:
        read_gpus(write(tmp_path / "mine.yaml", text))
    assert "mine.yaml" in raised.value.problem
    assert told in raised.value.problem


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot be read"):
        read_gpus(tmp_path / "none.yaml")
