"""Scoring in several processes: which of them this one is, and how their scores come together."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed

_HOURS = timedelta(hours=2)  # a slow neighbour is waited for so long


class Shards(NamedTuple):
    """This process among those that torchrun started; one alone by default."""

    rank: int = 0
    world: int = 1

    def own(self, batches: Sequence[Any]) -> Sequence[Any]:
        """Those of all batches that this process computes: every `world`-th."""
        return batches[self.rank :: self.world]

    def gather(self, found: Any) -> list[Any]:
        """What every process found, in the order of ranks, the same in each of them."""
        if self.world == 1:
            return [found]
        everything: list[Any] = [None] * self.world
        distributed.all_gather_object(everything, found)
        return everything


@contextmanager
def joined() -> Iterator[Shards]:
    """The processes of this run, connected for the time of the block: by nccl where each has a GPU, else by gloo.

    Without torchrun's environment variables this is one process, and nothing is connected.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Shards()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = torch.cuda.is_available() and torch.cuda.device_count() > local
    if has_gpu:
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if has_gpu else "gloo", timeout=_HOURS)
    try:
        yield Shards(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
