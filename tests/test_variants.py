"""Every variant against its paper's formula, in plain Python, and against TRL's loss types."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agents import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, REINFORCEPlusPlus, TabularPolicy
from agents.policies import Evaluation
from agents.rollout import Rollout, concatenate
from tests.tiny import make_env

VARIANTS = [RLOO, REINFORCEPlusPlus, DrGRPO, DAPO, GSPO, CISPO]
every_variant = pytest.mark.parametrize("cls", VARIANTS, ids=lambda cls: cls.__name__)
BETA, GROUP, LENGTHS = 0.3, 4, [1, 4, 2, 3, 4, 4, 1, 2]
TREE = {"vocab_size": 4, "horizon": 4, "kl_coef": BETA}


def make(cls, env_kwargs=TREE, **kwargs):
    if cls is not REINFORCEPlusPlus:
        kwargs.setdefault("group_size", GROUP)
    kwargs = {"n_episodes": len(LENGTHS), "n_envs": len(LENGTHS), "seed": 0} | kwargs
    return cls(TabularPolicy, "TokenTree-v0", env_kwargs=env_kwargs, **kwargs)


def make_rollout(spread: float = 0.6) -> tuple[Rollout, Evaluation]:
    """Random steps of episodes of different lengths, and what a policy that has moved says of them."""
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = np.arange(shape[1]) < np.array(LENGTHS)[:, None]
    done = np.arange(shape[1]) == np.array(LENGTHS)[:, None] - 1
    old, ref = rng.normal(-1.5, 0.3, shape), rng.normal(-1.5, 0.3, shape)
    penalties = BETA * (old - ref) * mask
    scores = rng.normal(size=len(LENGTHS))[:, None] * done

    def tensor(x):
        return torch.from_numpy(np.asarray(x * mask, dtype=np.float32))

    rollout = Rollout(
        inputs={"rows": torch.zeros(shape, dtype=torch.long)},
        actions=torch.zeros(shape, dtype=torch.long),
        rewards=tensor(scores - penalties),
        log_probs=tensor(old),
        values=torch.zeros(shape),
        next_values=torch.zeros(shape),
        mask=torch.from_numpy(mask),
        done=torch.from_numpy(done),
        ref_log_probs=tensor(ref),
        penalties=tensor(penalties),
    )
    # Outside the mask a policy says anything.
    new = torch.from_numpy((old + rng.normal(0, spread, shape)).astype(np.float32)).requires_grad_()
    return rollout, Evaluation(new, None, torch.zeros(shape))


def loss_and_gradient(agent, rollout: Rollout, new: Evaluation) -> tuple[float, np.ndarray]:
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    losses, _ = agent.loss(batch, new)
    loss = (losses * agent.loss_weights(batch)).sum()
    (gradient,) = torch.autograd.grad(loss, new.log_probs)
    return loss.item(), gradient.numpy()


class Episode:
    """One episode of a rollout as plain lists."""

    def __init__(self, rollout: Rollout, new: Evaluation, i: int) -> None:
        steps = LENGTHS[i]
        self.length = steps
        self.rewards = rollout.rewards[i, :steps].tolist()
        self.penalties = rollout.penalties[i, :steps].tolist()
        self.old = rollout.log_probs[i, :steps].tolist()
        self.ref = rollout.ref_log_probs[i, :steps].tolist()
        self.new = new.log_probs[i, :steps].tolist()
        self.ratios = [math.exp(n - o) for n, o in zip(self.new, self.old, strict=True)]
        self.ret = sum(self.rewards)


def episodes(rollout, new):
    return [Episode(rollout, new, i) for i in range(len(LENGTHS))]


def group_of(i: int) -> range:
    start = i - i % GROUP
    return range(start, start + GROUP)


def std_advantages(returns: list[float], scaled: bool = True) -> list[float]:
    found = []
    for i, ret in enumerate(returns):
        group = [returns[j] for j in group_of(i)]
        mean = sum(group) / GROUP
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (GROUP - 1))
        found.append((ret - mean) / (std + 1e-4) if scaled else ret - mean)
    return found


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def test_rloo_is_the_return_less_the_mean_of_the_others_times_the_ratio_of_the_response():
    rollout, new = make_rollout()
    loss, _ = loss_and_gradient(make(RLOO), rollout, new)
    expected, eps = 0.0, episodes(rollout, new)
    for i, e in enumerate(eps):
        others = [eps[j].ret for j in group_of(i) if j != i]
        ratio = math.exp(sum(e.new) - sum(e.old))
        expected += clipped(ratio, e.ret - sum(others) / len(others), 0.2, 0.2) / len(eps)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_rloos_first_gradient_is_the_advantage_on_every_token_of_the_response():
    rollout, new = make_rollout(spread=0.0)
    agent = make(RLOO)
    _, gradient = loss_and_gradient(agent, rollout, new)
    expected = -rollout.advantages.numpy() / len(LENGTHS)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_reinforce_plus_plus_whitens_reward_to_go_over_all_tokens_and_clips_as_ppo():
    rollout, new = make_rollout()
    loss, _ = loss_and_gradient(make(REINFORCEPlusPlus), rollout, new)
    eps = episodes(rollout, new)
    to_go = [sum(e.rewards[t:]) for e in eps for t in range(e.length)]
    mean = sum(to_go) / len(to_go)
    std = math.sqrt(sum((g - mean) ** 2 for g in to_go) / (len(to_go) - 1))
    ratios = [r for e in eps for r in e.ratios]
    terms = [clipped(r, (g - mean) / std, 0.2, 0.2) for r, g in zip(ratios, to_go, strict=True)]
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_dr_grpo_divides_neither_by_the_std_nor_by_the_length():
    rollout, new = make_rollout()
    loss, _ = loss_and_gradient(make(DrGRPO), rollout, new)
    eps = episodes(rollout, new)
    advantages = std_advantages([e.ret for e in eps], scaled=False)
    terms = [clipped(r, a, 0.2, 0.2) for e, a in zip(eps, advantages, strict=True) for r in e.ratios]
    assert loss == pytest.approx(sum(terms) / (len(eps) * max(LENGTHS)), rel=1e-4)


def test_dapo_clips_higher_and_averages_over_tokens():
    rollout, new = make_rollout()
    loss, _ = loss_and_gradient(make(DAPO), rollout, new)
    eps = episodes(rollout, new)
    advantages = std_advantages([e.ret for e in eps])
    terms = [clipped(r, a, 0.2, 0.28) for e, a in zip(eps, advantages, strict=True) for r in e.ratios]
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_dapo_punishes_what_comes_close_to_the_budget():
    rollout, new = make_rollout()
    agent = make(DAPO, overlong_cache=2)
    plain = [e.ret for e in episodes(rollout, new)]
    # Budget 4, slope of 2: nothing up to 2 tokens, half at 3, all at 4 (equation 13).
    punished = [r - max(0, length - 2) / 2 for r, length in zip(plain, LENGTHS, strict=True)]
    assert agent.episode_scores(rollout).tolist() == pytest.approx(punished, rel=1e-5)


def test_gspo_has_one_length_normalised_ratio_for_a_response():
    rollout, new = make_rollout(spread=3e-3)
    loss, gradient = loss_and_gradient(make(GSPO), rollout, new)
    eps = episodes(rollout, new)
    advantages = std_advantages([e.ret for e in eps])
    expected, kept = 0.0, []
    for e, advantage in zip(eps, advantages, strict=True):
        ratio = math.exp((sum(e.new) - sum(e.old)) / e.length)
        expected += clipped(ratio, advantage, 3e-4, 4e-4) / len(eps)
        kept.append(not (ratio > 1 + 4e-4 and advantage > 0) and not (ratio < 1 - 3e-4 and advantage < 0))
    assert loss == pytest.approx(expected, abs=1e-5)
    assert any(kept)
    assert not all(kept)
    # The clip lets a response go as a whole.
    for i, length in enumerate(LENGTHS):
        assert (np.abs(gradient[i, :length]) > 1e-7).all() == kept[i]
        np.testing.assert_array_equal(gradient[i, length:], 0)


def test_cispo_clips_the_weight_and_keeps_every_tokens_gradient():
    rollout, new = make_rollout()
    _, gradient = loss_and_gradient(make(CISPO, clip_range_high=0.3), rollout, new)
    eps = episodes(rollout, new)
    advantages = std_advantages([e.ret for e in eps])
    assert any(ratio > 1.3 for e in eps for ratio in e.ratios)
    for i, (e, advantage) in enumerate(zip(eps, advantages, strict=True)):
        expected = [-min(ratio, 1.3) * advantage / sum(LENGTHS) for ratio in e.ratios]
        np.testing.assert_allclose(gradient[i, : e.length], expected, rtol=1e-3)


# -- TRL ------------------------------------------------------------------------------------------------------


def trl_grpo_loss(rollout: Rollout, new: Evaluation, loss_type: str, level: str = "token", **clip: float):
    """TRL's GRPO loss as its trainer writes it, for advantages of given returns and beta in the loss."""
    mask = rollout.mask.float()
    rewards = ((rollout.rewards + rollout.penalties) * mask).sum(1)
    grouped = rewards.view(-1, GROUP)
    mean = grouped.mean(1).repeat_interleave(GROUP)
    std = grouped.std(1).repeat_interleave(GROUP)
    advantages = rewards - mean if loss_type == "dr_grpo" else (rewards - mean) / (std + 1e-4)
    advantages = advantages.unsqueeze(1)
    log_ratio = new.log_probs - rollout.log_probs
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    low, high = clip.get("low", 0.2), clip.get("high", 0.2)
    if loss_type == "cispo":
        per_token = -torch.clamp(coef_1, max=high).detach() * advantages * new.log_probs
    else:
        coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
        per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
    gap = rollout.ref_log_probs - new.log_probs
    per_token = per_token + BETA * (torch.exp(gap) - gap - 1)
    if loss_type == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "dr_grpo":
        return (per_token * mask).sum() / (per_token.size(0) * max(LENGTHS))
    return (per_token * mask).sum() / mask.sum().clamp(min=1.0)  # dapo, cispo


