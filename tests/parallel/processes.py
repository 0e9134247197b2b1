"""Processes that run the same function, as ranks of a gloo group."""

import multiprocessing
import traceback

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# What takes seconds to import is imported once, and not by each of them.
_context.set_forkserver_preload(["torch.distributed.pipelining", "tests.parallel.staged"])


class Processes:
    """``run(function, *arguments)`` runs ``function(rank, *arguments)`` in each process, and
    returns what they return."""

    def __init__(self, count, store):
        self._calls = [_context.Pipe() for _ in range(count)]
        self._processes = [
            _context.Process(target=_serve, args=(rank, count, str(store), there), daemon=True)
            for rank, (_, there) in enumerate(self._calls)
        ]
        for process in self._processes:
            process.start()

    def run(self, function, *arguments, seconds=90):
        """Raises if one of them raised, or has no answer in time: then none is used again."""
        for here, _ in self._calls:
            here.send((function, arguments))
        answers, failed = [], []
        for rank, (here, _) in enumerate(self._calls):
            # One that raised leaves the others waiting for it.
            if not here.poll(2 if failed else seconds):
                failed.append(f"rank {rank} has no answer")
                continue
            good, answer = here.recv()
            answers.append(answer)
            if not good:
                failed.append(f"rank {rank}:\n{answer}")
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return answers

    @property
    def alive(self):
        return all(process.is_alive() for process in self._processes)

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank, count, store, calls):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    while True:
        function, arguments = calls.recv()
        try:
            calls.send((True, function(rank, *arguments)))
        except BaseException:
            calls.send((False, traceback.format_exc()))
