"""A Hugging Face causal language model as an environment and a policy see it.

:class:`CausalLM` is a model with its tokenizer, its end tokens and its temperature; it says log-probabilities
of whole responses in one causal pass. Both environments and policies are built on it and on
:class:`~textrl_env.lm.decoding.SlotDecoder`, which is why the step way and the fused way agree.

Log-probabilities here are those of the full softmax, in rollout, update and reference alike; where a generator draws
from less than that (top-k, top-p), it says with which probability, and the agents correct for the difference.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.data.encoding import TextEncoder
from reward_models.loading import LoadOptions, check_decoder, load_causal_lm, load_tokenizer
from reward_models.warning import warn
from textrl_env.errors import check_choice, check_keywords, did_you_mean
from textrl_env.lm import checkpointing
from textrl_env.lm.attention_masks import ONE, AttentionMasks
from textrl_env.lm.fused_llama import FusedLlama, is_watched
from textrl_env.lm.precision import bfloat16_products
from textrl_env.lm.recording import DECODE_STEPS, Recorder, make_recorder
from textrl_env.lm.self_check import Ways, can_be_recorded, find_ways
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.teacher_forcing import (
    ApartLayout,
    PackedLayout,
    PaddedLayout,
    linear_log_probs,
    linear_squared_probabilities,
)

#: Fast ways that can be switched off by name; each is a field of :class:`~textrl_env.lm.self_check.Ways`.
FAST_WAYS = ("packing", "cache", "fused", "shared_prompts")
#: What can be switched off besides, looked for only where it is wanted.
_RECORDED = "recorded"

#: What has been found of a model, by what was disabled.
_WAYS: WeakKeyDictionary[PreTrainedModel, dict[frozenset[str], Ways]] = WeakKeyDictionary()


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """``"auto"`` is CUDA, then Apple's MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_ends(tokenizer: PreTrainedTokenizerBase, listed: Sequence[int], size: int) -> None:
    """Raise a ValueError for an end token that the model has no output for, since no response could end with it."""
    named = [(f"the tokenizer's end token {tokenizer.eos_token!r}", tokenizer.eos_token_id)]
    named += [("an end token in generation_config.eos_token_id", end) for end in listed]
    for name, end in named:
        if end >= size:
            raise ValueError(
                f"{name} has the id {end}, but the model's head has {size} outputs (ids 0 to {size - 1}), so no "
                "response could end with it; call model.resize_token_embeddings(len(tokenizer)), or take an end token "
                "that the model has"
            )


