"""The client of a vLLM server, against a server of ours that speaks its API; against a real one: ``make engines``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents import GRPO
from tests.fake_vllm import FakeVllm
from tests.tiny import EOS, WORDS, id_sum, make_env, make_lm
from textrl_env.generators import GeneratorError, Sampling, make_generator
from textrl_env.generators.answers import ask

GAP = "sampling/sampling_logp_difference"
PROMPTS = [np.array([3]), np.array([4, 5])] * 4
SAMPLING = Sampling(6, (EOS,), len(WORDS))


@pytest.fixture
def server():
    with FakeVllm() as made:
        yield made
        made.shutdown()


@pytest.fixture
def client(server):
    made, _ = make_generator(server.url)
    made.update_weights(make_lm().model)
    return made


def agent_with(url, **kwargs):
    env = make_env(lm=make_lm(), reward=id_sum)
    policy_kwargs = {"generator": url} | kwargs.pop("policy_kwargs", {})
    return GRPO(
        "CausalLMPolicy", env, n_episodes=8, group_size=4, seed=0, policy_kwargs=policy_kwargs, **kwargs
    )


def test_an_agent_learns_from_a_server_that_has_its_weights_at_every_rollout(server):
    agent = agent_with(server.url, learning_rate=1e-2)
    for _ in range(2):
        agent.learn(1, reset_num_timesteps=agent.n_updates == 0)
        assert agent.latest[f"{GAP}/max"] == pytest.approx(0, abs=1e-4)
    # What was cached of prompts belongs to weights that are gone.
    weights = [path for path in server.paths if path != "/v1/completions"]
    assert weights == ["/collective_rpc", "/reset_prefix_cache"] * 2
    assert server.completions == 16


def test_two_runs_from_one_seed_ask_for_the_same(server):
    asked = []
    for _ in range(2):
        agent_with(server.url).learn(1)
        asked.append(sorted(str(body) for body in server.bodies if "prompt" in body))
        server.bodies.clear()
    assert asked[0] == asked[1]


def test_answers_of_a_group_have_seeds_of_their_own(server, client):
    made = ask(client, [np.array([3])] * 8, Sampling(6, (EOS,), len(WORDS), seed=1), server.url)
    assert len({tuple(row) for row in made.responses}) > 1
    assert len({body["seed"] for body in server.bodies if "prompt" in body}) == 8


def test_everything_that_sampling_says_is_asked_for(server, client):
    sampling = Sampling(6, (EOS, 5), 10, 0.5, 0.9, 4, 0.1, 2, seed=7, num_logits=12)
    client.generate(PROMPTS[:1], sampling)
    (body,) = (body for body in server.bodies if "prompt" in body)
    wanted = {
        "model": "tiny",
        "prompt": [3],
        "max_tokens": 6,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "seed": 7,
        "stop_token_ids": [EOS, 5],
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "logit_bias": {"10": -100.0, "11": -100.0},  # the head is wider than the vocabulary
        "repetition_penalty": 1.0,
    }
    assert {name: body[name] for name in wanted} == wanted


def test_the_likeliest_token_is_asked_for_by_temperature_0(server, client):
    client.generate(PROMPTS[:1], Sampling(6, (EOS,), 12, deterministic=True))
    assert server.bodies[-1]["temperature"] == 0.0 and server.bodies[-1]["top_k"] == -1


def test_what_is_cut_comes_back_renormalised(server, client):
    lm = make_lm()
    made = ask(client, PROMPTS * 4, Sampling(6, (EOS,), len(WORDS), top_k=3), server.url)
    above = made.log_probs[made.policy] - lm.log_probs(made)
    assert above.min() > -1e-4 and above.max() > 0.1


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_said_before_anything_is_trained():
    with pytest.raises(
        GeneratorError, match=r"at http://127.0.0.1:1 does not answer .*started with: VLLM_SERVER_DEV"
    ):
        agent_with("http://127.0.0.1:1")


def test_a_server_without_the_calls_for_weights_is_refused():
    with (
        FakeVllm(dev_mode=False) as server,
        pytest.raises(GeneratorError, match="no /server_info, by which weights"),
    ):
        agent_with(server.url)


def test_a_server_that_reports_raw_log_probs_is_refused_where_these_are_of_something_else():
    with FakeVllm(logprobs_mode="raw_logprobs") as server:
        client, _ = make_generator(server.url)
        client.update_weights(make_lm().model)
        assert len(client.generate(PROMPTS, Sampling(6, (EOS,), 12)).responses) == 8
        for knobs in ({"temperature": 0.5}, {"top_k": 3}, {"min_new_tokens": 1}):
            with pytest.raises(GeneratorError, match="reports raw_logprobs, which with a temperature or cut"):
                client.generate(PROMPTS, Sampling(6, (EOS,), 12, **knobs))


def test_a_response_whose_connection_is_cut_is_asked_for_again(server, client):
    whole = client.generate(PROMPTS, SAMPLING)
    server.cut = (10, 12)
    with pytest.warns(UserWarning, match=f"the vLLM server at {server.url} .* is asked again"):
        again = client.generate(PROMPTS, SAMPLING)
    assert again == whole and server.completions == 18


def test_a_server_that_dies_in_the_middle_is_one_error(server):
    agent = agent_with(server.url)
    server.cut = range(12, 1000)
    agent.learn(1)
    before = torch.nn.utils.parameters_to_vector(agent.policy.parameters()).clone()
    with pytest.raises(
        GeneratorError, match=f"the vLLM server at {server.url} does not answer .POST /v1/completions"
    ):
        agent.learn(1, reset_num_timesteps=False)
    assert torch.equal(before, torch.nn.utils.parameters_to_vector(agent.policy.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choice: None, "answered 400 to POST /v1/completions: .*too long"),
        (lambda choice: choice | {"token_ids": None}, "returned no token ids or no log-probabilities"),
        (
            lambda choice: choice | {"token_ids": [*choice["token_ids"], 3]},
            "returned 7 tokens|after the end token",
        ),
        (lambda choice: choice | {"finish_reason": "abort"}, "was stopped by 'abort'"),
        (
            lambda choice: choice | {"logprobs": {"token_logprobs": [None] * len(choice["token_ids"])}},
            "log-probability nan in response 0, which is not finite",
        ),
    ],
)
def test_an_answer_that_does_not_fit_is_one_error(server, client, change, message):
    server.change = change
    with pytest.raises(GeneratorError, match=message):
        ask(client, PROMPTS, Sampling(6, (EOS,), len(WORDS)), server.url)


def test_vllm_where_it_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match="generator='vllm' needs the package 'vllm', which is not installed: install"
    ):
        make_generator("vllm")
