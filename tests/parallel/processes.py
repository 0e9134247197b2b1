"""Starts a few processes that talk over gloo, and runs one function in each."""

import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_multiprocessing

# They are forked from a process that has imported all of it, once for all tests.
multiprocessing.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "attnres_ext.parallel",
        "pytest",
    ]
)


def _join(rank, world, store, function, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    function(rank, world, *arguments)
    dist.destroy_process_group()


def run(function, world, tmp_path, *arguments):
    """Calls ``function(rank, world, *arguments)`` in ``world`` processes; a failure of one is
    raised here."""
    torch_multiprocessing.start_processes(
        _join,
        (world, str(tmp_path / "store"), function, arguments),
        nprocs=world,
        start_method="forkserver",
    )
