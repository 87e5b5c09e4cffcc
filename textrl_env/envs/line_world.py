"""LineWorld-v0: the one-dimensional world of the policy-gradient lectures."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from textrl_env.core import Dynamics, DynamicsEnv, DynamicsVectorEnv
from textrl_env.envs.canvas import CARD, GREEN, LINE, ORANGE, PALE_BLUE, QUIET, Canvas

LEFT, STAY, RIGHT = 0, 1, 2


class LineWorldDynamics(Dynamics):
    """``N`` walkers on a line, as arrays; see :class:`LineWorldEnv`."""

    start_option: ClassVar[str] = "state"
    state_names: ClassVar[tuple[str, ...]] = ("position",)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        num_slots: int,
        length: int = 7,
        start: int | None = 0,
        goal_reward: float = 1.0,
        step_reward: float = -0.01,
    ) -> None:
        super().__init__(num_slots)
        if length < 2:
            raise ValueError(f"length must be at least 2 (a start and a goal), got {length}")
        if start is not None and not 0 <= start < length - 1:
            raise ValueError(f"start must be None or in [0, {length - 2}], left of the goal, got {start}")
        self.length, self.start = length, start
        self.goal_reward, self.step_reward = goal_reward, step_reward
        self.observation_space = spaces.Discrete(length)
        self.action_space = spaces.Discrete(3)
        self.position = np.zeros(num_slots, dtype=np.int64)

    def reset(self, slots: np.ndarray, starts: list[Any] | None) -> dict[str, np.ndarray]:
        if self.start is None:
            position = self.rng.integers(self.length - 1, slots)
        else:
            position = np.full(len(slots), self.start, dtype=np.int64)
        for i, start in enumerate(starts or []):
            if start is not None:
                if not 0 <= int(start) < self.length - 1:
                    raise ValueError(f"options['state'] must be in [0, {self.length - 2}], got {start!r}")
                position[i] = int(start)
        self.position[slots] = position
        return {"state": position}

    def observe(self) -> np.ndarray:
        return self.position.copy()

    def step(self, actions: np.ndarray, active: np.ndarray):
        moved = np.clip(self.position + actions - STAY, 0, self.length - 1)
        self.position = np.where(active, moved, self.position)
        terminated = self.position == self.length - 1
        rewards = np.where(terminated, self.goal_reward, self.step_reward)
        return rewards, terminated, {"is_success": terminated.copy()}, {}

    def transition_model(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The exact model.

        Returns:
            P, transition probabilities ``[S, A, S]``; R, expected rewards ``[S, A]``; terminal, bool ``[S]``:
            the goal, which keeps to itself.
        """
        states = np.arange(self.length)
        terminal = states == self.length - 1
        moved = np.clip(states[:, None] + np.arange(3) - STAY, 0, self.length - 1)  # [S, A]
        moved[terminal] = self.length - 1
        transitions = np.eye(self.length)[moved]
        rewards = np.where(moved == self.length - 1, self.goal_reward, self.step_reward)
        return transitions, np.where(terminal[:, None], 0.0, rewards), terminal

    def render(self, slot: int, mode: str) -> str | np.ndarray:
        if mode == "rgb_array":
            return self._picture(int(self.position[slot]))
        cells = ["."] * (self.length - 1) + ["G"]
        cells[self.position[slot]] = "A"
        return "".join(cells)

    def _picture(self, position: int) -> np.ndarray:
        cell = max(min(64, 960 // self.length), 4)
        canvas = Canvas(max(self.length * cell + 48, 320), cell + 112)
        canvas.text(24, 18, "Walk right to the goal", 16, bold=True)
        left, top = (canvas.width - self.length * cell) / 2, 60
        middle = top + cell / 2
        for k in range(self.length):
            x = left + k * cell
            fill = PALE_BLUE if k == self.start else CARD
            canvas.rectangle(x, top, x + cell, top + cell, fill, outline=LINE)
            if cell >= 24:
                canvas.text(x + cell / 2, top + cell + 6, str(k), 11, QUIET, "mt")
        goal, r = left + (self.length - 0.5) * cell, 0.36 * cell
        canvas.polygon(
            [(goal - r, middle), (goal, middle - r), (goal + r, middle), (goal, middle + r)], GREEN
        )
        canvas.disc(left + (position + 0.5) * cell, middle, 0.26 * cell, ORANGE)
        there = position == self.length - 1
        caption = "at the goal" if there else f"{self.length - 1 - position} steps to go"
        canvas.text(canvas.width / 2, canvas.height - 12, caption, 12, GREEN if there else QUIET, "mb")
        return canvas.array()


class LineWorldEnv(DynamicsEnv):
    """Walk right to the goal at the end of a line.

    ## Description
    The one-dimensional world on which REINFORCE is usually explained: three actions, a goal at the right
    edge. Small enough that value iteration, or a look at the policy, tells whether an agent is right.

    ## Action Space
    ``Discrete(3)``: 0 left, 1 stay, 2 right. A move off the left edge leaves the walker where it is.

    ## Observation Space
    ``Discrete(length)``: the position, 0 at the left edge, ``length - 1`` at the goal.

    ## Starting State
    ``start``, or uniform over every cell but the goal when ``start=None``.
    ``reset(options={"state": k})`` starts at cell ``k``; the reset info names the cell as ``state``.

    ## Rewards
    ``goal_reward`` on reaching the goal, ``step_reward`` on every other step.

    ## Episode End
    Terminates at the goal. ``gym.make`` truncates after 50 steps.

    ## Information
    Every step: ``is_success``, whether the goal has been reached.

    ## Arguments
    ``length`` (7) cells; ``start`` (0) or None; ``goal_reward`` (1.0); ``step_reward`` (-0.01);
    ``render_mode`` "ansi" or "rgb_array".

    ## References
    Sutton and Barto, Reinforcement Learning, 2nd edition, chapter 13.

    ## Version History
    v0: first release.
    """

    dynamics_class = LineWorldDynamics


class LineWorldVectorEnv(DynamicsVectorEnv):
    """Many lines in one array program; see :class:`LineWorldEnv`."""

    dynamics_class = LineWorldDynamics
