"""perceiver_kernels: fused kernels that make Perceiver models fast, checked against a pure-PyTorch reference."""

from perceiver_kernels.dispatch import BackendError, use_backend
from perceiver_kernels.encodings import FourierEncoding, FourierGrid
from perceiver_kernels.explain import explain
from perceiver_kernels.graphs import graphed, warmup
from perceiver_kernels.integrations import accelerate, restore
from perceiver_kernels.modules import CrossAttention, FeedForward, GridTokens, Perceiver, SelfAttention
from perceiver_kernels.ops.cross_attention import cross_attention
from perceiver_kernels.ops.fourier_encode import fourier_encode
from perceiver_kernels.ops.latent_attention import latent_attention
from perceiver_kernels.ops.separable_attention import SeparableState, separable_attention
from perceiver_kernels.ops.separable_query_attention import separable_query_attention

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CrossAttention",
    "FeedForward",
    "FourierEncoding",
    "FourierGrid",
    "GridTokens",
    "Perceiver",
    "SelfAttention",
    "SeparableState",
    "accelerate",
    "cross_attention",
    "explain",
    "fourier_encode",
    "graphed",
    "latent_attention",
    "restore",
    "separable_attention",
    "separable_query_attention",
    "use_backend",
    "warmup",
]
