"""What every registered environment promises, and what each of the small ones is."""

from __future__ import annotations

import copy
import difflib
import json
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import textrl_env
from tests.vector_checker import NUM_ENVS, assert_same, bind_uniform, check_against_sync, make_native, play

ENV_IDS = list(textrl_env.ENV_IDS)

#: Every id as it comes, and the variants that draw more random numbers or end in other ways.
VARIANTS = [
    *((env_id, {}) for env_id in ENV_IDS),
    ("ToyBandit-v0", {"contexts": 3}),
    ("LineWorld-v0", {"start": None}),
    ("GridWorld-v0", {"slippery": True}),
    ("TokenTree-v0", {"eos": False, "kl_estimator": "k3", "num_prompts": 3}),
]
MODES = list(AutoresetMode)

every_id = pytest.mark.parametrize("env_id", ENV_IDS)
every_variant = pytest.mark.parametrize(
    ("env_id", "kwargs"), VARIANTS, ids=[" ".join([i, *map(str, k)]) for i, k in VARIANTS]
)


def make(env_id: str, **kwargs) -> gym.Env:
    return bind_uniform(gym.make(env_id, **kwargs))


def trajectory(env: gym.Env, seed: int, steps: int = 60) -> list:
    rng = np.random.default_rng(seed)
    seen = [env.reset(seed=seed)]
    for _ in range(steps):
        seen.append(env.step(int(rng.integers(env.action_space.n))))
        if seen[-1][2] or seen[-1][3]:
            seen.append(env.reset())
    return seen


#: A start state of each, other than the first where there are several.
STARTS = {"ToyBandit-v0": 0, "LineWorld-v0": 3, "GridWorld-v0": 21, "TokenTree-v0": 1} | {
    "TextRLHF-v0": 1,
    "TextGame-v0": 5,
}
#: How far floats may differ with the size of the batch: not at all, but for a float32 language model.
TOLERANCE = {"TextRLHF-v0": 1e-4, "TextGame-v0": 1e-4}
STEPS = {"TextRLHF-v0": 60, "TextGame-v0": 30}
#: So that some episodes end within these steps.
SHORT = {"TextGame-v0": {"max_new_tokens": 6}}


# Every environment


@every_variant
@pytest.mark.parametrize("wrapped", [False, True], ids=["unwrapped", "wrapped"])
def test_gymnasium_check_env_passes_without_a_warning(env_id, kwargs, wrapped):
    env = make(env_id, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not wrapped:
            env = env.unwrapped
        else:
            # It says that the env is wrapped, which is what is being tried here.
            warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        check_env(env)


@every_variant
def test_stable_baselines3_check_env_passes_without_a_warning(env_id, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(make(env_id, **kwargs).unwrapped)


@every_variant
def test_one_seed_gives_one_trajectory_infos_included(env_id, kwargs):
    first, second = (trajectory(make(env_id, **kwargs), seed=3) for _ in range(2))
    assert_same(first, second, env_id)


@every_variant
def test_spec_survives_json(env_id, kwargs):
    spec = gym.make(env_id, **kwargs).spec
    again = gym.envs.registration.EnvSpec.from_json(json.dumps(json.loads(spec.to_json())))
    assert_same(trajectory(bind_uniform(gym.make(again)), 1), trajectory(make(env_id, **kwargs), 1), env_id)


@every_id
def test_an_unknown_keyword_is_refused_and_the_nearest_is_named(env_id):
    known = [name for name in gym.make(env_id).unwrapped.__signature__.parameters if name != "render_mode"]
    wrong = known[0] + "x"
    nearest = difflib.get_close_matches(wrong, known, n=1)[0]
    with pytest.raises(TypeError, match=f"{wrong}.*Did you mean '{nearest}'"):
        gym.make(env_id, **{wrong: 1})
    with pytest.raises(TypeError, match=f"{wrong}.*Did you mean '{nearest}'"):
        gym.make_vec(env_id, num_envs=2, **{wrong: 1})


@every_id
def test_an_unknown_reset_option_is_refused_and_the_nearest_is_named(env_id):
    env = gym.make(env_id)
    key = env.unwrapped.metadata["start_option"]
    with pytest.raises(ValueError, match=f"Did you mean '{key}'"):
        env.reset(options={key + "s": 0})


@every_id
@pytest.mark.parametrize("beyond", [-1, "n"])
def test_an_action_outside_the_space_is_refused(env_id, beyond):
    env = make(env_id).unwrapped
    env.reset(seed=0)
    action = int(env.action_space.n) if beyond == "n" else beyond
    with pytest.raises(ValueError, match="not in the action space"):
        env.step(action)
    envs = make_native(env_id)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="outside the action space"):
        envs.step(np.array([0] * (NUM_ENVS - 1) + [action]))
    with pytest.raises(ValueError, match="outside the action space"):
        envs.step(np.zeros(NUM_ENVS))  # floats
    with pytest.raises(ValueError, match="shape"):
        envs.step(np.zeros(NUM_ENVS + 1, dtype=np.int64))


@every_id
def test_step_before_reset_and_after_the_end_is_refused(env_id):
    env = make(env_id).unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    with pytest.raises(gym.error.ResetNeeded):
        make_native(env_id).step(np.zeros(NUM_ENVS, dtype=np.int64))
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    while not env.step(int(rng.integers(env.action_space.n)))[2]:
        pass
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)


