"""Claims about defaults by what is trained, schedules, weight decay, accumulation and long prompts."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE, RLOO, Agent, presets
from agents.algorithms.schedules import LR_SCHEDULERS, lr_multiplier
from agents.cli import main
from agents.offline.dpo import dpo
from agents.offline.reward_model import train_reward_model
from agents.offline.sft import sft
from agents.policies.causal_lm import ValueHead
from agents.runs.logs import read_progress
from agents.runs.registry import AGENTS, find_agent
from tests.tiny import PROMPTS, make_env, make_lm, make_model, make_tokenizer
from textrl_env import embedded
from textrl_env.envs.text_rlhf import TextRLHFEnv

LORA = {"policy_kwargs": {"lora_rank": 2}}


def rates(cls, env="TextRLHF-v0", **kwargs):
    return cls("auto", env, seed=0, n_episodes=8, **kwargs).learning_rate


# -- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "full", "lora"), [(GRPO, 1e-6, 1e-5), (RLOO, 1e-6, 1e-5), (PPO, 3e-6, 3e-5)])
def test_a_model_of_ones_own_gets_the_rates_of_the_field(cls, full, lora):
    assert rates(cls, make_env(1)) == full
    assert rates(cls, make_env(1), **LORA) == lora


def test_networks_and_the_embedded_world_keep_the_rates_they_were_tuned_with():
    assert rates(GRPO) == 1e-3 and rates(PPO) == 3e-4 and rates(REINFORCE) == 1e-3
    assert PPO("MlpPolicy", "CartPole-v1").learning_rate == 3e-4
    assert GRPO("MlpPolicy", "ToyBandit-v0").learning_rate == 1e-3
    agent = GRPO("auto", "TextRLHF-v0", n_episodes=8)
    assert (
        agent.preset == "embedded"
        and agent.lr_scheduler_type == "constant"
        and agent.micro_batch_size is None
    )


def test_what_was_fine_tuned_from_the_embedded_model_counts_as_embedded():
    env = TextRLHFEnv(
        model=str(embedded.path("base")), reward=lambda prompts, completions: [0.0], prompts=["what is 2?"]
    )
    assert rates(GRPO, env) == 1e-3 and env.unwrapped.max_new_tokens == embedded.MAX_NEW_TOKENS


def test_what_was_given_stays_zero_and_none_too():
    agent = GRPO(
        "auto", make_env(1), learning_rate=0.0, micro_batch_size=None, warmup_ratio=0.0, n_episodes=8, seed=0
    )
    assert agent.learning_rate == 0.0 and agent.micro_batch_size is None and agent.warmup_ratio == 0.0
    before = {n: w.clone() for n, w in agent.policy.state_dict().items()}
    agent.learn(40)
    assert all(torch.equal(w, before[n]) for n, w in agent.policy.state_dict().items())


def test_an_agent_of_ones_own_keeps_the_default_that_it_declares():
    class Own(GRPO):
        def __init__(self, policy, env, learning_rate=0.25, **kwargs):
            super().__init__(policy, env, learning_rate, **kwargs)

    class Bare(Agent):
        whole_episodes = True

    assert rates(Own, make_env(1)) == 0.25
    assert rates(Bare, make_env(1)) == 1e-6


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_has_a_row_and_its_help_names_the_defaults(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    cls = find_agent(name)
    assert presets.default("learning_rate", cls, "full") == (3e-6 if issubclass(cls, PPO) else 1e-6)
    assert main(["train", "--agent", name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1e-05 for LoRA" in shown or "3e-05 for LoRA" in shown
    assert all(agent in shown for agent in AGENTS)


def test_a_checkpoint_keeps_the_defaults_it_was_trained_with(tmp_path, monkeypatch):
    GRPO("auto", make_env(1), n_episodes=8, seed=0).save(tmp_path)
    changed = presets.ByModel(1.0, 1.0, 1.0, 1.0)
    monkeypatch.setitem(presets.DEFAULTS["learning_rate"], "GRPO", changed)
    assert GRPO.load(tmp_path, make_env(1)).learning_rate == 1e-6
    assert GRPO.load(tmp_path, make_env(1), learning_rate=0.5).learning_rate == 0.5
    assert GRPO("auto", make_env(1), n_episodes=8).learning_rate == 1.0


@pytest.mark.parametrize(
    "layers, hidden, inner, budget, rows", [(30, 576, 1536, 256, 11), (2, 16, 24, 6, 50_000)]
)
def test_rows_of_a_gradient_step_are_what_memory_bears(layers, hidden, inner, budget, rows):
    config = SimpleNamespace(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner)
    config.get_text_config = lambda: config
    space = {"input_ids": SimpleNamespace(shape=(budget + 40,))}
    policy = SimpleNamespace(
        lm=SimpleNamespace(model=SimpleNamespace(config=config)), observation_space=space
    )
    fitting = presets.fitting_rows(policy)
    # 4 GiB over 4 bytes, the layers, 8 hidden and 4 inner vectors, and the tokens of a row.
    per_row = 4 * layers * (8 * hidden + 4 * inner) * (budget + 40)
    assert fitting * per_row <= 4 * 2**30 < (fitting + 1) * per_row
    assert fitting == rows if rows < 100 else fitting >= rows


# -- the command line ---------------------------------------------------------------------------------------


def test_the_command_line_has_pythons_defaults_prints_them_and_writes_them_down(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    make_model("llama").save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    (tmp_path / "prompts.txt").write_text("a\nb c\nd e f g\nh i a b c d\n")
    (tmp_path / "own_reward.py").write_text(
        "def r(prompts, completions): return [float(len(c)) for c in completions]\n"
    )
    line = ["train", "--no-progress", "--agent", "grpo", "--model", "model", "--reward", "own_reward.py:r"]
    line += ["--prompts", "prompts.txt", "--total-timesteps", "20", "--n-episodes", "8"]
    line += ["--max-prompt-length", "4", "--too-long", "skip", "--group-size", "4", "--run-dir", "run"]
    with pytest.warns(UserWarning, match="1 of 4 prompts have more than 4 tokens and are left out"):
        assert main(line) == 0
    shown = capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())["in_force"]
    assert config["trained"]["preset"] == "full" and config["trained"]["trained_weights"] > 0
    assert config["agent"]["learning_rate"] == 1e-6 and config["agent"]["lr_scheduler_type"] == "cosine"
    # The model's context is 48, so 44 tokens are left beside prompts of 4.
    assert config["env"]["max_new_tokens"] == 44 and config["env"]["prompts_skipped"] == 1
    rows = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert ["learning_rate", "1e-06", "preset"] in rows and ["group_size", "4", "given"] in rows
    assert config["policy"] == {
        "lora_rank": None,
        "save_dtype": "float32",
        "autocast": False,
        "gradient_checkpointing": False,
    }
    assert ["save_dtype", "float32"] in rows and ["gradient_checkpointing", "off"] in rows
    assert ["max_new_tokens", "44"] in rows and ["prompts_skipped", "1"] in rows
    assert "GRPO trains every weight of a language model" in shown


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("prompt", ["a b", [{"role": "user", "content": "a b"}]], ids=["text", "messages"])
def test_texts_for_a_model_with_a_chat_template_are_hinted_at(chat, prompt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model("llama").save_pretrained("model")
    tokenizer = make_tokenizer()
    if chat or not isinstance(prompt, str):
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained("model")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
    (tmp_path / "own_reward.py").write_text("def r(prompts, completions): return [0.0] * len(completions)\n")
    line = ["train", "--no-progress", "--agent", "grpo", "--model", "model", "--reward", "own_reward.py:r"]
    line += ["--prompts", "prompts.jsonl", "--max-new-tokens", "4", "--total-timesteps", "1"]
    line += ["--n-episodes", "2", "--group-size", "2", "--learning-rate", "0.001", "--run-dir", "run"]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert ("write them as messages" in " ".join(shown.split())) == (chat and isinstance(prompt, str))
    rows = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert ["learning_rate", "0.001", "given"] in rows
    assert ["lr_scheduler_type", "constant", "given", "rate"] in rows


def rate_of_the_first_step(train, model, rows, **settings):
    found = []

    def note(step, metrics):
        found.append(metrics["learning_rate"])
        return False

    settings |= {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "device": "cpu"}
    train(model, rows, callback=note, **settings)
    return found[0]


@pytest.mark.parametrize("verb", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("what", ["embedded", "full", "lora"])
def test_trainers_on_files_have_one_default_rate_in_python_and_on_the_command_line(
    verb, what, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_model("llama").save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    prompt, right, wrong = ("what is 2 plus 3?", "5.", "7.") if what == "embedded" else ("a", "b", "c")
    rows = [{"prompt": prompt, "completion": right}] * 2
    if verb != "sft":
        rows = [{"prompt": prompt, "chosen": right, "rejected": wrong}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"sft": sft, "reward": train_reward_model, "dpo": dpo}[verb]
    model = embedded.path("sft") if what == "embedded" else "model"
    lora = {"lora_rank": 2} if what == "lora" else {}
    wanted = getattr(presets.ON_FILES[verb]["learning_rate"], what)
    assert rate_of_the_first_step(train, model, rows, **lora) == wanted
    assert rate_of_the_first_step(train, model, rows, learning_rate=0.0, **lora) == 0
    line = [verb, "--model", str(model), "--data", "rows.jsonl", "--output", "out", "--warmup-ratio", "0"]
    line += ["--lr-scheduler-type", "constant", *(["--lora-rank", "2"] if lora else [])]
    assert main(line) == 0
    assert read_progress(tmp_path / "out" / "logs")["train/learning_rate"][0] == pytest.approx(wanted)


# -- prompts and budget -------------------------------------------------------------------------------------


def test_a_response_may_have_256_tokens_and_24_in_the_embedded_world():
    roomy = make_lm(seed=7)
    roomy.model.config.max_position_embeddings = 4096
    assert make_env(lm=roomy, max_new_tokens=None).unwrapped.max_new_tokens == 256
    with pytest.warns(UserWarning, match="max_new_tokens is 42 and not 256"):
        assert make_env(max_new_tokens=None).unwrapped.max_new_tokens == 42
    assert TextRLHFEnv().max_new_tokens == embedded.MAX_NEW_TOKENS == 24


def test_long_prompts_are_left_out_with_their_columns_and_counted():
    rows = [{"prompt": p, "k": i} for i, p in enumerate(PROMPTS[::-1])]  # the long ones come first
    seen = []

    def reward(prompts, completions, k):
        seen.extend(zip(prompts, k, strict=True))
        return [0.0] * len(prompts)

    with pytest.warns(UserWarning, match="2 of 4 prompts have more than 3 tokens and are left out"):
        env = make_env(1, prompts=rows, reward=reward, max_prompt_length=3, too_long="skip")
    assert env.num_prompts == 2 and env.dynamics.prompts_skipped == 2
    GRPO("auto", env, n_episodes=8, group_size=4, seed=0).learn(1)
    assert set(seen) <= {("a", 3), ("b c", 2)} and seen


def test_long_prompts_are_cut_to_their_last_tokens():
    with pytest.warns(
        UserWarning, match="1 of 4 prompts have more than 4 tokens: the model sees their last 4"
    ):
        env = make_env(prompts=PROMPTS, max_prompt_length=4, too_long="cut")
    dynamics = env.unwrapped.dynamics
    words = [dynamics.lm.tokenizer.decode(tokens) for tokens in dynamics.prompt_tokens]
    assert words == ["a", "b c", "d e f g", "a b c d"] and dynamics.prompts_cut == 1


def test_without_a_length_prompts_are_long_that_leave_no_room_in_the_context():
    with pytest.warns(UserWarning, match="1 of 4 prompts have more than 4 tokens"):
        env = make_env(prompts=PROMPTS, max_new_tokens=44, too_long="skip")
    assert env.unwrapped.num_prompts == 3


def test_prompts_that_are_all_too_long_are_an_error():
    with pytest.raises(ValueError, match="all 4 prompts have more than 1 tokens"):
        make_env(prompts=["a b", "c d e", "f g", "h i"], max_prompt_length=1, too_long="skip")
    with pytest.raises(ValueError, match="too_long"):
        make_env(too_long="drop")


# -- the learning rate on its way -----------------------------------------------------------------------------


def test_a_cosine_rises_over_its_warmup_and_falls_to_zero():
    multiplier = lr_multiplier("cosine", 0.1)
    assert [multiplier(x) for x in (0.0, 0.05, 0.1)] == pytest.approx([0.0, 0.5, 1.0])
    for done in (0.3, 0.55, 0.9, 1.0):
        assert multiplier(done) == pytest.approx(0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)), abs=1e-3)


def test_every_scheduler_of_the_list_is_one_of_transformers_and_stays_in_bounds():
    extra = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1}}
    extra["warmup_stable_decay"] = {"num_decay_steps": 1000}
    for name in LR_SCHEDULERS:
        multiplier = lr_multiplier(name, 0.1, extra.get(name))
        values = [multiplier(x) for x in np.linspace(0, 1, 11)]
        assert min(values) >= 0 and max(values) == pytest.approx(1.0) and values[0] < values[1], name


def test_a_run_logs_the_rate_of_its_scheduler_at_the_middle_of_each_rollout():
    env = make_env(1, max_new_tokens=1)
    settings = {"learning_rate": 0.1, "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "n_epochs": 1}
    agent = REINFORCE("auto", env, n_episodes=8, seed=0, **settings)
    logged = []
    agent.learn(32, callback=lambda seen, _: logged.append(agent.optimizer.param_groups[0]["lr"]) or True)
    logged.append(agent.optimizer.param_groups[0]["lr"])
    assert logged[1:] == pytest.approx([0.1 * (1 - share) for share in (1 / 8, 3 / 8, 5 / 8, 7 / 8)])


def test_warmup_steps_are_gradient_steps():
    agent = PPO(
        "auto",
        make_env(1),
        n_episodes=8,
        batch_size=4,
        n_epochs=2,
        warmup_steps=6,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        seed=0,
    )
    seen = []
    step = agent.optimizer.step
    agent.optimizer.step = lambda: (seen.append(agent.optimizer.param_groups[0]["lr"]), step())
    agent.learn(60)
    assert seen[:8] == pytest.approx([0.1 * k / 6 for k in (1, 2, 3, 4, 5, 6, 6, 6)])


def test_two_schedules_of_one_rate_are_refused_and_a_given_one_turns_the_default_off():
    agent = GRPO("auto", make_env(1), learning_rate="linear:1e-5", n_episodes=8)
    assert agent.lr_scheduler_type == "constant"
    with pytest.raises(ValueError, match=r"linear:1e-5.*lr_scheduler_type='cosine'"):
        GRPO("auto", make_env(1), learning_rate="linear:1e-5", lr_scheduler_type="cosine", n_episodes=8)
    with pytest.raises(ValueError, match=r"warmup_ratio=0\.1 and warmup_steps=3"):
        GRPO("auto", make_env(1), warmup_ratio=0.1, warmup_steps=3, n_episodes=8)
    with pytest.raises(ValueError, match="cosinus"):
        GRPO("auto", make_env(1), lr_scheduler_type="cosinus", n_episodes=8)


# -- decay and accumulation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy, env", [("auto", None), ("MlpPolicy", "ToyBandit-v0")])
def test_weight_decay_shrinks_matrices_and_leaves_vectors_alone(policy, env):
    settings = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "n_episodes": 8}
    agent = REINFORCE(
        policy,
        make_env(1, reward=lambda prompts, completions: [0.0] * len(prompts), kl_coef=0.0)
        if env is None
        else env,
        weight_decay=0.5,
        seed=0,
        **settings,
    )
    agent.advantages = lambda rollout: torch.zeros_like(rollout.rewards)
    before = {n: w.detach().clone() for n, w in agent.policy.named_parameters()}
    agent.learn(1)
    for name, weight in agent.policy.named_parameters():
        expected = before[name] * 0.95 if weight.ndim >= 2 else before[name]
        torch.testing.assert_close(weight.detach(), expected, msg=name)


def test_accumulated_passes_are_one_step_on_all_their_rows():
    def weights(**settings):
        agent = PPO("auto", make_env(1), n_episodes=8, n_epochs=1, learning_rate=0.01, seed=0, **settings)
        widths = []
        evaluate = agent.policy.evaluate
        agent.policy.evaluate = lambda rollout: (widths.append(len(rollout)), evaluate(rollout))[1]
        agent.learn(1)
        return torch.cat([w.detach().flatten() for w in agent.policy.parameters()]), agent, widths

    whole, agent, _ = weights(batch_size=8)
    parts, accumulated, widths = weights(batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(
        whole, parts, rtol=0, atol=1e-5
    )  # a step is 1e-2, and Adam divides by the gradient
    assert agent.n_gradient_steps == accumulated.n_gradient_steps == 1 and widths[-4:] == [2] * 4
    split, alone, widths = weights(batch_size=None, gradient_accumulation_steps=2)
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-5)
    assert alone.n_gradient_steps == 1 and widths[-2:] == [4, 4]


# -- the critic -----------------------------------------------------------------------------------------------


def critic_of(agent):
    return [p.detach().clone() for p in agent.policy.critic_parameters()]


def actor_of(agent):
    critic = {id(p) for p in agent.policy.critic_parameters()}
    return [p.detach().clone() for p in agent.policy.parameters() if id(p) not in critic]


def moved(before, after):
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def ppo(policy="auto", env=None, **kwargs):
    return PPO(
        policy, make_env(1) if env is None else env, **({"n_episodes": 8, "n_epochs": 2, "seed": 0} | kwargs)
    )


@pytest.mark.parametrize("critic", ["head", "shared", "separate"])
def test_a_critic_learns_alone_while_the_policy_waits_for_it(critic):
    agent = ppo(critic=critic, critic_warmup=2, learning_rate=1e-2, ent_coef=0.1, warmup_ratio=0.0)
    actor, own = actor_of(agent), critic_of(agent)
    agent.learn(1)
    agent.learn(1, reset_num_timesteps=False)
    assert not moved(actor, actor_of(agent)) and moved(own, critic_of(agent))
    agent.learn(1, reset_num_timesteps=False)
    assert moved(actor, actor_of(agent))


def test_an_mlps_critic_can_be_waited_for_too():
    agent = PPO("MlpPolicy", "CartPole-v1", n_steps=32, n_epochs=1, critic_warmup=1, critic="shared", seed=0)
    actor = actor_of(agent)
    agent.learn(32)
    assert not moved(actor, actor_of(agent))
    agent.learn(32, reset_num_timesteps=False)
    assert moved(actor, actor_of(agent))


def test_the_value_head_has_a_rate_of_its_own_on_text_and_networks_do_not():
    agent = ppo()
    rates_of = {group["critic"]: group["lr"] for group in agent.optimizer.param_groups}
    assert rates_of == {False: 3e-6, True: presets.DEFAULTS["critic_learning_rate"]["Agent"].full}
    assert ppo(critic="separate").critic_learning_rate == 1e-5
    assert {group["lr"] for group in ppo(critic_learning_rate=None).optimizer.param_groups} == {3e-6}
    assert len(PPO("MlpPolicy", "CartPole-v1").optimizer.param_groups) == 1


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_no_critic_is_slower_than_a_policy_whose_rate_was_given(critic):
    assert ppo(critic=critic, learning_rate=0.02).critic_learning_rate == 0.02
    schedule = ppo(critic=critic, learning_rate=lambda left: 0.02 * left)
    assert schedule.critic_learning_rate == 0.02
    assert ppo(critic=critic, learning_rate=0.02, critic_learning_rate=1e-4).critic_learning_rate == 1e-4


def test_an_mlps_critic_can_have_a_rate_of_its_own():
    settings = {"n_steps": 32, "n_epochs": 1, "seed": 0}
    agent = PPO("MlpPolicy", "CartPole-v1", critic_learning_rate=0.0, **settings)
    own, actor = critic_of(agent), actor_of(agent)
    agent.learn(32)
    assert not moved(own, critic_of(agent)) and moved(actor, actor_of(agent))


def test_an_error_of_the_values_does_not_shorten_the_policys_step():
    def actor(scale):
        agent = ppo(learning_rate=1e-2, critic_warmup=0, vf_coef=scale, max_grad_norm=0.01, n_epochs=1)
        agent.learn(1)
        return actor_of(agent)

    assert not moved(actor(0.5), actor(1e4))


def test_the_critic_learns_whole_returns_and_the_policy_the_estimate():
    agent = ppo(gae_lambda=0.5, critic_warmup=0)
    assert agent.critic_gae_lambda == 1.0
    torch.nn.init.normal_(agent.policy.value_head.out.weight)
    agent.learn(1)
    rollout = agent.collect()
    assert rollout.values.abs().max() > 0.1
    prepared = agent.prepare_rollout(rollout)
    returns = (rollout.rewards * rollout.mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(
        prepared.returns[rollout.mask], returns[rollout.mask].float(), rtol=0, atol=1e-5
    )
    half = agent.estimate_advantages(rollout, 0.5)
    torch.testing.assert_close(
        prepared.advantages[rollout.mask], half[rollout.mask].float(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("width", [16, 576])
def test_one_rate_fits_value_heads_of_any_width(width):
    torch.manual_seed(0)
    states = torch.randn(512, width)
    target = torch.tanh(states[:, :4].sum(1)).abs()  # no linear function of the states

    def unexplained(head):
        optimizer = torch.optim.Adam(head.parameters(), lr=3e-3, eps=1e-5)
        for _ in range(300):
            loss = (head(states).squeeze(-1) - target).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach() / target.var())

    assert (ValueHead(width, 64)(states) == 0).all()
    assert unexplained(ValueHead(width, 64)) < 0.3
