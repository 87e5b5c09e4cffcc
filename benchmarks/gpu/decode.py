"""Tokens per second: our ``generate`` beside transformers' ``generate`` and its continuous batching.

Everyone samples from the whole softmax, writes equally many tokens and holds the same weights. Ours also returns the
log-probability of every token; transformers' does not, which is in its favour. Left out: other engines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.gpu.machine import attempt, median_seconds, peak_memory
from benchmarks.llama_costs import Shape, read_bytes
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate

#: Writes so many tokens to each of the prompts.
Engine = Callable[[list[np.ndarray], int], Any]


def ours(lm: CausalLM, decode_step: str) -> Engine:
    """``textrl_env.lm.decoding.generate``, a token's step made in a certain way."""
    generator, lm = torch.Generator(lm.device).manual_seed(0), copy.copy(lm)
    lm.decode_step = decode_step
    return lambda prompts, tokens: generate(lm, prompts, tokens, generator)


def transformers_generate(lm: CausalLM, cache: str) -> Engine:
    """``model.generate`` with a "dynamic" or a "static" cache; on CUDA a static one is compiled by transformers."""

    def engine(prompts: list[np.ndarray], tokens: int) -> Any:
        ids = torch.from_numpy(np.stack(prompts)).to(lm.device)
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
        )
        written = lm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        _check(written.shape[1] - ids.shape[1], tokens)
        return written

    return engine


def continuous_batching(lm: CausalLM) -> Engine:
    """``model.generate_batch``; its manager (pages, CUDA graphs) is made in the first call and kept."""
    small = {
        "num_blocks": 64,
        "max_batch_tokens": 64,
        "page_size": 32,
    }  # on a CPU it would take all the memory
    batching = ContinuousBatchingConfig(**({} if lm.device.type == "cuda" else small))

    def engine(prompts: list[np.ndarray], tokens: int) -> Any:
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0
        )
        outputs = lm.model.generate_batch(
            [prompt.tolist() for prompt in prompts],
            generation_config=config,
            continuous_batching_config=batching,
            max_new_tokens=tokens,
            persistent_manager=True,
        )
        # It logs errors and returns what it has.
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed or len(outputs) != len(prompts):
            raise RuntimeError(f"continuous batching: {failed[0] if failed else 'requests are missing'}")
        for output in outputs.values():
            _check(len(output.generated_tokens), tokens)
        return outputs

    return engine


def _check(written: int, wanted: int) -> None:
    if written != wanted:
        raise AssertionError(
            f"{written} tokens were written instead of {wanted}: the comparison would be unfair"
        )


def engines(lm: CausalLM) -> dict[str, Engine]:
    """Everyone who takes part, by name."""
    steps = ("cuda_graph", "eager", "compile") if lm.device.type == "cuda" else ("eager", "static")
    return {f"textrl_env generate, {step}": ours(lm, step) for step in steps} | {
        "transformers, dynamic cache": transformers_generate(lm, "dynamic"),
        "transformers, static cache": transformers_generate(lm, "static"),
        "transformers, continuous batching": continuous_batching(lm),
    }


def measure(
    lm: CausalLM,
    shape: Shape,
    engine: Engine,
    batch: int,
    prompt: int,
    tokens: int,
    bandwidth: float,
    repeats: int,
) -> dict[str, Any]:
    """Speed of one engine at one batch size.

    The time of a token is the slope between writing one token and writing ``tokens``, so prompts and the set-up of
    a call do not count in the share of the bandwidth; they do in the tokens per second.
    """
    rng = np.random.default_rng(0)
    prompts = list(rng.integers(1, shape.vocab, (batch, prompt)))
    peak_memory(lm.device, start=True)
    whole = median_seconds(lambda: engine(prompts, tokens), lm.device, repeats)
    first = median_seconds(lambda: engine(prompts, 1), lm.device, repeats)
    token = max((whole - first) / (tokens - 1), 1e-9)
    element = lm.model.dtype.itemsize
    read = read_bytes(shape, batch, prompt + tokens / 2, element, element)
    return {
        "seconds": whole,
        "prefill_seconds": first,
        "tokens_per_second": batch * tokens / whole,
        "decode_tokens_per_second": batch / token,
        "seconds_per_token_step": token,
        "bytes_per_token_step": read,
        "bandwidth_share": read / token / bandwidth,
        "peak_memory_bytes": peak_memory(lm.device),
    }


def rows(
    name: str,
    make: Callable[[], CausalLM],
    shape: Shape,
    batches: list[int],
    prompt: int,
    tokens: int,
    bandwidth: float,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row for each engine and batch size; memory that runs out is a row of its own."""
    made = attempt(lambda: {"lm": make()}, part="decode", model=name)
    if "error" in made:
        yield made
        return
    lm = made["lm"]
    for engine_name, engine in engines(lm).items():
        for batch in batches:
            # Lambdas are called before the loop goes on.
            yield attempt(
                lambda e=engine, b=batch: measure(lm, shape, e, b, prompt, tokens, bandwidth, repeats),
                part="decode",
                model=name,
                engine=engine_name,
                batch=batch,
                prompt=prompt,
                tokens=tokens,
            )
            # Pages and graphs are sized for one batch.
            lm.model.destroy_cached_continuous_batching_manager()
