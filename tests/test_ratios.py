"""Ratios, clips and masks against their papers' formulas in plain Python, where no trainer of TRL has them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agents import (
    DPPO,
    GMPO,
    GPG,
    GRPO,
    OTB,
    RAFT,
    VESPO,
    ClipCov,
    GiGPO,
    KLCov,
    MaxRL,
    REINFORCEPlusPlus,
    ScaleRL,
)
from agents.algorithms import maths
from agents.policies.base import Evaluation
from tests.test_variants import (
    BETA,
    GROUP,
    LENGTHS,
    TREE,
    clipped,
    episodes,
    loss_and_gradient,
    make,
    make_rollout,
    std_advantages,
    trl_loss,
    trl_trainer,
)
from tests.tiny import make_env

TOKENS = sum(LENGTHS)


def advantages_of(eps) -> list[float]:
    return std_advantages([e.ret for e in eps])


# -- DPPO -----------------------------------------------------------------------------------------------------


def moved_by(kind: str, p: float, q: float) -> float:
    if kind == "tv":
        return abs(p - q)
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.mark.parametrize(("kind", "low", "high"), [("tv", 0.05, 0.08), ("kl", 0.01, 0.02)])
def test_dppo_stops_tokens_whose_probability_has_moved_away_by_more_than_delta(kind, low, high):
    rollout, new = make_rollout()
    agent = make(DPPO, divergence=kind, clip_range=low, clip_range_high=high)
    _, gradient = loss_and_gradient(agent, rollout, new)
    eps, stopped = episodes(rollout, new), 0
    for i, (e, advantage) in enumerate(zip(eps, advantages_of(eps), strict=True)):
        for t, (log_p, log_q, ratio) in enumerate(zip(e.new, e.old, e.ratios, strict=True)):
            moved = moved_by(kind, math.exp(log_p), math.exp(log_q))
            away = (advantage > 0) == (ratio > 1)
            stop = away and moved > (high if advantage > 0 else low)
            stopped += stop
            expected = 0.0 if stop else -ratio * advantage / TOKENS
            assert gradient[i, t] == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert 0 < stopped < TOKENS


def test_dppos_kl_is_that_of_the_old_policy_from_the_new():
    agent = make(DPPO, divergence="kl", clip_range=0.44)
    # KL(0.5 || 0.9) = 0.51 and KL(0.9 || 0.5) = 0.37 nats.
    old = torch.tensor([[0.5, 0.9]]).log()
    now = torch.tensor([[0.9, 0.5]]).log()
    rollout, _ = make_rollout()
    batch = rollout[[1]]
    batch.log_probs, batch.advantages = old, torch.tensor([[1.0, -1.0]])
    stopped = agent.clipped(batch, Evaluation(now, None, now), (now - old).exp())
    assert stopped.tolist() == [[True, False]]


def test_dppo_counts_no_ratio_for_more_than_its_bound():
    rollout, new = make_rollout()
    _, gradient = loss_and_gradient(make(DPPO, clip_range=1.0, max_ratio=1.1), rollout, new)
    eps = episodes(rollout, new)
    for i, (e, advantage) in enumerate(zip(eps, advantages_of(eps), strict=True)):
        expected = [-min(ratio, 1.1) * advantage / TOKENS for ratio in e.ratios]
        np.testing.assert_allclose(gradient[i, : e.length], expected, rtol=1e-3)


@pytest.mark.parametrize("cls", [DPPO, VESPO])
def test_a_ratio_to_an_outside_generator_is_not_corrected_for_twice(cls):
    rollout, new = make_rollout()
    shift = 0.2 * rollout.mask
    agent = make(cls)
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    ratio = agent.importance_ratio(batch, new).detach()
    batch.sampling_log_probs = batch.log_probs - shift
    steps = 1 if cls is DPPO else torch.tensor(LENGTHS)[:, None]
    expected = ratio * torch.exp(torch.tensor(0.2) * steps)
    reported = agent.importance_ratio(batch, new).detach()
    assert torch.allclose(reported[batch.mask], expected.expand_as(reported)[batch.mask], rtol=1e-4)
    assert torch.equal(agent.step_weights(batch), agent.loss_weights(batch))


# -- GPG ------------------------------------------------------------------------------------------------------


def test_gpg_makes_up_for_groups_that_are_all_alike():
    rollout, new = make_rollout()
    rollout.penalties = torch.zeros_like(rollout.penalties)
    scores = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0])
    rollout.rewards = scores[:, None] * rollout.done
    loss, _ = loss_and_gradient(make(GPG), rollout, new)
    eps = episodes(rollout, new)
    # Two groups, one of them all right: alpha = B / (B - M) = 2 / (2 - 1).
    mean = 0.25
    expected = sum(-2 * (e.ret - mean) * sum(e.new) for e in eps[4:]) / TOKENS
    assert loss == pytest.approx(expected, rel=1e-4)


# -- Clip-Cov and KL-Cov --------------------------------------------------------------------------------------


def covariances(eps) -> np.ndarray:
    log_probs = [x for e in eps for x in e.old]
    advantages = [a for e, a in zip(eps, advantages_of(eps), strict=True) for _ in e.old]
    lm, am = sum(log_probs) / TOKENS, sum(advantages) / TOKENS
    return np.array([(lp - lm) * (a - am) for lp, a in zip(log_probs, advantages, strict=True)])


def test_covariances_are_of_the_tokens_that_are_there():
    rollout, new = make_rollout()
    advantages = make(GRPO).advantages(rollout).float()
    advantages[~rollout.mask] = 7.0
    log_probs = torch.where(rollout.mask, rollout.log_probs, -9.0)
    found = maths.token_covariances(log_probs, advantages, rollout.mask)[rollout.mask]
    np.testing.assert_allclose(found.numpy(), covariances(episodes(rollout, new)), rtol=1e-3, atol=1e-6)


def test_clip_cov_leaves_out_tokens_of_high_covariance_at_random():
    rollout, new = make_rollout()
    agent = make(ClipCov, cov_share=0.2, cov_low=0.02, cov_high=0.3)
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    chosen = batch.chosen[batch.mask].numpy()
    eps = episodes(rollout, new)
    may = (covariances(eps) > 0.02) & (covariances(eps) < 0.3)
    assert chosen.sum() == int(0.2 * TOKENS) < may.sum() < TOKENS
    assert may[chosen].all()
    assert not batch.chosen[~batch.mask].any()
    again = agent.prepare_batch(batch).chosen[batch.mask].numpy()
    assert (again != chosen).any()
    losses, _ = agent.loss(batch, new)
    loss = float((losses * agent.loss_weights(batch)).sum())
    terms = np.array(
        [clipped(r, a, 0.2, 0.2) for e, a in zip(eps, advantages_of(eps), strict=True) for r in e.ratios]
    )
    assert loss == pytest.approx(terms[~again].sum() / TOKENS, rel=1e-4)


def test_kl_cov_holds_the_tokens_of_the_highest_covariance():
    rollout, new = make_rollout()
    loss, _ = loss_and_gradient(make(KLCov, cov_share=0.2, cov_kl_coef=0.7), rollout, new)
    eps = episodes(rollout, new)
    held = set(np.argsort(-covariances(eps))[: int(0.2 * TOKENS)].tolist())
    steps = [
        (r, a, n, o)
        for e, a in zip(eps, advantages_of(eps), strict=True)
        for r, n, o in zip(e.ratios, e.new, e.old, strict=True)
    ]
    terms = [-r * a + (0.7 * abs(n - o) if i in held else 0.0) for i, (r, a, n, o) in enumerate(steps)]
    assert len(held) == 4
    assert loss == pytest.approx(sum(terms) / TOKENS, rel=1e-4)


# -- ScaleRL --------------------------------------------------------------------------------------------------


def test_scale_rl_averages_over_the_prompts_whose_answers_differ():
    rollout, new = make_rollout()
    rollout.penalties = torch.zeros_like(rollout.penalties)
    scores = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0])
    rollout.rewards = scores[:, None] * rollout.done
    agent = make(ScaleRL, clip_range_high=0.3)
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    assert len(batch) == 4 and agent.logger.name_to_value["group/frac_zero_std"] == 0.5
    kept = Evaluation(new.log_probs[4:], None, new.entropy[4:])
    loss = (agent.loss(batch, kept)[0] * agent.loss_weights(batch)).sum()
    (gradient,) = torch.autograd.grad(loss, new.log_probs)
    eps = episodes(rollout, new)[4:]
    std = math.sqrt(sum((e.ret - 0.25) ** 2 for e in eps) / 3)
    tokens = sum(e.length for e in eps)
    for i, e in enumerate(eps):
        expected = [-min(ratio, 1.3) * (e.ret - 0.25) / std / tokens for ratio in e.ratios]
        np.testing.assert_allclose(gradient[4 + i, : e.length], expected, rtol=2e-3)
    assert not gradient[:4].any()


def test_scale_rl_counts_long_and_short_prompts_alike():
    rollout, _ = make_rollout()
    rollout.group = torch.arange(8) // 4
    agent = make(ScaleRL)
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    weights = agent.loss_weights(batch)
    assert [float(half.sum()) for half in weights.split(4)] == pytest.approx([0.5, 0.5])


# -- options of GRPO and its children -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("average", "loss_type"), [("sequence", "grpo"), ("token", "bnpo"), ("constant", "dr_grpo")]
)
def test_truncated_answers_belong_to_their_group_and_teach_nothing_as_in_trl(average, loss_type, tmp_path):
    rollout, new = make_rollout()
    whole, _ = make_rollout()
    cut = torch.tensor([length == 4 for length in LENGTHS])
    rollout.cut = rollout.done & cut[:, None]
    agent = make(GRPO, average=average, mask_truncated_completions=True)
    loss, gradient = loss_and_gradient(agent, rollout, new)
    assert rollout.mask.any(1).tolist() == (~cut).tolist()
    assert (gradient[cut.numpy()] == 0).all()
    assert agent.logger.name_to_value["rollout/masked_truncated"] == 3 / 8
    advantages = make(GRPO).advantages(whole)[:, 0].float()
    expected, expected_gradient, _ = trl_loss(
        trl_trainer("GRPO", tmp_path, loss_type=loss_type), rollout, new, advantages, kl=0.0
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["fused", "stepped"])
def test_a_response_is_cut_off_where_the_budget_ended_it(way):
    env = make_env(num_envs=16, max_new_tokens=6)
    agent = GRPO("auto", env, group_size=4, n_episodes=16, seed=0)
    if way == "stepped":
        agent.text_env = None
    agent._set_up_learn(1, None, None, True, False)
    rollout = agent.collect()
    ends = [int(row[n - 1]) for row, n in zip(rollout.actions, rollout.lengths, strict=True)]
    eos = agent.policy.lm.eos_ids.tolist()
    cut = rollout.cut.any(1)
    assert cut.tolist() == [end not in eos for end in ends]
    assert 0 < int(cut.sum()) < 16
    assert not (rollout.cut & ~rollout.done).any()


def test_a_time_limit_cuts_an_episode_off():
    agent = GRPO("MlpPolicy", "CartPole-v1", env_kwargs={"max_episode_steps": 12}, n_episodes=16, seed=0)
    agent._set_up_learn(1, None, None, True, False)
    rollout = agent.collect()
    cut = rollout.cut.any(1)
    assert (rollout.lengths[cut] == 12).all() and rollout.lengths[~cut].min() < 12
    assert 0 < int(cut.sum()) < 16


def entropies_like(rollout) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(rollout.mask.shape) + 0.1


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_top_entropy_tokens_alone_have_a_surrogate_and_a_bonus_as_in_trl(share, tmp_path):
    rollout, new = make_rollout()
    new = Evaluation(new.log_probs, None, entropies_like(rollout))
    agent = make(GRPO, kl_in="loss", top_entropy_quantile=share, ent_coef=0.3, entropy_average="token")
    agent.policy.evaluate = lambda _: new
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    agent.before_update(batch, fresh=True)
    weights = agent.step_weights(batch)
    losses, metrics = agent.loss(batch, new)
    loss = (losses * weights).sum()
    (gradient,) = torch.autograd.grad(loss, new.log_probs)
    trainer = trl_trainer("GRPO", tmp_path, loss_type="grpo", top_entropy_quantile=share, entropy_coef=0.3)
    expected, expected_gradient, _ = trl_loss(trainer, rollout, new, rollout.advantages[:, 0])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert 0 < int(metrics["kept"].sum()) < TOKENS


def test_gmpos_mean_is_over_the_uncertain_tokens_as_in_trl(tmp_path):
    rollout, new = make_rollout()
    new = Evaluation(new.log_probs, None, entropies_like(rollout))
    agent = make(GMPO, clip_range=0.3, top_entropy_quantile=0.6)
    agent.policy.evaluate = lambda _: new
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    agent.before_update(batch, fresh=True)
    loss = (agent.loss(batch, new)[0] * agent.step_weights(batch)).sum()
    (gradient,) = torch.autograd.grad(loss, new.log_probs)
    trainer = trl_trainer("GMPO", tmp_path, epsilon=0.3, top_entropy_quantile=0.6)
    _, expected, _ = trl_loss(trainer, rollout, new, rollout.advantages[:, 0], kl=0.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert 0 < int(batch.kept.sum()) < TOKENS


def test_the_quantile_is_torchs():
    torch.manual_seed(0)
    for count in (1, 2, 7, 30):
        x = torch.rand(3, 10).round(decimals=1)
        mask = torch.arange(30).view(3, 10) < count
        for share in (0.0, 0.1, 0.25, 0.5, 1.0):
            expected = mask & (x >= torch.quantile(x[mask], 1 - share))
            assert torch.equal(maths.top_share(x, mask, share, count), expected)


@pytest.mark.parametrize("options", [{"batch_size": 8}, {}], ids=["minibatches", "whole"])
def test_which_tokens_are_uncertain_does_not_depend_on_micro_batches(options):
    def weights(micro_batch_size):
        settings = {"n_epochs": 2, "n_episodes": 16, "learning_rate": 0.1, "top_entropy_quantile": 0.3}
        agent = make(GRPO, micro_batch_size=micro_batch_size, **settings, **options)
        agent.learn(100)
        return agent.policy.logits.detach().numpy()

    np.testing.assert_allclose(weights(3), weights(None), atol=1e-4)


def test_an_entropy_target_steers_the_bonus_as_trl_does():
    agent = make(
        GRPO, entropy_target=1.0, ent_coef=0.5, ent_coef_delta=0.2, ent_coef_max=0.8, ent_coef_min=0.4
    )
    found = []
    for entropy in (1.5, 0.9, 0.8, 0.7, 1.1, 1.2, 1.3):
        found.append((agent.ent_coef, agent._bonus))
        agent.after_update({"entropy": entropy})
    # No bonus before the first step, nor after one with an entropy above the target.
    expected = [(0.5, 0), (0.4, 0), (0.6, 0.6), (0.8, 0.8), (0.8, 0.8), (0.6, 0), (0.4, 0)]
    assert found == [pytest.approx(pair) for pair in expected]


def test_an_entropy_target_is_met_and_a_resumed_run_goes_on_with_its_coefficient(tmp_path):
    settings = {"entropy_target": 0.9, "ent_coef_delta": 0.05, "learning_rate": 0.2, "n_episodes": 16}
    settings["env_kwargs"] = TREE | {"kl_coef": 0.0}
    plain = make(GRPO, **(settings | {"entropy_target": None})).learn(1600)
    agent = make(GRPO, **settings).learn(800)
    agent.save(tmp_path)
    resumed = GRPO.load(tmp_path, env="TokenTree-v0")
    assert resumed.ent_coef == agent.ent_coef != 0.0
    for each in (agent, resumed):
        each.learn(800, reset_num_timesteps=False)
    assert torch.equal(agent.policy.logits, resumed.policy.logits)
    assert -plain.latest["train/entropy_loss"] < 0.4
    assert -agent.latest["train/entropy_loss"] == pytest.approx(0.9, abs=0.2)


def test_methods_that_divide_scores_add_the_divergence_at_its_own_size():
    rollout, _ = make_rollout()
    agent = make(MaxRL, f_divergence_type="js_divergence")
    ratio = (rollout.log_probs - rollout.ref_log_probs).mul(rollout.mask).sum(1).exp().double()
    charged = BETA * (2 * ratio / (1 + ratio)).log()
    groups = charged.view(2, GROUP)
    expected = (groups.mean(1, keepdim=True) - groups).view(-1)
    assert agent.kl_advantages(rollout).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("cls", [REINFORCEPlusPlus, OTB, GiGPO])
def test_methods_that_credit_tokens_take_no_divergence_of_responses(cls):
    with pytest.raises(TypeError, match="takes no f_divergence_type"):
        make(cls, f_divergence_type="js_divergence")


def f_of(kind: str, alpha: float, w: torch.Tensor) -> torch.Tensor:
    """The generators of the divergences, as their papers define them."""
    if kind == "js_divergence":
        return w * w.log() - (w + 1) * ((w + 1) / 2).log()
    if kind == "reverse_kl" or alpha == 1.0:
        return w * w.log()
    if alpha == 0.0:
        return -w.log()
    return (w**alpha - alpha * w - (1 - alpha)) / (alpha * (alpha - 1))


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [("js_divergence", 0.0), *(("alpha_divergence", alpha) for alpha in (0.0, 0.5, 1.0, 2.0))],
)
def test_a_response_is_charged_what_gives_the_exact_gradient_of_an_f_divergence(kind, alpha):
    world = {"vocab_size": 3, "horizon": 2, "num_prompts": 1, "kl_coef": BETA}
    options = {"f_divergence_type": kind, "f_alpha_divergence_coef": alpha}
    agent = make(GRPO, env_kwargs=world, n_episodes=512, n_envs=512, **options)
    with torch.no_grad():
        agent.policy.logits.add_(
            torch.linspace(-0.5, 0.5, agent.policy.logits.numel()).view_as(agent.policy.logits)
        )
    agent._set_up_learn(1, None, None, True, False)
    rollout = agent.collect()
    responses = [tuple(row[:n].tolist()) for row, n in zip(rollout.actions, rollout.lengths, strict=True)]
    rollout = rollout[[responses.index(each) for each in sorted(set(responses))]]
    log_pi = (agent.policy.evaluate(rollout).log_probs * rollout.mask).sum(1).double()
    log_ref = (rollout.ref_log_probs * rollout.mask).sum(1).double()
    assert float(log_pi.exp().sum()) == pytest.approx(1.0, abs=1e-5), "every response is there once"
    scores = agent.scores_before_kl(rollout)
    divergence = (log_ref.exp() * f_of(kind, alpha, (log_pi - log_ref).exp())).sum()
    objective = (log_pi.exp() * scores).sum() - BETA * divergence
    (exact,) = torch.autograd.grad(objective, agent.policy.logits, retain_graph=True)
    surrogate = (log_pi.exp().detach() * agent.episode_scores(rollout) * log_pi).sum()
    (estimated,) = torch.autograd.grad(surrogate, agent.policy.logits)
    torch.testing.assert_close(estimated, exact, rtol=1e-4, atol=1e-6)
    assert float(exact.abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("idle", "beside"),
    [
        ({"kl_loss_estimator": "k2"}, {"kl_in": "loss"}),
        ({"ref_model_sync_steps": 4}, {"sync_ref_model": True}),
        ({"f_alpha_divergence_coef": 0.5}, {"f_divergence_type": "alpha_divergence"}),
        ({"entropy_average": "token"}, {"ent_coef": 0.1}),
        ({"ent_coef_max": 0.5}, {"entropy_target": 1.0}),
    ],
)
def test_an_option_whose_other_half_is_missing_is_told_to_do_nothing(idle, beside, recwarn):
    with pytest.warns(UserWarning, match="".join(idle)):
        make(GRPO, **idle)
    recwarn.clear()
    if beside != {"sync_ref_model": True}:  # which this world, without a language model, refuses
        make(GRPO, **idle, **beside)
        assert not [w for w in recwarn if "".join(idle) in str(w.message)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"delta": 1.1}, "above 1 \\+ clip_range_high = 1.2"),
        ({"delta": 1.25, "clip_range_high": 0.28}, "1.28"),
        ({"off_policy_mask_threshold": -1.0}, "off_policy_mask_threshold"),
        ({"top_entropy_quantile": 1.5}, "share of tokens"),
        ({"entropy_target": float("nan")}, "entropy_target"),
        ({"ent_coef_min": 0.5, "ent_coef_max": 0.1}, "ent_coef_min"),
        ({"average": "prompt", "entropy_average": "token"}, "entropy_average"),
        ({"f_divergence_type": "js_divergence", "kl_in": "loss"}, "kl_in"),
        ({"f_divergence_type": "kl"}, "f_divergence_type"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        make(GRPO, **options)


@pytest.mark.parametrize("cls", [VESPO, GPG, KLCov])
def test_a_method_without_a_clip_takes_no_clip(cls):
    with pytest.raises(TypeError, match="takes no clip_range"):
        make(cls, clip_range=0.2)


def test_a_mean_over_prompts_counts_groups_alike_and_their_tokens_alike():
    rollout, _ = make_rollout()
    weights = maths.loss_weights(rollout.mask, "prompt", group=torch.arange(8) // 4)
    first, second = sum(LENGTHS[:4]), sum(LENGTHS[4:])
    assert weights[0, 0] == pytest.approx(1 / first / 2) and weights[4, 3] == pytest.approx(1 / second / 2)
    assert float(weights.sum()) == pytest.approx(1.0)


# -- the best of n --------------------------------------------------------------------------------------------


def with_scores(scores):
    rollout, new = make_rollout()
    rollout.penalties = torch.zeros_like(rollout.penalties)
    rollout.rewards = torch.tensor(scores, dtype=torch.float64)[:, None] * rollout.done
    return rollout, new


@pytest.mark.parametrize(
    ("scores", "least", "imitated"),
    [
        ([0, 2, 1, 2, 0.5, 0.1, 0.2, 0.9], None, [1, 7]),
        ([0, 2, 1, 2, 0.5, 0.1, 0.2, 0.9], 1.0, [1]),
        ([0, 0, 0, 0, 0, 0, 1, 0], 1.0, [6]),
        ([0, 0, 0, 0, 0, 0, 1, 0], None, [0, 6]),
    ],
)
def test_the_best_answer_of_each_group_is_imitated_and_no_other(scores, least, imitated):
    rollout, new = with_scores(scores)
    agent = make(RAFT, min_score=least)
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    assert len(batch) == len(imitated)
    kept = Evaluation(new.log_probs[imitated], None, new.entropy[imitated])
    loss = float((agent.loss(batch, kept)[0] * agent.loss_weights(batch)).sum().detach())
    eps = [episodes(with_scores(scores)[0], new)[i] for i in imitated]
    assert loss == pytest.approx(-sum(sum(e.new) for e in eps) / sum(e.length for e in eps), rel=1e-4)


def test_where_no_answer_is_good_enough_nothing_is_imitated():
    rollout, new = with_scores([0] * 8)
    loss, gradient = loss_and_gradient(make(RAFT, min_score=1.0), rollout, new)
    assert loss == 0.0 and not gradient.any()


def test_an_answer_without_a_score_is_not_imitated():
    rollout, _ = with_scores([0, -1, -1, -1, 0, 0, 1, 0])
    rollout.scored = rollout.mask.clone()
    rollout.scored[0] = False
    agent = make(RAFT)
    assert agent.prepare_rollout(rollout).advantages.any(1).sum() == 2
    assert int(rollout.advantages.any(1).nonzero()[0]) == 1
