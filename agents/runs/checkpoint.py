"""Agents on disk: an ordinary Hugging Face folder for a language model, safetensors and JSON for the rest.

A checkpoint holds everything that a resumed run needs to end with bitwise the weights of one that was never
stopped: weights, optimiser, schedules, every random stream, the environment's state. Nothing is pickled, and what
it names is imported only as :mod:`reward_models.trust` allows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents import presets
from agents.algorithms.safeguards import is_plain
from agents.arguments import argument_names
from agents.parallel.sharding import like, load_weights, whole
from agents.policies.base import Policy, plain
from agents.policies.lora import LoraLM
from agents.rollouts.observations import from_named_arrays, named_arrays
from agents.rollouts.vector_envs import kl_envs, movable_references
from agents.runs import env_state
from agents.runs.callback_state import states_of
from agents.runs.encoding import (
    UNNAMED,
    Unread,
    decode_argument,
    decode_space,
    encode_argument,
    encode_space,
    tabulated,
)
from agents.runs.names import import_name, resolve_class
from agents.runs.whole import (
    MANIFEST,
    TornCheckpointError,
    check_whole,
    read_json,
    whole_folder,
    write_folder,
)
from reward_models import trust
from reward_models.loading import ADAPTER
from reward_models.warning import warn
from textrl_env.errors import ArgumentError
from textrl_env.lm.causal_lm import CausalLM


class Checkpointed(Protocol):
    """What a checkpoint reads of an agent and puts back; see :class:`~agents.base.Agent` for what each is."""

    init_kwargs: dict[str, Any]
    policy: Any
    policy_name: str | type
    optimizer: torch.optim.Optimizer
    envs: gym.vector.VectorEnv | None
    env_id: str | None
    text_env: Any
    num_envs: int
    last_obs: Any
    waiting: np.ndarray
    ahead: Any
    seed: int
    rng: np.random.Generator
    episodes: Any
    n_episodes: int | None
    num_timesteps: int
    total_timesteps: int | None
    n_updates: int
    iterations: int
    n_gradient_steps: int
    skipped_updates: Any
    kl_coef: float | None
    callback: Any
    callback_states: list[Any]
    processes: Any
    made_with_kl_coef: float | None

    def set_up_policy(self, spaces: Any = None) -> None:
        """Make the policy and its optimiser from the env, or from spaces alone to predict only."""
        ...

    def get_method_state(self) -> dict[str, Any]:
        """What the method changes on its way besides weights, as JSON."""
        ...

    def set_method_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_method_state` returned."""
        ...

    def set_up_optimizer(self) -> None:
        """Make the optimiser and its schedule from the hyper-parameters in force."""
        ...


FORMAT = 1
DOCUMENT = "agent.json"
#: What the weights of a reference that was moved begin with.
_REFERENCE = "reference."
#: What every version has written.
_NEEDED = {
    "agent",
    "policy",
    "kwargs",
    "num_envs",
    "temperature",
    "num_timesteps",
    "n_updates",
    "rng",
    "episodes",
}
#: Arguments that say where to run and what to log, not what is learned.
_LOCAL = ("env", "policy", "device", "verbose", "tensorboard_log")
#: Arguments that may be functions of the remaining progress.
_SCHEDULES = ("learning_rate", "critic_learning_rate", "clip_range", "clip_range_vf")


@dataclasses.dataclass
class Position:
    """Where an agent stands between two updates, all but the weights and the optimiser.

    While a rollout is collected those do not change, so a position taken before it and the weights after it are what
    a checkpoint before it would have held.

    Attributes:
        document: JSON.
        arrays: Of the environment.
        streams: States of the random streams.
    """

    document: dict[str, Any]
    arrays: dict[str, np.ndarray]
    streams: dict[str, Tensor]


