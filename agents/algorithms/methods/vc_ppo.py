"""VC-PPO: PPO whose critic is fit to judge long answers (Yuan et al. 2025, arXiv 2503.01491).

    A_t   generalised advantage estimate with lambda 0.95
    V(s)  learns the return itself, lambda 1, and alone at first, while the policy waits

With one lambda below 1 for both, what a reward at the end of a long answer tells its first tokens fades twice: in the
advantage, where it lowers the variance, and in what the critic learns, where it leaves a bias. All are arguments of
:class:`~agents.algorithms.ppo.PPO`, with other defaults. Left out: the paper's separate file of values to start from;
the critic learns from rollouts of this run, as many as VAPO's experiments have for it.
"""

from agents.algorithms.ppo import PPO


class VCPPO(PPO):
    """PPO with a lambda of 1 for its critic, which learns alone before the policy does (arXiv 2503.01491)."""

    defaults = {"gae_lambda": 0.95, "critic_gae_lambda": 1.0, "critic_warmup": 50}
