"""The equations, as pure functions over ``[B, T]`` arrays with a mask.

``B`` episodes (or segments of them), ``T`` steps; ``mask`` is true where the policy acted. Nothing here knows
what an environment, a policy or an optimiser is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textrl_env.errors import ArgumentError, check_choice, is_finite

#: Units in the last place by which equal numbers may differ that were added up in another order.
_ROUNDING = 4


def reward_to_go(
    rewards: np.ndarray, mask: np.ndarray, done: np.ndarray, gamma: float | np.ndarray
) -> np.ndarray:
    """``G_t = sum_k gamma^k r_{t+k}`` within each episode (Sutton and Barto, eq. 3.8).

    Args:
        rewards: ``[B, T]``.
        mask: bool ``[B, T]``; steps outside it neither earn nor discount.
        done: bool ``[B, T]``, true on the last step of an episode.
        gamma: Discount, or one from each step to the next, ``[B, T]``.

    Returns:
        ``[B, T]``, 0 outside the mask.
    """
    zeros = np.zeros_like(rewards)
    return gae(rewards, zeros, zeros, mask, done, gamma, 1.0)


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    mask: np.ndarray,
    done: np.ndarray,
    gamma: float | np.ndarray,
    gae_lambda: float | np.ndarray,
) -> np.ndarray:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16), masked steps skipped.

    ``delta_t = r_t + gamma V(s_{t+1}) - V(s_t)``, ``A_t = delta_t + gamma lambda A_{t+1}``.

    Args:
        rewards: ``[B, T]``.
        values: ``V(s_t)``, ``[B, T]``.
        next_values: ``V(s_{t+1})``, ``[B, T]``: 0 after a termination, the value of the final observation
            after a truncation; see :func:`shift_values`.
        mask: bool ``[B, T]``.
        done: bool ``[B, T]``, true on the last step of an episode: nothing flows back across it.
        gamma: Discount, or one from each step to the next, ``[B, T]``.
        gae_lambda: 0 gives ``delta_t``, 1 gives ``G_t - V(s_t)``; one for all, or one for each row, ``[B, 1]``.

    Returns:
        ``[B, T]``, 0 outside the mask.
    """
    for name, array in (("values", values), ("next_values", next_values), ("mask", mask), ("done", done)):
        assert array.shape == rewards.shape, f"{name} {array.shape} does not match rewards {rewards.shape}"
    delta = (rewards + gamma * next_values - values) * mask
    # Across a masked step the estimate is carried unchanged; across the end of an episode not at all.
    decay = np.where(mask, gamma * gae_lambda, 1.0) * ~(done & mask)
    advantages = np.zeros_like(delta)
    carry = np.zeros(len(delta), dtype=delta.dtype)
    for t in range(delta.shape[1] - 1, -1, -1):
        carry = delta[:, t] + decay[:, t] * carry
        advantages[:, t] = carry
    return advantages * mask


def shift_values(
    values: np.ndarray, last_values: np.ndarray, mask: np.ndarray, terminated: np.ndarray
) -> np.ndarray:
    """``V(s_{t+1})`` from ``V(s_t)``: the value at the next step of the mask, 0 after a termination.

    Args:
        values: ``[B, T]``.
        last_values: ``[B]``, the value after the last step (0 if it terminated).
        mask: bool ``[B, T]``.
        terminated: bool ``[B, T]``.
    """
    if mask.all():
        following = np.concatenate([values[:, 1:], last_values[:, None]], axis=1)
        return following * ~terminated
    following = np.zeros_like(values)
    upcoming = last_values.astype(values.dtype)
    for t in range(values.shape[1] - 1, -1, -1):
        following[:, t] = upcoming
        upcoming = np.where(mask[:, t], values[:, t], upcoming)
    return following * ~terminated


