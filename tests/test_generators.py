"""Whoever generated, the policy says what the log-probabilities are; what does not fit the prompts is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE, CausalLMPolicy
from agents.algorithms.importance import importance_weights
from agents.cli import main
from agents.parallel.processes import Processes
from agents.rollouts.episode_log import EpisodeLog
from agents.runs import run_directory as runs
from tests.off_generator import OffGenerator
from tests.tiny import EOS, WORDS, id_sum, make_env, make_lm
from textrl_env.envs.text_game import TextGameEnv
from textrl_env.envs.text_rlhf import TextRLHFEnv
from textrl_env.generators import Generated, GeneratorError, Sampling, make_generator
from textrl_env.generators.answers import ask
from textrl_env.generators.sampling import check_knobs, limit_logits
from textrl_env.lm import POLICY, Sequences, generate
from textrl_env.lm.slot_decoder import SlotDecoder

GAP = "sampling/sampling_logp_difference"
RATIO = "sampling/importance_sampling_ratio"


class Reports(CausalLMPolicy):
    """Generates as the policy does and reports log-probabilities that are ``shift`` off, as lists."""

    shift = 0.0

    def generate(self, prompts, max_new_tokens, deterministic=False):
        responses, log_probs = super().generate(prompts, max_new_tokens, deterministic)
        return responses, [row + self.shift for row in log_probs]


class AsSequences(Reports):
    """The same, as one batch of sequences."""

    def generate(self, prompts, max_new_tokens, deterministic=False):
        return Sequences.from_responses(prompts, *super().generate(prompts, max_new_tokens, deterministic))


class Rewritten(CausalLMPolicy):
    """What our own decoder has written, with other log-probabilities put beside it."""

    def generate(self, prompts, max_new_tokens, deterministic=False):
        made = super().generate(prompts, max_new_tokens, deterministic)
        return made.with_values(log_probs=made.log_probs + Reports.shift)


@pytest.fixture
def warned(monkeypatch):
    """Warnings about the generator."""
    texts = []
    monkeypatch.setattr("agents.rollouts.episode_log.warn", texts.append)
    return texts


def make_agent(policy="CausalLMPolicy", cls=GRPO, lm=None, env=None, **kwargs):
    env = make_env(lm=lm or make_lm(), kl_coef=0.5) if env is None else env
    kwargs = {"n_episodes": 8, "seed": 0} | ({"group_size": 4} if cls is GRPO else {}) | kwargs
    return cls(policy, env, **kwargs)


def learn_twice(agent):
    """What two updates of a policy that starts as its reference log last."""
    agent.learn(1)
    agent.learn(1, reset_num_timesteps=False)
    return agent.latest


def with_engine(engine, **kwargs):
    return make_agent(policy_kwargs={"generator": engine} | kwargs.pop("policy_kwargs", {}), **kwargs)


def standing_still(monkeypatch):
    """No update changes the policy, which so stays its reference."""
    monkeypatch.setattr("agents.base.Agent.train", lambda self, rollout: None)


@pytest.mark.parametrize("policy", [Reports, AsSequences, Rewritten, OffGenerator(shift=-9.0)])
def test_another_generators_log_probs_are_the_policys_own_and_the_kl_is_charged_by_those(
    policy, monkeypatch, warned
):
    standing_still(monkeypatch)
    monkeypatch.setattr(Reports, "shift", -9.0)
    agent = make_agent(policy) if isinstance(policy, type) else with_engine(policy)
    latest = learn_twice(agent)
    assert latest["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert latest["objective/rlhf_reward"] == pytest.approx(latest["objective/scores"], abs=1e-3)
    assert latest[f"{GAP}/mean"] == pytest.approx(9, abs=1e-3)
    assert latest[f"{GAP}/max"] == pytest.approx(9, abs=1e-3)
    assert len(warned) == 1 and "9 nats from the policy's" in warned[0]


def test_nothing_is_corrected_by_log_probs_that_nothing_can_have_been_drawn_with(warned):
    honest, shifted = (make_agent(cls, seed=1, policy_kwargs={}) for cls in (CausalLMPolicy, Rewritten))
    Reports.shift = -9.0
    try:
        rollouts = [agent.learn(1) and agent for agent in (honest, shifted)]
    finally:
        Reports.shift = 0.0
    assert "nothing is corrected: too many tokens are far likelier" in warned[0]
    weights = [dict(agent.policy.named_parameters()) for agent in rollouts]
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-6)


@pytest.mark.parametrize("engine", [None, OffGenerator()], ids=["in the policy", "outside"])
def test_a_generator_that_agrees_is_measured_and_not_warned_about(engine, warned):
    latest = learn_twice(make_agent(Reports) if engine is None else with_engine(engine))
    assert latest[f"{GAP}/max"] == pytest.approx(0, abs=1e-5) and not warned
    for name in ("min", "mean", "max"):
        assert latest[f"{RATIO}/{name}"] == pytest.approx(1, abs=1e-4)


def test_our_own_decoder_is_believed_and_costs_no_further_pass(monkeypatch):
    calls = []
    evaluate = CausalLMPolicy.evaluate
    monkeypatch.setattr(CausalLMPolicy, "evaluate", lambda self, r: calls.append(len(r)) or evaluate(self, r))
    latest = learn_twice(make_agent())
    assert not [name for name in latest if name.startswith("sampling/")]
    assert calls == [8, 8]  # one in each of two updates


def test_a_gap_that_is_no_number_is_warned_about(warned):
    EpisodeLog(10).note_generator({f"{GAP}/mean": (float("nan"), max)}, "so what")
    assert len(warned) == 1


# -- the protocol ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [GRPO, PPO, REINFORCE])
def test_on_the_first_minibatch_the_ratio_is_one_whoever_generated(cls, warned):
    latest = learn_twice(with_engine(OffGenerator(temperature=1.5), cls=cls))
    if cls is not REINFORCE:
        assert latest["val/ratio"] == pytest.approx(1, abs=1e-5 if cls is GRPO else 0.05)
    assert latest[f"{GAP}/mean"] > 0.05 and "corrected by importance_sampling_mode" in warned[0]


def test_weights_are_pushed_before_the_first_rollout_and_after_every_update():
    engine = OffGenerator()
    agent = with_engine(engine, learning_rate=1e-2)
    learn_twice(agent)
    assert len(engine.received) == 2
    agent.policy.generate([np.array([3])], 2)
    agent.policy.generate([np.array([3])], 2)
    assert len(engine.received) == 3
    for name, weight in agent.policy.model.state_dict().items():
        assert torch.equal(weight, engine.received[-1][name])
    assert not torch.equal(engine.received[0]["lm_head.weight"], engine.received[1]["lm_head.weight"])


class SecondOfTwo(Processes):
    """As the second of two processes sees them, with nobody there to talk to."""

    are_several, is_main = True, False

    def on_main(self, work):
        self.left_to_main = work


@pytest.mark.parametrize("serves_many", [True, False])
def test_of_several_processes_the_main_one_alone_gives_one_server_its_weights(serves_many):
    engine = OffGenerator()
    engine.serves_many = serves_many
    group = SecondOfTwo()
    policy = with_engine(engine).policy
    policy.hand_over(group)
    policy.hand_over(group)
    assert len(engine.received) == (0 if serves_many else 1)
    assert hasattr(group, "left_to_main") == serves_many


def test_an_adapter_is_pushed_merged():
    engine = OffGenerator()
    agent = with_engine(engine, learning_rate=1e-2, policy_kwargs={"lora_rank": 2})
    latest = learn_twice(agent)
    assert latest[f"{GAP}/max"] == pytest.approx(0, abs=1e-4)
    before, after = (weights["model.layers.0.mlp.up_proj.weight"] for weights in engine.received)
    assert not torch.equal(before, after)


def test_a_generator_that_lags_behind_is_off_from_the_second_update_on():
    agent = with_engine(OffGenerator(stale=1), learning_rate=1e-2)
    agent.learn(1)
    assert agent.latest[f"{GAP}/max"] == pytest.approx(0, abs=1e-5)
    agent.learn(1, reset_num_timesteps=False)
    assert agent.latest[f"{GAP}/max"] > 1e-3


def test_a_generator_is_asked_for_what_the_environment_and_the_model_say_with_a_new_seed_each_time():
    engine = OffGenerator()
    learn_twice(with_engine(engine, lm=make_lm(temperature=0.7)))
    first, second = engine.asked
    assert (first.max_new_tokens, first.eos_ids, first.vocab_size) == (6, (EOS,), len(WORDS))
    assert first.temperature == 0.7 and not first.truncated
    assert first.seed != second.seed


def test_two_runs_with_one_seed_are_equal_with_an_outside_generator_too():
    ends = [learn_twice(with_engine(OffGenerator(noise=0.1)))["objective/scores"] for _ in range(2)]
    assert ends[0] == ends[1]


def test_what_goes_on_from_several_turns_keeps_who_wrote_what():
    given = Sequences.from_spans([[(0, [3, 4]), (1, [5]), (2, [6])], [(0, [7])]])
    lm = make_lm()
    engine = OffGenerator()
    engine.update_weights(lm.model)
    made = ask(engine, given, Sampling(3, (EOS,)), "off")
    assert np.array_equal(made[0].tokens[:4], [3, 4, 5, 6])
    assert made[0].written_by[:5].tolist() == [0, 0, 1, 2, 1]


class Talks:
    """A game that answers twice and ends."""

    def reset(self, seed=None, **row):
        self.turns = 0
        return "a b", {}

    def step(self, text):
        self.turns += 1
        return "c", float("b" in text), self.turns == 2, False, {}


def test_a_conversation_is_written_turn_by_turn_and_cut_where_a_text_ends_the_turn():
    env = TextGameEnv(game=Talks, model=make_lm(), max_new_tokens=5, max_length=24, stop=["b"], kl_coef=0.1)
    engine = OffGenerator(temperature=1.3)
    rollouts = []
    agent = with_engine(engine, env=env)
    agent.train = rollouts.append
    agent.learn(1)
    sequences = rollouts[0].inputs["sequences"]
    assert len(engine.asked) == 2 and agent.latest[f"{GAP}/mean"] > 0.01
    own = sequences.log_probs[sequences.policy]
    assert np.allclose(own, agent.policy.lm.log_probs(sequences), atol=1e-4)
    at = sequences.policy[sequences.actions == WORDS.index("b")]
    inside = at[at + 1 < len(sequences.tokens)]
    assert len(at) and not (sequences.written_by[inside + 1] == POLICY).any()
    assert rollouts[0].sampling_log_probs.shape == rollouts[0].mask.shape


def test_a_generator_is_named_by_its_module_too():
    made, name = make_generator("tests.off_generator:OffGenerator", {"shift": 1.0})
    assert isinstance(made, OffGenerator) and made.shift == 1.0 and name.endswith("OffGenerator")
    assert make_generator("native") == (None, "native")


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("vlm", {}, ValueError, "generator='vlm' is not known"),
        ("tests.off_generator:OfGenerator", {}, ValueError, "OffGenerator"),
        ("tests.off_generator:OffGenerator", {"shft": 1}, TypeError, "shift"),
        (object(), {}, TypeError, "without generate and update_weights"),
        (OffGenerator, {}, TypeError, "give an object of it"),
        ("native", {"shift": 1}, ValueError, "arguments are for an engine"),
        (OffGenerator(), {"shift": 1}, ValueError, "made already"),
    ],
)
def test_what_is_no_generator_is_refused_by_name(spec, options, error, message):
    with pytest.raises(error, match=message):
        make_generator(spec, options)


def test_a_generator_beside_an_environment_that_is_stepped_is_refused():
    with pytest.raises(ValueError, match="generator in policy_kwargs wants an environment that runs whole"):
        with_engine(OffGenerator(), env=_stepped())


def _stepped():
    from gymnasium.wrappers import TransformReward

    return TransformReward(make_env(lm=make_lm()), lambda reward: 2 * reward)


# -- what comes back ---------------------------------------------------------------------------------------------


class Returns:
    """Answers with whatever it was given."""

    def __init__(self, answers):
        self.answers = answers

    def update_weights(self, model):
        pass

    def generate(self, prompts, sampling):
        return self.answers(prompts) if callable(self.answers) else self.answers


def broken(prompts):
    raise ConnectionError("connection refused")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (broken, "failed while it wrote 2 responses: ConnectionError: connection refused"),
        (([[3, 0]], [[-1.0, -1.0]]), "got 2 prompts and returned 1 responses"),
        (([[3, 0], [0]], [[-1.0, -1.0]]), "got 2 prompts and returned 1 log-probability arrays"),
        (([[3, 0], []], [[-1.0, -1.0], []]), "returned 0 tokens for prompt 1"),
        (([[3, 0], [3] * 5], None), "returned 5 tokens for prompt 1; expected between 1 and max_new_tokens=4"),
        (([[3, 0], [3, 12, 0]], None), "returned the token id 12 for prompt 1; the model has 0 to 11"),
        (([[3, 0], [3, -1, 0]], None), "returned the token id -1 for prompt 1"),
        (([[3, 0], [3, 0, 3, 3]], None), "went on after the end token 0 in response 1"),
        (([[3, 0], [3, 3]], None), "cut response 1 off after 2 tokens, with no end token and a budget of 4"),
        (([[3, 0], [0]], [[-1.0, -1.0], [math.nan]]), "log-probability nan in response 1, which is not finite"),
        (([[3, 0], [0]], [[-1.0, None], [-1.0]]), "log-probability nan in response 0, which is not finite"),
        (([[3, 0], [0]], [[-1.0, -1.0], [0.5]]), "log-probability 0.5 in response 1, which is above 0"),
        (([[3, 0], [0]], [[-1.0], [-1.0]]), "returned 2 tokens and log-probabilities of shape"),
        (([[3, 0], [0]], None, ["eos", "length"]), "response 1 was stopped by 'length', but its last token 0"),
        (([[3.0, 0.0], [0]], None), "returned float64 of shape"),
        ("text", "a pair .responses, log_probs. or Sequences, and returned a str"),
        (Sequences.from_responses([[4], [5]], [[0], [0]]), "does not go on from prompt 0: given .3., returned .4, 0."),
        (Sequences.from_responses([[3]], [[0]]), "got 2 prompts and returned 1 responses"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_one_clear_error(answers, message):
    with pytest.raises(GeneratorError, match=f"the generator it .*{message}"):
        ask(Returns(answers), [np.array([3]), np.array([4])], Sampling(4, (EOS,), 12), "it")


@pytest.mark.parametrize(
    "answers",
    [
        ([[3, 0], [3, 3, 3, 3]], None),
        Generated([[3, 0], [3, 3, 3, 3]], None, ["eos", "length"]),
        ([np.array([3, 0]), np.full(4, 3)], [[-1, -2], [-1e-4, 1e-4, -3, -4]]),
        Sequences.from_responses([[3], [4]], [[3, 0], [3] * 4]),
    ],
)
def test_answers_come_in_several_forms_with_and_without_log_probs(answers):
    made = ask(Returns(answers), [np.array([3]), np.array([4])], Sampling(4, (EOS,), 12), "it")
    assert [row.tolist() for row in made.responses] == [[3, 0], [3, 3, 3, 3]] and not made.native


def test_a_generator_without_log_probs_is_learned_from_and_nothing_is_said_of_its_distance():
    engine = OffGenerator()
    silent = engine.generate
    engine.generate = lambda prompts, sampling: silent(prompts, sampling)._replace(log_probs=None)
    latest = learn_twice(with_engine(engine))
    assert math.isfinite(latest["train/grad_norm"]) and f"{GAP}/mean" not in latest


def test_a_generator_that_dies_in_the_middle_loses_nothing(tmp_path):
    engine = OffGenerator()
    agent = with_engine(engine, n_episodes=8)
    config = {"save_every": 10**9, "keep": 1, "total_timesteps": 10**6, "log_interval": 1}
    config |= dict.fromkeys(("agent", "policy", "env"), "") | {"guards": False}
    config |= {name: {} for name in ("env_kwargs", "policy_kwargs", "agent_kwargs")} | {"seed": 0}
    alive = engine.generate
    engine.generate = lambda *a: broken(a) if len(engine.asked) == 2 else alive(*a)
    with pytest.raises(GeneratorError, match="connection refused") as caught:
        runs.train(agent, tmp_path, config)
    (saved,) = tmp_path.glob("checkpoint-*")
    assert f"saved as it was before this rollout: {saved}" in caught.value.__notes__[0]
    resumed = GRPO.load(saved, env=make_env(lm=make_lm(), kl_coef=0.5))
    assert resumed.n_updates == 2 and resumed.num_timesteps == int(saved.name.partition("-")[2])


def test_from_the_command_line_and_back_after_an_interruption(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_lm().model.save_pretrained("model")
    make_lm().tokenizer.save_pretrained("model")
    (tmp_path / "prompts.txt").write_text("a\nb c\n")
    world = [
        "--model",
        "model",
        "--prompts",
        "prompts.txt",
        "--reward",
        "tests.tiny:count_a",
        "--max-new-tokens",
        "4",
    ]
    flags = [
        *world,
        "--agent",
        "grpo",
        "--n-episodes",
        "8",
        "--group-size",
        "4",
        "--no-progress",
        "--no-guards",
    ]
    engine = ["--generator", "tests.off_generator:OffGenerator", "--importance-sampling-mode", "token_mask"]
    assert (
        main(["train", *flags, *engine, "--top-k", "5", "--total-timesteps", "40", "--run-dir", "run"]) == 0
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["policy_kwargs"] == {"generator": engine[1], "sampling": {"top_k": 5}}
    assert "importance_sampling_ratio" in (tmp_path / "run" / "progress.csv").read_text()
    resume = ["train", "--no-progress", "--resume", "run", "--total-timesteps", "80"]
    assert main(resume) != 0
    assert "tests.off_generator" in capsys.readouterr().err  # a file's word for it is not followed
    allowed = ["--allow-module", "tests.off_generator", "--allow-module", "tests.tiny"]
    assert main([*resume, *allowed]) == 0
    assert main(["train", *flags, "--generator", "vlm", "--run-dir", "other"]) != 0
    assert "generator='vlm' is not known" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# -- transformers' continuous batching -------------------------------------------------------------------------------


def asked_of_transformers(lm, times=1, **knobs):
    """What it wrote, the same each time, and by how much its log-probabilities are above the model's own."""
    engine, _ = make_generator("transformers")
    engine.update_weights(lm.model)
    sampling = Sampling(6, (EOS,), lm.vocab_size, seed=3, **knobs)
    before = torch.get_rng_state()
    made, *others = (ask(engine, PROMPTS, sampling, "transformers") for _ in range(times))
    assert torch.equal(before, torch.get_rng_state()), "the run's own stream was moved"
    assert all(np.array_equal(made.tokens, again.tokens) for again in others)
    return made, made.log_probs[made.policy] - lm.log_probs(made)