@every_id
def test_the_docstring_is_a_documentation_page(env_id):
    page = type(gym.make(env_id).unwrapped).__doc__
    for heading in (
        "Description",
        "Action Space",
        "Observation Space",
        "Starting State",
        "Rewards",
        "Episode End",
        "Information",
        "Arguments",
        "References",
        "Version History",
    ):
        assert f"## {heading}" in page
    arguments = page.split("## Arguments")[1].split("## References")[0]
    for name in gym.make(env_id).unwrapped.__signature__.parameters:
        if name != "render_mode":
            assert f"``{name}``" in arguments


# The vector env against Gymnasium's own


@every_variant
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_native_vector_env_equals_sync_vector_env(env_id, kwargs, mode):
    steps, tolerance = STEPS.get(env_id, 300), TOLERANCE.get(env_id, 0.0)
    assert check_against_sync(env_id, mode, steps, tolerance, **kwargs, **SHORT.get(env_id, {})) > 0


@every_id
def test_same_step_is_the_default_autoreset(env_id):
    envs = gym.make_vec(env_id, num_envs=2)
    assert type(envs.unwrapped) is type(make_native(env_id).unwrapped)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


@every_id
def test_disabled_autoreset_refuses_to_step_a_finished_slot_and_names_it(env_id):
    envs = make_native(env_id, AutoresetMode.DISABLED)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    done = np.zeros(NUM_ENVS, dtype=bool)
    while not done.any():
        *_, terminated, truncated, _ = envs.step(rng.integers(envs.single_action_space.n, size=NUM_ENVS))
        done = terminated | truncated
    with pytest.raises(gym.error.ResetNeeded, match=str(np.flatnonzero(done)[0])):
        envs.step(np.zeros(NUM_ENVS, dtype=np.int64))


@every_id
def test_reset_mask_leaves_the_other_slots_alone(env_id):
    masked, untouched = (
        make_native(env_id, AutoresetMode.DISABLED),
        make_native(env_id, AutoresetMode.DISABLED),
    )
    mask = np.arange(NUM_ENVS) % 2 == 0
    for envs in (masked, untouched):
        envs.reset(seed=11)
    _, info = masked.reset(options={"reset_mask": mask})
    start = masked.metadata["start_option"]
    assert (info[f"_{start}"] == mask).all()
    actions = np.ones(NUM_ENVS, dtype=np.int64)
    _, rewards, *_ = masked.step(actions)
    _, expected, *_ = untouched.step(actions)
    assert (rewards[~mask] == expected[~mask]).all()
    for bad in (mask.astype(int), mask[:-1], mask.tolist(), np.zeros(NUM_ENVS, dtype=bool)):
        with pytest.raises(ValueError, match="reset_mask"):
            masked.reset(options={"reset_mask": bad})


