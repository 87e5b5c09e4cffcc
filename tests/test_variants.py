"""Every variant against its paper's formula, in plain Python, and against TRL's own trainers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from agents import (
    CISPO,
    DAPO,
    DPPO,
    GMPO,
    GPG,
    GRPO,
    GSPO,
    LUSPO,
    RAFT,
    REINFORCE,
    RLOO,
    SAPO,
    VESPO,
    ClipCov,
    DrGRPO,
    KLCov,
    REINFORCEPlusPlus,
    ScaleRL,
    TabularPolicy,
)
from agents.algorithms.maths import group_advantages, masked_mean
from agents.cli import main
from agents.policies.factory import Evaluation
from agents.rollouts.rollout import Rollout, concatenate
from tests.tiny import make_env, make_model, make_tokenizer
from textrl_env.lm.sequences import right_padded

VARIANTS = [RLOO, REINFORCEPlusPlus, DrGRPO, DAPO, GSPO, CISPO]
VARIANTS += [SAPO, DPPO, GMPO, LUSPO, VESPO, GPG, ClipCov, KLCov, ScaleRL, RAFT]
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


def test_reinforce_is_the_reward_to_go_less_that_of_the_others_at_the_same_step():
    rollout, new = make_rollout()
    settings = {"n_episodes": len(LENGTHS), "n_envs": len(LENGTHS), "seed": 0, "gamma": 1.0}
    agent = REINFORCE(TabularPolicy, "TokenTree-v0", env_kwargs=TREE, **settings)
    loss, gradient = loss_and_gradient(agent, rollout, new)
    eps, terms = episodes(rollout, new), []
    to_go = [[sum(e.rewards[t:]) for t in range(e.length)] for e in eps]
    for i, e in enumerate(eps):
        for t in range(e.length):
            others = [to_go[j][t] for j, other in enumerate(eps) if j != i and other.length > t]
            advantage = to_go[i][t] - sum(others) / len(others)
            terms.append(-e.new[t] * advantage)
            assert gradient[i, t] == pytest.approx(-advantage / sum(LENGTHS), rel=1e-4, abs=1e-6)
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)


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

#: Ours, its arguments, and TRL's: the trainer's name and the settings that say the same.
TRL = {
    "grpo": (GRPO, {}, "GRPO", {"loss_type": "grpo"}),
    "bnpo": (GRPO, {"average": "token"}, "GRPO", {"loss_type": "bnpo"}),
    "dr_grpo": (DrGRPO, {}, "GRPO", {"loss_type": "dr_grpo"}),
    "dapo": (DAPO, {}, "GRPO", {"loss_type": "dapo", "epsilon_high": 0.28}),
    "cispo": (CISPO, {"clip_range_high": 0.5}, "GRPO", {"loss_type": "cispo", "epsilon_high": 1.5}),
    "gspo": (
        GSPO,
        {"clip_range": 0.1, "clip_range_high": 0.15},
        "GRPO",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.1,
            "epsilon_high": 0.15,
        },
    ),
    "rloo": (RLOO, {}, "RLOO", {}),
}
#: Losses without a clip, or with another one.
WITHOUT_PPOS_CLIP = {
    "delta": (GRPO, {"delta": 1.5}, "GRPO", {"loss_type": "grpo", "delta": 1.5}),
    "off-policy mask": (
        GRPO,
        {"off_policy_mask_threshold": 0.05},
        "GRPO",
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    ),
    "sapo": (SAPO, {}, "GRPO", {"loss_type": "sapo"}),
    "vespo": (VESPO, {}, "GRPO", {"loss_type": "vespo"}),
    "luspo": (
        LUSPO,
        {"clip_range": 0.1, "clip_range_high": 0.15},
        "GRPO",
        {
            "loss_type": "luspo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.1,
            "epsilon_high": 0.15,
        },
    ),
    "gmpo": (GMPO, {"clip_range": 0.3}, "GMPO", {"epsilon": 0.3}),
}
each_clip_of_trl = pytest.mark.parametrize("name", TRL)
each_loss_of_trl = pytest.mark.parametrize("name", TRL | WITHOUT_PPOS_CLIP)


def trl_trainer(kind: str, folder, **settings):
    """TRL's own trainer around a tiny model, not trained: it is asked for its loss alone."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    if kind != "RLOO":
        # Its default multiplies the KL by the ratio (DeepSeek-V3.2); the papers here do not.
        settings = {"use_bias_correction_kl": False} | settings
    if kind == "GMPO":
        trl = pytest.importorskip("trl.experimental.gmpo")
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=len(LENGTHS),
        num_generations=GROUP,
        max_completion_length=max(LENGTHS),
        beta=0.0,  # otherwise it looks for the model on the hub, to have a reference
        **settings,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=copy.deepcopy(make_model("llama")),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b c"}]),
        processing_class=make_tokenizer(),
    )
    trainer.model.eval()
    return trainer


