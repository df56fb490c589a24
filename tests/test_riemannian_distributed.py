import torch

import riemannian_ranks


def test_two_ranks_equal_one_process_replicated_and_sharded(tmp_path):
    """DDP and FSDP2, both rules, resumed half-way; five filters, and a single one, divide unevenly by two ranks."""
    torch.multiprocessing.spawn(riemannian_ranks.compare, (tmp_path / "store",), nprocs=2)
