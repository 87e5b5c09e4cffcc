"""Array programs as Gymnasium environments.

Every environment here is written once, as :class:`Dynamics`: ``num_slots`` copies of one MDP that step
together as arrays. Two thin adapters make it a Gymnasium citizen: :class:`DynamicsEnv` (one slot, an
ordinary ``gymnasium.Env``) and :class:`DynamicsVectorEnv` (any number of slots, a native
``gymnasium.vector.VectorEnv``). A slot of the vector env seeded with ``s`` is, number for number, the
single env seeded with ``s``: randomness comes from one counter-based stream per slot (:class:`SlotRNG`).

Left out on purpose: wrappers, rendering to a window, and anything that needs torch.
"""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from textrl_env.errors import check_keywords, check_range, did_you_mean

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def object_array(values: Sequence[Any]) -> np.ndarray:
    """An array of Python objects, one entry for each, also where they are sequences of one length."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def mixed_bits(key: np.ndarray, counter: np.ndarray | np.uint64) -> np.ndarray:
    """The random bits of a stream at a place in it, uint64: SplitMix64 (Steele, Lea and Flood, 2014).

    Args:
        key: Of the streams, uint64 ``[N]``.
        counter: The place, from 1.
    """
    z = key + np.asarray(counter, dtype=np.uint64) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class SlotRNG:
    """One independent random stream per slot, drawn for all slots at once.

    :func:`mixed_bits` of its key and its counter: a slot's numbers depend on its own key and on how often that slot
    has drawn, never on its neighbours.

    Args:
        num_slots: Number of streams, ``N``.
    """

    def __init__(self, num_slots: int) -> None:
        self.key = np.zeros(num_slots, dtype=np.uint64)
        self.counter = np.zeros(num_slots, dtype=np.uint64)

    def seed(self, slots: np.ndarray, keys: np.ndarray) -> None:
        """Start the streams of ``slots`` anew from ``keys`` (uint64, same length)."""
        self.key[slots] = keys
        self.counter[slots] = 0

    def _bits(self, slots: np.ndarray | slice) -> np.ndarray:
        self.counter[slots] += np.uint64(1)
        return mixed_bits(self.key[slots], self.counter[slots])

    def random(self, slots: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Uniform floats in [0, 1), one for each of ``slots`` (indices, mask or slice)."""
        return (self._bits(slots) >> np.uint64(11)) * (1.0 / (1 << 53))

    def integers(self, high: int, slots: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Uniform int64 in [0, high), one for each of ``slots``."""
        return (self.random(slots) * high).astype(np.int64)

    def normal(self, slots: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Standard normal floats, one for each of ``slots`` (Box-Muller)."""
        radius = np.sqrt(-2.0 * np.log1p(-self.random(slots)))
        return radius * np.cos(2.0 * np.pi * self.random(slots))


class Partial(NamedTuple):
    """A value of the step info that only some slots have.

    Attributes:
        values: ``[N]``.
        mask: bool ``[N]``, the slots that have it.
    """

    values: np.ndarray
    mask: np.ndarray


class Dynamics(ABC):
    """``N`` slots of one MDP, stepped as an array program.

    A subclass sets ``observation_space`` and ``action_space`` (of one slot) in its constructor, whose first
    argument is ``num_slots``, and implements :meth:`reset`, :meth:`observe` and :meth:`step`. It draws
    randomness only from ``self.rng``, and lists the arrays that make up its state in ``state_names``.
    """

    observation_space: spaces.Space
    action_space: spaces.Space
    #: The key of ``reset(options=...)`` and of the reset info that names a start state; None if there is one.
    start_option: ClassVar[str | None] = None
    #: The argument that says how many steps an episode may have, where that is part of the task; None elsewhere.
    budget_argument: ClassVar[str | None] = None
    #: Arguments that people expect and that the environment does not have, and why.
    takes_no: ClassVar[dict[str, str]] = {}
    #: Names of the array attributes that a checkpoint has to hold, each of leading size ``N``.
    state_names: ClassVar[tuple[str, ...]] = ()
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    #: bool ``[N]``, slots that a time limit of the task itself has cut off in the last step; None where it has none.
    cut: np.ndarray | None = None

    def __init__(self, num_slots: int) -> None:
        check_range(1, num_envs=num_slots)
        self.num_slots = num_slots
        self.rng = SlotRNG(num_slots)

    @classmethod
    def check_arguments(cls, owner: str, given: dict[str, Any]) -> None:
        """Raise a TypeError for the first argument of an environment that the constructor does not take."""
        check_keywords(owner, cls.__init__, given, cls.takes_no)

    @property
    def budget(self) -> int | None:
        """The most steps of an episode, where that is part of the task."""
        return None if self.budget_argument is None else getattr(self, self.budget_argument)

    @abstractmethod
    def reset(self, slots: np.ndarray, starts: list[Any] | None) -> dict[str, np.ndarray]:
        """Start a new episode in ``slots``.

        Args:
            slots: Indices of the slots to reset, int ``[k]``.
            starts: One start state for each of them (an entry may be None: draw it), or None to draw all.

        Returns:
            The reset info: arrays of length ``k``.
        """

    @abstractmethod
    def observe(self) -> Any:
        """A fresh batch of observations, one for each of the ``N`` slots."""

    @abstractmethod
    def step(
        self, actions: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Step every slot for which ``active`` is true; what it returns for the others is ignored.

        Args:
            actions: ``[N]``, already checked to lie in the action space.
            active: bool ``[N]``.

        Returns:
            rewards float64 ``[N]``; terminated bool ``[N]``; the step info, arrays of length ``N`` or
            :class:`Partial`; the info that exists only at the end of an episode, arrays with one entry for each slot
            that is active and terminated (or :attr:`cut`), in slot order.
        """

    def render(self, slot: int, mode: str) -> Any:
        """Draw one slot in ``mode``, one of ``metadata["render_modes"]``."""
        raise ValueError(f"{type(self).__name__} cannot be rendered as {mode!r}")

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that a later :meth:`set_state` needs to go on exactly from here."""
        state = {name: np.array(getattr(self, name)) for name in self.state_names}
        return state | {"rng.key": self.rng.key.copy(), "rng.counter": self.rng.counter.copy()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what :meth:`get_state` returned."""
        for name in self.state_names:
            getattr(self, name)[...] = state[name]
        self.rng.key[...] = state["rng.key"]
        self.rng.counter[...] = state["rng.counter"]


def _check_time_limit(dynamics: Dynamics, max_episode_steps: int | None) -> None:
    """Raise a ValueError for a time limit that would cut off the step on which the score is paid."""
    name, budget = dynamics.budget_argument, dynamics.budget
    if budget is not None and max_episode_steps is not None and max_episode_steps < budget:
        raise ValueError(
            f"max_episode_steps={max_episode_steps} would cut responses off before they are scored; the budget of this "
            f"environment is {name}={budget}: set {name}={max_episode_steps} instead"
        )


def _adopt_signature(cls: type, own: list[inspect.Parameter]) -> None:
    """Show the constructor arguments of a class's dynamics in the class's own signature."""
    dynamics = getattr(cls, "dynamics_class", None)
    if dynamics is not None:
        theirs = list(inspect.signature(dynamics).parameters.values())[1:]
        theirs = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in theirs]
        cls.__signature__ = inspect.Signature(own + theirs)


def _slot_key(generator: np.random.Generator) -> np.uint64:
    return generator.integers(0, 2**64, dtype=np.uint64)


def _check_start_options(dynamics: Dynamics, options: dict[str, Any] | None, extra: tuple[str, ...]) -> None:
    known = [*dynamics_start_keys(dynamics), *extra]
    for name in options or {}:
        if name not in known:
            what = did_you_mean(name, known) if known else "This environment takes no options."
            raise ValueError(f"reset(options=...) got the unknown key {name!r}. {what}")


def dynamics_start_keys(dynamics: Dynamics) -> tuple[str, ...]:
    """The keys of ``reset(options=...)`` that name a start state."""
    extra = getattr(dynamics, "extra_start_options", ())
    return ((dynamics.start_option,) if dynamics.start_option else ()) + tuple(extra)


def _start_of(dynamics: Dynamics, options: dict[str, Any] | None) -> Any:
    """The value of the one start option that is given, or None."""
    given = {name: (options or {}).get(name) for name in dynamics_start_keys(dynamics)}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(
            f"reset(options=...) takes one of {dynamics_start_keys(dynamics)}, got several: {options}"
        )
    for name, value in given.items():
        _check_start_type(name, value, dynamics)
        return value
    return None


def _check_start_type(name: str, value: Any, dynamics: Dynamics) -> None:
    """Raise a ValueError for a number where a text belongs, or the other way round."""
    keys = dynamics_start_keys(dynamics)
    texts, other = name != dynamics.start_option, next((key for key in keys if key != name), None)
    for start in value if isinstance(value, (list, tuple)) or np.ndim(value) else [value]:
        number = isinstance(start, (int, np.integer)) and not isinstance(start, bool)
        # A number that is no integer is left to dynamics with texts, which know what the numbers stand for.
        wrong = (
            not isinstance(start, str) if texts else isinstance(start, str) or (other is None and not number)
        )
        if start is not None and wrong:
            hint = f"; options[{other!r}] takes {'an integer' if texts else 'a text'}" if other else ""
            raise ValueError(
                f"options[{name!r}] must be {'a text' if texts else 'an integer'}, got {start!r}{hint}"
            )


def parse_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """An autoreset mode, also from its name in any of the usual spellings.

    Args:
        mode: Gymnasium's enum, "same-step", "SAME_STEP" or "SameStep", and so on for next-step and disabled.

    Raises:
        ValueError: It is none of the three.
    """
    for known in AutoresetMode:
        if mode is known or (isinstance(mode, str) and _plain(mode) == _plain(known.name)):
            return known
    names = [known.value for known in AutoresetMode]
    raise ValueError(f"autoreset_mode={mode!r} is not known; expected one of {names}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _has(value: np.ndarray | Partial, slot: int) -> bool:
    return not isinstance(value, Partial) or bool(value.mask[slot])


class DynamicsEnv(gym.Env):
    """One slot of a :class:`Dynamics` as an ordinary Gymnasium environment."""

    dynamics_class: ClassVar[type[Dynamics]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "dynamics_class" in vars(cls):
            cls.metadata = dict(cls.dynamics_class.metadata)
            cls.metadata["start_option"] = cls.dynamics_class.start_option
            keyword_only = inspect.Parameter.KEYWORD_ONLY
            _adopt_signature(cls, [inspect.Parameter("render_mode", keyword_only, default=None)])

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any) -> None:
        self.dynamics_class.check_arguments(type(self).__name__, kwargs)
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(
                f"render_mode={render_mode!r} is not one of {self.metadata['render_modes']} "
                f"for {type(self).__name__}"
            )
        self.dynamics = self.dynamics_class(1, **kwargs)
        self.observation_space = self.dynamics.observation_space
        self.action_space = self.dynamics.action_space
        self.render_mode = render_mode
        self._seeded = False
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        _check_start_options(self.dynamics, options, ())
        if seed is not None or not self._seeded:
            self.dynamics.rng.seed(np.array([0]), np.array([_slot_key(self.np_random)]))
            self._seeded = True
        info = self.dynamics.reset(np.array([0]), [_start_of(self.dynamics, options)])
        self._running = True
        return self._first(self.dynamics.observe()), self._scalars(info)

    def step(self, action):
        if not self._running:
            raise gym.error.ResetNeeded(
                f"{type(self).__name__}.step() was called without an episode under way; call reset() first"
            )
        if not self.action_space.contains(action):
            raise ValueError(
                f"{type(self).__name__}.step() got the action {action!r}, "
                f"which is not in the action space {self.action_space}"
            )
        actions = np.asarray(action)[None]
        rewards, terminated, info, final = self.dynamics.step(actions, np.ones(1, dtype=bool))
        done, cut = bool(terminated[0]), self.dynamics.cut is not None and bool(self.dynamics.cut[0])
        self._running = not (done or cut)
        info = self._scalars(info | final if done or cut else info)
        return self._first(self.dynamics.observe()), float(rewards[0]), done, cut, info

    def render(self):
        if self.render_mode is None:
            gym.logger.warn(
                "render() was called without a render mode: "
                f'gym.make(..., render_mode="{(self.metadata["render_modes"] or ["ansi"])[0]}")'
            )
            return None
        return self.dynamics.render(0, self.render_mode)

    def get_state(self) -> dict[str, np.ndarray]:
        """The exact state, as arrays, for checkpoints."""
        return self.dynamics.get_state() | {"running": np.array([self._running, self._seeded])}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self.dynamics.set_state(state)
        self._running, self._seeded = (bool(x) for x in state["running"])

    @staticmethod
    def _first(batch: Any) -> Any:
        if isinstance(batch, dict):
            return {name: value[0] for name, value in batch.items()}
        return batch[0]

    @staticmethod
    def _scalars(info: dict[str, np.ndarray]) -> dict[str, Any]:
        """The first entry of each array, as a Python scalar where it is one."""
        whole = {n: v.values if isinstance(v, Partial) else v for n, v in info.items() if _has(v, 0)}
        first = {name: value[0] for name, value in whole.items()}
        return {name: v.item() if isinstance(v, np.generic) else v for name, v in first.items()}


class DynamicsVectorEnv(gym.vector.VectorEnv):
    """``num_envs`` slots of a :class:`Dynamics` as a native Gymnasium vector environment.

    Follows Gymnasium's conventions: ``_key`` masks beside every info array, ``final_obs`` and ``final_info``
    under SAME_STEP autoreset (the default here), ``options["reset_mask"]`` for partial resets. The start
    option takes one value for all slots or one for each slot (None entries are drawn).
    """

    dynamics_class: ClassVar[type[Dynamics]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "dynamics_class" in vars(cls):
            keyword_only = inspect.Parameter.KEYWORD_ONLY
            defaults = {
                "num_envs": 1,
                "autoreset_mode": AutoresetMode.SAME_STEP,
                "max_episode_steps": None,
                "render_mode": None,
            }
            own = [inspect.Parameter(name, keyword_only, default=value) for name, value in defaults.items()]
            _adopt_signature(cls, own)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.dynamics_class.check_arguments(type(self).__name__, kwargs)
        self.dynamics = self.dynamics_class(num_envs, **kwargs)
        self.num_envs = num_envs
        self.autoreset_mode = parse_autoreset_mode(autoreset_mode)
        self.metadata = dict(self.dynamics.metadata)
        self.metadata["autoreset_mode"] = self.autoreset_mode
        self.metadata["start_option"] = self.dynamics.start_option
        self.render_mode = render_mode
        self.max_episode_steps = max_episode_steps
        _check_time_limit(self.dynamics, max_episode_steps)
        self.single_observation_space = self.dynamics.observation_space
        self.single_action_space = self.dynamics.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seeded = False
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        # A finished slot waits for its reset; before the first reset every slot does.
        self._finished = np.ones(num_envs, dtype=bool)
        self._all = np.ones(num_envs, dtype=bool)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        _check_start_options(self.dynamics, options, ("reset_mask",))
        mask = self._reset_mask(options)
        slots = np.flatnonzero(mask)
        self._seed_slots(seed, mask)
        info = self.dynamics.reset(slots, self._starts(options, slots))
        self._elapsed[slots] = 0
        self._finished[slots] = False
        infos: dict[str, Any] = {}
        self._put(infos, info, mask)
        return self.dynamics.observe(), infos

    def step(self, actions):
        active = self._active_slots()
        actions = self._check_actions(actions)
        rewards, terminated, info, final = self.dynamics.step(actions, active)
        if active is not self._all:
            rewards, terminated = np.where(active, rewards, 0.0), terminated & active
        self._elapsed += active
        cut = self.dynamics.cut
        truncated = np.zeros(self.num_envs, dtype=bool) if cut is None else cut & active
        ended = terminated | truncated  # those that the task itself has ended, and tells more of
        if self.max_episode_steps is not None:
            # Like Gymnasium's TimeLimit, the last step may be both terminated and truncated.
            truncated = truncated | (active & (self._elapsed >= self.max_episode_steps))
        done = terminated | truncated
        infos: dict[str, Any] = {}
        resets = done if self.autoreset_mode is AutoresetMode.SAME_STEP else ~active
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            self._put_step(infos, info, ~done)
            if done.any():
                self._put_final(infos, info, final, ended, done)
        else:
            self._put_step(infos, info, active)
            self._put(infos, final, ended)
            self._finished |= done
        if resets.any():
            slots = np.flatnonzero(resets)
            self._put(infos, self.dynamics.reset(slots, None), resets)
            self._elapsed[slots] = 0
            self._finished[slots] = False
        return self.dynamics.observe(), rewards, terminated, truncated, infos

    def render(self):
        if self.render_mode is None:
            return None
        return tuple(self.dynamics.render(slot, self.render_mode) for slot in range(self.num_envs))

    def get_state(self) -> dict[str, np.ndarray]:
        """The exact state of every slot, as arrays, for checkpoints."""
        own = {"elapsed": self._elapsed, "finished": self._finished, "seeded": np.array([self._seeded])}
        return self.dynamics.get_state() | {name: value.copy() for name, value in own.items()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self.dynamics.set_state(state)
        self._elapsed[...] = state["elapsed"]
        self._finished[...] = state["finished"]
        self._seeded = bool(state["seeded"][0])

    def _seed_slots(self, seed: int | list[int | None] | None, mask: np.ndarray) -> None:
        """Key the streams as ``num_envs`` single envs with seeds ``seed, seed + 1, ...`` would be."""
        if isinstance(seed, (int, np.integer)):
            seed = [int(seed) + i for i in range(self.num_envs)]
        if seed is None:
            # Unseeded: fresh entropy once, then the streams go on.
            seeds = [None] * self.num_envs
            wanted = mask if not self._seeded else np.zeros_like(mask)
        else:
            if len(seed) != self.num_envs:
                raise ValueError(f"reset(seed=...) got {len(seed)} seeds for num_envs={self.num_envs}")
            seeds = list(seed)
            wanted = mask & np.array([s is not None for s in seeds])
        for slot in np.flatnonzero(wanted):
            generator, _ = seeding.np_random(seeds[slot])
            self.dynamics.rng.seed(np.array([slot]), np.array([_slot_key(generator)]))
        self._seeded = True

    def _reset_mask(self, options: dict[str, Any] | None) -> np.ndarray:
        mask = (options or {}).get("reset_mask")
        if mask is None:
            return self._all.copy()
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (self.num_envs,):
            raise ValueError(
                f"options['reset_mask'] must be a bool array of shape ({self.num_envs},), got {mask!r}"
            )
        if not mask.any():
            raise ValueError("options['reset_mask'] selects no slot; at least one entry must be True")
        return mask

    def _starts(self, options: dict[str, Any] | None, slots: np.ndarray) -> list[Any] | None:
        """One start for each of ``slots``, from one value for all or one for each of the N slots."""
        start = _start_of(self.dynamics, options)
        if start is None:
            return None
        if isinstance(start, (str, int, np.integer)) or (isinstance(start, np.ndarray) and start.ndim == 0):
            return [start] * len(slots)
        if len(start) != self.num_envs:
            raise ValueError(
                f"options[{self.dynamics.start_option!r}] must be one start or one for each of the "
                f"{self.num_envs} slots, got {len(start)}"
            )
        return [start[slot] for slot in slots]

    def _active_slots(self) -> np.ndarray:
        if not self._finished.any():
            return self._all
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and self._seeded:
            return ~self._finished
        raise gym.error.ResetNeeded(
            f"{type(self).__name__}.step() was called while slots {np.flatnonzero(self._finished).tolist()} "
            "have no episode under way; call reset(), with options={'reset_mask': ...} to reset only those"
        )

    def _check_actions(self, actions: Any) -> np.ndarray:
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(
                f"{type(self).__name__}.step() takes actions of shape {self.action_space.shape} "
                f"(num_envs={self.num_envs}), got {actions.shape}"
            )
        space = self.single_action_space
        if isinstance(space, spaces.Discrete):
            if actions.dtype.kind not in "iu" or actions.min() < 0 or actions.max() >= space.n:
                raise ValueError(
                    f"{type(self).__name__}.step() got actions outside the action space {space}: {actions!r}"
                )
        elif not self.action_space.contains(actions.astype(self.action_space.dtype)):
            raise ValueError(
                f"{type(self).__name__}.step() got actions outside the action space {space}: {actions!r}"
            )
        return actions

    def _put(self, infos: dict[str, Any], values: dict[str, np.ndarray], mask: np.ndarray) -> None:
        """Scatter ``values`` (one for each True of ``mask``) into ``[N]`` arrays with ``_key`` masks."""
        if not mask.any():
            return
        for name, value in values.items():
            value = np.asarray(value)
            if name not in infos:
                empty = None if value.dtype == object else np.zeros((), dtype=value.dtype)
                infos[name] = np.full((self.num_envs, *value.shape[1:]), empty, dtype=value.dtype)
                infos[f"_{name}"] = np.zeros(self.num_envs, dtype=bool)
            infos[name][mask] = value
            infos[f"_{name}"] |= mask

    def _put_step(
        self, infos: dict[str, Any], info: dict[str, np.ndarray | Partial], mask: np.ndarray
    ) -> None:
        """The step info of the slots of ``mask``, each value where there is one."""
        for name, value in info.items():
            if isinstance(value, Partial):
                where = mask & value.mask
                self._put(infos, {name: value.values[where]}, where)
            else:
                self._put(infos, {name: value[mask]}, mask)

    def _put_final(
        self,
        infos: dict[str, Any],
        info: dict[str, np.ndarray],
        final: dict[str, np.ndarray],
        ended: np.ndarray,
        done: np.ndarray,
    ) -> None:
        observations, slots = self.dynamics.observe(), np.flatnonzero(done)
        final_obs = np.full(self.num_envs, None, dtype=object)
        if isinstance(observations, dict):
            columns = zip(*(value[slots] for value in observations.values()), strict=True)
            rows = map(dict, map(zip, itertools.repeat(observations), columns))
        else:
            rows = observations[slots]
        for slot, row in zip(slots.tolist(), rows, strict=True):
            final_obs[slot] = row
        final_info: dict[str, Any] = {}
        self._put_step(final_info, info, done)
        self._put(final_info, final, ended)
        infos |= {"final_obs": final_obs, "_final_obs": done.copy()}
        infos |= {"final_info": final_info, "_final_info": done.copy()}
