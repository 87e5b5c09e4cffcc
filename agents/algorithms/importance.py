"""Importance weights for responses that another distribution wrote than the policy's.

    grad E_pi[R] = E_q[ pi(y) / q(y) R grad log pi(y) ],   y ~ q, the generator's distribution

Truncated importance sampling (TIS) bounds the ratio, masked importance sampling (MIS) leaves out what is beyond the
bounds (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; Liu et al. 2025,
"When speed kills stability"). Only the ratio of the whole response is unbiased, as its cap grows; that of each token
forgets how likely the response was up to there and what comes after, and varies less. Which costs what is measured in
docs/gradients.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from textrl_env.errors import check_choice

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
#: A token's ratio exceeds this with a probability of at most one over it, whatever the two distributions (Markov's
#: inequality: a ratio is 1 on average where it is that of the distribution drawn from).
_IMPROBABLE = 4.0


def importance_weights(
    log_ratio: Tensor, mask: Tensor, mode: str, clip_max: float | None, clip_min: float | None = None
) -> Tensor:
    """What each step's loss is multiplied by.

    Args:
        log_ratio: ``log pi - log q`` of what was done, ``[B, T]``.
        mask: bool ``[B, T]``.
        mode: "token_truncate" and "token_mask" take each token's ratio, "sequence_truncate" and "sequence_mask" that of
            all tokens of the row together; to truncate is to clip, to mask is to put 0 for what is out of bounds.
        clip_max: Upper bound; None is none.
        clip_min: Lower bound; None is none.

    Returns:
        ``[B, T]`` in the dtype of ``log_ratio``, 1 outside the mask for tokens.
    """
    check_choice("mode", mode, MODES)
    level, _, bounded = mode.partition("_")
    log_ratio = torch.where(mask, log_ratio, 0.0)
    exact = log_ratio if log_ratio.device.type == "mps" else log_ratio.double()
    ratio = (exact.sum(1, keepdim=True) if level == "sequence" else exact).exp()
    if bounded == "truncate":
        if clip_max is not None or clip_min is not None:
            ratio = ratio.clamp(clip_min, clip_max)
    else:
        low = 0.0 if clip_min is None else clip_min
        high = torch.inf if clip_max is None else clip_max
        ratio = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    return ratio.to(log_ratio.dtype).expand_as(log_ratio)


def implausible(log_ratio: Tensor, mask: Tensor) -> bool:
    """Whether reported log-probabilities cannot be those of the distribution that was drawn from.

    Then a ratio is above 4 for no more than one token in four, up to chance; more of them mean that something else was
    reported.

    Args:
        log_ratio: As for :func:`importance_weights`.
        mask: bool ``[B, T]``.
    """
    count = int(mask.sum())
    share = float((log_ratio.exp() > _IMPROBABLE)[mask].double().mean()) if count else 0.0
    bound = 1 / _IMPROBABLE
    return share > bound + 3 * (bound * (1 - bound) / max(count, 1)) ** 0.5


def describe_sampling(
    log_ratio: Tensor, mask: Tensor, mode: str | None, weights: Tensor
) -> dict[str, tuple[float, Callable]]:
    """What is logged of the distance between generator and policy, by TRL's names.

    Returns:
        Name to the number and how several rollouts' are put together.
    """

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    difference = log_ratio[mask].abs()
    seen = weights[:, 0] if (mode or "").startswith("sequence") else weights[mask]
    prefix, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    found: dict[str, tuple[float, Callable]] = {
        f"{prefix}/mean": (float(difference.mean()), mean),
        f"{prefix}/max": (float(difference.max()), max),
        f"{ratio}/min": (float(seen.min()), min),
        f"{ratio}/mean": (float(seen.mean()), mean),
        f"{ratio}/max": (float(seen.max()), max),
    }
    if (mode or "").endswith("mask"):
        found["sampling/masked_share"] = (float((seen == 0).double().mean()), mean)
    return found
