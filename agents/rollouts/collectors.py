"""The three ways of collecting a rollout; which one it was makes no difference afterwards.

Segments of ``n_steps`` (:func:`collect_steps`), whole episodes stepped through any Gymnasium vector env
(:func:`collect_episodes`), or whole episodes from an environment that can run them at once
(:func:`collect_fused`).
"""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from agents.algorithms import maths
from agents.parallel.processes import Processes
from agents.parallel.rewards import shared_rewards
from agents.policies.base import Evaluation, Policy
from agents.rollouts.ahead import Ahead
from agents.rollouts.episode_log import EpisodeLog
from agents.rollouts.observations import copied, zeros_with_rows
from agents.rollouts.rollout import Rollout, concatenate
from agents.rollouts.step_infos import fused_step, step_infos
from agents.rollouts.vector_envs import kl_envs, longest_episode, start_option
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.streams import Streams
from textrl_env.protocols import TextEnv


class Collecting(Protocol):
    """What a collector reads and moves on of the agent that it collects for.

    Attributes:
        envs: The vector env.
        text_env: The env whose fused way is taken, or None.
        policy: Acts.
        ahead: Has written responses before they are asked for; None where nobody does.
        device: Where the policy evaluates.
        autoreset_mode: Of ``envs``.
        num_envs: Slots of ``envs``.
        last_obs: Observations after the last step.
        waiting: bool ``[N]``, slots whose next step is a reset (NEXT_STEP autoreset).
        episodes: The log of finished episodes.
        rng: Draws the starts of groups.
        sde_sample_freq: Steps after which state-dependent exploration is drawn anew; -1 is once in a rollout.
        group_size: Episodes that share a start.
        batch_size: Rows of a minibatch, or None.
        micro_batch_size: Rows evaluated at once, or None.
        kl_coef: The env's KL coefficient, or None.
        num_timesteps: Steps taken so far.
        total_timesteps: Steps that were asked for.
        stopped: Whether a callback has asked to stop.
        processes: Who shares the work.
    """

    envs: gym.vector.VectorEnv
    text_env: TextEnv | None
    policy: Policy
    ahead: Ahead | None
    device: torch.device
    autoreset_mode: AutoresetMode
    num_envs: int
    last_obs: Any
    waiting: np.ndarray
    episodes: EpisodeLog
    rng: np.random.Generator
    sde_sample_freq: int
    group_size: int
    batch_size: int | None
    micro_batch_size: int | None
    kl_coef: float | None
    num_timesteps: int
    total_timesteps: int | None
    stopped: bool
    processes: Processes

    def count_steps(self, steps: int, done: np.ndarray, **step: Any) -> bool:
        """Count env steps and call the callbacks, which find ``step`` in their locals; False asks to stop."""
        ...

    def record_text_episodes(self, episodes: Any) -> None:
        """Note whole episodes of the fused way, for the log."""
        ...


