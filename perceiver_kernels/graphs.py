"""Before the first real call: warmup compiles a model's kernels, graphed captures its forward into a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CAPTURES_ON = "cuda"
RUNS_BEFORE_CAPTURE = 3  # as torch's documentation of torch.cuda.graph advises


def warmup(model: nn.Module, *sample: Any, backward: bool = False, **named_sample: Any) -> float:
    """Runs a model once, so that every kernel for such inputs is compiled, and tuned where that is asked for.

    Kernels depend on shapes, dtypes, strides and on whether gradients are needed: call it as the model will be called,
    under torch.no_grad() or autocast if those will be on. Parameters, their gradients, buffers and the state of random
    generators are left as they were.

    Args:
        model: a module on any device.
        sample, named_sample: what it is called with.
        backward: whether its gradients are computed too, of all parameters and inputs that require one.

    Returns:
        Seconds spent, kernels on GPUs included.

    Raises:
        ValueError: an argument is not as described; the message names it.

    Memory: that of one call, and a copy of the buffers.
    """
    _check_model(model)
    leaves = [tensor for tensor in (*model.parameters(), *_tensors((sample, named_sample))) if tensor.requires_grad]
    if backward:
        if torch.is_inference_mode_enabled():
            raise ValueError("backward is True, must be False in inference mode")
        if not leaves:
            raise ValueError("backward is True, must be False where no parameter and no input requires a gradient")
    devices = _cuda_devices((list(model.parameters()), list(model.buffers()), sample, named_sample))
    start = time.perf_counter()
    with _unchanged(model, devices), torch.enable_grad() if backward else nullcontext():
        outputs = [tensor for tensor in _tensors(model(*sample, **named_sample)) if tensor.requires_grad]
        if backward:
            if not outputs:
                raise ValueError("backward is True, must be False for a model whose outputs require no gradient")
            torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs], allow_unused=True)
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def graphed(model: nn.Module, *sample: Any, **named_sample: Any) -> GraphedModel:
    """Captures a model's forward into a CUDA graph: one launch instead of hundreds, for shapes that do not change.

        fast = pk.graphed(model.eval(), images)
        logits = fast(other_images)

    Args:
        model: in evaluation mode, on a GPU. Values of its parameters may be changed in place later on, by
            load_state_dict for instance; their memory may not be replaced, as model.to() or quantisation do.
        sample, named_sample: what it is called with; tensors on the GPU, also in lists, tuples and dictionaries, and
            other values, which stay as they are here.

    Returns:
        A callable for inputs of the sample's shapes and dtypes, without gradients. Autocast and backend are as here.

    Raises:
        ValueError: an argument is not as described; the message names it.

    Memory: a copy of the inputs, and what one forward takes, for as long as the result lives.
    """
    _check_model(model)
    for name, module in model.named_modules(prefix="model"):
        if module.training:
            raise ValueError(f"{name} is in training mode, must be in evaluation mode: call model.eval()")
    places = _flat("sample", sample, named_sample)
    tensors = {place: value for place, value in places.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"sample holds no tensor, must hold at least one on {CAPTURES_ON}")
    device = next(iter(tensors.values())).device
    for place, tensor in tensors.items():
        if tensor.device.type != CAPTURES_ON:
            raise ValueError(f"{place} is on {tensor.device}, must be on {CAPTURES_ON}")
        if tensor.device != device:
            raise ValueError(f"{place} is on {tensor.device}, must be on {device} as the others are")
    return GraphedModel(model, sample, named_sample)


class GraphedModel:
    """A captured forward, made by `graphed`. One thread at a time may call it; results belong to the caller."""

    def __init__(self, model: nn.Module, sample: tuple[Any, ...], named_sample: dict[str, Any]) -> None:
        self._model = model
        outside = _TensorsFromOutside()
        with torch.no_grad(), _without_autocast_cache():
            args, kwargs = _mapped((sample, named_sample), lambda tensor: tensor.detach().clone())
            self._inputs = _flat("input", args, kwargs)
            device = next(value.device for value in self._inputs.values() if isinstance(value, Tensor))
            self._graph, self._output = capture(lambda: model(*args, **kwargs), device, outside)
        self._alive = outside.tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for inputs of the sample's shapes and dtypes; other arguments must equal the sample's."""
        if self._model.training:
            raise ValueError("model is in training mode, must be in evaluation mode as at capture")
        given = _flat("input", args, kwargs)
        _check_same(given, self._inputs)
        with torch.no_grad():
            for place, value in self._inputs.items():
                if isinstance(value, Tensor):
                    value.copy_(given[place])
            self._graph.replay()
            return _mapped(self._output, torch.clone)


