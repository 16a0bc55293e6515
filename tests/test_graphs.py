"""warmup and graphed: what they leave as it was, refuse, and, with a stand-in for CUDA graphs, what they do."""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from shapes import available_backends, device_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import perceiver_kernels as pk
from perceiver_kernels import encodings, graphs
from perceiver_kernels.ops.separable_attention import OP


def perceiver(**changes: Any) -> pk.Perceiver:
    fields: dict[str, Any] = {"num_freq_bands": 3, "depth": 2, "max_freq": 6.0, "num_latents": 5, "latent_dim": 8}
    fields |= {"cross_dim_head": 4, "latent_dim_head": 4, "latent_heads": 2, "num_classes": 3, **changes}
    return pk.Perceiver(**fields)


class Normalised(nn.Module):
    """Has buffers that a forward in training mode changes, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"y": scale * self.last(nn.functional.dropout(self.norm(x), 0.5))}


def state_of(model: nn.Module) -> list[Tensor | None]:
    gradients = [parameter.grad for parameter in model.parameters()]
    return [None if t is None else t.detach().clone() for t in (*model.state_dict().values(), *gradients)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("existing_gradients", [False, True])
def test_warmup_leaves_everything_as_it_was(backward: bool, existing_gradients: bool) -> None:
    model, x = Normalised(), torch.randn(6, 4, requires_grad=True)
    if existing_gradients:
        model(x)["y"].sum().backward()
    before, random, own = state_of(model), torch.get_rng_state(), copy.deepcopy(x.grad)
    assert pk.warmup(model, x, scale=2.0, backward=backward) > 0
    for value, expected in zip(state_of(model), before, strict=True):
        assert value is expected is None or torch.equal(value, expected)  # type: ignore[arg-type]
    assert x.grad is own is None or torch.equal(x.grad, own)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), random)


def test_warmup_runs_forward_and_backward() -> None:
    model, calls = perceiver(), []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.latents.register_hook(lambda grad: calls.append("backward"))
    images = torch.rand(2, 4, 5, 3)
    pk.warmup(model, images)
    assert calls == ["forward"]
    pk.warmup(model, images, torch.ones(2, 4, 5, dtype=torch.bool), backward=True)
    assert calls == ["forward", "forward", "backward"]
    with torch.no_grad():
        pk.warmup(model, data=images, backward=True)
    assert calls[3:] == ["forward", "backward"]


def test_warmup_after_an_error_puts_buffers_back() -> None:
    model = Normalised()
    before = state_of(model)
    with pytest.raises(RuntimeError):
        pk.warmup(nn.Sequential(model.norm, nn.Linear(3, 3)), torch.randn(6, 4))
    assert all(torch.equal(value, expected) for value, expected in zip(state_of(model)[:5], before[:5], strict=True))  # type: ignore[arg-type]


def frozen() -> nn.Module:
    return nn.Linear(4, 2).requires_grad_(False)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


X = torch.zeros(2, 4)
BAD_WARMUPS: dict[str, tuple[Callable[[], Any], str]] = {
    "function": (lambda: pk.warmup(torch.relu, X), "model is of type builtin_function_or_method, must be a torch.nn"),
    "no_gradient": (lambda: pk.warmup(frozen(), X, backward=True), "backward is True, must be False where no param"),
    "detached": (lambda: pk.warmup(Detached(4, 2), X, backward=True), "must be False for a model whose outputs"),
    "inference": (
        torch.inference_mode()(lambda: pk.warmup(nn.Linear(4, 2), X, backward=True)),
        "backward is True, must be False in inference mode",
    ),
}


@pytest.mark.parametrize("name", BAD_WARMUPS)
def test_warmup_bad_input(name: str) -> None:
    call, message = BAD_WARMUPS[name]
    with pytest.raises(ValueError, match=message):
        call()


class Graph:
    """Stands in for a CUDA graph: a replay computes again from the static inputs, into the static output."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run, self.replays, self.output = run, 0, run()

    def replay(self) -> None:
        self.replays += 1
        for static, value in zip(graphs._tensors(self.output), graphs._tensors(self.run()), strict=True):
            static.copy_(value)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(run: Callable[[], Any], device: torch.device, observer: Any) -> tuple[Graph, Any]:
        assert not torch.is_grad_enabled() and not torch.is_autocast_cache_enabled()
        run()
        with observer:
            run()
        graph = Graph(run)
        return graph, graph.output

    monkeypatch.setattr(graphs, "CAPTURES_ON", "cpu")
    monkeypatch.setattr(graphs, "capture", capture)


