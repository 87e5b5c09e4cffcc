"""LUSPO: GSPO with the loss of a response times its length (Liu et al. 2026, arXiv 2602.05261).

    maximise  1/G sum_i |y_i| min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)
    with      s_i = (pi(y_i | x) / pi_old(y_i | x))^(1 / |y_i|)

"Length-Unbiased Sequence Policy Optimization". GSPO's ``1 / |y|`` in the exponent makes a token of a long response
count for less, which teaches to be brief; the length takes it out again.
"""

from agents.algorithms.methods.gspo import GSPO


class LUSPO(GSPO):
    """GSPO without its bias to short responses: the tokens of a response are added up (arXiv 2602.05261)."""

    fixed = {"average": "sum"}
