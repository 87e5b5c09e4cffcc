"""vLLM in this process: an engine of its own beside the model that is trained.

    engine = {"generator": "vllm", "generator_kwargs": {"gpu_memory_utilization": 0.4}}
    GRPO("CausalLMPolicy", env, policy_kwargs=engine)

Weights go through a folder (``reload_weights``), and what vLLM has cached of prompts is forgotten with the old ones.
Made for vLLM 0.32. Left out: its weight transfer between GPUs, several of which one process of ours does not train on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from textrl_env.generators.answers import Generated
from textrl_env.generators.sampling import Sampling
from textrl_env.generators.vllm_params import WeightsFolder, plain_number, request_params


class VllmGenerator:
    """``vllm.LLM`` behind the protocol of a generator; the engine is made at the first rollout.

    Args:
        weights_folder: Where weights are written; None is a temporary folder.
        **options: Arguments of ``vllm.LLM``, such as ``dtype``, ``gpu_memory_utilization`` or ``max_model_len``.
    """

    def __init__(self, weights_folder: str | Path | None = None, **options: Any) -> None:
        for name in ("model", "logprobs_mode"):
            if name in options:
                raise ValueError(
                    f"generator 'vllm': {name} is set by the policy, leave it out of generator_kwargs"
                )
        self.options = options
        self._folder = WeightsFolder(weights_folder)
        self._engine: Any = None

    def update_weights(self, model: Any) -> None:
        """Make the engine with these weights, or have it read them."""
        folder = self._folder.write(model)
        if self._engine is None:
            from vllm import LLM

            options = {"skip_tokenizer_init": True, "disable_log_stats": True} | self.options
            # The log-probabilities of what was sampled: after temperature and cut, which is not its default.
            self._engine = LLM(model=str(folder), logprobs_mode="processed_logprobs", **options)
            return
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._engine.reset_prefix_cache()

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> Generated:
        """One response to each prompt; see :class:`~textrl_env.protocols.Generator`."""
        from vllm import SamplingParams

        params = []
        for number in range(len(prompts)):
            asked = request_params(sampling, number)
            bias = asked["logit_bias"]
            asked["logit_bias"] = None if bias is None else {int(token): x for token, x in bias.items()}
            params.append(SamplingParams(detokenize=False, **asked))
        inputs = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        outputs = [out.outputs[0] for out in self._engine.generate(inputs, params, use_tqdm=False)]
        responses = [list(out.token_ids) for out in outputs]
        log_probs = [
            [
                plain_number(step[token].logprob)
                for token, step in zip(out.token_ids, out.logprobs, strict=True)
            ]
            for out in outputs
        ]
        return Generated(responses, log_probs, [_stop(out.finish_reason) for out in outputs])


def _stop(reason: str | None) -> str:
    return "eos" if reason == "stop" else str(reason)
