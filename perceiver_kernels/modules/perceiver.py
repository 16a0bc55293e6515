"""Perceiver: the whole model, with the interface and checkpoints of perceiver-pytorch, on this library's attention."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.modules.attention import CrossAttention, SelfAttention, flatten_key_mask
from perceiver_kernels.modules.checkpoints import upgrade_before_loading
from perceiver_kernels.modules.feed_forward import FeedForward


class ResidualPair(nn.Sequential):
    """Modules one after the other, each adding what it was given."""

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        for module in self:
            x = run(module, x, checkpointing, residual=x)
        return x


def run(module: nn.Module, x: Tensor, checkpointing: bool, **arguments: Any) -> Tensor:
    """module(x, **arguments), with checkpointing once more in backward instead of keeping what it saved."""
    if checkpointing and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(module, x, use_reentrant=False, **arguments))
    return module(x, **arguments)


def self_attention_pairs(
    dim: int,
    *,
    heads: int,
    head_dim: int,
    saves: Sequence[bool | float],
    dropout: float = 0.0,
    ff_dropout: float = 0.0,
) -> nn.Sequential:
    """Self-attention and MLP, both with residuals, as many times as `saves` has entries."""
    return nn.Sequential(
        *(
            ResidualPair(
                SelfAttention(dim, heads=heads, head_dim=head_dim, dropout=dropout),
                FeedForward(dim, dropout=ff_dropout, save_hidden=save_hidden),
            )
            for save_hidden in saves
        )
    )


class PerceiverBlock(nn.Module):
    """Cross-attention to the data, its MLP, then self-attention blocks over the latents, all with residuals."""

    def __init__(
        self,
        *,
        dim: int,
        context_dim: int,
        cross_heads: int,
        latent_heads: int,
        cross_dim_head: int,
        latent_dim_head: int,
        self_per_cross_attn: int,
        attn_dropout: float,
        ff_dropout: float,
        saves: Sequence[bool | float],
    ) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(
            dim, context_dim, heads=cross_heads, head_dim=cross_dim_head, dropout=attn_dropout, masked_rows="mean"
        )
        self.cross_ff = FeedForward(dim, dropout=ff_dropout, save_hidden=saves[0])
        self.self_attns = self_attention_pairs(
            dim,
            heads=latent_heads,
            head_dim=latent_dim_head,
            dropout=attn_dropout,
            ff_dropout=ff_dropout,
            saves=saves[1:],
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        grid: FourierGrid | None,
        mask: Tensor | None,
        inverted: bool,
        checkpointing: bool = False,
    ) -> Tensor:
        """Map latents (batch or 1, N, dim) and their context to latents (batch, N, dim)."""
        to_data = {"context": context, "grid": grid, "mask": mask, "inverted": inverted}
        x = run(self.cross_attn, x, checkpointing, residual=x, **to_data)
        x = run(self.cross_ff, x, checkpointing, residual=x)
        for pair in self.self_attns:
            x = pair(x, checkpointing)
        return x


# Bytes of first products that a training step keeps before MLPs compute theirs again.
KEPT_PRODUCTS = 512 << 20


def save_choices(mlps: int, depth: int, recompute: float | None) -> list[bool | float]:
    """FeedForward's save_hidden of each of a layer's MLPs, so that a share of them computes its product again."""
    share, instead = (2 / 3, KEPT_PRODUCTS / (mlps * depth)) if recompute is None else (recompute, False)
    return [instead if int((mlp + 1) * share) > int(mlp * share) else True for mlp in range(mlps)]


class AttentionResidual(nn.Module):
    """Mix the outputs h_l of all layers so far: sum_l softmax_l( W2 W1 RMSNorm(h_l) ) * h_l, channel by channel.

    Source: attention residuals, arXiv:2603.15031, with the attention pooling of Enformer (Avsec et al. 2021).
    """

    def __init__(self, dim: int, *, rank: int) -> None:
        super().__init__()
        self.to_attn_logits = nn.Sequential(
            nn.RMSNorm(dim), nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        )

    def forward(self, hiddens: list[Tensor]) -> Tensor:
        """Map layer outputs, each (batch, N, dim), to one (batch, N, dim)."""
        stacked = torch.stack(hiddens)
        return (stacked * self.to_attn_logits(stacked).softmax(dim=0)).sum(dim=0)


def initial_hiddens(block_outputs: Tensor | list[Tensor] | None, latents: Tensor) -> list[Tensor]:
    """What the outputs of all layers are appended to: the caller's (a copy of the list), or the latents."""
    if block_outputs is None:
        return [latents]
    return [block_outputs] if isinstance(block_outputs, Tensor) else list(block_outputs)