def capture(
    run: Callable[[], Any], device: torch.device | None = None, observer: AbstractContextManager[Any] | None = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of run, and the output that every replay writes to; the last of the runs before it is observed."""
    with torch.cuda.device(device):
        # What is made at first use (kernels, tables, workspaces) must not be made during capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(RUNS_BEFORE_CAPTURE - 1):
                run()
            with observer or nullcontext():
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
    return graph, output


class _TensorsFromOutside(TorchDispatchMode):
    """Collects the tensors that operators read and did not make: a graph needs them for as long as it is replayed.

    Among them are tables from caches, which drop what has not been asked for lately.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self._known: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs or {})):
            if id(tensor) not in self._known:
                self._known[id(tensor)] = tensor
                self.tensors.append(tensor)
        result = func(*args, **(kwargs or {}))
        self._known.update((id(tensor), tensor) for tensor in _tensors(result))
        return result


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast's casts of weights live until it ends; a graph must make its own."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _unchanged(model: nn.Module, devices: list[torch.device]) -> Iterator[None]:
    """Buffers and the state of random generators are put back at the end."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is of type {type(model).__name__}, must be a torch.nn.Module")


def _check_same(given: dict[str, Any], captured: dict[str, Any]) -> None:
    """Raises ValueError where what was given could not take the place of what was captured."""
    for place in (*captured, *given):
        if place not in given or place not in captured:
            verb, must = ("is missing", "be given") if place in captured else ("is given", "be left out")
            raise ValueError(f"{place} {verb}, must {must} as at capture")
        value, expected = given[place], captured[place]
        if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
            if isinstance(value, Tensor) or isinstance(expected, Tensor) or value != expected:
                raise ValueError(f"{place} is {_in_words(value)}, must be {_in_words(expected)} as at capture")
        elif value.shape != expected.shape:
            raise ValueError(f"{place} has shape {tuple(value.shape)}, must be {tuple(expected.shape)} as at capture")
        elif value.dtype != expected.dtype:
            raise ValueError(f"{place} has dtype {value.dtype}, must be {expected.dtype} as at capture")
        elif value.device != expected.device:
            raise ValueError(f"{place} is on {value.device}, must be on {expected.device} as at capture")


def _in_words(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _flat(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every tensor and other value of a call by its place in it: "input", or "input[1]", "mask", "mask['left']"."""
    places = {name: args[0]} if len(args) == 1 else {f"{name}[{at}]": value for at, value in enumerate(args)}
    return dict(pair for place, value in (places | kwargs).items() for pair in _parts(place, value))


def _parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        inner: Any = value.items()
    elif isinstance(value, (tuple, list)):
        inner = enumerate(value)
    else:
        yield place, value
        return
    for key, part in inner:
        yield from _parts(f"{place}[{key!r}]", part)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in lists, tuples and dictionaries of any depth."""
    return [part for _, part in _parts("", value) if isinstance(part, Tensor)]


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same lists, tuples and dictionaries around function of every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)((key, _mapped(part, function)) for key, part in value.items())  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        parts = [_mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _cuda_devices(value: Any) -> list[torch.device]:
    return sorted({tensor.device for tensor in _tensors(value) if tensor.is_cuda}, key=str)
