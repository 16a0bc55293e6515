"""PerceiverIO and PerceiverLM: the interface and checkpoints of perceiver-pytorch, on this library's attention."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.modules.attention import CrossAttention, flatten_key_mask
from perceiver_kernels.modules.checkpoints import upgrade_io_before_loading
from perceiver_kernels.modules.decoder import GridQueries
from perceiver_kernels.modules.decoding import decode
from perceiver_kernels.modules.feed_forward import FeedForward
from perceiver_kernels.modules.perceiver import (
    AttentionResidual,
    PerceiverBlock,
    initial_hiddens,
    run,
    save_choices,
    self_attention_pairs,
)


class LatentBlock(nn.Module):
    """Self-attention and MLP over the latents, both with residuals."""

    def __init__(self, dim: int, *, heads: int, head_dim: int, save_hidden: bool | float) -> None:
        super().__init__()
        self.self_attns = self_attention_pairs(dim, heads=heads, head_dim=head_dim, saves=(save_hidden,))

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        for pair in self.self_attns:
            x = pair(x, checkpointing)
        return x


class PerceiverIO(nn.Module):
    """Latents that read any input and answer any queries: perceiver-pytorch's PerceiverIO, faster.

    The latents attend to the data once, then to one another in `depth` layers; the queries attend to the latents, and
    a linear map makes outputs of them. Arguments, parameter names, initial values and results are those of
    perceiver-pytorch 0.11.0; checkpoints of its releases since 0.8 load too.

    Args:
        depth: self-attention layers.
        dim: channels of a token of the data.
        queries_dim: channels of a query.
        logits_dim: channels of an output; None leaves those of the queries.
        num_latents: N.
        latent_dim: channels per latent.
        cross_heads, cross_dim_head: heads of the encoder's and the decoder's attention, and channels per head.
        latent_heads, latent_dim_head: the same for self-attention.
        weight_tie_layers: all layers share their parameters.
        decoder_ff: an MLP, with residual, after the decoder's attention.
        seq_dropout_prob: in training, the share of each input's tokens that the latents do not see.
        attn_residual: after each layer, mix the outputs of all layers so far.
        attn_residual_rank: rank of the mixing weights.
        inverted_cross_attn: normalise the encoder's attention over the latents (slot attention).
        mlp_recompute, activation_checkpointing: as in `Perceiver`. Not in perceiver-pytorch.

    Source: Jaegle et al. 2021, arXiv:2107.14795.
    """

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        queries_dim: int,
        logits_dim: int | None = None,
        num_latents: int = 512,
        latent_dim: int = 512,
        cross_heads: int = 1,
        latent_heads: int = 8,
        cross_dim_head: int = 64,
        latent_dim_head: int = 64,
        weight_tie_layers: bool = False,
        decoder_ff: bool = False,
        seq_dropout_prob: float = 0.0,
        attn_residual: bool = False,
        attn_residual_rank: int = 64,
        inverted_cross_attn: bool = False,
        mlp_recompute: float | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth is {depth}, but must be at least 0")
        if not 0 <= seq_dropout_prob < 1:
            raise ValueError(f"seq_dropout_prob is {seq_dropout_prob}, but must be in [0, 1)")
        if mlp_recompute is not None and not 0 <= mlp_recompute <= 1:
            raise ValueError(f"mlp_recompute is {mlp_recompute}, but must be from 0 to 1")
        self.dim = dim
        self.queries_dim = queries_dim
        self.seq_dropout_prob = seq_dropout_prob
        self.has_attn_residual = attn_residual
        self.inverted_cross_attn = inverted_cross_attn
        self.activation_checkpointing = activation_checkpointing

        saves = save_choices(1 + depth, 1, mlp_recompute)
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))
        self.cross_attend_block = PerceiverBlock(
            dim=latent_dim,
            context_dim=dim,
            cross_heads=cross_heads,
            latent_heads=latent_heads,
            cross_dim_head=cross_dim_head,
            latent_dim_head=latent_dim_head,
            self_per_cross_attn=0,
            attn_dropout=0.0,
            ff_dropout=0.0,
            saves=saves[:1],
        )
        self.layers = nn.ModuleList()
        self.attn_residuals = nn.ModuleList()
        # Layer by layer, the order in which perceiver-pytorch draws its parameters: equal seeds give equal models.
        for layer in range(depth):
            tied = weight_tie_layers and layer > 0
            self.layers.append(
                self.layers[0]
                if tied
                else LatentBlock(latent_dim, heads=latent_heads, head_dim=latent_dim_head, save_hidden=saves[1 + layer])
            )
            if attn_residual:
                self.attn_residuals.append(
                    self.attn_residuals[0] if tied else AttentionResidual(latent_dim, rank=attn_residual_rank)
                )
        self.decoder_cross_attn = CrossAttention(queries_dim, latent_dim, heads=cross_heads, head_dim=cross_dim_head)
        self.decoder_ff = FeedForward(queries_dim) if decoder_ff else None
        self.to_logits = nn.Identity() if logits_dim is None else nn.Linear(queries_dim, logits_dim)
        self.register_load_state_dict_pre_hook(upgrade_io_before_loading)

    def forward(
        self,
        data: Tensor,
        mask: Tensor | None = None,
        queries: Tensor | GridQueries | None = None,
        block_outputs: Tensor | list[Tensor] | None = None,
        return_hiddens: bool = False,
        *,
        grid: FourierGrid | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Read the data and answer the queries.

        Args:
            data: (batch, M, dim); with a grid (batch, *grid.shape, c) or (batch, M, c), c = dim - grid.num_channels.
            mask: bool (batch, M) or (batch, *grid.shape), True = attend. An input whose mask is False everywhere is
                attended to evenly, as perceiver-pytorch does.
            queries: (O, queries_dim), (1, O, queries_dim) or (batch, O, queries_dim); None gives the latents. Not in
                perceiver-pytorch: queries on a grid, which are not built (`GridQueries`).
            block_outputs: what the attention residual mixes in besides this call's layers, each (batch, N, latent_dim);
                defaults to the latents after the encoder.
            return_hiddens: give block_outputs as well, extended by the output of every layer.
            grid: where the tokens of the data stand, whose Fourier features follow the data's channels; they are not
                built where the separable path runs. Not in perceiver-pytorch.

        Returns:
            (batch, O, logits_dim), or (batch, N, latent_dim) without queries; with return_hiddens a pair with the list.

        Raises:
            ValueError: data, mask or queries do not fit the model; the message names the argument.
        """
        if queries is not None:
            queries = self._check_queries(queries, len(data))
        x = self._encode(data, mask, grid)
        keep_hiddens = return_hiddens or self.has_attn_residual or block_outputs is not None
        hiddens = initial_hiddens(block_outputs, x) if keep_hiddens else []
        for layer, block in enumerate(self.layers):
            x = block(x, self.activation_checkpointing and self.training)
            if keep_hiddens:
                hiddens.append(x)
            if self.has_attn_residual:
                x = self.attn_residuals[layer](hiddens)
        out = x if queries is None else self.decode(queries, x)
        return (out, hiddens) if return_hiddens else out

    def explain(self, data: Tensor, mask: Tensor | None = None, *, grid: FourierGrid | None = None) -> str:
        """Say which path the encoder's cross-attention takes for this input, and why."""
        cross_attn, latents = self.cross_attend_block.cross_attn, self.latents.unsqueeze(0)
        return cross_attn.explain(latents, data, grid=grid, mask=mask, inverted=self.inverted_cross_attn)

    def decode(self, queries: Tensor | GridQueries, latents: Tensor) -> Tensor:
        """Outputs (batch, O, logits_dim) of queries (batch or 1, O, queries_dim) and latents (batch, N, latent_dim)."""
        if self.activation_checkpointing and self.training and isinstance(queries, Tensor):
            x = run(self.decoder_cross_attn, queries, True, context=latents)
            x = x if self.decoder_ff is None else run(self.decoder_ff, x, True, residual=x)
            return cast(Tensor, self.to_logits(x))
        return decode(self.decoder_cross_attn, queries, latents, mlp=self.decoder_ff, final=self.to_logits)

    def _encode(self, data: Tensor, mask: Tensor | None, grid: FourierGrid | None) -> Tensor:
        if data.device != self.latents.device:
            raise ValueError(f"data is on {data.device}, but the parameters are on {self.latents.device}")
        if mask is not None:
            mask = flatten_key_mask(mask, len(data), data.shape[1:2] if grid is None else grid.shape, data.device)
        if self.training and self.seq_dropout_prob > 0:
            data, mask = _drop_tokens(data, mask, grid, self.seq_dropout_prob)
        return self.cross_attend_block(
            self.latents.unsqueeze(0),
            data,
            grid=grid,
            mask=mask,
            inverted=self.inverted_cross_attn,
            checkpointing=self.activation_checkpointing and self.training,
        )

    def _check_queries(self, queries: Tensor | GridQueries, batch: int) -> Tensor | GridQueries:
        """The queries as (batch or 1, O, queries_dim), or on a grid."""
        if isinstance(queries, GridQueries):
            if queries.num_channels != self.queries_dim or queries.batch not in (1, batch):
                raise ValueError(
                    f"queries has {queries.num_channels} channels and batch {queries.batch}, but must have "
                    f"{self.queries_dim}, and 1 or {batch}"
                )
            return queries
        shape = tuple(queries.shape)
        fits = (
            queries.ndim in (2, 3) and shape[-1] == self.queries_dim and (queries.ndim == 2 or shape[0] in (1, batch))
        )
        if not fits:
            raise ValueError(
                f"queries has shape {shape}, but must be (O, {self.queries_dim}), (1, O, {self.queries_dim}) or "
                f"({batch}, O, {self.queries_dim})"
            )
        if not queries.is_floating_point():
            raise ValueError(f"queries has dtype {queries.dtype}, but must be floating-point")
        if queries.device != self.latents.device:
            raise ValueError(f"queries is on {queries.device}, but the parameters are on {self.latents.device}")
        return queries if queries.ndim == 3 else queries.unsqueeze(0)


