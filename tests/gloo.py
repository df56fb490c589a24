"""Processes that form a group over gloo, for tests of several ranks."""

import functools
import gc
import os

import torch
import torch.distributed as dist


def one_of(world):
    """A function of (rank, file or folder, ...) that runs in each of ``world`` processes, as a member of their group.

    Models in reference cycles hold the group, whose threads must end before the interpreter does: so ``work``'s variables are
    collected first, and all ranks leave together.
    """

    def decorate(work):
        @functools.wraps(work)
        def run(rank, place, *rest):
            torch.set_num_threads(1)
            file = os.path.join(place, "store") if os.path.isdir(place) else place
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
            work(rank, place, *rest)
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()

        return run

    return decorate
