"""TextRLHF-v0 as its contract has it: observations, infos, ends of episodes, prompts, who acts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import textrl_env  # noqa: F401  registers the ids
from tests.tiny import EOS, PROMPTS, WORDS, count_a, id_sum, make_env, make_lm, make_model, make_tokenizer
from textrl_env.envs.text_rlhf import TextRLHFEnv

UNIFORM = -np.log(len(WORDS))
A, B = WORDS.index("a"), WORDS.index("b")


def bound(num_envs=None, lm=None, **kwargs):
    """An env whose acting policy is said to be uniform, so that nothing warns."""
    env = make_env(num_envs, lm, **kwargs)
    if num_envs is None:
        env.bind_policy(lambda observation, action: UNIFORM)
    else:
        env.bind_policy(lambda observations, actions: np.full(len(actions), UNIFORM))
    return env


def play(env, actions, **reset):
    seen = [env.reset(**reset)]
    for action in actions:
        seen.append(env.step(action))
    return seen


# Observations


def test_the_observation_is_what_a_transformers_model_takes(lm):
    env = bound(lm=lm)
    observation, _ = env.reset(seed=0, options={"prompt_id": 2})
    tokens = [*env.dynamics.prompt_tokens[2]]
    for action in (A, B, A):
        ids = torch.from_numpy(observation["input_ids"])[None]
        mask = torch.from_numpy(observation["attention_mask"])[None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            left_padded = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1]
            plain = lm.model(torch.tensor([tokens])).logits[0, -1]
        assert left_padded == pytest.approx(plain, abs=1e-4)
        observation, *_ = env.step(action)
        tokens.append(action)
    assert observation["input_ids"][observation["attention_mask"] == 1].tolist() == tokens
    assert observation["attention_mask"].tolist() == sorted(observation["attention_mask"].tolist())


def test_observations_are_fixed_shape_integers_inside_their_space(lm_pad_is_eos, lm_wide):
    for lm in (make_lm(), lm_pad_is_eos, lm_wide, make_lm(pad=None)):
        env = bound(lm=lm)
        shape = (max(len(p.split()) for p in PROMPTS) + 6,)
        for observation, *_ in play(env, [A, B, EOS], seed=1):
            assert env.observation_space.contains(observation)
            for name in ("input_ids", "attention_mask"):
                assert observation[name].shape == shape and observation[name].dtype == np.int64


def test_the_action_space_is_the_vocabulary_also_where_the_logits_are_wider(lm_wide):
    env = make_env(lm=lm_wide)
    assert env.action_space == gym.spaces.Discrete(len(WORDS))
    assert lm_wide.model.config.vocab_size == len(WORDS) + 7


def test_a_written_pad_or_end_token_in_the_prompt_is_still_attended(lm_pad_is_eos):
    env = bound(lm=lm_pad_is_eos)
    observation, _ = env.reset(options={"prompt": "a <eos> b"})
    assert observation["attention_mask"].sum() == 3
    env = bound()
    env.reset(options={"prompt": "a"})
    observation, *_ = env.step(WORDS.index("<pad>"))
    assert observation["attention_mask"].sum() == 2


def test_gymnasiums_and_stable_baselines3s_checkers_find_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # No spec: the env was built directly, not by gym.make.
        warnings.filterwarnings("ignore", message=".*spec.*")
        check_env(bound(), skip_render_check=True)
        sb3_check_env(bound())


# Rewards and infos


def test_infos_hold_the_contracts_keys_with_python_types():
    env = bound()
    (_, at_reset), (_, reward, _, _, running), (_, _, terminated, truncated, last) = play(
        env, [A, EOS], seed=0
    )
    assert {k: type(v) for k, v in at_reset.items()} == {"prompt": str, "prompt_id": int}
    assert {k: type(v) for k, v in running.items()} == {"ref_logprob": float, "kl": float}
    assert {k: type(v) for k, v in last.items()} == {
        "ref_logprob": float,
        "kl": float,
        "response": str,
        "score": float,
        "kl_sum": float,
        "response_length": int,
        "stop_reason": str,
    }
    assert type(reward) is float and terminated is True and truncated is False
    assert at_reset["prompt"] == PROMPTS[at_reset["prompt_id"]]
    assert last["response"] == "a" and last["response_length"] == 2 and last["stop_reason"] == "eos"
    assert last["kl_sum"] == pytest.approx(running["kl"] + last["kl"])


def test_the_score_arrives_with_the_last_action_and_the_kl_with_every_one():
    env = bound(kl_coef=0.5)
    _, *steps = play(env, [A, A, B, EOS], seed=0)
    for _, reward, terminated, _, info in steps[:-1]:
        assert reward == pytest.approx(-0.5 * info["kl"]) and not terminated
    *_, (_, reward, _, _, info) = steps
    assert info["score"] == 2.0
    assert reward == pytest.approx(2.0 - 0.5 * info["kl"])


def test_at_the_budget_the_score_belongs_to_the_last_token_and_the_episode_is_terminated():
    env = bound(max_new_tokens=3)
    *_, (_, reward, terminated, truncated, info) = play(env, [A, A, A], seed=0)
    assert terminated is True and truncated is False
    assert info["stop_reason"] == "length" and info["response_length"] == 3 and info["score"] == 3.0
    assert reward == pytest.approx(3.0 - env.kl_coef * info["kl"])


def test_end_tokens_at_the_budget_count_as_an_end():
    env = bound(max_new_tokens=2, missing_eos_penalty=1.0)
    *_, (*_, info) = play(env, [A, EOS], seed=0)
    assert info["stop_reason"] == "eos" and info["score"] == 1.0


def test_the_missing_eos_penalty_is_taken_off_only_where_eos_is_missing():
    env = bound(max_new_tokens=2, missing_eos_penalty=0.25)
    assert play(env, [A, A], seed=0)[-1][-1]["score"] == 1.75
    assert play(env, [A, EOS], seed=0)[-1][-1]["score"] == 1.0


def test_every_listed_end_token_ends_an_episode():
    model = copy.deepcopy(make_model())
    model.generation_config.eos_token_id = [5, 6]
    env = TextRLHFEnv(model=model, tokenizer=make_tokenizer(), reward=count_a, prompts=PROMPTS)
    env.bind_policy(lambda observation, action: UNIFORM)
    for end in (EOS, 5, 6):
        *_, (*_, terminated, _, info) = play(env, [A, end], seed=0)
        assert terminated and info["stop_reason"] == "eos" and info["response"] == "a"


def test_rewards_are_scored_from_token_ids_that_were_never_re_tokenised():
    seen = {}

    def reward(prompts, completions, prompt_ids, completion_ids):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, prompt_ids=prompt_ids)
        return [0.0]

    env = bound(reward=reward)
    # Decoding drops the special tokens; the ids still know that they were written.
    play(env, [A, WORDS.index("<unk>"), WORDS.index("<pad>"), B, EOS], options={"prompt_id": 1})
    assert seen["ids"] == [[A, 1, 2, B, EOS]]
    assert seen["prompt_ids"] == [env.dynamics.prompt_tokens[1].tolist()]
    assert seen["prompts"] == ["b c"] and seen["completions"] == ["a b"]


def test_columns_of_the_prompts_reach_the_reward_as_keywords():
    prompts = [{"prompt": "a", "answer": "b"}, {"prompt": "b", "answer": "c"}]

    def right(prompts, completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    env = bound(prompts=prompts, reward=right)
    for prompt_id, token, score in ((0, "b", 1.0), (0, "c", 0.0), (1, "c", 1.0)):
        *_, (*_, info) = play(env, [WORDS.index(token), EOS], options={"prompt_id": prompt_id})
        assert info["score"] == score
    episodes = env.run_episodes(
        lambda prompts: ([np.array([B, EOS])] * 2, [np.zeros(2)] * 2), np.array([0, 1])
    )
    assert episodes.score.tolist() == [1.0, 0.0]


def test_a_list_of_rewards_is_summed_with_its_weights_and_each_is_named():
    env = bound(reward=[(count_a, 2.0), (id_sum, 0.5)])
    *_, (*_, info) = play(env, [A, A, EOS], options={"prompt_id": 0})
    assert info["score/count_a"] == 2.0
    assert info["score"] == pytest.approx(2.0 * 2.0 + 0.5 * info["score/id_sum"])


def test_a_gold_judge_is_shown_and_never_paid():
    def gold(prompts, completions):
        return [100.0] * len(prompts)

    env = bound(gold=gold, kl_coef=0.0)
    *_, (_, reward, _, _, info) = play(env, [A, EOS], seed=0)
    assert info["score/gold"] == 100.0 and reward == info["score"] == 1.0
    *_, (*_, info) = play(env, [A, EOS], options={"prompt": "g h"})
    assert np.isnan(info["score/gold"])  # it may need columns that a prompt of one's own has not


# Who acts


def test_unbound_the_acting_policy_is_uniform_with_exactly_one_warning():
    env = make_env(kl_coef=0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for _, reward, _, _, info in play(env, [A, B, A], seed=0)[1:]:
                assert info["kl"] == pytest.approx(UNIFORM - info["ref_logprob"])
                assert reward == pytest.approx(-0.3 * info["kl"])
    assert [str(w.message).count("bind_policy") for w in caught] == [1]


def test_a_bound_policy_is_asked_with_the_observation_it_acted_on_and_can_be_unbound():
    env = make_env()
    asked = []

    def log_prob(observation, action):
        asked.append((observation, action))
        return -0.5

    env.bind_policy(log_prob)
    (before, _), (_, _, _, _, info) = play(env, [A], seed=0)
    assert info["kl"] == pytest.approx(-0.5 - info["ref_logprob"])
    ((observation, action),) = asked
    assert action == A and type(action) is int
    assert all((observation[name] == before[name]).all() for name in before)
    env.bind_policy(None)
    with pytest.warns(UserWarning, match="bind_policy"):
        *_, (*_, info) = play(env, [A], seed=0)
    assert info["kl"] == pytest.approx(UNIFORM - info["ref_logprob"])


def test_a_policy_that_is_its_own_reference_pays_no_kl():
    for estimator in ("k1", "k2", "k3"):
        env = make_env(kl_estimator=estimator, kl_coef=1.0)
        lm = env.lm

        def log_prob(observation, action, lm=lm):
            ids = observation["input_ids"][observation["attention_mask"] == 1]
            with torch.no_grad():
                return lm.model(torch.from_numpy(ids)[None]).logits[0, -1].log_softmax(-1)[action].item()

        env.bind_policy(log_prob)
        for *_, info in play(env, [A, B, A, EOS], seed=0)[1:]:
            assert info["kl"] == pytest.approx(0.0, abs=1e-5)


def test_the_vector_env_takes_one_log_prob_for_each_slot_and_refuses_another_shape():
    envs = make_env(3)
    envs.bind_policy(lambda observations, actions: -actions.astype(float))
    envs.reset(seed=0)
    *_, infos = envs.step(np.array([A, B, A]))
    assert infos["kl"] == pytest.approx(-np.array([A, B, A]) - infos["ref_logprob"])
    envs.bind_policy(lambda observations, actions: -1.0)
    with pytest.raises(ValueError, match=r"shape \(\), expected \(3,\)"):
        envs.step(np.array([A, B, A]))


def test_the_kl_coefficient_can_be_changed_between_episodes():
    env = bound(kl_coef=0.0)
    assert play(env, [A], seed=0)[1][1] == 0.0
    env.kl_coef = 2.0
    _, (_, reward, _, _, info) = play(env, [A], seed=0)
    assert reward == pytest.approx(-2.0 * info["kl"])


# Prompts


def test_an_episode_starts_from_a_given_prompt_id_or_text():
    env = bound()
    _, info = env.reset(options={"prompt_id": 3})
    assert info == {"prompt": PROMPTS[3], "prompt_id": 3}
    observation, info = env.reset(options={"prompt": "g h"})
    assert info == {"prompt": "g h", "prompt_id": -1}
    written = observation["input_ids"][observation["attention_mask"] == 1]
    assert written.tolist() == [WORDS.index("g"), WORDS.index("h")]


def test_the_vector_env_takes_one_prompt_for_all_or_one_for_each_slot():
    envs = bound(3)
    assert envs.reset(options={"prompt_id": 1})[1]["prompt_id"].tolist() == [1, 1, 1]
    assert envs.reset(options={"prompt_id": [2, 0, 2]})[1]["prompt_id"].tolist() == [2, 0, 2]
    infos = envs.reset(seed=0, options={"prompt": ["g", None, "h i"]})[1]
    assert infos["prompt"][0] == "g" and infos["prompt"][2] == "h i"
    assert infos["prompt_id"].tolist()[::2] == [-1, -1] and infos["prompt_id"][1] >= 0
    assert infos["_prompt"].all()


def test_one_seed_draws_one_sequence_of_prompts_and_all_of_them_come_up():
    env = bound()

    def draw():
        return [env.reset(seed=4)[1]["prompt_id"], *(env.reset()[1]["prompt_id"] for _ in range(30))]

    first = draw()
    assert first == draw() and set(first) == set(range(len(PROMPTS)))


def test_prompts_come_from_lists_files_and_datasets_alike(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    rows = [{"prompt": p, "n": i} for i, p in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (
        PROMPTS,
        tmp_path / "prompts.txt",
        str(tmp_path / "prompts.jsonl"),
        datasets.Dataset.from_list(rows),
    ):
        assert bound(prompts=source).reset(options={"prompt_id": 2})[1]["prompt"] == PROMPTS[2]


def test_message_lists_go_through_the_chat_template():
    lm = make_lm()
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}i{% endif %}"
    )
    env = bound(lm=lm, prompts=[[{"role": "user", "content": "a b"}]])
    assert env.dynamics.prompt_tokens[0].tolist() == [A, B, WORDS.index("i")]


# The vector env


def test_a_finished_slot_takes_the_next_prompt_at_once_and_its_end_is_in_final_info():
    envs = bound(3, max_new_tokens=2)
    envs.reset(seed=0, options={"prompt_id": [0, 1, 2]})
    observation, rewards, terminated, truncated, infos = envs.step(np.array([A, EOS, A]))
    assert terminated.tolist() == [False, True, False] and not truncated.any()
    assert infos["_final_info"].tolist() == infos["_final_obs"].tolist() == [False, True, False]
    assert infos["_kl"].tolist() == [True, False, True] and infos["_prompt_id"].tolist() == [
        False,
        True,
        False,
    ]
    final, last = infos["final_info"], infos["final_obs"][1]
    assert final["stop_reason"][1] == "eos" and final["response"][1] == ""
    assert final["_response"].tolist() == [False, True, False]
    assert last["input_ids"][-3:].tolist() == [B, WORDS.index("c"), EOS]
    started = envs.dynamics.prompt_tokens[infos["prompt_id"][1]]
    assert observation["input_ids"][1][observation["attention_mask"][1] == 1].tolist() == started.tolist()
    assert rewards[1] == pytest.approx(final["score"][1] - envs.kl_coef * final["kl"][1])
    *_, terminated, _, infos = envs.step(np.array([A, A, A]))
    assert terminated.tolist() == [True, False, True]
    assert infos["final_info"]["stop_reason"][[0, 2]].tolist() == ["length", "length"]


def test_reset_mask_restarts_only_the_named_slots_under_disabled_autoreset():
    envs = bound(3, autoreset_mode=AutoresetMode.DISABLED)
    before, _ = envs.reset(seed=0, options={"prompt_id": 1})
    envs.step(np.array([A, EOS, B]))
    mask = np.array([False, True, False])
    observation, infos = envs.reset(options={"reset_mask": mask, "prompt_id": [0, 1, 3]})
    assert infos["prompt_id"][1] == 1 and infos["_prompt_id"].tolist() == mask.tolist()
    assert (observation["input_ids"][1] == before["input_ids"][1]).all()
    for slot, token in ((0, A), (2, B)):
        assert observation["input_ids"][slot, -3:].tolist() == [B, WORDS.index("c"), token]
    _, rewards, *_ = envs.step(np.array([A, A, A]))
    # The restarted slot is scored as a first token, the others as second ones.
    single = bound()
    expected = [play(single, row, options={"prompt_id": 1})[-1][1] for row in ([A, A], [A], [B, A])]
    assert rewards == pytest.approx(expected, abs=1e-5)


def test_record_episode_statistics_works_on_both():
    env = gym.wrappers.RecordEpisodeStatistics(bound())
    seen = play(env, [A, A, EOS], seed=0)
    assert seen[-1][-1]["episode"]["r"] == pytest.approx(sum(step[1] for step in seen[1:]))
    assert seen[-1][-1]["episode"]["l"] == 3
    envs = gym.wrappers.vector.RecordEpisodeStatistics(bound(2))
    envs.reset(seed=0)
    _, first, *_ = envs.step(np.array([A, A]))
    _, second, *_, infos = envs.step(np.array([EOS, A]))
    assert infos["episode"]["r"][0] == pytest.approx(first[0] + second[0])
    assert infos["_episode"].tolist() == [True, False]


# The whole of it


def test_render_shows_the_prompt_and_what_has_been_written():
    env = make_env(render_mode="ansi")
    env.bind_policy(lambda observation, action: UNIFORM)
    play(env, [A, B], options={"prompt_id": 1})
    assert "b c" in env.render() and "a b" in env.render()


def test_whole_episodes_are_reported_as_steps_are():
    env = make_env()
    responses = [np.array([A, EOS]), np.array([A, A, B, A, A, A])]
    episodes = env.run_episodes(lambda prompts: (responses, [np.zeros(2), np.zeros(6)]), np.array([0, 3]))
    assert len(episodes) == 2
    assert episodes.mask.sum(1).tolist() == [2, 6]
    assert episodes.stop_reason == ["eos", "length"]
    assert episodes.responses == ["a", "a a b a a a"]
    assert episodes.prompts == [PROMPTS[0], PROMPTS[3]]
    assert episodes.score.tolist() == [1.0, 5.0]
    assert not (episodes.tokens * ~episodes.mask).any()


@pytest.mark.parametrize(
    ("responses", "log_probs", "message"),
    [
        ([[A]], [[0.0]], "2 prompts and returned 1 responses"),
        ([[A], [A] * 7], [[0.0], [0.0] * 7], "7 tokens .* max_new_tokens=6"),
        ([[A], []], [[0.0], []], "0 tokens"),
        ([[A], [A, B]], [[0.0], [0.0]], "2 tokens and 1 log-probabilities"),
    ],
)
def test_a_generator_that_breaks_its_contract_is_told_how(responses, log_probs, message):
    env = make_env()
    made = [np.array(r, dtype=np.int64) for r in responses], [np.array(p) for p in log_probs]
    with pytest.raises(ValueError, match=message):
        env.run_episodes(lambda prompts: made, np.array([0, 1]))


def test_prompts_are_drawn_from_the_seed_in_the_fused_way_too():
    env, again = make_env(4), make_env(4)
    for each in (env, again):
        each.reset(seed=3)
    assert env.draw_prompts(10).tolist() == again.draw_prompts(10).tolist()
    assert set(env.draw_prompts(60)) == set(range(len(PROMPTS)))


def test_the_env_shares_the_models_weights_when_gymnasium_copies_its_arguments():
    lm = make_lm()
    env = gym.make("TextRLHF-v0", model=lm, reward=count_a, prompts=PROMPTS)
    assert env.unwrapped.lm is lm
    assert copy.deepcopy(env.spec).kwargs["model"] is lm


def test_a_folder_is_loaded_with_its_tokenizer(model_folder):
    env = gym.make("TextRLHF-v0", model=str(model_folder), reward=count_a, prompts=PROMPTS, device="cpu")
    env.unwrapped.bind_policy(lambda observation, action: UNIFORM)
    ours = bound(max_new_tokens=24)
    actions = [A, B, A, EOS]
    for theirs, mine in zip(play(env, actions, seed=1)[1:], play(ours, actions, seed=1)[1:], strict=True):
        # Loaded weights lie at other addresses than live ones, where a matrix product may round otherwise.
        assert theirs[1] == pytest.approx(mine[1], abs=1e-5)
    assert gym.make(env.spec).unwrapped.lm.vocab_size == len(WORDS)


def test_a_model_without_reward_or_prompts_says_that_the_embedded_ones_are_used():
    with pytest.warns(UserWarning, match="without prompts: the embedded world's"):
        make_env(prompts=None, max_prompt_length=30, max_new_tokens=2)


def test_the_defaults_work_offline_and_their_spec_is_json():
    env = gym.make("TextRLHF-v0")
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    rows = []
    for each in (env, again):
        each.unwrapped.bind_policy(lambda observation, action: -1.0)
        first = each.reset(seed=0)[1]
        rows.append((first, [each.step(token)[1] for token in (5, 6, 7)]))
    assert rows[0] == rows[1]
    assert env.unwrapped.num_prompts > 1


def test_the_vector_entry_point_is_native_and_steps_the_defaults_together():
    envs = gym.make_vec("TextRLHF-v0", num_envs=4)
    assert type(envs.unwrapped).__name__ == "TextRLHFVectorEnv"
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    envs.unwrapped.bind_policy(lambda observations, actions: np.full(len(actions), -1.0))
    observation, _ = envs.reset(seed=0)
    assert observation["input_ids"].shape[0] == 4
    assert envs.step(envs.action_space.sample())[1].shape == (4,)


def test_gymnasiums_form_with_a_module_needs_no_import():
    code = (
        "import gymnasium as gym, sys, warnings; warnings.simplefilter('error');"
        "env = gym.make('textrl_env:TextRLHF-v0'); _, info = env.reset(seed=0);"
        "print(info['prompt_id'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 0


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import sys, gymnasium, textrl_env; assert 'TextRLHF-v0' in gymnasium.registry;"
        "assert not {'torch', 'transformers', 'stable_baselines3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
