"""The process group: one process per GPU (or per core), started by torchrun or by hand."""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist


def start() -> tuple[int, int, torch.device]:
    """(rank, world size, device). Without torchrun: a group of one. Must come before vLLM, which
    would otherwise make a default group of its own, of size one."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def stop() -> None:
    """vLLM's shutdown may already have destroyed the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(items: list, tp: int = 1) -> list:
    """This process's items: every group-count-th, so that long and short spread evenly. `tp`
    consecutive ranks are one group, which has one sampler and one share."""
    return items[dist.get_rank() // tp :: dist.get_world_size() // tp]


def gather(items: list, tp: int = 1) -> list:
    """The inverse of `shard`, on every process."""
    shares = gather_lists(items)[::tp]
    whole = [None] * sum(map(len, shares))
    for group, part in enumerate(shares):
        whole[group :: len(shares)] = part
    return whole


def gather_lists(items: list) -> list[list]:
    """Every process's list, by rank."""
    if dist.get_world_size() == 1:
        return [items]
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return lists


def any_rank(flag: bool) -> bool:
    """True on every process if it is true on one."""
    return any(flag for (flag,) in gather_lists([flag]))


@contextmanager
def rank_zero_first():
    """Rank 0 runs the block before the others enter it: it fills a cache that they read."""
    if dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.get_rank() == 0:
        dist.barrier()
