"""A Hugging Face causal language model as an environment and a policy see it.

:class:`CausalLM` is a model with its tokenizer, its end tokens and its temperature; it says log-probabilities
of whole responses in one causal pass. Both environments and policies are built on it and on
:class:`~textrl_env.lm.decoding.SlotDecoder`, which is why the step way and the fused way agree.

Truncated sampling (top-k, top-p) is left out on purpose: the log-probabilities of the full softmax are then
those of what was sampled, in rollout, update and reference alike.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from gymnasium import logger
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from textrl_env.lm import self_check
from textrl_env.lm.fused_llama import FusedLlama
from textrl_env.lm.precision import bfloat16_products
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.teacher_forcing import PackedLayout, PaddedLayout, linear_log_probs


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """``"auto"`` is CUDA, then Apple's MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_model_path(path: str | Path, what: str = "model") -> None:
    """Raise a FileNotFoundError for something that is meant as a folder and is not a model folder.

    ``"name"`` and ``"owner/name"`` are left to the hub unless ``owner`` is a folder here.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return
    if folder.is_dir():
        held = sorted(p.name for p in folder.iterdir())[:8]
        raise FileNotFoundError(
            f"{what}={str(path)!r} is a folder without config.json, not a Hugging Face model; it holds {held}"
        )
    has_parent = folder.parent != Path() and folder.parent.is_dir()
    if has_parent or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path)):
        siblings = [p.name for p in folder.parent.iterdir()] if has_parent else []
        close = difflib.get_close_matches(folder.name, siblings, n=1)
        hint = f" Did you mean {str(folder.parent / close[0])!r}?" if close else ""
        raise FileNotFoundError(f"{what}={str(path)!r}: there is no such folder.{hint}")


def _own_memory(model: PreTrainedModel) -> None:
    """Moves weights that are mapped from a file to memory of their own, aligned as torch aligns it.

    Matrix products of equal numbers can differ in the last bit by where these lie, and a policy that is a copy of its
    reference would not be equal to it.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _not_found(path: str | Path, error: OSError) -> str:
    """What to tell about a model that neither a folder nor the hub gave."""
    if (Path(path).expanduser() / "config.json").is_file():
        return f"model={str(path)!r} is a folder with a config.json, but the model cannot be read from it: {error}"
    folders = [p.parent.name for p in Path().glob("*/config.json")]
    close = difflib.get_close_matches(str(path), folders, n=1)
    hint = f" Did you mean the folder {close[0]!r}?" if close else ""
    return (
        f"model={str(path)!r}: no such folder here, and the hub gave none: {str(error).splitlines()[0]}{hint}"
    )


