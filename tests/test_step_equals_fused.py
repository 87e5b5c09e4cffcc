"""The step way and the fused way through TextRLHF-v0 are one environment: same tokens in, same rewards out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.policies.factory import CausalLMPolicy
from tests.tiny import EOS, WORDS, id_sum, make_env, make_lm
from textrl_env.lm.decoding import generate

TOLERANCE = 1e-4

worlds = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["llama", "gpt2"]),
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([0.6, 1.0, 1.7]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "kl_coef": st.sampled_from([0.0, 0.05, 1.0]),
        "missing_eos_penalty": st.sampled_from([0.0, 0.7]),
        "max_new_tokens": st.integers(1, 7),
        "prompts": st.lists(
            st.lists(st.sampled_from(WORDS[3:]), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=4
        ),
        "more_eos": st.booleans(),
        "pad": st.sampled_from(["<pad>", "<eos>"]),
    }
)


def build(world, num_envs=None):
    """An env, and a policy that is not its reference."""
    lm, actor = (
        make_lm(world["kind"], world["seed"] + shift, world["temperature"], world["pad"]) for shift in (0, 10)
    )
    if world["more_eos"]:  # a second end token: responses of every length, hence every EOS position
        lm.eos_ids = actor.eos_ids = np.array([EOS, 3])
    names = ("kl_estimator", "kl_coef", "missing_eos_penalty", "max_new_tokens", "prompts")
    env = make_env(num_envs, lm, reward=[count_len, id_sum], **{name: world[name] for name in names})
    space = env.observation_space, env.action_space
    if num_envs is not None:
        space = env.single_observation_space, env.single_action_space
    policy = CausalLMPolicy(*space, critic=None, model=actor)
    policy.generator = torch.Generator().manual_seed(world["seed"])
    return env, policy


def count_len(prompts, completions):
    return [len(c) / 10 for c in completions]


def assert_step(episodes, i, t, reward, info):
    assert reward == pytest.approx(episodes.rewards[i, t], abs=TOLERANCE)
    assert info["ref_logprob"] == pytest.approx(episodes.ref_logprob[i, t], abs=TOLERANCE)
    assert info["kl"] == pytest.approx(episodes.kl[i, t], abs=TOLERANCE)


def assert_end(episodes, i, info):
    assert info["score"] == pytest.approx(episodes.score[i], abs=TOLERANCE)
    assert info["kl_sum"] == pytest.approx(episodes.kl[i].sum(), abs=TOLERANCE)
    assert info["response"] == episodes.responses[i]
    assert info["stop_reason"] == episodes.stop_reason[i]
    assert info["response_length"] == episodes.mask[i].sum()
    for name, part in episodes.parts.items():
        assert info[f"score/{name}"] == pytest.approx(part[i], abs=TOLERANCE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(worlds)
def test_stepping_the_tokens_of_the_fused_way_gives_its_rewards(world):
    env, policy = build(world)
    prompt_ids = np.arange(5) % env.num_prompts
    episodes = env.run_episodes(lambda prompts: policy.generate(prompts, env.max_new_tokens), prompt_ids)
    env.bind_policy(
        lambda observation, action: policy.log_prob(
            {name: value[None] for name, value in observation.items()}, np.array([action])
        )[0]
    )
    for i, prompt_id in enumerate(prompt_ids):
        _, info = env.reset(options={"prompt_id": int(prompt_id)})
        assert info["prompt"] == episodes.rendered[i]
        length = int(episodes.mask[i].sum())
        for t in range(length):
            _, reward, terminated, truncated, info = env.step(int(episodes.tokens[i, t]))
            assert terminated == (t + 1 == length) and truncated is False
            assert_step(episodes, i, t, reward, info)
        assert_end(episodes, i, info)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(worlds)
def test_the_fused_way_over_what_a_vector_env_has_stepped_gives_its_rewards(world):
    """Slots end at their own times and restart at once; every finished episode is then run fused."""
    env, policy = build(world, num_envs=3)
    env.bind_policy(policy.log_prob)
    observation, infos = env.reset(seed=world["seed"])
    prompt_id = infos["prompt_id"].copy()
    running = [([], [], []) for _ in range(3)]
    finished = []
    for _ in range(16):
        actions, _, _ = policy.act(observation)
        observation, rewards, terminated, truncated, infos = env.step(actions)
        assert not truncated.any()
        for slot in range(3):
            info = infos["final_info"] if terminated[slot] else infos
            step = {name: info[name][slot] for name in ("ref_logprob", "kl")}
            for column, value in zip(running[slot], (actions[slot], rewards[slot], step), strict=True):
                column.append(value)
            if terminated[slot]:
                end = {n: v[slot] for n, v in info.items() if not n.startswith("_")}
                finished.append((prompt_id[slot], *running[slot], end))
                running[slot] = ([], [], [])
                prompt_id[slot] = infos["prompt_id"][slot]
    assert len(finished) >= 3

    def replay(prompts):
        responses = [np.array(tokens) for _, tokens, *_ in finished]
        log_probs = policy.lm.response_log_probs(prompts, responses)
        return responses, [row[: len(r)] for row, r in zip(log_probs, responses, strict=True)]

    episodes = env.run_episodes(replay, [k for k, *_ in finished])
    for i, (_, _, rewards, steps, end) in enumerate(finished):
        for t, (reward, info) in enumerate(zip(rewards, steps, strict=True)):
            assert_step(episodes, i, t, reward, info)
        assert_end(episodes, i, end)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(worlds)
def test_the_fused_way_is_the_formula_on_unpadded_forward_passes(world):
    """``r_t = 1[t = T] score - kl_coef kl_t``, from one plain pass of each model over each text alone."""
    env, policy = build(world)
    prompt_ids = np.arange(4) % env.num_prompts
    episodes = env.run_episodes(lambda prompts: policy.generate(prompts, env.max_new_tokens), prompt_ids)

    @torch.no_grad()
    def log_probs(model, prompt, response):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        table = (model(ids).logits[0, :, : len(WORDS)] / world["temperature"]).log_softmax(-1)
        return table[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].double().numpy()

    for i, prompt in enumerate(episodes.prompt_tokens):
        response = episodes.tokens[i][episodes.mask[i]]
        acting, reference = (log_probs(m, prompt, response) for m in (policy.model, env.lm.model))
        k1 = acting - reference
        kl = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1}[world["kl_estimator"]]
        ended = response[-1] in env.lm.eos_ids
        body = response[:-1] if ended else response
        text = env.lm.tokenizer.decode(body, skip_special_tokens=True)
        score = len(text) / 10 + id_sum(None, [None], [prompt.tolist()], [response.tolist()])[0]
        score -= world["missing_eos_penalty"] * (not ended)
        expected = -world["kl_coef"] * kl
        expected[-1] += score
        assert episodes.rewards[i][episodes.mask[i]] == pytest.approx(expected, abs=5e-4)
        assert episodes.stop_reason[i] == ("eos" if ended else "length")
        assert (episodes.rewards[i][~episodes.mask[i]] == 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_the_policys_own_steps_and_its_own_generation_say_the_same_log_probs(kind):
    env = make_env(2, make_lm(kind), max_new_tokens=8)
    space = env.single_observation_space, env.single_action_space
    policy = CausalLMPolicy(*space, critic=None, model=make_lm(kind, seed=1))
    policy.generator = torch.Generator().manual_seed(0)
    prompt = env.dynamics.prompt_tokens[2]
    responses, log_probs = generate(policy.lm, [prompt, prompt], 8, policy.generator)
    shortest = min(len(r) for r in responses)
    observation, _ = env.reset(seed=0, options={"prompt_id": 2})
    env.bind_policy(policy.log_prob)
    for t in range(shortest):
        actions = np.array([r[t] for r in responses])
        got = policy.log_prob(observation, actions)
        assert got == pytest.approx([row[t] for row in log_probs], abs=TOLERANCE)
        observation, *_ = env.step(actions)