def take_position(agent: Checkpointed) -> Position:
    """Copy where ``agent`` stands now."""
    document = {
        "num_timesteps": agent.num_timesteps,
        "n_updates": agent.n_updates,
        "iterations": agent.iterations,
        "n_gradient_steps": agent.n_gradient_steps,
        "skipped_updates": agent.skipped_updates.total,
        "kl_coef": agent.kl_coef,
        "method": agent.get_method_state(),
        "rng": agent.rng.bit_generator.state,
        "episodes": agent.episodes.get_state(),
        "rewards": [reward.get_state() for reward in _rewards(agent)],
        # Those of a checkpoint that nobody has learned from since are still waiting.
        "callbacks": agent.callback_states or states_of(agent.callback),
    }
    arrays: dict[str, np.ndarray] = {}
    if agent.envs is not None:
        document["env_state"], arrays = env_state.capture(agent.envs)
        if agent.text_env is not None and agent.text_env is not agent.envs.unwrapped:
            document["text_env_state"], more = env_state.capture(agent.text_env)
            arrays |= {f"text.{name}": array for name, array in more.items()}
        if agent.last_obs is not None:
            observation = named_arrays(agent.last_obs)
            arrays |= {f"last_obs.{name}": np.array(value) for name, value in observation.items()}
        arrays["waiting"] = agent.waiting.copy()
        if agent.ahead is not None:
            arrays |= {f"ahead.{name}": array for name, array in agent.ahead.get_state().items()}
    streams = {"rng.policy": agent.policy.generator.get_state(), "rng.torch": torch.get_rng_state()}
    return Position(document, arrays, streams)


def save(
    agent: Checkpointed,
    path: Path,
    position: Position | None = None,
    note: dict[str, Any] | None = None,
    exclude: Collection[str] = (),
    include: Collection[str] = (),
) -> None:
    """Write ``agent`` into the folder ``path``: the whole new one, or the one that was there stays.

    Args:
        agent: Between two updates.
        path: Where.
        position: Where it stood before the rollout under way; None is where it stands now.
        note: More to remember in ``agent.json``.
        exclude: Constructor arguments to leave out.
        include: Those to write all the same, also such as say what to log ("verbose").

    Raises:
        ValueError: A weight is not finite; nothing was written.
        OSError: The folder cannot be written; the one before is whole.
    """
    policy = plain(agent.policy)
    _check_finite(policy)
    position = position or take_position(agent)

    def write(folder: Path) -> None:
        if hasattr(policy, "save_pretrained"):
            policy.save_pretrained(folder)
        tensors = agent.processes.all_do("state") if policy.is_split else _learned(agent)
        tensors |= position.streams
        # Shared and strided tensors are written as copies of their own.
        own = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
        save_file(own, folder / "agent.safetensors")
        # safetensors wants contiguous arrays of at least one dimension; scalars are restored by env_state.
        shaped = {name: np.ascontiguousarray(array) for name, array in position.arrays.items()}
        save_arrays(shaped, folder / "env.safetensors")
        document = _document(agent, exclude, include) | position.document | (note or {})
        (folder / DOCUMENT).write_text(_as_json(document, agent), encoding="utf-8")

    write_folder(path, write)


def _learned(agent: Checkpointed) -> dict[str, Tensor]:
    """Weights that the Hugging Face folder does not hold, and the optimiser's state."""
    weights = {f"policy.{name}": w for name, w in _own_weights(plain(agent.policy)).items()}
    return weights | _optimizer_tensors(agent.optimizer) | _moved_reference(agent)


def _moved_reference(agent: Checkpointed) -> dict[str, Tensor]:
    """The reference's weights, where they are no longer those of the model that the environment was made with."""
    for dynamics in movable_references(agent.envs, agent.text_env):
        if dynamics.moved is not None:
            return {f"{_REFERENCE}{n}": w for n, w in dynamics.moved.model.named_parameters()}
    return {}


def _restore_reference(agent: Checkpointed, tensors: dict[str, Tensor]) -> None:
    weights = {n.removeprefix(_REFERENCE): t for n, t in tensors.items() if n.startswith(_REFERENCE)}
    found = movable_references(agent.envs, agent.text_env) if weights else []
    for dynamics in found:
        if dynamics is found[0]:
            dynamics.move_reference(weights, 1.0)
        else:
            dynamics.share_reference(found[0])


def learned_by_all(agent: Checkpointed) -> dict[str, Tensor]:
    """The same, of weights that are split over processes: all of them put it together at once."""
    return {name: whole(tensor) for name, tensor in _learned(agent).items()}


