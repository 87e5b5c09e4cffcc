"""How far a policy is from the optimum, exactly, while it learns.

:class:`ExactGapCallback` asks the policy for its log-probabilities after every prefix, and
:mod:`textrl_env.exact.solver` for the rest. It works in ``TokenTree-v0`` with any policy and in a ``TextRLHF-v0``
whose vocabulary and budget are tiny; ``max_rows`` is the limit. ``textrl train`` adds it by itself where it is
cheap (:func:`cheap_gap_callback`). Wrappers that change rewards are not seen, and the objective is undiscounted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents.policies.base import Policy
from textrl_env.errors import check_range
from textrl_env.exact.solver import (
    Levels,
    TokenMDP,
    evaluate,
    from_text_env,
    from_token_tree,
    kl_divergence,
    solve,
)
from textrl_env.lm.slot_decoder import SlotDecoder

#: Prefixes in one call of the policy.
_BATCH = 4096
#: Responses up to which a language is measured without being asked: some milliseconds for each rollout.
CHEAP_RESPONSES = 2_000


def policy_log_probs(policy: Policy, env: Any) -> Levels:
    """A policy's log-probabilities after every prefix, one array ``[n_t, V]`` for each level.

    Args:
        policy: Any policy of the environment.
        env: A ``TokenTree-v0`` or a tiny ``TextRLHF-v0``, single or vector, wrapped or not.
    """
    dynamics, levels = token_env(env).dynamics, []
    prompts, goes_on, horizon, pad_id = _language(dynamics)
    prompt_ids, tokens = np.arange(len(prompts)), np.zeros((len(prompts), 0), dtype=np.int64)
    for _ in range(horizon):
        parts = []
        for i in range(0, len(tokens), _BATCH):
            chunk = slice(i, i + _BATCH)
            observation = _observe(dynamics, prompts, prompt_ids[chunk], tokens[chunk], pad_id)
            parts.append(_next_token_log_probs(policy, observation))
        levels.append(np.concatenate(parts))
        tokens = np.column_stack([np.repeat(tokens, len(goes_on), 0), np.tile(goes_on, len(tokens))])
        prompt_ids = np.repeat(prompt_ids, len(goes_on))
    return levels


def token_env(env: Any) -> Any:
    """The token environment inside ``env``, also inside a ``SyncVectorEnv``."""
    base = env.unwrapped
    base = base.envs[0].unwrapped if hasattr(base, "envs") else base
    dynamics = getattr(base, "dynamics", None)
    if not (hasattr(dynamics, "ref_table") or hasattr(dynamics, "prompt_tokens")):
        raise ValueError(
            f"the exact solver enumerates token environments, got {env}; TokenTree-v0 is one, and TextRLHF-v0 "
            "with a tiny vocabulary and budget"
        )
    return base


def _language(dynamics: Any) -> tuple[list[np.ndarray], np.ndarray, int, int]:
    """Prompts as token ids, the tokens that do not end a response, the budget, and the padding."""
    if hasattr(dynamics, "ref_table"):
        prompts = [np.array([dynamics.vocab_size + k]) for k in range(dynamics.num_prompts)]
        return prompts, np.arange(int(dynamics.eos), dynamics.vocab_size), dynamics.horizon, dynamics.pad_id
    lm = dynamics.lm
    goes_on = np.setdiff1d(np.arange(lm.vocab_size), lm.eos_ids)
    return dynamics.prompt_tokens, goes_on, dynamics.max_new_tokens, lm.pad_id


def _observe(
    dynamics: Any, prompts: list[np.ndarray], prompt_ids: np.ndarray, tokens: np.ndarray, pad_id: int
) -> dict[str, np.ndarray]:
    """What the environment would show after these prefixes ``[n, t]``."""
    shape = (len(tokens), dynamics.observation_space["input_ids"].shape[0])
    input_ids, attention_mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, (k, written) in enumerate(zip(prompt_ids, tokens, strict=True)):
        sequence = np.concatenate([prompts[k], written])
        input_ids[row, -len(sequence) :] = sequence
        attention_mask[row, -len(sequence) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def _next_token_log_probs(policy: Policy, observation: dict[str, np.ndarray]) -> np.ndarray:
    """``[n, V]``; a language model in one pass, any other policy token by token."""
    vocab_size = int(policy.action_space.n)
    if not hasattr(policy, "lm"):
        actions = [np.full(len(observation["input_ids"]), token) for token in range(vocab_size)]
        return np.stack([policy.log_prob(observation, action) for action in actions], axis=1)
    real = observation["attention_mask"] > 0
    rows = [ids[known] for ids, known in zip(observation["input_ids"], real, strict=True)]
    decoder = SlotDecoder(policy.lm, len(rows), real.shape[1], use_cache=False)
    return decoder.prefill(np.arange(len(rows)), rows).double().log_softmax(-1).cpu().numpy()


class ExactGapCallback(BaseCallback):
    """Logs ``exact/gap``, ``exact/kl_to_optimum`` and ``exact/J`` every ``every`` rollouts.

    The gap is ``(J* - J) / (J* - J_ref)``: 1 for the reference, 0 at the optimum. ``kl_to_optimum`` is
    ``KL(pi || pi*)`` in nats, ``(J* - J) / kl_coef``. They describe the policy that has collected the rollout;
    when learning ends, :attr:`latest` describes the final one.

    Args:
        every: Rollouts between two measurements.
        max_rows: Prefixes that the language may have; more are refused with a ValueError.
        verbose: As in stable-baselines3.

    Attributes:
        latest: The last measurement, by name without ``exact/``.
        history: ``(num_timesteps, measurement)`` of all of them.
    """

    def __init__(self, every: int = 1, max_rows: int = 100_000, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_range(1, every=every)
        self.every, self.max_rows = every, max_rows
        self.latest: dict[str, float] = {}
        self.history: list[tuple[int, dict[str, float]]] = []
        self._rollouts = 0

    def get_state(self) -> dict[str, Any]:
        """How many rollouts there were."""
        return {"rollouts": self._rollouts}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self._rollouts = int(state["rollouts"])

    def _on_training_start(self) -> None:
        env = token_env(self.model.envs)
        self._dynamics = env.dynamics
        _check_rows(self._dynamics, self.max_rows)
        mdp = from_token_tree(env) if hasattr(self._dynamics, "ref_table") else from_text_env(env)
        self._solve(mdp)

    def _solve(self, mdp: TokenMDP) -> None:
        self._mdp, self._best = mdp, solve(mdp)
        self._reference_objective = evaluate(mdp, mdp.ref_log_probs).objective

    def measure(self) -> dict[str, float]:
        """The gap of the policy as it is now."""
        if self._dynamics.kl_coef != self._mdp.kl_coef:
            self._solve(dataclasses.replace(self._mdp, kl_coef=self._dynamics.kl_coef))
        levels = policy_log_probs(self.model.policy, self.model.envs)
        objective = evaluate(self._mdp, levels).objective
        span = self._best.objective - self._reference_objective
        self.latest = {
            "gap": (self._best.objective - objective) / span if span > 0 else math.nan,
            "kl_to_optimum": kl_divergence(self._mdp, levels, self._best.policy),
            "J": objective,
        }
        self.history.append((self.num_timesteps, self.latest))
        return self.latest

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self._rollouts % self.every == 0:
            for name, value in self.measure().items():
                self.logger.record(f"exact/{name}", value)
        self._rollouts += 1

    def _on_training_end(self) -> None:
        self.measure()


def cheap_gap_callback(env: Any) -> ExactGapCallback | None:
    """The callback for an environment whose optimum is cheap to know, None for any other.

    Cheap is a ``TokenTree-v0`` or ``TextRLHF-v0`` with at most :data:`CHEAP_RESPONSES` complete responses, prompts
    together: the reward is asked about each of them once, the policy about every prefix after each rollout.

    Args:
        env: Any environment, single or vector, wrapped or not.
    """
    try:
        dynamics = token_env(env).dynamics
    except ValueError:
        return None
    prompts, goes_on, horizon, _ = _language(dynamics)
    vocab_size = int(dynamics.action_space.n)  # a NumPy integer would overflow below
    ended = sum(len(goes_on) ** t for t in range(horizon)) * (vocab_size - len(goes_on))
    responses = len(prompts) * (ended + len(goes_on) ** horizon)
    return ExactGapCallback() if responses <= CHEAP_RESPONSES else None


def _check_rows(dynamics: Any, max_rows: int) -> None:
    prompts, goes_on, horizon, _ = _language(dynamics)
    rows = len(prompts) * sum(len(goes_on) ** t for t in range(horizon))
    if rows > max_rows:
        raise ValueError(
            f"the language has {rows:,} prefixes, more than max_rows={max_rows:,}; "
            "use fewer prompts, a smaller vocabulary or budget, or raise max_rows"
        )