class CausalLM:
    """A causal language model, its tokenizer and the distribution it acts with.

    Args:
        model: The transformers model. It is put into eval mode (dropout off) and stays there.
        tokenizer: Its tokenizer; must have an EOS token. A pad token is not needed: lengths are carried.
        temperature: Divides the logits everywhere: in sampling, update and reference.
        autocast: Matrix products in bfloat16, weights and sums as they are; None is where CUDA is.

    Attributes:
        eos_ids: Every token id that ends a response, int64 array.
        pad_id: What fills unused positions; never read.
        vocab_size: Number of actions: ids that both the tokenizer and the logits have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 1.0,
        autocast: bool | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so no response could end; "
                'set one, for example tokenizer.eos_token = "</s>", and save it beside the model'
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.autocast = self.device.type == "cuda" if autocast is None else autocast
        listed = getattr(model.generation_config, "eos_token_id", None) or []
        listed = [listed] if isinstance(listed, int) else list(listed)
        self.eos_ids = np.unique(np.array([tokenizer.eos_token_id, *listed], dtype=np.int64))
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Embedding matrices are often padded past the vocabulary; no action is a token that is not one.
        self.vocab_size = min(max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size)
        self._check_results: dict[Callable, bool] = {}  # what self_check has measured
        self._bfloat16: CausalLM | None = None

    @classmethod
    def load(
        cls,
        model: str | Path | PreTrainedModel | CausalLM,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        temperature: float = 1.0,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        autocast: bool | None = None,
    ) -> CausalLM:
        """Load from a folder, a hub id or live objects.

        Args:
            model: Folder or hub id of any Hugging Face causal LM, or the model itself.
            tokenizer: Folder, hub id or the tokenizer itself; None takes the model's own.
            temperature: Divides the logits.
            device: ``"auto"``, or any torch device.
            dtype: Of the weights, for example "float32" or "bfloat16".
            autocast: Matrix products in bfloat16; None is where CUDA is.

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
        if isinstance(model, (str, Path)):
            check_model_path(model)
            tokenizer = model if tokenizer is None else tokenizer
            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            try:
                model = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype, trust_remote_code=False)
            except OSError as error:
                raise FileNotFoundError(_not_found(model, error)) from error
            _own_memory(model)
        if tokenizer is None:
            raise ValueError("a live model needs its tokenizer: pass tokenizer=...")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
        return cls(model.to(choose_device(device)), tokenizer, temperature, autocast)

    def __deepcopy__(self, memo: dict) -> CausalLM:
        # gym.make and env.spec deep-copy keyword arguments; the weights are shared instead.
        return self

    def clone(self) -> CausalLM:
        """A trainable copy with weights of its own."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin._bfloat16 = None
        twin._check_results = dict(self._check_results)
        return twin

    @torch.no_grad()
    def for_decoding(self) -> CausalLM:
        """What to decode with: itself, or under autocast a copy with the present weights in bfloat16.

        One token at a time, casting what goes in and out of every layer would cost as much as the layers.
        """
        if not self.autocast or self.model.dtype != torch.float32:
            return self
        if self._bfloat16 is None:
            self._bfloat16 = self.in_bfloat16()
        else:
            pairs = zip(self._bfloat16.model.parameters(), self.model.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)
        return self._bfloat16

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
        """Number of positions the model can hold, or None if it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def attention_window(self) -> int | None:
        """How many tokens back the model's narrowest layer sees, or None if every layer sees them all."""
        config = self.model.config.get_text_config()
        if set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
            return None
        names = ("sliding_window", "attention_chunk_size", "window_size")
        widths = [getattr(config, name, None) for name in names]
        return min((width for width in widths if isinstance(width, int)), default=None)

    def action_logits(self, logits: Tensor) -> Tensor:
        """Logits of the acting distribution, float32: real tokens only, divided by the temperature."""
        return logits[..., : self.vocab_size].float() / self.temperature

    def layout(self, sequences: Sequences) -> PackedLayout | PaddedLayout:
        """Where this model reads the tokens of ``sequences``, computed and moved at the first call."""
        packs = self.teacher_forcing_works(int(sequences.lengths.max()))
        return sequences.to(self.device).derived(PackedLayout if packs else PaddedLayout)

    def policy_states(self, sequences: Sequences, body: PreTrainedModel | None = None) -> Tensor:
        """The last hidden states that predict the policy's tokens, ``[m, hidden]``, with gradient.

        Args:
            sequences: With ``m`` tokens written by the policy.
            body: Of another model of the same architecture (a critic's); None is this model's own.
        """
        body, layout = self.body if body is None else body, self.layout(sequences)
        with self.precision():
            if isinstance(layout, PackedLayout):
                return layout.states(self.fused_body(body) or body)
            return layout.take(body(input_ids=layout.ids, use_cache=False).last_hidden_state)

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
        if isinstance(self.layout(sequences), PackedLayout):
            return self.evaluate_packed(sequences, with_states)
        return self.evaluate_padded(sequences, with_states)

    def evaluate_packed(
        self, sequences: Sequences, with_states: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """:meth:`evaluate` by :class:`PackedLayout`, whether or not this model can be read so."""
        layout = sequences.to(self.device).derived(PackedLayout)
        with self.precision():
            states = layout.states(self.fused_body() or self.body)
            scaled = states if self.temperature == 1.0 else states / self.temperature
            log_probs, entropies = linear_log_probs(scaled, self.head, layout.actions, self.vocab_size)
        return log_probs, entropies, states if with_states else None

    def evaluate_padded(
        self, sequences: Sequences, with_states: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """:meth:`evaluate` by one padded pass through the model's own modules, all logits held at once."""
        layout = sequences.to(self.device).derived(PaddedLayout)
        with self.precision():
            out = self.model(
                input_ids=layout.ids,
                logits_to_keep=layout.keep,
                output_hidden_states=with_states,
                use_cache=False,
            )
        logits = self.action_logits(layout.take(out.logits))
        log_z = logits.logsumexp(-1)
        log_probs = logits.gather(-1, layout.actions[:, None]).squeeze(-1) - log_z
        entropies = log_z - ((logits - log_z.unsqueeze(-1)).exp() * logits).sum(-1)
        return log_probs, entropies, layout.take(out.hidden_states[-1]) if with_states else None

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

    def fused_body(self, body: PreTrainedModel | None = None) -> FusedLlama | None:
        """A faster stand-in for the modules of ``body``, or None where there is none.

        Args:
            body: Of another model of the same architecture (a critic's); None is this model's own.
        """
        if not self._passes(self_check.fused_body_works):
            return None
        return FusedLlama(self.body if body is None else body)

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

    def _passes(self, check: Callable[[CausalLM], bool]) -> bool:
        """The result of a check of :mod:`~textrl_env.lm.self_check`, which is made once."""
        if check not in self._check_results:
            self._check_results[check] = check(self)
        return self._check_results[check]

    def _fits_window(self, length: int) -> bool:
        return self.attention_window is None or length <= self.attention_window

    def slot_cache_works(self, max_length: int = 0) -> bool:
        """Whether cached, ragged decoding of up to ``max_length`` tokens gives this model's own logits.

        Measured once, on random tokens, and false beyond an attention window. Recurrent states or position
        schemes that read the padding mask can break it too; such models are decoded without a cache, slower
        and still right.
        """
        works = self._passes(self_check.slot_cache_works) and self._fits_window(max_length)
        if not works:
            logger.warn(f"{type(self.model).__name__} is decoded without a key/value cache (slower)")
        return works

    def teacher_forcing_works(self, max_length: int = 0) -> bool:
        """Whether :mod:`~textrl_env.lm.teacher_forcing` gives this model's own log-probabilities.

        Measured once, on random tokens, and false beyond an attention window. Scaled or capped logits, heads that
        are more than a matrix and recurrent states break it; such models take plain padded passes.
        """
        return self._passes(self_check.teacher_forcing_works) and self._fits_window(max_length)

    def shared_prompts_work(self) -> bool:
        """Whether :mod:`~textrl_env.lm.shared_prompts` gives this model's own logits; measured once."""
        return self._passes(self_check.shared_prompts_work)