PROMPTS = [np.array([3]), np.array([4, 5]), np.array([6, 7, 8])] * 10


def test_transformers_continuous_batching_reports_what_the_model_says():
    made, above = asked_of_transformers(make_lm(temperature=0.7, extra_vocab=5), 2, temperature=0.7)
    assert np.abs(above).max() < 1e-4
    assert set(made.lengths) != {7} and made.tokens.max() < len(WORDS)


def test_transformers_continuous_batching_renormalises_what_is_left():
    lm = make_lm()
    made, above = asked_of_transformers(lm, top_k=3, min_p=0.2)
    assert above.min() > -1e-4 and above.max() > 0.1
    limit = limit_logits(Sampling(6, (EOS,), 12, top_k=3, min_p=0.2))
    for i in (0, 1, 2):
        prompt, response = made.prompts[i], made.responses[i]
        logits = SlotDecoder(lm, 1, 12).prefill(np.array([0]), [prompt])
        wanted = limit(logits, 0).log_softmax(-1)[0, response[0]]
        assert made[i].log_probs[len(prompt)] == pytest.approx(float(wanted), abs=1e-4)


def test_an_agent_learns_from_transformers_continuous_batching(warned):
    env = make_env(lm=make_lm(), reward=id_sum)
    agent = make_agent(policy_kwargs={"generator": "transformers"}, env=env, learning_rate=1e-2)
    before = agent.policy.model.lm_head.weight.clone()
    latest = learn_twice(agent)
    assert latest[f"{GAP}/max"] == pytest.approx(0, abs=1e-4) and not warned
    assert agent.n_gradient_steps == 2 and not torch.equal(before, agent.policy.model.lm_head.weight)


