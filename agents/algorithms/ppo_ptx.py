"""PPO-ptx: PPO with a share of supervised gradient in every step (Ouyang et al. 2022, section 3.5, arXiv 2203.02155).

    minimise  L_PPO + ptx_coef * mean over tokens of -log p(y_t | x, y_<t)

Reinforcement learning forgets what the reward does not pay for (InstructGPT's "alignment tax"); a batch of
demonstrations, or of pre-training text, in each gradient step keeps it alive. From the command line::

    textrl train --agent ppo-ptx --ptx-data demonstrations.jsonl --ptx-coef 0.5

InstructGPT used pre-training text and a coefficient of 27.8 on its own scale; here the loss is a mean over tokens, so
1 is already much. Left out: working through the demonstrations in micro-batches, and policies that are no language
models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.algorithms.ppo import PPO
from agents.algorithms.schedules import Schedule, check_numbers
from agents.distillation.demonstrations import Demonstrations
from agents.offline.sft import pad_batch, sft_loss
from agents.policies.base import Policy
from agents.rollouts.rollout import Rollout
from reward_models.warning import warn
from textrl_env.errors import check_range


class PPOptx(PPO):
    """PPO whose gradient steps also imitate demonstrations.

    Args:
        policy: "CausalLMPolicy", "auto" or a policy class with a language model.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        ptx_data: Demonstrations {"prompt", "completion"}, conversations {"messages"} or texts {"text"}: a list, or a
            .jsonl file of them.
        ptx_coef: Weight of the supervised loss; 0 is plain PPO, to the bit.
        ptx_batch_size: Records in each gradient step, drawn anew for each.
        **kwargs: See :class:`~agents.algorithms.ppo.PPO`.

    Raises:
        ValueError: The policy has no language model, or ``ptx_coef`` is not 0 and there is no data.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        *,
        ptx_data: str | Path | list[dict[str, Any]] | None = None,
        ptx_coef: float = 0.0,
        ptx_batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        check_numbers(ptx_coef=ptx_coef)
        check_range(1, ptx_batch_size=ptx_batch_size)
        if ptx_coef and ptx_data is None:
            raise ValueError(f"ptx_coef={ptx_coef} needs demonstrations to imitate: pass ptx_data=...")
        if ptx_data is not None and not ptx_coef:
            warn("ptx_coef=0 is plain PPO: ptx_data is given and nothing learns from it; pass a ptx_coef too")
        self.ptx_data = self.keep_path("ptx_data", ptx_data)
        self.ptx_coef, self.ptx_batch_size = ptx_coef, ptx_batch_size
        self._ptx_losses: list[Tensor] = []
        super().__init__(policy, env, learning_rate, **kwargs)

    def set_up_policy(self, spaces: Any = None) -> None:
        super().set_up_policy(spaces)
        if not hasattr(self.policy, "lm"):
            raise ValueError(
                f"PPOptx imitates text, and {type(self.policy).__name__} has no language model; use PPO here, or a "
                "text environment"
            )
        # Loaded to predict only, it does without its demonstrations.
        if self.ptx_coef and self.envs is not None:
            self._demonstrations = Demonstrations(self.ptx_data, self.policy.lm)

    def extra_loss(self) -> Tensor | None:
        if not self.ptx_coef:
            return None
        # Ouyang et al. 2022, equation 2, the term gamma E[log pi(x)]: minus the mean log-probability of a token.
        # Independent draws from the agent's own stream: nothing but its state is needed to resume.
        batch = pad_batch(self._demonstrations.draw(self.ptx_batch_size, self.rng), self.policy.lm.pad_id)
        ids, mask, labels = (tensor.to(self.device) for tensor in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.policy.autocast):
            logits = self.policy.lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = sft_loss(logits, labels)
        self._ptx_losses.append(loss.detach())
        return self.ptx_coef * loss

    def _log_training(self, rollout: Rollout, records: list[dict[str, float]], learning_rate: float) -> None:
        super()._log_training(rollout, records, learning_rate)
        if self._ptx_losses:
            self.logger.record("train/ptx_loss", float(torch.stack(self._ptx_losses).mean()))
            self._ptx_losses = []
