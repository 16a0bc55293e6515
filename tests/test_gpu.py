"""What only a GPU shows: results that repeat bit for bit, CUDA graphs, and tensors of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels.backends.cuda import runtime as cuda
from perceiver_kernels.backends.triton.runtime import interpreting
from perceiver_kernels.graphs import capture

HAS_GPU = torch.cuda.is_available() and not interpreting()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU, and kernels compiled for it")]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The one backend that runs: nothing runs as torch's own operators, however small or however fast those are."""
    if request.param == "cuda" and cuda.unavailable():
        pytest.skip(cuda.unavailable() or "")
    with pk.use_backend(request.param):
        yield request.param


on_both = pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)

FAR = 2**31  # elements between two parts of a tensor whose offsets need 64 bits
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """A differentiable call: its inputs, all leaves, and what it makes of them."""

    inputs: list[Tensor]
    call: Callable[..., Tensor]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.inputs)

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        out = self.call(*self.inputs)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), self.inputs)


def leaves(device: str, *sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(size, dtype=dtype).to(device).requires_grad_() for size in sizes]


def separable(device: str, dropout_p: float = 0.0) -> Work:
    def call(a: Tensor, rows: Tensor, columns: Tensor, x: Tensor, r: Tensor) -> Tensor:
        state = pk.separable_attention(a, [rows, columns], x, r, dropout_p=dropout_p, seed=7)
        return torch.cat([state.acc, *state.marginals], -1)

    return Work(leaves(device, (1, 33, 3), (1, 33, 20), (1, 33, 17), (2, 20, 17, 3), (2, 20, 17)), call)


def latent(device: str, dropout_p: float = 0.0, dtype: torch.dtype = torch.float32, head_dim: int = 40) -> Work:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pk.latent_attention(q, k, v, dropout_p=dropout_p, seed=7)

    return Work(leaves(device, *[(2, 3, 130, head_dim)] * 3, dtype=dtype), call)


def cross_attention(device: str) -> Work:
    return Work(leaves(device, (2, 2, 5, 261), (2, 2, 3000, 261), (2, 2, 3000, 261)), pk.cross_attention)


def queries(device: str) -> Work:
    def call(v: Tensor, rows: Tensor, columns: Tensor, r: Tensor) -> Tensor:
        return pk.separable_query_attention([rows, columns], v, r=r)

    return Work(leaves(device, (2, 2, 33, 40), (1, 2, 33, 20), (1, 2, 33, 17), (2, 20, 17)), call)


def module(device: str, module: nn.Module, *sizes: tuple[int, ...], **arguments: object) -> Work:
    """A module's call; its parameters are inputs too, the same tensors at every call."""
    module.to(device)
    inputs = leaves(device, *sizes)
    return Work([*inputs, *module.parameters()], lambda *tensors: module(*tensors[: len(inputs)], **arguments))


def cross(device: str) -> Work:
    grid = pk.FourierGrid(shape=(20, 17), num_bands=4, max_freq=20.0)
    layer = pk.CrossAttention(32, 3 + grid.num_channels, heads=2, head_dim=19)
    return module(device, layer, (1, 9, 32), (2, 20, 17, 3), grid=grid)


WORK: dict[str, Callable[[str], Work]] = {
    "separable_attention": separable,
    "separable_attention with dropout": lambda device: separable(device, 0.3),
    "latent_attention": latent,
    "latent_attention with dropout": lambda device: latent(device, 0.3),
    "latent_attention in bfloat16": lambda device: latent(device, dtype=torch.bfloat16, head_dim=64),
    "latent_attention in float16": lambda device: latent(device, dtype=torch.float16, head_dim=128),
    "cross_attention": cross_attention,
    "separable_query_attention": queries,
    "fourier_encode": lambda device: Work(leaves(device, (2, 50, 2)), lambda x: pk.fourier_encode(x, 8, 16.0)),
    "feed_forward": lambda device: module(device, pk.FeedForward(48), (2, 33, 48)),
    "cross-attention": cross,
    "self-attention": lambda device: module(device, pk.SelfAttention(48, heads=2, head_dim=24), (2, 33, 48)),
}
# Of these, what CUDA kernels take; a call that they refuse is an error.
IN_CUDA = (
    "separable_attention",
    "separable_attention with dropout",
    "latent_attention in bfloat16",
    "latent_attention in float16",
    "separable_query_attention",
    "fourier_encode",
)
CASES = [("triton", name) for name in WORK] + [("cuda", name) for name in IN_CUDA]
# What draws its random numbers' seed from the CPU at every call cannot be recorded, and need not be.
GRAPHED = [(backend, name) for backend, name in CASES if "dropout" not in name]