class CausalLM:
    """A causal language model, its tokenizer and the distribution it acts with.

    Args:
        model: The transformers model. It is put into eval mode (dropout off) and stays there.
        tokenizer: Its tokenizer; must have an EOS token. A pad token is not needed: lengths are carried.
        temperature: Divides the logits everywhere: in sampling, update and reference.
        autocast: Matrix products in bfloat16, weights and sums as they are; None is where CUDA is.
        disable: Fast ways not to go, whatever the self-check finds: any of :data:`FAST_WAYS`, and "recorded" for steps
            that are recorded. Those named in the environment variable ``TEXTRL_DISABLE``, with commas between them, are
            added.
        decode_step: How a token's step is made when whole responses are written: "auto" (recorded as a CUDA graph where
            CUDA is and the self-check passes), "eager" (launched by Python), "static" (fixed shapes without a record),
            "cuda_graph", or "compile" (by ``torch.compile``, recorded where CUDA is).

    Raises:
        ValueError: There is no EOS token, or the model has no output for an end token.

    Attributes:
        encoder: Texts and conversations as token ids, by the rules of all training.
        eos_ids: Every token id that ends a response, int64 array: the tokenizer's EOS, those that
            ``generation_config`` lists, and the one with which the chat template ends a turn.
        pad_id: What fills unused positions; never read.
        vocab_size: Number of actions: ids that both the tokenizer and the logits have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 1.0,
        autocast: bool | None = None,
        disable: Collection[str] = (),
        decode_step: str = "auto",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so no response could end; "
                'set one, for example tokenizer.eos_token = "</s>", and save it beside the model'
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        check_decoder(model.config, type(model).__name__)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.autocast = self.device.type == "cuda" if autocast is None else autocast
        listed = getattr(model.generation_config, "eos_token_id", None) or []
        listed = [listed] if isinstance(listed, int) else list(listed)
        self.encoder = TextEncoder(tokenizer)
        _check_ends(tokenizer, listed, model.config.vocab_size)
        turn_end = self.encoder.turn_end_id
        turn_ends = [] if turn_end is None or turn_end >= model.config.vocab_size else [turn_end]
        self.eos_ids = np.unique(np.array([tokenizer.eos_token_id, *listed, *turn_ends], dtype=np.int64))
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Embedding matrices are often padded past the vocabulary; no action is a token that is not one.
        self.vocab_size = min(max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size)
        named = [name.strip() for name in os.environ.get("TEXTRL_DISABLE", "").split(",")]
        self.disable = frozenset(disable) | {name for name in named if name}
        known = (*FAST_WAYS, _RECORDED)
        for name in sorted(self.disable - set(known)):
            raise ValueError(f"there is no fast way {name!r} to disable. {did_you_mean(name, known)}")
        #: Whether all sequences are read in one pass of the modules, whatever they have in common.
        self.one_pass = False
        self._ways: Ways | None = None
        self._records: dict[str, bool] = {}  # by how a step is made, whether it may be
        self._bfloat16: CausalLM | None = None
        self.decode_step = decode_step

    @classmethod
    def load(
        cls,
        model: str | Path | PreTrainedModel | CausalLM,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        temperature: float = 1.0,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        autocast: bool | None = None,
        disable: Collection[str] = (),
        decode_step: str = "auto",
        **options: Any,
    ) -> CausalLM:
        """Load from a folder, a hub id or live objects.

        Args:
            model: Folder or hub id of any Hugging Face causal LM, the folder of a peft adapter (which is merged into
                its model), or the model itself.
            tokenizer: Folder, hub id or the tokenizer itself; None takes the model's own.
            temperature: Divides the logits.
            device: ``"auto"``, or any torch device.
            dtype: Of the weights, for example "float32" or "bfloat16"; "auto" is what the folder holds.
            autocast: Matrix products in bfloat16; None is where CUDA is.
            disable: Fast ways not to go, see :class:`CausalLM`.
            decode_step: How a token's step is made, see :class:`CausalLM`.
            **options: ``attn_implementation``, ``device_map``, ``trust_remote_code``, ``revision`` and
                ``load_in_4bit``; see :class:`reward_models.loading.LoadOptions`.

        Raises:
            FileNotFoundError: ``model`` looks like a folder and is not there.
            ValueError: A live model came without a tokenizer, or the tokenizer has no EOS token.
        """
        if isinstance(model, CausalLM):
            if temperature not in (1.0, model.temperature):
                raise ValueError(
                    f"temperature={temperature} does not fit a CausalLM made with {model.temperature}; "
                    "say it where the CausalLM is made"
                )
            return model
        check_keywords("CausalLM.load", LoadOptions, options)
        loading = LoadOptions(dtype, **options)
        if isinstance(model, (str, Path)):
            tokenizer = model if tokenizer is None else tokenizer
            model = load_causal_lm(model, loading, choose_device(device))
        else:
            loading.check_live()
            if not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None:
                model = model.to(choose_device(device))
        if tokenizer is None:
            raise ValueError("a live model needs its tokenizer: pass tokenizer=...")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer, loading)
        return cls(model, tokenizer, temperature, autocast, disable, decode_step)

    def __deepcopy__(self, memo: dict) -> CausalLM:
        # gym.make and env.spec deep-copy keyword arguments; the weights are shared instead.
        return self

    def clone(self) -> CausalLM:
        """A trainable copy with weights of its own."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin._bfloat16 = None
        return twin

    @torch.no_grad()
    def for_decoding(self) -> CausalLM:
        """What to decode with: itself, or under autocast a copy with the present weights in bfloat16.

        One token at a time, casting what goes in and out of every layer would cost as much as the layers.
        """
        if not self.autocast or self.model.dtype != torch.float32:
            return self
        if self._bfloat16 is None:
            self.check()  # once for both
            self._may_record()
            self._bfloat16 = self.in_bfloat16()
        else:
            pairs = zip(self._bfloat16.model.parameters(), self.model.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)
        return self._bfloat16

    def give_up_copies(self) -> None:
        """Drop what is held to write responses with beside the weights; it is made again when it is needed."""
        self._bfloat16 = None

    def plain_model(self) -> PreTrainedModel:
        """A transformers model with the present weights and no adapter in it, to read and not to keep."""
        return self.model

    def in_bfloat16(self) -> CausalLM:
        """A copy with weights of its own, in bfloat16."""
        twin = self.clone()
        twin.autocast = False
        for parameter in twin.model.parameters():
            parameter.data = parameter.data.bfloat16()
        return twin

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def precision(self) -> AbstractContextManager[None]:
        """The context in which this model computes, with or without bfloat16 products."""
        return bfloat16_products(self.device, self.autocast)

    @property
    def max_length(self) -> int | None:
        """Number of positions the model can hold, or None if it does not say.

        Beyond its original length a "longrope" model turns all positions by other angles as soon as a sequence is that
        long, so that log-probabilities of earlier tokens would change: it holds no more than that.
        """
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = rope.values() if all(isinstance(x, dict) for x in rope.values()) else [rope]
        limits = [
            x.get("original_max_position_embeddings") for x in kinds if x.get("rope_type") == "longrope"
        ]
        limits.append(getattr(config, "max_position_embeddings", None))
        return min((limit for limit in limits if limit is not None), default=None)

    def action_logits(self, logits: Tensor) -> Tensor:
        """Logits of the acting distribution, float32: real tokens only, divided by the temperature."""
        return logits[..., : self.vocab_size].float() / self.temperature

    def layout(self, sequences: Sequences) -> PackedLayout | PaddedLayout | None:
        """Where this model reads the tokens of ``sequences``, computed and moved at the first call.

        None where it has to read them one length at a time.
        """
        if self.teacher_forcing_works(int(sequences.lengths.max())):
            # Layers that are computed again in the backward pass cannot read prompts from a cache.
            again = torch.is_grad_enabled() and checkpointing.is_on(self.body)
            apart = again or self.one_pass
            return sequences.to(self.device).derived(ApartLayout if apart else PackedLayout)
        alike = bool((sequences.lengths == sequences.lengths[0]).all())
        return sequences.to(self.device).derived(PaddedLayout) if self.padding_works or alike else None

    def policy_states(self, sequences: Sequences, body: PreTrainedModel | None = None) -> Tensor:
        """The last hidden states that predict the policy's tokens, ``[m, hidden]``, with gradient.

        Args:
            sequences: With ``m`` tokens written by the policy.
            body: Of another model of the same architecture (a critic's); None is this model's own.
        """
        body = self.body if body is None else body
        layout = self.layout(sequences)
        if layout is None:
            return self._by_length(sequences, lambda alike: (self.policy_states(alike, body),))[0]
        with self.precision():
            if isinstance(layout, PackedLayout):
                return self._packed_states(layout, body)
            with _recomputed(body):
                return layout.take(body(input_ids=layout.ids, use_cache=False).last_hidden_state)

    def _packed_states(self, layout: PackedLayout, body: PreTrainedModel) -> Tensor:
        stand_in = self.fused_body(body, layout.longest)
        masks = AttentionMasks(self.model.config, self.ways.packing)
        shares = "shared_prompts" not in self.disable
        if stand_in is not None:  # which looks at the marks of the layers itself
            return layout.states(stand_in, masks, self.model.dtype, shares)
        with _recomputed(body):
            return layout.states(body, masks, self.model.dtype, shares)

    def evaluate(
        self, sequences: Sequences, with_states: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities and entropies of the policy's tokens, with gradient.

        Args:
            sequences: With ``m`` tokens written by the policy, wherever they stand.
            with_states: Whether to return the hidden states that predict them too.

        Returns:
            log_probs and entropies (both float32) ``[m]`` and, if wanted, hidden states ``[m, hidden]``.
        """
        layout = self.layout(sequences)
        if layout is None:
            # Sequences of one length need no padding.
            parts = self._by_length(sequences, lambda alike: self.evaluate(alike, with_states))
            return parts[0], parts[1], parts[2] if with_states else None
        if isinstance(layout, PackedLayout):
            with self.precision():
                states = self._packed_states(layout, self.body)
                scaled = states if self.temperature == 1.0 else states / self.temperature
                log_probs, entropies = linear_log_probs(scaled, self.head, layout.actions, self.vocab_size)
            return log_probs, entropies, states if with_states else None
        out = self._padded_pass(layout, with_states)
        logits = self.action_logits(layout.take(out.logits))
        log_z = logits.logsumexp(-1)
        log_probs = logits.gather(-1, layout.actions[:, None]).squeeze(-1) - log_z
        entropies = log_z - ((logits - log_z.unsqueeze(-1)).exp() * logits).sum(-1)
        return log_probs, entropies, layout.take(out.hidden_states[-1]) if with_states else None

    def _padded_pass(self, layout: PaddedLayout, with_states: bool = False) -> Any:
        with self.precision(), _recomputed(self.body):
            return self.model(
                input_ids=layout.ids,
                logits_to_keep=layout.keep,
                output_hidden_states=with_states,
                use_cache=False,
            )

    def policy_logits(self, sequences: Sequences) -> Callable[[slice], Tensor]:
        """One pass, and what makes action logits ``[r, V]`` of some of the policy's tokens from it, with gradient."""
        layout = self.layout(sequences)
        if isinstance(layout, PackedLayout):
            states = self.policy_states(sequences)

            def some(rows: slice) -> Tensor:
                with self.precision():
                    return self.action_logits(self.head(states[rows]))

            return some
        if layout is None:
            whole = slice(None)
            logits = self._by_length(sequences, lambda alike: (self.policy_logits(alike)(whole),))[0]
        else:
            logits = self.action_logits(layout.take(self._padded_pass(layout).logits))
        return lambda rows: logits[rows]

    @torch.no_grad()
    def squared_probabilities(self, sequences: Sequences) -> Tensor:
        """The sum of the squared probabilities of all tokens, where the policy wrote one, float32 ``[m]``."""
        layout = self.layout(sequences)
        if layout is None:
            return self._by_length(sequences, lambda alike: (self.squared_probabilities(alike),))[0]
        if not isinstance(layout, PackedLayout):
            logits = self.action_logits(layout.take(self._padded_pass(layout).logits))
            return logits.softmax(-1).square().sum(-1)
        with self.precision():
            states = self._packed_states(layout, self.body)
            return linear_squared_probabilities(states / self.temperature, self.head, self.vocab_size)

    def _by_length(
        self, sequences: Sequences, compute: Callable[[Sequences], tuple[Tensor | None, ...]]
    ) -> list[Tensor]:
        """``compute`` of the sequences of each length, put together in the order of the policy's tokens."""
        lengths = sequences.lengths
        groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
        results = [compute(sequences[rows]) for rows in groups]
        order = np.concatenate([np.flatnonzero(np.isin(sequences.rows, rows)) for rows in groups])
        back = torch.from_numpy(np.argsort(order)).to(self.device)
        return [torch.cat(parts)[back] for parts in zip(*results, strict=True) if parts[0] is not None]

    @property
    def _inner(self) -> PreTrainedModel:
        """The model itself, adapters in place where there are some."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def body(self) -> PreTrainedModel:
        """The model without its head."""
        return self._inner.base_model

    @property
    def head(self) -> torch.nn.Module:
        """From the last hidden states to logits."""
        return self._inner.get_output_embeddings()

    def fused_body(self, body: PreTrainedModel | None = None, max_length: int = 0) -> FusedLlama | None:
        """A faster stand-in for the modules of ``body``, or None where there is none.

        There is none either where somebody listens to modules that it does not call.

        Args:
            body: Of another model of the same architecture (a critic's); None is this model's own.
            max_length: Of the sequences.
        """
        if not self.ways.fused or not AttentionMasks(self.model.config).uniform(max_length):
            return None
        fused = FusedLlama(self.body if body is None else body)
        return None if fused.stands_aside() or self._is_watched() else fused

    def _is_watched(self) -> bool:
        return any(map(is_watched, (self.model, self._inner, self.head)))

    @torch.no_grad()
    def log_probs(self, sequences: Sequences, max_tokens: int = 16384) -> np.ndarray:
        """Log-probabilities of the policy's tokens, without gradient.

        Args:
            sequences: With ``m`` tokens written by the policy.
            max_tokens: Tokens in one pass; neighbours share a pass.

        Returns:
            float64 ``[m]``.
        """
        sequences = sequences.to(self.device)
        work = np.cumsum(sequences.lengths) // max_tokens
        cuts = [0, *np.flatnonzero(np.diff(work)) + 1, len(work)]
        whole = len(cuts) == 2
        parts = [
            self.evaluate(sequences if whole else sequences[a:b])[0] for a, b in itertools.pairwise(cuts)
        ]
        return torch.cat(parts).cpu().double().numpy()

    def response_log_probs(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], max_tokens: int = 16384
    ) -> np.ndarray:
        """:meth:`log_probs` of responses to prompts, float64 ``[B, T]``; 0 after the end of a response.

        Args:
            prompts: ``B`` int64 arrays of token ids.
            responses: ``B`` int64 arrays of token ids.
            max_tokens: Tokens in one pass; neighbours share a pass.
        """
        sequences = Sequences.from_responses(prompts, responses)
        return sequences.padded(self.log_probs(sequences, max_tokens))

    # -- which ways lead through the model ------------------------------------------------------------------

    @property
    def ways(self) -> Ways:
        """What :func:`~textrl_env.lm.self_check.find_ways` finds of this model, once.

        Raises:
            ValueError: No way is right; the message says why.
        """
        if self._ways is None:
            known = _WAYS.setdefault(self.model, {})
            if self.disable not in known:
                known[self.disable] = find_ways(self, lambda name: name not in self.disable)
            self._ways = known[self.disable]
        return self._ways

    def check(self) -> None:
        """Find the ways now and not when they are first needed; raises as :attr:`ways` does."""
        _ = self.ways

    def with_ways(self, ways: Ways) -> CausalLM:
        """The same model, going these ways."""
        twin = copy.copy(self)
        twin._ways = ways
        return twin

    @contextmanager
    def in_float32(self) -> Iterator[CausalLM]:
        """The same model for a while without autocast and with weights in float32; afterwards it has its own again.

        Weights that are no plain numbers (quantised ones), or that memory does not hold in float32, stay as they are.
        """
        exact = copy.copy(self)
        exact.autocast, exact._bfloat16 = False, None
        tensors = [*self.model.parameters(), *self.model.buffers()]
        low = [x for x in tensors if x.dtype in (torch.bfloat16, torch.float16)]
        before = [x.data for x in low]
        try:
            if not getattr(self.model, "is_quantized", False):
                with contextlib.suppress(torch.OutOfMemoryError):
                    for tensor in low:
                        tensor.data = tensor.data.float()
            yield exact
        finally:
            for tensor, data in zip(low, before, strict=True):
                tensor.data = data

    @property
    def masks(self) -> AttentionMasks:
        """Who may look at whom when this model decodes."""
        return AttentionMasks(self.model.config, self.ways.cache or ONE)

    @property
    def padding_works(self) -> bool:
        """Whether padding on the right leaves the logits of the tokens before it as they are."""
        return self.ways.padding

    def slot_cache_works(self, max_length: int = 0) -> bool:
        """Whether cached, ragged decoding of up to ``max_length`` tokens gives this model's own logits.

        Where it does not (recurrent states), every token takes a pass over the whole sequence: right, and slower about
        as many times as a sequence has tokens.
        """
        works = self.ways.cache is not None and self._reaches(max_length, self.ways.cache_windows)
        if not works:
            warn(
                f"{type(self.model).__name__} is decoded without a key/value cache: every new token takes a pass over "
                f"the whole sequence, so that a long response takes up to {max(max_length, 2) // 2} times as long"
            )
        return works

    def teacher_forcing_works(self, max_length: int = 0) -> bool:
        """Whether rows packed with several sequences give this model's own log-probabilities.

        Scaled or capped logits, heads that are more than a matrix and recurrent states break it, and so does somebody
        who listens to the whole model's calls; such models take plain padded passes.
        """
        works = self.ways.packing is not None and self._reaches(max_length, self.ways.packing_windows)
        return works and not self._is_watched()

    def shared_prompts_work(self, max_length: int = 0) -> bool:
        """Whether :mod:`~textrl_env.lm.shared_prompts` gives this model's own logits."""
        return self.ways.shared_prompts and not AttentionMasks(self.model.config).limited(max_length)

    @property
    def decode_step(self) -> str:
        """How a token's step is made when whole responses are written, see :class:`CausalLM`."""
        return self._decode_step

    @decode_step.setter
    def decode_step(self, decode_step: str) -> None:
        check_choice("decode_step", decode_step, DECODE_STEPS)
        make_recorder(decode_step, self.device)  # what this device has not is said now
        self._decode_step = decode_step

    def recorder(self) -> Recorder | None:
        """What records the steps of whole responses, or None where they are launched one by one.

        None too where somebody listens to a module: a record calls none.
        """
        if not self._may_record() or any(map(is_watched, self.model.modules())):
            return None
        return make_recorder(self.decode_step, self.device)

    def _may_record(self) -> bool:
        """Whether steps are to be recorded and give the model's own logits then; tried once, and said where not."""
        if _RECORDED in self.disable or self.ways.cache is None:
            return False
        recorder = make_recorder(self.decode_step, self.device)
        if recorder is None:
            return False
        key = f"{self.decode_step} {self.device.type}"
        if key not in self._records:
            self._records[key] = can_be_recorded(self, recorder)
            if not self._records[key]:
                warn(
                    f"the steps of {type(self.model).__name__} cannot be recorded (decode_step={self.decode_step!r}), "
                    "so that each is launched from Python: right, and slower where there are few rows"
                )
        return self._records[key]

    def _reaches(self, length: int, windows: bool) -> bool:
        """Whether a way that holds beyond ``windows``, or within them only, holds for ``length`` tokens."""
        config = self.model.config.get_text_config()
        if getattr(config, "attn_temperature_tuning", False) and length >= getattr(config, "floor_scale", 0):
            return (
                False  # scores scaled by how many tokens a pass has seen, not by the position in a sequence
            )
        # Windows that the model's own code makes, on columns and not on positions.
        own = (
            getattr(config, name, None)
            for name in ("window_size", "attention_window_size", "local_attention")
        )
        if any(isinstance(width, int) and width < length for width in own):
            return False
        return windows or not AttentionMasks(config).limited(length)


def _recomputed(body: PreTrainedModel) -> AbstractContextManager[None]:
    """A pass through ``body`` that keeps no activations, where gradient checkpointing is on."""
    return checkpointing.recomputed(body, torch.is_grad_enabled() and checkpointing.is_on(body))
