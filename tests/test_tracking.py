"""Claims about what a run keeps beside its log: samples, and what TensorBoard is told. Learning does not notice."""

from __future__ import annotations

import io
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import HParam
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from agents import GRPO, PPO
from agents.callbacks.tracking import TrackSamples, samples_of
from agents.evaluation.plots import STRIP, episode_strip
from agents.runs import run_directory as runs
from agents.runs.logs import open_logger, read_progress
from agents.runs.samples import DETAILED, read_samples, sample_files, write_samples
from agents.runs.tensorboard import LAYOUT, METRICS, Settings, hyper_parameters
from tests.tiny import PROMPTS, count_a, make_env


def make_agent(cls=PPO, **given):
    env = make_env(reward=count_a, prompts=PROMPTS, max_new_tokens=4, gold=count_a)
    return cls("auto", env, seed=3, n_episodes=16, batch_size=8, n_epochs=1, learning_rate=0.02, **given)


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


@pytest.mark.parametrize("cls", [PPO, GRPO])
def test_every_response_that_was_learned_from_is_kept_and_nothing_is_learned_otherwise(cls, tmp_path):
    given = {"group_size": 4} if cls is GRPO else {}
    plain, tracked = make_agent(cls, **given), make_agent(cls, **given)
    plain.learn(120)
    tracked.learn(120, TrackSamples(tmp_path, every=1))
    assert torch.equal(weights(plain), weights(tracked))
    assert torch.equal(plain.policy.generator.get_state(), tracked.policy.generator.get_state())
    files = sample_files(tmp_path)
    assert len(files) == tracked.iterations and files[-1][0] == tracked.num_timesteps
    rows = [row for _, file in files for row in read_samples(file)]
    assert len(rows) == 16 * tracked.iterations
    assert sum(row["response_length"] for row in rows) == tracked.num_timesteps
    assert [row["score"] for row in rows] == count_a(None, [row["response"] for row in rows])
    assert all(row["score/gold"] == row["score"] and row["prompt"] in PROMPTS for row in rows)


def test_samples_have_the_kind_of_their_prompt_and_no_column_of_answers(tmp_path):
    rows = [{"prompt": p, "kind": "xy"[i % 2], "answer": str(i)} for i, p in enumerate(PROMPTS)]
    env = make_env(reward=count_a, prompts=rows, max_new_tokens=4)
    PPO("auto", env, n_episodes=8, batch_size=8).learn(1, TrackSamples(tmp_path))
    kinds = {row["prompt"]: row["kind"] for row in rows}
    found = read_samples(sample_files(tmp_path)[0][1])
    assert found and all(row["prompt/kind"] == kinds[row["prompt"]] for row in found)
    assert "prompt/answer" not in found[0]


def test_the_tokens_of_a_few_are_kept_and_belong_to_their_response(tmp_path):
    agent = make_agent()
    agent.learn(1, TrackSamples(tmp_path))
    rows = read_samples(sample_files(tmp_path)[0][1])
    detailed = [row for row in rows if row["tokens"]]
    assert len(detailed) == DETAILED
    for row in detailed:
        words = [token for token in row["tokens"] if token not in ("<eos>", "<unk>", "<pad>")]
        assert " ".join(words) == row["response"]
        assert len(row["tokens"]) == row["response_length"]
        kl = np.subtract(row["log_probs"], row["ref_log_probs"])
        np.testing.assert_allclose(row["kls"], kl, atol=1e-6)
        assert sum(row["kls"]) == pytest.approx(row["kl_sum"], abs=1e-4)
        assert sum(row["rewards"]) == pytest.approx(row["return"], abs=1e-5)
        assert np.mean(row["advantages"]) == pytest.approx(row["advantage"], abs=1e-5)
        assert len(row["values"]) == len(row["tokens"])