def test_what_transformers_continuous_batching_cannot_do_is_refused():
    engine, _ = make_generator("transformers")
    with pytest.raises(GeneratorError, match="cannot do min_new_tokens"):
        ask(engine, PROMPTS, Sampling(6, (EOS,), 12, min_new_tokens=2), "transformers")
    with pytest.raises(TypeError, match="max_memory"):
        make_generator("transformers", {"max_memory": 1})


# -- sampling that is cut ------------------------------------------------------------------------------------------


def reported(knobs, temperature=1.0):
    """A batch written by our own decoder, and for each token the acting probabilities ``[V]`` where it was drawn."""
    lm = make_lm(temperature=temperature)
    sampling = Sampling(6, (EOS,), lm.vocab_size, **({"temperature": temperature} | knobs))
    prompts = [np.array([3]), np.array([4, 5]), np.array([6, 7, 8])] * 20
    made = generate(
        lm, prompts, 6, torch.Generator().manual_seed(0), limit=limit_logits(sampling, temperature)
    )
    rows = []
    for prompt, response in zip(prompts, made.responses, strict=True):
        for t in range(len(response)):
            logits = SlotDecoder(lm, 1, 12).prefill(np.array([0]), [np.append(prompt, response[:t])])
            rows.append((t, response[t], logits[0].double().softmax(-1).numpy()))
    return made, rows