def _check_finite(policy: Any) -> None:
    for name, weight in policy.named_weights():
        if is_plain(weight) and not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise ValueError(
                f"{bad:,} of the {weight.numel():,} numbers in {name} are NaN or infinite, so no checkpoint "
                "is written; a lower learning_rate or a smaller reward scale usually helps"
            )


def _as_json(document: dict[str, Any], agent: Checkpointed) -> str:
    try:
        return json.dumps(document, indent=2) + "\n"
    except TypeError as error:
        for reward in _rewards(agent):
            try:
                json.dumps(reward.get_state())
            except TypeError:
                raise TypeError(f"get_state() of the reward {reward.name!r} is no JSON: {error}") from None
        raise


def _rewards(agent: Checkpointed) -> list[Any]:
    """The rewards of the agent's environments, each once."""
    found = [reward for env in kl_envs(agent.envs) for reward in getattr(env, "rewards", ())]
    return list({id(reward): reward for reward in found}.values())


def _own_weights(policy: Any) -> dict[str, Tensor]:
    """The weights that the Hugging Face folder beside them does not hold."""
    weights = policy.state_dict()
    if _has_adapter(policy):  # what is frozen belongs to the model that the policy started from
        learned = {name for name, p in policy.named_parameters() if p.requires_grad}
        return {name: w for name, w in weights.items() if name in learned}
    if not hasattr(policy, "save_pretrained"):
        return dict(weights)
    if not _is_rounded(policy):
        return {name: w for name, w in weights.items() if not name.startswith("model.")}
    # Tied weights have two names and are written once.
    if policy.is_split:
        return dict(weights)
    first = {w.data_ptr(): name for name, w in reversed(weights.items()) if w.numel()}
    return {name: w for name, w in weights.items() if first.get(w.data_ptr(), name) == name}


def _is_rounded(policy: Any) -> bool:
    """Whether the Hugging Face folder holds less precise numbers than what is trained."""
    model = getattr(policy, "model", None)
    return model is not None and getattr(policy, "saved_dtype", model.dtype) != model.dtype


def _has_adapter(policy: Any) -> bool:
    return isinstance(getattr(policy, "lm", None), LoraLM)


def _arguments(agent: Checkpointed, exclude: Collection[str], include: Collection[str]) -> dict[str, Any]:
    """The constructor arguments to write."""
    given = {name: v for name, v in agent.init_kwargs.items() if name not in {*_LOCAL, *exclude}}
    for name in include:
        if name not in argument_names(type(agent)) or not hasattr(agent, name):
            raise ArgumentError(
                f"save(include=[{name!r}]) names no argument of {type(agent).__name__}; a checkpoint holds those, the "
                "weights and what is needed to go on, so keep anything else in a file of your own"
            )
        given[name] = agent.init_kwargs[name] if name in given else getattr(agent, name)
    return given


def _document(
    agent: Checkpointed, exclude: Collection[str] = (), include: Collection[str] = ()
) -> dict[str, Any]:
    cls = type(agent)
    spaces = agent.policy.observation_space, agent.policy.action_space
    kwargs = {}
    for name, value in _arguments(agent, exclude, include).items():
        if name == "policy_kwargs" and value:
            # Full weights are in the checkpoint; an adapter comes back to the model that it belongs to.
            named = _has_adapter(agent.policy) and isinstance(value.get("model"), (str, Path))
            value = {k: v for k, v in value.items() if k != "model" or named}
            if encode_argument(value.get("generator")) is UNNAMED:
                warn(
                    f"the generator {value.pop('generator')!r} cannot be written to {FORMAT=}; a loaded agent decodes "
                    "by itself unless it gets one: load(..., policy_kwargs={'generator': ...})"
                )
        encoded = encode_argument(value)
        if encoded is UNNAMED and name in _SCHEDULES and callable(value):
            kwargs[name] = encode_argument(tabulated(value))
            warn(
                f"{name}={value!r} has no name that a checkpoint could find it by: its values are written as a table, "
                f"with straight lines between them. For the function itself, pass it again to load(..., {name}=...)"
            )
        elif encoded is UNNAMED:
            warn(f"{name}={value!r} cannot be written to {FORMAT=}; pass it again to load(..., {name}=...)")
        else:
            kwargs[name] = encoded
            if "__main__" in trust.foreign_modules(encoded):
                warn(
                    f"{name} names a function of this script (__main__), which another program cannot find: put it "
                    f"into a module, or pass it again to load(..., {name}=...)"
                )
    return {
        "format": FORMAT,
        "agent": import_name(cls),
        "policy": agent.policy_name if isinstance(agent.policy_name, str) else import_name(agent.policy_name),
        "kwargs": kwargs | {"seed": agent.seed},
        "defaults": {
            name: getattr(agent, name)
            for name in presets.DEFAULTS
            if hasattr(agent, name) and name not in agent.init_kwargs
        },
        "env": agent.env_id,
        "num_envs": agent.num_envs if agent.envs is not None else None,
        "observation_space": encode_space(spaces[0]),
        "action_space": encode_space(spaces[1]),
        "adapter_base": agent.policy.lm.base_digest() if _has_adapter(agent.policy) else None,
        "value_hidden": getattr(agent.policy, "value_hidden", None),
        "temperature": agent.policy.lm.temperature if hasattr(agent.policy, "lm") else None,
        "autocast": agent.policy.lm.autocast if hasattr(agent.policy, "lm") else None,
        "total_timesteps": agent.total_timesteps,
        "n_episodes": agent.n_episodes,
        "made_with_kl_coef": agent.made_with_kl_coef,
        "sealed": True,
    }


