"""ToyBandit-v0: one choice, one reward; the smallest problem an agent can get wrong."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from textrl_env.core import Dynamics, DynamicsEnv, DynamicsVectorEnv
from textrl_env.envs.canvas import GREEN, ORANGE, PALE_BLUE, QUIET, Canvas, bars
from textrl_env.errors import check_range


class ToyBanditDynamics(Dynamics):
    """``N`` pulls of a bandit, as arrays; see :class:`ToyBanditEnv`."""

    start_option: ClassVar[str] = "state"
    state_names: ClassVar[tuple[str, ...]] = ("context",)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 2}

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
        check_range(1, contexts=contexts)
        if not (np.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std must be a finite number >= 0, got {noise_std!r}")
        self.arms, self.contexts, self.noise_std = arms, contexts, noise_std
        #: Expected reward of each arm in each context, float64 ``[contexts, arms]``.
        self.means = np.random.default_rng(arms_seed).standard_normal((contexts, arms))
        self.observation_space = spaces.Discrete(contexts)
        self.action_space = spaces.Discrete(arms)
        self.context = np.zeros(num_slots, dtype=np.int64)
        # What the picture shows of the last pull; no part of the state.
        self._pulled: list[tuple[int, int, float] | None] = [None] * num_slots

    @property
    def budget(self) -> int:
        return 1  # a pull is an episode

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
        for slot in np.flatnonzero(active):
            self._pulled[slot] = int(self.context[slot]), int(actions[slot]), float(rewards[slot])
        return rewards, np.ones(self.num_slots, dtype=bool), {"regret": regret, "is_success": regret == 0}, {}

    def render(self, slot: int, mode: str) -> np.ndarray:
        """The arms of the last pull's context (or of the present one) as bars of their expected rewards."""
        context, arm, reward = self._pulled[slot] or (int(self.context[slot]), None, 0.0)
        means = self.means[context]
        canvas = Canvas(480, 320)
        title = f"Context {context} of {self.contexts}" if self.contexts > 1 else f"{self.arms} arms"
        canvas.text(24, 18, title, 16, bold=True)
        caption = "nothing pulled yet" if arm is None else f"pulled arm {arm}: reward {reward:.2f}"
        canvas.text(456, 21, caption, 13, QUIET if arm is None else ORANGE, "ra")
        colours = [GREEN if mean == means.max() else PALE_BLUE for mean in means]
        if arm is not None:
            colours[arm] = ORANGE if colours[arm] != GREEN else GREEN
        bars(canvas, (24, 56, 456, 276), means, [str(i) for i in range(self.arms)], colours)
        if arm is not None:
            x = 24 + (arm + 0.5) * 432 / self.arms
            canvas.polygon([(x - 6, 290), (x + 6, 290), (x, 280)], ORANGE)
        canvas.text(24, 296, "expected reward of each arm; the best is green", 11, QUIET)
        return canvas.array()

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
    draws the expected rewards, which are readable as ``env.unwrapped.dynamics.means``; ``render_mode`` "rgb_array".

    ## References
    Sutton and Barto, Reinforcement Learning, 2nd edition, chapter 2.

    ## Version History
    v0: first release.
    """

    dynamics_class = ToyBanditDynamics


class ToyBanditVectorEnv(DynamicsVectorEnv):
    """Many bandits in one array program; see :class:`ToyBanditEnv`."""

    dynamics_class = ToyBanditDynamics