def turn_discounts(turn: np.ndarray, gamma: float, gamma_turn: float) -> np.ndarray:
    """Discounts from each step to the next: ``gamma``, and ``gamma_turn`` besides where a turn ends in between.

    Args:
        turn: Which turn a step belongs to, int ``[B, T]``.
        gamma: Of a step.
        gamma_turn: Of a turn.

    Returns:
        float64 ``[B, T]``.
    """
    ends = np.zeros(turn.shape, dtype=bool)
    ends[:, :-1] = turn[:, 1:] > turn[:, :-1]
    return np.where(ends, gamma * gamma_turn, gamma)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the true entries of ``mask``; 0 if there are none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Unit variance (unbiased) and, unless told otherwise, zero mean over the mask; 0 outside it.

    A single entry, or equal entries, give zeros (or are left as they are without a shift), never NaN.
    """
    count = mask.sum()
    low, high = (x.masked_fill(~mask, sign * torch.inf) for sign in (1, -1))
    spread, size = high.max() - low.min(), (x * mask).abs().max()
    flat = (count < 2) | (spread <= _ROUNDING * torch.finfo(x.dtype).eps * size)
    exact = _double(x)
    mean = masked_mean(exact, mask)
    std = (((exact - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)).sqrt()
    scaled = (exact - mean) / (std + 1e-8)
    unscaled, scaled = (torch.zeros_like(exact), scaled) if shift_mean else (exact, scaled + mean)
    # Chosen without looking, for which a GPU would have to be waited for.
    return (torch.where(flat, unscaled, scaled) * mask).to(x.dtype)


def all_equal(x: Tensor, dim: int = -1, magnitude: Tensor | None = None) -> Tensor:
    """Whether the numbers along a dimension are equal, up to the rounding of their own precision.

    Equal numbers that have been added up in another order differ by a few units in the last place. Dividing that by
    itself would make noise look like signal; a wider tolerance would take signal for noise: of rewards around a
    million, float32 still tells halves apart.

    Args:
        x: The numbers.
        dim: The dimension.
        magnitude: How large the numbers were that those in ``x`` are sums and differences of, of the same shape, where
            they were larger: they say how large the rounding is.
    """
    size = x if magnitude is None else magnitude
    tolerance = _ROUNDING * torch.finfo(x.dtype).eps * size.abs().amax(dim)
    return x.amax(dim) - x.amin(dim) <= tolerance


def _double(x: Tensor) -> Tensor:
    """In float64, where the device has it: a mean of large float32 numbers would eat their differences."""
    return x if x.device.type == "mps" else x.double()


def group_advantages(
    scores: Tensor, group_size: int, scale: str = "std", counted: Tensor | None = None
) -> Tensor:
    """GRPO: how much better than the other answers to the same prompt (Shao et al. 2024, section 4.1.2).

    Args:
        scores: ``[B]``, the ``group_size`` answers to a prompt being neighbours.
        group_size: ``G``; ``B`` is a multiple of it.
        scale: "std" divides by the group's standard deviation, "none" does not (Liu et al. 2025, Dr. GRPO), "batch"
            divides by that of all scores (TRL's ``scale_rewards="batch"``), "leave-one-out" is RLOO's ``r_i - mean of
            the others`` (Ahmadian et al. 2024).
        counted: bool ``[B]``, the answers that have a score; the others get 0 and belong to no mean. None is all.

    Returns:
        ``[B]``; a group of equal scores, or of one, gives zeros.
    """
    check_choice("scale", scale, ("std", "none", "batch", "leave-one-out"))
    if len(scores) % group_size:
        raise ValueError(f"{len(scores)} episodes cannot be split into groups of {group_size}")
    if group_size == 1:
        return torch.zeros_like(scores)
    groups = _double(scores.view(-1, group_size))  # [B / G, G]
    if counted is None:
        number, others = group_size, group_size - 1
        mean, deviation = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    else:
        groups = fill_with_group_mean(groups, counted.view(-1, group_size))
        number = counted.view(-1, group_size).sum(1, keepdim=True)
        others = (number - 1).clamp(min=1)
        mean = groups.mean(1, keepdim=True)
        deviation = ((groups - mean).square().sum(1, keepdim=True) / others).sqrt()
    centred = groups - mean
    if counted is not None:
        centred = centred * counted.view(-1, group_size)
    if scale == "leave-one-out":
        centred = centred * (number / others)
    elif scale == "std":
        centred = centred / (deviation + 1e-4)
    elif scale == "batch":
        own = _double(scores) if counted is None else _double(scores)[counted]
        centred = centred / (own.std() + 1e-4) if len(own) > 1 else centred
    flat = all_equal(groups.to(scores.dtype))
    return centred.masked_fill(flat[:, None], 0.0).reshape(-1).to(scores.dtype)


def best_of_k_gains(groups: Tensor, k: int) -> Tensor:
    """What each of ``G`` scores adds to the best of ``k`` (Walder and Karkhanis 2025, the k - 1 others as baseline).

    ``1/C(G, k) sum over I with i in I, |I| = k of (max_I r - max_{I without i} r)``. Only sets in which ``i`` is the
    best count. Let ``j`` be their second best: with ``m`` scores below it there are ``C(m, k - 2)`` such sets.

    Args:
        groups: ``[P, G]``.
        k: At least 2, at most ``G``.

    Returns:
        ``[P, G]``, never negative.
    """
    size = groups.shape[1]
    if not 2 <= k <= size:
        raise ValueError(f"k must be between 2 and the {size} scores of a group, got {k}")
    ordered, order = _double(groups).sort(1)
    sets = ordered.new_tensor([math.comb(m, k - 2) / math.comb(size, k) for m in range(size - 1)])
    gains = torch.zeros_like(ordered)
    gains[:, 1:] = ordered[:, 1:] * sets.cumsum(0) - (ordered[:, :-1] * sets).cumsum(1)
    return torch.zeros_like(gains).scatter(1, order, gains).clamp(min=0.0).to(groups.dtype)


def fill_with_group_mean(groups: Tensor, counted: Tensor) -> Tensor:
    """Values ``[B / G, G]`` with the mean of the counted ones of their group in place of those that are not.

    Neither a group's mean nor whether its values are equal changes by that; 0 in a group of which none counts.
    """
    total = (groups * counted).sum(1, keepdim=True)
    return torch.where(counted, groups, total / counted.sum(1, keepdim=True).clamp(min=1))


def turn_advantages(
    rewards: Tensor,
    mask: Tensor,
    turn: Tensor,
    state: Tensor,
    group: Tensor,
    gamma: float,
    scale: str = "std",
) -> tuple[Tensor, float]:
    """How much better than other turns that answer the same state in the same group (Feng et al. 2025).

    Args:
        rewards: ``[B, T]``.
        mask: bool ``[B, T]``.
        turn: Which turn of its episode a step belongs to, from 0, int64 ``[B, T]``.
        state: A number for what the turn answers, int64 ``[B, T]``.
        group: int64 ``[B]``.
        gamma: Discount from turn to turn.
        scale: As of :func:`group_advantages`.

    Returns:
        ``[B, T]``, the same on every step of a turn, 0 outside the mask; and the share of turns whose state others
        answer too.
    """
    rows, steps = mask.nonzero(as_tuple=True)
    at = (rows, turn[rows, steps])
    count = int(at[1].max()) + 1 if len(rows) else 1
    returns = rewards.new_zeros(len(rewards), count).index_put(at, rewards[rows, steps], accumulate=True)
    states = state.new_zeros(len(rewards), count).index_put(at, state[rows, steps])
    had = mask.new_zeros(len(rewards), count).index_put(at, mask[rows, steps])
    for k in range(count - 2, -1, -1):
        returns[:, k] += gamma * returns[:, k + 1]
    places: dict[tuple[int, int], list[int]] = {}
    keys = zip(group.repeat_interleave(count).tolist(), states.flatten().tolist(), strict=True)
    for i, (key, there) in enumerate(zip(keys, had.flatten().tolist(), strict=True)):
        if there:
            places.setdefault(key, []).append(i)
    shared = [turns for turns in places.values() if len(turns) > 1]
    flat, relative = returns.flatten(), torch.zeros_like(returns).flatten()
    for turns in shared:
        relative[turns] = group_advantages(flat[turns], len(turns), scale)
    share = sum(map(len, shared)) / max(int(had.sum()), 1)
    return relative.view_as(returns).gather(1, turn * mask) * mask, share


def ppo_clip_loss(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """``-min(rho A, clip(rho, 1 - low, 1 + high) A)`` for each step (Schulman et al. 2017, eq. 7).

    ``clip_high`` other than ``clip_low`` is DAPO's clip-higher (Yu et al. 2025). ``delta > 1 + clip_high`` bounds the
    first ratio, ``min(rho, delta) A``: without it nothing does where ``A < 0`` (INTELLECT-2, arXiv 2505.07291).
    """
    clip_high = clip_low if clip_high is None else clip_high
    surrogate = (ratio if delta is None else ratio.clamp(max=delta)) * advantages
    # A clipped ratio has no gradient, and one within the range is no smaller than the surrogate.
    clipped = (ratio.clamp(1 - clip_low, 1 + clip_high) * advantages).detach()
    return -torch.where(surrogate <= clipped, surrogate, clipped)


def fitting_responses(advantages: Tensor, log_ratio: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Which steps count where bad responses that have drifted are left out (DeepSeek-V3.2, arXiv 2512.02556, eq. 9).

    Args:
        advantages: ``[B, T]``.
        log_ratio: ``log pi_old - log pi``, ``[B, T]``.
        mask: bool ``[B, T]``.
        threshold: The most that the mean of ``log_ratio`` over a response may be where the advantage is below 0.

    Returns:
        bool ``[B, T]``.
    """
    return (advantages >= 0) | (mean_over_steps(log_ratio, mask) <= threshold)


def mean_over_steps(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row over its mask, at every step of it, ``[B, T]``; 0 for a row without any."""
    x = torch.where(mask, x, 0.0)
    return (x.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(x)


def token_covariances(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """``(log pi - mean log pi) (A - mean A)``, means over the mask (Cui et al. 2025, arXiv 2505.22617)."""
    return (log_probs - masked_mean(log_probs, mask)) * (advantages - masked_mean(advantages, mask))


def check_share(name: str, share: float) -> None:
    """Raise an ArgumentError unless ``share`` is in (0, 1]."""
    if not (is_finite(share) and 0 < share <= 1):
        raise ArgumentError(f"{name} is a share of tokens, above 0 and at most 1, got {share!r}")


def largest(x: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest entries of ``x``."""
    found = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    found[x.flatten().topk(min(count, x.numel())).indices] = True
    return found.view_as(x)


def top_share(x: Tensor, mask: Tensor, share: float, count: int) -> Tensor:
    """True where ``x`` reaches its ``1 - share`` quantile over the mask, which is interpolated as torch does.

    Args:
        x: ``[B, T]``.
        mask: bool ``[B, T]``.
        share: In [0, 1]; 0 keeps the largest alone.
        count: How many entries the mask has, which a GPU would have to be waited for.
    """
    if count == 0:
        return torch.zeros_like(mask)
    falling = x.float().masked_fill(~mask, -torch.inf).flatten().sort(descending=True).values
    place = (1 - share) * (count - 1)
    low = int(place)
    below, above = falling[count - 1 - low], falling[max(count - 2 - low, 0)]
    return mask & (x >= below + (above - below) * (place - low))


def clip_fraction(ratio: Tensor, clip_low: float, clip_high: float | None = None) -> Tensor:
    """1 where the ratio has left the clip range, 0 elsewhere, for each step."""
    clip_high = clip_low if clip_high is None else clip_high
    return ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).float()


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor | None = None, clip_range: float | None = None
) -> Tensor:
    """``(V - R)^2`` for each step, optionally PPO2's pessimistic clip around the old values."""
    loss = F.mse_loss(values, returns, reduction="none")
    if clip_range is None:
        return loss
    assert old_values is not None, "clipping the value loss needs the old values"
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum(loss, (clipped - returns) ** 2)


