"""Policies: what acts, and what says log-probabilities, values and entropies again.

Both policies answer the same four calls, ``act``, ``evaluate``, ``stack`` and ``predict_values``, so an
algorithm never sees which one it trains. Dropout is off everywhere, always.
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.rollout import Rollout
from textrl_env.errors import check_choice, check_keywords, did_you_mean
from textrl_env.language_model import CausalLM, SlotDecoder, gather_log_probs, sample_actions
from textrl_env.language_model import generate as generate_responses

#: Integer spaces up to this many values are one-hot encoded, wider ones read as numbers.
_ONE_HOT_LIMIT = 64
_FEATURE_LIMIT = 100_000


class Evaluation(NamedTuple):
    """What a policy says of a rollout: log_probs, values (None without a critic), entropy, each ``[B, T]``."""

    log_probs: Tensor
    values: Tensor | None
    entropy: Tensor


class Policy(nn.Module):
    """The interface of a policy; subclass it to plug in another architecture.

    Attributes:
        whole_episodes: Whether it can only evaluate whole episodes (sequence models).
        has_critic: Whether ``values`` mean anything.
        autocast: Whether evaluation runs in bfloat16.
    """

    whole_episodes = False
    autocast = False

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, critic: str | None
    ) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.has_critic = critic is not None
        self.generator: torch.Generator | None = None
        self._last: tuple[Any, np.ndarray, np.ndarray] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def act(self, observation: Any, deterministic: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose actions for a batch of observations.

        Returns:
            actions ``[N]`` (or ``[N, A]``), log_probs float64 ``[N]``, values float64 ``[N]``.
        """
        raise NotImplementedError

    def evaluate(self, rollout: Rollout) -> Evaluation:
        """Log-probabilities, values and entropies of what was done, with gradient."""
        raise NotImplementedError

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
        """``Rollout.inputs`` from ``T`` batches of observations and the actions ``[N, T]``."""
        raise NotImplementedError

    def predict_values(self, observation: Any) -> np.ndarray:
        """The critic's values of a batch of observations, float64 ``[N]``."""
        raise NotImplementedError

    def log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        """Log-probabilities ``[N]`` of given actions; what :meth:`act` has just said is not computed twice."""
        if self._last is not None and _equal(self._last[0], observation) and _equal(self._last[1], action):
            return self._last[2]
        return self._log_prob(observation, action)

    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Actions as the environment takes them (continuous ones clipped to the space)."""
        if isinstance(self.action_space, spaces.Box):
            return np.clip(actions, self.action_space.low, self.action_space.high)
        return actions

    def weights_changed(self) -> None:
        """Called after every update; forget what was computed with the old weights."""
        self._last = None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(np.array_equal(a[name], b[name]) for name in a)
    return np.array_equal(a, b)


# -- MLP ------------------------------------------------------------------------------------------------


def feature_size(space: spaces.Space) -> int:
    """Number of features :func:`encode` makes of one observation of ``space``.

    Raises:
        ValueError: A space an MLP cannot take.
    """
    if isinstance(space, spaces.Dict):
        return sum(feature_size(child) for child in space.spaces.values())
    if isinstance(space, spaces.Discrete):
        size = int(space.n)
    elif isinstance(space, spaces.MultiDiscrete):
        size = int(space.nvec.sum())
    elif isinstance(space, spaces.MultiBinary):
        size = int(np.prod(space.shape))
    elif isinstance(space, spaces.Box):
        size = int(np.prod(space.shape)) * (_one_hot_width(space) or 1)
    else:
        raise ValueError(
            f"MlpPolicy cannot take the observation space {space}; it takes Box, Discrete, MultiDiscrete, "
            "MultiBinary and Dict of these (a FlattenObservation wrapper may help)"
        )
    if size > _FEATURE_LIMIT:
        raise ValueError(
            f"MlpPolicy would turn the observation space {space} into {size} features; "
            'text environments want policy="CausalLMPolicy"'
        )
    return size


def _one_hot_width(space: spaces.Box) -> int:
    """Number of values of a narrow integer box; 0 for any other box."""
    if space.dtype.kind not in "iu" or space.dtype == np.uint8:
        return 0
    width = int(space.high.max()) - int(space.low.min()) + 1
    return width if width <= _ONE_HOT_LIMIT else 0


def encode(space: spaces.Space, observation: Any) -> np.ndarray:
    """Observations with any leading shape -> float32 features ``[..., feature_size(space)]``."""
    if isinstance(space, spaces.Dict):
        parts = [encode(child, observation[name]) for name, child in space.spaces.items()]
        return np.concatenate(parts, axis=-1)
    x = np.asarray(observation)
    if isinstance(space, spaces.Discrete):
        return _one_hot(x - int(space.start), int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        hot = [_one_hot(x[..., i], int(n)) for i, n in enumerate(space.nvec)]
        return np.concatenate(hot, axis=-1)
    leading = x.shape[: x.ndim - len(space.shape)]
    if isinstance(space, spaces.Box) and (width := _one_hot_width(space)):
        hot = _one_hot(x - int(space.low.min()), width)
        return hot.reshape(*leading, -1)
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    return (x.astype(np.float32) / np.float32(scale)).reshape(*leading, -1)


def _one_hot(x: np.ndarray, width: int) -> np.ndarray:
    hot = np.zeros((*x.shape, width), dtype=np.float32)
    np.put_along_axis(hot, x[..., None].astype(np.int64), 1.0, axis=-1)
    return hot


class MlpPolicy(Policy):
    """A multi-layer perceptron, with actor and critic of its own or a shared trunk.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary or Dict of these.
        action_space: Discrete, or Box (a diagonal Gaussian with a state-independent standard deviation).
        critic: "separate" network, "shared" trunk, or None.
        net_arch: Hidden sizes.
        activation: "tanh" or "relu".
        log_std_init: Initial log standard deviation of continuous actions.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        critic: str | None = "separate",
        net_arch: tuple[int, ...] | list[int] = (64, 64),
        activation: str = "tanh",
        log_std_init: float = 0.0,
    ) -> None:
        super().__init__(observation_space, action_space, critic)
        check_choice("critic", critic, ("separate", "shared", None))
        check_choice("activation", activation, ("tanh", "relu"))
        self.discrete = isinstance(action_space, spaces.Discrete)
        if not self.discrete and not isinstance(action_space, spaces.Box):
            raise ValueError(
                f"MlpPolicy acts in Discrete and Box action spaces, got {action_space}; "
                "a wrapper that flattens the actions may help"
            )
        sizes = [feature_size(observation_space), *net_arch]
        self.trunk = _mlp(sizes, activation)
        num_actions = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.action_head = _linear(sizes[-1], num_actions, 0.01)
        self.value_trunk = _mlp(sizes, activation) if critic == "separate" else None
        self.value_head = None if critic is None else _linear(sizes[-1], 1, 0.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.full((num_actions,), log_std_init))

    def _features(self, observation: Any) -> Tensor:
        # One memory layout, so that a matrix product rounds alike before and after a resume.
        features = np.ascontiguousarray(encode(self.observation_space, observation))
        return torch.from_numpy(features).to(self.device)

    def _values(self, features: Tensor, hidden: Tensor) -> Tensor | None:
        if self.value_head is None:
            return None
        hidden = hidden if self.value_trunk is None else self.value_trunk(features)
        return self.value_head(hidden).squeeze(-1)

    def _distribution_log_probs(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies ``[...]`` from the head's output ``[..., A]``."""
        if self.discrete:
            logits = out - out.logsumexp(-1, keepdim=True)
            log_probs = logits.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
            return log_probs, -(logits.exp() * logits).sum(-1)
        z = (actions.view(out.shape) - out) / self.log_std.exp()
        log_density = -0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        entropy = (self.log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum()
        return log_density.sum(-1), entropy.expand(out.shape[:-1])

    @torch.no_grad()
    def act(self, observation: Any, deterministic: bool = False):
        features = self._features(observation)
        hidden = self.trunk(features)
        out = self.action_head(hidden)
        if self.discrete:
            actions = sample_actions(out, self.generator, deterministic)
        else:
            noise = torch.empty_like(out).normal_(generator=self.generator) * (not deterministic)
            actions = (out + noise * self.log_std.exp()).view(-1, *self.action_space.shape)
        log_probs = self._distribution_log_probs(out, actions)[0].double().cpu().numpy()
        values = self._values(features, hidden)
        values = np.zeros(len(log_probs)) if values is None else values.double().cpu().numpy()
        actions = actions.cpu().numpy()
        self._last = (observation, actions, log_probs)
        return actions, log_probs, values

    def evaluate(self, rollout: Rollout) -> Evaluation:
        features = rollout.inputs["features"]  # [B, T, F]
        hidden = self.trunk(features)
        log_probs, entropy = self._distribution_log_probs(self.action_head(hidden), rollout.actions)
        return Evaluation(log_probs, self._values(features, hidden), entropy)

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
        if isinstance(observations[0], dict):
            stacked: Any = {n: np.stack([o[n] for o in observations], axis=1) for n in observations[0]}
        else:
            stacked = np.stack(observations, axis=1)
        return {"features": torch.from_numpy(encode(self.observation_space, stacked))}  # [N, T, F]

    @torch.no_grad()
    def predict_values(self, observation: Any) -> np.ndarray:
        features = self._features(observation)
        return self._values(features, self.trunk(features)).double().cpu().numpy()

    @torch.no_grad()
    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        out = self.action_head(self.trunk(self._features(observation)))
        actions = torch.from_numpy(np.asarray(action)).to(self.device)
        return self._distribution_log_probs(out, actions)[0].double().cpu().numpy()


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    if gain == 0.0:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(sizes: list[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [_linear(inputs, outputs, math.sqrt(2)), nn.Tanh() if activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers)


# -- language model ---------------------------------------------------------------------------------------


class CausalLMPolicy(Policy):
    """A causal language model that acts by its next-token distribution.

    Args:
        observation_space: ``Dict(input_ids, attention_mask)`` as ``TextRLHF-v0`` has it.
        action_space: ``Discrete(vocab_size)``.
        critic: "head" (a value head that reads the policy's last hidden states and leaves them alone),
            "shared" (the same, its gradient shaping the hidden states too: a large value error can then wreck
            the policy), "separate" (a copy of the body with a head), or None. Heads start at zero output.
        model: A :class:`~textrl_env.language_model.CausalLM`, a folder or a hub id.
        autocast: bfloat16 in evaluation; None turns it on where the device gains from it (CUDA).
    """

    whole_episodes = True

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        critic: str | None = "head",
        model: CausalLM | str | Path | None = None,
        autocast: bool | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, critic)
        check_choice("critic", critic, ("head", "shared", "separate", None))
        _check_text_spaces(observation_space, action_space)
        if model is None:
            raise ValueError(
                "CausalLMPolicy found no language model in the environment to start from; name one with "
                'policy_kwargs={"model": "path-or-hub-id"}'
            )
        self.lm = model.clone() if isinstance(model, CausalLM) else CausalLM.load(model, device="cpu")
        self.lm.model.requires_grad_(True)
        if self.lm.vocab_size != action_space.n:
            raise ValueError(
                f"the language model has {self.lm.vocab_size} tokens, the action space {action_space.n} actions"
            )
        self.model = self.lm.model  # registers the weights
        self.body = copy.deepcopy(self.model.base_model) if critic == "separate" else None
        self.detach_critic = critic == "head"
        width = self.model.config.get_text_config().hidden_size
        self.value_head = None if critic is None else _linear(width, 1, 0.0)
        device = self.lm.device
        self.to(device)
        self.autocast = device.type == "cuda" if autocast is None else autocast
        self._decoder: SlotDecoder | None = None

    def weights_changed(self) -> None:
        super().weights_changed()
        if self._decoder is not None:
            self._decoder.clear()

    def _next_logits(self, observation: Any) -> Tensor:
        """Acting logits ``[N, V]``; one cached step for slots that only grew."""
        mask = np.asarray(observation["attention_mask"])
        lengths = mask.sum(1)
        width = mask.shape[1]
        column = np.minimum(np.arange(width) + (width - lengths)[:, None], width - 1)
        tokens = np.take_along_axis(np.asarray(observation["input_ids"]), column, axis=1)  # left-aligned
        if self._decoder is None or self._decoder.num_slots != len(mask):
            self._decoder = SlotDecoder(self.lm, len(mask), width)
        return self._decoder.next_logits(tokens, lengths, np.arange(len(mask)))

    @torch.no_grad()
    def act(self, observation: Any, deterministic: bool = False):
        logits = self._next_logits(observation)
        chosen = sample_actions(logits, self.generator, deterministic)
        log_probs = gather_log_probs(logits, chosen).double().cpu().numpy()
        actions = chosen.cpu().numpy()
        self._last = (observation, actions, log_probs)
        # Values come from one pass over the finished episode: cheaper than one at every token.
        return actions, log_probs, np.zeros(len(actions))

    @torch.no_grad()
    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        actions = torch.from_numpy(np.asarray(action, dtype=np.int64)).to(self.device)
        return gather_log_probs(self._next_logits(observation), actions).double().cpu().numpy()

    def generate(
        self, prompts: list[np.ndarray], max_new_tokens: int, deterministic: bool = False
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Responses to prompts (token ids) and their log-probabilities; see ``language_model.generate``."""
        return generate_responses(self.lm, prompts, max_new_tokens, self.generator, deterministic)

    def evaluate(self, rollout: Rollout) -> Evaluation:
        mask = rollout.mask  # [B, T]
        steps = int(mask.any(0).nonzero()[-1]) + 1
        ids, attention = self._trim(rollout, steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits, hidden = self.lm.response_outputs(ids, attention, steps, with_hidden=self._shares_trunk)
            values = self._values(ids, attention, steps, hidden)
        log_z = logits.logsumexp(-1)
        log_probs = logits.gather(-1, rollout.actions[:, :steps, None]).squeeze(-1) - log_z
        entropy = log_z - ((logits - log_z.unsqueeze(-1)).exp() * logits).sum(-1)
        missing = (0, mask.shape[1] - steps)
        padded = [None if x is None else nn.functional.pad(x, missing) for x in (log_probs, values, entropy)]
        return Evaluation(*padded)

    @property
    def _shares_trunk(self) -> bool:
        return self.value_head is not None and self.body is None

    def _trim(self, rollout: Rollout, steps: int) -> tuple[Tensor, Tensor]:
        """Input ids and mask without the columns that no row of this batch uses."""
        ids, attention = rollout.inputs["input_ids"], rollout.inputs["attention_mask"]
        start = int(attention.any(0).nonzero()[0])
        end = ids.shape[1] - rollout.mask.shape[1] + steps
        return ids[:, start:end], attention[:, start:end]

    def _values(self, ids: Tensor, attention: Tensor, steps: int, hidden: Tensor | None) -> Tensor | None:
        if self.value_head is None:
            return None
        if self.body is not None:
            positions = (attention.long().cumsum(-1) - 1).clamp(min=0)
            out = self.body(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
            hidden = out.last_hidden_state[:, -steps - 1 : -1]
        elif self.detach_critic:
            hidden = hidden.detach()
        return self.value_head(hidden).squeeze(-1).float()

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
        # A whole episode is its first observation and the actions after it.
        first = observations[0]
        ids, attention = np.asarray(first["input_ids"]), np.asarray(first["attention_mask"])
        return {
            "input_ids": torch.from_numpy(np.concatenate([ids, actions * mask], axis=1)),
            "attention_mask": torch.from_numpy(np.concatenate([attention, mask.astype(np.int64)], axis=1)),
        }

    @torch.no_grad()
    def predict_values(self, observation: Any) -> np.ndarray:
        ids = torch.from_numpy(np.asarray(observation["input_ids"])).to(self.device)
        attention = torch.from_numpy(np.asarray(observation["attention_mask"])).to(self.device)
        # One column more, so that the state after the last token is among the predicted ones.
        ids, attention = (nn.functional.pad(x, (0, 1)) for x in (ids, attention))
        attention[:, -1] = 1
        _, hidden = self.lm.response_outputs(ids, attention, 1, with_hidden=self._shares_trunk)
        return self._values(ids, attention, 1, hidden)[:, 0].double().cpu().numpy()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the language model and its tokenizer as an ordinary Hugging Face folder."""
        self.lm.model.save_pretrained(str(folder))
        self.lm.tokenizer.save_pretrained(str(folder))


def _check_text_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    names = set(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else set()
    if names < {"input_ids", "attention_mask"} or not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            "CausalLMPolicy wants Dict(input_ids, attention_mask) observations and Discrete actions, got "
            f'{observation_space} and {action_space}; other environments want policy="MlpPolicy"'
        )


POLICIES: dict[str, type[Policy]] = {"MlpPolicy": MlpPolicy, "CausalLMPolicy": CausalLMPolicy}


def make_policy(
    policy: str | type[Policy], env: gym.vector.VectorEnv, critic: str | None, policy_kwargs: dict[str, Any]
) -> Policy:
    """Build a policy for an environment.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" (a language model where the env has one), or a class.
        env: The vector env.
        critic: One of the policy's kinds of critic, None, or "default" for the policy's own default.
        policy_kwargs: Passed on to the policy.
    """
    lm = _env_lm(env)
    if policy == "auto":
        policy = "MlpPolicy" if lm is None and "model" not in policy_kwargs else "CausalLMPolicy"
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not known. {did_you_mean(policy, [*POLICIES, 'auto'])}")
        policy = POLICIES[policy]
    kwargs = dict(policy_kwargs)
    if critic != "default":
        kwargs.setdefault("critic", critic)
    if issubclass(policy, CausalLMPolicy) and lm is not None:
        kwargs.setdefault("model", lm)
    check_keywords(policy.__name__, policy.__init__, kwargs)
    return policy(env.single_observation_space, env.single_action_space, **kwargs)


def _env_lm(env: gym.vector.VectorEnv) -> CausalLM | None:
    """The language model that an environment starts from, if it has one."""
    base = env.unwrapped
    if hasattr(base, "lm"):
        return base.lm
    inner = getattr(base, "envs", None)
    return getattr(inner[0].unwrapped, "lm", None) if inner else None
