"""LoRA: the policy is its reference plus an adapter, over the same weights."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agents import GRPO, PPO, REINFORCE
from agents.cli import main
from agents.evaluation.evaluation import evaluate_policy
from agents.policies.causal_lm import CausalLMPolicy
from agents.runs import run_directory as runs
from tests.test_checkpoint import assert_bitwise
from tests.tiny import count_a, id_sum, make_env, make_lm, make_model, make_tokenizer, random_sequences
from textrl_env.lm.causal_lm import CausalLM

AGENTS = {"PPO": PPO, "REINFORCE": REINFORCE, "GRPO": GRPO}
SEQUENCES = random_sequences([3, 5, 2, 4]), random_sequences([4, 6, 1, 3], seed=1)

VALUE_HEAD = {f"value_head.{layer}.{what}" for layer in ("hidden", "out") for what in ("weight", "bias")}


def make(agent: str = "GRPO", env=None, lora: dict | None = None, **kwargs):
    env = make_env(kl_coef=0.1, reward=id_sum) if env is None else env
    settings = {"n_episodes": 16, "seed": 0, "learning_rate": 1e-2}
    settings |= {"group_size": 4} if agent == "GRPO" else {}
    settings |= {"batch_size": 8, "n_epochs": 2} if agent == "PPO" else {}
    policy_kwargs = {"autocast": False, "lora_rank": 2} | (lora or {})
    return AGENTS[agent]("CausalLMPolicy", env, **(settings | {"policy_kwargs": policy_kwargs} | kwargs))


def make_policy(lm: CausalLM, **kwargs) -> CausalLMPolicy:
    env = make_env(lm=lm)
    kwargs = {"critic": None, "lora_rank": 2} | kwargs
    return CausalLMPolicy(env.observation_space, env.action_space, model=lm, **kwargs)


def stir(policy: CausalLMPolicy) -> CausalLMPolicy:
    """Give the adapter something to say."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    policy.weights_changed()
    return policy


def adapter_names(policy) -> set[str]:
    return {name for name, _ in policy.named_parameters() if "lora_" in name}


def in_bfloat16() -> CausalLM:
    return make_lm().in_bfloat16()