def test_a_rollout_that_does_not_fit_its_texts_keeps_them_without_advantages():
    agent = make_agent().learn(1)
    rollout = agent.collect()
    agent.prepare_rollout(rollout)
    whole = samples_of(agent, rollout)
    assert {"advantage", "tokens"} <= whole.keys() and len(whole["response"]) == 16
    part = samples_of(agent, rollout[np.arange(0, 16, 2)])
    assert "advantage" not in part and "tokens" not in part and part["response"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in the embedded world, evaluated once on its way."""
    folder = tmp_path_factory.mktemp("run") / "run"
    asked = {"what is 2 plus 2?": "sum", "what is 1 plus 2?": "sum", "how do i make a bomb?": "harm"}
    rows = [json.dumps({"prompt": prompt, "kind": kind}) for prompt, kind in asked.items()]
    (folder.parent / "few.jsonl").write_text("\n".join(rows))
    config = runs.new_config(
        agent="ppo",
        env="TextRLHF-v0",
        agent_kwargs={"n_episodes": 32, "n_epochs": 1},
        total_timesteps=600,
        seed=0,
        save_every=300,
        eval_every=600,
        eval_episodes=4,
        eval_prompts=str(folder.parent / "few.jsonl"),
    )
    runs.prepare_directory(folder)
    runs.write_config(folder, config)
    runs.train(runs.make_agent(config), folder, config)
    return folder


def test_tensorboard_has_a_page_of_what_matters_and_says_what_every_tag_means(run):
    events = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert "custom_scalars__config__" in tags["tensors"]
    assert {"histogram/advantage", "histogram/value", "histogram/token_kl", "histogram/ratio"} <= set(
        tags["histograms"]
    )
    assert {"samples/episode", "eval/proxy_and_gold"} <= set(tags["images"])
    assert any(tag.startswith("_hparams_/") for tag in events.summary_metadata)
    plugins = {"scalars": "scalars", "histograms": "histograms", "images": "images"}
    for kind, plugin in plugins.items():  # another plugin, or none, and readers warn of every tag
        for tag in tags[kind]:
            metadata = events.SummaryMetadata(tag)
            assert metadata.summary_description, tag
            assert metadata.plugin_data.plugin_name == plugin
            assert metadata.data_class, "else TensorBoard's fast loader shows no description"
    assert events.SummaryMetadata("samples/table/text_summary").summary_description
    assert "'harm'" in events.SummaryMetadata("eval/harm/refuses").summary_description
    logged = [scalar.step for scalar in events.Scalars("objective/scores")]
    assert logged == [int(step) for step in read_progress(run)["time/total_timesteps"]]
    assert events.Scalars("eval/scores")[0].step == 0


def test_the_layout_and_the_metrics_name_tags_that_are_logged(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    logged = set(events.Tags()["scalars"])
    shown = {tag for page in LAYOUT.values() for _, tags in page.values() for tag in tags}
    found = {tag: [name for name in logged if re.match(tag, name)] for tag in shown}
    assert all(found.values()) and set(METRICS) <= logged
    assert all(len(names) == 1 for tag, names in found.items() if "[" not in tag), "one line each"


def test_settings_that_were_given_come_first_in_the_table_of_runs():
    config = runs.new_config(agent="ppo", env="TextRLHF-v0", total_timesteps=5, seed=1)
    in_force = {"agent": {"batch_size": 4, "learning_rate": 0.1, "vf_coef": 0.5}, "env": {}}
    experiment, *_ = Settings(config | {"in_force": in_force, "agent_kwargs": {"vf_coef": 0.7}}).summaries()
    content = experiment.value[0].metadata.plugin_data.content
    infos = HParamsPluginData.FromString(content).experiment.hparam_infos
    assert {"agent", "learning_rate", "seed", "vf_coef"} == {info.name for info in infos if info.differs}
    assert "batch_size" in {info.name for info in infos}


def test_the_picture_of_an_episode_keeps_its_size_and_shows_what_no_font_has():
    row = {"prompt": "$x_1$ \u65e5", "score": -0.001, "tokens": ["$^", "\u65e5"] * 1000}
    row |= {name: [-0.001] * 2000 for name, *_ in STRIP}
    figure = episode_strip(row)
    assert figure.get_figwidth() < 40
    texts = {text.get_text() for text in [*figure.texts, *figure.axes[0].texts]}
    assert {"$x_1$ \\u65e5", "score 0.00; the first 40 of 2,000 tokens", "0.00"} == texts
    figure.savefig(io.BytesIO())  # neither a warning of glyphs nor a formula


def test_a_log_that_begins_anew_has_nothing_of_the_one_before(tmp_path):
    for value in (1.0, 2.0):
        logger = open_logger(tmp_path)
        logger.record("train/loss", value)
        logger.record("time/total_timesteps", 10)
        logger.dump(10)
        logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [scalar.value for scalar in events.Scalars("train/loss")] == [2.0]
    assert read_progress(tmp_path)["train/loss"] == [2.0]


def test_settings_are_plain_so_that_sweeps_compare():
    config = runs.new_config(
        agent="ppo", env="TextRLHF-v0", total_timesteps=5, seed=1, agent_kwargs={"vf_coef": [1]}
    )
    found = hyper_parameters(
        config | {"in_force": {"agent": {"learning_rate": 0.1}, "env": {"kl_coef": 0.2}}}
    )
    assert found["learning_rate"] == 0.1 and found["kl_coef"] == 0.2 and found["vf_coef"] == "[1]"
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_gets_the_settings_and_no_row_without_numbers(tracker, tmp_path, monkeypatch):
    rows, settings = [], {}
    config = SimpleNamespace(update=lambda new, **options: settings.update(new))
    started = SimpleNamespace(
        config=config, log=lambda row, step: rows.append((step, row)), finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, tracker, SimpleNamespace(init=lambda **options: started))
    logger = open_logger(tmp_path, report_to=[tracker])
    logger.record(
        "hparams",
        HParam({"learning_rate": 0.1}, {"train/loss": 0.0}),
        exclude=("stdout", "log", "csv", "json"),
    )
    logger.dump(0)
    logger.record("train/loss", 0.5)
    logger.dump(7)
    assert settings == {"learning_rate": 0.1} and rows == [(7, {"train/loss": 0.5})]


def test_samples_after_a_checkpoint_are_drawn_again_and_a_new_run_deletes_them(run, tmp_path):
    at = [timesteps for timesteps, _ in sample_files(run)]
    assert len(at) >= 2
    config = runs.read_config(run)
    _, checkpoint, _ = runs.newest_whole(run)
    agent = runs.load_agent(config, checkpoint)
    write_samples(run, agent.num_timesteps + 7, {"response": ["not of this run"]})
    runs.train(agent, run, config | {"total_timesteps": agent.num_timesteps + 1, "eval_every": None})
    assert agent.num_timesteps not in at and [t for t, _ in sample_files(run)] == [*at, agent.num_timesteps]
    runs.prepare_directory(run, overwrite=True)
    assert not (run / "samples").exists() and not (run / "evaluations").exists()


def test_what_is_no_sample_file_is_named(tmp_path):
    write_samples(tmp_path, 5, {"text": ["a"]})
    with pytest.raises(ValueError, match=r"000000000005\.parquet holds no samples of a run: .* 'response'"):
        read_samples(sample_files(tmp_path)[0][1])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"torn\.parquet holds no samples"):
        read_samples(tmp_path / "torn.parquet")
