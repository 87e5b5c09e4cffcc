"""The losses of DPO and its family, as pure functions of the log-probabilities of whole completions.

Every function takes tensors ``[B]``, one entry for each pair (or, for KTO, each completion), and returns the losses
``[B]``; their mean is what is minimised. A log-probability is the sum over the completion's tokens, its end token
included; lengths count the same tokens. ``ref_*`` are those of the frozen reference. Nothing here knows what a model
or an optimiser is.

The definitions are those of TRL 1.16, where the papers leave a choice open. Left out: losses for more than two
ranked completions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """``-log sigmoid(beta (Delta_w - Delta_l))``, ``Delta = log pi / pi_ref`` (Rafailov et al. 2023, eq. 7).

    Args:
        chosen: ``log pi(y_w | x)``, ``[B]``.
        rejected: ``log pi(y_l | x)``, ``[B]``.
        ref_chosen: The same under the reference.
        ref_rejected: The same under the reference.
        beta: Weight of the KL in the objective whose optimum this loss looks for.
        label_smoothing: The share of labels taken to be flipped, in [0, 0.5) (Mitchell 2023, "conservative DPO").
        chosen_lengths: With both lengths, every ``Delta`` is divided by its length: length-normalised DPO
            (Lambert et al. 2024, Tulu 3, eq. 6), which wants a larger ``beta`` (Tulu 3 used 5).
        rejected_lengths: See ``chosen_lengths``.

    Returns:
        Losses ``[B]``.
    """
    _check_smoothing(label_smoothing)
    gap = _gap(chosen - ref_chosen, rejected - ref_rejected, chosen_lengths, rejected_lengths)
    return _smoothed_logistic(beta * gap, label_smoothing)


def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """``(Delta_w - Delta_l - 1 / (2 beta))^2`` (Azar et al. 2023, eq. 17; their tau is ``beta``).

    Args:
        chosen: ``log pi(y_w | x)``, ``[B]``.
        rejected: ``log pi(y_l | x)``, ``[B]``.
        ref_chosen: The same under the reference.
        ref_rejected: The same under the reference.
        beta: Regularisation; the gap is pulled to ``1 / (2 beta)`` and not past it.
        chosen_lengths: With both lengths, every ``Delta`` is a mean over tokens, as the authors ran it and TRL does.
        rejected_lengths: See ``chosen_lengths``.

    Returns:
        Losses ``[B]``.
    """
    gap = _gap(chosen - ref_chosen, rejected - ref_rejected, chosen_lengths, rejected_lengths)
    return (gap - 1 / (2 * beta)) ** 2


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``-log sigmoid(beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma)`` (Meng et al. 2024, eq. 6).

    Args:
        chosen: ``log pi(y_w | x)``, ``[B]``.
        rejected: ``log pi(y_l | x)``, ``[B]``.
        chosen_lengths: Tokens of each chosen completion.
        rejected_lengths: Tokens of each rejected completion.
        beta: Scale of the reward; the paper used 2 to 2.5.
        gamma: The margin by which the chosen one should win.
        label_smoothing: The share of labels taken to be flipped.

    Returns:
        Losses ``[B]``. There is no reference.
    """
    _check_smoothing(label_smoothing)
    gap = _gap(chosen, rejected, chosen_lengths, rejected_lengths)
    return _smoothed_logistic(beta * gap - gamma, label_smoothing)


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    labels: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``w (1 - sigmoid(beta (Delta - z)))`` where desirable, ``w (1 - sigmoid(beta (z - Delta)))`` where not.

    Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 8), from single completions judged good or bad.

    Args:
        log_probs: ``log pi(y | x)``, ``[B]``.
        ref_log_probs: The same under the reference.
        labels: bool ``[B]``, true where the completion is desirable.
        kl: The baseline ``z``, from :func:`kto_kl`; no gradient flows into it.
        beta: How fast the value saturates.
        desirable_weight: The paper's ``lambda_D``. With unequal numbers of the two kinds, choose the weights so that
            ``lambda_D n_D / (lambda_U n_U)`` lies between 1 and 4/3.
        undesirable_weight: The paper's ``lambda_U``.

    Returns:
        Losses ``[B]``.
    """
    _check_shapes(log_probs, ref_log_probs, labels)
    advantage = beta * (log_probs - ref_log_probs - torch.as_tensor(kl).detach())
    sign = torch.where(labels, 1.0, -1.0)
    weights = torch.where(labels, desirable_weight, undesirable_weight)
    return weights * (1 - torch.sigmoid(sign * advantage))


def kto_kl(mismatched: Tensor, ref_mismatched: Tensor) -> Tensor:
    """KTO's estimate of the KL from the reference: the mean of ``log pi/pi_ref`` on mismatched pairs, at least 0.

    Args:
        mismatched: ``log pi(y' | x)`` of completions put to other prompts than their own, ``[B]``.
        ref_mismatched: The same under the reference.

    Returns:
        A scalar, without gradient. It is of a whole batch: take all of the batch, however the batch is cut up.
    """
    _check_shapes(mismatched, ref_mismatched)
    return (mismatched - ref_mismatched).mean().clamp(min=0).detach()


def _gap(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None
) -> Tensor:
    """``chosen - rejected``, each divided by its length if lengths are given, ``[B]``."""
    _check_shapes(chosen, rejected)
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("give the lengths of both completions, or of neither")
    if chosen_lengths is None:
        return chosen - rejected
    _check_shapes(chosen, chosen_lengths, rejected_lengths)
    return chosen / chosen_lengths.clamp(min=1) - rejected / rejected_lengths.clamp(min=1)


def _smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    loss = -F.logsigmoid(logits) * (1 - label_smoothing)
    return loss - F.logsigmoid(-logits) * label_smoothing if label_smoothing else loss


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")


def _check_shapes(*tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"expected tensors [B] of one length, got the shapes {shapes}")