def load(
    cls: type, path: Path, env: Any, overrides: dict[str, Any], trust_modules: Sequence[str] = ()
) -> Any:
    """Read what :func:`save` wrote; see :meth:`agents.base.Agent.load`."""
    path = whole_folder(path)
    document = read_document(path)
    if document.get("sealed"):
        check_whole(path)
    with trust.names_from(path / DOCUMENT, trust_modules), _blamed(path, document, overrides):
        return _load(cls, path, env, document, overrides)


@contextmanager
def _blamed(path: Path, document: dict[str, Any], overrides: dict[str, Any]) -> Iterator[None]:
    """Errors about a checkpoint without checksums name it: what it says may be wrong in any way."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if document.get("sealed") or overrides or isinstance(error, TornCheckpointError):
            raise
        told = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise TornCheckpointError(
            f"{path} cannot be loaded, what its {DOCUMENT} says may be wrong: {type(error).__name__}: {told}"
        ) from error


def _load(cls: type, path: Path, env: Any, document: dict[str, Any], overrides: dict[str, Any]) -> Any:
    kwargs = {name: value for name, value in document["kwargs"].items() if name not in overrides}
    unread = {}
    if not isinstance(env, str) and "env_kwargs" in kwargs:  # no environment is made of them
        unread["env_kwargs"] = Unread(kwargs.pop("env_kwargs") or {})
    is_cls = document["agent"] == import_name(cls)  # then the caller has named it
    name = document["policy"]
    trust.check_values("" if is_cls else document["agent"], name, kwargs)
    saved = cls if is_cls else resolve_class(document["agent"], object)
    if not issubclass(saved, cls):
        raise ValueError(
            f"{path} holds a {saved.__name__}, not a {cls.__name__}; load it with {saved.__name__}.load(...)"
        )
    kwargs = {name: decode_argument(value) for name, value in kwargs.items()} | unread | overrides
    policy_kwargs = dict(kwargs.get("policy_kwargs") or {})
    if env is None and policy_kwargs.pop("generator", None) is not None:  # without one nothing is generated
        policy_kwargs.pop("generator_kwargs", None)
        kwargs["policy_kwargs"] = policy_kwargs
    holds_model = any((path / name).is_file() for name in ("config.json", ADAPTER))
    if document["temperature"] is not None and not holds_model:
        raise TornCheckpointError(f"{path} is torn: the language model's config.json is missing")
    # An adapter goes onto the model of the env; without one, the merged model stands in for it.
    if holds_model and (env is None or policy_kwargs.get("lora_rank") is None):
        lm = CausalLM.load(
            path,
            temperature=document["temperature"],
            device=kwargs.get("device", "auto"),
            # Full weights are written in what they came in; an adapter is taken out of weights again.
            dtype="auto" if policy_kwargs.get("lora_rank") is None else "float32",
            autocast=document.get("autocast"),
        )
        kwargs["policy_kwargs"] = policy_kwargs | {"model": lm}
    if (
        document["temperature"] is not None and "value_hidden" not in document
    ):  # of 0.1, whose heads were linear
        kwargs["policy_kwargs"] = {"value_hidden": 0} | (kwargs.get("policy_kwargs") or {})
    if env is not None and not isinstance(env, str):
        for argument in ("n_envs", "env_kwargs"):  # they say how to make an env from its id
            if argument not in overrides:
                kwargs.pop(argument, None)
    if isinstance(env, str) and document["num_envs"] is not None:
        kwargs.setdefault("n_envs", document["num_envs"])
    agent = saved(resolve_class(name, Policy) if ":" in name else name, env, **kwargs)
    if env is None:
        agent.set_up_policy(_Spaces(document))
    _keep_defaults(agent, document.get("defaults"))
    _restore(agent, document, path)
    return agent


def _keep_defaults(agent: Checkpointed, saved: dict[str, Any] | None) -> None:
    """Give what was left to the defaults the value that it had then, whatever the defaults are now."""
    if saved is None:
        saved = presets.before_0_2(agent)
    for name, value in saved.items():
        if name not in agent.init_kwargs:
            setattr(agent, name, value)
    agent.set_up_optimizer()


def read_document(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint at ``path``.
    """
    file = path / DOCUMENT
    if not file.is_file():
        if (path / MANIFEST).is_file():
            raise TornCheckpointError(f"{path} is torn: {DOCUMENT} is missing")
        nearby = (
            sorted(p.parent.name for p in path.parent.glob(f"*/{DOCUMENT}")) if path.parent.is_dir() else []
        )
        hint = f" Checkpoints beside it: {nearby}." if nearby else ""
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {DOCUMENT}.{hint}")
    try:
        document = read_json(file)
    except ValueError as error:
        raise TornCheckpointError(f"{path} is torn: {error}") from None
    if document.get("format") != FORMAT:
        raise ValueError(f"{file} has format {document.get('format')!r}; this version reads {FORMAT}")
    missing = sorted(_NEEDED - document.keys())
    if missing:
        raise TornCheckpointError(f"{path} is torn: {DOCUMENT} does not say {', '.join(missing)}")
    return document


