"""One pass over finished sequences: what prompts share is read once, little padding, no more logits than are needed.

A layout says where each token of a batch is read and where the state that predicts each of the policy's tokens will
stand: :class:`PackedLayout` fills rows with several sequences behind shared prompts, :class:`PaddedLayout` is one
sequence a row for models that do not come apart into a body and a linear head. Both are computed on the host from
:class:`~textrl_env.lm.sequences.Sequences` and moved in one transfer; tokens of prompts and environments are read and
predict nothing. :func:`linear_log_probs` gives log-probabilities and entropies without ever holding all logits. All of
it is exact, with gradients.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textrl_env.lm.attention_masks import AttentionMasks
from textrl_env.lm.fused_llama import FusedLlama
from textrl_env.lm.sequences import Sequences, common_length, distinct, move, ranges, right_padded
from textrl_env.lm.shared_prompts import SharedPrompts

#: Logits held at a time.
CHUNK_LOGITS = 8_000_000
#: Prompts are shared where that spares at least this share of the tokens.
_WORTH_SHARING = 0.1


class PackedLayout:
    """Sequences laid into rows, several in a row where they fit, behind prompts that are read once.

    What comes before the policy's first token counts as the prompt. Where prompts are equal, or begin alike, each
    beginning is read once and its keys and values stand before what follows it (:func:`shared_beginnings`); otherwise
    a prompt is part of its row.

    Args:
        sequences: ``B`` of them, ``m`` tokens of the policy's together.

    Attributes:
        actions: The policy's tokens, int64 ``[m]``.
        longest: Tokens of the longest sequence.
    """

    #: Whether equal prompts are read once, through a cache.
    may_share = True

    def __init__(self, sequences: Sequences) -> None:
        last = sequences.last
        shared, owners = shared_beginnings(sequences.prompts)
        before = np.array([len(beginning) for beginning in shared])
        spared = before[owners].sum() - before.sum()
        self._shares = self.may_share and bool(spared >= _WORTH_SHARING * (last + 1).sum())
        prompts = right_padded(shared) if self._shares else np.zeros((0, 0))
        skipped = before[owners] if self._shares else np.zeros_like(last)  # what is not read in the rows
        # The policy's last token predicts nothing that is asked for, and neither does what comes after it.
        lengths = last - skipped
        owners = owners if self._shares else np.zeros_like(owners)
        row, column, self._owners = pack_rows(lengths, owners)
        width = int(lengths.max(initial=0))
        ids, positions = np.zeros((2, len(self._owners), width), dtype=np.int64)
        sequence = np.full_like(ids, -1)  # which one a token belongs to; -1 is padding
        place = row * width + column  # where each sequence begins in the flattened rows
        filled = ranges(place, lengths)
        ids.ravel()[filled] = sequences.tokens[ranges(sequences.starts + skipped, lengths)]
        positions.ravel()[filled] = ranges(skipped, lengths)
        sequence.ravel()[filled] = np.repeat(np.arange(len(lengths)), lengths)
        self._alone = len(self._owners) == len(sequences)  # one in each row
        self.longest = int(sequences.lengths.max(initial=0))

        rows = sequences.rows
        offset = sequences.policy - sequences.starts[rows]  # of the policy's tokens in their sequences
        states = (
            prompts.size + place[rows] + offset - skipped[rows] - 1
        )  # where what predicts them will stand
        if self._shares:
            after_prompt = offset == skipped[rows]
            ends = prompts.shape[1] * np.arange(len(shared)) + before - 1
            states[after_prompt] = ends[owners[rows[after_prompt]]]
        self._before = before  # tokens of each beginning
        known = self._before[self._owners] if self._shares else np.zeros(0)  # cached tokens before each row
        arrays = [prompts, ids, positions, sequence, self._owners, known, states, sequences.actions]
        moved = move(arrays, sequences.device)
        self._prompts, self._ids, self._positions, self._sequence, self._owner, self._known = moved[:6]
        self._states, self.actions = moved[6:]

    def states(
        self,
        body: nn.Module | FusedLlama,
        masks: AttentionMasks,
        dtype: torch.dtype,
        share_attention: bool = True,
    ) -> Tensor:
        """The last hidden states that predict the policy's tokens, ``[m, hidden]``, with gradient.

        Args:
            body: A transformers model without its head, or a stand-in for it.
            masks: Who may look at whom.
            dtype: Of the model's scores.
            share_attention: Let a fused body read the keys of a prompt where they are, for all its responses;
                False gives every row a copy, as modules need it.
        """

        def read(mask: tuple[Tensor, Tensor, Tensor] | None = None, **inputs: Any) -> Tensor:
            if mask is not None:
                fused = isinstance(body, FusedLlama)
                inputs["attention_mask"] = masks.one(*mask) if fused else masks.make(*mask, dtype)
            return body(**inputs).last_hidden_state

        if not self._shares:
            states = [read(**self._row_inputs(body, masks), use_cache=False)]
        else:
            from textrl_env.lm.caches import prompt_cache

            cache = prompt_cache()
            prompts = _causal(self._prompts) if _needs_mask(body, masks, self._prompts.shape[1]) else None
            states = [read(prompts, input_ids=self._prompts, past_key_values=cache, use_cache=True)]
            if self._ids.numel():
                states.append(read(**self._inputs_after(cache, body, masks, share_attention), use_cache=True))
        flat = [x.flatten(0, 1) for x in states]
        pool = flat[0] if len(flat) == 1 else torch.cat(flat)
        return pool.index_select(0, self._states)

    def _row_inputs(self, body: nn.Module | FusedLlama, masks: AttentionMasks) -> dict[str, Any]:
        """What a model takes of the rows, each token seeing those of its own sequence before it."""
        inputs: dict[str, Any] = {"input_ids": self._ids}
        if self._alone and not _needs_mask(body, masks, self._ids.shape[1]):
            # Padding on the right: causal attention never looks at it.
            if self._ids.device.type == "cpu" or isinstance(body, FusedLlama):
                return inputs
            from textrl_env.lm.caches import prompt_cache

            # Without a cache transformers looks at the positions, for which a GPU has to be waited for.
            return inputs | {"past_key_values": prompt_cache()}
        mask = (self._own_tokens(), self._positions, self._positions)
        return inputs | {"position_ids": self._positions, "mask": mask}

    def _inputs_after(
        self, cache: Any, body: nn.Module | FusedLlama, masks: AttentionMasks, share_attention: bool
    ) -> dict[str, Any]:
        """What a model takes of the rows when the prompts are in ``cache``."""
        inputs: dict[str, Any] = {"input_ids": self._ids, "position_ids": self._positions}
        own = self._own_tokens()
        longest = int(self._before.max()) + self._ids.shape[1]
        fused = isinstance(body, FusedLlama) and body.device.type == "cpu" and not masks.limited(longest)
        if fused and share_attention:
            if not self._alone:
                inputs["mask"] = (own, self._positions, self._positions)
            keys, values = ([getattr(layer, x) for layer in cache.layers] for x in ("keys", "values"))
            return inputs | {"prompts": SharedPrompts(keys, values, self._before, self._owners)}
        from textrl_env.lm.caches import prefix_cache

        before = torch.arange(int(self._before.max()), device=self._ids.device)
        seen = before < self._known[:, None]  # [R, P]
        own = own.expand(len(seen), -1, -1)
        visible = torch.cat([seen[:, None].expand(-1, own.shape[1], -1), own], dim=2)
        keys = torch.cat([before.expand(len(seen), -1), self._positions], dim=1)
        return inputs | {
            "mask": (visible, self._positions, keys),
            "past_key_values": prefix_cache(cache, self._owner),
        }

    def _own_tokens(self) -> Tensor:
        """bool ``[R or 1, W, W]``: which tokens of its row a token may look at."""
        width = self._ids.shape[1]
        mask = torch.ones(1, width, width, dtype=torch.bool, device=self._ids.device).tril()
        if not self._alone:
            mask = mask & (self._sequence[:, :, None] == self._sequence[:, None, :])
        return mask


def shared_beginnings(prompts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """What to read once for several prompts: the distinct prompts, or the beginning that all have in common.

    Whichever leaves fewer tokens to read: the answers of a group share their whole prompt, prompts of different text a
    system message or worked examples.

    Args:
        prompts: ``B`` int64 arrays of at least one token.

    Returns:
        The ``U`` beginnings, and which one each prompt has, int64 ``[B]``.
    """
    unique, owners = distinct(prompts)
    if len(unique) < 2:
        return [prompts[i] for i in unique], owners
    common = common_length([prompts[i] for i in unique])
    spared = sum(len(prompt) for prompt in prompts) - sum(len(prompts[i]) for i in unique)
    if common * (len(prompts) - 1) <= spared:
        return [prompts[i] for i in unique], owners
    return [prompts[0][:common]], np.zeros(len(prompts), dtype=np.int64)


class ApartLayout(PackedLayout):
    """The same with every prompt read for each of its responses, for passes that no cache can take part in."""

    may_share = False


def _needs_mask(body: nn.Module | FusedLlama, masks: AttentionMasks, length: int) -> bool:
    """Whether a body has to be told what modules find out by themselves: that they see a window only."""
    return isinstance(body, FusedLlama) and masks.limited(length)


def _causal(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What tokens of rows ``[R, W]`` see if each row is one sequence, and where they stand."""
    width = ids.shape[1]
    places = torch.arange(width, device=ids.device)[None]
    return torch.ones(1, width, width, dtype=torch.bool, device=ids.device).tril(), places, places