@pytest.mark.parametrize(
    ("knobs", "kept"),
    [
        ({"top_k": 3}, lambda p, t: p >= np.sort(p)[-3]),
        ({"top_p": 0.6}, lambda p, t: np.cumsum(np.sort(p)[::-1])[np.argsort(np.argsort(-p))] - p < 0.6),
        ({"min_p": 0.3}, lambda p, t: p >= 0.3 * p.max()),
        ({"min_new_tokens": 3}, lambda p, t: (np.arange(len(p)) != EOS) | (t >= 3)),
    ],
)
def test_what_is_reported_is_the_log_prob_of_what_was_sampled_among_what_was_left(knobs, kept):
    made, rows = reported(knobs)
    for (t, token, probs), log_prob in zip(rows, made.log_probs[made.policy], strict=True):
        left = kept(probs, t)
        assert left[token]
        assert log_prob == pytest.approx(np.log(probs[token] / probs[left].sum()), abs=1e-4)
    assert not made.native


def test_a_generators_own_temperature_replaces_the_models():
    made, rows = reported({"temperature": 0.5}, temperature=2.0)
    for (_, token, probs), log_prob in zip(rows, made.log_probs[made.policy], strict=True):
        sharper = probs ** (2.0 / 0.5)
        assert log_prob == pytest.approx(np.log(sharper[token] / sharper.sum()), abs=1e-4)


