"""How far a model's next tokens are from a teacher's, over the whole vocabulary, with gradient.

The logits of both are made a few rows at a time, and again in the backward pass, so memory grows with the tokens and
not with tokens times vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.teacher_forcing import CHUNK_LOGITS


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """``beta KL(T || M) + (1 - beta) KL(S || M)`` with ``M = beta T + (1 - beta) S`` (Agarwal et al. 2024, eq. 1).

    It means ``KL(T || S)`` at ``beta = 0`` and ``KL(S || T)`` at ``beta = 1``, the limits of the whole divided by
    ``beta`` and by ``1 - beta``.

    Args:
        student: Logits, ``[n, V]``.
        teacher: Logits, ``[n, V]``.
        beta: In [0, 1].

    Returns:
        In nats, ``[n]``.
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0.0:
        return _kl(log_t, log_s)
    if beta == 1.0:
        return _kl(log_s, log_t)
    share = torch.tensor(beta, dtype=log_s.dtype, device=log_s.device)
    mixture = torch.logaddexp(log_s + torch.log1p(-share), log_t + share.log())
    return beta * _kl(log_t, mixture) + (1 - beta) * _kl(log_s, mixture)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def compare(
    student: CausalLM,
    teacher: CausalLM,
    sequences: Sequences,
    beta: float,
    shown: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a student says of its tokens, and how far it is from a teacher where it wrote each.

    Args:
        student: Its weights get the gradient.
        teacher: Gets none.
        sequences: With ``m`` tokens written by the policy.
        beta: See :func:`generalized_jsd`.
        shown: What the teacher reads in their place, with the same tokens written by the policy; None is the same.

    Returns:
        log_probs, entropies and the divergence, all with gradient and float32 ``[m]``.
    """
    own = student.policy_logits(sequences)
    with torch.no_grad():
        others = teacher.policy_logits(sequences if shown is None else shown)
    layout = student.layout(sequences)
    actions = torch.from_numpy(sequences.actions).to(student.device) if layout is None else layout.actions

    def look(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        logits = own(rows)
        with torch.no_grad():
            target = others(rows)
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        chosen = log_probs.gather(-1, actions[rows, None]).squeeze(-1)
        return chosen, entropy, generalized_jsd(logits, target, beta)

    size = max(1, CHUNK_LOGITS // student.vocab_size)
    parts: list[Any] = [
        checkpoint(look, slice(start, start + size), use_reentrant=False)
        for start in range(0, len(actions), size)
    ]
    log_probs, entropies, divergences = (torch.cat(each) for each in zip(*parts, strict=True))
    return log_probs, entropies, divergences
