"""Finds what to replace in a model, by running it once and watching its residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnres_ext.integrations.transformers.norms import NormForm, recognise
from attnres_ext.integrations.transformers.stream import MisfitError, StreamLike
from attnres_ext.torch_internals import FakeTensorMode, WithoutModes

__all__ = ["Run", "Structure", "examine"]


@dataclass
class Run:
    """A run of a decoder layer, of which a layer may have several in a forward (looped depth).

    Attributes:
        layer: The layer.
        norms: The norms that read its stream, in order, one per sublayer.
    """

    layer: nn.Module
    norms: list[tuple[nn.Module, NormForm]] = field(default_factory=list)


@dataclass
class Structure:
    """What a model's forward does with its residual stream.

    Attributes:
        decoder: The module that holds the layers, their norm, and the token embedding.
        hidden_size: ``D``.
        runs: Of the layers, in order.
        final_norm: The norm behind the last layer.
        device: The one device of all parameters.
    """

    decoder: nn.Module
    hidden_size: int
    runs: list[Run]
    final_norm: tuple[nn.Module, NormForm]
    device: torch.device

    @property
    def num_sublayers(self) -> int:
        """How many sublayers write."""
        return sum(len(run.norms) for run in self.runs)


class _TrialStream(StreamLike):
    """The usual stream, with every use of it counted: one norm reads it, one ``+`` ends it.

    Between layers anything may be added to it: hooks do.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.between_layers = False
        self.read = False
        self.ended = False

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def plus(self, delta: Tensor) -> _TrialStream:
        if isinstance(delta, StreamLike):
            raise MisfitError("adds the residual stream to itself")
        if self.between_layers:
            self.value = self.value + delta
            return self
        if not self.read:
            raise MisfitError(
                "adds to the residual stream twice without a norm reading it in between "
                "(parallel sublayers)"
            )
        if self.ended:
            raise MisfitError("adds to an earlier state of the residual stream")
        if delta.shape != self.shape:
            raise MisfitError(
                f"adds a tensor of shape {tuple(delta.shape)} to the residual stream "
                f"of shape {tuple(self.shape)}"
            )
        self.ended = True
        return _TrialStream(self.value + delta)