@pytest.mark.parametrize(
    "lm",
    [make_lm(), make_lm("gpt2"), make_lm("mistral"), in_bfloat16()],
    ids=["llama", "gpt2", "mistral", "bfloat16"],
)
def test_a_policy_starts_as_its_reference_to_the_bit(lm):
    policy = make_policy(lm)
    expected, got = (model.response_log_probs(*SEQUENCES) for model in (lm, policy.lm))
    assert (got == expected).all()
    env = make_env(lm=lm, kl_coef=1.0, max_new_tokens=6)
    policy.generator = torch.Generator().manual_seed(0)

    def replay(prompts):
        responses, _ = policy.generate(prompts, 6)
        rows = policy.lm.response_log_probs(prompts, responses)
        return responses, [row[: len(r)] for row, r in zip(rows, responses, strict=True)]

    assert (env.run_episodes(replay, np.arange(8) % env.num_prompts).kl == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_stepping_costs_no_kl_before_the_first_update_and_some_after_it(autocast):
    lm = CausalLM(make_model("llama"), make_tokenizer(), autocast=autocast)
    env = make_env(3, lm=lm, kl_coef=1.0)
    policy = make_policy(lm)
    policy.generator = torch.Generator().manual_seed(0)
    env.bind_policy(policy.log_prob)

    def kl_of_steps() -> np.ndarray:
        observation, _ = env.reset(seed=0)
        said = []
        for _ in range(8):
            observation, _, terminated, _, infos = env.step(policy.act(observation)[0])
            ended, running = infos.get("final_info", {}).get("kl"), infos.get("kl")
            said += [(ended if done else running)[slot] for slot, done in enumerate(terminated)]
        return np.array(said)

    assert (kl_of_steps() == 0).all()
    stir(policy)
    assert np.abs(kl_of_steps()).mean() > 0.05


def test_the_policy_shares_its_weights_with_the_reference_and_leaves_them_alone():
    lm = make_lm()
    policy = make_policy(lm)
    plain = dict(lm.model.named_parameters())
    shared = {n.replace(".base_layer", ""): p for n, p in policy.model.named_parameters() if "lora_" not in n}
    assert shared.keys() == plain.keys()
    for name, parameter in shared.items():
        assert parameter.data_ptr() == plain[name].data_ptr()
        assert not parameter.requires_grad and plain[name].requires_grad
    # Nothing was added to the tree of the reference.
    assert type(lm.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize("env", ["one", "several"])
@pytest.mark.parametrize("agent", AGENTS)
def test_learning_moves_the_adapter_and_the_head_and_nothing_else(agent, env):
    env = make_env(None if env == "one" else 3, kl_coef=0.1, reward=id_sum)
    lm = env.unwrapped.lm
    learner = make(agent, env)
    said = lm.response_log_probs(*SEQUENCES)
    before = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    learner.learn(200)  # the first update leaves A alone: its gradient goes through B, which is zero
    moved = {n for n, p in learner.policy.named_parameters() if not torch.equal(p, before[n])}
    head = VALUE_HEAD if agent == "PPO" else set()
    assert moved == adapter_names(learner.policy) | head
    assert (lm.response_log_probs(*SEQUENCES) == said).all()
    assert not np.allclose(learner.policy.lm.response_log_probs(*SEQUENCES), said)
    trained = sum(p.numel() for group in learner.optimizer.param_groups for p in group["params"])
    assert trained == sum(p.numel() for n, p in learner.policy.named_parameters() if n in moved)
    assert all(p.grad is None for p in lm.model.parameters())


def test_a_short_grpo_run_learns():
    env = make_env(kl_coef=0.0, reward=count_a)
    learner = make("GRPO", env, n_episodes=32, learning_rate=3e-2, lora={"lora_rank": 4}).learn(2500)
    before, after = (evaluate_policy(who, env, n_samples=32).score.mean() for who in (env.lm, learner))
    assert before < 1 and after > 3


def test_the_policy_is_the_reference_with_the_product_of_the_adapter_added_to_its_weights():
    lm = make_lm(temperature=0.7)
    policy = stir(make_policy(lm, lora_rank=3, lora_alpha=12.0, lora_targets=["q_proj", "down_proj"]))
    adapter = {name: p for name, p in policy.model.named_parameters() if "lora_" in name}
    assert {name.split(".")[-4] for name in adapter} == {"q_proj", "down_proj"}
    by_hand = lm.clone()
    for name, weight in by_hand.model.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in adapter:
            product = adapter[f"{stem}.lora_B.default.weight"] @ adapter[f"{stem}.lora_A.default.weight"]
            weight.data += 4.0 * product.detach()
    expected, got = (model.response_log_probs(*SEQUENCES) for model in (by_hand, policy.lm))
    assert got == pytest.approx(expected, abs=1e-4)
    assert not np.allclose(expected, lm.response_log_probs(*SEQUENCES), atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_step_way_and_the_fused_way_agree_under_an_adapter(kind):
    env = make_env(lm=make_lm(kind), reward=id_sum, kl_coef=0.5)
    policy = stir(make_policy(env.lm, autocast=False))
    policy.generator = torch.Generator().manual_seed(0)
    prompt_ids = np.arange(6) % env.num_prompts
    episodes = env.run_episodes(lambda prompts: policy.generate(prompts, env.max_new_tokens), prompt_ids)
    assert np.abs(episodes.kl).max() > 0.1
    env.bind_policy(
        lambda observation, action: policy.log_prob(
            {name: value[None] for name, value in observation.items()}, np.array([action])
        )[0]
    )
    for i, prompt_id in enumerate(prompt_ids):
        env.reset(options={"prompt_id": int(prompt_id)})
        for t in range(int(episodes.mask[i].sum())):
            _, reward, _, _, info = env.step(int(episodes.tokens[i, t]))
            assert reward == pytest.approx(episodes.rewards[i, t], abs=1e-4)
            assert info["ref_logprob"] == pytest.approx(episodes.ref_logprob[i, t], abs=1e-4)


def test_under_autocast_decoding_takes_the_present_adapter_merged_and_the_reference_none():
    lm = make_lm()
    policy = stir(make_policy(lm, autocast=True))
    reference = dict(lm.in_bfloat16().model.named_parameters())
    for _ in range(2):
        got = dict(policy.lm.for_decoding().model.named_parameters())
        assert got.keys() == reference.keys()
        for name, parameter in got.items():
            expected = lm.model.get_parameter(name)
            stem = name.removesuffix(".weight")
            if "_proj" in name:
                a, b = (policy.model.get_parameter(f"{stem}.lora_{x}.default.weight") for x in "AB")
                expected = expected + 2 * (b @ a)
                assert not torch.equal(parameter, reference[name])
            assert parameter.dtype == torch.bfloat16
            assert torch.allclose(parameter.float(), expected.float(), rtol=1e-2, atol=1e-5)
        stir(policy)


def test_adapters_over_bfloat16_weights_are_float32_and_learn():
    learner = make("GRPO", make_env(lm=in_bfloat16(), reward=id_sum, kl_coef=0.1), lora={"autocast": None})
    kinds = {p.dtype for n, p in learner.policy.named_parameters() if "lora_" in n}
    assert kinds == {torch.float32} and learner.policy.model.dtype == torch.bfloat16
    before = learner.policy.lm.response_log_probs(*SEQUENCES)
    learner.learn(60)
    assert not np.allclose(learner.policy.lm.response_log_probs(*SEQUENCES), before)


def test_a_separate_critic_is_an_adapter_of_its_own_over_the_same_weights():
    learner = make("PPO", critic="separate")
    lm, policy = learner.text_env.lm, learner.policy
    plain = {p.data_ptr() for p in lm.model.parameters()}
    assert {p.data_ptr() for p in policy.body.parameters() if not p.requires_grad} <= plain
    acting = {p.data_ptr() for p in policy.model.parameters() if p.requires_grad}
    assert not acting & {p.data_ptr() for p in policy.body.parameters()}
    before = {name: p.detach().clone() for name, p in policy.body.named_parameters() if p.requires_grad}
    learner.learn(100)
    moved = [not torch.equal(policy.body.get_parameter(name), before[name]) for name in before]
    assert all(moved) and len(moved) == len(adapter_names(policy)) / 2
    assert (policy.predict_values(learner.envs.reset(seed=0)[0]) != 0).all()


# -- on disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_checkpoint_is_the_merged_model_and_beside_it_the_adapter_for_peft(kind, tmp_path):
    lm = make_lm(kind)
    policy = stir(make_policy(lm))
    live = policy.lm.response_log_probs(*SEQUENCES)
    policy.save_pretrained(tmp_path)
    assert (policy.lm.response_log_probs(*SEQUENCES) == live).all()
    merged = CausalLM.load(tmp_path, device="cpu")
    assert merged.response_log_probs(*SEQUENCES) == pytest.approx(live, abs=1e-4)
    assert not any("lora" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    base = make_lm(kind).clone().model
    reopened = CausalLM(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), make_tokenizer())
    assert reopened.response_log_probs(*SEQUENCES) == pytest.approx(live, abs=1e-5)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("agent", "critic"), [("PPO", "head"), ("PPO", "separate"), ("GRPO", None), ("REINFORCE", None)]
)
def test_a_resumed_run_ends_with_bitwise_the_weights_of_one_that_went_on(agent, critic, several, tmp_path):
    def env():
        return make_env(3 if several else None, kl_coef=0.1, reward=id_sum)

    learner = make(agent, env(), **({} if critic is None else {"critic": critic})).learn(60)
    learner.save(tmp_path)
    torch.manual_seed(12345)
    resumed = AGENTS[agent].load(tmp_path, env=env())
    assert_bitwise(learner, resumed)
    said = [a.policy.lm.response_log_probs(*SEQUENCES) for a in (learner, resumed)]
    assert (said[0] == said[1]).all()
    learner.learn(60, reset_num_timesteps=False)
    resumed.learn(60, reset_num_timesteps=False)
    assert_bitwise(learner, resumed)


def test_the_checkpoint_beside_the_model_holds_adapters_and_heads_only(tmp_path):
    learner = make("PPO", critic="separate").learn(30)
    learner.save(tmp_path)
    names = {n for n in load_file(tmp_path / "agent.safetensors") if n.startswith("policy.")}
    wanted = adapter_names(learner.policy) | VALUE_HEAD
    assert names == {f"policy.{name}" for name in wanted}


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_without_an_env_the_merged_model_stands_in_and_can_go_on_in_one(critic, tmp_path):
    learner = make("PPO", critic=critic).learn(100)
    learner.save(tmp_path)
    loaded = PPO.load(tmp_path)
    expected, got = (a.policy.lm.response_log_probs(*SEQUENCES) for a in (learner, loaded))
    assert got == pytest.approx(expected, abs=1e-4)
    observation, _ = learner.envs.reset(seed=1)
    expected, got = (a.policy.predict_values(observation) for a in (learner, loaded))
    assert got == pytest.approx(expected, abs=1e-4) and (got != 0).all()
    loaded.set_env(make_env(kl_coef=0.1, reward=id_sum))
    before = {name: p.detach().clone() for name, p in loaded.policy.named_parameters()}
    loaded.learn(60, reset_num_timesteps=False)
    moved = {n for n, p in loaded.policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == adapter_names(loaded.policy) | VALUE_HEAD


def test_an_adapter_is_not_put_onto_another_model(tmp_path):
    make().learn(30).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds an adapter for another model.*start a new agent from the merged"
    ):
        GRPO.load(tmp_path, env=make_env(lm=make_lm(seed=5), kl_coef=0.1, reward=id_sum))


def test_a_model_of_the_policys_own_is_found_again_by_its_name(model_folder, tmp_path):
    env = make_env(lm=make_lm(seed=5), kl_coef=0.1, reward=id_sum)
    learner = make(env=env, lora={"model": str(model_folder)}).learn(30)
    learner.save(tmp_path / "checkpoint")
    env = make_env(lm=make_lm(seed=5), kl_coef=0.1, reward=id_sum)
    assert_bitwise(learner, GRPO.load(tmp_path / "checkpoint", env=env))


def test_the_command_line_trains_and_resumes_adapters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model("llama").save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    (tmp_path / "prompts.txt").write_text("a\nb c\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "lora_reward.py").write_text(
        "def even(prompts, completions):\n    return [len(c) % 2 for c in completions]\n"
    )
    world = [
        "--model",
        "model",
        "--reward",
        "lora_reward.py:even",
        "--prompts",
        "prompts.txt",
        "--agent",
        "grpo",
    ]
    flags = [*world, "--max-new-tokens", "4", "--n-episodes", "8", "--group-size", "4", "--lora-rank", "2"]
    assert main(["train", "--no-progress", *flags, "--total-timesteps", "40", "--run-dir", "run"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["policy_kwargs"] == {"lora_rank": 2}
    resume = ["train", "--no-progress", "--resume", "run", "--allow-module", "lora_reward.py"]
    assert main([*resume, "--total-timesteps", "80"]) == 0
    agent = runs.load_agent(config, tmp_path / "run" / "final", ["lora_reward.py"])
    assert agent.num_timesteps >= 80 and agent.policy.lora_rank == 2
    assert main(["train", *flags, "--policy-arg", "lora_rank=3", "--run-dir", "other"]) != 0
    assert "lora_rank was given twice" in capsys.readouterr().err


# -- over quantised weights -------------------------------------------------------------------------------------


def quantised_env(seed: int = 0):
    """Around a model that says of itself what quantised ones say: its weights are no plain numbers."""
    lm = make_lm(seed=seed).clone()
    lm.model.name_or_path = "base"
    lm.model.is_quantized = True
    return make_env(lm=lm, kl_coef=0.1, reward=id_sum)


def test_adapters_over_quantised_weights_are_saved_alone_and_resume_bitwise(tmp_path):
    learner = make(env=quantised_env()).learn(60)
    assert learner.text_env.lm.fused_body() is None and learner.policy.lm.for_decoding() is learner.policy.lm
    learner.save(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "model.safetensors").exists()
    resumed = GRPO.load(tmp_path, env=quantised_env())
    assert_bitwise(learner, resumed)
    for each in (learner, resumed):
        each.learn(60, reset_num_timesteps=False)
    assert_bitwise(learner, resumed)
    with pytest.raises(ValueError, match="holds an adapter for another model"):
        GRPO.load(tmp_path, env=quantised_env(seed=5))


def test_an_adapter_alone_is_loaded_over_its_model_where_there_is_no_env(model_folder, tmp_path):
    env = quantised_env()
    env.lm.model.name_or_path = str(model_folder)
    learner = make(env=env).learn(60)
    learner.save(tmp_path / "checkpoint")
    loaded = GRPO.load(tmp_path / "checkpoint")
    expected, got = (a.policy.lm.response_log_probs(*SEQUENCES) for a in (learner, loaded))
    assert got == pytest.approx(expected, abs=1e-3)


def test_quantised_weights_are_not_trained_themselves():
    with pytest.raises(ValueError, match=r"quantised weights cannot be trained.*give lora_rank"):
        make_policy(quantised_env().lm, lora_rank=None)


def test_qlora_learns_where_bitsandbytes_is_installed(model_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    env = make_env(lm=CausalLM.load(model_folder, load_in_4bit=True, device="cpu"), reward=id_sum)
    learner = make(env=env).learn(60)
    assert learner.latest["objective/kl"] != 0


# -- what does not work says so ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_alpha": 0.0}, "lora_alpha must be > 0, got 0.0"),
        (
            {"lora_targets": ["q_porj"]},
            "no linear layer of the body of LlamaForCausalLM. Did you mean 'q_proj'",
        ),
        ({"lora_targets": ["lm_head"]}, "names 'lm_head', which is no linear layer of the body"),
        ({"lora_targets": "q_proj"}, r"a list of names, got 'q_proj'; try \['q_proj'\]"),
        ({"lora_targets": []}, "leaves no linear layer"),
        ({"lora_rank": None, "lora_alpha": 8.0}, "go with lora_rank"),
    ],
)
def test_wrong_settings_are_named_with_what_would_work(given, message):
    with pytest.raises(ValueError, match=message):
        make_policy(make_lm(), **given)


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'textrl-env\[lora\]'"):
        make_policy(make_lm())
    make_policy(make_lm(), lora_rank=None)


def peft_lm() -> CausalLM:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return CausalLM(get_peft_model(make_lm().clone().model, config), make_tokenizer())


def test_a_peft_model_of_ones_own_is_a_reference_like_any_other():
    lm = peft_lm()
    merged = CausalLM(peft_lm().model.merge_and_unload(), make_tokenizer())
    expected = merged.response_log_probs(*SEQUENCES)
    assert lm.response_log_probs(*SEQUENCES) == pytest.approx(expected, abs=1e-4)
    assert not np.allclose(expected, make_lm().response_log_probs(*SEQUENCES), atol=1e-2)
    assert lm.slot_cache_works() and lm.teacher_forcing_works()


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_policy_over_a_peft_model_says_to_merge_it_which_then_works(lora_rank):
    with pytest.raises(
        ValueError, match=r"with adapters of its own; merge them with model.merge_and_unload\(\)"
    ):
        make_policy(peft_lm(), lora_rank=lora_rank)
    make_policy(CausalLM(peft_lm().model.merge_and_unload(), make_tokenizer()), lora_rank=lora_rank)
