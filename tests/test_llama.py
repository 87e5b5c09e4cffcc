"""The body of a Llama in fewer operations says what its modules say, and is not used where it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny import WORDS, make_lm, make_model, make_tokenizer, random_sequences
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate
from textrl_env.lm.fused_llama import FusedLlama

SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.35,
    "head_dim": 4,
}
FAMILY = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "llama-scaled-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}


def random_model(name: str) -> PreTrainedModel:
    config, model, more = FAMILY[name]
    torch.manual_seed(0)
    made = model(config(**SIZES, **more)).eval()
    for parameter in made.parameters():  # norms and biases start at one and zero, where errors would not show
        torch.nn.init.normal_(parameter, std=0.35)
    return made


def gradient(model: PreTrainedModel, states: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (states * torch.linspace(-1.0, 1.0, states.numel()).view(states.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def masked_inputs() -> dict[str, torch.Tensor]:
    """Two sequences in one row, neither looking at the other."""
    sequence = torch.tensor([0] * 5 + [1] * 4)
    alike = sequence[:, None] == sequence[None]
    return {
        "attention_mask": (alike & torch.ones(9, 9, dtype=torch.bool).tril())[None, None],
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]),
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_states_and_gradients_are_those_of_the_modules(name, masked):
    model = random_model(name)
    ids = torch.randint(len(WORDS), (3, 9), generator=torch.Generator().manual_seed(1))
    inputs = masked_inputs() if masked else {}
    theirs = model.model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    wanted = gradient(model, theirs)
    mine = FusedLlama(model.model)(ids, **inputs).last_hidden_state
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    got = gradient(model, mine)
    assert got.keys() == wanted.keys()
    for parameter in wanted:
        torch.testing.assert_close(got[parameter], wanted[parameter], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILY)
def test_tokens_after_a_cache_see_what_is_in_it(name):
    model = random_model(name)
    ids = torch.randint(len(WORDS), (2, 8), generator=torch.Generator().manual_seed(1))
    body, cache = FusedLlama(model.model), DynamicCache()
    with torch.no_grad():
        whole = body(ids).last_hidden_state
        parts = [body(ids[:, :5], past_key_values=cache, use_cache=True).last_hidden_state]
        for t in range(5, 8):
            everything = torch.ones(1, 1, 1, t + 1, dtype=torch.bool)
            place = {"attention_mask": everything, "position_ids": torch.tensor([[t]])}
            parts.append(body(ids[:, t : t + 1], past_key_values=cache, **place).last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_generation_and_evaluation_take_it_and_agree_with_plain_logits(name):
    lm = CausalLM(random_model(name), make_tokenizer())
    assert lm.fused_body() is not None
    prompts = [p for p in random_sequences([3, 70]) for _ in range(3)]
    prompts = [p[:40] for p in prompts]
    responses, said = generate(lm, prompts, 6, torch.Generator().manual_seed(0))
    again = lm.response_log_probs(prompts, responses)
    for prompt, response, mine, evaluated in zip(prompts, responses, said, again, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        with torch.no_grad():
            table = lm.action_logits(lm.model(ids).logits)[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = table.gather(-1, torch.from_numpy(response)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(mine, wanted, atol=1e-4)
        np.testing.assert_allclose(evaluated[: len(response)], wanted, atol=1e-4)


def test_under_autocast_products_are_in_bfloat16_and_states_and_gradients_close():
    model = random_model("llama")
    ids = torch.randint(len(WORDS), (3, 9), generator=torch.Generator().manual_seed(1))
    exact = FusedLlama(model.model)(ids).last_hidden_state
    wanted = gradient(model, exact)
    with torch.autocast("cpu", torch.bfloat16):
        low = FusedLlama(model.model)(ids).last_hidden_state
    assert low.dtype == torch.float32 and not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, atol=0.1, rtol=0.1)
    got = gradient(model, low)
    for parameter, grad in wanted.items():
        cosine = torch.cosine_similarity(got[parameter].flatten(), grad.flatten(), dim=0)
        assert cosine > 0.98, parameter


def test_a_model_of_other_parts_is_left_to_its_modules():
    assert isinstance(make_model("gpt2"), GPT2LMHeadModel)
    assert make_lm("gpt2").fused_body() is None
    with pytest.raises(AttributeError):
        FusedLlama(make_model("gpt2").transformer)


def test_a_model_of_the_same_parts_that_computes_otherwise_is_left_to_its_modules():
    torch.manual_seed(0)
    gemma = GemmaForCausalLM(GemmaConfig(**SIZES)).eval()
    for layer in gemma.modules():  # as if its norms were called like a Llama's
        if hasattr(layer, "eps"):
            layer.variance_epsilon = layer.eps
    FusedLlama(gemma.model)
    assert CausalLM(gemma, make_tokenizer()).fused_body() is None


def test_new_weights_are_seen_at_once():
    model = random_model("llama")
    body, ids = FusedLlama(model.model), torch.arange(6)[None]
    with torch.no_grad():
        before = body(ids).last_hidden_state
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = body(ids).last_hidden_state
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, model.model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