class MeanOverLatents(nn.Module):
    """(batch, N, dim) -> (batch, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Perceiver(nn.Module):
    """Latents that attend to every element of an image, a video or a sequence: perceiver-pytorch's Perceiver, faster.

    A layer is a cross-attention from the latents to the data, an MLP, and self_per_cross_attn self-attention blocks;
    after the last one come the mean over the latents, LayerNorm and a linear classifier. Arguments, parameter names,
    initial values and results are those of perceiver-pytorch 0.11.0; checkpoints of its earlier releases load too
    (`upgrade_state_dict`). Where the separable path runs (`explain`), position features are never written to memory.

    Args:
        num_freq_bands: K, frequencies per axis; a position becomes 2 K + 1 features per axis.
        depth: layers, each with one cross-attention.
        max_freq: the frequencies are linspace(1, max_freq / 2, K), in half-cycles per unit of positions in [-1, 1].
        input_channels: channels of the data, without position features.
        input_axis: axes of the data: 1 for sequences, 2 for images, 3 for video.
        num_latents: N.
        latent_dim: channels per latent.
        cross_heads, cross_dim_head: heads of each cross-attention, and channels per head.
        latent_heads, latent_dim_head: the same for self-attention.
        num_classes: outputs of the classifier.
        attn_dropout: probability of dropping an attention weight in training.
        ff_dropout: probability of dropping an MLP output in training.
        weight_tie_layers: all layers but the first share their parameters.
        fourier_encode_data: add Fourier features of the positions to the data.
        self_per_cross_attn: self-attention blocks per layer.
        final_classifier_head: False gives the latents themselves.
        inverted_cross_attn: normalise cross-attention over the latents (slot attention); one bool, or one per layer.
        attn_residual: after each layer, mix the outputs of all layers so far.
        attn_residual_rank: rank of the mixing weights.
        mlp_recompute: in training, the share of each layer's MLPs that compute their first product again in backward
            instead of keeping it: a sixth more time if it is all of them, and up to half of the memory less. None: two
            thirds, in calls where keeping all of them would take more than half a gigabyte. Not in perceiver-pytorch.
        activation_checkpointing: in training, keep only what goes into each attention and each MLP, and compute the
            rest again in backward: less memory for about a third more time. Not in perceiver-pytorch.

    Source: Jaegle et al. 2021, arXiv:2103.03206.
    """

    def __init__(
        self,
        *,
        num_freq_bands: int,
        depth: int,
        max_freq: float,
        input_channels: int = 3,
        input_axis: int = 2,
        num_latents: int = 512,
        latent_dim: int = 512,
        cross_heads: int = 1,
        latent_heads: int = 8,
        cross_dim_head: int = 64,
        latent_dim_head: int = 64,
        num_classes: int = 1000,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        weight_tie_layers: bool = False,
        fourier_encode_data: bool = True,
        self_per_cross_attn: int = 1,
        final_classifier_head: bool = True,
        inverted_cross_attn: bool | tuple[bool, ...] = False,
        attn_residual: bool = False,
        attn_residual_rank: int = 64,
        mlp_recompute: float | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth is {depth}, but must be at least 1")
        if mlp_recompute is not None and not 0 <= mlp_recompute <= 1:
            raise ValueError(f"mlp_recompute is {mlp_recompute}, but must be from 0 to 1")
        if isinstance(inverted_cross_attn, bool):
            inverted_cross_attn = (inverted_cross_attn,) * depth
        if len(inverted_cross_attn) != depth:
            raise ValueError(f"inverted_cross_attn has {len(inverted_cross_attn)} entries, but depth is {depth}")
        self.num_freq_bands = num_freq_bands
        self.max_freq = max_freq
        self.input_channels = input_channels
        self.input_axis = input_axis
        self.fourier_encode_data = fourier_encode_data
        self.inverted_cross_attn = tuple(inverted_cross_attn)
        self.has_attn_residual = attn_residual
        self.activation_checkpointing = activation_checkpointing

        saves = save_choices(1 + self_per_cross_attn, depth, mlp_recompute)
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))
        self.layers = nn.ModuleList()
        self.attn_residuals = nn.ModuleList()
        # Layer by layer, the order in which perceiver-pytorch draws its parameters: equal seeds give equal models.
        for layer in range(depth):
            tied = weight_tie_layers and layer > 1
            self.layers.append(
                self.layers[1]
                if tied
                else PerceiverBlock(
                    dim=latent_dim,
                    context_dim=input_channels + self._num_position_channels,
                    cross_heads=cross_heads,
                    latent_heads=latent_heads,
                    cross_dim_head=cross_dim_head,
                    latent_dim_head=latent_dim_head,
                    self_per_cross_attn=self_per_cross_attn,
                    attn_dropout=attn_dropout,
                    ff_dropout=ff_dropout,
                    saves=saves,
                )
            )
            if attn_residual:
                self.attn_residuals.append(
                    self.attn_residuals[1] if tied else AttentionResidual(latent_dim, rank=attn_residual_rank)
                )
        self.to_logits: nn.Module = nn.Identity()
        if final_classifier_head:
            self.to_logits = nn.Sequential(
                MeanOverLatents(), nn.LayerNorm(latent_dim), nn.Linear(latent_dim, num_classes)
            )
        self.register_load_state_dict_pre_hook(upgrade_before_loading)

    def forward(
        self,
        data: Tensor,
        mask: Tensor | None = None,
        return_embeddings: bool = False,
        block_outputs: Tensor | list[Tensor] | None = None,
        return_hiddens: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Classify the data, or embed it.

        Args:
            data: (batch, *axes, input_channels), floating-point, any strides; the axes may differ from call to call.
            mask: bool (batch, *axes) or (batch, M), True = attend. An input whose mask is False everywhere is attended
                to evenly, as perceiver-pytorch does.
            return_embeddings: give the latents instead of the logits.
            block_outputs: what the attention residual mixes in besides this call's layers, each (batch, N, latent_dim);
                defaults to the latents themselves.
            return_hiddens: give block_outputs as well, extended by the output of every layer.

        Returns:
            (batch, num_classes), or (batch, N, latent_dim) for embeddings; with return_hiddens a pair with the list.

        Raises:
            ValueError: the data or mask do not fit the model; the message names the argument.
        """
        context, grid, mask = self._prepare(data, mask)
        keep_hiddens = return_hiddens or self.has_attn_residual or block_outputs is not None
        hiddens = initial_hiddens(block_outputs, self.latents.expand(len(data), -1, -1)) if keep_hiddens else []
        x = self.latents.unsqueeze(0)
        for layer in range(len(self.layers)):
            x = self._run_layer(layer, x, context, grid, mask)
            if keep_hiddens:
                hiddens.append(x)
            if self.has_attn_residual:
                x = self.attn_residuals[layer](hiddens)
        out = x if return_embeddings else self.to_logits(x)
        return (out, hiddens) if return_hiddens else out

    def explain(self, data: Tensor, mask: Tensor | None = None) -> str:
        """Say which path each layer's cross-attention takes for this input, and why: one line per layer."""
        context, grid, mask = self._prepare(data, mask)
        latents = self.latents.unsqueeze(0)
        lines = []
        for layer, (cross_attn, inverted) in enumerate(zip(self._cross_attentions(), self._inverts(), strict=True)):
            choice = cross_attn.explain(latents, context, grid=grid, mask=mask, inverted=inverted)
            lines.append(f"layers.{layer}.cross_attn: " + "; ".join(map(str.strip, choice.splitlines())))
        return "\n".join(lines)

    # Where layers are kept differs in perceiver-pytorch's own models, which integrations/perceiver_pytorch.py runs by
    # this class: these three are what they override.

    def _run_layer(
        self, layer: int, x: Tensor, context: Tensor, grid: FourierGrid | None, mask: Tensor | None
    ) -> Tensor:
        to_data = {"context": context, "grid": grid, "mask": mask, "inverted": self.inverted_cross_attn[layer]}
        return self.layers[layer](x, checkpointing=self.activation_checkpointing and self.training, **to_data)

    def _cross_attentions(self) -> list[CrossAttention]:
        return [cast(PerceiverBlock, block).cross_attn for block in self.layers]

    def _inverts(self) -> Sequence[bool]:
        """Whether each layer's cross-attention is normalised over the latents."""
        return self.inverted_cross_attn

    @property
    def _num_position_channels(self) -> int:
        return self.input_axis * (2 * self.num_freq_bands + 1) if self.fourier_encode_data else 0

    def _prepare(self, data: Tensor, mask: Tensor | None) -> tuple[Tensor, FourierGrid | None, Tensor | None]:
        """Check the arguments of `forward`; give the data as (batch, M, channels), its grid, the mask as (batch, M)."""
        self._check_data(data)
        batch, *axes, _ = data.shape
        if mask is not None:
            mask = flatten_key_mask(mask, batch, axes, data.device)
        grid = None
        if self.fourier_encode_data:
            grid = FourierGrid(tuple(axes), num_bands=self.num_freq_bands, max_freq=self.max_freq, order="per_axis")
        return data.flatten(1, -2), grid, mask

    def _check_data(self, data: Tensor) -> None:
        shape = tuple(data.shape)
        if data.ndim != self.input_axis + 2:
            raise ValueError(f"data has shape {shape}, but must have {self.input_axis} axes between batch and channels")
        if shape[-1] != self.input_channels:
            raise ValueError(f"data has {shape[-1]} channels, but input_channels is {self.input_channels}")
        if 0 in shape[1:-1]:
            raise ValueError(f"data has shape {shape}, but no axis between batch and channels may be empty")
        if not data.is_floating_point():
            raise ValueError(f"data has dtype {data.dtype}, but must be floating-point; scale raw pixels first")
        if data.device != self.latents.device:
            raise ValueError(f"data is on {data.device}, but the parameters are on {self.latents.device}")
