"""Claims about the report on training from files: its curves, what it warns of, and folders that it finds logs in."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from agents.cli import main
from agents.report import write_report
from agents.report.training_logs import examine_log, read_log
from agents.runs.training_note import TrainingNote, write_note
from tests.test_report import text_of

ROWS = 20
STEPS = 10.0 * np.arange(1, ROWS + 1)
SPARSE = np.arange(ROWS) % 5 == 4


def sparse(values):
    """Values at some rows, as held-out data is looked at."""
    return np.where(SPARSE, values, np.nan)


SFT = {
    "train/loss": np.linspace(3.0, 1.0, ROWS),
    "train/grad_norm": np.full(ROWS, 0.5),
    "eval/loss": sparse(np.linspace(3.1, 1.2, ROWS)),
    "eval/perplexity": sparse(np.exp(np.linspace(3.1, 1.2, ROWS))),
    "eval/accuracy": sparse(np.linspace(0.3, 0.6, ROWS)),
}
REWARD = {
    "train/loss": np.linspace(0.7, 0.4, ROWS),
    "train/accuracy": np.linspace(0.5, 0.8, ROWS),
    "eval/loss": sparse(np.linspace(0.7, 0.5, ROWS)),
    "eval/accuracy": sparse(np.linspace(0.5, 0.7, ROWS)),
    "eval/ece": sparse(np.full(ROWS, 0.05)),
}
DPO = {
    "train/loss": np.linspace(0.69, 0.4, ROWS),
    "rewards/accuracies": np.linspace(0.5, 0.9, ROWS),
    "rewards/margins": np.linspace(0.0, 1.0, ROWS),
    "logps/chosen": np.linspace(-20.0, -20.5, ROWS),
    "logps/rejected": np.linspace(-20.0, -30.0, ROWS),
    "eval/loss": sparse(np.linspace(0.69, 0.5, ROWS)),
    "eval/rewards/accuracies": sparse(np.linspace(0.5, 0.8, ROWS)),
}


def make_log(folder, columns):
    folder.mkdir(parents=True)
    rows = zip(STEPS, *columns.values(), strict=True)
    lines = [",".join("" if np.isnan(x) else repr(float(x)) for x in row) for row in rows]
    (folder / "progress.csv").write_text(
        "\n".join([",".join(["time/total_timesteps", *columns]), *lines]) + "\n"
    )
    return folder


@pytest.mark.parametrize(
    ("columns", "title", "summary", "curves"),
    [
        (
            SFT,
            "Supervised fine-tuning",
            "Loss on held-out data from 2.70 to 1.20",
            ["Loss", "Perplexity", "Accuracy"],
        ),
        (
            REWARD,
            "Reward model",
            "accuracy on held-out data from 0.542 to 0.700",
            ["Accuracy", "Calibration error"],
        ),
        (
            DPO,
            "Preference optimisation",
            "accuracy on held-out data from 0.563 to 0.800",
            ["Margin", "Accuracy"],
        ),
    ],
)
def test_a_log_has_a_page_of_its_kind_with_held_out_curves(columns, title, summary, curves, tmp_path):
    report = write_report(make_log(tmp_path / "mine", columns))
    page = report.page.read_text()
    assert f"{title}: mine" in page and summary in text_of(page) and "in 200 steps" in text_of(page)
    for name in curves:
        assert f'aria-label="{name} against steps"' in page
    assert "held out" in re.search(r'<svg[^>]*aria-label="Loss against steps".*?</svg>', page, re.DOTALL)[0]
    assert report.findings == [] and report.page == tmp_path / "mine" / "report.html"
    assert "<script" not in page and not re.search(r"""<link|@import|src=|url\((?!#)""", page)


@pytest.mark.parametrize(
    ("columns", "name", "figures"),
    [
        (
            SFT | {"eval/loss": sparse(np.abs(np.linspace(-1, 1.5, ROWS)) + 1)},
            "over-fitting",
            "lowest at step 100",
        ),
        (REWARD | {"eval/accuracy": sparse(np.full(ROWS, 0.47))}, "no better than a coin", "47.0%"),
        (DPO | {"eval/rewards/accuracies": sparse(np.full(ROWS, 0.4))}, "no better than a coin", "40.0%"),
        (
            DPO | {"logps/chosen": np.linspace(-20, -25, ROWS)},
            "chosen answers become less likely",
            "5.0 nats",
        ),
        ({"train/loss": SFT["train/loss"]}, "no held-out data", "learning by heart"),
        (
            SFT | {"train/loss": np.where(STEPS == 30, np.inf, 1.0)},
            "numbers that are not finite",
            "in 1 rows",
        ),
    ],
)
def test_a_log_warns_of_what_is_wrong_with_it_and_of_nothing_else(columns, name, figures, tmp_path):
    (finding,) = examine_log(read_log(make_log(tmp_path / "mine", columns)))
    assert finding.name == name and figures in finding.text


def test_what_was_measured_once_has_no_way_from_and_to(tmp_path):
    once = np.full(ROWS, np.nan)
    once[-1] = 0.986
    columns = SFT | {"eval/loss": once, "eval/perplexity": np.exp(once)}
    page = write_report(make_log(tmp_path / "mine" / "logs", columns)).page.read_text()
    seen = text_of(page)
    assert "Perplexity held out – 2.68" in seen and 'aria-label="Perplexity against' not in page
    assert "share of tokens that were the likeliest" in seen
    assert "Loss on held-out data 0.986, accuracy on held-out data from" in seen
    assert "Loss held out – 0.986" in seen and "Supervised fine-tuning: mine" in seen


def test_a_note_that_is_none_is_named_and_what_it_says_stays_text(tmp_path):
    folder = make_log(tmp_path / "mine" / "logs", SFT)
    write_note(folder, TrainingNote("textrl sft --data <b>", {"loss <i>": "1 & 2"}))
    page = write_report(folder).page.read_text()
    assert "<pre>textrl sft --data &lt;b&gt;</pre>" in page and "loss &lt;i&gt;</td><td>1 &amp; 2" in page
    (folder / "run.json").write_text('{"command": "x", "figures": {"a": 1}}')
    with pytest.raises(ValueError, match=r"run\.json is no note of training"):
        write_report(folder)


def test_a_models_folder_is_reported_by_the_log_in_it_and_several_lie_over_each_other(tmp_path, capsys):
    model = tmp_path / "my-sft"
    make_log(model / "logs", SFT)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    other = make_log(tmp_path / "other", SFT | {"train/loss": SFT["train/loss"] + 1})
    assert main(["report", str(model)]) == 0
    assert (model / "report.html").is_file() and "Supervised fine-tuning: my-sft" in (
        model / "report.html"
    ).read_text()
    assert main(["report", str(model), str(other), "--output", str(tmp_path / "both.html")]) == 0
    seen = text_of((tmp_path / "both.html").read_text())
    assert "my-sft: Loss on held-out data from 2.70 to 1.20" in seen and "other: Loss on held-out" in seen
    assert "2 logs: my-sft, other" in seen and "other Loss training 4.00 2.00" in seen


def test_logs_and_runs_have_no_page_in_common(tmp_path, capsys):
    from tests.test_report import make_run

    log, run = make_log(tmp_path / "log", SFT), make_run(tmp_path / "run")
    assert main(["report", str(log), str(run)]) == 2
    assert "have no page in common" in capsys.readouterr().err
