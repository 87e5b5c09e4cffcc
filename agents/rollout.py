"""What an agent learns from, and the three ways of collecting it.

A :class:`Rollout` is a set of ``[B, T]`` tensors with a mask: segments of ``n_steps`` (``collect_steps``),
whole episodes stepped through any Gymnasium vector env (``collect_episodes``), or whole episodes from an
environment that can run them at once (``collect_fused``). Which one it was makes no difference afterwards.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from agents import maths
from textrl_env.language_model import pack_sequences

if TYPE_CHECKING:
    from agents.base import Agent


@dataclasses.dataclass
class Rollout:
    """``B`` segments or episodes of ``T`` steps.

    Attributes:
        inputs: What the policy needs to say log-probabilities again; each tensor leads with ``B``.
        actions: ``[B, T]``, or ``[B, T, A]`` for continuous actions.
        rewards: ``[B, T]``.
        log_probs: ``[B, T]``, of the policy that acted.
        values: ``[B, T]``, the critic's; 0 without one.
        next_values: ``[B, T]``, the critic's of the next state; 0 after a termination.
        mask: bool ``[B, T]``, the steps that the policy wrote.
        done: bool ``[B, T]``, last steps of episodes.
        ref_log_probs: ``[B, T]`` of the reference, where the environment has one.
        penalties: ``[B, T]``, what the KL has taken off the rewards (>= 0 in expectation), where it has.
        advantages: ``[B, T]``, set by the agent.
        returns: ``[B, T]``, the critic's targets, set by the agent.
        group: int ``[B]``, the start state that each episode shares with its group, for logs and tests.
    """

    inputs: dict[str, Tensor]
    actions: Tensor
    rewards: Tensor
    log_probs: Tensor
    values: Tensor
    next_values: Tensor
    mask: Tensor
    done: Tensor
    ref_log_probs: Tensor | None = None
    penalties: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    group: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def lengths(self) -> Tensor:
        """Number of real steps of each row, int64 ``[B]``."""
        return self.mask.sum(1)

    def _map(self, function: Any) -> Rollout:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        inputs = {name: function(tensor) for name, tensor in fields.pop("inputs").items()}
        return Rollout(inputs, **{n: None if t is None else function(t) for n, t in fields.items()})

    def __getitem__(self, rows: Tensor) -> Rollout:
        """The rows at the given indices."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Rollout:
        """On another device."""
        return self if self.mask.device == device else self._map(lambda tensor: tensor.to(device))

    def flatten_steps(self) -> Rollout:
        """Every real step a row of its own, ``[sum(mask), 1]``; only for inputs that lead with ``[B, T]``."""
        group = self.group
        flat = dataclasses.replace(self, group=None)._map(lambda tensor: tensor[self.mask].unsqueeze(1))
        if group is not None:
            flat.group = group.repeat_interleave(self.lengths)
        return flat

    def minibatches(self, batch_size: int | None, generator: np.random.Generator) -> Iterator[Rollout]:
        """All rows once, in shuffled minibatches; None is one batch in the order it was collected."""
        if batch_size is None or batch_size >= len(self):
            yield self
            return
        order = torch.from_numpy(generator.permutation(len(self))).to(self.mask.device)
        for start in range(0, len(self), batch_size):
            yield self[order[start : start + batch_size]]

    def micro_batches(self, size: int | None) -> Iterator[tuple[Rollout, Tensor]]:
        """Pieces of at most ``size`` rows of like length, each with its row indices."""
        if size is None or size >= len(self):
            yield self, torch.arange(len(self), device=self.mask.device)
            return
        order = self.lengths.argsort(stable=True)
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            yield self[rows], rows