def _restore(agent: Checkpointed, document: dict[str, Any], path: Path) -> None:
    tensors = load_file(path / "agent.safetensors")
    weights = {n.removeprefix("policy."): t for n, t in tensors.items() if n.startswith("policy.")}
    if agent.envs is not None and _has_adapter(agent.policy):
        _check_base(agent, document, path)
    own = _own_weights(agent.policy)
    missing, unexpected = load_weights(agent.policy, weights)
    missing = [name for name in missing if name in own]
    if agent.policy.is_split:
        agent.policy.weights_changed()
    if missing or unexpected:
        raise ValueError(f"{path} does not fit this policy: missing {missing}, unexpected {unexpected}")
    if agent.envs is None and _has_adapter(agent.policy):
        agent.policy.lm.take_out_of_base()
    _restore_optimizer(agent.optimizer, tensors)
    agent.policy.generator.set_state(tensors["rng.policy"])
    torch.set_rng_state(tensors["rng.torch"])
    agent.rng.bit_generator.state = document["rng"]
    agent.num_timesteps = document["num_timesteps"]
    agent.n_updates = document["n_updates"]
    agent.iterations = document.get("iterations", 0)
    agent.n_gradient_steps = document.get("n_gradient_steps", 0)
    agent.skipped_updates.total = document.get("skipped_updates", 0)
    agent.episodes.set_state(document["episodes"])
    agent.set_method_state(document.get("method", {}))
    agent.callback_states = document.get("callbacks", [])
    if agent.envs is not None:
        _agree_with_env(agent, document)
        _restore_reference(agent, tensors)
        _restore_rewards(agent, document.get("rewards", []))
    if agent.envs is None or agent.num_envs != document["num_envs"] or "env_state" not in document:
        return
    arrays = load_arrays(path / "env.safetensors")
    try:
        env_state.restore(agent.envs, document["env_state"], arrays)
    except (ValueError, KeyError) as error:
        warn(f"the environment starts a new episode, its saved state does not fit: {error}")
        return
    if "text_env_state" in document and agent.text_env is not None:
        text = {n.removeprefix("text."): a for n, a in arrays.items() if n.startswith("text.")}
        env_state.restore(agent.text_env, document["text_env_state"], text)
    observation = {n.removeprefix("last_obs."): a for n, a in arrays.items() if n.startswith("last_obs.")}
    space = agent.policy.observation_space
    agent.last_obs = from_named_arrays(space, observation) if observation else None
    agent.waiting = arrays["waiting"]
    if agent.ahead is not None:
        written = {n.removeprefix("ahead."): a for n, a in arrays.items() if n.startswith("ahead.")}
        agent.ahead.set_state(written)


