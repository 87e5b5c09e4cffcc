"""TextGame-v0: turns of a policy and answers of a game, token by token and whole episodes at once."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import GRPO, PPO, REINFORCE
from agents.policies.factory import CausalLMPolicy
from tests.games import Copycat, Wild
from tests.tiny import CONTEXT, EOS, WORDS, make_lm
from textrl_env.envs.text_game import TextGameEnv, TextGameVectorEnv
from textrl_env.lm import decoding
from textrl_env.lm.sequences import ENVIRONMENT, POLICY, PROMPT

TOLERANCE = 1e-4


def make_game(num_envs=None, game=Copycat, lm=None, **kwargs):
    kwargs = {"max_new_tokens": 4, "model": make_lm() if lm is None else lm} | kwargs
    return (
        TextGameEnv(game=game, **kwargs)
        if num_envs is None
        else TextGameVectorEnv(num_envs, game=game, **kwargs)
    )


def say(env, *words):
    """Step through the tokens of some words; the last step."""
    for word in words:
        last = env.step(WORDS.index(word))
    return last


def shown(observation):
    """The words of an observation."""
    return [WORDS[i] for i in observation["input_ids"][observation["attention_mask"] > 0]]


def bound(env):
    env.bind_policy(lambda observation, action: -1.0)
    return env


# -- the rules ------------------------------------------------------------------------------------------------


def test_a_turn_ends_with_an_end_token_and_the_answer_follows_it():
    env = bound(make_game())
    observation, info = env.reset(seed=0, options={"prompt_id": 1})
    word = info["prompt"].split()[0]
    assert shown(observation) == [word, word]
    observation, reward, terminated, truncated, info = say(env, "a", word, "<eos>")
    assert shown(observation) == [word, word, "a", word, "<eos>", word]
    assert reward + env.kl_coef * info["kl"] == pytest.approx(1.0)
    assert (terminated, truncated) == (False, False)
    assert (info["turn"], info["game_text"], info["turn_reward"]) == (0, word, 1.0)
    assert env.written_by_policy[-6:].tolist() == [False, False, True, True, True, False]
    assert not env.written_by_policy[:-6].any()


def test_a_turn_ends_at_its_budget_and_the_rewards_land_on_its_last_token_only():
    env = bound(make_game(kl_coef=0.0, max_new_tokens=3))
    _, info = env.reset(seed=0)
    word = info["prompt"].split()[0]
    other = "a" if word != "a" else "b"
    rewards = [say(env, word)[1] for _ in range(2)]
    assert rewards == [0.0, 0.0]
    _, reward, *_, info = say(env, other)
    assert reward == 2.0 and info["turn"] == 0


def test_the_game_gets_what_was_written_without_the_end_token():
    heard = []

    class Listener(Copycat):
        def step(self, text):
            heard.append(text)
            return super().step(text)

    env = bound(make_game(game=Listener, max_new_tokens=3))
    env.reset(seed=0)
    say(env, "a", "b", "<eos>")
    say(env, "c", "d", "e")
    assert heard == ["a b", "c d e"]


def test_a_stop_string_ends_a_turn_and_stays_in_it():
    heard = []

    class Listener(Copycat):
        def step(self, text):
            heard.append(text)
            return super().step(text)

    env = bound(make_game(game=Listener, stop=["b c", "i"], max_new_tokens=10))
    env.reset(seed=0)
    assert "turn" not in say(env, "a", "b")[-1]
    assert say(env, "c")[-1]["turn"] == 0
    assert say(env, "i")[-1]["turn"] == 1
    assert heard == ["a b c", "i"]


@pytest.mark.parametrize(
    ("kwargs", "reason", "turns"),
    [
        ({"game_kwargs": {"rounds": 2}}, "game", 2),
        ({"game_kwargs": {"rounds": 9}, "max_turns": 3}, "turns", 3),
        ({"game_kwargs": {"rounds": 9}, "max_episode_tokens": 6, "max_turns": 9}, "length", 3),
        # 2 words, then 3 turns of 2 tokens and an answer of one: 11, and another turn of 4 needs 15.
        ({"game_kwargs": {"rounds": 9}, "max_turns": 9, "max_length": 14}, "context", 3),
    ],
)
def test_an_episode_ends_with_the_game_at_the_last_turn_or_when_another_has_no_room(kwargs, reason, turns):
    env = bound(make_game(**kwargs))
    env.reset(seed=0)
    terminated, had = False, 0
    while not terminated:
        _, _, terminated, truncated, info = say(env, "a", "<eos>")
        had += 1
    assert (info["stop_reason"], had, info["turns"], truncated) == (reason, turns, turns, False)
    assert info["response_length"] == 2 * turns
    with pytest.raises(gym.error.ResetNeeded):
        env.step(3)


def test_only_the_games_own_time_limit_is_a_truncation():
    env = bound(make_game(game=Wild, game_kwargs={"ends": 0.0, "limits": 1.0}))
    env.reset(seed=0)
    *_, terminated, truncated, info = say(env, "a", "<eos>")
    assert terminated is False and truncated is True and info["stop_reason"] == "game"
    envs = make_game(2, Wild, game_kwargs={"ends": 0.0, "limits": 1.0})
    envs.bind_policy(lambda observations, actions: np.zeros(2))
    envs.reset(seed=0)
    _, _, terminated, truncated, infos = envs.step(np.array([EOS, 3]))
    assert terminated.tolist() == [False, False] and truncated.tolist() == [True, False]
    assert infos["final_info"]["stop_reason"][0] == "game" and infos["final_info"]["turn"][0] == 0
    assert "turn" not in infos  # the other slot goes on writing


def test_score_is_the_sum_of_the_games_rewards_and_response_the_talk():
    env = bound(make_game(game_kwargs={"rounds": 2}))
    _, info = env.reset(seed=0)
    word = info["prompt"].split()[0]
    say(env, word, "<eos>")
    info = say(env, word, word, "<eos>")[-1]
    assert info["score"] == 3.0
    assert info["response"] == f"{word}\n{word}\n{word} {word}"


def test_a_start_is_a_seed_and_a_row():
    rows = [{"word": "d"}, {"word": "e"}, {"word": None}]
    env = bound(make_game(rows=rows, num_seeds=5))
    assert env.num_prompts == 15
    assert [env.reset(options={"prompt_id": k})[1]["prompt"] for k in (0, 1, 3)] == ["d d", "e e", "d d"]
    drawn = {env.reset(options={"prompt_id": 2 + 3 * seed})[1]["prompt"] for seed in range(5)}
    assert len(drawn) > 1  # the third row names no word, so the seed draws one
    for bad in (-1, 15):
        with pytest.raises(ValueError, match=r"prompt_id must be an integer in \[0, 14\]"):
            env.reset(options={"prompt_id": bad})


def test_a_row_may_not_be_called_seed():
    with pytest.raises(ValueError, match="'seed'"):
        make_game(rows=[{"seed": 3}])


@pytest.mark.parametrize(
    "name", ["tests.games:Copycat", "tests/games.py:Copycat", "tests.games:Copycat(rounds=2)"]
)
def test_a_game_is_found_by_its_name(name):
    env = bound(gym.make("TextGame-v0", game=name, model=make_lm()).unwrapped)
    prompt = env.reset(seed=0)[1]["prompt"]
    assert prompt == bound(make_game()).reset(seed=0)[1]["prompt"]


def test_what_is_no_game_is_refused_when_the_env_is_made():
    with pytest.raises(TypeError, match=r"makes a dict, which has no reset and no step"):
        make_game(game=dict)
    with pytest.raises(ImportError, match="Did you mean 'Copycat'"):
        make_game(game="tests.games:Copycats")
    with pytest.raises(ValueError, match="names no game"):
        make_game(game="no game")


# -- two ways, one environment --------------------------------------------------------------------------------

worlds = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["llama", "gpt2", "mistral"]),
        "seed": st.integers(0, 1),
        "temperature": st.sampled_from([0.6, 1.0, 1.7]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "kl_coef": st.sampled_from([0.0, 0.05, 1.0]),
        "max_new_tokens": st.integers(1, 6),
        "max_turns": st.integers(1, 6),
        "max_length": st.integers(16, CONTEXT),
        "stop": st.sampled_from([None, "c", ["a b", "d"]]),
        "max_episode_tokens": st.sampled_from([None, 5, 9]),
        "more_eos": st.booleans(),
        "longest": st.integers(0, 7),
    }
)


def build(world, num_envs=None):
    """An env, and a policy that is not its reference."""
    lm, actor = (make_lm(world["kind"], world["seed"] + shift, world["temperature"]) for shift in (0, 10))
    if world["more_eos"]:
        lm.eos_ids = actor.eos_ids = np.array([EOS, 3])
    names = (
        "kl_estimator",
        "kl_coef",
        "max_new_tokens",
        "max_turns",
        "max_length",
        "stop",
        "max_episode_tokens",
    )
    kwargs = {name: world[name] for name in names}
    env = make_game(num_envs, Wild, lm, game_kwargs={"longest": world["longest"]}, **kwargs)
    space = env.observation_space, env.action_space
    if num_envs is not None:
        space = env.single_observation_space, env.single_action_space
    policy = CausalLMPolicy(*space, critic=None, model=actor)
    policy.generator = torch.Generator().manual_seed(world["seed"])
    return env, policy


def assert_end(episodes, i, info):
    assert info["score"] == pytest.approx(episodes.score[i], abs=TOLERANCE)
    assert info["kl_sum"] == pytest.approx(episodes.kl[i].sum(), abs=TOLERANCE)
    for name, column in (
        ("response", episodes.responses),
        ("stop_reason", episodes.stop_reason),
        ("turns", episodes.turns),
        ("response_length", episodes.mask.sum(1)),
    ):
        assert info[name] == column[i]


@settings(max_examples=14, deadline=None, derandomize=True)
@given(worlds)
def test_stepping_the_tokens_of_the_fused_way_gives_its_rewards(world):
    env, policy = build(world)
    prompt_ids = np.arange(3)
    with policy.talking(env.max_length, env.stop):
        episodes = env.run_episodes(lambda prompts: policy.generate(prompts, env.max_new_tokens), prompt_ids)
    env.bind_policy(
        lambda observation, action: policy.log_prob(
            {name: value[None] for name, value in observation.items()}, np.array([action])
        )[0]
    )
    whole = episodes.sequences
    written_by = whole.split(whole.written_by)
    for i, prompt_id in enumerate(prompt_ids):
        observation, info = env.reset(options={"prompt_id": int(prompt_id)})
        assert info["prompt"] == episodes.prompts[i]
        observations, actions, rewards = [], episodes.tokens[i][episodes.mask[i]], []
        for t, action in enumerate(actions):
            observations.append({name: value[None] for name, value in observation.items()})
            observation, reward, terminated, truncated, info = env.step(int(action))
            rewards.append(reward)
            assert (terminated or truncated) == (t + 1 == len(actions))
            assert reward == pytest.approx(episodes.rewards[i, t], abs=TOLERANCE)
            assert info["ref_logprob"] == pytest.approx(episodes.ref_logprob[i, t], abs=TOLERANCE)
            assert info["kl"] == pytest.approx(episodes.kl[i, t], abs=TOLERANCE)
        assert truncated == episodes.truncated[i]
        assert_end(episodes, i, info)
        # What the game said is the same, token for token, and so is who wrote what.
        tokens = observation["input_ids"][observation["attention_mask"] > 0]
        assert np.array_equal(tokens, whole[i].tokens)
        mine = env.written_by_policy[observation["attention_mask"] > 0]
        assert np.array_equal(mine, written_by[i] == POLICY)
        # What a policy makes of the steps is what the fused way hands it.
        stacked = policy.stack(observations, actions[None], np.ones((1, len(actions)), dtype=bool))[
            "sequences"
        ]
        assert np.array_equal(stacked.tokens, whole[i].tokens[: len(stacked.tokens)])
        assert np.array_equal(stacked.written_by, written_by[i][: len(stacked.tokens)])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(worlds)
def test_the_vector_env_steps_as_the_fused_way_says(world):
    """Slots end at their own times and restart at once; every finished episode is then run fused."""
    env, policy = build(world, num_envs=3)
    env.bind_policy(policy.log_prob)
    observation, infos = env.reset(seed=world["seed"])
    starts = infos["prompt_id"].copy()
    running, finished = [([], []) for _ in range(3)], []
    for _ in range(20):
        actions, *_ = policy.act(observation)
        observation, rewards, terminated, truncated, infos = env.step(actions)
        done = terminated | truncated
        for slot in range(3):
            running[slot][0].append(actions[slot])
            running[slot][1].append(rewards[slot])
            if done[slot]:
                end = {n: v[slot] for n, v in infos["final_info"].items() if not n.startswith("_")}
                finished.append((starts[slot], *running[slot], truncated[slot], end))
                running[slot], starts[slot] = ([], []), infos["prompt_id"][slot]
    if not finished:
        return
    for start, tokens, rewards, cut, end in finished:
        left, before = list(tokens), []

        def replay(contexts, left=left, before=before):
            turn = [left.pop(0)]
            while not env.dynamics.turn_is_over(np.array(turn), len(before)):
                turn.append(left.pop(0))
            before += turn
            log_probs = policy.lm.response_log_probs(contexts, [np.array(turn)])
            return [np.array(turn)], [log_probs[0]]

        episodes = env.run_episodes(replay, [start])
        assert episodes.rewards[0] == pytest.approx(rewards, abs=TOLERANCE)
        assert episodes.truncated[0] == cut
        assert_end(episodes, 0, end)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "mistral-window-12"])
def test_a_cache_that_is_kept_across_turns_says_what_one_pass_over_the_whole_says(kind, shares, monkeypatch):
    if shares:
        monkeypatch.setattr(decoding, "SHARED_TOKENS", 1)
    env = make_game(game=Wild, lm=make_lm(kind), max_turns=6, max_length=CONTEXT)
    policy = CausalLMPolicy(env.observation_space, env.action_space, critic=None, model=make_lm(kind, seed=1))
    policy.generator = torch.Generator().manual_seed(3)
    policy.lm.check()
    read = []
    prefill = decoding.SlotDecoder.prefill
    monkeypatch.setattr(
        decoding.SlotDecoder,
        "prefill",
        lambda self, slots, rows: read.append(len(rows)) or prefill(self, slots, rows),
    )
    with policy.talking(env.max_length):
        episodes = env.run_episodes(lambda x: policy.generate(x, env.max_new_tokens), np.arange(12) % 4)
    assert read == [4]  # the four openings, and nothing twice
    assert episodes.turns.max() >= 4
    sequences = episodes.sequences
    again = policy.lm.log_probs(sequences)
    assert sequences.log_probs[sequences.policy] == pytest.approx(again, abs=TOLERANCE)


# -- agents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", [REINFORCE, GRPO, PPO])
def test_agents_learn_from_games_as_they_are(agent):
    kwargs = {"group_size": 4} if agent is GRPO else {}
    learner = agent("auto", make_game(num_seeds=3), n_episodes=8, seed=0, learning_rate=1e-3, **kwargs)
    learner.learn(150)
    assert learner.latest["rollout/ep_len_mean"] > 1 and learner.latest["objective/scores"] >= 0


def test_a_rollouts_mask_holds_the_policys_tokens_only_and_its_ratio_is_one():
    agent = PPO("auto", make_game(game=Wild), n_episodes=16, seed=0, batch_size=None)
    agent.learn(1)
    rollout = agent.collect()
    sequences = rollout.inputs["sequences"]
    assert {PROMPT, POLICY, ENVIRONMENT} == set(sequences.written_by.tolist())
    assert np.array_equal(rollout.actions.numpy()[rollout.mask.numpy()], sequences.actions)
    again = agent.policy.evaluate(rollout)
    assert again.log_probs.detach().numpy() == pytest.approx(rollout.log_probs.numpy(), abs=1e-5)


def test_groups_share_the_games_start_in_both_ways():
    agent = GRPO("auto", make_game(), n_episodes=8, group_size=4, seed=0)
    agent.learn(1)
    prompts = agent.collect().inputs["sequences"].prompts
    assert all(np.array_equal(prompts[0], p) for p in prompts[:4])
    assert all(np.array_equal(prompts[4], p) for p in prompts[4:])
    stepped = GRPO(
        "auto", gym.wrappers.TransformReward(make_game(), float), n_episodes=8, group_size=4, seed=0
    )
    assert stepped.text_env is None
    stepped.learn(1)
    prompts = stepped.collect().inputs["sequences"].prompts
    assert all(np.array_equal(prompts[0], p) for p in prompts[:4])


def test_the_command_line_trains_on_a_game(tmp_path):
    from agents.cli import main

    make_lm().model.save_pretrained(tmp_path / "model")
    make_lm().tokenizer.save_pretrained(tmp_path / "model")
    line = f"--game tests.games:Copycat --model {tmp_path / 'model'} --agent grpo --total-timesteps 100 --max-turns 2"
    line += f" --max-new-tokens 4 --n-episodes 8 --group-size 4 --no-progress --run-dir {tmp_path / 'run'}"
    main(["train", *line.split()])
    assert (tmp_path / "run" / "final").is_dir()
