"""Known ways to get reinforcement learning on language models wrong, each as a claim that it is not so here."""

from __future__ import annotations

import copy
import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from agents import GRPO, PPO, REINFORCE, Agent
from agents.policies.factory import CausalLMPolicy
from agents.rollouts.rollout import Rollout
from tests.tiny import EOS, WORDS, id_sum, make_env, make_lm
from textrl_env.lm.sequences import right_padded

AGENTS = {"PPO": PPO, "REINFORCE": REINFORCE, "GRPO": GRPO}


class Stepped(gym.vector.VectorWrapper):
    """A wrapper that the fused way does not look through, so episodes are stepped token by token."""


def box_env():
    return gym.make("MountainCarContinuous-v0", max_episode_steps=12)


WORLDS = {
    "bandit": lambda: "ToyBandit-v0",
    "line": lambda: "LineWorld-v0",
    "cartpole": lambda: "CartPole-v1",
    "box": box_env,
    "text": lambda: make_env(kl_coef=0.1),
    "text-vector": lambda: make_env(3, lm=make_lm("gpt2"), kl_coef=0.1),
    "text-stepped": lambda: Stepped(make_env(8, kl_coef=0.1)),
}
every_agent = pytest.mark.parametrize("agent", AGENTS)
every_world = pytest.mark.parametrize("world", WORLDS)


def make(agent: str, world: str | gym.Env, **kwargs) -> Agent:
    env = WORLDS[world]() if isinstance(world, str) and world in WORLDS else world
    settings = {"n_episodes": 8, "seed": 0} if world != "cartpole" else {"n_episodes": 4, "seed": 0}
    if isinstance(env, str):
        settings["n_envs"] = 4
    if agent == "PPO":
        settings |= {"n_steps": 8, "batch_size": 8, "n_epochs": 2}
        if not str(world).startswith("text") and isinstance(env, str):
            del settings["n_episodes"]  # segments
    if agent == "GRPO":
        settings |= {"group_size": 1 if world == "box" else 4, "batch_size": 4, "n_epochs": 2}
    policy = "CausalLMPolicy" if "input_ids" in str(getattr(env, "observation_space", "")) else "MlpPolicy"
    return AGENTS[agent](policy, env, **(settings | kwargs))


def start(agent: Agent, steps: int = 10**6) -> Rollout:
    """One rollout, without learning."""
    agent._set_up_learn(steps, None, None, True, False)
    return agent.collect()


def spy_on_ratios(agent: Agent) -> list[torch.Tensor]:
    """The ratios of real steps, for each call of ``loss``."""
    seen, loss = [], agent.loss

    def spied(batch, new):
        losses, metrics = loss(batch, new)
        ratio = metrics.get("ratio", (new.log_probs - batch.log_probs).exp())
        seen.append(ratio.detach()[batch.mask])
        return losses, metrics

    agent.loss = spied
    return seen


# 1