def test_an_agent_charges_and_learns_by_the_whole_distribution_where_sampling_was_cut(monkeypatch, warned):
    standing_still(monkeypatch)
    latest = learn_twice(make_agent(policy_kwargs={"sampling": {"top_k": 2}}))
    assert latest["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert latest[f"{GAP}/mean"] > 0.05
    assert latest[f"{RATIO}/max"] <= 1 + 1e-4  # a token that is left is never likelier under the policy


def test_settings_that_cut_nothing_are_our_own_sampling():
    assert limit_logits(Sampling(6, (EOS,), 12)) is None
    assert limit_logits(Sampling(6, (EOS,), 12, temperature=0.7), 0.7) is None


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.0}, "min_p must be"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"top_q": 1}, "no setting 'top_q'. .*top_"),
        ({"stop": ["x"]}, "the environment ends episodes"),
        ({"max_new_tokens": 3}, "the response budget is the environment's"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_with_the_reason(knobs, message):
    with pytest.raises(ValueError, match=message):
        check_knobs(knobs)


def test_a_minimum_that_leaves_no_room_for_an_end_is_refused():
    with pytest.raises(
        ValueError, match=r"min_new_tokens=6 leaves no room for an end below .* max_new_tokens=6"
    ):
        make_agent(policy_kwargs={"sampling": {"min_new_tokens": 6}})


def test_a_cut_that_was_asked_for_is_named_as_what_makes_the_difference(warned):
    far = {f"{GAP}/mean": (0.3, max)}
    EpisodeLog(10).note_generator(far, "so what", {"top_p": 0.9, "top_k": 5})
    assert "Sampling by top_p=0.9, top_k=5 is from another distribution than the policy's" in warned[-1]


@pytest.mark.parametrize("name", ["sampling", "generator", "lora_rank"])
def test_a_network_takes_nothing_that_is_for_language_models(name):
    with pytest.raises(TypeError, match=f"MlpPolicy takes no {name}: that is for language models"):
        PPO("MlpPolicy", "ToyBandit-v0", policy_kwargs={name: 1})


def test_stop_strings_are_refused_with_the_reason():
    with pytest.raises(TypeError, match=r"takes no stop: a response ends by an end token or its budget"):
        TextRLHFEnv(stop=["."])


# -- importance weights --------------------------------------------------------------------------------------------


def test_weights_by_hand():
    log_ratio = torch.tensor([[0.0, math.log(2)], [math.log(6), 5.0], [math.log(0.25), math.log(0.5)]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    expected = {
        "token_truncate": [[1, 2], [3, 1], [0.25, 0.5]],
        "token_mask": [[1, 2], [0, 1], [0, 0.5]],
        "sequence_truncate": [[2, 2], [3, 3], [0.125, 0.125]],
        "sequence_mask": [[2, 2], [0, 0], [0, 0]],
    }
    for mode, weights in expected.items():
        low = 1 / 3 if mode.endswith("mask") else None
        found = importance_weights(log_ratio, mask, mode, 3.0, low)
        assert torch.allclose(found[mask], torch.tensor(weights, dtype=torch.float)[mask]), mode


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_every_term_of_the_loss_is_weighted(mode, warned):
    agent = with_engine(OffGenerator(temperature=2.0), importance_sampling_mode=mode)
    rollouts = []
    agent.train = rollouts.append
    agent.learn(1)
    batch = agent.prepare_rollout(rollouts[0])
    log_ratio = batch.log_probs - batch.sampling_log_probs
    low = 1 / 3 if mode.endswith("mask") else None
    weights = importance_weights(log_ratio, batch.mask, mode, 3.0, low)
    assert torch.allclose(agent.step_weights(batch), agent.loss_weights(batch) * weights)
    assert not torch.allclose(weights[batch.mask], torch.ones(()))
    assert agent.step_weights(batch[torch.tensor([2, 0])]).shape[0] == 2
    agent.importance_sampling_mode = None
    assert torch.equal(agent.step_weights(batch), agent.loss_weights(batch))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"importance_sampling_mode": "tokens"}, "token_truncate"),
        ({"importance_sampling_clip_max": 0.5}, "clip_max must be at least 1"),
        ({"importance_sampling_clip_min": 2.0}, "clip_min between 0 and 1"),
    ],
)
def test_a_correction_that_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_agent(**kwargs)


