"""Attention over rows that lie behind each other in one sequence, at the cost of each row alone: torch's own varlen kernel.

transformers' `sdpa` gives such a batch a mask of its whole length squared, in every layer. Importing this module registers the
implementation `moult_varlen` with transformers. It needs no package besides torch (FlashAttention 2 is part of it, torch 2.13).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "moult_varlen"

# What the kernel can do: heads of up to 256 numbers, in steps of 8 (pytorch/aten/src/ATen/native/transformers/cuda).
LARGEST_HEAD, HEAD_STEP = 256, 8

# What a layer may ask of its attention that the kernel does not do; to leave it out would be another model.
NOT_DONE = ("softcap", "s_aux", "position_bias", "cache", "head_mask")


@dataclass
class Calls:
    """How many layers have asked for their attention here: some models have one of their own, and ask nobody."""

    count: int = 0


CALLS = Calls()


class NotExact(ValueError):
    """A layer asks for something that this attention does not do."""


def varlen_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **more,
):
    """The attention of one layer, as transformers calls it.

    Args:
        query: (batch, heads, tokens, head size); key and value: with as many heads or fewer.
        attention_mask: of padded rows; None for rows without padding, or with padding behind them.
        cu_seq_lens_q: int32 (rows + 1,), where each row begins and the last ends, from TRL's collator; None if each row of
            the batch is one.

    Raises NotExact where a layer asks for more than this can do.
    """
    CALLS.count += 1
    asked = [name for name in NOT_DONE if more.get(name) is not None]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if asked or dropout or not causal:
        raise NotExact(f"its attention has {asked[0] if asked else 'dropout' if dropout else 'no causal order'}")
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=causal)
    batch, _, tokens, width = query.shape
    if key.shape[2] != tokens:
        raise NotExact("its attention looks at tokens that are not in the batch")
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=query.device)
        max_length_q = tokens
    kernel = flash if query.is_cuda else row_by_row
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    out = kernel(
        flat[0],
        flat[1],
        flat[2],
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling if scaling is not None else width**-0.5,
        # The window counts the token itself; the kernel's does not.
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=True,
    )
    return out.unflatten(0, (batch, tokens)), None


def flash(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch's kernel, for CUDA. It wants half precision, and heads of one size that is a multiple of 8."""
    from torch.nn.attention.varlen import varlen_attn

    width, kept = query.shape[-1], value.shape[-1]
    size = -(-max(width, kept) // HEAD_STEP) * HEAD_STEP
    # The kernel is not among the operations that autocast knows. Some models rotate queries and keys in float32.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    parts = (pad(part, (0, size - part.shape[-1])).to(dtype) for part in (query, key, value))
    out = varlen_attn(*parts, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=enable_gqa)
    return out[..., :kept]


def row_by_row(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What `flash` computes, in plain torch: for the CPU, where each row alone is fast, and plan tries out a model."""
    bounds, left = cu_q.tolist(), window_size[0]
    outs = []
    for begin, end in pairwise(bounds):
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        mask = None
        if 0 <= left < end - begin - 1:
            at = torch.arange(end - begin, device=query.device)
            distance = at[:, None] - at
            mask = (distance >= 0) & (distance <= left)
        outs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
            ).transpose(0, 1)
        )
    return torch.cat(outs)


def varlen_mask(*args, attention_mask=None, **more):
    """None where no token is masked besides the future ones (rows and windows are the kernel's), else sdpa's."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **more)


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, varlen_mask)
