"""VC-PPO: PPO whose critic is fit to judge long answers (Yuan et al. 2025, arXiv 2503.01491).

    A_t   generalised advantage estimate with lambda 0.95
    V(s)  learns the return itself, lambda 1, and alone at first, while the policy waits

With one lambda below 1 for both, what a reward at the end of a long answer tells its first tokens fades twice: in the
advantage, where it lowers the variance, and in what the critic learns, where it leaves a bias. Both settings are
:class:`~agents.algorithms.ppo.PPO`'s; these are the paper's values. Left out: the paper's separate file of values to
start from; the critic learns from rollouts of this run.
"""

from __future__ import annotations

from typing import Any

from agents.algorithms.ppo import PPO
from agents.algorithms.schedules import Schedule
from agents.policies.base import Policy


class VCPPO(PPO):
    """PPO with a lambda of 1 for its critic, which learns alone before the policy does.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        gae_lambda: Of the advantages.
        critic_gae_lambda: Of what the critic learns; 1 is the return.
        critic_warmup: First rollouts that only the critic learns from.
        **kwargs: See :class:`~agents.algorithms.ppo.PPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        gae_lambda: float = 0.95,
        critic_gae_lambda: float = 1.0,
        critic_warmup: int = 50,
        **kwargs: Any,
    ) -> None:
        lambdas = {"gae_lambda": gae_lambda, "critic_gae_lambda": critic_gae_lambda}
        super().__init__(policy, env, learning_rate, critic_warmup=critic_warmup, **lambdas, **kwargs)
