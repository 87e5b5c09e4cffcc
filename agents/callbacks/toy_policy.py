"""What has been learned in a small world, state by state, kept for the report when learning ends.

``policy.json`` in the run directory has the probabilities of the actions in every state, the critic's values, and what
would be optimal. ``textrl train`` writes it for the grid, the line, the bandit and a token tree that can be enumerated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agents.callbacks.exact_gap import cheap_gap_callback, policy_log_probs, token_env
from agents.runs.whole import write_text
from textrl_env.envs.bandit import ToyBanditDynamics
from textrl_env.envs.grid_world import GridWorldDynamics
from textrl_env.envs.line_world import LineWorldDynamics
from textrl_env.exact.solver import from_token_tree, sequence_distribution, solve, value_iteration

FILE = "policy.json"
#: Responses of a token tree that are kept: the likeliest of the policy and of the optimum.
_RESPONSES = 12
#: States of a world that is still looked at as a whole.
_STATES = 1000


class KeepToyPolicy(BaseCallback):
    """Writes ``policy.json`` when learning ends in a world that can be looked at as a whole; nothing in any other.

    Args:
        folder: The run directory.
        verbose: As in stable-baselines3.
    """

    def __init__(self, folder: str | Path, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.folder = Path(folder)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        found = toy_policy(self.model)
        if found is not None:
            write_text(self.folder / FILE, json.dumps(found) + "\n")


def toy_policy(agent: Any) -> dict[str, Any] | None:
    """What an agent does in every state of its world, as JSON; None for a world that cannot be looked at as a whole."""
    dynamics = getattr(getattr(agent.env, "unwrapped", None), "dynamics", None)
    kinds = {GridWorldDynamics: "grid", LineWorldDynamics: "line", ToyBanditDynamics: "bandit"}
    kind = next((name for cls, name in kinds.items() if isinstance(dynamics, cls)), None)
    if kind is not None:
        return _of_states(agent, dynamics, kind) if dynamics.observation_space.n <= _STATES else None
    if hasattr(dynamics, "ref_table") and cheap_gap_callback(agent.env) is not None:
        return _of_tree(agent)
    return None


def _of_states(agent: Any, dynamics: Any, kind: str) -> dict[str, Any]:
    states, actions = np.arange(dynamics.observation_space.n), int(dynamics.action_space.n)
    log_probs = [agent.policy.log_prob(states, np.full(len(states), action)) for action in range(actions)]
    optimal, _, greedy = value_iteration(*dynamics.transition_model(), gamma=agent.gamma)
    found = {
        "kind": kind,
        "probs": _rounded(np.exp(np.stack(log_probs, 1))),
        "values": _rounded(agent.policy.predict_values(states)) if agent.policy.has_critic else None,
        "optimal_values": _rounded(optimal[: len(states)]),
        "optimal_actions": greedy[: len(states)].tolist(),
        "gamma": agent.gamma,
    }
    more = {
        "grid": lambda: {"cells": ["".join(row) for row in dynamics.cells]},
        "line": lambda: {"start": int(dynamics.start)},
        "bandit": lambda: {"means": _rounded(dynamics.means)},
    }
    return found | more[kind]()


def _of_tree(agent: Any) -> dict[str, Any]:
    env = token_env(agent.env)
    mdp = from_token_tree(env)
    levels = {
        "policy": policy_log_probs(agent.policy, agent.env),
        "optimum": solve(mdp).policy,
        "reference": mdp.ref_log_probs,
    }
    found = {name: sequence_distribution(mdp, level) for name, level in levels.items()}
    probs = {name: np.exp(log_probs[0]) for name, (log_probs, _) in found.items()}
    scores = found["policy"][1][0]
    labels = _labels(mdp)
    order = np.argsort(-np.maximum(probs["policy"], probs["optimum"]), kind="stable")[:_RESPONSES]
    return {
        "kind": "tree",
        "prompts": mdp.num_prompts,
        "kl_coef": float(mdp.kl_coef),
        "responses": [
            {"text": labels[i], "score": round(float(scores[i]), 4)}
            | {name: round(float(prob[i]), 5) for name, prob in probs.items()}
            for i in order
        ],
    }


def _labels(mdp: Any) -> list[str]:
    """The responses to a prompt as numbers of tokens, in the order of ``sequence_distribution``."""
    labels: list[str] = []
    prefixes: list[list[int]] = [[]]
    for t in range(mdp.horizon):
        ends = np.asarray(mdp.ends(t))
        labels += [" ".join(map(str, [*prefix, v])) for prefix in prefixes for v in np.flatnonzero(ends)]
        prefixes = [[*prefix, int(v)] for prefix in prefixes for v in np.flatnonzero(~ends)]
    return labels


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(np.asarray(values, dtype=np.float64), 5).tolist()
