"""The generators "vllm" and a vLLM server against a real vLLM: ``make engines`` installs one and runs this.

Skipped where vLLM is not installed, as it is not in the environment of the other tests.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make engines has it", allow_module_level=True)

from transformers import LlamaConfig, LlamaForCausalLM

from agents import GRPO
from tests.tiny import EOS, WORDS, make_env, make_tokenizer
from textrl_env.generators import GeneratorError, Sampling, make_generator
from textrl_env.generators.answers import ask
from textrl_env.lm.causal_lm import CausalLM

GAP = "sampling/sampling_logp_difference"
#: In float32, so that what is left of a difference is a fault; no graphs, which take minutes to make.
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 64}
PROMPTS = [np.array([3]), np.array([4, 5]), np.array([6, 7, 8])] * 10


def make_lm(seed: int = 0) -> CausalLM:
    """A tiny Llama with heads as wide as vLLM's CPU kernels have them, and outputs that belong to no token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(WORDS) + 5,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = EOS
    return CausalLM(model, make_tokenizer())


@pytest.fixture(scope="session", autouse=True)
def memory():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


@pytest.fixture(scope="session")
def local():
    return make_generator("vllm", OPTIONS)[0]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a vLLM server that has been started for these tests."""
    folder = tmp_path_factory.mktemp("served")
    lm = make_lm(seed=9)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "64"]
    flags += ["--host", "127.0.0.1", "--port", str(port), "--logprobs-mode", "processed_logprobs"]
    # What "vllm serve" starts; vllm-cpu's own command looks for the package by the name "vllm" and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *flags]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                make_generator(url)
                break
            except GeneratorError:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(params=["local", "server"])
def engine(request):
    found = request.getfixturevalue(request.param)
    return make_generator(found)[0] if isinstance(found, str) else found


def sampling(lm: CausalLM, seed: int = 5, **knobs) -> Sampling:
    """Six tokens of the model's, none of the outputs that belong to no token."""
    return Sampling(6, (EOS,), lm.vocab_size, seed=seed, num_logits=lm.model.config.vocab_size, **knobs)


def test_log_probs_are_those_of_the_weights_that_were_pushed_last(engine):
    for seed in (0, 1, 0):
        lm = make_lm(seed)
        engine.update_weights(lm.model)
        made = ask(engine, PROMPTS, sampling(lm), "vllm")
        assert np.abs(made.log_probs[made.policy] - lm.log_probs(made)).max() < 1e-4
        assert made.tokens.max() < len(WORDS)
        assert len({tuple(made.responses[i]) for i in range(0, 30, 3)}) > 1


def test_one_seed_gives_the_same_responses(engine):
    lm = make_lm()
    engine.update_weights(lm.model)
    first, again, other = (ask(engine, PROMPTS, sampling(lm, seed=seed), "vllm") for seed in (5, 5, 6))
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize("knobs", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"min_new_tokens": 3}])
def test_what_is_cut_is_reported_renormalised(engine, knobs):
    lm = make_lm(1)
    engine.update_weights(lm.model)
    made = ask(engine, PROMPTS, sampling(lm, **knobs), "vllm")
    above = made.log_probs[made.policy] - lm.log_probs(made)
    assert above.min() > -1e-4 and above.max() > 0.02


def test_a_temperature_divides_the_logits(engine):
    lm = make_lm()
    engine.update_weights(lm.model)
    made = ask(engine, PROMPTS, sampling(lm, temperature=0.5), "vllm")
    sharper = CausalLM(lm.model, lm.tokenizer, temperature=0.5)
    assert np.abs(made.log_probs[made.policy] - sharper.log_probs(made)).max() < 1e-4


def test_grpo_learns_as_with_our_own_decoder_within_seed_noise(engine):
    """By the mean score of eight updates, in which it rises from 0.4 to about 5 of 6."""

    def mean_score(generator, seed):
        env = make_env(lm=make_lm(), kl_coef=0.05)
        policy_kwargs = {} if generator is None else {"generator": generator}
        kwargs = {"n_episodes": 64, "learning_rate": 1e-3, "seed": seed, "policy_kwargs": policy_kwargs}
        agent = GRPO("CausalLMPolicy", env, **kwargs)
        scores = []
        for update in range(8):
            agent.learn(1, reset_num_timesteps=update == 0)
            scores.append(agent.latest["objective/scores"])
            if generator is not None:
                assert agent.latest[f"{GAP}/max"] < 1e-3
        assert scores[0] < 1 and scores[-1] > 3, "nothing was learned"
        return np.mean(scores)

    native = np.array([mean_score(None, seed) for seed in range(6)])
    theirs = np.array([mean_score(engine, seed) for seed in range(3)])
    noise = native.std(ddof=1)
    print(f"\nnative {native.mean():.2f}, seeds {noise:.2f} apart; vLLM {np.round(theirs, 2)}")
    assert np.abs(theirs - native.mean()).max() < 3 * noise
    assert abs(theirs.mean() - native.mean()) < 3 * noise * (1 / 6 + 1 / 3) ** 0.5