class PaddedLayout:
    """One sequence a row, padded on the right.

    There is no mask: neither causal attention nor a recurrent state sees what comes later, and positions count from 0.

    Args:
        sequences: ``B`` of them, ``m`` tokens of the policy's together.

    Attributes:
        ids: int64 ``[B, L]``.
        keep: Of how many columns, counted from the right, logits are needed.
        actions: The policy's tokens, int64 ``[m]``.
    """

    def __init__(self, sequences: Sequences) -> None:
        ids, rows = sequences.right_padded(), sequences.rows
        width = ids.shape[1]
        column = sequences.policy - sequences.starts[rows] - 1  # of what predicts each of the policy's tokens
        self.keep = int(width - column.min(initial=width - 1))
        states = rows * self.keep + column - (width - self.keep)
        self.ids, self._states, self.actions = move([ids, states, sequences.actions], sequences.device)

    def take(self, outputs: Tensor) -> Tensor:
        """Of outputs ``[B, L or keep, ...]``, those that predict the policy's tokens, ``[m, ...]``."""
        return outputs[:, -self.keep :].flatten(0, 1).index_select(0, self._states)


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
    return _LinearLogProbs.apply(hidden, *_of_actions(head, vocab_size), actions)


def linear_squared_probabilities(hidden: Tensor, head: nn.Linear, vocab_size: int) -> Tensor:
    """``sum_a p_a^2`` under ``softmax(head(hidden))``, float32 ``[n]``, a few rows of logits at a time."""
    weight, bias = _of_actions(head, vocab_size)
    squares = hidden.new_empty(len(hidden), dtype=torch.promote_types(weight.dtype, torch.float32))
    for rows, logits in _logits(hidden, weight, bias):
        squares[rows] = logits.softmax(-1).square_().sum(-1)
    return squares


def _of_actions(head: nn.Linear, vocab_size: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the logits that are actions, the first ``vocab_size``."""
    weight, bias = head.weight, head.bias
    if len(weight) > vocab_size:
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    return weight, bias


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
    size = max(1, min(len(hidden), CHUNK_LOGITS // len(weight)))
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
