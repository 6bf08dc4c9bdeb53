"""Runs work in a group of processes, over gloo."""

import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_group(rank: int, world: int, store: str, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        work()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_process(rank: int, world: int, store: str, work: Callable[[], None]) -> None:
    in_group(rank, world, store, work)
    os._exit(0)  # gloo's threads may still be ending; an ordinary exit at that moment occasionally aborts


def run(world: int, work: Callable[[], None]) -> None:
    """Run the work in a group of `world` processes; in this process if there is only one."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        if world == 1:
            in_group(0, 1, store, work)
        else:
            mp.spawn(in_process, (world, store, work), nprocs=world)
