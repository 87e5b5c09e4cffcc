"""A causal language model as policy: it acts by its next-token distribution."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.parallel import processes, sharding
from agents.parallel.processes import current
from agents.policies.base import Evaluation, Policy, make_linear
from agents.policies.lora import LoraLM, check_no_adapter
from agents.rollouts.rollout import Rollout
from reward_models.loading import DTYPES, save_model
from textrl_env.errors import check_choice, check_range
from textrl_env.generators.answers import ask, push_weights
from textrl_env.generators.registry import NATIVE, make_generator
from textrl_env.generators.sampling import Sampling, check_knobs, limit_logits
from textrl_env.lm import checkpointing
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import DecodedSequences
from textrl_env.lm.decoding import generate as generate_sequences
from textrl_env.lm.next_tokens import gather_log_probs, sample_actions
from textrl_env.lm.sequences import ENVIRONMENT, POLICY, PROMPT, Sequences, step_places
from textrl_env.lm.slot_decoder import SlotDecoder
from textrl_env.lm.stop_strings import StopStrings
from textrl_env.lm.streams import Streams

#: ``compare(student, rollout)``: log-probabilities, entropies and, with gradient, a divergence, each ``[m]``.
Compare = Callable[[CausalLM, Rollout], tuple[Tensor, Tensor, Tensor]]


class CausalLMPolicy(Policy):
    """A causal language model that acts by its next-token distribution.

    Args:
        observation_space: ``Dict(input_ids, attention_mask)`` as ``TextRLHF-v0`` has it.
        action_space: ``Discrete(vocab_size)``.
        critic: "head" (a value head that reads the policy's last hidden states and leaves them alone),
            "shared" (the same, its gradient shaping the hidden states too: a large value error can then wreck
            the policy), "separate" (a copy of the body with a head; with LoRA an adapter of its own over the same
            weights), or None. Heads start at zero output.
        value_hidden: Units of the value head's hidden layer; 0 is a linear head.
        gradient_checkpointing: Compute a layer's activations again in the backward pass instead of keeping them.
        save_dtype: What :meth:`save_pretrained` writes numbers in: "float32", "bfloat16", "float16", or "auto" for what
            the model came in.
        model: A :class:`~textrl_env.lm.causal_lm.CausalLM`, a folder or a hub id.
        autocast: Matrix products in bfloat16; None does as the model says (by default, where CUDA is).
        lora_rank: Train adapters of this rank and leave the weights alone: the policy shares them with
            ``model``, the reference, which then costs no memory of its own. None trains every weight.
        lora_alpha: Scales the adapters by ``lora_alpha / lora_rank``; None is ``2 * lora_rank``.
        lora_targets: Names of the linear layers that get adapters, or "all-linear" for all of the body's.
        generator: What writes responses where whole episodes are run at once: "native" (our own decoder), an engine by
            name ("transformers", "vllm"), the address of a server ("http://host:port"), "package.module:Name", or an
            object with ``generate`` and ``update_weights`` (:class:`~textrl_env.protocols.Generator`). Whoever wrote
            them, this policy says what the log-probabilities are.
        generator_kwargs: Arguments of an engine; of our own decoder ``decode_step``, see
            :class:`~textrl_env.lm.causal_lm.CausalLM`.
        sampling: What is changed about sampling: ``temperature`` (of the generator alone), ``top_p``, ``top_k``,
            ``min_p``, ``min_new_tokens``. The responses are then not the policy's own, which is corrected for as it is
            for any other generator.
        shard: Of several processes, each holds a part of the trained weights, their gradients and the optimiser's
            states (FSDP2), and the weights whole once more, to write with; see :mod:`agents.parallel.sharding`.

    Attributes:
        lm: Writes, is evaluated and saved.
        trained: Learns; the same, unless its weights are split.
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
        value_hidden: int = 64,
        gradient_checkpointing: bool = False,
        save_dtype: str = "auto",
        generator: Any = NATIVE,
        generator_kwargs: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        shard: bool = False,
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
        self.lora_rank, self.shard = lora_rank, shard
        check_choice("save_dtype", save_dtype, DTYPES)
        self.saved_dtype = lm.model.dtype if save_dtype == "auto" else getattr(torch, save_dtype)
        if lora_rank is None:
            if lora_alpha is not None or lora_targets != "all-linear":
                raise ValueError("lora_alpha and lora_targets go with lora_rank, which is None")
            if getattr(lm.model, "is_quantized", False):
                raise ValueError(
                    "quantised weights cannot be trained, only adapters over them: give lora_rank too"
                )
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
        self.trained = self.lm
        self.body = self._own_body() if critic == "separate" else None
        if gradient_checkpointing:
            for body in (self.lm.body, self.body):
                if body is not None:
                    checkpointing.switch_on(body)
        self.critic, self.value_hidden = critic, value_hidden
        self.detach_critic = critic == "head"
        width = self.model.config.get_text_config().hidden_size
        check_range(0, value_hidden=value_hidden)
        head = ValueHead(width, value_hidden) if value_hidden else make_linear(width, 1, 0.0)
        self.value_head = None if critic is None else head
        self.to(self.lm.device)
        self.autocast = self.lm.autocast
        #: Says how far the student's distributions are from a teacher's; None where there is none.
        self.compare: Compare | None = None
        self._decoder: SlotDecoder | None = None
        self.engine, self.engine_name = make_generator(generator, generator_kwargs)
        if self.engine is None:
            for name, value in (generator_kwargs or {}).items():
                setattr(self.lm, name, value)
        self.sampling = check_knobs(sampling)
        self._engine_waits = True
        self._stop: StopStrings | None = None
        self._memory: DecodedSequences | None = None

    def _own_body(self) -> PreTrainedModel:
        """A body for the critic alone."""
        if isinstance(self.lm, LoraLM):
            return self.lm.another_body()
        return copy.deepcopy(self.model.base_model)

    def split(self, count: int) -> None:
        """Split what learns over ``count`` processes, and keep it whole once more."""
        ways = self.lm.ways
        if ways.packing is None and not ways.padding:
            raise ValueError(
                f"{type(self.model).__name__} reads sequences of one length at a time, so that processes with "
                "different ones would wait for each other for ever: leave shard out"
            )
        self.lm = self.trained.clone()
        self.trained.one_pass = True  # every pass gathers the weights, in all processes at once
        self.lm.model.requires_grad_(False)
        sharding.split(self, count)
        self.is_split = True

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.lm.model.named_parameters() if self.is_split else self.named_parameters()

    def critic_parameters(self) -> list[nn.Parameter]:
        modules = [module for module in (self.body, self.value_head) if module is not None]
        return [parameter for module in modules for parameter in module.parameters()]

    def weights_changed(self) -> None:
        super().weights_changed()
        if self.is_split:
            sharding.put_together(self.model, self.lm.model)
        self._engine_waits = True
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
    ) -> Sequences:
        """Responses to prompts (token ids) and their log-probabilities; see :func:`~textrl_env.lm.generate`.

        Override it for another generator. A pair of lists (responses, log-probabilities) will do as well; unless our
        own decoder has written them, the log-probabilities are computed again by this policy.
        """
        sampling = self._sampling(max_new_tokens, deterministic)
        if self.engine is None:
            limit = limit_logits(sampling, self.lm.temperature)
            how = {"limit": limit, "stop": self._stop, "memory": self._memory}
            source = self.generator if self.streams is None else self.streams
            return generate_sequences(self.lm, prompts, max_new_tokens, source, deterministic, **how)
        return self._asking(prompts, sampling)()

    def generation(self, prompts: list[np.ndarray], max_new_tokens: int) -> Callable[[], Sequences]:
        """What an outside generator is to write, by the weights and the random stream of now; a call writes it."""
        return self._asking(prompts, self._sampling(max_new_tokens, False))

    def hand_over(self, group: processes.Processes) -> None:
        """Give an outside generator the present weights, if it has not got them.

        Args:
            group: Who shares the run: one server for all of them gets the weights once, from the main process.
        """
        if self.engine is None or not self._engine_waits:
            return

        def push() -> None:
            push_weights(self.engine, self.lm.plain_model(), self.engine_name)

        if getattr(self.engine, "serves_many", False):
            group.on_main(push)
        else:
            push()
        self._engine_waits = False

    def _asking(self, prompts: list[np.ndarray], sampling: Sampling) -> Callable[[], Sequences]:
        self.hand_over(processes.ALONE)  # unless it has been done already
        streams = Streams.draw(self.generator, len(prompts)) if self.streams is None else self.streams
        seeds = (streams.keys >> np.uint64(33)).astype(
            np.int64
        )  # of 31 bits: engines differ in what they take
        sampling = dataclasses.replace(sampling, seed=int(seeds[0]), seeds=tuple(seeds.tolist()))
        first_end = None if self._stop is None else self._stop.first_end
        return partial(ask, self.engine, prompts, sampling, self.engine_name, first_end)

    def _sampling(self, max_new_tokens: int, deterministic: bool) -> Sampling:
        own = {"temperature": self.lm.temperature} | self.sampling
        return Sampling(
            max_new_tokens,
            tuple(self.lm.eos_ids.tolist()),
            self.lm.vocab_size,
            num_logits=self.lm.model.config.get_text_config().vocab_size,
            deterministic=deterministic,
            **own,
        )

    @contextlib.contextmanager
    def talking(self, max_length: int, stop: StopStrings | None = None) -> Iterator[None]:
        """Within it, :meth:`generate` writes turns of conversations and does not read again what it has written.

        Args:
            max_length: Tokens that a conversation can have.
            stop: Texts that end a turn.
        """
        self._stop, self._memory = stop, DecodedSequences(max_length)
        try:
            yield
        finally:
            self._stop = self._memory = None

    def prepare(self, rollout: Rollout) -> None:
        rollout.inputs["sequences"].derived(step_places)
        self.trained.layout(rollout.inputs["sequences"])

    def evaluate(self, rollout: Rollout) -> Evaluation:
        if self.is_split and current().on_its_own:
            # Callbacks ask while the other processes wait: of the weights that are whole, which say no values.
            sequences, steps = rollout.inputs["sequences"].to(self.device), rollout.mask.shape[1]
            log_probs, entropy, _ = self.lm.evaluate(sequences)
            return Evaluation(sequences.padded(log_probs, steps), None, sequences.padded(entropy, steps))
        return self._computing(lambda: self._evaluate(rollout))

    def forward(self, work: Callable[[], Any] | Rollout) -> Any:
        """What :meth:`evaluate` does, or any other work, while split weights are gathered."""
        return work() if callable(work) else self._evaluate(work)

    def _computing(self, work: Callable[[], Any]) -> Any:
        # Whoever gathers split weights listens to the module's call.
        if self.is_split and current().on_its_own:
            raise RuntimeError(
                "a critic whose weights are split over processes is asked by all of them at once, and the others wait"
            )
        return self(work) if self.is_split else work()

    def _evaluate(self, rollout: Rollout) -> Evaluation:
        sequences = rollout.inputs["sequences"].to(self.device)
        if self.compare is not None and torch.is_grad_enabled():
            steps = rollout.mask.shape[1]
            found = [sequences.padded(x, steps) for x in self.compare(self.trained, rollout)]
            return Evaluation(found[0], None, found[1], found[2])
        shares_trunk = self.value_head is not None and self.body is None
        log_probs, entropy, states = self.trained.evaluate(sequences, with_states=shares_trunk)
        values = self._values(sequences, states)
        steps = rollout.mask.shape[1]
        flat = (log_probs, values, entropy)
        return Evaluation(*(None if x is None else sequences.padded(x, steps) for x in flat))

    @torch.no_grad()
    def squared_probabilities(self, rollout: Rollout) -> Tensor:
        sequences = rollout.inputs["sequences"].to(self.device)
        squares = self._computing(lambda: self.trained.squared_probabilities(sequences))
        return sequences.padded(squares, rollout.mask.shape[1])

    def _values(self, sequences: Sequences, states: Tensor | None) -> Tensor | None:
        """The critic's values before each of the policy's tokens, float32 ``[m]``."""
        if self.value_head is None:
            return None
        if self.body is not None:
            states = self.trained.policy_states(sequences, self.body)
        elif self.detach_critic:
            states = states.detach()
        return self.value_head(states.float()).squeeze(-1)

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Sequences]:
        lengths = np.stack([np.asarray(o["attention_mask"]).sum(1) for o in observations], axis=1)  # [N, T]
        episodes = [
            _episode(observations, slot, written, np.flatnonzero(alive), lengths[slot])
            for slot, (written, alive) in enumerate(zip(actions, mask, strict=True))
        ]
        return {"sequences": Sequences.concatenate(episodes)}

    @torch.no_grad()
    def predict_values(self, observation: Any) -> np.ndarray:
        ids, mask = (np.asarray(observation[name]) for name in ("input_ids", "attention_mask"))
        shown = Sequences.from_padded(ids, mask, np.zeros_like(ids))
        # The state that predicts a token does not look at it, so any token may stand in its place.
        sequences = shown.extended([[0]] * len(shown), POLICY)

        def compute() -> Tensor:
            states = None if self.body is not None else self.trained.policy_states(sequences)
            return self._values(sequences, states)

        return self._computing(compute).double().cpu().numpy()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the language model and its tokenizer as an ordinary Hugging Face folder, adapters merged.

        Numbers are written in the precision that the model came in; what is trained has more, see :attr:`saved_dtype`.
        """
        if isinstance(self.lm, LoraLM):
            self.lm.save_pretrained(folder, self.saved_dtype)
            return
        save_model(self.lm.model, folder, self.saved_dtype)
        self.lm.tokenizer.save_pretrained(str(folder))


class ValueHead(nn.Module):
    """Values ``[..., 1]`` from hidden states ``[..., width]``, through one hidden layer, zero to begin with.

    What a text is worth is no linear function of the states that predict its next token: on the embedded world's
    rollouts a linear head, even one fitted exactly, explains half of what this one does.

    Args:
        width: Of the hidden states.
        units: Of the hidden layer.
    """

    #: Inputs are scaled as if there were so many: with Adam a step then moves a unit as far at any width, and one
    #: learning rate suits them all (Yang et al. 2022, Tensor Programs V).
    _REFERENCE_WIDTH = 64

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.scale = self._REFERENCE_WIDTH / width
        self.hidden = make_linear(width, units, 1 / self.scale)
        self.out = make_linear(units, 1, 0.0)

    def forward(self, states: Tensor) -> Tensor:
        # Some models have a few states a hundred times larger than the rest, and their last norm leaves them so.
        states = torch.nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6) * self.scale
        return self.out(torch.tanh(self.hidden(states)))


def _episode(
    observations: list[Any], slot: int, actions: np.ndarray, steps: np.ndarray, lengths: np.ndarray
) -> Sequences:
    """One slot's episode: its last observation and the last action; earlier ones stand where an observation ended.

    Args:
        observations: ``T`` batches of observations.
        slot: Which one.
        actions: Of this slot, ``[T]``.
        steps: The steps of the episode among the ``T``.
        lengths: Tokens that this slot showed at each step, int ``[T]``.
    """
    final = {name: np.asarray(x)[slot] for name, x in observations[steps[-1] if len(steps) else 0].items()}
    tokens = np.append(final["input_ids"][final["attention_mask"] > 0], actions[steps[-1:]])
    places = lengths[steps]
    if not np.array_equal(tokens[places], actions[steps]):
        raise ValueError(
            f"the observations of slot {slot} do not keep what the policy wrote: its actions {actions[steps].tolist()} "
            f"are not in {tokens.tolist()} where earlier observations ended, at {places.tolist()}"
        )
    written_by = np.full(len(tokens), ENVIRONMENT)
    written_by[: lengths[0]], written_by[places] = PROMPT, POLICY
    return Sequences(tokens, np.zeros(1), written_by)


def _check_text_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    names = set(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else set()
    if not names >= {"input_ids", "attention_mask"} or not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            "CausalLMPolicy wants Dict(input_ids, attention_mask) observations and Discrete actions, got "
            f'{observation_space} and {action_space}; other environments want policy="MlpPolicy"'
        )