def _float(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _double(array: np.ndarray) -> Tensor:
    """Rewards are float64, as environments give them, until their differences have been taken."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))


class _StepBuffer:
    """Lists of per-step arrays ``[N]``, stacked to ``[N, T]`` at the end.

    Args:
        ours: The environments of ours behind the infos, which charge a KL; found once, as looking for them takes longer
            than a step of a small network.

    Attributes:
        scored: Whether the infos have a reference and a score.
        turns: Whether they say where turns end.
    """

    def __init__(self, ours: list[Any]) -> None:
        self.scored = bool(ours)
        self.turns = any(hasattr(env, "max_turns") for env in ours)
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
    if "final_obs" not in infos:
        raise ValueError(
            "the vector env says that it resets within the step (autoreset_mode SAME_STEP) and has ended an episode, "
            'but its infos have no "final_obs", which a critic needs of episodes that were cut off'
        )
    return zeros_with_rows(like, {int(slot): infos["final_obs"][slot] for slot in np.flatnonzero(wanted)})


def _kl_columns(infos: dict, ends: dict, done: np.ndarray) -> dict[str, np.ndarray]:
    """What an environment of ours says of its reference in each step: ``ref_logprob`` and ``kl``, each ``[N]``."""
    columns = {}
    for name in ("ref_logprob", "kl"):
        if name in infos or name in ends:
            running = np.asarray(infos.get(name, np.zeros(len(done))))
            columns[name] = np.where(done, ends[name], running) if name in ends else np.array(running)
    return columns


def _turn_columns(infos: dict, ends: dict, done: np.ndarray) -> dict[str, np.ndarray]:
    """Where a turn has just ended, bool ``[N]``, and a number for what it answered, int64 ``[N]``."""
    over, state = np.zeros(len(done), dtype=bool), np.zeros(len(done), dtype=np.int64)
    for where, slots in ((infos, ~done), (ends, done)):
        if "turn" in where:
            told = slots & where["_turn"]
            over |= told
            state = np.where(told, where["turn_state"], state)
    return {"turn_over": over, "turn_state": state}


def _turns(over: np.ndarray, state: np.ndarray) -> dict[str, Tensor]:
    """Which turn each step belongs to and what that answers, from where turns end, ``[N, T]`` each."""
    turn, state = np.cumsum(over, axis=1) - over, state.copy()
    for t in range(over.shape[1] - 2, -1, -1):
        state[:, t] = np.where(over[:, t], state[:, t], state[:, t + 1])
    return {"turn": torch.from_numpy(turn), "state": torch.from_numpy(state)}


#: Why an episode of text ended that was not over.
CUT_OFF = ("length", "context")


def _is_cut(ends: dict, done: np.ndarray, cut: np.ndarray, ours: bool) -> np.ndarray:
    """Where an episode has just been cut off, bool ``[N]``: by a time limit, or a text by its budget or context."""
    if not ours or "stop_reason" not in ends:
        return cut
    reasons = ends["stop_reason"]
    return cut | np.array([bool(d) and reasons[i] in CUT_OFF for i, d in enumerate(done)])


def _is_scored(ends: dict, done: np.ndarray) -> np.ndarray:
    """False where an episode has just ended to which no reward applied, bool ``[N]``."""
    if "scored" not in ends:
        return np.ones(len(done), dtype=bool)
    told = done & np.asarray(ends.get("_scored", done), dtype=bool)
    return np.where(told, np.asarray(ends["scored"], dtype=bool), True)


def _check_rewards(rewards: np.ndarray, alive: np.ndarray, agent: Collecting) -> None:
    bad = alive & ~np.isfinite(rewards)
    if bad.any():
        slot = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"the environment gave the reward {rewards[slot]} in slot {slot} after {agent.num_timesteps} timesteps; "
            "an agent can learn from finite rewards only"
        )


def _step(agent: Collecting, observation: Any, alive: np.ndarray, buffer: _StepBuffer):
    """One step of every slot, recorded; returns the next observation, done and the infos."""
    envs, policy = agent.envs, agent.policy
    # What an env hands out is the env's: it may write its next step into the same arrays.
    observation = copied(observation)
    actions, log_probs, values = policy.act(observation)
    sent = policy.to_env(actions)
    following, rewards, terminated, truncated, infos = envs.step(sent)
    rewards = np.array(rewards, dtype=np.float64)
    terminated, truncated = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
    _check_rewards(rewards, alive, agent)
    bootstrap = np.zeros(len(alive))
    same_step = agent.autoreset_mode is AutoresetMode.SAME_STEP
    cut = truncated & ~terminated & alive
    if policy.has_critic and cut.any():
        final = _final_observations(infos, cut, following) if same_step else following
        bootstrap = np.where(cut, policy.predict_values(final), 0.0)
    done = terminated | truncated
    ends = infos.get("final_info", {}) if same_step else infos
    buffer.add(
        observation,
        actions=actions,
        log_probs=log_probs,
        values=values,
        rewards=rewards,
        terminated=terminated,
        truncated=truncated,
        cut=_is_cut(ends, done, truncated & ~terminated, buffer.scored),
        bootstrap=bootstrap,
        mask=alive.copy(),
        # In the info of any other environment "kl" is something else.
        **(_kl_columns(infos, ends, done) | {"scored": _is_scored(ends, done)} if buffer.scored else {}),
        **(_turn_columns(infos, ends, done) if buffer.turns else {}),
    )
    agent.episodes.step(rewards, alive, done, ends, buffer.scored)
    step = {
        "actions": actions,
        "clipped_actions": sent,
        "values": values,
        "log_probs": log_probs,
        "rewards": rewards,
        "new_obs": following,
        "infos": step_infos(
            agent.episodes, same_step, following, infos, done & alive, truncated & ~terminated
        ),
    }
    return following, done, step


def _assemble(agent: Collecting, buffer: _StepBuffer, last_values: np.ndarray) -> Rollout:
    stack = buffer.stack
    mask, terminated, truncated = stack("mask"), stack("terminated"), stack("truncated")
    values = stack("values")
    next_values = maths.shift_values(values, last_values, mask, terminated | truncated)
    next_values = next_values + stack("bootstrap")
    actions = stack("actions")
    has_reference = "ref_logprob" in buffer.columns
    turns = _turns(stack("turn_over"), stack("turn_state")) if "turn_over" in buffer.columns else {}
    return Rollout(
        inputs=agent.policy.stack(buffer.observations, actions, mask),
        actions=torch.from_numpy(actions),
        rewards=_double(stack("rewards") * mask),
        log_probs=_float(stack("log_probs") * mask),
        values=_float(values * mask),
        next_values=_float(next_values * mask),
        mask=torch.from_numpy(mask),
        done=torch.from_numpy((terminated | truncated) & mask),
        ref_log_probs=_float(stack("ref_logprob") * mask) if has_reference else None,
        penalties=_double((agent.kl_coef or 0.0) * stack("kl") * mask) if has_reference else None,
        cut=torch.from_numpy(stack("cut") & mask),
        **{name: value * torch.from_numpy(mask) for name, value in turns.items()},
    )


def _explore_anew(agent: Collecting, step: int) -> None:
    """Draw state-dependent exploration anew where it is time, ``step`` steps into a rollout."""
    if step == 0 or (agent.sde_sample_freq > 0 and step % agent.sde_sample_freq == 0):
        agent.policy.reset_noise(agent.num_envs)


def collect_steps(agent: Collecting, n_steps: int) -> Rollout:
    """Step every slot ``n_steps`` times, going on where the last rollout stopped."""
    buffer = _StepBuffer(kl_envs(agent.envs))
    observation, waiting = agent.last_obs, agent.waiting
    for number in range(n_steps):
        _explore_anew(agent, number)
        # Under NEXT_STEP autoreset the step after an end is a reset in disguise: action ignored, reward 0.
        alive = ~waiting
        observation, done, step = _step(agent, observation, alive, buffer)
        if agent.autoreset_mode is AutoresetMode.NEXT_STEP:
            waiting = done & alive
        elif agent.autoreset_mode is AutoresetMode.DISABLED and done.any():
            observation, _ = agent.envs.reset(options={"reset_mask": done})
        if not agent.count_steps(int(alive.sum()), done & alive, **step):
            break
    agent.last_obs, agent.waiting = observation, waiting
    last = agent.policy.predict_values(observation) if agent.policy.has_critic else np.zeros(len(waiting))
    return _assemble(agent, buffer, last)


def collect_episodes(agent: Collecting, n_episodes: int, group_size: int = 1) -> Rollout:
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


def _draw_starts(agent: Collecting, count: int) -> list[Any]:
    """``count`` start states: values of the env's start option, or reset seeds."""
    option = start_option(agent.envs)
    if option is None:
        return agent.rng.integers(0, 2**31 - 1, size=count).tolist()
    starts: list[Any] = []
    while len(starts) < count:
        _, infos = agent.envs.reset()
        starts += np.asarray(infos[option]).tolist()
    return starts[:count]


def _reset_to(agent: Collecting, starts: list[Any]) -> Any:
    """Reset every slot to its start; slots beyond the last start run along and are not recorded."""
    option = start_option(agent.envs)
    if starts[0] is None:
        return agent.envs.reset()[0]
    padded = starts + starts[:1] * (agent.num_envs - len(starts))
    if option is not None:
        return agent.envs.reset(options={option: padded})[0]
    try:
        return agent.envs.reset(seed=padded)[0]
    except (gym.error.Error, TypeError) as error:
        raise ValueError(
            f"groups of {agent.group_size} need episodes with a common start, but {agent.envs} takes neither a "
            'start option nor one seed for each slot; make it with vectorization_mode="sync"'
        ) from error


#: Steps in which no episode has ended, from which on an env without a time limit is taken to have no end.
_ENDLESS = 10_000


class _Patience:
    """Waits for the end of an episode, but not for ever."""

    def __init__(self, agent: Collecting) -> None:
        self.agent = agent
        self.limit = max(_ENDLESS, agent.total_timesteps or 0)
        self.bounded = longest_episode(agent.envs) is not None
        self.steps = 0

    def step(self, steps: int, ended: bool) -> None:
        """Note ``steps`` env steps, and whether an episode ended with them.

        Raises:
            RuntimeError: None has ended for very long, and nothing says that one ever will.
        """
        self.steps = 0 if ended else self.steps + steps
        if self.steps > self.limit and not self.bounded:
            name = type(self.agent).__name__
            raise RuntimeError(
                f"{name} learns from whole episodes, but in {self.steps:,} steps of {self.agent.envs} none has ended. "
                "Wrap the env in gymnasium.wrappers.TimeLimit (or gym.make it with max_episode_steps), or take an "
                "agent that learns from segments, such as PPO with n_steps"
            )


def _run_wave(agent: Collecting, starts: list[Any]) -> Rollout:
    observation = _reset_to(agent, starts)
    alive = np.arange(agent.num_envs) < len(starts)
    buffer = _StepBuffer(kl_envs(agent.envs))
    patience = _Patience(agent)
    for number in itertools.count():
        if not alive.any():
            break
        _explore_anew(agent, number)
        observation, done, step = _step(agent, observation, alive, buffer)
        patience.step(int(alive.sum()), bool((done & alive).any()))
        if not agent.count_steps(int(alive.sum()), done & alive, **step):
            break  # nothing is learned from a rollout that was stopped, so its episodes need no end
        alive = alive & ~done
        if agent.autoreset_mode is AutoresetMode.DISABLED and done.any() and alive.any():
            observation, _ = agent.envs.reset(options={"reset_mask": done})
    rollout = _assemble(agent, buffer, np.zeros(agent.num_envs))
    if buffer.scored and not (scored := buffer.stack("scored").all(1)).all():
        rollout.scored = torch.from_numpy(scored[:, None] & buffer.stack("mask"))
    return rollout[torch.arange(len(starts))]


def collect_fused(agent: Collecting, n_episodes: int, group_size: int = 1) -> Rollout:
    """Whole episodes at once from an environment that has ``run_episodes``."""
    env, policy = agent.text_env, agent.policy
    if agent.ahead is None:
        prompt_ids = np.repeat(env.draw_prompts(n_episodes // group_size), group_size)
    else:
        prompt_ids, written = agent.ahead.take(n_episodes, group_size)
    evaluation = None

    def generate(prompts: list[np.ndarray]) -> Sequences:
        return written if agent.ahead is not None else _generate(agent, prompts, group_size)

    def evaluate(sequences: Sequences) -> Sequences:
        nonlocal evaluation
        sequences = sequences.to(agent.device)
        if policy.has_critic or policy.autocast or not sequences.native:
            # One pass for the values also gives the log-probabilities as the update will.
            sequences, *evaluation = _evaluate_responses(agent, sequences)
        return _with_reference(agent, sequences)

    shared = shared_rewards(agent.processes, getattr(env, "rewards", ()))
    with _conversations(env, policy), shared:
        episodes = env.run_episodes(generate, prompt_ids, evaluate)
    agent.record_text_episodes(episodes)
    sequences, mask = episodes.sequences, episodes.mask
    done = np.zeros_like(mask)
    done[np.arange(len(mask)), mask.sum(1) - 1] = True
    reported = sequences.sampling_log_probs
    values, first_evaluation = (np.zeros(mask.shape), None) if evaluation is None else evaluation
    ends, last_values = done, np.zeros(len(mask))
    if episodes.truncated is not None and episodes.truncated.any() and policy.has_critic:
        ends = done & ~episodes.truncated[:, None]
        last_values = np.where(episodes.truncated, policy.predict_values(_final_states(sequences)), 0.0)
    next_values = maths.shift_values(values, last_values, mask, ends) * mask
    rollout = Rollout(
        inputs={"sequences": sequences},
        actions=torch.from_numpy(episodes.tokens),
        rewards=_double(episodes.rewards),
        log_probs=_float(episodes.log_prob),
        values=_float(values),
        next_values=_float(next_values),
        mask=torch.from_numpy(mask),
        done=torch.from_numpy(done),
        ref_log_probs=_float(episodes.ref_logprob),
        penalties=_double(env.kl_coef * episodes.kl),
        sampling_log_probs=None if reported is None else _float(sequences.padded(reported[sequences.policy])),
        group=torch.from_numpy(np.arange(len(mask)) // group_size),
        scored=None if episodes.scored is None else torch.from_numpy(episodes.scored[:, None] & mask),
        cut=torch.from_numpy(done & np.isin(episodes.stop_reason, CUT_OFF)[:, None]),
        parts=_parts(env, episodes, done),
        **{
            name: torch.from_numpy(sequences.padded(getattr(episodes, name)))
            for name in ("turn", "state")
            if hasattr(episodes, name)
        },
    )
    rollout.evaluation = first_evaluation
    for t in range(mask.shape[1]):
        step = fused_step(agent.episodes, episodes, done, t)
        if not agent.count_steps(int(mask[:, t].sum()), done[:, t], **step):
            break
    # Callbacks have been asked in the main process alone.
    standing = agent.processes.from_main((agent.num_timesteps, agent.stopped))
    agent.num_timesteps, agent.stopped = standing
    return rollout


def _parts(env: TextEnv, episodes: Any, done: np.ndarray) -> Tensor | None:
    """What each of several rewards gave, float64 ``[B, T, K]``, in the last steps; a gold judge is none of them."""
    rewards = getattr(env, "rewards", ())
    names = rewards[0].names if rewards else ()
    if len(names) < 2:
        return None
    parts = np.zeros((*done.shape, len(names)))
    parts[done] = np.stack([episodes.parts[name] for name in names], axis=1)
    return torch.from_numpy(parts)


def _conversations(env: TextEnv, policy: Policy) -> AbstractContextManager[None]:
    """Where an env has several turns, a policy that goes on from what it has written is told so."""
    if not hasattr(env, "max_turns") or not hasattr(policy, "talking"):
        return nullcontext()
    return policy.talking(env.max_length, env.stop)


def _final_states(sequences: Sequences) -> dict[str, np.ndarray]:
    """Whole sequences as observations, left-padded: what comes after an episode that was cut off."""
    lengths = sequences.lengths
    column = np.arange(lengths.max()) - (lengths.max() - lengths)[:, None]
    at = sequences.starts[:, None] + np.maximum(column, 0)
    return {
        "input_ids": sequences.tokens[at] * (column >= 0),
        "attention_mask": (column >= 0).astype(np.int64),
    }


def _generate(agent: Collecting, prompts: Any, group_size: int) -> Sequences:
    """What the policy writes, every process its share and all of them given all of it."""
    processes, policy, budget = agent.processes, agent.policy, agent.text_env.max_new_tokens
    if not processes.are_several:
        return Sequences.from_generated(policy.generate(prompts, budget), prompts)
    if hasattr(policy, "hand_over"):
        policy.hand_over(processes)
    # One number, the same everywhere, and from it a stream for each sequence, whoever writes it.
    streams = Streams.draw(policy.generator, len(prompts))
    mine = processes.rows(len(prompts), group_size)
    part = None
    if mine.stop > mine.start:
        with policy.drawing_from(streams[mine]):
            part = Sequences.from_generated(policy.generate(prompts[mine], budget), prompts[mine])
        part = dataclasses.replace(part, device="cpu")  # without what has been laid out of it
    return Sequences.concatenate([each for each in processes.gather(part) if each is not None])


def _with_reference(agent: Collecting, sequences: Sequences) -> Sequences:
    """The same with the reference's log-probabilities, where several processes share them out."""
    if not agent.processes.are_several:
        return sequences  # the environment asks for them itself
    mine = agent.processes.rows(len(sequences), agent.group_size)
    found = np.zeros(0)
    if mine.stop > mine.start:
        reference = getattr(agent.text_env, "reference", agent.text_env.lm)  # it may follow the policy
        found = reference.log_probs(sequences[mine])
    return sequences.with_values(
        ref_log_probs=sequences.spread(np.concatenate(agent.processes.gather(found))), native=sequences.native
    )


def _evaluate_responses(
    agent: Collecting, sequences: Sequences
) -> tuple[Sequences, np.ndarray, Evaluation | None]:
    """The same sequences with the log-probabilities of the policy's own evaluation, and values ``[B, T]``.

    Where the first update will ask for just this again, the evaluation comes along with its gradient.
    """
    sizes = (agent.batch_size, agent.micro_batch_size)
    at_once = all(size is None or size >= len(sequences) for size in sizes)
    # With several processes the update will ask another one for some of these rows.
    at_once &= not agent.processes.are_several
    mine = agent.processes.rows(len(sequences), agent.group_size)
    found, new = np.zeros((2, 0)), None
    if mine.stop > mine.start:
        found, new = _evaluate(agent, sequences[mine] if agent.processes.are_several else sequences, at_once)
    log_probs, values = np.concatenate(agent.processes.gather(found), axis=1)
    own = sequences.spread(log_probs)
    reported = None if sequences.native else sequences.log_probs
    return (
        sequences.with_values(log_probs=own, sampling_log_probs=reported),
        sequences.padded(values),
        new if at_once else None,
    )


def _evaluate(
    agent: Collecting, sequences: Sequences, with_gradient: bool
) -> tuple[np.ndarray, Evaluation | None]:
    """Log-probabilities and values of the policy's tokens, float64 ``[2, m]``, and the last evaluation."""
    mask = torch.from_numpy(sequences.mask())
    zeros = torch.zeros(mask.shape)
    batch = Rollout({"sequences": sequences}, zeros, zeros, zeros, zeros, zeros, mask, mask).to(agent.device)
    found = torch.zeros(2, *mask.shape, device=agent.device)
    new = None
    with torch.set_grad_enabled(with_gradient):
        for micro, rows in batch.micro_batches(agent.micro_batch_size):
            new = agent.policy.evaluate(micro)
            found[0, rows] = new.log_probs.detach().float()
            if new.values is not None:
                found[1, rows] = new.values.detach().float()
    return found.cpu().double().numpy()[:, mask.numpy()], new
