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


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[Shards]:
    """The processes of this run, connected by gloo for the time of the block: scores are gathered on the CPU.

    Each process that has a GPU of its own works on that. Without torchrun's environment variables this is one process,
    and nothing is connected.
    """
    if processes() == 1:
        yield Shards()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("gloo", timeout=_HOURS)
    try:
        yield Shards(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
