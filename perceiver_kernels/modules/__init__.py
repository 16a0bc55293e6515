"""PyTorch modules built on the operators: attention, MLP and whole Perceivers."""

from perceiver_kernels.modules.attention import CrossAttention, SelfAttention
from perceiver_kernels.modules.checkpoints import upgrade_state_dict
from perceiver_kernels.modules.feed_forward import FeedForward
from perceiver_kernels.modules.perceiver import Perceiver
from perceiver_kernels.modules.segments import GridTokens

__all__ = ["CrossAttention", "FeedForward", "GridTokens", "Perceiver", "SelfAttention", "upgrade_state_dict"]
