"""stable-baselines3 on these environments: its own PPO and A2C train a language model, token by token.

Three pieces. :class:`GymVecEnv` hands any Gymnasium vector env to stable-baselines3, all slots in one batched
step. :class:`CausalLMActorCriticPolicy` acts with the environment's own language model, its pre-trained weights
as they are. :func:`bind_policy` tells the environment who acts, and :class:`TextRLHFCallback` does that at the
start of training and logs the score and the KL. :class:`SlotRolloutBuffer` makes PPO's updates cheaper::

    envs = GymVecEnv(gym.make_vec("TextRLHF-v0", num_envs=64))
    model = PPO(CausalLMActorCriticPolicy, envs, policy_kwargs={"lm": envs.get_attr("lm")[0]})
    model.learn(100_000, callback=TextRLHFCallback())
    model.policy.save_pretrained("my-model")

Left out: stable-baselines3's off-policy algorithms and gSDE, a critic with a body of its own, mixed precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, Schedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor, nn

from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.slot_decoder import SlotDecoder
from textrl_env.sb3.vec_env import GymVecEnv

__all__ = ["CausalLMActorCriticPolicy", "GymVecEnv", "SlotRolloutBuffer", "TextRLHFCallback", "bind_policy"]


class CausalLMActorCriticPolicy(ActorCriticPolicy):
    """A causal language model that acts by its next-token distribution, for PPO and A2C.

    The actor is a trainable copy of ``lm``; the critic a linear value head on its last hidden state, zero at
    the start. Acting takes one cached step of the model for each token; evaluating a minibatch takes one pass
    over the distinct sequences in it, since a prefix is part of the sequence it grew into. Dropout is off.

    Args:
        observation_space: ``Dict(input_ids, attention_mask)``, left-padded, as ``TextRLHF-v0`` has it.
        action_space: ``Discrete(vocab_size)``.
        lr_schedule: From stable-baselines3.
        lm: The language model to start from, ``env.unwrapped.lm`` or a folder or hub id; pass it with
            ``policy_kwargs={"lm": ...}``.
        use_sde: Must be False.
        optimizer_class: Any torch optimizer.
        optimizer_kwargs: Its arguments, the learning rate excluded.

    Attributes:
        lm: The policy's own :class:`~textrl_env.lm.causal_lm.CausalLM`.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        lm: CausalLM | str | Path | None = None,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        _check_spaces(observation_space, action_space)
        if lm is None:
            raise ValueError(
                'CausalLMActorCriticPolicy needs policy_kwargs={"lm": ...}: the environment\'s language model '
                '(envs.get_attr("lm")[0]), or a folder or hub id'
            )
        if use_sde:
            raise ValueError("use_sde=True is for continuous actions; tokens are discrete")
        self._start_from = lm  # read by _build, which the parent's constructor calls
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,  # it would overwrite every pre-trained Linear
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        lm = self.__dict__.pop("_start_from")
        self.lm = lm.clone() if isinstance(lm, CausalLM) else CausalLM.load(lm, device="cpu")
        if self.lm.vocab_size != self.action_space.n:
            raise ValueError(
                f"the language model has {self.lm.vocab_size} tokens, the action space {self.action_space.n} actions"
            )
        self.model = self.lm.model.requires_grad_(True)  # registers the weights
        head = self.model.get_output_embeddings()
        self.value_net = nn.Linear(head.weight.shape[-1], 1, device=self.lm.device)
        nn.init.zeros_(self.value_net.weight)
        nn.init.zeros_(self.value_net.bias)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
        self._decoder: SlotDecoder | None = None
        self._last: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None
        self._weights: tuple = ()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "lm": self.lm,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def train(self, mode: bool = True) -> CausalLMActorCriticPolicy:
        """Training mode for all but the language model: dropout would make the ratio differ from 1."""
        super().train(mode)
        self.model.eval()
        return self

    # -- acting ---------------------------------------------------------------------------------------------

    def forward(self, obs: dict[str, Tensor], deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Act, at the cost of one new token in each slot. Without gradient.

        Returns:
            actions int64 ``[N]``, values ``[N, 1]``, log_probs ``[N]``.
        """
        logits, values = self._next(obs)
        distribution = self.action_dist.proba_distribution(logits)
        actions = distribution.get_actions(deterministic=deterministic)
        log_probs = distribution.log_prob(actions)
        acted = (obs["input_ids"], obs["attention_mask"], actions, log_probs.double())
        self._last = tuple(x.detach().cpu().numpy() for x in acted)
        return actions, values, log_probs

    def _predict(self, observation: dict[str, Tensor], deterministic: bool = False) -> Tensor:
        return self(observation, deterministic)[0]

    def predict_values(self, obs: dict[str, Tensor]) -> Tensor:
        """The critic's values ``[N, 1]``, without gradient."""
        same_slots = self._decoder is not None and len(obs["input_ids"]) == self._decoder.num_slots
        if same_slots:
            return self._next(obs)[1]
        with torch.no_grad():
            return self._evaluate(obs)[1]

    def log_prob(self, observation: dict[str, np.ndarray], action: np.ndarray) -> np.ndarray:
        """The acting policy's log-probabilities of given actions; those of its last action are not computed twice.

        Args:
            observation: Arrays ``[N, L]``.
            action: ``[N]``.

        Returns:
            float64 ``[N]``.
        """
        self._forget_if_changed()
        ids, mask = (np.asarray(observation[name]) for name in ("input_ids", "attention_mask"))
        if self._last is not None and all(map(np.array_equal, self._last, (ids, mask, np.asarray(action)))):
            return self._last[3]
        obs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with torch.no_grad():
            logits, _ = self._evaluate(obs)
            chosen = torch.as_tensor(np.asarray(action), device=logits.device)
            return self.action_dist.proba_distribution(logits).log_prob(chosen).double().cpu().numpy()

    def slot_log_prob(self, slot: int, observation: dict[str, np.ndarray], action: int) -> float:
        """The same for one observation, that of ``slot`` in the batch that has just acted."""
        self._forget_if_changed()
        if self._last is not None and slot < len(self._last[0]):
            ids, mask, actions, log_probs = (array[slot] for array in self._last)
            seen = np.array_equal(ids, observation["input_ids"])
            seen = seen and np.array_equal(mask, observation["attention_mask"])
            if seen and actions == action:
                return float(log_probs)
        batch = {name: np.asarray(value)[None] for name, value in observation.items()}
        return float(self.log_prob(batch, np.array([action]))[0])

    def _next(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Acting logits ``[N, V]`` and values ``[N, 1]`` from the key/value cache."""
        self._forget_if_changed()
        tokens, lengths = _left_aligned(obs)
        if self._decoder is None or self._decoder.num_slots != len(tokens):
            self._decoder = SlotDecoder(_LogitsAndValue(self), len(tokens), tokens.shape[1])
        out = self._decoder.next_logits(tokens, lengths, np.arange(len(tokens)))
        return out[:, :-1], out[:, -1:]

    def _forget_if_changed(self) -> None:
        """Drop the cache and the last log-probabilities once the weights are not those they were made with."""
        weights = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if weights != self._weights:
            self._decoder, self._last, self._weights = None, None, weights

    # -- evaluating -----------------------------------------------------------------------------------------

    def evaluate_actions(self, obs: dict[str, Tensor], actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values ``[B, 1]``, log_probs ``[B]`` and entropies ``[B]`` of what was done, with gradient."""
        logits, values = self._evaluate(obs)
        distribution = self.action_dist.proba_distribution(logits)
        return values, distribution.log_prob(actions.long().flatten()), distribution.entropy()

    def get_distribution(self, obs: dict[str, Tensor]) -> Distribution:
        """The distribution of the next token, with gradient."""
        return self.action_dist.proba_distribution(self._evaluate(obs)[0])

    def _evaluate(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Acting logits ``[B, V]`` and values ``[B, 1]`` by one causal pass, no cache, with gradient."""
        tokens, lengths = _left_aligned(obs)
        kept, row = _merge_prefixes(tokens, lengths)
        width = int(lengths.max())
        device = self.lm.device
        last = tuple(torch.from_numpy(x).to(device) for x in (row, lengths - 1))
        mask = np.arange(width) < lengths[kept, None]
        logits, values = self._run(
            last,
            input_ids=torch.from_numpy(tokens[kept, :width]).to(device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
            use_cache=False,
        )
        return logits[0], values[0]

    def _run(self, positions: tuple[Tensor, Tensor] | None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the model; acting logits ``[..., V]`` and values ``[..., 1]``.

        What goes into the output embedding is caught on the way: the value head needs it, and only the wanted
        ``positions`` (rows and columns, each ``[B]``) are worth a row of logits; they come as ``[1, B, ...]``.
        """
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple) -> tuple:
            hidden = args[0] if positions is None else args[0][positions].unsqueeze(0)
            caught.append(hidden)
            return (hidden, *args[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            logits = self.model(**inputs).logits
        finally:
            handle.remove()
        return self.lm.action_logits(logits), self.value_net(caught[0].to(self.value_net.weight.dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the language model and its tokenizer as an ordinary Hugging Face folder."""
        self.lm.model.save_pretrained(str(folder))
        self.lm.tokenizer.save_pretrained(str(folder))


class _LogitsAndValue:
    """The policy as SlotDecoder calls a language model: the value comes as one more column of the logits."""

    def __init__(self, policy: CausalLMActorCriticPolicy) -> None:
        self.policy, self.model = policy, self
        self.config, self.dtype = policy.lm.model.config, policy.lm.model.dtype
        self.vocab_size = policy.lm.vocab_size + 1
        self.device = policy.lm.device
        self.slot_cache_works = policy.lm.slot_cache_works
        self.precision = policy.lm.precision
        self.masks, self.padding_works = policy.lm.masks, policy.lm.padding_works

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.cat(self.policy._run(None, **inputs), dim=-1))

    def action_logits(self, logits: Tensor) -> Tensor:
        return logits

    def fused_body(self, body: Any = None, max_length: int = 0) -> None:
        return None  # the value head reads what goes into the model's own output embedding

    def recorder(self) -> None:
        return None  # every step is asked for by somebody else's loop


def _check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    names = set(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else set()
    if names < {"input_ids", "attention_mask"} or not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            "CausalLMActorCriticPolicy wants Dict(input_ids, attention_mask) observations and Discrete actions, "
            f'got {observation_space} and {action_space}; other environments want "MlpPolicy" or '
            '"MultiInputPolicy"'
        )


def _left_aligned(obs: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded observations -> int64 tokens ``[B, L]`` from column 0 on, and their lengths ``[B]``."""
    # Token ids may arrive as floats: stable-baselines3 casts what it takes for features.
    ids, mask = (
        obs[name].detach().cpu().numpy().astype(np.int64) for name in ("input_ids", "attention_mask")
    )
    lengths = mask.sum(1)
    width = mask.shape[1]
    column = np.minimum(np.arange(width) + (width - lengths)[:, None], width - 1)
    return np.take_along_axis(ids, column, axis=1), lengths


def _merge_prefixes(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are not a prefix of another, and for each row the place of the one it is a prefix of.

    In lexicographic order, a row that is a prefix of any other is a prefix of its successor.

    Returns:
        ``kept`` int ``[K]``, indices of rows; ``row`` int ``[B]``, indices into ``kept``.
    """
    padded = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens + 1, 0)
    keys = [row.tobytes() for row in padded.astype(">u4")]  # big-endian bytes sort as the numbers do
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    ordered = padded[order]
    goes_on = ((ordered[:-1] == ordered[1:]) | (ordered[:-1] == 0)).all(1)
    last = np.flatnonzero(~np.append(goes_on, False))
    row = np.empty(len(keys), dtype=np.int64)
    row[order] = np.searchsorted(last, np.arange(len(keys)))
    return order[last], row


class SlotRolloutBuffer(DictRolloutBuffer):
    """A rollout whose minibatches are whole stretches of a few slots, for PPO's ``rollout_buffer_class``.

    The rows of an episode then meet in one minibatch, and the policy passes each episode about once an epoch;
    with rows shuffled one by one it passes nearly every episode in every minibatch.
    """

    def get(self, batch_size: int | None = None) -> Iterator[DictRolloutBufferSamples]:
        """Every row once, the slots in random order; ``batch_size`` rows at a time (None: all)."""
        if not self.generator_ready:
            self.observations = {name: self.swap_and_flatten(x) for name, x in self.observations.items()}
            for name in ("actions", "values", "log_probs", "advantages", "returns"):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True
        slots = np.random.permutation(self.n_envs)  # noqa: NPY002, the generator stable-baselines3 seeds
        rows = (slots[:, None] * self.buffer_size + np.arange(self.buffer_size)).ravel()
        size = len(rows) if batch_size is None else batch_size
        for start in range(0, len(rows), size):
            yield self._get_samples(rows[start : start + size])


# -- who acts -------------------------------------------------------------------------------------------------


def bind_policy(model: BaseAlgorithm, env: VecEnv | None = None) -> None:
    """Tell an environment that ``model`` acts in it, so that the KL in the reward is that of its policy.

    Args:
        model: A stable-baselines3 or sb3-contrib algorithm whose policy is a distribution over actions: PPO, A2C, TRPO,
            RecurrentPPO, MaskablePPO, with a :class:`CausalLMActorCriticPolicy` or any network.
        env: Where it acts; its own environment if None.

    Raises:
        TypeError: The environment runs in other processes, where the policy's weights would go stale; or the policy
            acts by values (DQN, QRDQN) and has no probabilities.
    """
    env = model.get_env() if env is None else env
    base = env.unwrapped
    if not hasattr(model.policy, "log_prob") and not isinstance(
        getattr(model.policy, "action_dist", None), Distribution
    ):
        raise TypeError(
            f"{type(model).__name__} acts by the values of actions and not by their probabilities, so there is no KL "
            "of its policy; make the env with kl_coef=0, or say who acts yourself with textrl_env.ActingPolicy"
        )
    if isinstance(base, GymVecEnv):
        base.env_method("bind_policy", lambda obs, action: _log_prob(model, obs, action))
    elif isinstance(base, DummyVecEnv):
        for slot in range(base.num_envs):
            base.env_method("bind_policy", partial(_slot_log_prob, model, slot), indices=slot)
    else:
        raise TypeError(
            f"bind_policy() cannot reach the policy from a {type(base).__name__}; use "
            "GymVecEnv(gym.make_vec(...)), which steps all slots in one batch"
        )


def _log_prob(model: BaseAlgorithm, observation: Any, action: Any) -> np.ndarray:
    """Log-probabilities ``[N]`` of what the policy has just done."""
    if hasattr(model.policy, "log_prob"):
        return model.policy.log_prob(observation, action)
    # A policy keeps the distribution that it has just acted with, masked and from its hidden state where it has one.
    chosen = torch.as_tensor(np.asarray(action), device=model.device)
    with torch.no_grad():
        return model.policy.action_dist.log_prob(chosen).double().cpu().numpy()


def _slot_log_prob(model: BaseAlgorithm, slot: int, observation: Any, action: int) -> float:
    if hasattr(model.policy, "slot_log_prob"):
        return model.policy.slot_log_prob(slot, observation, action)
    # Every slot's own row of the batch that has just acted; of the others no action is known, and none is asked for.
    slots = model.policy.action_dist.distribution.logits.shape[0]
    return float(_log_prob(model, observation, np.full(slots, action))[slot])


class TextRLHFCallback(BaseCallback):
    """Bind the policy when training starts, and log what ``rollout/ep_rew_mean`` mixes.

    It serves every algorithm that :func:`bind_policy` does.

    Means over the episodes since the last log: ``objective/scores`` (before the KL), ``objective/kl`` (summed
    over the response), ``objective/gold_scores`` where there is a gold judge, ``completions/mean_length``.
    """

    names: ClassVar[dict[str, str]] = {
        "score": "objective/scores",
        "kl_sum": "objective/kl",
        "score/gold": "objective/gold_scores",
        "response_length": "completions/mean_length",
    }

    def _on_training_start(self) -> None:
        bind_policy(self.model, self.training_env)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "score" in info:
                for key, name in self.names.items():
                    if key in info:
                        self.logger.record_mean(name, info[key])
        return True
