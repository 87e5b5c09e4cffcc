"""GridWorld-v0: walls, pits and a goal on a grid drawn in ASCII."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from textrl_env.core import Dynamics, DynamicsEnv, DynamicsVectorEnv
from textrl_env.errors import did_you_mean

LEFT, DOWN, RIGHT, UP = 0, 1, 2, 3
#: (row, column) of each move. Neighbours in this order are perpendicular, which slipping relies on.
MOVES = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]])
START, FLOOR, WALL, PIT, GOAL = "S", ".", "#", "H", "G"

#: The default map: a short way through a corridor above a pit, and a longer, safer one below.
DEFAULT_MAP = (
    "S..#.G",
    ".#....",
    ".#H#.H",
    "......",
    ".#.H..",
    "...#..",
)

CELL = 32  # pixels
_FLOOR_RGB, _LINE_RGB, _WALL_RGB = (246, 244, 238), (224, 220, 210), (74, 80, 96)
_PIT_RGB, _START_RGB, _GOAL_RGB, _AGENT_RGB = (38, 38, 46), (214, 226, 242), (66, 160, 106), (222, 98, 60)


def parse_map(rows: Sequence[str]) -> np.ndarray:
    """Check an ASCII map and return it as an array of single characters.

    Args:
        rows: Strings of equal length, made of ``S`` start, ``.`` floor, ``#`` wall, ``H`` pit, ``G`` goal.

    Returns:
        Characters, ``[rows, columns]``.

    Raises:
        TypeError: It is not a sequence of strings.
        ValueError: Rows differ in length, a character is unknown, a start or a goal is missing, or no goal
            can be reached from some start.
    """
    if isinstance(rows, str):
        raise TypeError("map must be a list of strings, one for each row, got one string; map=text.split()")
    if not all(isinstance(row, str) for row in rows):
        raise TypeError(f"map must be a list of strings, one for each row, got {list(rows)!r}")
    if not rows or not rows[0]:
        raise ValueError(f"map must have at least one row and one column, got {list(rows)!r}")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"map row {i} {row!r} has {len(row)} cells, but row 0 has {len(rows[0])}")
        for j, cell in enumerate(row):
            if cell not in (START, FLOOR, WALL, PIT, GOAL):
                hint = did_you_mean(cell.upper(), (START, FLOOR, WALL, PIT, GOAL))
                raise ValueError(f"map row {i}, column {j} holds the unknown cell {cell!r}. {hint}")
    cells = np.array([list(row) for row in rows])
    for cell, name in ((START, "start"), (GOAL, "goal")):
        if not (cells == cell).any():
            raise ValueError(f"map has no {name}; mark at least one cell {cell!r}")
    lost = (cells == START) & ~_can_reach_goal(cells)
    if lost.any():
        row, column = np.argwhere(lost)[0]
        raise ValueError(f"map: no goal can be reached from the start at row {row}, column {column}")
    return cells


def _can_reach_goal(cells: np.ndarray) -> np.ndarray:
    """bool ``[rows, columns]``: cells from which some path avoids walls and pits up to a goal."""
    passable = np.isin(cells, (START, FLOOR))
    reached = cells == GOAL
    while True:
        padded = np.pad(reached, 1)
        near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        grown = reached | (passable & near)
        if (grown == reached).all():
            return reached
        reached = grown


def _next_cells(cells: np.ndarray) -> np.ndarray:
    """The cell that each move from each cell leads to, int ``[S, 4]``; walls and edges stop it."""
    here = np.stack(np.unravel_index(np.arange(cells.size), cells.shape), axis=1)  # [S, 2]
    there = np.clip(here[:, None] + MOVES, 0, np.array(cells.shape) - 1)  # [S, 4, 2]
    index = there[..., 0] * cells.shape[1] + there[..., 1]
    return np.where(cells.ravel()[index] == WALL, np.arange(cells.size)[:, None], index)


class GridWorldDynamics(Dynamics):
    """``N`` walkers on one grid, as arrays; see :class:`GridWorldEnv`."""

    start_option: ClassVar[str] = "state"
    state_names: ClassVar[tuple[str, ...]] = ("cell",)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        num_slots: int,
        map: Sequence[str] | None = None,
        slippery: bool | float = False,
        goal_reward: float = 1.0,
        pit_reward: float = -1.0,
        step_reward: float = -0.01,
    ) -> None:
        super().__init__(num_slots)
        self.cells = parse_map(DEFAULT_MAP if map is None else map)
        #: Probability of slipping to one of the two sides; True means FrozenLake's two thirds.
        self.slip = 2 / 3 if slippery is True else float(slippery)
        if not 0 <= self.slip <= 1:
            raise ValueError(f"slippery must be a bool or a probability in [0, 1], got {slippery!r}")
        flat = self.cells.ravel()
        self.next_cell = _next_cells(self.cells)
        self.starts = np.flatnonzero(flat == START)
        self.goal = flat == GOAL
        self.ends = self.goal | (flat == PIT)
        self.arrival_reward = np.select([self.goal, flat == PIT], [goal_reward, pit_reward], step_reward)
        self.observation_space = spaces.Discrete(flat.size)
        self.action_space = spaces.Discrete(4)
        self.cell = np.full(num_slots, self.starts[0], dtype=np.int64)

    def reset(self, slots: np.ndarray, starts: list[Any] | None) -> dict[str, np.ndarray]:
        cell = self.starts[self.rng.integers(len(self.starts), slots)]
        for i, start in enumerate(starts or []):
            if start is not None:
                cell[i] = self._check_start(start)
        self.cell[slots] = cell
        return {"state": cell}

    def _check_start(self, start: Any) -> int:
        start = int(start)
        if not 0 <= start < self.cells.size:
            raise ValueError(f"options['state'] must be in [0, {self.cells.size - 1}], got {start}")
        cell = str(self.cells.flat[start])
        if cell not in (START, FLOOR):
            row, column = divmod(start, self.cells.shape[1])
            raise ValueError(
                f"options['state']={start} (row {row}, column {column}) is {cell!r} on the map; "
                "an episode starts on floor ('.' or 'S')"
            )
        return start

    def observe(self) -> np.ndarray:
        return self.cell.copy()

    def step(self, actions: np.ndarray, active: np.ndarray):
        if self.slip > 0:
            actions = self._slipped(actions, active)
        self.cell = np.where(active, self.next_cell[self.cell, actions], self.cell)
        success = self.goal[self.cell]
        return self.arrival_reward[self.cell], self.ends[self.cell], {"is_success": success}, {}

    def _slipped(self, actions: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Turn a move to its left with probability ``slip / 2`` and to its right with ``slip / 2``."""
        # Idle slots draw nothing, so a slot's stream does not depend on its neighbours.
        draw = np.ones(self.num_slots)
        draw[active] = self.rng.random(active)
        turn = (draw < self.slip / 2).astype(np.int64) - ((draw >= self.slip / 2) & (draw < self.slip))
        return (actions + turn) % 4

    def transition_model(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The exact model.

        Returns:
            P, transition probabilities ``[S, A, S]``; R, expected rewards ``[S, A]``; terminal, bool ``[S]``:
            goals and pits, and the walls, where no agent ever stands. A terminal state leads to itself.
        """
        size = self.cells.size
        terminal = self.ends | (self.cells.ravel() == WALL)
        transitions = np.zeros((size, 4, size))
        states = np.arange(size)
        for action in range(4):
            for turn, share in ((0, 1 - self.slip), (1, self.slip / 2), (-1, self.slip / 2)):
                transitions[states, action, self.next_cell[:, (action + turn) % 4]] += share
        rewards = transitions @ self.arrival_reward
        transitions[terminal] = np.eye(size)[terminal][:, None]
        rewards[terminal] = 0.0
        return transitions, rewards, terminal

    def render(self, slot: int, mode: str) -> str | np.ndarray:
        if mode == "ansi":
            cells = self.cells.copy()
            cells.flat[self.cell[slot]] = "A"
            return "\n".join("".join(row) for row in cells)
        image = draw_map(self.cells)
        row, column = divmod(int(self.cell[slot]), self.cells.shape[1])
        tile = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        _paint(tile, _disc(0.30), _AGENT_RGB)
        _paint(tile, _disc(0.10, dy=-0.08, dx=-0.08), (255, 236, 222))
        return np.rint(image).astype(np.uint8)


def draw_map(cells: np.ndarray) -> np.ndarray:
    """A map without its walker, as float RGB ``[rows * CELL, columns * CELL, 3]`` in [0, 255]."""
    image = np.empty((cells.shape[0] * CELL, cells.shape[1] * CELL, 3))
    for (row, column), cell in np.ndenumerate(cells):
        tile = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        tile[:] = _WALL_RGB if cell == WALL else _START_RGB if cell == START else _FLOOR_RGB
        tile[-1], tile[:, -1] = _LINE_RGB, _LINE_RGB
        if cell == WALL:
            tile[:3] = (98, 105, 124)  # a lit upper edge
        elif cell == PIT:
            _paint(tile, _disc(0.42), (188, 184, 178))
            _paint(tile, _disc(0.36), _PIT_RGB)
        elif cell == GOAL:
            _paint(tile, _disc(0.40, power=1.0), _GOAL_RGB)
            _paint(tile, _disc(0.16, power=1.0), (230, 246, 234))
    return image


def _disc(radius: float, dy: float = 0.0, dx: float = 0.0, power: float = 2.0) -> np.ndarray:
    """Coverage ``[CELL, CELL]`` in [0, 1] of a smooth disc (``power`` 2) or diamond (1), in cells."""
    centre = (np.arange(CELL) + 0.5) / CELL - 0.5
    away = np.abs(centre[:, None] - dy) ** power + np.abs(centre[None] - dx) ** power
    return np.clip((radius - away ** (1 / power)) * CELL + 0.5, 0.0, 1.0)


def _paint(tile: np.ndarray, coverage: np.ndarray, colour: tuple[int, int, int]) -> None:
    tile += coverage[..., None] * (np.array(colour) - tile)


class GridWorldEnv(DynamicsEnv):
    """Walk to the goal, around the walls and past the pits.

    ## Description
    A grid drawn in ASCII. On the default map a short corridor leads past a pit and a longer way round stays
    mostly clear of it, so the best policy changes with the slipperiness of the floor. Small enough for
    :func:`textrl_env.exact.solver.value_iteration` for exactly what an agent should have learnt.

    ## Action Space
    ``Discrete(4)``: 0 left, 1 down, 2 right, 3 up. A move into a wall or off the edge stays where it is.

    ## Observation Space
    ``Discrete(rows * columns)``: the cell, ``row * columns + column``.

    ## Starting State
    A cell marked ``S``, drawn uniformly if there are several. ``reset(options={"state": k})`` starts on any
    floor cell ``k``; the reset info names the cell as ``state``.

    ## Rewards
    ``goal_reward`` on reaching a goal, ``pit_reward`` on falling into a pit, ``step_reward`` on every other
    step.

    ## Episode End
    Terminates on a goal or in a pit. ``gym.make`` truncates after 100 steps.

    ## Information
    Every step: ``is_success``, whether a goal has been reached.

    ## Arguments
    ``map`` (None, the default map): a list of strings of equal length, of ``S`` start, ``.`` floor, ``#``
    wall, ``H`` pit (hole), ``G`` goal. ``slippery`` (False): the probability of slipping, half to each side
    of the chosen direction; True means two thirds, as in FrozenLake. ``goal_reward`` (1.0); ``pit_reward``
    (-1.0); ``step_reward`` (-0.01); ``render_mode`` "ansi" or "rgb_array".

    ## References
    Sutton and Barto, Reinforcement Learning, 2nd edition, chapters 3 and 4; Gymnasium's FrozenLake.

    ## Version History
    v0: first release.
    """

    dynamics_class = GridWorldDynamics


class GridWorldVectorEnv(DynamicsVectorEnv):
    """Many walkers in one array program; see :class:`GridWorldEnv`."""

    dynamics_class = GridWorldDynamics