@every_id
def test_start_options_are_honoured_for_one_env_for_all_slots_and_for_each(env_id):
    env, envs = make(env_id), make_native(env_id)
    key = envs.metadata["start_option"]
    start = STARTS[env_id]
    assert env.reset(seed=0, options={key: start})[1][key] == start
    assert (envs.reset(seed=0, options={key: start})[1][key] == start).all()
    drawn = envs.reset(seed=0)[1][key]
    starts = [start if i % 2 else None for i in range(NUM_ENVS)]
    got = envs.reset(seed=0, options={key: starts})[1][key]
    assert (got == np.where(np.arange(NUM_ENVS) % 2, start, drawn)).all()


@every_id
def test_a_start_outside_the_environment_is_refused(env_id):
    env, envs = make(env_id), make_native(env_id)
    key = envs.metadata["start_option"]
    for bad in (-1, 10**6):
        with pytest.raises(ValueError, match=key):
            env.reset(options={key: bad})
        with pytest.raises(ValueError, match=key):
            envs.reset(options={key: [None] * (NUM_ENVS - 1) + [bad]})
    with pytest.raises(ValueError, match="slots"):
        envs.reset(options={key: [0] * (NUM_ENVS + 1)})


@every_variant
def test_a_slot_does_not_notice_its_neighbours(env_id, kwargs):
    many, few = make_native(env_id, **kwargs), make_native(env_id, num_envs=2, **kwargs)
    obs, _ = many.reset(seed=5)
    few_obs, _ = few.reset(seed=5)
    rng = np.random.default_rng(1)
    for _ in range(50):
        actions = rng.integers(many.single_action_space.n, size=NUM_ENVS)
        obs, rewards, *_ = many.step(actions)
        few_obs, few_rewards, *_ = few.step(actions[:2])
        assert_same(rewards[:2], few_rewards, "rewards", TOLERANCE.get(env_id, 0.0))
        one, other = (o if isinstance(o, dict) else {"obs": o} for o in (obs, few_obs))
        assert_same({name: value[:2] for name, value in one.items()}, other, "observations")


@every_variant
def test_observations_stay_inside_the_batched_space_and_belong_to_the_caller(env_id, kwargs):
    envs = make_native(env_id, **kwargs)
    obs, _ = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        before = copy.deepcopy(obs)
        assert envs.observation_space.contains(obs)
        following, *_ = envs.step(rng.integers(envs.single_action_space.n, size=NUM_ENVS))
        assert_same(obs, before, "an observation handed out earlier")
        obs = following


@every_variant
def test_record_episode_statistics_works_on_single_and_vector(env_id, kwargs):
    env = gym.wrappers.RecordEpisodeStatistics(make(env_id, **kwargs))
    env.reset(seed=0)
    rng, total, done = np.random.default_rng(0), 0.0, False
    while not done:
        _, reward, terminated, truncated, info = env.step(int(rng.integers(env.action_space.n)))
        total, done = total + reward, terminated or truncated
    assert info["episode"]["r"] == pytest.approx(total)

    envs = gym.wrappers.vector.RecordEpisodeStatistics(make_native(env_id, **kwargs))
    envs.reset(seed=0)
    totals, episodes = np.zeros(NUM_ENVS), 0
    for _ in range(120):
        _, rewards, terminated, truncated, info = envs.step(
            rng.integers(envs.single_action_space.n, size=NUM_ENVS)
        )
        totals, done = totals + rewards, terminated | truncated
        if done.any():
            assert info["episode"]["r"][done] == pytest.approx(totals[done])
            episodes, totals = episodes + done.sum(), np.where(done, 0.0, totals)
    assert episodes > 0


