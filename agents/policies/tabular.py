"""A policy that is a table: one logit for every prefix and token of a ``TokenTree-v0``.

With it the softmax policy gradient has a closed form (:func:`textrl_env.exact.solver.evaluate`), so estimators can be
compared with the truth. It generalises over nothing and acts in nothing but a token tree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_choice
from textrl_env.lm.next_tokens import sample_actions


class TabularPolicy(Policy):
    """Logits ``[rows, V]`` and, with a critic, values ``[rows]``; rows are numbered as the tree numbers them.

    Args:
        observation_space: Of ``TokenTree-v0``.
        action_space: ``Discrete(vocab_size)``.
        critic: "separate" (a table of values, zero at first) or None.
        logits: Initial logits ``[rows, V]``, such as ``env.unwrapped.dynamics.ref_table`` to start from the
            reference; None starts uniform.
        eos: Whether token 0 ends a response, as the tree has it.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        critic: str | None = "separate",
        logits: Any = None,
        eos: bool = True,
    ) -> None:
        super().__init__(observation_space, action_space, critic)
        check_choice("critic", critic, ("separate", None))
        self.vocab_size, self.horizon, num_prompts = _tree_sizes(observation_space, action_space)
        self.eos = eos
        self.branching = self.vocab_size - eos
        sizes = num_prompts * self.branching ** np.arange(self.horizon)
        self.level_start = np.concatenate([[0], np.cumsum(sizes)])  # as in TokenTreeDynamics
        shape = (int(self.level_start[-1]), self.vocab_size)
        table = torch.zeros(shape) if logits is None else torch.tensor(np.asarray(logits, dtype=np.float32))
        if table.shape != shape:
            raise ValueError(f"logits have shape {tuple(table.shape)}, the tree's table is {shape}")
        self.logits = nn.Parameter(table)
        self.values = None if critic is None else nn.Parameter(torch.zeros(shape[0]))

    def rows(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """The row of each observation, int64 ``[...]``; 0 for a response that is over, whose row is not used."""
        ids, mask = np.asarray(observation["input_ids"]), np.asarray(observation["attention_mask"])
        length = mask.sum(-1) - 1
        prompt_at = (self.horizon - length)[..., None]
        node = np.take_along_axis(ids, prompt_at, -1)[..., 0] - self.vocab_size
        for j in range(1, self.horizon + 1):
            token = np.take_along_axis(ids, np.minimum(prompt_at + j, self.horizon), -1)[..., 0]
            node = np.where(j <= length, node * self.branching + token - self.eos, node)
        ended = (length == self.horizon) | (self.eos & (length > 0) & (ids[..., -1] == 0))
        return np.where(ended, 0, self.level_start[length] + node)

    def _row_log_probs(self, rows: np.ndarray) -> Tensor:
        return self.logits[torch.from_numpy(rows).to(self.device)].log_softmax(-1)

    @torch.no_grad()
    def act(self, observation: Any, deterministic: bool = False):
        rows = self.rows(observation)
        table = self._row_log_probs(rows)  # [N, V]
        chosen = sample_actions(table, self.generator, deterministic)
        log_probs = table.gather(-1, chosen[:, None])[:, 0].double().cpu().numpy()
        actions = chosen.cpu().numpy()
        self._last = (observation, actions, log_probs)
        return actions, log_probs, self._values_of(rows)

    def _values_of(self, rows: np.ndarray) -> np.ndarray:
        if self.values is None:
            return np.zeros(rows.shape)
        return self.values.detach().double().cpu().numpy()[rows]

    def evaluate(self, rollout: Rollout) -> Evaluation:
        rows = rollout.inputs["rows"]  # [B, T]
        table = self.logits[rows].log_softmax(-1)
        log_probs = table.gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
        values = None if self.values is None else self.values[rows]
        return Evaluation(log_probs, values, -(table.exp() * table).sum(-1))

    @torch.no_grad()
    def squared_probabilities(self, rollout: Rollout) -> Tensor:
        return self.logits[rollout.inputs["rows"]].softmax(-1).square().sum(-1)

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
        rows = np.stack([self.rows(observation) for observation in observations], axis=1)
        return {"rows": torch.from_numpy(rows * mask)}  # [N, T]

    def predict_values(self, observation: Any) -> np.ndarray:
        return self._values_of(self.rows(observation))

    @torch.no_grad()
    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        table = self._row_log_probs(self.rows(observation)).double().cpu().numpy()
        return np.take_along_axis(table, np.asarray(action)[:, None], 1)[:, 0]


def _tree_sizes(observation_space: spaces.Space, action_space: spaces.Space) -> tuple[int, int, int]:
    """Vocabulary, horizon and number of prompts, read off the spaces of a token tree."""
    names = set(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else set()
    if names != {"input_ids", "attention_mask"} or not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            f"TabularPolicy acts in TokenTree-v0 alone, got {observation_space} and {action_space}; "
            'other environments want policy="MlpPolicy" or "CausalLMPolicy"'
        )
    ids, vocab_size = observation_space["input_ids"], int(action_space.n)
    return vocab_size, ids.shape[0] - 1, int(ids.high.max()) - vocab_size