def trl_loss(trainer, rollout: Rollout, new: Evaluation, advantages: torch.Tensor, kl: float = BETA):
    """TRL's loss of the same tensors, its gradient by the log-probabilities, and what it logs."""
    trainer.beta = kl
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (new.log_probs, new.entropy, None)
    mask = rollout.mask.long()
    ones = torch.ones(len(mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": rollout.actions,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": rollout.log_probs,
        "old_logps": (rollout.log_probs * mask).sum(1),
        "ref_per_token_logps": rollout.ref_log_probs,
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, new.log_probs)
    return (
        loss.item(),
        gradient.numpy(),
        {name: values[-1] for name, values in trainer._metrics["eval"].items()},
    )


@each_loss_of_trl
def test_losses_gradients_and_kl_are_those_of_trls_trainers(name, tmp_path):
    cls, ours, kind, theirs = (TRL | WITHOUT_PPOS_CLIP)[name]
    rollout, new = make_rollout()
    agent = make(cls, **ours, **({} if cls is RLOO else {"kl_in": "loss"}))
    loss, gradient = loss_and_gradient(agent, rollout, new)
    advantages = rollout.advantages[:, 0]
    expected, expected_gradient, logged = trl_loss(
        trl_trainer(kind, tmp_path, **theirs), rollout, new, advantages
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    scale = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6 * scale)
    if cls is not RLOO:  # whose KL is in the reward, here as there
        _, metrics = agent.loss(rollout, new)
        assert float(masked_mean(metrics["kl_loss"], rollout.mask)) == pytest.approx(logged["kl"], rel=1e-5)
    if cls is GMPO:
        shares = masked_mean(metrics["clip_fraction"], rollout.mask)
        assert 0 < float(shares) == pytest.approx(logged["clip_ratio/region_mean"], rel=1e-5)


@each_clip_of_trl
def test_the_steps_that_a_clip_lets_go_are_those_that_trl_counts(name, tmp_path):
    cls, ours, kind, theirs = TRL[name]
    rollout, new = make_rollout()
    agent = make(cls, **ours)
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    ratio = agent.importance_ratio(batch, new)
    _, _, logged = trl_loss(trl_trainer(kind, tmp_path, **theirs), rollout, new, rollout.advantages[:, 0])
    if cls is CISPO:
        # Its clip keeps the gradient and bounds the weight, so compare the weight with the ratio.
        (gradient,) = torch.autograd.grad(agent.policy_loss(batch, new, ratio).sum(), new.log_probs)
        bounded = (-gradient / batch.advantages < ratio - 1e-6) & (batch.advantages > 0)
        assert (
            0 < float(masked_mean(bounded.float(), rollout.mask)) == pytest.approx(logged["cispo_clip_ratio"])
        )
        return
    free = ratio.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(agent.policy_loss(batch, new, free).sum(), free)
    let_go, mask = (gradient == 0) & (batch.advantages != 0), rollout.mask
    if cls in (RLOO, GSPO):  # one ratio for a response, so a response counts as one
        let_go, free, mask = let_go[:, :1], free[:, :1], mask[:, :1]
    for side, where in (("low", free < 1), ("high", free > 1), ("region", free > 0)):
        share = float(masked_mean((let_go & where).float(), mask))
        assert share == pytest.approx(logged[f"clip_ratio/{side}_mean"], rel=1e-5)
    assert 0 < share < 1


def test_log_probs_and_entropies_of_a_response_are_those_of_trls_trainer(tmp_path):
    agent = GRPO("auto", make_env(num_envs=2), group_size=GROUP, n_episodes=len(LENGTHS), seed=0)
    (rollout,) = caught_rollouts(agent)
    trainer = trl_trainer("GRPO", tmp_path)
    sequences = rollout.inputs["sequences"]
    # It wants prompts that end, and responses that begin, in one column.
    prompts = np.fliplr(right_padded([prompt[::-1] for prompt in sequences.prompts]))
    lengths = sequences.first[:, None]
    real = np.concatenate([np.arange(prompts.shape[1])[::-1] < lengths, sequences.mask()], axis=1)
    ids = torch.from_numpy(np.concatenate([prompts, right_padded(sequences.responses)], axis=1))
    attention = torch.from_numpy(real).long()
    log_probs, entropy, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, attention, rollout.mask.shape[1], compute_entropy=True
    )
    said = agent.policy.evaluate(rollout)
    for ours, theirs in ((said.log_probs, log_probs), (said.entropy, entropy)):
        torch.testing.assert_close(ours[rollout.mask], theirs[rollout.mask], atol=1e-5, rtol=1e-5)


