"""The process group: one process per GPU (or per core), started by torchrun or by hand."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from drgrpo.types import UserError, check_divides


def start(tp: int = 1, replicate: int = 1) -> tuple[int, int, torch.device]:
    """(rank, world size, device). Without torchrun, a group of one.

    Call it before vLLM is built, which would otherwise make a default group of size one. UserError
    unless `tp`, the processes that share a sampler, and `replicate`, the copies of the sharded
    model, divide the world size."""
    check_restarts()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    check_divides(world, tp=tp, dp_replicate=replicate)
    return dist.get_rank(), world, device


def check_restarts() -> None:
    """UserError if torchrun would restart the processes but they could not find each other.

    They exchange addresses through a store. torchrun of torch 2.13 keeps the store over a restart,
    where the new processes read the addresses of the dead ones."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and shared and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError(
            f"--max-restarts {restarts} of torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
            "torchrun's environment; without it restarted processes do not find each other"
        )


def stop() -> None:
    """Leave the process group. vLLM's shutdown may already have destroyed it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(items: list, tp: int = 1) -> list:
    """This process's items. Every group takes each group-count-th item, so that long and short
    ones spread evenly. A group is `tp` consecutive ranks, which share one sampler and one shard."""
    return items[dist.get_rank() // tp :: dist.get_world_size() // tp]


def gather(items: list, tp: int = 1) -> list:
    """The inverse of `shard`, on every process. The first process of a group sends its shard."""
    sends = dist.get_rank() % tp == 0
    shards = gather_lists(items if sends else [])[::tp]
    gathered: list[Any] = [None] * sum(map(len, shards))
    for group, part in enumerate(shards):
        gathered[group :: len(shards)] = part
    return gathered


def gather_lists(items: list) -> list[list]:
    """Every process's list, by rank."""
    if dist.get_world_size() == 1:
        return [items]
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return lists


def any_rank(flag: bool) -> bool:
    """True on every process if it is true on one."""
    return any(flag for (flag,) in gather_lists([flag]))


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the block before the others enter it: it fills a cache that they read."""
    if dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.get_rank() == 0:
        dist.barrier()
