"""Processes as torchrun starts them."""

import os
import sys
import traceback

from torch.distributed import TCPStore

STORES = []


def start(function, size=2):
    """Forks ``size`` processes with torchrun's environment: importing torch takes longer than
    training what is small."""
    # As torchrun does, the parent keeps the store: a process that leaves early takes nothing along.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), GLOO_SOCKET_IFNAME="lo",
                TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True",
            )  # fmt: skip
            code = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def finish(children):
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    STORES.clear()
    return codes