@pytest.mark.usefixtures("on_cpu")
def test_graphed_gives_what_the_model_gives() -> None:
    model = perceiver().eval()
    samples = [torch.rand(2, 4, 5, 3) for _ in range(3)]
    fast = pk.graphed(model, samples[0].clone())
    results = [fast(images) for images in samples]
    with torch.no_grad():
        for images, result in zip(samples, results, strict=True):  # each result is the caller's own
            torch.testing.assert_close(result, model(images))
        model.latents.add_(1.0)
        torch.testing.assert_close(fast(samples[1]), model(samples[1]))
    assert fast._graph.replays == 4 and torch.is_autocast_cache_enabled()
    assert not fast(samples[0].requires_grad_()).requires_grad


@pytest.mark.usefixtures("on_cpu")
def test_graphed_takes_keywords_lists_and_strides_and_keeps_the_outputs_structure() -> None:
    model = perceiver(attn_residual=True, attn_residual_rank=2).eval()
    images, mask = torch.rand(2, 3, 4, 5).movedim(1, -1), torch.rand(2, 4, 5) < 0.5
    hiddens = [torch.randn(2, 5, 8), torch.randn(2, 5, 8)]
    options = {"mask": mask, "block_outputs": hiddens, "return_hiddens": True}
    fast = pk.graphed(model, images, **options)
    other = {**options, "mask": ~mask, "block_outputs": [2 * hidden for hidden in hiddens]}
    with torch.no_grad():
        logits, inner = model(1 - images, **other)
    actual, actual_inner = fast(1 - images, **other)
    assert isinstance(actual_inner, list) and len(actual_inner) == len(inner) == 4
    torch.testing.assert_close(actual, logits)
    torch.testing.assert_close(actual_inner, inner)
    assert set(graphs._mapped({"a": (1, images)}, torch.clone)) == {"a"}


@pytest.mark.usefixtures("on_cpu")
def test_graphed_keeps_cached_tables_alive() -> None:
    """A graph reads them by their address, also after their cache has dropped them."""
    encodings._cached.cache_clear()
    model = perceiver(num_freq_bands=4).eval()
    fast = pk.graphed(model, torch.rand(2, 4, 5, 3))
    grid = pk.FourierGrid((4, 5), 4, 6.0)
    tables = {tensor.data_ptr() for per_axis in grid.feature_sums() for tensor in per_axis}
    tables.add(grid.summands(3).data_ptr())
    assert encodings._cached.cache_info().misses == 3  # they were those of the model
    assert tables <= {tensor.data_ptr() for tensor in fast._alive}
    assert len(fast._alive) < 20 + len(list(model.parameters()))


def test_what_an_operator_makes_is_not_kept() -> None:
    outside, x = graphs._TensorsFromOutside(), torch.randn(3)
    with outside:
        for _ in range(5):
            y = x * 2 + 1
        y += x
        del y
    gc.collect()
    assert len(outside.tensors) == 1 and outside.tensors[0] is x


MODEL = perceiver().eval()
IMAGES = torch.zeros(2, 4, 5, 3)


def partly_training() -> nn.Module:
    model = copy.deepcopy(MODEL)
    model.layers[1].cross_ff.train()  # type: ignore[union-attr, operator]
    return model


BAD_GRAPHS: dict[str, tuple[Callable[[], Any], str]] = {
    "function": (lambda: pk.graphed(torch.relu, X), "model is of type builtin_function_or_method, must be a torch.nn"),  # type: ignore[arg-type]
    "training": (lambda: pk.graphed(perceiver(), IMAGES), "model is in training mode, must be in evaluation mode"),
    "partly": (lambda: pk.graphed(partly_training(), IMAGES), "model.layers.1.cross_ff is in training mode"),
    "cpu": (lambda: pk.graphed(MODEL, IMAGES), "sample is on cpu, must be on cuda"),
    "second": (lambda: pk.graphed(MODEL, IMAGES.to("meta"), IMAGES), r"sample\[0\] is on meta, must be on cuda"),
    "keyword": (lambda: pk.graphed(MODEL, data=[IMAGES]), r"data\[0\] is on cpu, must be on cuda"),
    "nothing": (lambda: pk.graphed(MODEL), "sample holds no tensor, must hold at least one on cuda"),
}


@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_graphed_bad_input(name: str) -> None:
    call, message = BAD_GRAPHS[name]
    with pytest.raises(ValueError, match=message):
        call()


