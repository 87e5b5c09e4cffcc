"""What users get wrong, and what they are told: what came, what was expected, what would have worked."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import textrl_env  # noqa: F401  registers the ids
from agents import GRPO, PPO, REINFORCE, Agent, MlpPolicy
from agents.algorithms.schedules import schedule_value
from agents.rollouts.vector_envs import make_envs
from tests.tiny import CONTEXT, PROMPTS, WORDS, count_a, make_env, make_lm, make_model, make_tokenizer
from textrl_env.envs.text_rlhf import TextRLHFEnv
from textrl_env.lm.causal_lm import CausalLM

# Environments


def test_an_unknown_id_names_the_nearest():
    with pytest.raises(gym.error.NameNotFound, match=r"TextRLHF"):
        gym.make("TextRLFH-v0")
    with pytest.raises(gym.error.NameNotFound, match=r"CartPole"):
        PPO("MlpPolicy", "CartPol-v1")


def test_an_unknown_keyword_names_the_nearest():
    with pytest.raises(TypeError, match=r"'kl_coeff'.*Did you mean 'kl_coef'"):
        make_env(kl_coeff=0.1)
    with pytest.raises(TypeError, match=r"'max_tokens'.*"):
        make_env(3, max_tokens=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kl_coef": -0.1}, r"kl_coef must be a finite number >= 0, got -0.1"),
        ({"kl_coef": float("nan")}, "kl_coef must be a finite number >= 0, got nan"),
        ({"kl_estimator": "k4"}, r"kl_estimator='k4' is not known; expected one of \['k1', 'k2', 'k3'\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"render_mode": "human"}, r"render_mode='human' is not one of \['ansi', 'rgb_array'\]"),
    ],
)
def test_arguments_out_of_range_are_refused_with_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_env(**kwargs)


def test_a_kl_coefficient_is_checked_when_it_is_changed_too():
    env = make_env()
    with pytest.raises(ValueError, match=r"kl_coef must be a finite number >= 0, got -1"):
        env.kl_coef = -1


def test_no_slots_are_refused():
    with pytest.raises(ValueError, match=r"num_envs must be at least 1, got 0"):
        make_env(0)


# Models


def test_a_model_path_that_is_not_there_names_the_nearest(model_folder):
    with pytest.raises(FileNotFoundError, match=r"modle.*there is no such folder.*Did you mean .*model"):
        TextRLHFEnv(model=str(model_folder.parent / "modle"), reward=count_a, prompts=PROMPTS)


def test_a_folder_without_a_model_says_what_it_holds(tmp_path):
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(FileNotFoundError, match=r"without config.json.*weights.bin"):
        TextRLHFEnv(model=tmp_path, reward=count_a, prompts=PROMPTS)


def test_a_tokenizer_without_an_end_token_is_refused_with_the_remedy():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no EOS token, so no response could end; set one"):
        TextRLHFEnv(model=make_model(), tokenizer=tokenizer, reward=count_a, prompts=PROMPTS)


def test_a_live_model_without_its_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"needs its tokenizer: pass tokenizer="):
        TextRLHFEnv(model=make_model(), reward=count_a, prompts=PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
        CausalLM(make_model(), make_tokenizer(), temperature)


def test_a_temperature_that_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match=r"temperature=0.5 does not fit a CausalLM made with 1.0"):
        make_env(temperature=0.5)


# Prompts


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts: there is nothing in it"),
        (["a", ""], ValueError, r"prompts\[1\].*the text is empty"),
        (["a", 3], ValueError, r"prompts\[1\].*expected a text.*got int 3"),
        ([{"text": "a"}], ValueError, r"prompts\[0\]: there is no column 'prompt', only 'text'"),
        ("no-such-file.jsonl", FileNotFoundError, "there is no file 'no-such-file.jsonl'"),
        (3, TypeError, "prompts has to be a list.*got int 3"),
        ([{"prompt": "a", "completions": "b"}], ValueError, "cannot be called 'completions'"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_by_their_place(prompts, error, message):
    with pytest.raises(error, match=message):
        make_env(prompts=prompts)


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths():
    longest = CONTEXT - 3
    with pytest.raises(ValueError, match=rf"need {CONTEXT + 3} positions.*holds {CONTEXT}.*to 3"):
        make_env(prompts=["a " * longest])
    make_env(prompts=["a " * longest], max_new_tokens=3)


def test_a_prompt_longer_than_the_observation_is_refused():
    with pytest.raises(ValueError, match=r"prompt 2 has 4 tokens, more than max_prompt_length=3"):
        make_env(prompts=PROMPTS, max_prompt_length=3)
    env = make_env()
    with pytest.raises(ValueError, match=r"options\['prompt'\].*has 7 tokens, more than max_prompt_length=6"):
        env.reset(options={"prompt": "a a a a a a a"})


@pytest.mark.parametrize("prompt_id", [-1, len(PROMPTS), 1.5])
def test_a_prompt_id_that_is_not_one_is_refused_with_the_range(prompt_id):
    with pytest.raises(ValueError, match=rf"prompt_id must be an integer in \[0, 3\], got {prompt_id!r}"):
        make_env().reset(options={"prompt_id": prompt_id})


def test_two_starts_at_once_are_refused():
    with pytest.raises(ValueError, match=r"takes one of .*got several"):
        make_env().reset(options={"prompt_id": 0, "prompt": "a"})


def test_an_unknown_reset_option_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'promt'.*Did you mean 'prompt'"):
        make_env().reset(options={"promt": "a"})


# Rewards


def end_episode(reward, **kwargs):
    env = make_env(reward=reward, **kwargs)
    env.bind_policy(lambda observation, action: -1.0)
    env.reset(seed=0, options={"prompt_id": 1})
    env.step(WORDS.index("a"))
    return env.step(0)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0, 2.0], ValueError, "'bad' returned 2 scores for 1 completions"),
        ([], ValueError, "'bad' returned 0 scores for 1 completions"),
        (None, TypeError, "'bad' returned NoneType"),
        (0.5, TypeError, "'bad' returned float"),
        (
            [float("nan")],
            ValueError,
            r"'bad' returned nan at index 0: not finite.*Prompt: 'b c', completion: 'a'",
        ),
        ([float("inf")], ValueError, "'bad' returned inf at index 0: not finite"),
        (["good"], TypeError, "'bad' returned 'good' at index 0: not a number"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named_with_what_it_returned(returned, error, message):
    def bad(prompts, completions):
        return returned

    with pytest.raises(error, match=message):
        end_episode(bad)


def test_a_reward_that_asks_for_a_column_that_is_not_there_is_told_which_are():
    def right(prompts, completions, answr):
        return [0.0]

    with pytest.raises(TypeError, match=r"answr"):
        end_episode(right, prompts=[{"prompt": "a", "answer": "b"}, "b c"])


@pytest.mark.parametrize(
    ("reward", "message"),
    [(3, "got int: 3"), ("no.such.module:reward", "no module 'no'"), ({"a": 1}, "dict")],
)
def test_something_that_is_no_reward_is_refused_at_once(reward, message):
    with pytest.raises((TypeError, ValueError, ImportError), match=message):
        make_env(reward=reward)


# Steps


@pytest.mark.parametrize("action", [-1, len(WORDS), 1.0, None, "a"])
def test_an_action_outside_the_space_is_refused(action):
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(
        ValueError, match=rf"got the action {action!r}.*not in the action space Discrete\(12\)"
    ):
        env.step(action)


def test_stepping_before_a_reset_or_after_the_end_is_refused():
    env = make_env()
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) first"):
        env.step(0)
    env.bind_policy(lambda observation, action: -1.0)
    env.reset(seed=0)
    env.step(0)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    envs = make_env(2)
    with pytest.raises(gym.error.ResetNeeded, match=r"slots \[0, 1\]"):
        envs.step(np.zeros(2, dtype=np.int64))


# Agents


@pytest.mark.parametrize("cls", [PPO, REINFORCE, GRPO])
def test_a_wrong_keyword_of_an_agent_names_the_nearest(cls):
    with pytest.raises(
        TypeError, match=rf"{cls.__name__} got .*'learning_rte'. Did you mean 'learning_rate'"
    ):
        cls("MlpPolicy", "ToyBandit-v0", learning_rte=0.1)


def test_a_wrong_keyword_of_a_policy_or_an_env_names_the_nearest():
    with pytest.raises(TypeError, match=r"MlpPolicy got .*'net_arc'. Did you mean 'net_arch'"):
        PPO("MlpPolicy", "ToyBandit-v0", policy_kwargs={"net_arc": [8]})
    with pytest.raises(TypeError, match=r"'armz'.*Did you mean 'arms'"):
        PPO("MlpPolicy", "ToyBandit-v0", env_kwargs={"armz": 3})


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ValueError, match=r"policy='MlpPolcy' is not known. Did you mean 'MlpPolicy'"):
        PPO("MlpPolcy", "ToyBandit-v0")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"),
        ({"n_episodes": -3}, "n_episodes must be at least 1, got -3"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"n_envs": 0}, "n_envs must be at least 1, got 0"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"gamma": -0.1}, r"gamma must be in \[0, 1\], got -0.1"),
        ({"gae_lambda": 2.0}, r"gae_lambda must be in \[0, 1\], got 2.0"),
        ({"critic": "joint"}, "critic='joint' is not known"),
        ({"learning_rate": "cosine:1"}, "a schedule is a number.*got 'cosine:1'"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PPO("MlpPolicy", "ToyBandit-v0", **kwargs)


def test_choices_of_grpo_and_reinforce_are_named():
    with pytest.raises(ValueError, match=r"n_episodes=10 must be a multiple of group_size=4"):
        GRPO("MlpPolicy", "ToyBandit-v0", group_size=4, n_episodes=10)
    with pytest.raises(ValueError, match=r"group_size must be at least 1, got 0"):
        GRPO("MlpPolicy", "ToyBandit-v0", group_size=0)
    with pytest.raises(ValueError, match=r"scale='stdd' is not known.*Did you mean 'std'"):
        GRPO("MlpPolicy", "ToyBandit-v0", scale="stdd")
    with pytest.raises(ValueError, match=r"kl_in='both' is not known"):
        GRPO("MlpPolicy", "ToyBandit-v0", kl_in="both")
    with pytest.raises(ValueError, match=r"baseline='critic' is not known"):
        REINFORCE("MlpPolicy", "ToyBandit-v0", baseline="critic")


def test_something_that_is_no_env_is_refused():
    with pytest.raises(TypeError, match=r"env must be a Gymnasium id, an env or a vector env.*got int"):
        PPO("MlpPolicy", 3)


class Odd(gym.Env):
    """An env with any spaces."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Tuple([spaces.Text(5)]), spaces.Discrete(2), "cannot take the observation space Text"),
        (spaces.Text(5), spaces.Discrete(2), "cannot take the observation space Text"),
        (spaces.Discrete(2), spaces.Tuple([spaces.Discrete(2)]), "acts in Discrete, .*Box.*got Tuple"),
        (spaces.Box(0, 1, (400, 300)), spaces.Discrete(2), "120000 features"),
    ],
)
def test_spaces_that_a_policy_cannot_take_are_refused(observation_space, action_space, message):
    with pytest.raises(ValueError, match=message):
        PPO("MlpPolicy", Odd(observation_space, action_space))