def _float(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


class _StepBuffer:
    """Lists of per-step arrays ``[N]``, stacked to ``[N, T]`` at the end."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {}
        self.observations: list[Any] = []

    def add(self, observation: Any, **columns: np.ndarray) -> None:
        self.observations.append(observation)
        for name, value in columns.items():
            self.columns.setdefault(name, []).append(value)

    def stack(self, name: str) -> np.ndarray:
        return np.stack(self.columns[name], axis=1)  # [N, T, ...]


def _final_observations(infos: dict, wanted: np.ndarray, like: Any) -> Any:
    """The final observations of the wanted slots as a batch shaped like ``like``; other rows are zero."""
    rows = np.flatnonzero(wanted)
    if isinstance(like, dict):
        batch = {name: np.zeros_like(value) for name, value in like.items()}
        for row in rows:
            for name in batch:
                batch[name][row] = infos["final_obs"][row][name]
        return batch
    batch = np.zeros_like(like)
    for row in rows:
        batch[row] = infos["final_obs"][row]
    return batch


def _step(agent: Agent, observation: Any, alive: np.ndarray, buffer: _StepBuffer):
    """One step of every slot, recorded; returns the next observation, done and the infos."""
    envs, policy = agent.env, agent.policy
    actions, log_probs, values = policy.act(observation)
    following, rewards, terminated, truncated, infos = envs.step(policy.to_env(actions))
    bootstrap = np.zeros(len(alive))
    same_step = agent.autoreset_mode is AutoresetMode.SAME_STEP
    cut = truncated & ~terminated & alive
    if policy.has_critic and cut.any():
        final = _final_observations(infos, cut, following) if same_step else following
        bootstrap = np.where(cut, policy.predict_values(final), 0.0)
    done = terminated | truncated
    ends = infos.get("final_info", {}) if same_step else infos
    columns = {"ref_logprob": 0.0, "kl": 0.0}
    for name in columns:
        if name in infos or name in ends:
            running = np.asarray(infos.get(name, np.zeros(len(alive))))
            columns[name] = np.where(done, ends[name], running) if name in ends else running
    buffer.add(
        observation,
        actions=actions,
        log_probs=log_probs,
        values=values,
        rewards=rewards,
        terminated=terminated,
        truncated=truncated,
        bootstrap=bootstrap,
        mask=alive.copy(),
        **{n: v for n, v in columns.items() if not np.isscalar(v)},
    )
    agent.episodes.step(rewards, alive, done, ends)
    return following, done, infos


def _assemble(agent: Agent, buffer: _StepBuffer, last_values: np.ndarray) -> Rollout:
    stack = buffer.stack
    mask, terminated, truncated = stack("mask"), stack("terminated"), stack("truncated")
    values = stack("values")
    next_values = maths.shift_values(values, last_values, mask, terminated | truncated)
    next_values = next_values + stack("bootstrap")
    actions = stack("actions")
    has_reference = "ref_logprob" in buffer.columns
    return Rollout(
        inputs=agent.policy.stack(buffer.observations, actions, mask),
        actions=torch.from_numpy(actions),
        rewards=_float(stack("rewards") * mask),
        log_probs=_float(stack("log_probs") * mask),
        values=_float(values * mask),
        next_values=_float(next_values * mask),
        mask=torch.from_numpy(mask),
        done=torch.from_numpy((terminated | truncated) & mask),
        ref_log_probs=_float(stack("ref_logprob") * mask) if has_reference else None,
        penalties=_float((agent.kl_coef or 0.0) * stack("kl") * mask) if has_reference else None,
    )


def collect_steps(agent: Agent, n_steps: int) -> Rollout:
    """Step every slot ``n_steps`` times, going on where the last rollout stopped."""
    buffer = _StepBuffer()
    observation, waiting = agent.last_obs, agent.waiting
    for _ in range(n_steps):
        # Under NEXT_STEP autoreset the step after an end is a reset in disguise: action ignored, reward 0.
        alive = ~waiting
        observation, done, _ = _step(agent, observation, alive, buffer)
        if agent.autoreset_mode is AutoresetMode.NEXT_STEP:
            waiting = done & alive
        elif agent.autoreset_mode is AutoresetMode.DISABLED and done.any():
            observation, _ = agent.env.reset(options={"reset_mask": done})
        if not agent.count_steps(int(alive.sum()), done & alive):
            break
    agent.last_obs, agent.waiting = observation, waiting
    last = agent.policy.predict_values(observation) if agent.policy.has_critic else np.zeros(len(waiting))
    return _assemble(agent, buffer, last)


def collect_episodes(agent: Agent, n_episodes: int, group_size: int = 1) -> Rollout:
    """Run whole episodes through the step interface, in waves of ``num_envs``.

    Every episode that is started is run to its end, so short ones are not over-represented. The
    ``group_size`` answers of a group are neighbours and share their start: the env's own start option where
    it has one, the same reset seed anywhere else.
    """
    # A group of one needs no common start, so nothing is asked of the env but a reset.
    starts = _draw_starts(agent, n_episodes // group_size) if group_size > 1 else [None] * n_episodes
    starts = [start for start in starts for _ in range(group_size)]
    waves = []
    for first in range(0, n_episodes, agent.num_envs):
        waves.append(_run_wave(agent, starts[first : first + agent.num_envs]))
        if agent.stopped:
            break
    rollout = concatenate(waves)
    rollout.group = torch.arange(len(rollout)) // group_size
    return rollout


def _draw_starts(agent: Agent, count: int) -> list[Any]:
    """``count`` start states: values of the env's start option, or reset seeds."""
    option = agent.env.metadata.get("start_option")
    if option is None:
        return agent.rng.integers(0, 2**31 - 1, size=count).tolist()
    starts: list[Any] = []
    while len(starts) < count:
        _, infos = agent.env.reset()
        starts += np.asarray(infos[option]).tolist()
    return starts[:count]


def _reset_to(agent: Agent, starts: list[Any]) -> Any:
    """Reset every slot to its start; slots beyond the last start run along and are not recorded."""
    option = agent.env.metadata.get("start_option")
    if starts[0] is None:
        return agent.env.reset()[0]
    padded = starts + starts[:1] * (agent.num_envs - len(starts))
    if option is not None:
        return agent.env.reset(options={option: padded})[0]
    try:
        return agent.env.reset(seed=padded)[0]
    except (gym.error.Error, TypeError) as error:
        raise ValueError(
            f"groups of {agent.group_size} need episodes with a common start, but {agent.env} takes neither a "
            'start option nor one seed for each slot; make it with vectorization_mode="sync"'
        ) from error


def _run_wave(agent: Agent, starts: list[Any]) -> Rollout:
    observation = _reset_to(agent, starts)
    alive = np.arange(agent.num_envs) < len(starts)
    buffer = _StepBuffer()
    while alive.any():
        observation, done, _ = _step(agent, observation, alive, buffer)
        proceed = agent.count_steps(int(alive.sum()), done & alive)
        alive = alive & ~done
        if agent.autoreset_mode is AutoresetMode.DISABLED and done.any() and alive.any():
            observation, _ = agent.env.reset(options={"reset_mask": done})
        if not proceed:
            agent.stopped = True
    rollout = _assemble(agent, buffer, np.zeros(agent.num_envs))
    return rollout[torch.arange(len(starts))]


def concatenate(waves: list[Rollout]) -> Rollout:
    """Stack rollouts of different lengths, padded at the end of time; ``group`` is the caller's to number."""
    if len(waves) == 1:
        return waves[0]
    width = max(wave.mask.shape[1] for wave in waves)

    def join(tensors: list[Tensor]) -> Tensor:
        padded = []
        for tensor in tensors:
            missing = width - tensor.shape[1]
            pad = tensor.new_zeros((len(tensor), missing, *tensor.shape[2:]))
            padded.append(torch.cat([tensor, pad], dim=1))
        return torch.cat(padded)

    fields = {}
    for field in dataclasses.fields(Rollout):
        values = [getattr(wave, field.name) for wave in waves]
        if field.name in ("inputs", "group"):
            continue
        fields[field.name] = None if values[0] is None else join(values)
    return Rollout(inputs=_join_inputs(waves, width, join), **fields)


def _join_inputs(waves: list[Rollout], width: int, join: Any) -> dict[str, Tensor]:
    inputs = [wave.inputs for wave in waves]
    if "input_ids" not in inputs[0]:
        return {name: join([each[name] for each in inputs]) for name in inputs[0]}
    # Token sequences: prompts are padded on the left, responses on the right.
    after = [wave.mask.shape[1] for wave in waves]
    before = [each["input_ids"].shape[1] - steps for each, steps in zip(inputs, after, strict=True)]
    padding = [(max(before) - b, width - a) for b, a in zip(before, after, strict=True)]
    return {
        name: torch.cat(
            [torch.nn.functional.pad(each[name], pad) for each, pad in zip(inputs, padding, strict=True)]
        )
        for name in inputs[0]
    }


def collect_fused(agent: Agent, n_episodes: int, group_size: int = 1) -> Rollout:
    """Whole episodes at once from an environment that has ``run_episodes``."""
    env, policy = agent.text_env, agent.policy
    prompt_ids = np.repeat(env.draw_prompts(n_episodes // group_size), group_size)
    evaluation = None

    def generate(prompts: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        nonlocal evaluation
        responses, log_probs = policy.generate(prompts, env.max_new_tokens)
        if policy.has_critic or policy.autocast:
            # One pass for the values also says the log-probabilities as the update will.
            evaluation = _evaluate_responses(agent, prompts, responses)
            log_probs = [row[: len(r)] for row, r in zip(evaluation[0], responses, strict=True)]
        return responses, log_probs

    episodes = env.run_episodes(generate, prompt_ids)
    agent.record_text_episodes(episodes)
    input_ids, attention_mask, _ = pack_sequences(
        episodes.prompt_tokens, [t[m] for t, m in zip(episodes.tokens, episodes.mask, strict=True)]
    )
    mask = episodes.mask
    done = np.zeros_like(mask)
    done[np.arange(len(mask)), mask.sum(1) - 1] = True
    values = np.zeros(mask.shape) if evaluation is None else evaluation[1] * mask
    rollout = Rollout(
        inputs={"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)},
        actions=torch.from_numpy(episodes.tokens),
        rewards=_float(episodes.rewards),
        log_probs=_float(episodes.log_prob),
        values=_float(values),
        next_values=_float(maths.shift_values(values, np.zeros(len(mask)), mask, done) * mask),
        mask=torch.from_numpy(mask),
        done=torch.from_numpy(done),
        ref_log_probs=_float(episodes.ref_logprob),
        penalties=_float(env.kl_coef * episodes.kl),
        group=torch.from_numpy(np.arange(len(mask)) // group_size),
    )
    for t in range(mask.shape[1]):
        if not agent.count_steps(int(mask[:, t].sum()), done[:, t]):
            agent.stopped = True
    return rollout


@torch.no_grad()
def _evaluate_responses(
    agent: Agent, prompts: list[np.ndarray], responses: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and values ``[B, T]`` of given responses, by the policy's own evaluation."""
    input_ids, attention_mask, steps = pack_sequences(prompts, responses)
    mask = torch.from_numpy(attention_mask[:, -steps:].astype(bool))
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
    zeros = torch.zeros(mask.shape)
    batch = Rollout(inputs, inputs["input_ids"][:, -steps:], zeros, zeros, zeros, zeros, mask, mask)
    log_probs, values = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for micro, rows in batch.to(agent.device).micro_batches(agent.micro_batch_size):
        new = agent.policy.evaluate(micro)
        log_probs[rows.cpu()] = new.log_probs.float().cpu()
        if new.values is not None:
            values[rows.cpu()] = new.values.float().cpu()
    return log_probs.double().numpy(), values.double().numpy()


def make_envs(
    env: Any, num_envs: int, env_kwargs: dict[str, Any] | None = None, seeded_slots: bool = False
) -> gym.vector.VectorEnv:
    """A Gymnasium vector env from an id, an env or a vector env.

    Ids with a native vector env use it; other ids and single envs are stepped one after another under
    SAME_STEP autoreset. ``seeded_slots`` asks for one that can start several slots alike.
    """
    if isinstance(env, gym.vector.VectorEnv):
        return env
    vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    if isinstance(env, gym.Env):
        return gym.vector.SyncVectorEnv([lambda: env], **vector_kwargs)
    if not isinstance(env, str):
        raise TypeError(f"env must be a Gymnasium id, an env or a vector env, got {type(env).__name__}")
    module, _, name = env.rpartition(":")  # Gymnasium's form "module:id" imports the module first
    importlib.import_module(module or "textrl_env")
    env = name

    spec = gym.spec(env)
    ours = str(spec.entry_point).startswith("textrl_env")
    if spec.vector_entry_point is not None and (ours or not seeded_slots):
        return gym.make_vec(env, num_envs=num_envs, **(env_kwargs or {}))
    return gym.make_vec(
        env,
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs=vector_kwargs,
        **(env_kwargs or {}),
    )