@every_world
@every_agent
def test_01_ratio_is_one_on_the_first_minibatch_and_everywhere_at_learning_rate_zero(agent, world):
    agent = make(agent, world, learning_rate=0.0, micro_batch_size=3)
    rollout = start(agent)
    again = agent.policy.evaluate(rollout).log_probs.detach()
    assert again[rollout.mask].numpy() == pytest.approx(rollout.log_probs[rollout.mask].numpy(), abs=1e-4)
    ratios = spy_on_ratios(agent)
    first = []
    update = agent.update
    agent.update = lambda *args: first.append((update(*args), len(ratios))) or first[-1][0]
    agent.train(rollout)
    record, calls = first[0]
    for ratio in ratios[:calls]:
        assert (ratio == 1.0).all()
    assert record.get("approx_kl", 0.0) == 0.0 and record.get("clip_fraction", 0.0) == 0.0
    for ratio in ratios:
        assert ratio == pytest.approx(torch.ones_like(ratio), abs=2e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@every_agent
def test_03_the_temperature_is_the_same_in_rollout_update_and_reference(agent, temperature):
    env = make_env(lm=make_lm(temperature=temperature), kl_coef=1.0, kl_estimator="k3")
    agent = make(agent, env, learning_rate=0.0)
    rollout = start(agent)
    # The policy has not moved, so it is its own reference: no ratio and no KL.
    assert rollout.log_probs.numpy() == pytest.approx(rollout.ref_log_probs.numpy(), abs=1e-4)
    assert rollout.penalties.abs().max() < 1e-5
    again = agent.policy.evaluate(rollout).log_probs.detach()
    assert again[rollout.mask].numpy() == pytest.approx(rollout.log_probs[rollout.mask].numpy(), abs=1e-4)


# 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_02_dropout_is_off_in_policy_value_and_reference_in_rollout_and_update(kind, critic):
    env = make_env(lm=make_lm(kind, dropout=0.5))
    agent = make("PPO", env, critic=critic, learning_rate=0.0)
    rollout = start(agent)
    agent.train(rollout)
    first, second = (agent.policy.evaluate(rollout) for _ in range(2))
    assert torch.equal(first.log_probs, second.log_probs) and torch.equal(first.values, second.values)
    assert first.log_probs.detach()[rollout.mask].numpy() == pytest.approx(
        rollout.log_probs[rollout.mask].numpy(), abs=1e-4
    )
    assert rollout.log_probs.numpy() == pytest.approx(rollout.ref_log_probs.numpy(), abs=1e-4)
    assert not any(module.training for module in agent.policy.model.modules())


# 5, 6, 7


@every_agent
def test_05_the_end_token_belongs_to_the_action_mask_and_nothing_after_it_does(agent):
    agent = make(agent, make_env(lm=make_lm("gpt2", pad="<eos>")), n_episodes=32)
    rollout = start(agent)
    lengths = rollout.lengths
    assert len(set(lengths.tolist())) > 1
    for row, length in zip(range(len(rollout)), lengths.tolist(), strict=True):
        assert rollout.mask[row].tolist() == [t < length for t in range(rollout.mask.shape[1])]
        response = rollout.actions[row, :length].tolist()
        assert EOS not in response[:-1]
        assert (response[-1] == EOS) or length == 6
        assert rollout.done[row].nonzero().tolist() == [[length - 1]]


def test_06_actions_that_no_token_has_are_never_sampled():
    lm = make_lm("llama", extra_vocab=7).clone()
    with torch.no_grad():
        lm.model.lm_head.weight[len(WORDS) :] *= 50
    agent = make("REINFORCE", make_env(lm=lm), n_episodes=32)
    assert int(start(agent).actions.max()) < len(WORDS)


@pytest.mark.parametrize("world", ["fused", "stepped"])
def test_07_the_score_belongs_to_the_last_action(world):
    env = make_env(8, kl_coef=0.0, reward=id_sum)
    agent = make("REINFORCE", env if world == "fused" else Stepped(env), n_episodes=16)
    rollout = start(agent)
    scores = torch.tensor(agent.episodes.text["score"], dtype=torch.float32)
    at_the_end = torch.where(rollout.done, rollout.rewards, torch.zeros(()))
    assert (rollout.rewards == at_the_end).all()
    assert sorted(at_the_end.sum(1).tolist()) == pytest.approx(sorted(scores.tolist()), abs=1e-5)
    returns = agent.gamma * rollout.rewards.sum(1)
    assert agent.gamma == 1.0 and returns.tolist() == pytest.approx(at_the_end.sum(1).tolist())


# 8, 9


def padded(batch: Rollout, columns: int) -> Rollout:
    """The same batch with more masked columns, filled with numbers that would be noticed."""

    def widen(tensor, fill_float=1e3):
        if tensor is None:
            return None
        fill = {torch.bool: False, torch.int64: 1}.get(tensor.dtype, fill_float)
        shape = (tensor.shape[0], columns, *tensor.shape[2:])
        return torch.cat([tensor, torch.full(shape, fill, dtype=tensor.dtype)], dim=1)

    fields = [f.name for f in dataclasses.fields(batch) if f.name not in ("inputs", "group")]
    # Log-probabilities of nothing are 0, here as in every rollout.
    wide = {name: widen(getattr(batch, name), 0.0 if "log_probs" in name else 1e3) for name in fields}
    inputs = {n: widen(x) if isinstance(x, torch.Tensor) else x for n, x in batch.inputs.items()}
    return Rollout(inputs, group=batch.group, **wide)


@pytest.mark.parametrize("world", ["line", "text"])
@every_agent
def test_09_padding_changes_no_loss_no_gradient_and_no_logged_mean(agent, world):
    records, gradients = [], []
    for columns in (0, 4):
        learner = make(agent, world, batch_size=None, n_epochs=1, max_grad_norm=1e9, n_episodes=8)
        learner.flatten = False
        rollout = start(learner)
        rollout = learner.prepare_rollout(padded(rollout, columns) if columns else rollout)
        records.append(learner.update(learner.prepare_batch(rollout), fresh=False))
        gradients.append([p.grad for p in learner.policy.parameters()])
    assert records[1] == pytest.approx(records[0], abs=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None) and (a is None or a == pytest.approx(b, abs=1e-5))


@every_agent
def test_09_whatever_a_policy_says_of_padding_is_not_heard(agent):
    agent = make(agent, "text", batch_size=None, n_episodes=32)
    rollout = agent.prepare_rollout(start(agent))
    assert not rollout.mask.all()
    evaluate = agent.policy.evaluate

    def shouting(batch):
        new = evaluate(batch)
        return type(new)(*(None if x is None else torch.where(batch.mask, x, -1e6) for x in new))

    expected = agent.update(agent.prepare_batch(rollout))
    agent = make(agent.__class__.__name__, "text", batch_size=None, n_episodes=32)
    agent.policy.evaluate, evaluate = shouting, agent.policy.evaluate
    assert agent.update(agent.prepare_batch(rollout)) == pytest.approx(expected, abs=1e-5)


# 10 is a claim of test_policies.py


# 13


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_13_the_kl_is_counted_once_in_the_reward_or_in_the_loss(estimator):
    for kl_in in ("reward", "loss"):
        env = make_env(kl_coef=0.5, kl_estimator=estimator)
        agent = make("GRPO", env, kl_in=kl_in, n_epochs=1, batch_size=None, n_episodes=16)
        with torch.no_grad():  # away from the reference, so that there is a KL
            agent.policy.model.lm_head.weight.mul_(1.5)
        rollout = start(agent)
        scores = torch.tensor(agent.episodes.text["score"], dtype=torch.float32)
        paid = (rollout.rewards * rollout.mask).sum(1)
        assert paid.tolist() == pytest.approx((scores - rollout.penalties.sum(1)).tolist(), abs=1e-4)
        expected = paid if kl_in == "reward" else scores
        assert agent.episode_scores(rollout).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        record = agent.update(agent.prepare_rollout(rollout))
        assert ("kl_loss" in record) == (kl_in == "loss")
        if kl_in == "loss":
            assert record["kl_loss"] > 0


def test_13_a_kl_in_the_loss_pulls_towards_the_reference_with_equal_rewards():
    env = make_env(kl_coef=1.0, reward=lambda prompts, completions: [0.0] * len(prompts))
    settings = {"batch_size": None, "n_epochs": 1, "n_episodes": 64, "learning_rate": 1e-3}
    agent = make("GRPO", env, kl_in="loss", kl_loss_estimator="k2", **settings)
    with torch.no_grad():
        agent.policy.model.lm_head.weight.mul_(3.0)

    def kl():
        rollout = start(agent)
        return float((rollout.log_probs - rollout.ref_log_probs).sum(1).mean())

    before = kl()
    agent.learn(9000)
    assert kl() < 0.7 * before


# 14, 15, 17


@pytest.mark.parametrize("world", ["text", "text-vector", "text-stepped", "cartpole", "line", "bandit"])
def test_14_the_answers_of_a_group_are_neighbours_and_share_their_start(world):
    agent = make(
        "GRPO", world, group_size=4, n_episodes=16, env_kwargs={"contexts": 5} if world == "bandit" else None
    )
    rollout = start(agent)
    assert rollout.group.tolist() == [i // 4 for i in range(16)]
    if "sequences" in rollout.inputs:
        starts = torch.from_numpy(right_padded(rollout.inputs["sequences"].prompts))
    else:
        starts = rollout.inputs["features"][:, 0]
    groups = starts.reshape(4, 4, -1)
    assert (groups == groups[:, :1]).all()
    if world != "line":  # its start is fixed
        assert len({tuple(group[0].tolist()) for group in groups}) > 1
    if world.startswith("text"):
        assert not (rollout.actions.reshape(4, 4, -1) == rollout.actions.reshape(4, 4, -1)[:, :1]).all()


@pytest.mark.parametrize("scale", ["std", "none", "leave-one-out"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_15_equal_rewards_or_groups_of_one_give_no_gradient_and_no_nan(scale, group_size):
    env = make_env(kl_coef=0.0, reward=lambda prompts, completions: [0.1] * len(prompts))
    agent = make("GRPO", env, scale=scale, group_size=group_size, n_epochs=1)
    before = copy.deepcopy(agent.policy.state_dict())
    agent.train(start(agent))
    for name, weight in agent.policy.state_dict().items():
        assert weight == pytest.approx(before[name], abs=1e-6)


def test_17_the_grpo_loss_is_about_zero_and_the_log_shows_what_matters_instead():
    agent = make("GRPO", make_env(reward=id_sum), n_epochs=1, batch_size=None, n_episodes=16)
    agent.learn(1)
    assert abs(agent.latest["train/loss"]) < 1e-5
    for name in ("objective/scores", "objective/kl", "objective/entropy", "train/grad_norm"):
        assert np.isfinite(agent.latest[name])
    assert agent.latest["train/grad_norm"] > 1e-3
    assert agent.latest["group/reward_std"] > 0 and agent.latest["group/frac_zero_std"] == 0.0


# 16


@pytest.mark.parametrize("world", ["line", "box", "text"])
@pytest.mark.parametrize("average", ["token", "sequence", "constant", "PPO", "REINFORCE"])
def test_16_losses_and_gradients_do_not_change_with_the_micro_batch(average, world):
    kind = average if average in AGENTS else "GRPO"
    extra = {"average": average} if kind == "GRPO" else {}
    if kind == "PPO":
        extra["clip_range_vf"] = 0.2
    agent = make(kind, world, batch_size=None, max_grad_norm=1e9, ent_coef=0.01, **extra)
    for group in agent.optimizer.param_groups:
        group["lr"] = 0.0
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = agent.prepare_batch(agent.prepare_rollout(start(agent)))
    batch.log_probs = batch.log_probs + 0.3 * torch.randn(
        batch.log_probs.shape, generator=torch.Generator().manual_seed(2)
    )
    seen = []
    for size in (None, 1, 3):
        agent.micro_batch_size = size
        record = agent.update(batch)
        seen.append((record, [p.grad.clone() for p in agent.policy.parameters() if p.grad is not None]))
    for record, gradients in seen[1:]:
        assert record == pytest.approx(seen[0][0], rel=1e-3, abs=1e-5)
        for a, b in zip(gradients, seen[0][1], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


# 19, 20


@every_agent
def test_19_the_gradient_norm_is_clipped_and_what_it_was_is_logged(agent):
    agent = make(agent, make_env(reward=id_sum), max_grad_norm=1e-3)
    record = agent.update(agent.prepare_batch(agent.prepare_rollout(start(agent))))
    assert record["grad_norm"] > 1e-3
    for group in agent.optimizer.param_groups:  # a critic with a rate of its own is clipped apart
        norms = [p.grad.norm() for p in group["params"] if p.grad is not None]
        assert torch.stack(norms).norm() == pytest.approx(1e-3, rel=1e-3)


@every_agent
def test_20_adams_epsilon_is_1e_5(agent):
    assert make(agent, "bandit").optimizer.param_groups[0]["eps"] == 1e-5


@pytest.mark.parametrize("schedule", ["linear:0.01", lambda progress: 0.01 * progress])
def test_20_schedules_are_functions_of_the_remaining_progress(schedule):
    agent = make("PPO", "bandit", learning_rate=schedule, clip_range=schedule)
    seen = []
    agent.learn(
        128, callback=lambda locals_, globals_: seen.append(agent.latest.get("train/learning_rate")) or True
    )
    rates = list(dict.fromkeys(rate for rate in seen if rate is not None))
    # 32 steps of each rollout: a quarter, a half, three quarters are over when it learns.
    assert rates == pytest.approx([0.0075, 0.005, 0.0025])
    assert agent.latest["train/learning_rate"] == agent.latest["train/clip_range"] == 0.0


@every_agent
def test_20_a_gradient_step_is_as_long_as_the_schedule_says(agent):
    learner = make(agent, make_env(reward=id_sum), learning_rate="linear:0.01")
    rollout = start(learner)
    moved = []
    for progress in (0.0, 0.1):
        before = [p.detach().clone() for p in learner.policy.parameters()]
        learner._progress_remaining = progress
        learner.train(rollout)
        after = [p.detach() for p in learner.policy.parameters()]
        moved.append(max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)))
    # Adam moves no weight much further than the learning rate in a step, and some weight by about as much.
    assert moved[0] == 0.0
    assert 0.0005 < moved[1] < 0.01


@every_agent
def test_an_entropy_bonus_raises_the_entropy(agent):
    env = make_env(kl_coef=0.0, reward=lambda prompts, completions: [0.0] * len(prompts))
    learner = make(agent, env, ent_coef=1.0, learning_rate=1e-3)
    with torch.no_grad():  # away from the uniform distribution, whose entropy cannot rise
        learner.policy.model.lm_head.weight.mul_(5.0)
    rollout = start(learner)

    def entropy():
        return float(learner.policy.evaluate(rollout).entropy.detach()[rollout.mask].mean())

    before = entropy()
    learner.train(rollout)
    assert entropy() > before + 1e-3


# 21


def history(agent: str, world: str, seed: int) -> tuple[list[torch.Tensor], dict]:
    learner = make(agent, world, seed=seed)
    learner.learn(150)
    wanted = {k: v for k, v in learner.latest.items() if not k.startswith(("time/", "memory/", "samples/"))}
    return list(learner.policy.state_dict().values()), wanted


@pytest.mark.parametrize("world", ["line", "cartpole", "text", "text-stepped"])
@every_agent
def test_21_one_seed_gives_one_run_bitwise_and_another_seed_another(agent, world):
    torch.manual_seed(98)
    first, log = history(agent, world, 7)
    torch.manual_seed(99)
    second, again = history(agent, world, 7)
    other, _ = history(agent, world, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert log.keys() == again.keys()
    assert all(log[k] == again[k] or log[k] != log[k] for k in log)
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# 23


def test_23_the_dummy_transition_of_next_step_autoreset_is_masked_and_not_counted():
    envs = gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point")
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    agent = PPO("MlpPolicy", envs, n_steps=80, batch_size=32, n_epochs=1, seed=0)
    agent._set_up_learn(10**6, None, None, True, False)
    masked = 0
    dummy = np.zeros(3, dtype=bool)
    for _ in range(2):  # the second rollout starts where the first stopped
        before = agent.num_timesteps
        rollout = agent.collect()
        mask, done = rollout.mask.numpy(), rollout.done.numpy()
        for t in range(80):
            assert (mask[:, t] == ~dummy).all()
            dummy = done[:, t]
        assert agent.num_timesteps - before == mask.sum()
        assert (rollout.rewards.numpy() == mask).all()  # 1 for every real step
        masked += int((~mask).sum())
        flat = agent.prepare_rollout(rollout)
        assert len(flat) == mask.sum()
    assert masked > 3
    lengths = list(agent.episodes.lengths)
    assert lengths == list(agent.episodes.returns)


def test_23_next_step_and_same_step_autoreset_learn_from_the_same_steps():
    advantages = {}
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        envs = gym.make_vec("LineWorld-v0", num_envs=1, autoreset_mode=mode, max_episode_steps=4)
        agent = PPO("MlpPolicy", envs, n_steps=40, batch_size=None, n_epochs=1, seed=0)
        agent._set_up_learn(10**6, None, None, True, False)
        # Always to the right, with values that tell the places apart.
        place = lambda observation: np.asarray(observation, dtype=float).reshape(-1)  # noqa: E731
        agent.policy.act = lambda obs, place=place: (np.array([2]), np.zeros(1), place(obs))
        agent.policy.predict_values = place
        flat = agent.prepare_rollout(agent.collect())
        advantages[mode.name] = flat.advantages[:20].flatten().tolist()
    assert advantages["NEXT_STEP"] == pytest.approx(advantages["SAME_STEP"])
    assert advantages["DISABLED"] == pytest.approx(advantages["SAME_STEP"])
    assert len(set(advantages["SAME_STEP"])) > 1


def test_23_a_truncated_episode_bootstraps_from_its_own_last_observation():
    envs = gym.make_vec("LineWorld-v0", num_envs=2, max_episode_steps=3)
    agent = PPO("MlpPolicy", envs, n_steps=6, batch_size=None, n_epochs=1, seed=0)
    agent._set_up_learn(10**6, None, None, True, False)
    place = lambda observation: 10.0 + np.asarray(observation, dtype=float).reshape(-1)  # noqa: E731
    agent.policy.act = lambda obs: (np.array([2, 2]), np.zeros(2), place(obs))
    agent.policy.predict_values = place
    rollout = agent.collect()
    start_value = rollout.values[:, 0]
    for t in (2, 5):
        assert rollout.done[:, t].all()
        # One step further to the right than the last place acted in; not back at the start.
        step = rollout.values[:, 1] - rollout.values[:, 0]
        assert rollout.next_values[:, t].tolist() == (rollout.values[:, t] + step).tolist()
        assert (rollout.next_values[:, t] != start_value).all()


@pytest.mark.parametrize("max_episode_steps", [3, None], ids=["at-the-time-limit", "before-it"])
def test_23_nothing_is_bootstrapped_from_a_termination_even_on_the_last_step_allowed(max_episode_steps):
    kwargs = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    envs = gym.make_vec("LineWorld-v0", num_envs=2, length=4, start=0, **kwargs)
    agent = PPO("MlpPolicy", envs, n_steps=6, batch_size=None, n_epochs=1, seed=0)
    agent._set_up_learn(10**6, None, None, True, False)
    place = lambda observation: 10.0 + np.asarray(observation, dtype=float).reshape(-1)  # noqa: E731
    agent.policy.act = lambda obs: (np.array([2, 2]), np.zeros(2), place(obs))
    agent.policy.predict_values = place
    rollout = agent.collect()
    expected = [11.0, 12.0, 0.0] * 2
    assert rollout.next_values.tolist() == [expected, expected]


# 22 is test_checkpoint.py; 25 and 26 are test_text_env.py and test_envs.py; 27 is test_language_model.py


def test_the_policy_bound_to_the_env_is_the_one_that_acts():
    envs = make_env(4, kl_coef=1.0)
    agent = make("REINFORCE", Stepped(envs), n_episodes=8)
    with torch.no_grad():
        agent.policy.model.lm_head.weight.mul_(1.3)
    rollout = start(agent)
    assert isinstance(agent.policy, CausalLMPolicy)
    expected = (rollout.log_probs - rollout.ref_log_probs)[rollout.mask]
    assert rollout.penalties[rollout.mask].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert expected.abs().max() > 0.05
