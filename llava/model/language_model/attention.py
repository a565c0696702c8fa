"""Attention of the decoder: backends, masks, and single rows of the attention map."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import how_to_install
from ...pruning.ops import gather_tokens, on_device, repeat_heads, true_first
from ...pruning.precision import full_precision
from .compiling import constant
from .few_queries import attend_few, attend_folded, masked, suits

logger = logging.getLogger(__name__)

#: torch >= 2.5 serves several query heads from one key head without copying it
GROUPED_SDPA = "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")
BACKENDS = ("sdpa", "flash_attention_2", "eager")
#: weights of an attention map that are held at a time, where one is built
WEIGHTS_HELD = 2**26
#: places after which a row of a mask may begin without being copied for a kernel of a GPU
ALIGNED = 8


@dataclass
class Packing:
    """Rows of a padded batch without their padding, one behind the other.

    index:   (T,) places of the tokens among the B * S of the batch
    ends:    (B + 1,) int32, where each row begins and the last one ends
    lengths: tokens of every row
    """

    index: Tensor
    ends: Tensor
    lengths: Sequence[int]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @classmethod
    def of(cls, valid: Tensor, lengths: Sequence[int]) -> Packing:
        """For rows whose tokens, so many each, are those where `valid` (B, S) is True."""
        order = true_first(valid.flatten())
        ends = on_device([0, *accumulate(lengths)], valid.device).to(torch.int32)
        return cls(order[: sum(lengths)], ends, lengths)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    backend: str,
    packed: Packing | None = None,
) -> Tensor:
    """Causal attention; q (B, H, Q, d), k and v (B, G, K, d) with G dividing H -> (B, H, Q, d).

    mask: (B or 1, 1, Q, K) True where a query sees a key, or what is added to the products (-inf:
    it does not see the key), see `attention_mask`. None: the plain causal mask, the last query
    seeing every key.
    packed: says what the mask would, where Q = K, to a backend that `packs_rows`; the output is
    zero on padding.
    """
    if packed is not None:
        return _flash_packed(q, k, v, packed)
    if backend == "flash_attention_2" and mask is None:
        return _flash(q, k, v)
    if backend == "eager":
        return _eager(q, k, v, mask)
    if mask is None and 1 < q.shape[2] < k.shape[2]:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    if suits(q, k, mask):
        return attend_few(q, k, v, mask)
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if GROUPED_SDPA and serves_groups(q.device, q.dtype, mask is not None):
            grouped = {"enable_gqa": True}
        elif q.shape[2] == 1:
            return attend_folded(q, k, v, mask)
        else:
            k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    causal = mask is None
    if q.shape[2] == 1:  # a plain bool also where sizes are symbols, in compiled code
        causal = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **grouped)


def attend_with_tail(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tail: Tensor, backend: str
) -> Tensor:
    """As `attend` for prompts with the nodes of a tree behind them: the prompt's tokens, which see
    none of those, as without them, and the T nodes by `tail` (B or 1, 1, T, K), a mask of numbers.
    Of the prompt the last tokens may ask alone.
    """
    asking, size = (x.shape[2] - tail.shape[2] for x in (q, k))
    prompt = attend(q[:, :, :asking], k[:, :, :size], v[:, :, :size], mask, backend)
    return torch.cat([prompt, attend(q[:, :, asking:], k, v, tail, backend)], dim=2)


def packs_rows(backend: str) -> bool:
    """Whether a backend wants padded batches as `Packing` in place of a mask."""
    return backend == "flash_attention_2"


@constant
def serves_groups(device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Whether a fast kernel of `device` serves several query heads from one key head.

    Elsewhere SDPA would write out all scores, which costs more than repeating keys and values:
    FlashAttention (half precision, compute capability 8.0 on) knows groups but no masks, cuDNN
    knows both (9.0 on), the memory-efficient kernel masks alone; MPS repeats them itself.
    """
    if device.type == "cpu":
        return True
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    least = (9, 0) if masked else (8, 0)
    half = dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(device) >= least


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return masked(scores.float(), mask).softmax(dim=-1).to(q.dtype) @ v


