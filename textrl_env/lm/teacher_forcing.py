"""One pass over given responses: each distinct prompt read once, little padding, no more logits than are needed.

:func:`response_states` gives the hidden state that predicts each response token, :func:`linear_log_probs` the
log-probability and the entropy there without ever holding all logits. Both are exact, with gradients; models that
do not come apart into a body and a linear head take the plain way of
:meth:`~textrl_env.lm.causal_lm.CausalLM.response_outputs`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from textrl_env.lm.fused_llama import FusedLlama
from textrl_env.lm.shared_prompts import SharedPrompts

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
    # The last token of a response predicts nothing that is asked for.
    if spared >= 0.1 * (sum(map(len, prompts)) + lengths.sum()):
        return _after_shared_prompts(body, unique, inverse, [r[:-1] for r in responses], lengths)
    rows = _Rows([np.concatenate([p, r[:-1]]) for p, r in zip(prompts, responses, strict=True)])
    out = body(**rows.inputs(body.device), use_cache=False)
    first = rows.start + np.array([len(p) - 1 for p in prompts])
    return _take([out.last_hidden_state], _ranges(first, lengths))


def _after_shared_prompts(
    body: nn.Module,
    prompts: list[np.ndarray],
    inverse: np.ndarray,
    written: list[np.ndarray],
    lengths: np.ndarray,
) -> Tensor:
    """The same, the prompts read once and their keys and values put before what was written after them."""
    before = np.array([len(p) for p in prompts])
    padded = right_padded(prompts)
    cache = DynamicCache()
    ids = torch.from_numpy(padded).to(body.device)
    states = [body(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state]
    ends = padded.shape[1] * np.arange(len(prompts)) + before - 1
    start = np.zeros(len(written), dtype=np.int64)
    if lengths.max() > 1:
        rows = _Rows(written, inverse)
        if isinstance(body, FusedLlama) and body.device.type == "cpu":
            keys, values = ([getattr(layer, x) for layer in cache.layers] for x in ("keys", "values"))
            prefix = {"prompts": SharedPrompts(keys, values, before, rows.owner)}
            inputs = rows.inputs(body.device) | {"position_ids": rows.places(body.device, before)}
        else:
            owner = torch.from_numpy(rows.owner).to(body.device)
            prefix = {"past_key_values": Cache(layers=[_Prefix(layer, owner) for layer in cache.layers])}
            inputs = rows.inputs(body.device, before)
        states.append(body(**inputs, **prefix, use_cache=True).last_hidden_state)
        start = padded.size + rows.start
    index = _ranges(start - 1, lengths)
    some = lengths > 0
    index[(np.cumsum(lengths) - lengths)[some]] = ends[inverse[some]]
    return _take(states, index)


class _Rows:
    """Sequences laid into as few rows as they need, none longer than the longest sequence.

    Args:
        sequences: ``B`` int64 arrays.
        owners: int ``[B]``; only sequences of one owner share a row.

    Attributes:
        owner: Of each row, int64 ``[R]``.
        start: Where each sequence begins in the flattened rows, int64 ``[B]``.
    """

    def __init__(self, sequences: list[np.ndarray], owners: np.ndarray | None = None) -> None:
        lengths = np.array([len(s) for s in sequences])
        owners = np.zeros(len(sequences), dtype=np.int64) if owners is None else owners
        row, column, self.owner = pack_rows(lengths, owners)
        width = int(lengths.max())
        self.ids = np.zeros((len(self.owner), width), dtype=np.int64)
        self.positions = np.zeros_like(self.ids)
        self.sequence = np.full_like(self.ids, -1)  # which one a token belongs to; -1 is padding
        for i, tokens in enumerate(sequences):
            span = slice(column[i], column[i] + len(tokens))
            self.ids[row[i], span] = tokens
            self.positions[row[i], span] = np.arange(len(tokens))
            self.sequence[row[i], span] = i
        self.start = row * width + column
        self.alone = len(self.owner) == len(sequences)  # one in each row

    def inputs(self, device: torch.device, before: np.ndarray | None = None) -> dict[str, Tensor]:
        """What a model takes.

        Args:
            device: Where it is.
            before: How many cached tokens come before each owner's sequences, int ``[owners]``.
        """
        inputs = {"input_ids": torch.from_numpy(self.ids).to(device)}
        if self.alone and before is None:
            return inputs  # padding on the right: causal attention never looks at it
        width = self.ids.shape[1]
        sequence = torch.from_numpy(self.sequence).to(device)
        mask = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        if not self.alone:
            mask = mask & (sequence[:, :, None] == sequence[:, None, :])  # [R, W, W]
        if before is not None:
            known = torch.from_numpy(before[self.owner]).to(device)[:, None]
            seen = torch.arange(int(before.max()), device=device) < known  # [R, P]
            shape = (len(known), width, -1)
            mask = torch.cat([seen[:, None].expand(shape), mask.expand(shape)], dim=2)
        places = self.places(device, before)
        return inputs | {"attention_mask": mask.view(-1, 1, *mask.shape[-2:]), "position_ids": places}

    def places(self, device: torch.device, before: np.ndarray | None = None) -> Tensor:
        """Positions of the tokens, ``before[owner]`` of others standing before them, int64 ``[R, W]``."""
        places = self.positions if before is None else self.positions + before[self.owner][:, None]
        return torch.from_numpy(places).to(device)


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


def _take(states: list[Tensor], index: np.ndarray) -> Tensor:
    """Rows ``index`` of ``[b, L, hidden]`` states, flattened one after another: ``[n, hidden]``."""
    flat = [x.reshape(-1, x.shape[-1]) for x in states]
    pool = flat[0] if len(flat) == 1 else torch.cat(flat)
    return pool.index_select(0, torch.from_numpy(index).to(pool.device))


def _ranges(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start[i], start[i] + 1, ...``, ``lengths[i]`` of them, one after another."""
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(start, lengths) + offset