@every_variant
def test_state_continues_exactly_the_random_stream_included(env_id, kwargs):
    rng = np.random.default_rng(0)
    envs, later = make_native(env_id, **kwargs), make_native(env_id, **kwargs)
    actions = rng.integers(envs.single_action_space.n, size=(140, NUM_ENVS))
    envs.reset(seed=9)
    play(envs, actions[:33])
    later.unwrapped.set_state(envs.unwrapped.get_state())
    tolerance = TOLERANCE.get(env_id, 0.0)
    assert_same(play(later, actions[33:]), play(envs, actions[33:]), "vector", tolerance)

    env, later = make(env_id, **kwargs).unwrapped, make(env_id, **kwargs).unwrapped
    env.reset(seed=9)
    later.set_state(env.get_state())
    a, b = ([e.step(1), e.reset(), e.step(0), e.reset()] for e in (env, later))
    assert_same(a, b, "single", tolerance)


def test_importing_the_package_and_the_solver_loads_neither_torch_nor_transformers():
    code = (
        "import sys, gymnasium, textrl_env, textrl_env.exact.solver; gymnasium.make('TokenTree-v0');"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ToyBandit-v0


def test_bandit_is_the_same_problem_for_every_seed_and_another_for_another_arms_seed():
    means = [gym.make("ToyBandit-v0", arms_seed=seed).unwrapped.dynamics.means for seed in (0, 0, 1)]
    assert (means[0] == means[1]).all() and (means[0] != means[2]).all()


def test_bandit_rewards_have_the_arms_mean_and_the_noise_asked_for():
    envs = gym.make_vec("ToyBandit-v0", num_envs=40_000, contexts=2, noise_std=0.5)
    envs.reset(seed=0, options={"state": 1})
    _, rewards, terminated, _, info = envs.step(np.full(40_000, 4))
    means = envs.unwrapped.dynamics.means
    assert terminated.all()
    assert rewards.mean() == pytest.approx(means[1, 4], abs=4 * 0.5 / 200)
    assert rewards.std() == pytest.approx(0.5, rel=0.02)
    assert info["final_info"]["regret"] == pytest.approx(means[1].max() - means[1, 4])


def test_bandit_success_is_the_best_arm_and_no_regret():
    env = gym.make("ToyBandit-v0")
    best = env.unwrapped.dynamics.means[0].argmax()
    for arm in range(env.action_space.n):
        env.reset(seed=arm)
        info = env.step(arm)[4]
        assert info["is_success"] == (arm == best) == (info["regret"] == 0)


@pytest.mark.parametrize("bad", [{"arms": 1}, {"contexts": 0}, {"noise_std": -1.0}])
def test_bandit_refuses_impossible_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        gym.make("ToyBandit-v0", **bad)


# GridWorld-v0

SMALL = ["S.#", ".H.", "..G"]


def test_walls_and_edges_stop_a_move():
    env = gym.make("GridWorld-v0", map=SMALL)
    for start, action in ((0, 0), (0, 3), (1, 2)):
        env.reset(options={"state": start})
        obs, reward, terminated, _, _ = env.step(action)
        assert (obs, reward, terminated) == (start, -0.01, False)


def test_pits_and_goals_end_the_episode_with_their_rewards():
    env = gym.make("GridWorld-v0", map=SMALL)
    env.reset(options={"state": 3})
    assert env.step(2)[:3] == (4, -1.0, True)
    env.reset(options={"state": 7})
    obs, reward, terminated, _, info = env.step(2)
    assert (obs, reward, terminated, info["is_success"]) == (8, 1.0, True, True)


def test_slips_occur_as_often_as_the_transition_model_says():
    pulls = 60_000
    envs = gym.make_vec("GridWorld-v0", num_envs=pulls, slippery=0.3, autoreset_mode="Disabled")
    dynamics = envs.unwrapped.dynamics
    transitions, rewards, _ = dynamics.transition_model()
    start, action = 8, 1  # the corridor above the pit, pushing towards it
    envs.reset(seed=0, options={"state": start})
    obs, reward, *_ = envs.step(np.full(pulls, action))
    shares = np.bincount(obs, minlength=dynamics.cells.size) / pulls
    assert (shares[transitions[start, action] == 0] == 0).all()
    assert np.abs(shares - transitions[start, action]).max() < 4 * np.sqrt(0.25 / pulls)
    assert reward.mean() == pytest.approx(rewards[start, action], abs=4 * reward.std() / np.sqrt(pulls))
    assert transitions[start, action, 14] == pytest.approx(0.7)


@pytest.mark.parametrize("env_id", ["ToyBandit-v0", "LineWorld-v0", "GridWorld-v0"])
def test_transition_model_is_what_step_does(env_id):
    dynamics = gym.make(env_id).unwrapped.dynamics
    transitions, rewards, terminal = dynamics.transition_model()
    assert transitions.sum(axis=-1) == pytest.approx(np.ones(rewards.shape))
    assert (rewards[terminal] == 0).all()
    env = gym.make(env_id, **({"noise_std": 0.0} if env_id == "ToyBandit-v0" else {})).unwrapped
    for state in np.flatnonzero(~terminal):
        for action in range(env.action_space.n):
            env.reset(seed=0, options={"state": int(state)})
            obs, reward, terminated, _, _ = env.step(action)
            following = int(transitions[state, action].argmax())
            assert reward == pytest.approx(rewards[state, action])
            assert terminated == terminal[following]
            if env_id != "ToyBandit-v0":  # whose terminal state has no observation of its own
                assert obs == following


def test_true_slipperiness_is_frozen_lakes():
    dynamics = gym.make("GridWorld-v0", map=["...", ".S.", "..G"], slippery=True).unwrapped.dynamics
    up = dynamics.transition_model()[0][4, 3]
    assert up[[1, 3, 5]] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["S.", "."], "row 1 '.' has 1 cells"),
        (["S?", ".G"], "row 0, column 1 holds the unknown cell"),
        (["..", ".G"], "no start"),
        (["S.", ".."], "no goal"),
        (["S#", "#G"], "no goal can be reached from the start at row 0, column 0"),
        ([], "at least one row"),
    ],
)
def test_a_bad_map_is_refused_with_the_place(rows, message):
    with pytest.raises(ValueError, match=message):
        gym.make("GridWorld-v0", map=rows)