@pytest.mark.parametrize(("backend", "name"), CASES, indirect=["backend"])
def test_results_repeat_bit_for_bit(backend: str, name: str) -> None:
    work = WORK[name]("cuda")
    first = work.forward_and_backward()
    for _ in range(5):
        torch.randn(1000, 1000, device="cuda").sin()  # other work in between, other memory
        for one, other in zip(first, work.forward_and_backward(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("direction", ["forward", "forward_and_backward"])
@pytest.mark.parametrize(("backend", "name"), GRAPHED, indirect=["backend"])
def test_a_cuda_graph_computes_on_new_data(backend: str, name: str, direction: str) -> None:
    work = WORK[name]("cuda")
    call = getattr(work, direction)
    graph, recorded = capture(call)
    with torch.no_grad():
        for tensor in work.inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    expected = call()
    pairs = [(recorded, expected)] if direction == "forward" else list(zip(recorded, expected, strict=True))
    for one, other in pairs:
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["triton", "auto"], indirect=True)
def test_a_graph_of_a_whole_model(backend: str) -> None:
    model = pk.Perceiver(num_freq_bands=4, depth=2, max_freq=20.0, num_latents=9, latent_dim=32, num_classes=5)
    model.to("cuda").eval()
    image = torch.randn(2, 20, 17, 3, device="cuda")
    work = Work([image], lambda image: model(image))
    graph, recorded = capture(work.forward)
    image.copy_(torch.randn_like(image))
    graph.replay()
    assert torch.equal(recorded, work.forward())


def needs_memory(size: int) -> None:
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < size:
        pytest.skip(f"needs {size // GIB} GiB of the GPU's memory, {free // GIB} GiB are free")


def far_apart(near: Tensor, far: int = FAR) -> Tensor:
    """A tensor's values in memory where one batch entry starts `far` elements after the other."""
    storage = torch.empty(far * (len(near) - 1) + near[0].numel(), dtype=near.dtype, device=near.device)
    spread = storage.as_strided(near.shape, (far, *near.stride()[1:]))
    return spread.copy_(near)


@on_both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_separable_attention_reads_beyond_2_to_the_31_elements(backend: str, dtype: torch.dtype) -> None:
    needs_memory(6 * GIB)
    x = (torch.rand(2, 8, 9, 3, device="cuda") * 255).to(dtype)
    a, rows, columns = leaves("cuda", (1, 5, 3), (1, 5, 8), (1, 5, 9))
    results = []
    for data in (x, far_apart(x)):
        state = pk.separable_attention(0.01 * a, [rows, columns], data)
        loss = state.acc.square().sum() + state.marginals[0].square().sum()
        results.append((state.acc, *state.marginals, *torch.autograd.grad(loss, (a, rows, columns))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one)


@on_both
def test_separable_attention_writes_gradients_beyond_2_to_the_31_elements(backend: str) -> None:
    needs_memory(24 * GIB)
    width, channels = 4096, 65
    height = FAR // (width * channels) + 8
    x = torch.zeros(1, height, width, channels, dtype=torch.bfloat16, device="cuda")
    x[:, -2:] = torch.randn(1, 2, width, channels, device="cuda", dtype=torch.bfloat16)
    a, rows, columns = leaves("cuda", (1, 1, channels), (1, 1, height), (1, 1, width))
    mask = torch.zeros(1, height, width, dtype=torch.bool, device="cuda")
    mask[:, -2:] = True

    def gradients(x: Tensor, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        acc = pk.separable_attention(0.1 * a, [rows, columns], x, mask=mask).acc
        return acc.detach(), torch.autograd.grad(acc.square().sum(), x)[0][:, -2:]

    last = gradients(x[:, -2:].detach().clone(), rows[:, :, -2:].detach().contiguous(), mask[:, -2:].contiguous())
    for one, other in zip(gradients(x, rows, mask), last, strict=True):
        torch.testing.assert_close(one, other)


@on_both
def test_latent_attention_reads_beyond_2_to_the_31_elements(backend: str) -> None:
    needs_memory(8 * GIB)
    near = [torch.randn(2, 2, 33, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    results = []
    for place in (lambda tensor: tensor, far_apart):
        for moved in range(3):
            parts = [place(tensor) if i == moved else tensor for i, tensor in enumerate(near)]
            parts = [tensor.detach().requires_grad_() for tensor in parts]
            out = pk.latent_attention(*parts)
            results.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), parts)))
            del parts
    for one, other in zip(results[:3], results[3:], strict=True):
        for expected, actual in zip(one, other, strict=True):
            torch.testing.assert_close(actual, expected)


@on_both
def test_fourier_encode_writes_beyond_2_to_the_31_elements(backend: str) -> None:
    needs_memory(6 * GIB)
    grid = pk.FourierGrid(shape=(2160, 3840), num_bands=65, max_freq=224.0)
    encoded = grid.encode("cuda", torch.bfloat16)
    assert encoded.numel() > FAR
    rows, columns = grid.tables("cuda", torch.bfloat16)
    expected = torch.cat([rows[-1:].expand(len(columns), -1), columns], -1)
    assert torch.equal(encoded[-len(columns) :], expected)