def _drop_tokens(
    data: Tensor, mask: Tensor | None, grid: FourierGrid | None, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """A random choice of each input's tokens, and their mask: the same share of those that the mask lets through.

    On a grid nothing moves: tokens that are dropped are masked.
    Source: Hawthorne et al. 2022, arXiv:2202.07765.
    """
    batch = len(data)
    num_tokens = data.shape[1] if grid is None else grid.num_positions
    keep = max(1, int((1 - dropout) * num_tokens))
    # perceiver-pytorch's draw: equal seeds drop the same tokens.
    ranks = torch.randn(batch, num_tokens, device=data.device)
    if mask is not None:
        ranks = ranks.masked_fill(~mask, -torch.finfo(ranks.dtype).max)
    kept = ranks.topk(keep, dim=1).indices
    kept_mask = None
    if mask is not None:
        attended = (mask.sum(dim=1, keepdim=True) * (1 - dropout)).ceil()
        kept_mask = mask.gather(1, kept) & (torch.arange(keep, device=data.device) < attended)
    if grid is None:
        return data.gather(1, kept[..., None].expand(-1, -1, data.shape[2])), kept_mask
    on_grid = torch.zeros(batch, num_tokens, dtype=torch.bool, device=data.device)
    return data, on_grid.scatter(1, kept, True if kept_mask is None else kept_mask)


class PerceiverLM(nn.Module):
    """A language model that predicts the token at every position of its input: perceiver-pytorch's PerceiverLM, faster.

    Token and position embeddings are both what a `PerceiverIO` reads and its queries.

    Args:
        dim: channels of the embeddings.
        num_tokens: size of the vocabulary.
        max_seq_len: longest input.
        arguments: of `PerceiverIO`: depth and what else it takes besides dim, queries_dim and logits_dim.
    """

    def __init__(self, *, dim: int, num_tokens: int, max_seq_len: int, **arguments: Any) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(max_seq_len, dim)
        self.perceiver_io = PerceiverIO(dim=dim, queries_dim=dim, logits_dim=num_tokens, **arguments)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens (batch, n), int64, to logits (batch, n, num_tokens); mask: bool (batch, n), True = attend."""
        if x.ndim != 2 or x.shape[1] > self.pos_emb.num_embeddings:
            longest = self.pos_emb.num_embeddings
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be (batch, n), n at most {longest}")
        if x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(f"x has dtype {x.dtype}, but must be an integer dtype")
        embedded = self.token_emb(x) + self.pos_emb(torch.arange(x.shape[1], device=x.device))
        return self.perceiver_io(embedded, mask=mask, queries=embedded)
