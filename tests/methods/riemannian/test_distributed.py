import pytest
import torch

from tests.methods.riemannian import ranks as riemannian_ranks


@pytest.mark.slow
def test_two_ranks_equal_one_process_replicated_and_sharded(tmp_path):
    """DDP and FSDP2, both rules, resumed half-way; five filters, and a single one, divide unevenly by two ranks."""
    # the comparison is made, and asserted, on each rank; what a rank raises, spawn raises
    assert torch.multiprocessing.spawn(riemannian_ranks.compare, (tmp_path / "store",), nprocs=2) is None