def value_clip_fraction(values: Tensor, old_values: Tensor, clip_range: float | None) -> Tensor:
    """1 where the value has moved further than the clip of :func:`value_loss` allows, for each step."""
    if clip_range is None:
        return torch.zeros_like(values)
    return ((values - old_values).abs() > clip_range).float()


def kl_loss(log_probs: Tensor, ref_log_probs: Tensor, estimator: str, ratio: Tensor | None = None) -> Tensor:
    """The KL as a term of the loss, for each step (Schulman, Approximating KL divergence, 2020).

    A ``ratio`` (``pi / pi_old`` of each step, with gradient) corrects k3's bias (DeepSeek-V3.2, arXiv 2512.02556;
    TRL's default): on-policy the gradient is then that of each token's own KL, as k2's is.

    On-policy, k2 has the gradient of each token's own KL in expectation: that of a whole response's KL only
    where it has one token, because no loss on a token knows of the KL that it leads to later (k1 in the reward
    does). k3 is GRPO's choice and biased; k1 has a gradient of zero in expectation and is refused.
    """
    check_choice("estimator", estimator, ("k2", "k3"))
    log_ratio = log_probs - ref_log_probs
    if estimator == "k2":
        return 0.5 * log_ratio**2
    k3 = torch.expm1(-log_ratio) + log_ratio
    return k3 if ratio is None else k3 * ratio