def attend_behind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    shared: tuple[Tensor, Tensor, Tensor | None],
) -> Tensor:
    """As `attend`, where all rows begin with the same keys and values, (G, P, d) each, and maybe a
    bias of those keys (P,): all queries look at them in one product, and nothing is copied for the
    rows.

    k, v and mask are of what follows that beginning, which every query sees.
    """
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    mask = mask.expand(q.shape[0], -1, -1, -1)
    keys = shared[0].shape[1] + k.shape[2]
    if q.shape[0] * q.shape[1] * q.shape[2] * keys <= WEIGHTS_HELD:
        return _attend_behind(q, k, v, mask, *shared)
    rows = max(1, WEIGHTS_HELD // (q.shape[1] * q.shape[2] * keys))
    parts = zip(q.split(rows), k.split(rows), v.split(rows), mask.split(rows), strict=True)
    out = [_attend_behind(*part, *shared) for part in parts]
    return torch.cat(out)


def _attend_behind(q, k, v, mask, keys, values, bias=None) -> Tensor:
    batch, heads, count, width = q.shape
    groups, known = keys.shape[:2]
    repeats = heads // groups
    # Key heads come first, so that the rows of the batch are rows of one matrix.
    q = (q * width**-0.5).view(batch, groups, repeats, count, width).transpose(0, 1)
    before = (q.reshape(groups, -1, width) @ keys.transpose(1, 2)).view(*q.shape[:4], known)
    after = q.flatten(2, 3) @ k.transpose(0, 1).transpose(2, 3)
    after = masked(after.view(*q.shape[:4], -1), mask[:, :1])
    if bias is not None:
        before = before + bias.to(before.dtype)
    weights = torch.cat([before, after], dim=-1).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    out = (weights.flatten(1, 3)[..., :known] @ values).view(q.shape)
    out = out + (weights.flatten(2, 3)[..., known:] @ v.transpose(0, 1)).view(q.shape)
    return out.transpose(0, 1).reshape(batch, heads, count, width)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # an extra, checked when the model is built

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v, causal=True).transpose(1, 2)


def _flash_packed(q: Tensor, k: Tensor, v: Tensor, packed: Packing) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    batch, heads, size, width = q.shape
    rows = (x.transpose(1, 2).flatten(0, 1).index_select(0, packed.index) for x in (q, k, v))
    out = flash_attn_varlen_func(
        *rows,
        cu_seqlens_q=packed.ends,
        cu_seqlens_k=packed.ends,
        max_seqlen_q=packed.longest,
        max_seqlen_k=packed.longest,
        causal=True,
    )
    whole = out.new_zeros(batch * size, heads, width).index_copy(0, packed.index, out)
    return whole.unflatten(0, (batch, size)).transpose(1, 2)


def check_backend(name: str) -> str:
    """`name`, when it is a backend that can run here; ValueError or ImportError otherwise."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attn_implementation {name!r}, choose from {', '.join(BACKENDS)}")
    if name == "flash_attention_2":
        try:
            import flash_attn  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "attn_implementation 'flash_attention_2' needs the package flash-attn: "
                f"{how_to_install('flash')}, or use 'sdpa'"
            ) from error
    return name


def check_dtype(backend: str, dtype: torch.dtype) -> None:
    """Raises ValueError where a backend does not compute in `dtype`."""
    if backend == "flash_attention_2" and dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"attn_implementation 'flash_attention_2' computes in float16 or bfloat16, not in "
            f"{name}: choose one of these, or 'sdpa'"
        )


def causal_mask(num_queries: int, num_keys: int, device) -> Tensor:
    """(1, 1, Q, K) True where a query may look; the queries are the last Q of the K tokens."""
    keys = torch.arange(num_keys, device=device)
    queries = keys[num_keys - num_queries :]
    return (keys <= queries[:, None])[None, None]


def padded_causal_mask(valid: Tensor, num_queries: int) -> Tensor:
    """(B, 1, Q, K) causal mask that hides padding, from `valid` (B, K).

    A query on padding that would see nothing sees everything (else it became NaN and spread), which
    is also what the stock implementation does.
    """
    if num_queries == 1:
        return valid[:, None, None, :]
    mask = causal_mask(num_queries, valid.shape[1], valid.device) & valid[:, None, None, :]
    return mask | ~mask.any(dim=-1, keepdim=True)


@overload
def attention_mask(
    visible: Tensor, bias: Tensor | None, num_queries: int, dtype: torch.dtype
) -> Tensor: ...


@overload
def attention_mask(
    visible: Tensor | None, bias: Tensor | None, num_queries: int, dtype: torch.dtype
) -> Tensor | None: ...


def attention_mask(
    visible: Tensor | None, bias: Tensor | None, num_queries: int, dtype: torch.dtype
) -> Tensor | None:
    """The mask that `attend` takes for the last Q of K tokens.

    visible: (B or 1, 1, Q, K) True where a query sees a key; None: the plain causal mask
    bias:    fp32, what is added to the products of all queries with a key, (B, K), or to those of
             each with each, (B, Q, K); None: nothing, and no mask is made where none was

    It is one of numbers, (B or 1, 1, Q, K) in `dtype`, that of the queries, with rows that begin
    where kernels want them to: those would make such a one of any other, in every layer.
    """
    if visible is None:
        if bias is None:
            return None
        if num_queries == 1:
            return spread(bias).to(dtype)
        visible = causal_mask(num_queries, bias.shape[-1], bias.device)
    batch, keys = max(len(visible), 0 if bias is None else len(bias)), visible.shape[3]
    added = visible.new_empty(batch, 1, visible.shape[2], room_for(keys), dtype=dtype)[..., :keys]
    added = added.zero_() if bias is None else added.copy_(spread(bias))
    return added.masked_fill_(~visible, float("-inf"))


def branch_mask(
    visible: Tensor,
    length: int,
    valid: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `attention_mask`, for q nodes of a tree that are the last of `length` tokens.

    visible: (q, r) as in `Branches`. valid: (B, length) of all tokens; None: all are real
    bias: of all keys (B, length), or of the nodes with them (B, q, length); None: nothing
    """
    batch = max([len(own) for own in (valid, bias) if own is not None], default=1)
    added = visible.new_empty(batch, 1, len(visible), room_for(length), dtype=dtype)[..., :length]
    added = added.zero_() if bias is None else added.copy_(spread(bias))
    if valid is not None:
        added.masked_fill_(~valid[:, None, None], float("-inf"))
    added[..., length - visible.shape[1] :].masked_fill_(~visible, float("-inf"))
    return added