BAD_INPUTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "shape": ((torch.zeros(3, 4, 5, 3),), {}, r"input has shape \(3, 4, 5, 3\), must be \(2, 4, 5, 3\) as at capture"),
    "dtype": ((IMAGES.double(),), {}, "input has dtype torch.float64, must be torch.float32 as at capture"),
    "device": ((IMAGES.to("meta"),), {}, "input is on meta, must be on cpu as at capture"),
    "no_tensor": ((3,), {}, "input is 3, must be a tensor as at capture"),
    "option": ((IMAGES,), {"return_embeddings": False}, "return_embeddings is False, must be True as at capture"),
    "tensor": ((IMAGES,), {"return_embeddings": IMAGES}, "return_embeddings is a tensor, must be True as at capture"),
    "missing": ((), {}, "input is missing, must be given as at capture"),
    "more": ((IMAGES,), {"mask": None}, "mask is given, must be left out as at capture"),
}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_graphed_checks_what_it_is_called_with(name: str) -> None:
    args, kwargs, message = BAD_INPUTS[name]
    fast = pk.graphed(MODEL, IMAGES, return_embeddings=True)
    if name != "missing":
        kwargs = {"return_embeddings": True, **kwargs}
    with pytest.raises(ValueError, match=message):
        fast(*args, **kwargs)
    assert fast._graph.replays == 0


@pytest.mark.usefixtures("on_cpu")
def test_a_graph_is_not_replayed_in_training_mode() -> None:
    model = perceiver().eval()
    fast = pk.graphed(model, IMAGES)
    model.train()
    with pytest.raises(ValueError, match="model is in training mode, must be in evaluation mode as at capture"):
        fast(IMAGES)


class Cuda:
    """Stands in for what capturing uses of torch.cuda, and notes the order of events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        current = self.Stream(self, "current")
        replacements = {
            "Stream": lambda: self.Stream(self, "side"),
            "current_stream": lambda: current,
            "stream": lambda stream: self.during(f"stream {stream.name}"),
            "device": lambda device: self.during(f"device {device}"),
            "CUDAGraph": lambda: "graph",
            "graph": lambda graph: self.during("capture"),
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    class Stream:
        def __init__(self, cuda: Cuda, name: str) -> None:
            self.cuda, self.name = cuda, name

        def wait_stream(self, other: Cuda.Stream) -> None:
            self.cuda.events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        self.events.append(what)
        yield
        self.events.append(f"end of {what}")


def test_the_order_of_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    graph, output = graphs.capture(
        lambda: cuda.events.append("run") or len(cuda.events), torch.device("cuda:1"), cuda.during("observed")
    )
    assert cuda.events == [
        "device cuda:1", "side waits for current", "stream side", "run", "run", "observed", "run",
        "end of observed", "end of stream side", "current waits for side", "capture", "run", "end of capture",
        "end of device cuda:1",
    ]  # fmt: skip
    assert (graph, output) == ("graph", 12)


READS_BACK = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2")


class NothingReadBack(TorchDispatchMode):
    """Fails on operators that wait for a GPU, inside our operators too: their Python is run in this mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        assert name not in READS_BACK, f"{name} waits for the GPU, and breaks a capture"
        if namespace != "perceiver_kernels":
            return func(*args, **(kwargs or {}))
        stem = importlib.import_module(f"perceiver_kernels.ops.{name.removesuffix('_fwd').removesuffix('_grid')}")
        forward = stem._grid if name == "fourier_encode_grid" else stem._fwd
        with self:
            return forward(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("backend", "masked"),
    [("reference", False), *((name, True) for name in available_backends(OP) if name in ("triton", "reference"))],
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"input_axis": 1}, {"inverted_cross_attn": True}, {"fourier_encode_data": False}, {"attn_residual": True}],
    ids=str,
)
def test_a_forward_reads_nothing_back(changes: dict[str, Any], masked: bool, backend: str) -> None:
    device = device_of(backend)
    model = perceiver(**changes).eval().to(device)
    shape = (2, 4, 5) if model.input_axis == 2 else (2, 5000)  # a long axis takes a dense path
    mask = torch.rand(shape, device=device) < 0.5 if masked else None
    images = torch.rand(*shape, 3, device=device)
    with torch.no_grad(), pk.use_backend(backend):
        model(images, mask)
        with NothingReadBack():
            model(images, mask)


def test_what_is_read_back_is_noticed() -> None:
    with NothingReadBack(), pytest.raises(AssertionError, match="_local_scalar_dense waits"):
        torch.ones(3).sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphed_on_a_gpu() -> None:
    model = perceiver().cuda().eval()
    samples = [torch.rand(2, 4, 5, 3, device="cuda") for _ in range(3)]
    fast = pk.graphed(model, samples[0])
    for size in range(1, 2 * encodings.CACHED_TABLES):
        pk.FourierGrid((size,), 1, 2.0).tables("cuda")
    with torch.no_grad():
        for images in samples:
            torch.testing.assert_close(fast(images), model(images))
    assert pk.warmup(model, samples[0], backward=True) > 0
