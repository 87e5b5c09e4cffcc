"""A causal language model as policy: it acts by its next-token distribution."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from transformers import PreTrainedModel

from agents.policies.base import Evaluation, Policy, make_linear
from agents.policies.lora import LoraLM, check_no_adapter
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_choice
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import SlotDecoder, gather_log_probs, sample_actions
from textrl_env.lm.decoding import generate as generate_responses


class CausalLMPolicy(Policy):
    """A causal language model that acts by its next-token distribution.

    Args:
        observation_space: ``Dict(input_ids, attention_mask)`` as ``TextRLHF-v0`` has it.
        action_space: ``Discrete(vocab_size)``.
        critic: "head" (a value head that reads the policy's last hidden states and leaves them alone),
            "shared" (the same, its gradient shaping the hidden states too: a large value error can then wreck
            the policy), "separate" (a copy of the body with a head; with LoRA an adapter of its own over the same
            weights), or None. Heads start at zero output.
        model: A :class:`~textrl_env.lm.causal_lm.CausalLM`, a folder or a hub id.
        autocast: Matrix products in bfloat16; None does as the model says (by default, where CUDA is).
        lora_rank: Train adapters of this rank and leave the weights alone: the policy shares them with
            ``model``, the reference, which then costs no memory of its own. None trains every weight.
        lora_alpha: Scales the adapters by ``lora_alpha / lora_rank``; None is ``2 * lora_rank``.
        lora_targets: Names of the linear layers that get adapters, or "all-linear" for all of the body's.
    """

    whole_episodes = True

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        critic: str | None = "head",
        model: CausalLM | str | Path | None = None,
        autocast: bool | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: str | Sequence[str] = "all-linear",
    ) -> None:
        super().__init__(observation_space, action_space, critic)
        check_choice("critic", critic, ("head", "shared", "separate", None))
        _check_text_spaces(observation_space, action_space)
        if model is None:
            raise ValueError(
                "CausalLMPolicy found no language model in the environment to start from; name one with "
                'policy_kwargs={"model": "path-or-hub-id"}'
            )
        lm = model if isinstance(model, CausalLM) else CausalLM.load(model, device="cpu")
        check_no_adapter(lm.model)
        self.lora_rank = lora_rank
        if lora_rank is None:
            if lora_alpha is not None or lora_targets != "all-linear":
                raise ValueError("lora_alpha and lora_targets go with lora_rank, which is None")
            self.lm = lm.clone() if lm is model else lm
            # Steps of 1e-6 are lost in bfloat16 weights, so what learns is kept in float32 and only computes lower.
            if self.lm.model.dtype in (torch.bfloat16, torch.float16):
                self.lm.model.float()
                autocast = True if autocast is None else autocast
            self.lm.model.requires_grad_(True)
        else:
            self.lm = LoraLM(lm, lora_rank, lora_alpha, lora_targets)
        if autocast is not None:
            self.lm.autocast = autocast
        if self.lm.vocab_size != action_space.n:
            raise ValueError(
                f"the language model has {self.lm.vocab_size} tokens, the action space {action_space.n} actions"
            )
        self.model = self.lm.model  # registers the weights
        self.body = self._own_body() if critic == "separate" else None
        self.detach_critic = critic == "head"
        width = self.model.config.get_text_config().hidden_size
        self.value_head = None if critic is None else make_linear(width, 1, 0.0)
        self.to(self.lm.device)
        self.autocast = self.lm.autocast
        self._decoder: SlotDecoder | None = None

    def _own_body(self) -> PreTrainedModel:
        """A body for the critic alone."""
        if isinstance(self.lm, LoraLM):
            return self.lm.another_body()
        return copy.deepcopy(self.model.base_model)

    def weights_changed(self) -> None:
        super().weights_changed()
        if self._decoder is not None:
            self.lm.for_decoding()
            self._decoder.clear()

    def _next_logits(self, observation: Any) -> Tensor:
        """Acting logits ``[N, V]``; one cached step for slots that only grew."""
        mask = np.asarray(observation["attention_mask"])
        lengths = mask.sum(1)
        width = mask.shape[1]
        column = np.minimum(np.arange(width) + (width - lengths)[:, None], width - 1)
        tokens = np.take_along_axis(np.asarray(observation["input_ids"]), column, axis=1)  # left-aligned
        if self._decoder is None or self._decoder.num_slots != len(mask):
            self._decoder = SlotDecoder(self.lm.for_decoding(), len(mask), width)
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
        prompts, responses = _sequences(rollout)
        shares_trunk = self.value_head is not None and self.body is None
        log_probs, entropy, states = self.lm.evaluate(prompts, responses, with_states=shares_trunk)
        values = self._values(prompts, responses, states)
        real = rollout.inputs["attention_mask"][:, -rollout.mask.shape[1] :].bool()  # [B, T]
        blank = torch.zeros(real.shape, device=real.device)
        flat = (log_probs, values, entropy)
        return Evaluation(*(None if x is None else blank.masked_scatter(real, x) for x in flat))

    def _values(
        self, prompts: list[np.ndarray], responses: list[np.ndarray], states: Tensor | None
    ) -> Tensor | None:
        """The critic's values before each response token, float32 and flat."""
        if self.value_head is None:
            return None
        if self.body is not None:
            states = self.lm.response_states(prompts, responses, self.body)
        elif self.detach_critic:
            states = states.detach()
        return self.value_head(states.float()).squeeze(-1)

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
        mask = np.asarray(observation["attention_mask"]).astype(bool)
        prompts = [row[real] for row, real in zip(np.asarray(observation["input_ids"]), mask, strict=True)]
        anything = [np.zeros(1, dtype=np.int64)] * len(prompts)
        states = None if self.body is not None else self.lm.response_states(prompts, anything)
        return self._values(prompts, anything, states).double().cpu().numpy()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the language model and its tokenizer as an ordinary Hugging Face folder, adapters merged."""
        if isinstance(self.lm, LoraLM):
            self.lm.save_pretrained(folder)
            return
        self.lm.model.save_pretrained(str(folder))
        self.lm.tokenizer.save_pretrained(str(folder))


def _sequences(rollout: Rollout) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and responses of a rollout, without their padding."""
    ids, mask = (rollout.inputs[name].cpu().numpy() for name in ("input_ids", "attention_mask"))
    before = ids.shape[1] - rollout.mask.shape[1]
    mask = mask.astype(bool)
    prompts = [row[:before][real[:before]] for row, real in zip(ids, mask, strict=True)]
    responses = [row[before:][real[before:]] for row, real in zip(ids, mask, strict=True)]
    return prompts, responses


def _check_text_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    names = set(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else set()
    if not names >= {"input_ids", "attention_mask"} or not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            "CausalLMPolicy wants Dict(input_ids, attention_mask) observations and Discrete actions, got "
            f'{observation_space} and {action_space}; other environments want policy="MlpPolicy"'
        )
