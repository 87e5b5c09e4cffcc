"""ToyBandit-v0: one choice, one reward; the smallest problem an agent can get wrong."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from textrl_env.core import Dynamics, DynamicsEnv, DynamicsVectorEnv


class ToyBanditDynamics(Dynamics):
    """``N`` pulls of a bandit, as arrays; see :class:`ToyBanditEnv`."""

    start_option: ClassVar[str] = "state"
    state_names: ClassVar[tuple[str, ...]] = ("context",)

    def __init__(
        self,
        num_slots: int,
        arms: int = 10,
        contexts: int = 1,
        noise_std: float = 0.1,
        arms_seed: int = 0,
    ) -> None:
        super().__init__(num_slots)
        if arms < 2:
            raise ValueError(f"arms must be at least 2 (something to choose), got {arms}")
        if contexts < 1:
            raise ValueError(f"contexts must be at least 1, got {contexts}")
        if not (np.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std must be a finite number >= 0, got {noise_std!r}")
        self.arms, self.contexts, self.noise_std = arms, contexts, noise_std
        #: Expected reward of each arm in each context, float64 ``[contexts, arms]``.
        self.means = np.random.default_rng(arms_seed).standard_normal((contexts, arms))
        self.observation_space = spaces.Discrete(contexts)
        self.action_space = spaces.Discrete(arms)
        self.context = np.zeros(num_slots, dtype=np.int64)

    def reset(self, slots: np.ndarray, starts: list[Any] | None) -> dict[str, np.ndarray]:
        context = self.rng.integers(self.contexts, slots)
        for i, start in enumerate(starts or []):
            if start is not None:
                if not 0 <= int(start) < self.contexts:
                    raise ValueError(f"options['state'] must be in [0, {self.contexts - 1}], got {start!r}")
                context[i] = int(start)
        self.context[slots] = context
        return {"state": context}

    def observe(self) -> np.ndarray:
        return self.context.copy()

    def step(self, actions: np.ndarray, active: np.ndarray):
        means = self.means[self.context]  # [N, arms]
        expected = means[np.arange(self.num_slots), actions]
        rewards = expected.copy()
        if self.noise_std > 0:
            # Idle slots draw nothing, so a slot's stream does not depend on its neighbours.
            rewards[active] += self.noise_std * self.rng.normal(active)
        regret = means.max(axis=1) - expected
        return rewards, np.ones(self.num_slots, dtype=bool), {"regret": regret, "is_success": regret == 0}, {}

    def transition_model(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The exact model: every arm leads to one terminal state, added after the contexts.

        Returns:
            P, transition probabilities ``[S, A, S]``; R, expected rewards ``[S, A]``; terminal, bool ``[S]``;
            with ``S = contexts + 1``.
        """
        size = self.contexts + 1
        transitions = np.zeros((size, self.arms, size))
        transitions[:, :, -1] = 1.0
        rewards = np.vstack([self.means, np.zeros(self.arms)])
        return transitions, rewards, np.arange(size) == self.contexts


class ToyBanditEnv(DynamicsEnv):
    """Pull one of several arms, once.

    ## Description
    A k-armed bandit, with as many contexts as wanted. The expected rewards are drawn from N(0, 1) by
    ``arms_seed`` alone, so every seed of ``reset`` meets the same problem and a learnt policy can be compared
    with the best arm. With one context it is the bandit on which softmax policy gradients are explained; a
    prompt answered by a single token is the same thing with more arms.

    ## Action Space
    ``Discrete(arms)``: the arm to pull.

    ## Observation Space
    ``Discrete(contexts)``: the context. It does not change when the arm is pulled.

    ## Starting State
    A context, drawn uniformly. ``reset(options={"state": k})`` starts in context ``k``; the reset info names
    the context as ``state``.

    ## Rewards
    The arm's expected reward in this context plus Gaussian noise of standard deviation ``noise_std``.

    ## Episode End
    Terminates after one step.

    ## Information
    Every step: ``regret``, the best arm's expected reward minus the chosen one's (noise left out), and
    ``is_success``, whether the best arm was chosen.

    ## Arguments
    ``arms`` (10); ``contexts`` (1); ``noise_std`` (0.1; 1.0 is Sutton and Barto's testbed); ``arms_seed`` (0)
    draws the expected rewards, which are readable as ``env.unwrapped.dynamics.means``.

    ## References
    Sutton and Barto, Reinforcement Learning, 2nd edition, chapter 2.

    ## Version History
    v0: first release.
    """

    dynamics_class = ToyBanditDynamics


class ToyBanditVectorEnv(DynamicsVectorEnv):
    """Many bandits in one array program; see :class:`ToyBanditEnv`."""

    dynamics_class = ToyBanditDynamics
