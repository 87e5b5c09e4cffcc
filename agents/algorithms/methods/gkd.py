"""GKD: a student writes, and a teacher says what it should have written (Agarwal et al. 2024, arXiv 2306.13649).

    minimise  lmbda E_{y ~ S} [ mean_t D_t ] + (1 - lmbda) E_{y ~ data} [ mean_t D_t ]
    with      D_t = beta KL(T || M) + (1 - beta) KL(S || M),    M = beta T + (1 - beta) S

of the next token after ``x, y_<t``, by the teacher ``T`` and the student ``S``.

"On-Policy Distillation of Language Models". ``beta = 0`` is ``KL(T || S)``, ``beta = 1`` is ``KL(S || T)``. Divergences
are of the whole vocabulary, and no gradient goes through what was sampled, as in the paper. The mean is over all tokens
of a step. Left out: answers that the teacher writes, and a reward beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.base import Agent
from agents.distillation.demonstrations import Demonstrations
from agents.distillation.teachers import load_teacher
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout
from reward_models.warning import warn
from textrl_env.errors import ArgumentError, check_range
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.divergence import compare


class GKD(Agent):
    """Distillation from a teacher on the student's own answers (Agarwal et al. 2024, arXiv 2306.13649).

    The environment gives the prompts; its rewards are logged and teach nothing.

    Args:
        teacher: Folder or hub id of a language model with the student's vocabulary, or a
            :class:`~textrl_env.lm.causal_lm.CausalLM`.
        beta: 0 is ``KL(teacher || student)``, 1 is ``KL(student || teacher)``, in between a Jensen-Shannon divergence.
        lmbda: Probability that a rollout is the student's own; else it is drawn from ``data``. TRL's default is 0.5.
        data: Demonstrations {"prompt", "completion"} or conversations {"messages"}: a list, or a file of them.
        *args, **kwargs: See :class:`~agents.base.Agent`; the environment is one of texts.

    Raises:
        ValueError: There is no teacher, its vocabulary is another one, the policy has no language model, or ``lmbda``
            is below 1 and there is no data.
    """

    whole_episodes = True
    keeps_unscored = True
    takes_no = dict.fromkeys(
        ("critic", "gae_lambda", "vf_coef", "gamma", "gamma_turn", "group_size", "ent_coef", "n_steps"),
        "it learns from a teacher and not from rewards",
    )

    def __init__(
        self,
        *args: Any,
        teacher: str | CausalLM | None = None,
        beta: float = 0.5,
        lmbda: float = 1.0,
        data: str | list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        check_range(0, 1, beta=beta, lmbda=lmbda)
        if lmbda < 1 and data is None:
            raise ArgumentError(f"lmbda={lmbda} takes some rollouts from demonstrations: pass data=...")
        if data is not None and lmbda == 1:
            warn(
                "lmbda=1 learns from the student's own answers alone: data is given and nothing learns from it"
            )
        self.teacher, self.data = self.keep_path("teacher", teacher), self.keep_path("data", data)
        self.beta, self.lmbda = beta, lmbda
        super().__init__(*args, **kwargs)

    def set_up_policy(self, spaces: Any = None) -> None:
        super().set_up_policy(spaces)
        if self.envs is None:  # loaded to predict only, it does without its teacher
            return
        teacher = load_teacher(self.teacher, self.policy, type(self).__name__)
        self.policy.compare = lambda student, rollout: compare(
            student, teacher, rollout.inputs["sequences"].to(student.device), self.beta
        )
        if self.lmbda < 1:
            longest = self.policy.observation_space["input_ids"].shape[0]
            self._demonstrations = Demonstrations(self.data, self.policy.lm, longest)

    def collect(self) -> Rollout:
        # One draw for a rollout, from the agent's own stream: every process makes the same.
        if self.lmbda == 1 or self.rng.random() < self.lmbda:
            return super().collect()
        rollout = self._demonstrations.rollout(self.n_episodes, self.rng)
        self.num_timesteps += int(rollout.mask.sum())
        return rollout

    def advantages(self, rollout: Rollout) -> Tensor:
        return torch.zeros(rollout.mask.shape, dtype=torch.float64)

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        return new.divergence, {"divergence": new.divergence, "log_prob": new.log_probs}