class _Examination:
    """The hooks of one trial forward."""

    def __init__(self, decoder: nn.Module, name: str, layers: nn.ModuleList) -> None:
        self._decoder = decoder
        self._names = {
            module: ".".join(filter(None, (name, inner)))
            for inner, module in decoder.named_modules()
        }
        self._layers = set(layers)
        self._forms: dict[nn.Module, NormForm | None] = {}
        self._stack: list[nn.Module] = []
        self._stream: _TrialStream | None = None
        self.runs: list[Run] = []
        self.final_norm: tuple[nn.Module, NormForm] | None = None

    @property
    def hidden_size(self) -> int:
        """``D``, once the forward has run."""
        return self._stream.shape[-1]

    @property
    def where(self) -> str:
        """The innermost module that is running, for messages."""
        return self._names[self._stack[-1]] if self._stack else self._names[self._decoder]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of every module: the first layer gets a stream, norms get its value."""
        self._stack.append(module)
        if module in self._layers:
            args, kwargs = self._enter_layer(module, args, kwargs)
            return args, kwargs
        if args and isinstance(args[0], _TrialStream) and not list(module.children()):
            return (self._read(module, args[0]), *args[1:]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, _TrialStream) and not list(module.children()):
                return args, {**kwargs, name: self._read(module, value)}
        return None

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of every module."""
        if module in self._layers:
            self._leave_layer(output)
        self._stack.pop()

    def _enter_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        named = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if named else args[0] if args else None
        if not self.runs:
            if not isinstance(hidden, Tensor):
                raise MisfitError("gets no tensor of hidden states, neither first nor by that name")
            hidden = self._stream = _TrialStream(hidden)
        elif hidden is not self._stream:
            raise MisfitError("does not get what the layer before it returned")
        hidden.between_layers = False
        self.runs.append(Run(layer))
        if named:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    def _leave_layer(self, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        if not isinstance(stream, _TrialStream):
            raise MisfitError("does not end with an addition to the residual stream")
        if stream.ended or stream.read:
            raise MisfitError("returns an earlier state of the residual stream")
        if not self.runs[-1].norms:
            raise MisfitError("adds nothing to the residual stream")
        stream.between_layers = True
        self._stream = stream

    def _read(self, module: nn.Module, stream: _TrialStream) -> Tensor:
        if module not in self._forms:
            with WithoutModes():
                self._forms[module] = recognise(module, stream.shape[-1], stream.device)
        form = self._forms[module]
        if form is None:
            raise MisfitError(
                "reads the residual stream without a norm before it (post-norm layers do), and "
                "only a norm removes the scale of a weighted mean"
            )
        if stream.read:
            raise MisfitError(
                "is the second norm that reads the same residual stream (parallel sublayers)"
            )
        if stream.ended:
            raise MisfitError("reads an earlier state of the residual stream")
        stream.read = True
        if any(running in self._layers for running in self._stack):
            self.runs[-1].norms.append((module, form))
        else:
            self.final_norm = (module, form)
        return stream.value


def examine(model: nn.Module) -> Structure:
    """Runs ``model``'s decoder on two tokens and finds its layers, their norms and sublayers.

    The model is as before when this returns or raises. Hooks of layers do not run, for they would
    meet what stands for the stream; those of other modules do.

    Raises:
        ValueError: If the model's residual stream is not of the pre-norm shape, ``x + f(norm(x))``
            in turn; the message names the module and what it does.
    """
    kind = type(model).__name__
    decoder, name, layers = _find_layers(model)
    device = _one_device(decoder)
    examination = _Examination(decoder, name, layers)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with ExitStack() as stack:
            stack.enter_context(_evaluating(decoder))
            stack.enter_context(torch.no_grad())
            # Models too make tensors where the default device is.
            stack.enter_context(device)
            if device.type == "meta":
                # Models ask less of values where they know that there are none.
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_without_hooks(layers))
            for module in decoder.modules():
                if module is not decoder:
                    before = module.register_forward_pre_hook(
                        examination.before, with_kwargs=True, prepend=True
                    )
                    stack.callback(before.remove)
                    after = module.register_forward_hook(examination.after, prepend=True)
                    stack.callback(after.remove)
            decoder(input_ids=tokens, use_cache=False)
            left_out = set(layers) - {run.layer for run in examination.runs}
            if left_out:
                raise MisfitError(f"leaves out {len(left_out)} of its {len(layers)} layers")
            if examination.final_norm is None:
                raise MisfitError("has no norm that reads what its last layer returns")
    except MisfitError as misfit:
        raise ValueError(
            f"attach: {kind} is not of the pre-norm shape x + f(norm(x)): "
            f"{examination.where} {misfit}"
        ) from None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        # Also what functions raise that take nothing but tensors.
        hint = "; give it values first" if device.type == "meta" else ""
        raise ValueError(
            f"attach: a trial forward of {kind} on {device} failed in {examination.where}: "
            f"{error}{hint}"
        ) from error
    return Structure(
        decoder, examination.hidden_size, examination.runs, examination.final_norm, device
    )


def _find_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The decoder, its name and its layers."""
    kind = type(model).__name__
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(f"attach: model is a {kind}, expected a transformers model")
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        children = list(module.children())
        lists = [child for child in children if isinstance(child, nn.ModuleList) and len(child)]
        if embedding in children and lists:
            return module, name, max(lists, key=len)
    raise ValueError(
        f"attach: {kind} has no module that holds both the token embedding and a list of layers"
    )


def _one_device(decoder: nn.Module) -> torch.device:
    if any(_offloads(vars(module).get("_hf_hook")) for module in decoder.modules()):
        raise ValueError(
            "attach: weights of the decoder are offloaded (device_map has put layers on 'cpu' or "
            "'disk'), and come for their own module's forward alone, while every site reads norms "
            "and blocks of others; load the model onto one device, in 8 or 4 bits if need be"
        )
    devices = sorted({str(parameter.device) for parameter in decoder.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"attach: the decoder's parameters are on {', '.join(devices)}, "
            "expected one device; every layer reads what the others wrote. Load the model with "
            'device_map={"": DEVICE}'
        )
    return torch.device(devices[0])


def _offloads(hook: Any) -> bool:
    """Whether a hook of accelerate brings a module's weights for its forward."""
    return getattr(hook, "offload", False) or any(map(_offloads, getattr(hook, "hooks", ())))


#: Where a module keeps hooks of its forward, and what they take.
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


@contextmanager
def _without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, hooks of the modules' forwards are set aside."""
    kept = [(module, name, vars(module)[name]) for module in set(modules) for name in _HOOKS]
    try:
        for module, name, hooks in kept:
            vars(module)[name] = type(hooks)()
        yield
    finally:
        for module, name, hooks in kept:
            vars(module)[name] = hooks


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