#: f-divergences by the names of TRL's DPO.
F_DIVERGENCES = ("reverse_kl", "js_divergence", "alpha_divergence")
#: No exponent is larger.
_MAX_EXPONENT = 80.0


def f_divergence_slope(log_ratio: Tensor, divergence: str, alpha: float = 0.0) -> Tensor:
    """``f'(w)`` at ``w = pi(y) / pi_ref(y)``, what a response is to be charged for the gradient of an f-divergence.

    For ``D = sum_y pi_ref(y) f(w(y))`` the gradient is ``E_pi[f'(w) grad log pi(y)]`` (Go et al. 2023, arXiv
    2302.08215): ``log w`` (reverse KL, less a constant), ``log(2 w / (1 + w))`` (Jensen-Shannon) and ``(w^(alpha - 1) -
    1) / (alpha - 1)`` (Wang et al. 2023, arXiv 2309.16240, as TRL has it).

    Args:
        log_ratio: ``log w`` of whole responses, ``[B]``.
        divergence: One of :data:`F_DIVERGENCES`.
        alpha: Of the alpha-divergence; within 1e-6 of 1 it is the reverse KL.
    """
    check_choice("f_divergence_type", divergence, F_DIVERGENCES)
    if divergence == "js_divergence":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    if divergence == "reverse_kl" or abs(alpha - 1.0) < 1e-6:
        return log_ratio
    return torch.expm1(((alpha - 1.0) * log_ratio).clamp(max=_MAX_EXPONENT)) / (alpha - 1.0)