def test_a_language_model_policy_is_refused_where_there_is_no_text():
    with pytest.raises(ValueError, match=r"wants Dict\(input_ids, attention_mask\).*MlpPolicy"):
        PPO("CausalLMPolicy", "CartPole-v1", policy_kwargs={"model": make_lm()})
    with pytest.raises(ValueError, match=r"found no language model.*policy_kwargs"):
        PPO("CausalLMPolicy", "TokenTree-v0")


def test_a_model_with_another_vocabulary_is_refused_with_both_sizes():
    other = CausalLM(make_model(extra_vocab=2), make_tokenizer(words=[*WORDS, "j", "k"]))
    with pytest.raises(ValueError, match=r"has 14 tokens, the action space 12 actions"):
        PPO("CausalLMPolicy", make_env(), policy_kwargs={"model": other})


def test_another_env_must_have_the_same_spaces():
    agent = PPO("MlpPolicy", "ToyBandit-v0", n_steps=4)
    with pytest.raises(
        ValueError, match=r"single_observation_space is Discrete\(7\), expected Discrete\(1\)"
    ):
        agent.set_env("LineWorld-v0")


def test_groups_where_the_env_cannot_start_alike_are_refused_with_the_remedy():
    class NoSeeds(gym.vector.VectorWrapper):
        def reset(self, *, seed=None, options=None):
            if isinstance(seed, list):
                raise TypeError("an int was expected")
            return self.env.reset(seed=seed, options=options)

    envs = NoSeeds(gym.make_vec("CartPole-v1", num_envs=4))
    agent = GRPO("MlpPolicy", envs, group_size=4, n_episodes=4)
    with pytest.raises(ValueError, match=r'neither a start option nor one seed.*vectorization_mode="sync"'):
        agent.learn(4)


def test_gradients_that_stay_not_finite_stop_with_advice():
    class Exploding(Agent):
        def loss(self, batch, new):
            return new.log_probs * float("inf"), {}

    agent = Exploding("MlpPolicy", "ToyBandit-v0", n_steps=4, seed=0)
    before = copy.deepcopy(agent.policy.state_dict())
    with pytest.raises(FloatingPointError, match=r"gradient of 3 updates in a row .* lower learning_rate"):
        agent.learn(40)
    assert all(torch.equal(weight, before[name]) for name, weight in agent.policy.state_dict().items())


def test_an_agent_without_a_loss_says_what_to_override():
    with pytest.raises(NotImplementedError, match=r"Agent must override loss\(\) or train\(\)"):
        Agent("MlpPolicy", "ToyBandit-v0", n_steps=4).learn(4)


def test_schedules_say_their_forms():
    assert schedule_value("linear:0.5", 0.5) == 0.25
    with pytest.raises(ValueError, match=r"linear:3e-4"):
        schedule_value("linear", 1.0)


def test_make_envs_keeps_a_vector_env_as_it_is():
    envs = make_env(2)
    assert make_envs(envs, 8) is envs
    assert MlpPolicy.whole_episodes is False