# -- all of them ----------------------------------------------------------------------------------------------


@every_variant
def test_the_first_ratio_is_one_and_equal_returns_give_a_finite_step(cls):
    agent = make(cls, env_kwargs={"vocab_size": 2, "horizon": 1, "num_prompts": 1, "kl_coef": 0.0})
    agent.learn(1)
    assert agent.latest["val/ratio"] == pytest.approx(1)
    assert agent.latest["train/approx_kl"] == pytest.approx(0, abs=1e-7)
    if cls is RAFT:  # which takes out all rows but the best
        return
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


@every_variant
def test_a_variant_that_is_resumed_ends_with_bitwise_the_same_weights(cls, tmp_path):
    agent = make(cls, learning_rate=0.05, n_epochs=2).learn(40)
    agent.save(tmp_path)
    torch.manual_seed(12345)  # the resumed run is in another process
    resumed = cls.load(tmp_path, env="TokenTree-v0")
    for each in (agent, resumed):
        each.learn(40, reset_num_timesteps=False)
    assert torch.equal(agent.policy.logits, resumed.policy.logits)


@every_variant
def test_every_variant_finds_the_best_arm_of_every_context(cls):
    agent = cls(
        "auto",
        "ToyBandit-v0",
        learning_rate=3e-2,
        n_episodes=64,
        n_envs=64,
        seed=0,
        env_kwargs={"contexts": 2, "arms": 5},
    ).learn(2000)
    means = agent.envs.unwrapped.dynamics.means
    chosen, _ = agent.predict(np.arange(2), deterministic=True)
    assert chosen.tolist() == means.argmax(1).tolist()


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


def _with_scores(scores):
    """The random rollout with these scores in place of its own, its KL kept."""
    rollout, _ = make_rollout()
    score = torch.tensor(scores, dtype=torch.float32)[:, None] * rollout.done
    rollout.rewards = score - rollout.penalties
    return rollout


def test_a_group_that_the_reward_does_not_tell_apart_keeps_its_kl_at_its_own_size():
    rollout = _with_scores([0, 0, 0, 0, 1, 0, 0, 1])
    agent = make(GRPO)
    advantages = agent.advantages(rollout)
    kl = rollout.penalties.sum(1)
    expected = -(kl[:4] - kl[:4].mean())
    assert advantages[:4, 0] == pytest.approx(expected, abs=1e-6)
    returns = rollout.rewards.sum(1)[4:]
    assert advantages[4:, 0] == pytest.approx((returns - returns.mean()) / (returns.std() + 1e-4), abs=1e-5)


@pytest.mark.parametrize("level", [0.0, 1.0, -3e3])
def test_the_log_counts_groups_of_equal_scores_whatever_their_kl(level):
    agent = make(GRPO)
    agent.advantages(_with_scores([level] * 4 + [level, level + 1, level, level]))
    assert agent.logger.name_to_value["group/frac_zero_std"] == 0.5
    assert agent.logger.name_to_value["group/reward_std"] == pytest.approx(0.25, abs=1e-3)


def test_small_differences_of_large_scores_are_differences():
    agent = make(GRPO)
    agent.advantages(_with_scores([1e6, 1e6 + 1, 1e6 + 2, 1e6] * 2))
    assert agent.logger.name_to_value["group/frac_zero_std"] == 0.0


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, -1e6])
def test_group_advantages_do_not_depend_on_what_is_added_to_every_reward(offset):
    scores = torch.tensor([0.0, 1.0, 2.0, 1.0]) + offset
    # (r - mean) / (std + 1e-4) by hand: mean 1, std sqrt(2 / 3)
    expected = [-1.22459, 0.0, 1.22459, 0.0]
    assert group_advantages(scores, 4).tolist() == pytest.approx(expected, abs=1e-3)
    assert group_advantages(torch.full((4,), 0.1) + offset, 4).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("agent", "flag", "why"),
    [
        ("reinforce++", "--group-size", "REINFORCEPlusPlus takes no --group-size: 1 is part of the method"),
        ("rloo", "--scale", "RLOO takes no --scale: 'leave-one-out' is part of the method"),
        ("raft", "--clip-range", "RAFT takes no --clip-range: it has no ratio to clip"),
        ("ppo", "--kl-in", "PPO takes no --kl-in, which is of GRPO"),
    ],
)
def test_a_flag_that_others_have_is_refused_with_the_reason(agent, flag, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--agent", agent, flag, "2", "--total-timesteps", "8"]) == 2
    assert why in capsys.readouterr().err