def right_padded(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Sequences under each other, int64 ``[B, L]``, zeros after the end of the shorter ones."""
    rows = np.zeros((len(sequences), max(len(s) for s in sequences)), dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows


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


def pack_rows(lengths: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay sequences into rows as long as the longest one: each into the fullest row that still has room.

    Args:
        lengths: int ``[B]``.
        owners: int ``[B]``; only sequences of one owner share a row.

    Returns:
        row int64 ``[B]``, column int64 ``[B]`` of each sequence, and the owner of each row, int64 ``[R]``.
    """
    capacity = int(lengths.max())
    row, column = np.zeros(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
    owner_of_row: list[int] = []
    room: dict[int, list[tuple[int, int]]] = {}  # owner -> sorted (room left, row)
    for i in np.argsort(-lengths, kind="stable"):
        rows = room.setdefault(int(owners[i]), [])
        at = bisect.bisect_left(rows, (int(lengths[i]), -1))
        if at == len(rows):
            left, row[i] = capacity, len(owner_of_row)
            owner_of_row.append(int(owners[i]))
        else:
            left, row[i] = rows.pop(at)
        column[i] = capacity - left
        bisect.insort(rows, (left - int(lengths[i]), int(row[i])))
    return row, column, np.array(owner_of_row)


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
        device_type = hidden.device.type
        low = torch.is_autocast_enabled(device_type)
        ctx.dtype = torch.get_autocast_dtype(device_type) if low else weight.dtype
        blank = hidden.new_empty(len(hidden), dtype=torch.promote_types(ctx.dtype, torch.float32))
        log_prob, entropy, log_z = (torch.empty_like(blank) for _ in range(3))
        for rows, logits in _logits(hidden, weight.to(ctx.dtype), bias):
            at = actions[rows, None]
            chosen = logits.gather(-1, at).squeeze(-1)
            highest = logits.amax(-1)
            shifted = logits.sub_(highest[:, None])
            exponential = shifted.exp()
            total = exponential.sum(-1)
            log_z[rows] = highest + total.log()
            log_prob[rows] = chosen - log_z[rows]
            # H = log Z - E[logit], in logits shifted by the highest.
            entropy[rows] = total.log() - exponential.mul_(shifted).sum(-1) / total
        ctx.save_for_backward(hidden, weight, bias, actions, log_z, entropy)
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, bias, actions, log_z, entropy = ctx.saved_tensors
        if grad_log_prob is None:
            grad_log_prob = torch.zeros_like(log_z)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None else None
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = weight.to(ctx.dtype)
            for rows, logits in _logits(hidden, narrow, bias):
                slope, lowered = grad_log_prob[rows, None], logits.sub_(log_z[rows, None])
                if grad_entropy is None:
                    grad = lowered.exp_().mul_(-slope)
                else:
                    # d log_prob / d logit_j = [j = a] - p_j; d entropy / d logit_j = -p_j (log p_j + entropy)
                    probability = lowered.exp()
                    pull = lowered.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(slope)
                    grad = probability.mul_(pull).neg_()
                grad.scatter_add_(-1, actions[rows, None], slope)
                if grad_bias is not None:
                    grad_bias += grad.sum(0).to(grad_bias.dtype)
                grad = grad.to(ctx.dtype)
                grad_hidden[rows] = (grad @ narrow).to(hidden.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, hidden[rows].to(ctx.dtype))
        return grad_hidden, grad_weight, grad_bias, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Float32 logits of some rows after others, all in one piece of memory, which may be overwritten."""
    size = min(len(hidden), max(1, CHUNK_LOGITS // len(weight)))
    space = torch.empty(size, len(weight), dtype=weight.dtype, device=weight.device)
    wide = space if space.dtype in (torch.float32, torch.float64) else space.float()
    for start in range(0, len(hidden), size):
        states = hidden[start : start + size].to(weight.dtype)
        logits = torch.mm(states, weight.T, out=space[: len(states)])
        if wide is not space:
            logits = wide[: len(states)].copy_(logits)
        if bias is not None:
            logits += bias
        yield slice(start, start + len(states)), logits


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