TRL = {
    "grpo": (GRPO, "grpo", "token", {}),
    "dr_grpo": (DrGRPO, "dr_grpo", "token", {}),
    "dapo": (DAPO, "dapo", "token", {"high": 0.28}),
    "cispo": (CISPO, "cispo", "token", {"high": 5.0}),
    "gspo": (GSPO, "grpo", "sequence", {"low": 3e-4, "high": 4e-4}),
}


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_those_of_trls_loss_types(name):
    cls, loss_type, level, clip = TRL[name]
    rollout, new = make_rollout()
    expected = trl_grpo_loss(rollout, new, loss_type, level, **clip)
    (expected_gradient,) = torch.autograd.grad(expected, new.log_probs)
    loss, gradient = loss_and_gradient(make(cls, kl_in="loss"), rollout, new)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient.numpy(), rtol=1e-4, atol=1e-7)


# -- all of them ----------------------------------------------------------------------------------------------


@every_variant
def test_the_first_ratio_is_one_and_equal_returns_give_a_finite_step(cls):
    agent = make(cls, env_kwargs={"vocab_size": 2, "horizon": 1, "num_prompts": 1, "kl_coef": 0.0})
    agent.learn(1)
    assert agent.latest["val/ratio"] == pytest.approx(1)
    assert agent.latest["train/approx_kl"] == pytest.approx(0, abs=1e-7)
    rollout, new = make_rollout()
    rollout.rewards = torch.where(rollout.done, 1.0, 0.0)
    rollout.penalties = torch.zeros_like(rollout.penalties)
    loss, gradient = loss_and_gradient(agent, rollout, new)
    assert math.isfinite(loss)
    assert np.isfinite(gradient).all()


