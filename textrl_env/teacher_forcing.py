"""One pass over given responses: each distinct prompt read once, little padding, no more logits than are needed.

:func:`response_states` gives the hidden state that predicts each response token, :func:`linear_log_probs` the
log-probability and the entropy there without ever holding all logits. Both are exact, with gradients; models that
do not come apart into a body and a linear head take the plain way of
:meth:`~textrl_env.language_model.CausalLM.response_outputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

#: What one more pass through the body costs, in tokens: shorter rows pay only where they save more than this.
PASS_TOKENS = 128
#: Logits held at a time.
CHUNK_LOGITS = 8_000_000


def response_states(
    body: nn.Module, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> Tensor:
    """The last hidden states that predict the tokens of given responses.

    Args:
        body: A transformers model without its head.
        prompts: ``B`` int64 arrays of token ids. Where many are equal, each distinct one is read once and its
            keys and values are shared.
        responses: ``B`` int64 arrays of token ids.

    Returns:
        ``[sum of the responses' lengths, hidden]``, response after response.
    """
    unique, inverse = unique_rows(prompts)
    lengths = np.array([len(r) for r in responses])
    spared = sum(map(len, prompts)) - sum(map(len, unique))
    if spared >= 0.1 * (sum(map(len, prompts)) + lengths.sum()):
        return _after_shared_prompts(body, unique, inverse, responses, lengths)
    # The last token of a response predicts nothing that is asked for.
    rows = [np.concatenate([p, r[:-1]]) for p, r in zip(prompts, responses, strict=True)]
    first = np.array([len(p) - 1 for p in prompts])
    pool, start = _Pool(), np.zeros(len(rows), dtype=np.int64)
    for chosen in buckets([len(row) for row in rows]):
        ids = _right_padded([rows[i] for i in chosen], body.device)
        # Padding on the right: causal attention never looks at it.
        start[chosen] = pool.add(body(input_ids=ids, use_cache=False).last_hidden_state)
    return pool.take(_ranges(start + first, lengths))


def _after_shared_prompts(
    body: nn.Module,
    prompts: list[np.ndarray],
    inverse: np.ndarray,
    responses: Sequence[np.ndarray],
    lengths: np.ndarray,
) -> Tensor:
    """The same, the prompts read once and their keys and values put before the responses' own."""
    device = body.device
    before = np.array([len(p) for p in prompts])
    width = int(before.max())
    cache = DynamicCache()
    out = body(input_ids=_right_padded(prompts, device), past_key_values=cache, use_cache=True)
    pool = _Pool()
    ends = pool.add(out.last_hidden_state) + before - 1
    start = np.zeros(len(responses), dtype=np.int64)
    for chosen in buckets(np.maximum(lengths - 1, 0)):
        steps = int(lengths[chosen].max()) - 1
        if steps < 1:
            continue
        prompt = torch.from_numpy(inverse[chosen]).to(device)
        known = torch.from_numpy(before[inverse[chosen]]).to(device)[:, None]
        time = torch.arange(steps, device=device)
        column = torch.arange(width + steps, device=device)
        own = column - width <= time[:, None]  # [T, P + T]
        mask = torch.where(column < width, (column < known)[:, None, :], own)  # [b, T, P + T]
        start[chosen] = pool.add(
            body(
                input_ids=_right_padded([responses[i][:-1] for i in chosen], device, steps),
                attention_mask=mask[:, None],
                position_ids=known + time,
                past_key_values=Cache(layers=[_Prefix(layer, prompt) for layer in cache.layers]),
                use_cache=True,
            ).last_hidden_state
        )
    after = _ranges(start - 1, lengths)
    some = lengths > 0
    after[(np.cumsum(lengths) - lengths)[some]] = ends[inverse[some]]
    return pool.take(after)


class _Prefix(CacheLayerMixin):
    """One layer's keys and values of the prompts, seen from rows that each continue one of them."""

    def __init__(self, prompts: CacheLayerMixin, rows: Tensor) -> None:
        super().__init__()
        self.keys, self.values = prompts.keys, prompts.values
        self.rows = rows
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prompts are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        return (
            torch.cat([self.keys.index_select(0, self.rows), key_states], dim=2),
            torch.cat([self.values.index_select(0, self.rows), value_states], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1


class _Pool:
    """Hidden states of several padded passes, addressed by one flat index."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.size = 0

    def add(self, hidden: Tensor) -> np.ndarray:
        """Keep ``[b, L, hidden]``; where each row begins, int64 ``[b]``."""
        rows, width, features = hidden.shape
        start = self.size + width * np.arange(rows)
        self.parts.append(hidden.reshape(-1, features))
        self.size += rows * width
        return start

    def take(self, index: np.ndarray) -> Tensor:
        pool = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        return pool.index_select(0, torch.from_numpy(index).to(pool.device))


def _ranges(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start[i], start[i] + 1, ...``, ``lengths[i]`` of them, one after another."""
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(start, lengths) + offset


def _right_padded(rows: Sequence[np.ndarray], device: torch.device, width: int | None = None) -> Tensor:
    padded = np.zeros((len(rows), width or max(len(row) for row in rows)), dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded).to(device)


def unique_rows(prompts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct prompts in order of first appearance, and for each prompt its index among them."""
    seen: dict[bytes, int] = {}
    unique: list[np.ndarray] = []
    inverse = np.empty(len(prompts), dtype=np.int64)
    for i, prompt in enumerate(prompts):
        key = np.ascontiguousarray(prompt).tobytes()
        if key not in seen:
            seen[key] = len(unique)
            unique.append(prompt)
        inverse[i] = seen[key]
    return unique, inverse


def buckets(lengths: Sequence[int] | np.ndarray, pass_cost: int = PASS_TOKENS) -> list[np.ndarray]:
    """Cut rows into batches of like length so that padding and passes together cost the least.

    Args:
        lengths: Of the rows, ``[B]``.
        pass_cost: What one more batch costs, in tokens.

    Returns:
        Row indices of each batch, the longest rows first: the cheapest of all cuts of the sorted rows.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    longest = np.asarray(lengths)[order]
    total = len(order)
    best = np.zeros(total + 1)  # cheapest way to batch the first j rows
    cut = np.zeros(total + 1, dtype=np.int64)
    for j in range(1, total + 1):
        costs = best[:j] + (j - np.arange(j)) * longest[:j] + pass_cost
        cut[j] = costs.argmin()
        best[j] = costs[cut[j]]
    pieces, j = [], total
    while j > 0:
        pieces.append(order[cut[j] : j])
        j = cut[j]
    return pieces[::-1]


def linear_log_probs(
    hidden: Tensor, head: nn.Linear, actions: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies under ``softmax(head(hidden))``, a few rows of logits at a time.

    The logits are made again in the backward pass, so memory grows with the tokens and not with tokens times
    vocabulary.

    Args:
        hidden: ``[n, hidden]``, already divided by the temperature.
        head: From hidden states to logits; only the first ``vocab_size`` of them are actions.
        actions: int64 ``[n]``.
        vocab_size: ``V``.

    Returns:
        log_probs float32 ``[n]``, entropies float32 ``[n]`` in nats.
    """
    weight, bias = head.weight, head.bias
    if len(weight) > vocab_size:
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    return _LinearLogProbs.apply(hidden, weight, bias, actions)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor):
        ctx.set_materialize_grads(False)
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        log_probs, entropies, log_zs = [], [], []
        matrix = weight.to(ctx.dtype).T
        for rows in _chunks(len(hidden), len(weight)):
            logits = _logits(hidden[rows].to(ctx.dtype), matrix, bias)
            highest = logits.amax(-1, keepdim=True)
            exponential = (logits - highest).exp_()
            total = exponential.sum(-1)
            log_z = highest.squeeze(-1) + total.log()
            log_probs.append(logits.gather(-1, actions[rows, None]).squeeze(-1) - log_z)
            entropies.append(log_z - exponential.mul_(logits).sum(-1) / total)
            log_zs.append(log_z)
        log_prob, entropy, log_z = (torch.cat(x) for x in (log_probs, entropies, log_zs))
        ctx.save_for_backward(hidden, weight, bias, actions, log_z, entropy)
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, bias, actions, log_z, entropy = ctx.saved_tensors
        if grad_log_prob is None:
            grad_log_prob = torch.zeros_like(log_z)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = weight.to(ctx.dtype)
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            grad_bias = torch.zeros_like(bias) if bias is not None else None
            for rows in _chunks(len(hidden), len(weight)):
                states = hidden[rows].to(ctx.dtype)
                logits = _logits(states, narrow.T, bias)
                slope = grad_log_prob[rows, None]
                if grad_entropy is None:
                    grad = (logits - log_z[rows, None]).exp_().mul_(-slope)
                else:
                    # d log_prob / d logit_j = [j = a] - p_j; d entropy / d logit_j = -p_j (logit_j - E[logit])
                    mean = (log_z[rows] - entropy[rows])[:, None]
                    weights = (logits - mean).mul_(grad_entropy[rows, None]).add_(slope)
                    grad = (logits - log_z[rows, None]).exp_().mul_(weights).neg_()
                grad.scatter_add_(-1, actions[rows, None], slope)
                if grad_bias is not None:
                    grad_bias += grad.sum(0).to(grad_bias.dtype)
                grad = grad.to(ctx.dtype)
                grad_hidden[rows] = (grad @ narrow).to(hidden.dtype)
                if grad_weight is None:
                    continue
                if grad_weight.dtype == ctx.dtype:
                    grad_weight.addmm_(grad.T, states)
                else:
                    grad_weight += grad.T @ states
        return grad_hidden, grad_weight, grad_bias, None


def _logits(states: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    logits = (states @ matrix).float()
    return logits if bias is None else logits + bias


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocab_size)
    return [slice(start, start + size) for start in range(0, rows, size)]
