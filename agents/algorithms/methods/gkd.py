"""GKD: a student writes, and a teacher says what it should have written (Agarwal et al. 2024, arXiv 2306.13649).

    minimise  lmbda E_{y ~ S} [ mean_t D_t ] + (1 - lmbda) E_{y ~ data} [ mean_t D_t ]
    with      D_t = beta KL(T || M) + (1 - beta) KL(S || M),    M = beta T + (1 - beta) S

of the next token after ``x, y_<t``, by the teacher ``T`` and the student ``S``.

"On-Policy Distillation of Language Models". ``beta = 0`` is ``KL(T || S)``, ``beta = 1`` is ``KL(S || T)``. Divergences
are of the whole vocabulary, and no gradient goes through what was sampled, as in the paper. The mean is over all tokens
of a step. Left out: answers that the teacher writes, and a reward beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.base import Agent
from agents.offline.sft import IGNORE, Example, encode_all
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout
from textrl_env.errors import ArgumentError
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.divergence import compare
from textrl_env.lm.sequences import ENVIRONMENT, POLICY, PROMPT, Sequences


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
        for name, value in (("beta", beta), ("lmbda", lmbda)):
            if not 0 <= value <= 1:
                raise ArgumentError(f"{name} must be in [0, 1], got {value}")
        if lmbda < 1 and data is None:
            raise ArgumentError(f"lmbda={lmbda} takes some rollouts from demonstrations: pass data=...")
        if isinstance(data, (str, Path)):
            # A checkpoint can then be resumed from any folder.
            data = self.init_kwargs["data"] = str(Path(data).expanduser().resolve())
        if isinstance(teacher, (str, Path)) and Path(teacher).is_dir():
            teacher = self.init_kwargs["teacher"] = str(Path(teacher).resolve())
        self.teacher, self.beta, self.lmbda, self.data = teacher, beta, lmbda, data
        self._examples: list[Example] = []
        super().__init__(*args, **kwargs)

    def set_up_policy(self, spaces: Any = None) -> None:
        super().set_up_policy(spaces)
        if self.envs is None:  # loaded to predict only, it does without its teacher
            return
        if not hasattr(self.policy, "lm"):
            raise ArgumentError(
                f"{type(self).__name__} distils language models, and {type(self.policy).__name__} is none; use a text "
                "environment"
            )
        self.policy.compare = self._compare(self._load_teacher())

    def _load_teacher(self) -> CausalLM:
        if self.teacher is None:
            raise ArgumentError(
                f"{type(self).__name__} learns from a teacher: pass teacher=..., a folder or hub id, or a CausalLM"
            )
        own = self.policy.lm
        teacher = CausalLM.load(self.teacher, temperature=own.temperature, device=self.device)
        theirs, ours = teacher.tokenizer.get_vocab(), own.tokenizer.get_vocab()
        if theirs != ours or teacher.vocab_size != own.vocab_size:
            raise ArgumentError(
                f"the teacher has {teacher.vocab_size:,} tokens and the student {own.vocab_size:,}, or other ones by "
                "the same ids: distillation compares them id by id, so both need one vocabulary"
            )
        teacher.model.requires_grad_(False)
        return teacher

    def _compare(self, teacher: CausalLM) -> Any:
        def look(student: CausalLM, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
            sequences = rollout.inputs["sequences"].to(student.device)
            return compare(student, teacher, sequences, self.beta)

        return look

    def collect(self) -> Rollout:
        # One draw for a rollout, from the agent's own stream: every process makes the same.
        if self.lmbda < 1 and self.rng.random() >= self.lmbda:
            return self._demonstrated()
        return super().collect()

    def _demonstrated(self) -> Rollout:
        """A rollout of demonstrations, whose tokens count as timesteps."""
        if not self._examples:
            longest = self.policy.observation_space["input_ids"].shape[0]
            self._examples = encode_all(self.data, self.policy.lm.tokenizer, longest)
        count = min(self.n_episodes, len(self._examples))
        rows = self.rng.choice(len(self._examples), count, replace=False)
        sequences = Sequences.concatenate([_as_sequence(self._examples[row]) for row in rows])
        mask = torch.from_numpy(sequences.mask())
        zeros = torch.zeros(mask.shape)
        actions = torch.from_numpy(sequences.padded(sequences.actions))
        self.num_timesteps += int(mask.sum())
        none = torch.zeros_like(mask)  # nobody has played an episode
        inputs = {"sequences": sequences}
        return Rollout(inputs, actions, zeros.double(), zeros, zeros, zeros, mask, none)

    def advantages(self, rollout: Rollout) -> Tensor:
        return torch.zeros(rollout.mask.shape, dtype=torch.float64)

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        return new.divergence, {"divergence": new.divergence, "log_prob": new.log_probs}


def _as_sequence(example: Example) -> Sequences:
    """A demonstration: what carries loss is the policy's, between its parts somebody else has spoken."""
    labels = np.array(example.labels)
    written = labels != IGNORE
    written[0] = False  # nothing predicts the first token
    by = np.where(written, POLICY, ENVIRONMENT)
    by[: int(written.argmax())] = PROMPT
    return Sequences(np.array(example.input_ids), np.zeros(1, dtype=np.int64), by)