def approx_kl(ratio: Tensor) -> Tensor:
    """``(rho - 1) - log rho`` for each step: k3 of the update, never negative."""
    return ratio - 1 - ratio.log()


#: How the losses of steps are averaged, see :func:`loss_weights`.
AVERAGES = ("token", "sequence", "constant", "sum", "prompt")


def loss_weights(
    mask: Tensor, average: str, max_length: int | None = None, group: Tensor | None = None
) -> Tensor:
    """Weights ``[B, T]`` that turn a sum over steps into the mean that a method's paper takes.

    Computed on the whole batch, so a loss is the same however it is cut into micro-batches.

    Args:
        mask: bool ``[B, T]``.
        average: "token" (every step counts alike), "sequence" (every episode does; GRPO), "constant" (divide by
            ``B * max_length``; Dr. GRPO), "sum" (divide by ``B``; LUSPO), or "prompt" (every group, and in it every
            step; ScaleRL, arXiv 2510.13786).
        max_length: The constant length.
        group: int ``[B]``, in the host's memory, for "prompt"; None is one group.
    """
    check_choice("average", average, AVERAGES)
    weights = mask.float()
    if average == "sum":
        return weights / len(mask)
    if average == "prompt":
        own = torch.zeros(len(mask), dtype=torch.long) if group is None else group.cpu()
        names, place = own.unique(return_inverse=True)
        place = place.to(mask.device)
        steps = weights.new_zeros(len(names)).index_add(0, place, weights.sum(1))
        return weights / steps.clamp(min=1)[place][:, None] / len(names)
    if average == "token":
        return weights / weights.sum().clamp(min=1)
    if average == "sequence":
        return weights / weights.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return weights / (len(mask) * (max_length or mask.shape[1]))


def explained_variance(predicted: Tensor, target: Tensor, mask: Tensor) -> float:
    """``1 - Var[target - predicted] / Var[target]`` over the mask; NaN if the target does not vary."""
    residual, target = (target - predicted)[mask], target[mask]
    if len(target) < 2 or float(target.var()) == 0.0:
        return float("nan")
    return float(1 - residual.var() / target.var())