def test_a_map_in_one_string_is_refused_with_a_way_out():
    with pytest.raises(TypeError, match="list of strings"):
        gym.make("GridWorld-v0", map="S.\n.G")


def test_an_episode_cannot_start_in_a_wall():
    with pytest.raises(ValueError, match="row 0, column 3"):
        gym.make("GridWorld-v0").reset(options={"state": 3})


def test_grid_renders_as_text_and_as_pixels_with_the_walker_in_its_cell():
    env = gym.make("GridWorld-v0", map=SMALL, render_mode="ansi")
    env.reset(seed=0, options={"state": 6})
    assert env.render() == "S.#\n.H.\nA.G"
    env = gym.make("GridWorld-v0", map=SMALL, render_mode="rgb_array")
    frames = []
    for state in (0, 6):
        env.reset(seed=0, options={"state": state})
        frames.append(env.render())
    assert frames[0].shape == (96, 96, 3) and frames[0].dtype == np.uint8
    changed = np.argwhere((frames[0] != frames[1]).any(axis=-1)) // 32
    assert {tuple(cell) for cell in changed.tolist()} == {(0, 0), (2, 0)}
    envs = gym.make_vec("GridWorld-v0", num_envs=2, render_mode="rgb_array")
    envs.reset(seed=0)
    assert [frame.shape for frame in envs.render()] == [(192, 192, 3)] * 2


