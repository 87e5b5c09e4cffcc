"""What every trainer on files can do: adapters, precision, schedules, checkpoints, logs; and what is not loaded."""

from __future__ import annotations

import copy
import csv
import json
import sys
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from agents.offline.dpo import dpo
from agents.offline.learner import Learner
from agents.offline.options import TrainerOptions
from agents.offline.reward_model import train_reward_model
from agents.offline.sft import sft
from agents.policies.lora import adapted_weights, add_adapter
from agents.runs import saving
from reward_models.loading import LoadOptions, load_causal_lm
from tests.tiny import make_model, make_tokenizer
from textrl_env.lm.causal_lm import CausalLM

RECORDS = [
    {"prompt": "a b"[: 1 + 2 * (i % 2)], "completion": " ".join("cdefghi"[i % 7 :])} for i in range(24)
]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "a a"} for r in RECORDS]
TRAINERS = {"sft": (sft, RECORDS), "dpo": (dpo, PAIRS), "reward": (train_reward_model, PAIRS)}
SETTINGS = {"learning_rate": 1e-2, "batch_size": 4, "device": "cpu", "seed": 3}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("start")
    make_model("llama", dropout=0.1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Killed(Exception):
    pass


def kill_at(step):
    def callback(now, metrics):
        if now == step:
            raise Killed

    return callback


# -- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_run_that_was_killed_goes_on_to_bitwise_the_same_weights(name, lora_rank, start, tmp_path):
    train, data = TRAINERS[name]
    options = SETTINGS | {"epochs": 2, "lora_rank": lora_rank, "save_every": 3}
    options |= {} if name == "dpo" else {"dropout": True}
    whole = train(start, data, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        train(start, data, tmp_path / "killed", callback=kill_at(8), **options)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    steps = []
    resumed = train(
        start, data, tmp_path / "killed", resume=True, callback=lambda s, m: steps.append(s), **options
    )
    assert steps == list(range(7, 13))
    assert resumed == whole
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_an_error_on_the_way_says_which_checkpoint_there_is(start, tmp_path):
    def fail(step, metrics):
        if step == 3:
            raise RuntimeError("the disk of the logger is full")

    with pytest.raises(RuntimeError) as caught:
        sft(start, RECORDS, tmp_path, save_every=2, callback=fail, **SETTINGS)
    (note,) = caught.value.__notes__
    assert f"the last checkpoint is {tmp_path / 'checkpoint-2'};" in note and "--resume" in note
    with pytest.raises(RuntimeError) as caught:
        sft(start, RECORDS, callback=fail, **SETTINGS)
    assert not hasattr(caught.value, "__notes__"), "nothing is kept without a folder"


def test_a_checkpoint_is_a_model_folder_and_only_the_latest_are_kept(start, tmp_path):
    sft(start, RECORDS, tmp_path, save_every=1, keep=2, **SETTINGS)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    assert_equal(weights(tmp_path / "checkpoint-6"), weights(tmp_path))


def test_a_checkpoint_of_another_run_is_refused(start, tmp_path):
    sft(start, RECORDS, tmp_path, save_every=2, **SETTINGS)
    with pytest.raises(ValueError, match=r"of another run: learning_rate was 0\.01 and is 0\.02"):
        sft(start, RECORDS, tmp_path, resume=True, **SETTINGS | {"learning_rate": 0.02})
    with pytest.raises(ValueError, match="of another model, or of other adapters"):
        sft(start, RECORDS, tmp_path, resume=True, lora_rank=2, **SETTINGS)
    with pytest.raises(ValueError, match=r"of another run: data was '\w{12}' and is '\w{12}'"):
        sft(start, RECORDS[::-1], tmp_path, resume=True, **SETTINGS)
    with pytest.raises(ValueError, match="need an output folder"):
        sft(start, RECORDS, save_every=2, **SETTINGS)


@pytest.mark.parametrize("name", TRAINERS)
def test_adapters_do_not_go_on_over_another_model(name, start, tmp_path):
    train, data = TRAINERS[name]
    other = make_model("llama", dropout=0.1, seed=5)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    options = SETTINGS | {"lora_rank": 2, "save_every": 2}
    train(start, data, tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"of another run: .*weights under the adapter was '\w{12}'"):
        train(tmp_path / "other", data, tmp_path / "run", resume=True, **options)
    train(start, data, tmp_path / "run", resume=True, **options)


def test_dpo_does_not_go_on_against_another_reference(start, tmp_path):
    dpo(start, PAIRS, tmp_path, save_every=2, **SETTINGS)
    with pytest.raises(ValueError, match=r"of another run: reference was '\w{12}' and is '\w{12}'"):
        dpo(start, PAIRS, tmp_path, resume=True, reference=tmp_path, **SETTINGS)


def test_checkpoints_of_an_earlier_run_in_the_folder_are_gone_before_the_first_step(start, tmp_path):
    sft(start, RECORDS, tmp_path, save_every=2, **SETTINGS)
    left = []
    sft(
        start,
        RECORDS,
        tmp_path,
        callback=lambda *_: left.append(len(list(tmp_path.glob("checkpoint-*")))),
        save_every=4,
        **SETTINGS,
    )
    assert left[:5] == [0, 0, 0, 1, 1]


def test_a_time_between_checkpoints_counts_from_the_last(start, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(saving, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    sft(start, RECORDS, tmp_path, save_every="60s", keep=9, **SETTINGS)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


# -- adapters and precision ---------------------------------------------------------------------------------


def test_an_adapter_is_saved_merged_and_alone_and_either_folder_is_a_start(start, tmp_path):
    result = sft(start, RECORDS, tmp_path / "one", lora_rank=2, epochs=4, **SETTINGS)
    assert result["loss"] < 0.8 * result["first_loss"]
    merged, alone = (load_causal_lm(folder) for folder in (tmp_path / "one", tmp_path / "one" / "adapter"))
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(alone.state_dict()[name], weight, atol=1e-6, rtol=0)
    before = weights(start)
    changed = {
        name for name, weight in weights(tmp_path / "one").items() if not torch.equal(weight, before[name])
    }
    assert changed == {name for name in before if "_proj" in name}
    again = sft(tmp_path / "one" / "adapter", RECORDS, learning_rate=0.0, device="cpu")
    assert again["first_loss"] < 0.8 * result["first_loss"]
    assert CausalLM.load(tmp_path / "one" / "adapter").tokenizer.eos_token == "<eos>"
    assert train_reward_model(tmp_path / "one" / "adapter", PAIRS, **SETTINGS)["steps"] == 6


def test_an_adapter_on_a_live_model_becomes_part_of_its_weights():
    model, tokenizer = copy.deepcopy(make_model("llama")), make_tokenizer()
    result = sft(model, RECORDS, tokenizer=tokenizer, lora_rank=2, epochs=4, **SETTINGS)
    after = sft(model, RECORDS, tokenizer=tokenizer, **SETTINGS | {"learning_rate": 0.0, "batch_size": 24})
    assert after["loss"] < 0.8 * result["first_loss"]
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_reward_model_under_lora_trains_its_head_too(start, tmp_path):
    train_reward_model(start, PAIRS, tmp_path, lora_rank=2, epochs=4, **SETTINGS)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 1
    before, after = weights(start), weights(tmp_path)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert not torch.equal(
        after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() >= {
        "base_model.model.score.weight"
    }


@pytest.mark.parametrize("name", TRAINERS)
def test_a_bfloat16_model_is_saved_as_bfloat16_and_learns_small_steps(name, start, tmp_path):
    copy.deepcopy(make_model("llama")).bfloat16().save_pretrained(tmp_path / "half")
    make_tokenizer().save_pretrained(tmp_path / "half")
    train, data = TRAINERS[name]
    for number, dtype in enumerate(("float32", "auto")):
        folder = tmp_path / str(number)
        train(tmp_path / "half", data, folder, dtype=dtype, **SETTINGS | {"learning_rate": 1e-4})
        assert {w.dtype for w in weights(folder).values()} == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    train(start, data, tmp_path / "full", **SETTINGS)
    assert {w.dtype for w in weights(tmp_path / "full").values()} == {torch.float32}


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_steps_too_small_for_the_precision_that_is_saved_are_said(lora_rank, start, tmp_path):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(start).to(torch.bfloat16).save_pretrained(half)
    make_tokenizer().save_pretrained(half)
    small = {"learning_rate": 1e-7, "device": "cpu", "lora_rank": lora_rank}
    with pytest.warns(
        UserWarning, match=r"% of the weights that have moved are the same again in bfloat16.*save_dtype"
    ):
        sft(half, RECORDS, tmp_path / "lost", **small)
    exact = {name: weight.float() for name, weight in weights(half).items()}
    assert_equal({name: w.float() for name, w in weights(tmp_path / "lost").items()}, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sft(half, RECORDS, tmp_path / "kept", save_dtype="float32", **small)
        sft(half, RECORDS, tmp_path / "large", **small | {"learning_rate": 3e-2})
    kept = weights(tmp_path / "kept")
    assert all(w.dtype == torch.float32 for w in kept.values())
    assert any(not torch.equal(kept[name], exact[name]) for name in kept)


def test_a_live_model_in_bfloat16_is_trained_in_float32_and_given_back_in_bfloat16():
    model = copy.deepcopy(make_model("llama")).bfloat16()
    before = model.lm_head.weight.clone()
    result = sft(model, RECORDS, tokenizer=make_tokenizer(), epochs=4, **SETTINGS)
    assert model.dtype == torch.bfloat16 and not torch.equal(model.lm_head.weight, before)
    assert result["loss"] < result["first_loss"]


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_gradient_checkpointing_keeps_fewer_activations_and_the_same_gradient(start, lora_rank, tmp_path):
    kept, saved = {}, {}
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        options = TrainerOptions(lora_rank=lora_rank, gradient_checkpointing=checkpointing)
        learner = Learner(start, None, "cpu", options)
        kept[checkpointing] = 0

        def keep(tensor, key=checkpointing):
            kept[key] += tensor.numel()
            return tensor

        with learner.saving_memory(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            learner.model(torch.arange(3, 12)[None]).logits.sum().backward()
        saved[checkpointing] = sft(
            start,
            RECORDS,
            folder,
            lora_rank=lora_rank,
            gradient_checkpointing=checkpointing,
            dropout=True,
            **SETTINGS,
        )
    assert kept[True] < 0.5 * kept[False]
    assert saved[True] == saved[False]
    assert_equal(weights(tmp_path / "True"), weights(tmp_path / "False"))


def test_autocast_computes_in_bfloat16_and_learns_the_same_to_its_precision(start):
    exact, lower = (sft(start, RECORDS, autocast=autocast, **SETTINGS) for autocast in (False, True))
    assert exact["first_loss"] != lower["first_loss"]
    assert exact["first_loss"] == pytest.approx(lower["first_loss"], rel=0.02)


# -- schedules, evaluation, logs ----------------------------------------------------------------------------


def rates(start, **options):
    found = []
    sft(
        start,
        RECORDS,
        callback=lambda step, metrics: found.append(metrics["learning_rate"]),
        **SETTINGS | options,
    )
    return found


def test_the_learning_rate_follows_the_schedule_that_is_named_and_no_step_is_at_rate_zero(start):
    assert rates(start, lr_scheduler_type="constant", warmup_ratio=0.0) == [0.01] * 6
    linear = rates(start, lr_scheduler_type="linear", warmup_ratio=0.0)
    assert linear == pytest.approx([0.01 * (1 - (k + 0.5) / 6) for k in range(6)])
    cosine = rates(start, warmup_ratio=0.5)
    assert 0 < cosine[0] < cosine[1] < cosine[2] <= 0.01 and cosine[3] > cosine[4] > cosine[5] > 0
    floor = rates(start, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.5})
    assert min(floor[1:]) >= 0.005
    with pytest.raises(ValueError, match=r"lr_scheduler_type='cosin'.*'cosine'"):
        rates(start, lr_scheduler_type="cosin")


@pytest.mark.parametrize("name", TRAINERS)
def test_held_out_records_are_looked_at_on_the_way_and_the_log_has_them(name, start, tmp_path):
    train, data = TRAINERS[name]
    held_out = {"eval_pairs" if name == "reward" else "eval_data": data[:5]}
    options = SETTINGS | held_out | {"eval_every": 2, "report_to": "csv,tensorboard", "log_interval": 4}
    result = train(start, data, tmp_path, **options)
    with (tmp_path / "logs" / "progress.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    looked = {int(row["time/total_timesteps"]): float(row["eval/loss"]) for row in rows if row["eval/loss"]}
    assert list(looked) == [2, 4, 6]
    final = result["eval"]["loss"] if name == "reward" else result["eval_loss"]
    assert looked[6] == pytest.approx(final, rel=1e-4)
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


def test_rows_after_the_checkpoint_are_logged_once(start, tmp_path):
    options = SETTINGS | {"save_every": 2, "report_to": "csv", "log_interval": 1}
    with pytest.raises(Killed):
        sft(start, RECORDS, tmp_path, callback=kill_at(5), **options)
    sft(start, RECORDS, tmp_path, resume=True, **options)
    with (tmp_path / "logs" / "progress.csv").open(newline="") as lines:
        assert [int(row["time/total_timesteps"]) for row in csv.DictReader(lines)] == [1, 2, 3, 4, 5, 6]


def test_wandb_gets_the_numbers_where_it_is_installed_and_is_asked_for_otherwise(
    start, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        sft(start, RECORDS, tmp_path, report_to="wandb", **SETTINGS)
    rows = []
    run = types.SimpleNamespace(
        log=lambda row, step: rows.append((step, row)), finish=lambda: rows.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: run))
    sft(start, RECORDS, tmp_path, report_to=["wandb"], log_interval=3, **SETTINGS)
    assert [row[0] for row in rows[:-1]] == [1, 3, 6] and rows[-1] == "end"
    assert rows[0][1]["train/loss"] > 0


# -- what is loaded -----------------------------------------------------------------------------------------


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def tiny_t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_an_encoder_decoder_is_refused_as_what_it_is(name, tmp_path):
    train, data = TRAINERS[name]
    with pytest.raises(ValueError, match=r"is an encoder-decoder \(t5\); .*decoder-only"):
        train(save(tiny_t5(), tmp_path), data, device="cpu")
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        CausalLM(tiny_t5(), make_tokenizer())


def test_an_encoder_and_a_model_without_its_head_are_no_language_models(tmp_path):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(ValueError, match=r"is an encoder \(BertForMaskedLM\)"):
        CausalLM.load(save(BertForMaskedLM(BertConfig(vocab_size=12, **size)), tmp_path / "bert"))
    scorer = LlamaForSequenceClassification(copy.deepcopy(make_model("llama").config))
    with pytest.raises(ValueError, match=r"no whole language model: \['lm_head\.weight'\]"):
        CausalLM.load(save(scorer, tmp_path / "scorer"))


def test_an_architecture_without_a_score_head_is_no_start_of_a_reward_model(tmp_path):
    folder = save(MambaForCausalLM(MambaConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1)), tmp_path)
    with pytest.raises(ValueError, match="is a mamba model, and transformers has no sequence classifier"):
        train_reward_model(folder, PAIRS, device="cpu")


def test_options_of_loading_reach_transformers(start):
    lm = CausalLM.load(start, attn_implementation="eager", dtype="auto", device="cpu")
    assert lm.model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"dtype='bfloat8' is not known\. Did you mean 'bfloat16'"):
        CausalLM.load(start, dtype="bfloat8")
    with pytest.raises(TypeError, match=r"'attn_implementatio'\. Did you mean 'attn_implementation'"):
        CausalLM.load(start, attn_implementatio="eager")
    with pytest.raises(
        TypeError, match=r"sft\(\) got an unexpected keyword argument 'lora_rnk'\. Did you mean"
    ):
        sft(start, RECORDS, lora_rnk=3)


def test_code_that_comes_with_a_model_runs_only_if_it_may(tmp_path):
    document = {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "mine.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        CausalLM.load(tmp_path)
    with pytest.raises(RuntimeError, match="it ran"):
        load_causal_lm(tmp_path, LoadOptions(trust_remote_code=True))


def test_four_bits_need_adapters_and_a_library_that_quantises(start, monkeypatch):
    with pytest.raises(ValueError, match="only adapters over them: give lora_rank"):
        sft(start, RECORDS, load_in_4bit=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="bitsandbytes or torchao"):
        load_causal_lm(start, LoadOptions(load_in_4bit=True))


def test_an_adapter_without_its_model_says_which(tmp_path):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "./nowhere/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        FileNotFoundError, match=r"is an adapter over '\./nowhere/model', which is not to be had"
    ):
        CausalLM.load(tmp_path)


# -- families under LoRA ------------------------------------------------------------------------------------


def mixtral():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=12, **size, **experts))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=12, hidden_size=16, state_size=4, num_hidden_layers=2))


@pytest.mark.parametrize(("make", "adapted"), [(mixtral, {"q_proj"}), (mamba, {"in_proj", "x_proj"})])
def test_mixtures_and_recurrent_models_get_adapters_where_they_work(make, adapted):
    model = make()
    learner = add_adapter(model, 2)
    names = {name.rpartition(".weight")[0].rpartition(".")[2] for name, _ in adapted_weights(learner)}
    assert names >= adapted and not names & {"gate", "router", "out_proj", "conv1d", "dt_proj"}
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(learner(ids).logits, model.eval()(ids).logits)
    learner(ids).logits.square().sum().backward()
    trained = [p for p in learner.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)


def test_an_adapter_where_a_kernel_reads_the_weights_is_refused():
    with pytest.raises(ValueError, match="'out_proj', which a mamba model does not call"):
        add_adapter(mamba(), 2, targets=["out_proj"])