def _agree_with_env(agent: Checkpointed, document: dict[str, Any]) -> None:
    """Settle what both a checkpoint and an environment set: the environment's own settings win, with a warning.

    A KL coefficient that was changed on the way goes on where it was, in an environment made as the first one was.
    """
    saved, made = document.get("kl_coef"), document.get("made_with_kl_coef")
    if saved is not None and agent.kl_coef is not None and saved != agent.kl_coef:
        if made is None or made == agent.kl_coef:
            agent.kl_coef = saved
        else:
            warn(
                f"the env was made with kl_coef={agent.kl_coef}, and the checkpoint ended with kl_coef={saved}: the "
                f"env's own is kept (agent.kl_coef = {saved} takes the other)"
            )
    lm = next((env.lm for env in kl_envs(agent.envs) if hasattr(env, "lm")), None)
    own = getattr(agent.policy, "lm", None)
    if lm is None or own is None:
        return
    if own.temperature != lm.temperature:
        warn(
            f"the env has temperature={lm.temperature}, and the checkpoint temperature={own.temperature}: the policy "
            "takes the env's, so that both divide the logits alike"
        )
        own.temperature = lm.temperature
    if "autocast" not in (agent.init_kwargs.get("policy_kwargs") or {}):
        # What a policy that starts from the env's model does.
        half = lm.model.dtype in (torch.bfloat16, torch.float16)
        autocast = lm.autocast or (half and not _has_adapter(agent.policy))
        if document.get("autocast") not in (None, autocast):
            warn(
                f"the precision differs: autocast was {document['autocast']} and is {autocast} with this env; its "
                "own is taken"
            )
        own.autocast = agent.policy.autocast = autocast


def _restore_rewards(agent: Checkpointed, states: list[dict[str, Any]]) -> None:
    rewards = _rewards(agent)
    if len(states) != len(rewards):
        if any(states):
            warn(
                f"the state of {len(states)} rewards (running means, counts) was saved and the env has {len(rewards)}: "
                "they start anew"
            )
        return
    for reward, state in zip(rewards, states, strict=True):
        try:
            reward.set_state(state)
        except ValueError as error:
            warn(f"the saved state of the reward {reward.name!r} does not fit, it starts anew: {error}")


def _check_base(agent: Checkpointed, document: dict[str, Any], path: Path) -> None:
    """Raise a ValueError where the adapter of a checkpoint would go onto other weights than its own."""
    if document.get("adapter_base") not in (None, agent.policy.lm.base_digest()):
        raise ValueError(
            f"{path} holds an adapter for another model than the one that it would go onto now; load it with the env "
            'it was trained in, name its model with policy_kwargs={"model": ..., "lora_rank": ...}, or start a new '
            f"agent from the merged model: policy_kwargs={{'model': {str(path)!r}}}"
        )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, entries in state.items()
        for name, value in _flat(entries)
    }


def _flat(entries: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """What is in nested dictionaries, by names with dots: some optimisers keep quantised moments in one more."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, *path, key = name.split(".")
            entries = state.setdefault(int(index), {})
            for part in path:
                entries = entries.setdefault(part, {})
            # Adam counts steps in a float; an integer alone was a number and no tensor.
            is_count = tensor.ndim == 0 and not tensor.is_floating_point()
            entries[key] = tensor.item() if is_count else tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        state[index] = {
            name: like(x, parameters[index]) if isinstance(x, Tensor) else x for name, x in entries.items()
        }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class _Spaces:
    """Stands in for an environment where only its spaces are known."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.single_observation_space = decode_space(document["observation_space"])
        self.single_action_space = decode_space(document["action_space"])

    @property
    def unwrapped(self) -> _Spaces:
        return self
