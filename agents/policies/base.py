"""The interface of a policy: what acts, and what says log-probabilities, values and entropies again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agents.policies.actions import to_space
from agents.rollouts.observations import add_batch, copied, equal, is_single, row_of
from agents.rollouts.rollout import Rollout
from agents.runs.encoding import UNNAMED, decode_argument, decode_space, encode_argument, encode_space
from agents.runs.names import import_name, resolve_class
from reward_models import trust
from textrl_env.lm.streams import Streams

#: Where the metadata of a policy's file says what it holds.
_METADATA = "policy"


class Evaluation(NamedTuple):
    """What a policy says of a rollout, each ``[B, T]``.

    ``values`` are None without a critic, ``divergence`` is None without a teacher.
    """

    log_probs: Tensor
    values: Tensor | None
    entropy: Tensor
    divergence: Tensor | None = None


class DiscreteAction(np.ndarray):
    """One discrete action: an array without dimensions, which can be looked up in a dict.

    stable-baselines3's ``predict`` returns such an array, and environments that keep their transitions in a dict
    (Gymnasium's FrozenLake, ``self.P[state][action]``) need one that has a hash.
    """

    def __hash__(self) -> int:
        return hash(self.item())


def plain(policy: Any) -> Any:
    """The policy itself, where ``torch.compile`` has wrapped it."""
    return getattr(policy, "_orig_mod", policy)


class Policy(nn.Module):
    """The interface of a policy; subclass it to plug in another architecture.

    Attributes:
        whole_episodes: Whether it can only evaluate whole episodes (sequence models).
        has_critic: Whether ``values`` mean anything.
        autocast: Whether evaluation runs in bfloat16.
        turns_images: Whether it turns images channels first, and so takes them either way.
        flat: Whether the parameters are few and of one kind, so that the optimiser may keep them as one vector.
        init_kwargs: The constructor arguments that were given, the spaces included.
        generator: Source of the randomness of actions.
        is_split: Whether several processes hold a part of the weights each.
        streams: Random streams of the sequences that are written next; None draws them from ``generator``.
    """

    whole_episodes = False
    autocast = False
    is_split = False
    turns_images = False
    flat = False

    init_kwargs: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Remember the arguments as they were given, so that save() can write them, of classes of one's own too.
        policy = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(policy, *args, **kwargs).arguments
        bound.pop("self", None)
        object.__setattr__(policy, "init_kwargs", bound | bound.pop("kwargs", {}))
        return policy

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, critic: str | None
    ) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.has_critic = critic is not None
        self.generator: torch.Generator | None = None
        self.streams: Streams | None = None
        self._last: tuple[Any, np.ndarray, np.ndarray] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights by name, whole where they are split over processes."""
        yield from self.named_parameters()

    @contextmanager
    def drawing_from(self, streams: Streams) -> Iterator[None]:
        """Inside, whole sequences are written with these random numbers, one stream for each."""
        self.streams = streams
        try:
            yield
        finally:
            self.streams = None

    def critic_parameters(self) -> list[nn.Parameter]:
        """The weights that only the critic has, which may have a learning rate of their own; none by default."""
        return []

    def act(self, observation: Any, deterministic: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose actions for a batch of observations.

        Returns:
            actions ``[N]`` (or ``[N, ...]``), those of the action space but for clipping; log_probs float64 ``[N]``;
            values float64 ``[N]``.
        """
        raise NotImplementedError

    def reset_noise(self, slots: int) -> None:
        """Called when state-dependent exploration is to be drawn anew; nothing for policies without."""

    def prepare(self, rollout: Rollout) -> None:
        """Called before the update that evaluates these rows: what evaluation needs is moved to the device now."""

    def evaluate(self, rollout: Rollout) -> Evaluation:
        """Log-probabilities, values and entropies of what was done, with gradient."""
        raise NotImplementedError

    def squared_probabilities(self, rollout: Rollout) -> Tensor:
        """``sum_a pi(a | s_t)^2`` over all actions, ``[B, T]``, without gradient: how certain the policy was.

        Raises:
            NotImplementedError: The policy's actions are not one choice of several.
        """
        raise NotImplementedError(
            f"{type(self).__name__} on {self.action_space} does not say the probabilities of all actions"
        )

    def forward(self, rollout: Rollout) -> Evaluation:
        """:meth:`evaluate`, under the name that wrappers of modules call."""
        return self.evaluate(rollout)

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        """``Rollout.inputs`` from ``T`` batches of observations and the actions ``[N, T]``."""
        raise NotImplementedError

    def predict_values(self, observation: Any) -> np.ndarray:
        """The critic's values of a batch of observations, float64 ``[N]``."""
        raise NotImplementedError

    def log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        """Log-probabilities ``[N]`` of given actions; those of the last :meth:`act` are not computed twice."""
        if self._last is not None and equal(self._last[:2], (observation, action)):
            return self._last[2]
        return self._log_prob(observation, action)

    def slot_log_prob(self, slot: int, observation: Any, action: Any) -> float:
        """The same of one observation, that of ``slot`` in the batch that has just acted.

        Single envs inside a vector env ask one by one; to answer each from the batch that they are part of keeps
        what a policy has cached of all slots.
        """
        if self._last is not None and slot < len(self._last[2]):
            acted, actions, log_probs = self._last
            if equal((row_of(acted, slot), actions[slot]), (observation, action)):
                return float(log_probs[slot])
        return float(self.log_prob(add_batch(observation), np.asarray(action)[None])[0])

    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def predict(
        self,
        observation: Any,
        state: tuple | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple | None]:
        """Actions for one observation or a batch of them; see :meth:`agents.base.Agent.predict`."""
        single = is_single(self.observation_space, observation)
        # The caller may write into what it has handed over; what a policy remembers must not change with it.
        observation = add_batch(copied(observation)) if single else copied(observation)
        actions = self.to_env(self.act(observation, deterministic)[0])
        if single and actions.ndim == 1:
            return actions.view(DiscreteAction).reshape(()), state
        return (actions[0] if single else actions), state

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Actions as the environment takes them: of its dtype, continuous ones clipped to the space."""
        return to_space(self.action_space, actions)

    def weights_changed(self) -> None:
        """Called after every update; forget what was computed with the old weights."""
        self._last = None

    def save(self, path: str | Path) -> None:
        """Write the policy alone, without its agent: one file of safetensors, whatever its name ends in.

        Raises:
            TypeError: An argument of its constructor has no name to be found by, or it is a language model, which
                ``save_pretrained(folder)`` writes.
        """
        if hasattr(self, "save_pretrained"):
            raise TypeError("a language model is a folder: policy.save_pretrained(folder), or save the agent")
        given = {n: v for n, v in self.init_kwargs.items() if n not in ("observation_space", "action_space")}
        kwargs = {name: encode_argument(value) for name, value in given.items()}
        nameless = [name for name, value in kwargs.items() if value is UNNAMED]
        if nameless:
            raise TypeError(
                f"{type(self).__name__} was made with {nameless[0]}={given[nameless[0]]!r}, which no file can name; "
                "put it into a module, as a function or class of its own"
            )
        spaces_of = {n: encode_space(getattr(self, n)) for n in ("observation_space", "action_space")}
        document = {"class": import_name(type(self)), "kwargs": kwargs} | spaces_of
        weights = {n: w.detach().cpu().clone().contiguous() for n, w in self.state_dict().items()}
        save_file(weights, path, metadata={_METADATA: json.dumps(document)})

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "auto", trust_modules: Sequence[str] = ()
    ) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            device: Where to put the weights; "auto" is the CPU.
            trust_modules: Modules outside this project whose classes and functions the file may name.

        Raises:
            ValueError: It holds no policy, or one of another class.
            UntrustedNameError: It names code outside this project that ``trust_modules`` does not (an ImportError).
        """
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            if text is None:
                raise ValueError(f"{path} holds no policy that Policy.save wrote")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        document = json.loads(text)
        with trust.names_from(Path(path), trust_modules):
            kwargs = dict(document["kwargs"])
            own = document["class"] == import_name(cls)  # then the caller has named it
            trust.check_values("" if own else document["class"], kwargs)
            found = cls if own else resolve_class(document["class"], Policy)
            if not issubclass(found, cls):
                raise ValueError(f"{path} holds a {found.__name__}, not a {cls.__name__}")
            kwargs = {name: decode_argument(value) for name, value in kwargs.items()}
        made_for = [decode_space(document[name]) for name in ("observation_space", "action_space")]
        policy = found(*made_for, **kwargs)
        policy.load_state_dict(weights)
        return policy.to("cpu" if device == "auto" else device)


def make_linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer with an orthogonal weight of the given gain (0: zeros) and no bias to begin with."""
    layer = nn.Linear(inputs, outputs)
    if gain == 0.0:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
