"""More losses of comparisons, by TRL's names: functions of both log-ratios ``log pi/pi_ref`` of a pair, ``[B] -> [B]``.

The definitions are those of TRL 1.16. Left out: ``aot`` and ``aot_unpaired``, which sort a whole batch and so could not
be worked through in parts, and ``sft``, which is :func:`agents.offline.sft.sft` on the chosen completions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Least share of flipped labels that "exo_pair" is defined for: its target must not be certain.
_EXO_EPSILON = 1e-3
#: How sharply "discopop" changes between its two parts (its paper's value).
_DISCOPOP_TAU = 0.05


def hinge(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """``max(0, 1 - beta (Delta_w - Delta_l))`` (Zhao et al. 2023, SLiC-HF)."""
    return torch.relu(1 - beta * (chosen - rejected))


def robust(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss made unbiased under labels of which a share is flipped (Chowdhury et al. 2024, eq. 14)."""
    gap, share = beta * (chosen - rejected), label_smoothing
    return (share * F.logsigmoid(-gap) - (1 - share) * F.logsigmoid(gap)) / (1 - 2 * share)


def exo_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The reverse KL from the policy's choice to the labels' (Ji et al. 2024, eq. 16)."""
    gap = beta * (chosen - rejected)
    share = gap.new_tensor(max(label_smoothing, _EXO_EPSILON))
    right = torch.sigmoid(gap) * (F.logsigmoid(gap) - torch.log1p(-share))
    return right + torch.sigmoid(-gap) * (F.logsigmoid(-gap) - torch.log(share))


def nca_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Noise contrastive alignment, which holds the chosen likelihood up (Chen et al. 2024)."""
    losses = -F.logsigmoid(beta * chosen)
    return losses - 0.5 * F.logsigmoid(-beta * chosen) - 0.5 * F.logsigmoid(-beta * rejected)


def bco_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """A classifier of either side, without its running shift (Jung et al. 2024)."""
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Self-play preference optimisation with a certain winner (Wu et al. 2024, eq. 4.7)."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Chosen up and rejected down, for data better than the model (D'Oosterlinck et al. 2024, eq. 7)."""
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Both down, the rejected one more, for data worse than the model (D'Oosterlinck et al. 2024, eq. 8)."""
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def discopop(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """A mixture of the logistic and the exponential loss, found by search (Lu et al. 2024, eq. 5)."""
    gap = beta * (chosen - rejected)
    share = torch.sigmoid(gap / _DISCOPOP_TAU)
    return -F.logsigmoid(gap) * (1 - share) + torch.exp(-gap) * share


#: ``loss(chosen, rejected, beta, label_smoothing)`` by name.
RATIO_LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    function.__name__: function
    for function in (hinge, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, discopop)
}
