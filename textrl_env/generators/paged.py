"""transformers' own continuous batching: paged attention over the very model that is trained.

Requests of any length share one cache in pages, and a place that a finished one leaves is taken at once. The model is
the policy's own, so that nothing is pushed; with ``dtype`` it is a copy. Left out: tensor parallelism, and keeping the
cache from one rollout to the next.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from textrl_env.generators.answers import Generated, GeneratorError
from textrl_env.generators.sampling import Sampling

#: On a CPU nothing says how much memory a cache may take: pages of so many tokens, for so many requests at once.
_PAGE, _AT_ONCE = 16, 64


class PagedGenerator:
    """``model.generate_batch`` behind the protocol of a generator.

    Args:
        dtype: Of a copy to decode with, for example "bfloat16"; None decodes with the model itself.
        **config: Arguments of transformers' ``ContinuousBatchingConfig``, such as ``max_memory_percent``,
            ``max_batch_tokens`` or ``use_cuda_graph``.
    """

    def __init__(self, dtype: str | None = None, **config: Any) -> None:
        self.dtype = None if dtype is None else getattr(torch, dtype)
        self.config = config
        ContinuousBatchingConfig(**config)  # says now what it does not take
        self._model: PreTrainedModel | None = None
        #: Whether it reads the tensors that are being trained.
        self.shares_weights = dtype is None

    @torch.no_grad()
    def update_weights(self, model: PreTrainedModel) -> None:
        """Take the present weights: the model itself, or what its copy lacks."""
        if self.dtype in (None, model.dtype):
            self._model = model
        elif self._model is None:
            self._model = copy.deepcopy(model).to(self.dtype)
        else:
            for mine, theirs in zip(self._model.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    @torch.no_grad()
    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> Generated:
        """One response to each prompt; see :class:`~textrl_env.protocols.Generator`.

        Raises:
            GeneratorError: A request failed, or the sampling asks for what continuous batching does not do.
        """
        if sampling.min_new_tokens:
            raise GeneratorError(
                "the generator transformers cannot do min_new_tokens: its continuous batching does not know how long a "
                "response is when it draws a token. Leave it out, or take the generator native or vllm"
            )
        model = self._model
        config = ContinuousBatchingConfig(**self._settings(prompts, sampling, model.device))
        # It seeds torch's global stream, which belongs to the run.
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _errors_only():
            found = model.generate_batch(
                [prompt.tolist() for prompt in prompts],
                generation_config=_generation_config(model, sampling),
                continuous_batching_config=config,
                warmup=False,
            )
        results = list(found.values())
        for result in results:
            if result.error is not None:
                raise GeneratorError(f"the generator transformers failed: {result.error}")
        ends = set(sampling.eos_ids)
        stopped_by = ["eos" if ends & set(r.generated_tokens[-1:]) else "length" for r in results]
        return Generated([r.generated_tokens for r in results], [r.logprobs for r in results], stopped_by)

    def _settings(
        self, prompts: Sequence[np.ndarray], sampling: Sampling, device: torch.device
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {"return_logprobs": True, "seed": sampling.seed}
        if device.type == "cpu":
            longest = max(map(len, prompts)) + sampling.max_new_tokens
            page = self.config.get("page_size", _PAGE)
            pages = -(-longest // page) + 1
            settings |= {
                "page_size": page,
                "num_blocks": pages * min(len(prompts), _AT_ONCE),
                "max_batch_tokens": max(longest, 4 * _AT_ONCE),
                "use_async_batching": False,
            }
        return settings | self.config


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without its remarks on logits processors that it does not know; tests hold the ones that are used here."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _generation_config(model: PreTrainedModel, sampling: Sampling) -> GenerationConfig:
    above: list[int] = []
    size = model.get_output_embeddings().weight.shape[0]
    if sampling.vocab_size is not None and sampling.vocab_size < size:
        above = list(range(sampling.vocab_size, size))
    drawn = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or None,
    }
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.eos_ids),
        pad_token_id=sampling.eos_ids[0],
        suppress_tokens=above or None,
        do_sample=not sampling.deterministic,
        **({} if sampling.deterministic else drawn),
    )
