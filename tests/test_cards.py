import pytest
import torch

from mambaseq.cards import card


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_cards_by_pytorchs_names(name: str, flops: float) -> None:
    """Of products without sparsity, which Lightning's figure of the H200 counts twice."""
    found = card(name)
    assert found is not None
    assert found.flops_in(torch.bfloat16, tf32=False) == flops
    assert found.flops_in(torch.float32, tf32=True) == flops / 2 > found.flops_in(torch.float32, tf32=False)


def test_memory_of_names_that_end_alike() -> None:
    assert [it.bytes_per_s for it in map(card, ("NVIDIA H200", "NVIDIA GH200 480GB")) if it] == [4.8e12, 4.0e12]


def test_unknown_cards() -> None:
    assert card("NVIDIA GeForce RTX 9090") is None