# TokenTree-v0


def test_tree_rewards_sum_to_the_score_less_the_kl():
    env = gym.make("TokenTree-v0", kl_coef=0.3)
    env.unwrapped.bind_policy(lambda obs, action: -0.5 * (action + 1))
    rng = np.random.default_rng(0)
    for seed in range(20):
        env.reset(seed=seed)
        total, kls, done = 0.0, [], False
        while not done:
            action = int(rng.integers(5))
            _, reward, done, _, info = env.step(action)
            assert info["kl"] == pytest.approx(-0.5 * (action + 1) - info["ref_logprob"])
            total, kls = total + reward, [*kls, info["kl"]]
        assert info["kl_sum"] == pytest.approx(sum(kls))
        assert total == pytest.approx(info["score"] - 0.3 * info["kl_sum"])


def test_tree_ends_on_eos_or_at_the_budget_and_always_terminated():
    env = make("TokenTree-v0")
    env.reset(seed=0)
    *_, terminated, truncated, info = env.step(0)
    assert (terminated, truncated, info["stop_reason"], info["response"]) == (True, False, "eos", "0")
    env.reset(seed=0)
    for token in (3, 1, 4, 2):
        obs, _, terminated, truncated, info = env.step(token)
    assert (terminated, truncated, info["stop_reason"]) == (True, False, "length")
    assert (info["response"], info["response_length"]) == ("3 1 4 2", 4)
    assert obs["input_ids"].tolist()[1:] == [3, 1, 4, 2] and obs["attention_mask"].all()
    env = make("TokenTree-v0", eos=False)
    env.reset(seed=0)
    assert not env.step(0)[2]


def test_tree_observation_is_left_padded_and_names_the_prompt():
    env = make("TokenTree-v0", num_prompts=3)
    obs, info = env.reset(seed=0, options={"prompt_id": 2})
    assert info == {"prompt": "prompt 2", "prompt_id": 2}
    assert obs["input_ids"].tolist() == [8, 8, 8, 8, 5 + 2]
    obs, *_ = env.step(3)
    assert obs["input_ids"].tolist() == [8, 8, 8, 7, 3] and obs["attention_mask"].tolist() == [0, 0, 0, 1, 1]


def test_tree_depends_on_its_seeds_alone_and_the_two_are_independent():
    def tables(**kwargs):
        dynamics = gym.make("TokenTree-v0", eos=False, **kwargs).unwrapped.dynamics
        return dynamics.ref_table, dynamics.score_table

    (ref, score), (ref_again, other_score) = tables(), tables(reward_seed=1)
    assert (ref == ref_again).all() and (score[-1] != other_score[-1]).all()
    last = gym.make("TokenTree-v0", eos=False).unwrapped.dynamics.level(3)
    assert abs(np.corrcoef(ref[last].ravel(), score[last].ravel())[0, 1]) < 0.15
    assert score[last].std() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("envs", ["single", "vector"])
def test_an_unbound_tree_takes_the_policy_to_be_uniform_and_says_so_once(envs):
    env = gym.make("TokenTree-v0") if envs == "single" else gym.make_vec("TokenTree-v0", num_envs=1)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="No acting policy is bound"):
        info = env.step(1 if envs == "single" else np.array([1]))[4]
    assert info["kl"] == pytest.approx(-np.log(5) - info["ref_logprob"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.step(1 if envs == "single" else np.array([1]))


@pytest.mark.parametrize(
    "bad", [{"vocab_size": 1}, {"horizon": 0}, {"num_prompts": 0}, {"kl_coef": -1.0}, {"kl_estimator": "k4"}]
)
def test_tree_refuses_impossible_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        gym.make("TokenTree-v0", **bad)


def test_tree_too_large_to_tabulate_is_refused_with_the_count():
    with pytest.raises(ValueError, match="1,250,000,000"):
        gym.make("TokenTree-v0", vocab_size=50, horizon=5, num_prompts=4)
