"""SDPO: the policy that has seen a right answer teaches the one that has not (Hübotter et al. 2026, arXiv 2601.20802).

    minimise  sum_t KL( pi(. | x, y_<t) || sg pi(. | x, f, y_<t) ),    y ~ pi(. | x)

"Reinforcement Learning via Self-Distillation", the paper's loss, of the whole vocabulary, with a mean over the tokens
of an answer as in TRL's code. ``sg`` stops the gradient. The feedback ``f``, put into the prompt, is another answer to
it that was right, a text that comes with the prompt, or both; answers without any have a loss of 0. The teacher is the
policy as it is, or the reference, which with ``sync_ref_model`` averages past policies, the paper's regularised
teacher. Left out: the likeliest tokens alone in place of all (the losses of all are made a few rows at a time here).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import check_numbers
from agents.distillation.hints import Hints
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_choice, check_finite, check_range
from textrl_env.lm.divergence import compare


class SDPO(GRPO):
    """Distillation from oneself, shown a right answer of one's group or other feedback (arXiv 2601.20802).

    Args:
        distillation_weight: Of the distillation; one less this is that of GRPO's loss.
        success_threshold: An answer is right if its score, before the KL, is at least this.
        teacher: "policy" as it is, or the "reference" of the environment.
        feedback_column: A column of the prompts with a text that the teacher alone is shown; None is none.
        max_ratio: No distance counts for more than this because its token has become likelier since it was drawn.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    def __init__(
        self,
        *args: Any,
        distillation_weight: float = 1.0,
        success_threshold: float = 1.0,
        teacher: str = "policy",
        feedback_column: str | None = None,
        max_ratio: float = 2.0,
        **kwargs: Any,
    ) -> None:
        check_range(0, 1, distillation_weight=distillation_weight)
        check_finite(success_threshold=success_threshold)
        check_numbers(positive=True, max_ratio=max_ratio)
        check_choice("teacher", teacher, ("policy", "reference"))
        self.distillation_weight, self.success_threshold = distillation_weight, success_threshold
        self.teacher, self.feedback_column, self.max_ratio = teacher, feedback_column, max_ratio
        super().__init__(*args, **kwargs)

    def set_up_policy(self, spaces: Any = None) -> None:
        super().set_up_policy(spaces)
        if self.envs is not None:  # not loaded to predict only
            self._hints = Hints(self.envs if self.text_env is None else self.text_env, self.feedback_column)
            self.policy.compare = self._compare

    def _compare(self, student: Any, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        teacher = student if self.teacher == "policy" else self.text_env.reference
        sequences, shown = (rollout.inputs[name].to(student.device) for name in ("sequences", "shown"))
        return compare(student, teacher, sequences, 1.0, shown)

    def record_text_episodes(self, episodes: Any) -> None:
        super().record_text_episodes(episodes)
        self._episodes = episodes

    def collect(self) -> Rollout:
        rollout = super().collect()
        right = self.scores_before_kl(rollout) >= self.success_threshold
        right = (right if rollout.scored is None else right & rollout.scored.any(1)).view(-1, self.group_size)
        shown = self._hints.show(
            rollout.inputs["sequences"], self._episodes, right, self.policy.lm.max_length
        )
        rollout.inputs["shown"], rollout.chosen = shown.sequences, shown.hinted[:, None] & rollout.mask
        self.logger.record("distillation/taught", float(shown.hinted.float().mean()))
        self.logger.record("distillation/solved_groups", float(right.any(1).float().mean()))
        self.logger.record("distillation/too_long", shown.too_long / len(rollout))
        return rollout

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = super().loss(batch, new)
        # No gradient through what was sampled; what was drawn long ago counts by how likely it is now, as in TRL.
        ratio = (new.log_probs - batch.log_probs).detach().exp().clamp(max=self.max_ratio)
        distilled = ratio * new.divergence * batch.chosen
        weight = self.distillation_weight
        return (1 - weight) * losses + weight * distilled, metrics | {"divergence": distilled.detach()}
