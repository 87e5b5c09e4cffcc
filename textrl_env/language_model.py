"""A Hugging Face causal language model as an environment and a policy see it.

:class:`CausalLM` is a model with its tokenizer, its end tokens and its temperature; it says log-probabilities
of whole responses in one causal pass. :class:`SlotDecoder` keeps one key/value cache per slot, so slots of
different lengths advance together and restart on their own. Both environments and policies are built on
these two, which is why the step way and the fused way agree.

Truncated sampling (top-k, top-p) is left out on purpose: the log-probabilities of the full softmax are then
those of what was sampled, in rollout, update and reference alike.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import logger
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin


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


def _not_found(path: str | Path, error: OSError) -> str:
    """What to tell about a model that neither a folder nor the hub gave."""
    if (Path(path).expanduser() / "config.json").is_file():
        return f"model={str(path)!r} is a folder with a config.json, but the model cannot be read from it: {error}"
    folders = [p.parent.name for p in Path().glob("*/config.json")]
    close = difflib.get_close_matches(str(path), folders, n=1)
    hint = f" Did you mean the folder {close[0]!r}?" if close else ""
    return f"model={str(path)!r}: no such folder here, and the hub gave none: {str(error).splitlines()[0]}{hint}"


class CausalLM:
    """A causal language model, its tokenizer and the distribution it acts with.

    Args:
        model: The transformers model. It is put into eval mode (dropout off) and stays there.
        tokenizer: Its tokenizer; must have an EOS token. A pad token is not needed: lengths are carried.
        temperature: Divides the logits everywhere: in sampling, update and reference.

    Attributes:
        eos_ids: Every token id that ends a response, int64 array.
        pad_id: What fills unused positions; never read.
        vocab_size: Number of actions: ids that both the tokenizer and the logits have.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0
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
        listed = getattr(model.generation_config, "eos_token_id", None) or []
        listed = [listed] if isinstance(listed, int) else list(listed)
        self.eos_ids = np.unique(np.array([tokenizer.eos_token_id, *listed], dtype=np.int64))
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Embedding matrices are often padded past the vocabulary; no action is a token that is not one.
        self.vocab_size = min(max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size)
        self._slot_cache_works: bool | None = None

    @classmethod
    def load(
        cls,
        model: str | Path | PreTrainedModel | CausalLM,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        temperature: float = 1.0,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
    ) -> CausalLM:
        """Load from a folder, a hub id or live objects.

        Args:
            model: Folder or hub id of any Hugging Face causal LM, or the model itself.
            tokenizer: Folder, hub id or the tokenizer itself; None takes the model's own.
            temperature: Divides the logits.
            device: ``"auto"``, or any torch device.
            dtype: Of the weights, for example "float32" or "bfloat16".

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
                model = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
            except OSError as error:
                raise FileNotFoundError(_not_found(model, error)) from error
        if tokenizer is None:
            raise ValueError("a live model needs its tokenizer: pass tokenizer=...")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        return cls(model.to(choose_device(device)), tokenizer, temperature)

    def __deepcopy__(self, memo: dict) -> CausalLM:
        # gym.make and env.spec deep-copy keyword arguments; the weights are shared instead.
        return self

    def clone(self) -> CausalLM:
        """A trainable copy with weights of its own."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        return twin

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

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

    def response_outputs(
        self, input_ids: Tensor, attention_mask: Tensor, num_steps: int, with_hidden: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One causal pass over whole sequences.

        Args:
            input_ids: ``[B, P + T]``: prompts left-padded to ``P``, responses of up to ``T`` after them.
            attention_mask: ``[B, P + T]``, 1 on real tokens.
            num_steps: ``T``.
            with_hidden: Whether to return the last hidden states too.

        Returns:
            The acting logits ``[B, T, vocab_size]`` (position t predicts response token t), and the hidden
            states ``[B, T, hidden]`` they were made from, or None.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            # Left padding: a plain forward would count the pads as positions.
            position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
            logits_to_keep=num_steps + 1,
            output_hidden_states=with_hidden,
            use_cache=False,
        )
        hidden = out.hidden_states[-1][:, -num_steps - 1 : -1] if with_hidden else None
        return self.action_logits(out.logits[:, -num_steps - 1 : -1]), hidden

    @torch.no_grad()
    def response_log_probs(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], max_tokens: int = 16384
    ) -> np.ndarray:
        """Log-probabilities of given responses, without gradient.

        Args:
            prompts: ``B`` int64 arrays of token ids.
            responses: ``B`` int64 arrays of token ids.
            max_tokens: Padded tokens in one pass; rows of like length share a pass.

        Returns:
            float64 ``[B, T]``, ``T`` the longest response; 0 after the end of a response.
        """
        width = max(len(r) for r in responses)
        result = np.zeros((len(prompts), width))
        order = np.argsort([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], kind="stable")
        total = len(prompts[order[-1]]) + len(responses[order[-1]])
        rows = max(1, max_tokens // total)
        for start in range(0, len(order), rows):
            chunk = order[start : start + rows]
            input_ids, mask, steps = pack_sequences(
                [prompts[i] for i in chunk], [responses[i] for i in chunk]
            )
            ids = torch.from_numpy(input_ids).to(self.device)
            logits, _ = self.response_outputs(ids, torch.from_numpy(mask).to(self.device), steps)
            log_probs = gather_log_probs(logits, ids[:, -steps:]).double().cpu().numpy()
            result[chunk, :steps] = np.where(mask[:, -steps:], log_probs, 0.0)
        return result

    def slot_cache_works(self, max_length: int = 0) -> bool:
        """Whether cached, ragged decoding of up to ``max_length`` tokens gives this model's own logits.

        Measured once, on random tokens, and false beyond an attention window. Recurrent states or position
        schemes that read the padding mask can break it too; such models are decoded without a cache, slower
        and still right.
        """
        if self._slot_cache_works is None:
            self._slot_cache_works = self._measure_slot_cache()
        window = self.attention_window
        works = self._slot_cache_works and (window is None or max_length <= window)
        if not works:
            logger.warn(f"{type(self.model).__name__} is decoded without a key/value cache (slower)")
        return works

    @torch.no_grad()
    def _measure_slot_cache(self) -> bool:
        generator = np.random.default_rng(0)
        rows = [generator.integers(0, self.vocab_size, size=n) for n in (7, 4)]
        slots = np.arange(2)
        try:
            decoder = SlotDecoder(self, 2, 8, use_cache=True)
            decoder.prefill(slots, [row[:-1] for row in rows])
            cached = decoder.step(slots, np.array([row[-1] for row in rows]))
        except (
            TypeError,
            ValueError,
            RuntimeError,
            AttributeError,
            IndexError,
            NotImplementedError,
        ) as error:
            logger.debug(f"cached decoding failed: {error!r}")
            return False
        plain = SlotDecoder(self, 2, 8, use_cache=False).prefill(slots, rows)
        tolerance = 1e-4 if cached.dtype == self.model.dtype == torch.float32 else 5e-2
        return bool((cached - plain).abs().max() <= tolerance * (1 + plain.abs().max()))


def gather_log_probs(logits: Tensor, actions: Tensor) -> Tensor:
    """``log softmax(logits)[actions]``: logits ``[..., V]``, actions ``[...]`` -> ``[...]``."""
    chosen = logits.gather(-1, actions.unsqueeze(-1).clamp(max=logits.shape[-1] - 1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def sample_actions(logits: Tensor, generator: torch.Generator | None, deterministic: bool = False) -> Tensor:
    """Sample from ``softmax(logits)`` by the Gumbel trick, or take the argmax. ``[..., V] -> [...]``."""
    if deterministic:
        return logits.argmax(-1)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - noise.log()).argmax(-1)


def pack_sequences(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], fill: int = 0
) -> tuple[np.ndarray, np.ndarray, int]:
    """Lay prompts and responses out so that every response starts in the same column.

    Returns:
        input_ids int64 ``[B, P + T]``, attention_mask int64 of the same shape, and ``T``.
    """
    before = max(len(p) for p in prompts)
    after = max(len(r) for r in responses)
    input_ids = np.full((len(prompts), before + after), fill, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        span = slice(before - len(prompt), before + len(response))
        input_ids[row, span] = np.concatenate([prompt, response])
        mask[row, span] = 1
    return input_ids, mask, after


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, ``[N, heads, max_length, head_dim]``, written at any (slot, position)."""

    def __init__(self, where: _Where) -> None:
        super().__init__()
        self.where = where

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, dim = key_states.shape[1], key_states.shape[-1]
        shape = (self.where.num_slots, heads, self.where.max_length, dim)
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros((*shape[:-1], value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where = self.where
        index = (where.slots[:, None], slice(None), where.positions)
        self.keys[index] = key_states.transpose(1, 2)  # [k, q, heads, dim]
        self.values[index] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, : where.width], self.values[:, :, : where.width]
        return (keys, values) if where.all_slots else (keys[where.slots], values[where.slots])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.where.width, 0

    def get_seq_length(self) -> int:
        return self.where.width

    def get_max_length(self) -> int:
        return self.where.max_length


class _Where:
    """What the layers of one cache share: which slots and positions the tokens of this pass belong to."""

    def __init__(self, num_slots: int, max_length: int) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.slots: Tensor
        self.positions: Tensor
        self.width = 0
        self.all_slots = False


class SlotDecoder:
    """Next-token logits for ``N`` sequences that grow, end and restart independently.

    Args:
        lm: The model.
        num_slots: ``N``.
        max_length: Longest sequence (prompt and response) that a slot can hold.
        use_cache: False recomputes whole sequences; None decides by :meth:`CausalLM.slot_cache_works`.
    """

    def __init__(self, lm: CausalLM, num_slots: int, max_length: int, use_cache: bool | None = None) -> None:
        self.lm = lm
        self.max_length = max_length
        self.use_cache = lm.slot_cache_works(max_length) if use_cache is None else use_cache
        self.tokens = np.zeros((num_slots, max_length), dtype=np.int64)
        self.lengths = np.zeros(num_slots, dtype=np.int64)
        self._logits: Tensor | None = None
        self._has_logits = np.zeros(num_slots, dtype=bool)  # whose ``_logits`` belong to its sequence
        self._where = _Where(num_slots, max_length)
        layers = lm.model.config.get_text_config().num_hidden_layers
        self._cache = Cache(layers=[_SlotLayer(self._where) for _ in range(layers)])

    @property
    def num_slots(self) -> int:
        """``N``."""
        return len(self.lengths)

    def clear(self) -> None:
        """Forget every sequence; needed whenever the weights have changed."""
        self.lengths[:] = 0

    @torch.no_grad()
    def prefill(self, slots: np.ndarray, sequences: Sequence[np.ndarray]) -> Tensor:
        """Start ``slots`` anew with whole sequences.

        Args:
            slots: int ``[k]``.
            sequences: ``k`` int64 arrays, each of at least one token.

        Returns:
            Acting logits ``[k, vocab_size]`` of the token after each sequence.
        """
        lengths = np.array([len(s) for s in sequences])
        width = int(lengths.max())
        rows = np.zeros((len(slots), width), dtype=np.int64)
        for row, sequence in zip(rows, sequences, strict=True):
            row[: len(sequence)] = sequence
        self.tokens[slots, :width] = rows
        self.lengths[slots] = lengths
        self._has_logits[slots] = False
        if not self.use_cache:
            return self._plain(slots)
        positions = np.broadcast_to(np.arange(width), rows.shape)
        return self._forward(slots, rows, positions, width, lengths - 1)

    @torch.no_grad()
    def step(self, slots: np.ndarray, tokens: np.ndarray) -> Tensor:
        """Append one token to each of ``slots``; acting logits ``[k, vocab_size]`` of the next."""
        positions = self.lengths[slots]
        self.tokens[slots, positions] = tokens
        self.lengths[slots] += 1
        self._has_logits[slots] = False
        if not self.use_cache:
            return self._plain(slots)
        return self._forward(slots, tokens[:, None], positions[:, None], int(positions.max()) + 1, None)

    @torch.no_grad()
    def next_logits(self, tokens: np.ndarray, lengths: np.ndarray, slots: np.ndarray) -> Tensor:
        """Acting logits after given sequences, at the cost of what is new in them.

        A slot whose sequence is the cached one plus one token takes a single cached step; an unchanged one
        costs nothing; any other is prefilled.

        Args:
            tokens: int64 ``[N, L]``, left-aligned sequences.
            lengths: int ``[N]``.
            slots: Which slots are wanted, int ``[k]``.

        Returns:
            ``[k, vocab_size]``.
        """
        if self._logits is None or self._logits.shape[0] != self.num_slots:
            self._logits = torch.zeros(self.num_slots, self.lm.vocab_size, device=self.lm.device)
        width = min(tokens.shape[1], self.max_length)
        known = self.lengths[slots]
        same = (self.tokens[slots, :width] == tokens[slots, :width]) | (np.arange(width) >= known[:, None])
        same = same.all(1) & (known > 0)
        grown = same & (lengths[slots] == known + 1)
        fresh = ~grown & ~(same & (lengths[slots] == known) & self._has_logits[slots])
        if fresh.any():
            rows = slots[fresh]
            self._logits[rows] = self.prefill(rows, [tokens[r, : lengths[r]] for r in rows])
        if grown.any():
            rows = slots[grown]
            self._logits[rows] = self.step(rows, tokens[rows, lengths[rows] - 1])
        self._has_logits[slots] = True
        return self._logits[slots]

    def fork(self, sources: np.ndarray) -> SlotDecoder:
        """A new decoder whose slot i holds what slot ``sources[i]`` holds here (drop, reorder or repeat)."""
        twin = SlotDecoder(self.lm, len(sources), self.max_length, self.use_cache)
        twin.tokens, twin.lengths = self.tokens[sources], self.lengths[sources]
        index = torch.from_numpy(np.asarray(sources)).to(self.lm.device)
        for mine, theirs in zip(twin._cache.layers, self._cache.layers, strict=True):
            if theirs.is_initialized:
                mine.keys, mine.values = theirs.keys[index], theirs.values[index]
                mine.is_initialized = True
        return twin

    def _forward(
        self,
        slots: np.ndarray,
        tokens: np.ndarray,
        positions: np.ndarray,
        width: int,
        last: np.ndarray | None,
    ) -> Tensor:
        device, where = self.lm.device, self._where
        where.slots = torch.from_numpy(np.ascontiguousarray(slots)).to(device)
        where.positions = torch.from_numpy(np.array(positions)).to(device)
        where.width = width
        where.all_slots = len(slots) == self.num_slots and bool((slots == np.arange(self.num_slots)).all())
        # Causal within each slot; stale entries of earlier episodes lie beyond a slot's own positions.
        mask = torch.arange(width, device=device) <= where.positions[:, None, :, None]
        if last is None:
            keep: int | Tensor = 1
        else:
            keep = torch.from_numpy(np.unique(last)).to(device)
        out = self.lm.model(
            input_ids=torch.from_numpy(np.ascontiguousarray(tokens)).to(device),
            attention_mask=mask,
            position_ids=where.positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits = out.logits
        if last is None:
            logits = logits[:, -1]
        else:
            column = torch.from_numpy(np.searchsorted(np.unique(last), last)).to(device)
            logits = logits[torch.arange(len(slots), device=device), column]
        return self.lm.action_logits(logits)

    def _plain(self, slots: np.ndarray) -> Tensor:
        """Logits by a whole forward pass, right-padded, no cache."""
        width = int(self.lengths[slots].max())
        ids = torch.from_numpy(self.tokens[slots, :width]).to(self.lm.device)
        last = torch.from_numpy(self.lengths[slots] - 1).to(self.lm.device)
        mask = torch.arange(width, device=self.lm.device) <= last[:, None]
        logits = self.lm.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        return self.lm.action_logits(logits[torch.arange(len(slots), device=self.lm.device), last])


@torch.no_grad()
def generate(
    lm: CausalLM,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    deterministic: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sample one response to each prompt with a key/value cache.

    Equal prompts are prefilled once; finished rows leave the batch.

    Args:
        lm: The model.
        prompts: ``B`` int64 arrays of token ids.
        max_new_tokens: The response budget ``T``.
        generator: Source of randomness, on the model's device.
        deterministic: Take the most likely token instead of sampling.

    Returns:
        ``B`` int64 arrays of response tokens (the end token included), and as many float64 arrays with the
        log-probability of each token under the acting distribution.
    """
    unique, inverse = _unique_rows(prompts)
    longest = max(len(p) for p in unique)
    decoder = SlotDecoder(lm, len(unique), longest + max_new_tokens)
    logits = decoder.prefill(np.arange(len(unique)), unique)
    if len(unique) < len(prompts):
        decoder, logits = decoder.fork(inverse), logits[torch.from_numpy(inverse).to(logits.device)]
    eos = torch.from_numpy(lm.eos_ids).to(lm.device)
    episodes = np.arange(len(prompts))  # row of the batch -> episode
    tokens = np.zeros((len(prompts), max_new_tokens), dtype=np.int64)
    log_probs = np.zeros((len(prompts), max_new_tokens))
    lengths = np.full(len(prompts), max_new_tokens)
    alive = np.ones(len(prompts), dtype=bool)
    for t in range(max_new_tokens):
        actions = sample_actions(logits, generator, deterministic)
        tokens[episodes, t] = actions.cpu().numpy()
        log_probs[episodes, t] = gather_log_probs(logits, actions).double().cpu().numpy()
        ended = alive & torch.isin(actions, eos).cpu().numpy()
        lengths[episodes[ended]] = t + 1
        alive &= ~ended
        if not alive.any() or t + 1 == max_new_tokens:
            break
        # Dropping finished rows moves the cache, so it waits until a fifth of the batch can go.
        if alive.sum() <= 0.8 * len(alive):
            rows = np.flatnonzero(alive)
            decoder, episodes, alive = decoder.fork(rows), episodes[rows], alive[rows]
        logits = decoder.step(np.arange(len(episodes)), tokens[episodes, t])
    return (
        [row[:n] for row, n in zip(tokens, lengths, strict=True)],
        [row[:n] for row, n in zip(log_probs, lengths, strict=True)],
    )


def _unique_rows(prompts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct prompts in order of first appearance, and for each prompt its index among them."""
    seen: dict[bytes, int] = {}
    unique: list[np.ndarray] = []
    inverse = np.empty(len(prompts), dtype=np.int64)
    for i, prompt in enumerate(prompts):
        key = np.ascontiguousarray(prompt).tobytes()
        if key not in seen:
            seen[key] = len(unique)
            unique.append(prompt)
        inverse[i] = seen[key]
    return unique, inverse