def room_for(keys: int) -> int:
    """Places that a row of a mask of so many keys takes: aligned, and always more, as sizes that
    are equal for some prompts and not for others compile twice."""
    return (keys // ALIGNED + 1) * ALIGNED


def spread(bias: Tensor) -> Tensor:
    """A bias (B, K) of keys, or (B, Q, K) of pairs, as it is added to products (B, H, Q, K)."""
    return bias[:, None, None] if bias.ndim == 2 else bias[:, None]


def bias_at(bias: Tensor | None, rows: Tensor) -> Tensor | None:
    """What a bias as in `attention_mask` is for the queries at `rows` (B, R) alone."""
    return bias if bias is None or bias.ndim == 2 else gather_tokens(bias, rows)


def bias_among(bias: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    """Likewise for some of the queries with some of the keys."""
    if bias is None:
        return None
    return bias[:, keys] if bias.ndim == 2 else bias[:, queries, keys]


@lru_cache
def say_no_bias() -> None:
    """Says, once, what becomes of attention with a bias where FlashAttention was asked for."""
    logger.warning(
        "flash_attention_2 cannot add a bias to keys: layers in which the pruning method adds one "
        "run on sdpa"
    )


ROW_FORMS = {"weights": torch.softmax, "log_weights": torch.log_softmax}


def attention_rows(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    form: str = "weights",
    bias: Tensor | None = None,
) -> Tensor:
    """Rows of the causal attention map in fp32, without the map.

    q (B, H, Q, d) and k (B, G, S, d) after RoPE, the queries being those of the last Q tokens; rows
    (B, R) places among the queries; valid (B, S) as in `Prefill`; bias as in `attention_mask`, one
    of pairs being of the Q queries. Returns (B, H, R, S) over all keys: softmax weights, their
    logarithm ("log_weights"), or the scaled products before the softmax, bias included ("scores");
    hidden keys have 0 or -inf.
    """
    index = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    places = rows + k.shape[2] - q.shape[2]
    return rows_of(q.gather(2, index), k, places, valid, form, bias_at(bias, rows))


def rows_of(
    picked: Tensor,
    k: Tensor,
    places: Tensor,
    valid: Tensor | None,
    form: str = "weights",
    bias: Tensor | None = None,
) -> Tensor:
    """`attention_rows` from the queries (B, H, R, d) themselves, at `places` (B, R) of the keys;
    bias (B, S), or (B, R, S) of these queries."""
    picked = picked.float() * picked.shape[-1] ** -0.5
    # Grouped queries share a key head: fold them into the row axis instead of repeating keys.
    batch, heads, count, width = picked.shape
    groups = k.shape[1]
    picked = picked.reshape(batch, groups, heads // groups * count, width)
    with full_precision(k.device):
        scores = picked @ k.float().transpose(2, 3)
    scores = scores.reshape(batch, heads, count, -1)
    if bias is not None:
        scores = scores + spread(bias)
    hidden = torch.arange(k.shape[2], device=k.device) > places[:, None, :, None]
    if valid is not None:
        hidden = hidden | ~valid[:, None, None, :]
    scores = scores.masked_fill(hidden, float("-inf"))
    return ROW_FORMS[form](scores, dim=-1) if form in ROW_FORMS else scores