# -- at the environment's boundary -------------------------------------------------------------------------------


def test_an_environment_takes_sequences_and_pairs_alike():
    env = make_env(lm=make_lm())
    made = []
    first = env.run_episodes(lambda prompts: made.append(generate(env.lm, prompts, 6)) or made[0], [3, 0, 3])
    second = env.run_episodes(lambda prompts: tuple(made[0]), [3, 0, 3])
    for name in ("tokens", "mask", "log_prob", "ref_logprob", "kl", "rewards", "score"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert first.sequences.native and not second.sequences.native
    assert first.sequences.rewards.sum() == pytest.approx(first.rewards.sum())


def returned(change):
    """What an environment says to a generator whose sequences have been changed."""
    env = make_env(lm=make_lm())
    env.run_episodes(lambda prompts: change(generate(env.lm, prompts, 6), prompts), [3, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda made, prompts: made[:1], ValueError, "got 2 prompts and returned 1 sequences"),
        (lambda made, prompts: made[[1, 0]], ValueError, r"does not go on from prompt 0: given \[.*\], returned \["),
        (lambda made, prompts: made.with_values(log_probs=None), ValueError, "without log_probs"),
        (lambda made, prompts: Sequences.from_responses(prompts, [[3], []], [[-1.0], []]), ValueError, "episode 1"),
        (lambda made, prompts: Sequences.from_responses(prompts, [[3] * 7, [3]], [[-1.0] * 7, [-1.0]]), ValueError,
         "7 tokens for episode 0; expected between 1 and max_new_tokens=6"),
        (lambda made, prompts: made.responses, ValueError, "responses and . log-probability arrays"),
        (lambda made, prompts: "text", TypeError, "must return Sequences or a pair .* got str"),
        (lambda made, prompts: (made.responses, [[-1.0], [-1.0] * 3]), ValueError, "expected equally many"),
    ],
)  # fmt: skip
def test_what_does_not_fit_what_was_asked_for_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        returned(change)
