"""What is used of torch beyond what it documents, in one place.

No public name says which backward pass is under way or when it ends, whose hooks pack saved
tensors, or whether a function transform is active; none lets operators pass by dispatch modes, an
object say on which device it is, or a module run on tensors without values. These names are there
in torch 2.10 to 2.14.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
import torch.utils.checkpoint
from torch._subclasses import fake_tensor  # noqa: F401  (found by name below)
from torch.autograd import forward_ad
from torch.utils import _python_dispatch, _pytree  # noqa: F401  (found by name below)
from torch.utils.checkpoint import create_selective_checkpoint_contexts

__all__ = [
    "TRANSFORMS",
    "BelowAutograd",
    "FakeTensorMode",
    "StopRecomputation",
    "WithoutModes",
    "at_end_of_backward",
    "backward_pass",
    "is_profiling",
    "is_transformed",
    "keeps_graph",
    "may_have_hooks",
    "pipeline_stage",
    "records_selectively",
    "register_pytree_node",
    "saving_hook",
]


def _find(name: str) -> Any:
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        raise ImportError(
            f"attnres_ext: torch {torch.__version__} has no torch.{name}, by which attnres_ext "
            "follows autograd; it was made for torch 2.10 to 2.14: install one of these, or a "
            "newer attnres_ext"
        ) from None


#: Identifies the backward pass under way in this thread; -1 where there is none.
backward_pass: Callable[[], int] = _find("_C._current_graph_task_id")

#: Whether that pass leaves the graph as it is, for another one.
keeps_graph: Callable[[], bool] = _find("_C._autograd._get_current_graph_task_keep_graph")

#: Has a function without arguments called when the backward pass under way is over.
at_end_of_backward: Callable[[Callable[[], None]], None] = _find(
    "autograd.Variable._execution_engine.queue_callback"
)

#: Tells torch what is inside of objects of a class.
register_pytree_node: Callable = _find("utils._pytree.register_pytree_node")

#: Whether a profiler is recording.
is_profiling: Callable[[], bool] = _find("autograd._profiler_enabled")

#: Inside, operators go straight to their backend.
BelowAutograd: Callable[[], AbstractContextManager] = _find("_C._AutoDispatchBelowAutograd")

#: Inside, operators are called behind the back of dispatch modes.
WithoutModes: Callable[[], AbstractContextManager] = _find(
    "utils._python_dispatch._disable_current_modes"
)

#: Inside, tensors have no values, and say so.
FakeTensorMode: Callable[..., AbstractContextManager] = _find(
    "_subclasses.fake_tensor.FakeTensorMode"
)

#: Raised under a checkpoint, ends the recomputation that is under way: PyTorch compares what was
#: saved with what was needed, and complains if anything is missing.
StopRecomputation: type[Exception] = _find("utils.checkpoint._StopRecomputationError")

#: Whether saved tensors may be given hooks.
may_have_hooks: Callable[[], bool] = _find("_C._autograd._saved_tensors_hooks_is_enabled")

#: Under this name an operator may have a kernel that function transforms run instead of it.
TRANSFORMS: str = _find("_C.DispatchKey.FuncTorchDynamicLayerFrontMode").name

_top_hooks = _find("_C._autograd._top_saved_tensors_default_hooks")
_has_transforms = _find("_C._are_functorch_transforms_active")
_modes = _find("utils._python_dispatch._get_current_dispatch_mode_stack")
_find("autograd.forward_ad._current_level")  # a number that changes: looked up when needed

#: What selective checkpointing watches a first forward with.
_Recording = type(create_selective_checkpoint_contexts([])[0])


# What of a pipeline's stage is called or taken the place of, and of what it says of a tensor to be
# received.
_STAGE_NAMES = (
    "_compute_outputs",
    "_post_metadata_inference_cleanup",
    "_prepare_backward_infra",
    "_prepare_forward_infra",
    "_resolve_peer_global_rank",
    "backward_maybe_with_nosync",
    "backward_one_chunk",
    "backward_weight_one_chunk",
    "clear_runtime_states",
    "forward_maybe_with_nosync",
    "forward_one_chunk",
    "get_bwd_recv_ops",
    "get_bwd_send_ops",
    "get_fwd_recv_ops",
    "get_fwd_send_ops",
    "get_local_bwd_output",
    "set_local_bwd_input",
)
_RECEIVED_NAMES = ("buffer", "is_root_arg", "tensor_meta")


def pipeline_stage() -> tuple[type, Callable[..., torch.Tensor]]:
    """torch's stage of a pipeline, and what makes a tensor to receive into, from its description
    and device.

    Raises:
        ImportError: If they are not what a stage of ours can be made of.
    """
    from torch.distributed.pipelining import stage

    names = [f"PipelineStage.{name}" for name in _STAGE_NAMES]
    received = inspect.signature(getattr(stage, "_RecvInfo", object)).parameters
    names += [f"_RecvInfo.{name}" for name in _RECEIVED_NAMES if name not in received]
    for name in ("_make_tensor_from_meta", *names):
        try:
            attrgetter(name)(stage)
        except AttributeError:
            raise ImportError(
                f"attnres_ext: torch {torch.__version__} has no "
                f"torch.distributed.pipelining.stage.{name}, on which stages of a pipeline with "
                "Attention Residuals are built; they were made for torch 2.13: install it, or a "
                "newer attnres_ext"
            ) from None
    return stage.PipelineStage, stage._make_tensor_from_meta


def saving_hook() -> Callable | None:
    """What packs saved tensors just now; None where they are simply saved."""
    hooks = _top_hooks(True)
    return None if hooks is None else hooks[0]


@torch.compiler.assume_constant_result  # torch guards what transforms a graph is traced under
def _is_traced_under_transforms() -> bool:
    return _has_transforms()


def is_transformed() -> bool:
    """Whether a function transform or forward-mode differentiation is under way; of the latter, a
    graph that is being traced is not asked."""
    if torch.compiler.is_compiling():
        return _is_traced_under_transforms()
    return _has_transforms() or forward_ad._current_level >= 0


def records_selectively() -> bool:
    """Whether selective checkpointing is recording which operators are called."""
    return any(isinstance(mode, _Recording) for mode in _modes())
