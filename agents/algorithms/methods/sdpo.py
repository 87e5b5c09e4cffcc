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

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout
from reward_models.data.encoding import TEMPLATE_COLUMNS
from textrl_env.errors import ArgumentError, check_choice
from textrl_env.lm.divergence import compare
from textrl_env.lm.sequences import Sequences

#: The prompt of the teacher, and what may come into it.
PROMPT_TEMPLATE = "{prompt}{solution}{feedback}\n\nNow give the right answer to the question above.\n"
SOLUTION_TEMPLATE = "\n\nA right answer:\n{solution}"
FEEDBACK_TEMPLATE = "\n\nAbout an answer that was wrong:\n{feedback}"


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
        if not 0 <= distillation_weight <= 1:
            raise ArgumentError(f"distillation_weight must be in [0, 1], got {distillation_weight}")
        check_choice("teacher", teacher, ("policy", "reference"))
        self.distillation_weight, self.success_threshold = distillation_weight, success_threshold
        self.teacher, self.feedback_column, self.max_ratio = teacher, feedback_column, max_ratio
        self._episodes: Any = None
        super().__init__(*args, **kwargs)

    def set_up_policy(self, spaces: Any = None) -> None:
        super().set_up_policy(spaces)
        if self.envs is None:  # loaded to predict only
            return
        prompts = getattr(getattr(self.text_env, "dynamics", None), "prompts", None)
        if prompts is None or not hasattr(self.policy, "compare"):
            raise ArgumentError(
                f"SDPO shows a language model its prompts once more, so it wants TextRLHF-v0 without a wrapper; got "
                f"{self.envs}"
            )
        if self.feedback_column is not None and self.feedback_column not in prompts.columns:
            raise ArgumentError(
                f"feedback_column={self.feedback_column!r} is no column of the prompts, which have "
                f"{sorted(prompts.columns)}"
            )
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
        longest = self.policy.lm.max_length or np.inf
        right = self.scores_before_kl(rollout) >= self.success_threshold
        right = (right if rollout.scored is None else right & rollout.scored.any(1)).view(-1, self.group_size)
        shown, taught, too_long = [], [], 0
        sequences = rollout.inputs["sequences"]
        for i, (own, response) in enumerate(zip(sequences.prompts, sequences.responses, strict=True)):
            group, place = divmod(i, self.group_size)
            others = [j for j in right[group].nonzero().flatten().tolist() if j != place]
            demonstration = group * self.group_size + others[0] if others else None
            prompt = self._with_hints(int(self._episodes.prompt_id[i]), demonstration)
            fits = prompt is not None and len(prompt) + len(response) <= longest
            too_long += prompt is not None and not fits
            taught.append(fits)
            shown.append(prompt if fits else own)
        rollout.inputs["shown"] = Sequences.from_responses(shown, sequences.responses)
        rollout.chosen = torch.tensor(taught)[:, None] & rollout.mask
        self.logger.record("distillation/taught", sum(taught) / len(taught))
        self.logger.record("distillation/solved_groups", float(right.any(1).float().mean()))
        self.logger.record("distillation/too_long", too_long / len(taught))
        return rollout

    def _with_hints(self, prompt_id: int, demonstration: int | None) -> list[int] | None:
        """The prompt that the teacher reads, as token ids; None where there is nothing to show."""
        dynamics = self.text_env.dynamics
        prompts = dynamics.prompts
        told = prompts.columns[self.feedback_column][prompt_id] if self.feedback_column else None
        solution = feedback = ""
        if demonstration is not None:
            solution = SOLUTION_TEMPLATE.format(solution=self._episodes.responses[demonstration].strip())
        if isinstance(told, str) and told.strip():
            feedback = FEEDBACK_TEMPLATE.format(feedback=told.strip())
        if not solution and not feedback:
            return None

        def hinted(text: str) -> str:
            return PROMPT_TEMPLATE.format(prompt=text, solution=solution, feedback=feedback)

        messages = None if prompts.messages is None else prompts.messages[prompt_id]
        if messages is None:
            return dynamics.encoder.prompt(hinted(prompts.texts[prompt_id]))
        asks = [
            i for i, m in enumerate(messages) if m["role"] == "user" and isinstance(m.get("content"), str)
        ]
        if not asks:
            raise ArgumentError(
                f"SDPO puts its hints into the user's last text, and prompt {prompt_id} has none"
            )
        last = asks[-1]
        asked = {**messages[last], "content": hinted(messages[last]["content"])}
        row = {
            name: values[prompt_id] for name, values in prompts.columns.items() if name in TEMPLATE_COLUMNS
        }
        return dynamics.encoder.prompt([*messages[:last], asked, *messages[last + 1 :]], row)

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = super().loss(batch, new)
        # No gradient through what was sampled; what was drawn long ago counts by how likely it is now, as in TRL.
        ratio = (new.log_probs - batch.log_probs).detach().exp().clamp(max=self.max_ratio)
        distilled = ratio * new.divergence * batch.chosen
        weight = self.distillation_weight
        return (1 - weight) * losses + weight * distilled, metrics | {"divergence": distilled.detach()}
