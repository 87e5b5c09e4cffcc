"""What the examples of this folder share: one environment, one network, and a check of the KL that was charged.

Each example trains with another library's agent on the same environment, as that library has it, and ends with one
line of JSON: the return of the first and of the last episodes, and how far the log-probabilities that the environment
charged the KL for are from those that the library itself wrote down for its update. ``benchmarks/other_agents.py``
runs them all, each in a virtual environment of its own.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from textrl_env.exact import solve  # the package registers the environments
from textrl_env.exact.token_mdp import from_token_tree

#: A language so small that its best policy is known, with a KL like the large ones'.
ENV_ID = "TokenTree-v0"
ENV_KWARGS = {"vocab_size": 8, "horizon": 5, "kl_coef": 0.1}
SLOTS = 16


class TokenNet(nn.Module):
    """Logits of the next token ``[..., V]`` and values ``[...]``, from left-padded token ids ``[..., L]``."""

    def __init__(self, observation_space: gym.spaces.Dict, num_tokens: int, width: int = 64) -> None:
        super().__init__()
        ids = observation_space["input_ids"]
        self.embed = nn.Embedding(int(ids.high.max()) + 1, 16)
        self.body = nn.Sequential(nn.Linear(16 * ids.shape[0], width), nn.Tanh())
        self.actor, self.critic = nn.Linear(width, num_tokens), nn.Linear(width, 1)
        for head in (self.actor, self.critic):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Any number type will do: libraries hand token ids on as floats."""
        embedded = self.embed(input_ids.long()) * attention_mask[..., None]
        hidden = self.body(embedded.flatten(-2))
        return self.actor(hidden), self.critic(hidden)[..., 0]


class Audit:
    """What an environment has charged for, and what its episodes returned; from the infos that it gives out.

    Attributes:
        charged: For each step, the acting policy's log-probabilities ``[N]`` that its KL was of; NaN where there was
            no step (the reset of a slot).
        returns: Of the episodes, in the order of their ends.
    """

    def __init__(self, num_envs: int = 1) -> None:
        self.charged: list[np.ndarray] = []
        self.returns: list[float] = []
        self._running = np.zeros(num_envs)

    def step(self, rewards: np.ndarray, done: np.ndarray, infos: dict[str, Any]) -> None:
        """Note one step of a vector env."""
        log_probs = np.full(len(self._running), np.nan)
        for source in (infos, infos.get("final_info", {})):
            if "kl" in source:  # the estimator is k1: log pi(a|s) - log pi_ref(a|s)
                real = source["_kl"]
                log_probs[real] = (source["kl"] + source["ref_logprob"])[real]
        self.charged.append(log_probs)
        self._running += rewards
        self.returns += self._running[done].tolist()
        self._running[done] = 0.0


class VectorAudit(gym.vector.VectorWrapper):
    """A vector env under an :class:`Audit`."""

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        super().__init__(envs)
        self.audit = Audit(envs.num_envs)
        self.autoreset_mode = envs.metadata["autoreset_mode"]  # which TorchRL reads off the outermost wrapper

    def step(self, actions: Any):
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        self.audit.step(np.asarray(rewards), terminated | truncated, infos)
        return observations, rewards, terminated, truncated, infos


class SingleAudit(gym.Wrapper):
    """A single env under an :class:`Audit`."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.audit = Audit()

    def step(self, action: Any):
        observation, reward, terminated, truncated, info = self.env.step(action)
        audit = self.audit
        audit.charged.append(np.array([info["kl"] + info["ref_logprob"]]))
        audit._running += reward
        if terminated or truncated:
            audit.returns.append(float(audit._running[0]))
            audit._running[:] = 0.0
        return observation, reward, terminated, truncated, info


class Acted:
    """Hands an environment the log-probabilities that an agent has just acted with.

    ``ActingPolicy(envs, acted)`` asks it in each step. An agent that has them at hand sets ``acted.latest``.
    """

    def __init__(self) -> None:
        self.latest: np.ndarray | None = None

    def __call__(self, observations: Any, actions: Any) -> np.ndarray:
        return self.latest


def best_return() -> float:
    """The return of the best policy there is, KL included, by the exact solver."""
    return solve(from_token_tree(gym.make(ENV_ID, **ENV_KWARGS))).objective


def arguments(steps: int) -> argparse.Namespace:
    """``--steps`` and ``--seed``, for every example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=steps, help="env steps to train for")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)  # noqa: NPY002, the generator that these libraries draw from
    return options


def report(
    package: str, agent: str, audits: list[Audit], acted: np.ndarray | None, env: str = ENV_ID
) -> None:
    """Print the line of JSON.

    Args:
        package: The library, as it is installed.
        agent: Its name there.
        audits: One, or one for each single env.
        acted: The log-probabilities that the library wrote down for its last updates, in the order of the steps,
            ``[T, N]``; NaN where it wrote none. None where there is no KL.
        env: The id.
    """
    returns = [value for audit in audits for value in _tenths(audit.returns)]
    first, last = np.mean(returns[::2]), np.mean(returns[1::2])
    line = {"library": package, "version": version(package), "agent": agent, "env": env}
    line |= {"return_first": round(float(first), 3), "return_last": round(float(last), 3)}
    line |= {"return_best": round(best_return(), 3)} if env == ENV_ID else {}
    if acted is not None:
        charged = np.concatenate([np.array(audit.charged) for audit in audits], axis=1)
        acted = np.asarray(acted, dtype=np.float64)
        charged = charged[-len(acted) :]
        both = ~np.isnan(charged) & ~np.isnan(acted)
        assert both.sum() > both.size / 2, "the steps of the library and of the environment do not line up"
        line |= {"steps_compared": int(both.sum())}
        line |= {"largest_difference": float(np.abs(charged - acted)[both].max())}
    print(json.dumps(line), flush=True)


def _tenths(returns: list[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth."""
    count = max(len(returns) // 10, 1)
    return float(np.mean(returns[:count])), float(np.mean(returns[-count:]))