@every_variant
def test_a_loss_does_not_depend_on_micro_batches(cls):
    def weights(micro_batch_size):
        agent = make(cls, micro_batch_size=micro_batch_size, n_epochs=2, n_episodes=16, learning_rate=0.1)
        agent.learn(100)
        return agent.policy.logits.detach().numpy()

    np.testing.assert_allclose(weights(3), weights(None), atol=1e-4)


@every_variant
def test_every_variant_learns_on_a_language_model(cls):
    agent = cls("auto", make_env(num_envs=2), n_episodes=16, n_epochs=2, seed=0)
    before = agent.policy.value_head, [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(60)
    assert before[0] is None
    assert any(not torch.equal(a, b) for a, b in zip(before[1], agent.policy.parameters(), strict=True))


@every_variant
def test_a_variant_is_saved_and_loaded_as_itself(cls, tmp_path):
    agent = make(cls, learning_rate=0.05)
    agent.learn(20)
    agent.save(tmp_path)
    loaded = cls.load(tmp_path)
    assert type(loaded) is cls
    torch.testing.assert_close(loaded.policy.logits, agent.policy.logits)


def test_what_defines_a_variant_cannot_be_changed():
    with pytest.raises(TypeError, match="group_size"):
        make(REINFORCEPlusPlus, group_size=4)
    with pytest.raises(TypeError, match="scale"):
        make(DrGRPO, scale="std")


# -- dynamic sampling -----------------------------------------------------------------------------------------


def some_groups_agree(prompts, completions):
    """Every answer to the prompt "a" scores alike."""
    pairs = zip(prompts, completions, strict=True)
    return [1.0 if p == "a" else float(c.count("a")) for p, c in pairs]


def caught_rollouts(agent) -> list[Rollout]:
    found = []
    agent.train = found.append
    agent.learn(1, log_interval=None)
    return found


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ():
    env = make_env(num_envs=2, reward=some_groups_agree, prompts=["a", "b c d"])
    agent = DAPO("auto", env, group_size=4, n_episodes=32, max_resamples=20, seed=0)
    (rollout,) = caught_rollouts(agent)
    assert len(rollout) == 32
    assert rollout.group.tolist() == [i // 4 for i in range(32)]
    scores = ((rollout.rewards + rollout.penalties) * rollout.mask).sum(1).view(-1, 4)
    assert (scores.std(1) > 1e-3).all()


def test_dynamic_sampling_gives_up_after_max_resamples():
    env = make_env(num_envs=2, reward=lambda prompts, completions: [1.0] * len(prompts))
    agent = DAPO("auto", env, group_size=4, n_episodes=8, max_resamples=2, seed=0)
    (rollout,) = caught_rollouts(agent)
    assert len(rollout) == 8
    assert agent.episodes.lengths.maxlen >= 24
    assert agent.num_timesteps > int(rollout.mask.sum())  # what was dropped was sampled, and counts


def test_joined_rollouts_say_the_log_probs_they_were_sampled_with():
    short, long = make_env(num_envs=1, prompts=["a"]), make_env(num_envs=1, prompts=["d e f g", "b c"])
    agents = [GRPO("auto", env, group_size=2, n_episodes=6, seed=1) for env in (short, long)]
    parts = [caught_rollouts(agent)[0] for agent in agents]
    joined = concatenate(parts)
    assert len(joined) == 12
    with torch.no_grad():
        again = agents[0].policy.evaluate(joined).log_probs
    torch.testing.assert_close(again * joined.mask, joined.log_probs, atol=1e-5, rtol=1e-4)
