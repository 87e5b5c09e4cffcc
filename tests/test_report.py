"""Claims about the report: what it says follows from the log, it stands alone, and bad input is named."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html import escape

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from agents.cli import main
from agents.evaluation.best_of_n import best_of_n, kl_bound
from agents.evaluation.plots import smoothed
from agents.evaluation.records import read_ends, write_evaluation
from agents.evaluation.verdict import Interval
from agents.report import read_run, write_report
from agents.report.browser import rows_of
from agents.report.findings import examine, interval
from agents.report.metrics import write_number
from agents.report.pictures import mean_and_band
from agents.report.reading import default_of, settings
from agents.rollouts.episode_log import EpisodeLog, read_table
from agents.runs import run_directory as runs
from agents.runs.samples import PER_TOKEN, write_samples
from tests.chromium import Browser, find_chromium
from tests.recorded import evaluation, record, recorded_ends

ROWS = 40
STEPS = 500.0 * np.arange(1, ROWS + 1)
RISING = np.linspace(0.1, 1.3, ROWS)
NOISE = 0.01 * np.random.default_rng(0).standard_normal(ROWS)
#: A text run in which nothing is wrong.
HEALTHY = {
    "objective/scores": RISING + NOISE,
    "objective/gold_scores": np.linspace(0.5, 0.8, ROWS) + NOISE,
    "objective/rlhf_reward": RISING - 0.1,
    "objective/kl": np.linspace(0.0, 3.0, ROWS),
    "train/entropy_loss": np.linspace(-0.9, -0.4, ROWS),
    "completions/mean_length": np.linspace(8.0, 9.0, ROWS),
    "completions/clipped_ratio": np.full(ROWS, 0.02),
    "train/loss": NOISE,
    "train/approx_kl": np.full(ROWS, 0.01),
    "time/tokens_per_second": np.full(ROWS, 2000.0),
}


#: Its evaluations on the way: timesteps, score, gold score, KL.
IMPROVES = ((0, 0.0, 0.5, 0.0), (10_000, 0.7, 0.65, 1.5), (20_000, 1.3, 0.8, 3.0))


def make_run(folder, columns=HEALTHY, steps=STEPS, total=20_000, finished=True, points=IMPROVES, **config):
    """A run directory with a log and evaluations that were made up."""
    folder.mkdir(parents=True)
    said = {"agent": "ppo", "env": "TextRLHF-v0", "seed": 0, "command": "textrl train"} | config
    runs.write_config(folder, runs.new_config(total_timesteps=total, **said))
    names = ["time/total_timesteps", *columns]
    rows = zip(steps, *columns.values(), strict=True)
    lines = [",".join("" if np.isnan(x) else repr(float(x)) for x in row) for row in rows]
    (folder / "progress.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    if finished:
        (folder / "final").mkdir()
        (folder / "final" / "agent.json").write_text(json.dumps({"num_timesteps": total}))
    if points and "objective/scores" in columns:
        record(folder, points, total, ended=finished)
    return folder


def add_samples(folder, *tables):
    """Record tables of ``(prompt, response, score, kl)``, one for each time."""
    writer = SummaryWriter(str(folder))
    for i, rows in enumerate(tables):
        log = EpisodeLog(1)
        log.text = dict(
            zip(("prompt", "response", "score", "kl_sum"), map(list, zip(*rows, strict=True)), strict=True)
        )
        writer.add_text("samples/table", log.table(), 1000 * (i + 1))
    writer.close()


def page_of(*folders, output=None):
    return write_report(list(folders), output).page.read_text()


def text_of(page):
    """What a reader sees, without pictures and markup."""
    page = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<script.*?</script>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def names_of(folder):
    return [finding.name for finding in examine(read_run(folder))]


# -- the page -----------------------------------------------------------------------------------------------


def test_counts_that_were_noted_are_no_defaults_of_the_arguments_they_count(tmp_path):
    noted = {"prompts": 12, "max_new_tokens": 44, "max_prompt_length": 35}
    folder = make_run(tmp_path / "run", env_kwargs={"prompts": "mine.jsonl"})
    config = runs.read_config(folder) | {"in_force": {"env": noted}}
    found = settings(config)
    assert found["prompts"] == ("mine.jsonl", None)
    assert default_of(config, "max_new_tokens") == 44


def test_the_page_stands_alone_and_may_run_no_script_but_its_own(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    assert not re.search(r"""<link|@import|(src|href)=(?!"#)|url\((?!#)""", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in page
    )
    assert len(re.findall("<script", page)) == 2, "the other one holds the samples as JSON"
    without = page_of(make_run(tmp_path / "bare", points=None))
    assert "<script" not in without and "script-src" not in without
    assert page.count("<svg") >= 8
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)), "pictures in one page share no id"


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = make_run(tmp_path / "run")
    assert page_of(folder) == page_of(folder)


def test_figures_settings_and_the_summary_are_those_of_the_run(tmp_path):
    given = {"learning_rate": 1e-3, "gae_lambda": 0.95, "n_epochs": 2}
    folder = make_run(tmp_path / "run", agent_kwargs=given, env_kwargs={"kl_coef": 0.1}, seed=7)
    seen = text_of(page_of(folder))
    assert "It improved the model. On 64 held-out prompts the gold judge prefers" in seen
    assert "KL to the reference nats in a response 0.00 3.00 +3.00" in seen
    assert "learning_rate 0.001 (default 0.0003)" in seen and "kl_coef 0.1 (default 0.05)" in seen
    assert "Seed 7" in seen and "20,000 tokens, 40 rows logged" in seen and "2,000 tokens per second" in seen
    assert "gae_lambda" not in settings(read_run(folder).config), "what is the default differs from none"


def test_a_run_of_an_agent_whose_code_is_gone_is_reported_all_the_same(tmp_path):
    folder = make_run(tmp_path / "run", agent="gone.py:MyAgent", agent_kwargs={"patience": 3})
    seen = text_of(page_of(folder))
    assert "MyAgent on TextRLHF-v0" in seen and "patience 3" in seen


def test_curves_are_those_that_were_logged(tmp_path):
    exact = {"exact/gap": np.linspace(1.0, 0.1, ROWS), "group/reward_std": np.full(ROWS, 0.5)}
    with_gap = page_of(make_run(tmp_path / "a", HEALTHY | exact))
    assert (
        'aria-label="Gap to the optimum against tokens"' in with_gap and "Spread within a group" in with_gap
    )
    without = page_of(make_run(tmp_path / "b"))
    assert "Gap to the optimum" not in without and "Spread within a group" not in without
    assert 'aria-label="Gold score against the KL"' in without


def test_a_run_without_text_shows_return_entropy_and_the_updates(tmp_path):
    late = np.where(np.arange(ROWS) < 3, np.nan, np.linspace(20.0, 400.0, ROWS))  # no episode ended at first
    columns = {
        "rollout/ep_rew_mean": late,
        "train/entropy_loss": np.linspace(-0.69, -0.4, ROWS),
        "train/explained_variance": RISING / 2,
    }
    page = page_of(make_run(tmp_path / "run", columns, env="CartPole-v1"))
    for said in ("Return against steps", "Entropy against steps", "Explained variance against steps"):
        assert f'aria-label="{said}"' in page
    assert "Score against KL" not in page and "in 20,000 steps" in text_of(page)


def test_held_out_figures_of_the_demo_are_in_the_page(tmp_path):
    folder = make_run(tmp_path / "run", points=None)
    found = {"win_rate": 0.834, "win_rate_low": 0.804, "win_rate_high": 0.864, "prompts": 128}
    found |= {"before": {"gold": 0.51, "score": -0.1}, "after": {"gold": 0.84, "score": 1.4}}
    (folder / "evaluation.json").write_text(json.dumps(found))
    seen = text_of(page_of(folder))
    assert (
        "83.4 % of comparisons (95 % confidence 80.4 % to 86.4 %" in seen and "gold score 0.510 0.840" in seen
    )


# -- samples ------------------------------------------------------------------------------------------------


def test_first_and_last_responses_to_one_prompt_stand_side_by_side(tmp_path):
    folder = make_run(tmp_path / "run", points=None)
    first = [("two plus two?", "perhaps", -0.5, 0.0), ("asked once", "yes", 0.0, 0.0)]
    between = [("two plus two?", "five", 0.1, 0.7), ("the sky?", "green", 0.3, 0.2)]
    last = [("two plus two?", "four", 1.25, 2.5), ("the sky?", "blue", 0.9, 1.0)]
    add_samples(folder, first, between, last)
    seen = text_of(page_of(folder))
    minus = "\N{MINUS SIGN}"
    assert f"two plus two? perhaps at 1,000 tokens {minus}0.50 0.00 four at 3,000 tokens 1.25 2.50" in seen
    assert "the sky? green at 2,000 tokens 0.30 0.20 blue at 3,000 tokens 0.90 1.00" in seen
    assert "asked once" not in seen and "five" not in seen


def test_what_a_model_writes_stays_text(tmp_path):
    folder = make_run(tmp_path / "run", points=None)
    nasty = "<script>alert(1)</script> a | b \\| <b>"
    add_samples(folder, [("p & q", nasty, 0.0, 0.0)], [("p & q", "<td>", 0.0, 0.0)])
    page = page_of(folder)
    assert escape(nasty) in page and escape("p & q") in page and "<script" not in page


def test_a_table_of_samples_is_read_as_it_was_written():
    log = EpisodeLog(1)
    written = ["a | b", "| c |", "d \\| e", "", " \u2028 f", "ends in \\"]
    log.text = {
        "prompt": [f"p{i}" for i in range(len(written))],
        "response": written,
        "score": [0.5] * len(written),
    }
    rows = read_table(log.table())
    assert [row["response"] for row in rows] == written and rows[0] == {
        "prompt": "p0",
        "response": "a | b",
        "score": "0.50",
    }


def test_first_samples_are_those_of_the_first_policy_and_last_ones_of_the_last(tmp_path):
    folder = make_run(tmp_path / "run")
    ends = read_run(folder).ends
    seen = text_of(page_of(folder))
    first, last = (ends[end].sampled.responses[0][0] for end in ("start", "final"))
    assert re.search(rf"question 0\? {first} .{{10,40}} {last} ", seen)
    assert "First and last answers" in seen


NASTY = "</script><script>alert(1)</script><!-- <b>"


def test_what_a_model_writes_cannot_leave_the_samples(tmp_path):
    folder = make_run(tmp_path / "run")
    responses = [[NASTY] * 4 for _ in range(64)]
    nasty = evaluation(20_000, 1.3, 0.8, responses=responses)
    nasty = dataclasses.replace(nasty, sampled=dataclasses.replace(nasty.sampled, prompts=[NASTY] * 64))
    for end in ("start", "final"):
        write_evaluation(folder, nasty, end)
    page = page_of(folder)
    assert page.count("<script") == 2 and page.count("</script") == 2 and escape(NASTY) in page
    data = re.search(r"<script type='application/json' id=samples>(.*?)</script>", page, re.DOTALL)[1]
    assert {row["response"] for row in json.loads(data)} == {NASTY}


def add_tokens(folder):
    """What the last update learned from, two responses of it token by token."""
    detail = {name: [[0.1, -0.5], [0.2, 0.3], None] for name in PER_TOKEN if name != "tokens"}
    columns = {
        "prompt": ["p & q", "the sky?", "snow?"],
        "prompt/kind": ["letters", "colours", "colours"],
        "response": ["a <b>", "blue", "white"],
        "score": [0.5, 1.0, -1.0],
        "kl_sum": [0.1, 0.2, 0.3],
        "response_length": [2.0, 2.0, 2.0],
        "return": [0.4, 0.9, -1.2],
        "advantage": [0.1, -2.0, 0.5],
        "tokens": [["a", "<b>"], ["blue", "<eos>"], None],
    }
    write_samples(folder, 20_000, columns | detail)


def test_episodes_stand_under_the_microscope_token_by_token(tmp_path):
    folder = make_run(tmp_path / "run")
    add_tokens(folder)
    page = page_of(folder)
    assert page.index("the sky? <span>score 1.00, advantage") < page.index("p &amp; q <span>"), (
        "the largest first"
    )
    seen = text_of(page)
    for words in ("Episodes under the microscope", "log pi of the reference 0.20 0.30", "blue &lt;eos&gt;"):
        assert words in seen, words
    assert "snow?" not in seen, "its tokens were not kept"


def test_a_small_number_is_faint_beside_the_large_one_of_another_episode(tmp_path):
    folder = make_run(tmp_path / "run")
    add_tokens(folder)
    strips = page_of(folder).split("<figure class=strip>")[1:]
    row = r'advantage</th><td[^>]*>[^<]*</td><td class=num style="background:rgba\([0-9,]*,([0-9.]+)\)'
    largest = [float(re.search(row, strip)[1]) for strip in strips]  # advantages 0.3 and -0.5
    assert largest[0] < largest[1], "the stronger, the further, whichever episode it is in"


def test_a_curve_that_never_moves_is_a_number_and_no_empty_chart(tmp_path):
    columns = HEALTHY | {"objective/kl_coef": np.full(ROWS, 0.05)}
    page = page_of(make_run(tmp_path / "run", columns))
    still = "KL of an update 0.01, KL coefficient 0.05, Responses cut off 0.02"
    assert f"The same throughout: {still}." in text_of(page)
    assert '<svg role="img" aria-label="KL of an update' not in page
    one = page_of(make_run(tmp_path / "one", {name: x[:1] for name, x in columns.items()}, STEPS[:1]))
    assert "The log has 1 row, fewer" in one and 'aria-label="Entropy against' not in one
    assert "Entropy 0.9" in text_of(one)


def test_what_was_learned_from_is_filtered_by_kind_too(tmp_path):
    folder = make_run(tmp_path / "run")
    add_tokens(folder)
    kinds = {
        row["prompt"]: row["kind"] for row in rows_of(read_run(folder)) if row["from"].startswith("learned")
    }
    assert kinds == {"p & q": "letters", "the sky?": "colours", "snow?": "colours"}


@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_the_browser_finds_filters_and_sorts_in_a_real_one(tmp_path):
    folder = make_run(tmp_path / "run")
    add_tokens(folder)
    address = write_report([folder], None).page.as_uri()
    with Browser() as browser:
        browser.open(address)
        assert "25 of 515 samples" in browser.evaluate("document.body.innerText")
        browser.evaluate(
            "var f = document.getElementById('find'); f.value = 'SNOW'; f.dispatchEvent(new Event('input'))"
        )
        browser.evaluate("document.querySelector('button[value=score]').click()")
        rows = browser.evaluate("[...document.querySelectorAll('#rows tr')].map(r => r.innerText)")
        assert len(rows) == 1 and "white\tlearned from at 20,000" in rows[0]
        assert (
            browser.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')")
            == "descending"
        )
        browser.open(address, width=390)
        # On a narrow screen a row is a card, with nothing of it beyond the edge, and each number says what it is.
        seen = browser.evaluate("document.querySelector('#rows tr').innerText")
        edge = "[...document.querySelectorAll('.samples td')].map(c => c.getBoundingClientRect().right)"
        assert browser.evaluate(f"Math.max(...{edge})") <= 390, seen
        label = "c => getComputedStyle(c, '::before').content"
        labels = browser.evaluate(f"[...document.querySelectorAll('#rows tr:first-child td')].map({label})")
        assert labels[:4] == ['"prompt "', '"response "', '"from "', '"score "']
        assert not browser.errors and not browser.requests


# -- warnings -----------------------------------------------------------------------------------------------


def test_a_healthy_run_warns_of_nothing_and_says_what_was_looked_for(tmp_path):
    folder = make_run(tmp_path / "run")
    assert names_of(folder) == []
    assert "Looked for and not found" in (seen := text_of(page_of(folder))) and "over-optimisation" in seen


@pytest.mark.parametrize(
    ("column", "values", "name", "figures"),
    [
        ("train/entropy_loss", np.linspace(-0.9, -0.01, ROWS), "entropy collapse", "5 % of .* 0.866 to 0.044 nats"),
        ("completions/clipped_ratio", np.linspace(0.0, 0.6, ROWS), "responses cut off", "58 % .* 24 tokens .* 2 %"),
        ("group/frac_zero_std", np.linspace(0.0, 0.9, ROWS), "groups without variance", "87 % of the groups"),
        ("objective/scores", 0.5 + NOISE, "no improvement", "score has not risen .* 0.50"),
        ("completions/mean_length", np.linspace(8.0, 20.0, ROWS), "change of length", "grew from 8.46 to 19.54"),
        ("objective/kl", np.linspace(0.0, -1.0, ROWS), "negative KL", "ends at .0.96 nats"),
        ("train/approx_kl", np.full(ROWS, 0.4), "large updates", "0.40 nats"),
        ("train/explained_variance", np.full(ROWS, -0.5), "a critic that misleads", "ends at .0.50"),
        ("train/loss", np.where(STEPS == 2500, np.inf, 0.0), "numbers that are not finite", "1 of 40 .* at 2,500"),
    ],
)  # fmt: skip
def test_a_warning_names_the_figures_it_follows_from(column, values, name, figures, tmp_path):
    folder = make_run(tmp_path / "run", HEALTHY | {column: values})
    found = {finding.name: finding.text for finding in examine(read_run(folder))}
    assert list(found) == [name] and re.search(figures, found[name]), found
    assert escape(found[name]) in page_of(folder)


#: Evaluations of runs, and what the page has to say of each.
PEAKS = (*IMPROVES, (30_000, 1.7, 0.66, 9.0))
LEVEL = (*IMPROVES, (30_000, 1.31, 0.66, 9.0))
UNSTEADY = (*IMPROVES, (30_000, 0.5, 0.66, 4.0))
HACKED = ((0, 0.0, 0.5, 0.0), (20_000, 2.0, 0.3, 30.0))
BLIND = ((0, 0.0, None, 0.0), (20_000, 2.0, None, 30.0))


@pytest.mark.parametrize(
    ("points", "finding", "figures", "answer"),
    [
        (PEAKS, "over-optimisation", r"at 20,000 .* gold .0\.1\d .* score \+0\.39", "then fooled the reward"),
        (LEVEL, "falling gold score", r"score 0\.00 \(", "The score does not show it"),
        (UNSTEADY, "falling gold score", r"gold .0\.1\d .* score .0\.[78]", "then lost part of that"),
        (HACKED, "a fooled reward", r"score changed by \+2\.00", "It fooled the reward"),
        (HACKED, "far from the reference", r"30\.0 nats", "It fooled the reward"),
        (BLIND, "no gold judge", "Only the reward that was trained on", "This page cannot tell"),
        (BLIND, "far from the reference", r"30\.0 nats", "beyond 25 nats answers are often gibberish"),
        (None, "undecided", "not evaluated on its way", "Not decided"),
    ],
)  # fmt: skip
def test_the_page_says_what_held_out_comparisons_say(points, finding, figures, answer, tmp_path):
    folder = make_run(tmp_path / "run", points=points)
    found = {finding.name: finding.text for finding in examine(read_run(folder))}
    assert finding in found and re.search(figures, found[finding]), found
    seen = text_of(page_of(folder))
    assert answer in seen and "Did it improve the model, or fool the reward?" in seen


def test_what_is_decided_by_comparisons_is_not_cleared_where_there_are_none(tmp_path):
    for name, points in (("blind", BLIND), ("none", None)):
        seen = text_of(page_of(make_run(tmp_path / name, points=points)))
        clear = re.search(r"Looked for and not found: ([^.]*)\.", seen)[1]
        assert "over-optimisation" not in clear and "fooled" not in clear and "falling" not in clear
        assert "no gold judge" not in clear


@pytest.mark.parametrize(
    ("name", "points", "style", "opening", "also"),
    [
        ("good", IMPROVES, "good", "It improved the model.", "No policy on its way was better."),
        ("hacked", HACKED, "bad", "It fooled the reward.", "Nothing was gained over the first policy: use that one."),
        ("past its best", PEAKS, "bad", "It improved the model and then fooled the reward.", "The policy to use is"),
        ("collapsed", IMPROVES, "unknown", "It improved the model.", "Of ten answers to one prompt 2.0 differ"),
        ("blind", BLIND, "unknown", "This page cannot tell: there is no gold judge", "30.0 nats from the reference"),
    ],
)  # fmt: skip
def test_a_stranger_reads_in_one_sentence_what_became_of_a_run(name, points, style, opening, also, tmp_path):
    folder = make_run(tmp_path / "run", points=points)
    if name == "collapsed":
        last = read_ends(folder)["final"]
        write_evaluation(folder, dataclasses.replace(last, distinct_of_10=2.0), "final")
    page = page_of(folder)
    found = re.search(r'<p class="verdict (\w+)">(.*?)</p>', page, re.DOTALL)
    headline, details = found[2].removeprefix("<strong>").split("</strong>")
    assert found[1] == style and headline.startswith(opening) and also in details, found[0]
    assert ("same thing again and again" in headline) == (name == "collapsed")
    assert page.index(found[0]) < page.index("<svg"), "before any curve"


def test_the_end_of_an_interval_that_decides_is_not_rounded_to_zero():
    assert "0.090 to \N{MINUS SIGN}0.004)" in interval(Interval(-0.05, -0.09, -0.0041))
    assert interval(Interval(0.05, 0.01, 0.09)) == "+0.05 (95 % +0.01 to +0.09)"
    assert interval(Interval(0.0, 0.0, 0.0)) == "0.00 (95 % 0.00 to 0.00)"


def test_a_fall_that_may_be_chance_is_said_to_be_one_of_the_two(tmp_path):
    folder = make_run(tmp_path / "run")
    for end, found in recorded_ends("ppo as the demo has it, 120,000 tokens").items():
        write_evaluation(folder, found, end)
    seen = text_of(page_of(folder))
    assert "It improved the model, and may have gone past its best; that is not certain." in seen
    assert (
        "it wins 47.4 % (44.5 to 50.6) of comparisons: gold \N{MINUS SIGN}0.037" in seen
        and "13 % of what it had gained" in seen
    )
    assert "interval holds 50 %" in seen and "fooled the reward." not in seen
    assert "perhaps past its best" in names_of(folder) and "over-optimisation" not in names_of(folder)
    cleared = re.search(r"Looked for and not found: ([^.]*)\.", seen)[1]
    assert "over-optimisation" not in cleared and "falling gold score" not in cleared, (
        "what is in doubt is not cleared"
    )


def test_many_small_losses_and_a_few_large_gains_are_told_apart_from_a_fall(tmp_path):
    folder = make_run(tmp_path / "run", points=PEAKS)
    ends = read_ends(folder)
    golds = {"best": np.full((64, 4), 0.7), "final": np.full((64, 4), 0.69)}
    golds["final"][:24] = 1.0  # 40 of 64 prompts a little worse, the others much better
    for end, gold in golds.items():
        sampled = dataclasses.replace(ends[end].sampled, gold=gold)
        write_evaluation(folder, dataclasses.replace(ends[end], sampled=sampled), end)
    seen = text_of(page_of(folder))
    assert "it wins 37.5 %" in seen and "But the gold score has risen, so it may be chance" in seen
    assert "of what it had gained" not in seen and "fooled the reward." not in seen


def blind_run(folder, score, kl):
    """A run without a gold judge, with many answers of the reference to half of its prompts."""
    make_run(folder, points=((0, 0.0, None, 0.0), (20_000, score, None, kl)))
    many = evaluation(0, 0.0, None, kl=0.0, samples=32, prompts=32, seed=5)
    write_evaluation(folder, many, "reference")
    return many.sampled


def test_without_a_judge_the_score_stands_beside_the_references_best_of_n_at_its_kl(tmp_path):
    sampled = blind_run(tmp_path / "near", 0.2, kl_bound(4))
    near = text_of(page_of(tmp_path / "near"))
    best = best_of_n(sampled.score, None, 4).score
    assert f"Choosing the best of 4 answers of the reference by the same reward scores {best:.2f}" in near
    assert "held out, reference" not in near and "best of 32" in near
    blind_run(tmp_path / "far", 2.0, 8.1)
    far = text_of(page_of(tmp_path / "far"))
    assert re.search(r"as far as the best of 8,9\d\d answers could be\. The best of 32", far)
    assert "beyond what the reference is seen to reach" in far
    blind_run(tmp_path / "wasted", 0.1, 900.0)
    wasted = text_of(page_of(tmp_path / "wasted"))
    assert "endlessly many answers" in wasted and "scores no more than that" in wasted


def test_training_batches_whose_gold_falls_alarm_nobody_where_held_out_answers_do_not(tmp_path):
    falling = HEALTHY | {"objective/gold_scores": np.linspace(0.9, 0.6, ROWS)}
    assert names_of(make_run(tmp_path / "run", falling)) == []


def test_proxy_and_gold_stand_on_one_axis_with_the_peak_marked(tmp_path):
    page = page_of(make_run(tmp_path / "run", points=PEAKS))
    picture = re.search(r"<svg[^>]*Proxy and gold over the square root of the KL.*?</svg>", page, re.DOTALL)[
        0
    ]
    assert "gold is highest at 3.0 nats, 20,000 timesteps" in text_of(re.sub("<svg", "<g", picture))


def test_the_question_is_not_asked_of_small_worlds(tmp_path):
    columns = {name: HEALTHY[name] for name in ("objective/scores", "objective/kl")}
    folder = make_run(tmp_path / "run", columns, points=None, env="TokenTree-v0")
    seen = text_of(page_of(folder))
    assert "Did it improve the model" not in seen and "ndecided" not in seen and "gold judge" not in seen


def test_kinds_are_told_by_the_column_that_is_asked_for(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "By kind of prompt" in text_of(page_of(folder))
    topics = {"topic": ["x", "y"] * 32, "kind": [str(i) for i in range(64)]}
    for i, end in enumerate(("start", "final")):
        write_evaluation(folder, evaluation(20_000 * i, 0.5 + i, 0.5 + 0.3 * i, columns=topics), end)
    assert "By topic of prompt" in text_of(write_report(folder, by="topic").page.read_text())
    assert "By kind of prompt" not in text_of(page_of(folder)), "as many kinds as prompts tell nothing"
    with pytest.raises(ValueError, match="no column 'theme'; they have topic, kind"):
        write_report(folder, by="theme")


def test_several_runs_are_judged_side_by_side(tmp_path):
    folders = [make_run(tmp_path / "good"), make_run(tmp_path / "hacked", points=HACKED, seed=1)]
    seen = text_of(page_of(*folders))
    assert "good improved" in seen and "hacked fooled the reward" in seen


def test_a_rollout_that_was_not_learned_from_has_no_loss_and_that_is_no_alarm(tmp_path):
    names = [name for name in HEALTHY if name.startswith("train/")]
    without = {name: np.append(HEALTHY[name][:-1], np.nan) for name in names}
    assert "numbers that are not finite" not in names_of(make_run(tmp_path / "a", HEALTHY | without))
    alone = HEALTHY | {"train/loss": without["train/loss"]}
    assert "numbers that are not finite" in names_of(make_run(tmp_path / "b", alone))


def test_a_run_that_its_budget_has_ended_is_not_unfinished(tmp_path):
    folder = make_run(tmp_path / "run", total=20_000, kl_budget=2.5)
    document = {"num_timesteps": 12_000, "stopped_at_kl": 2.61}
    (folder / "final" / "agent.json").write_text(json.dumps(document))
    found = {finding.name: finding.text for finding in examine(read_run(folder))}
    assert "2.6 nats from the reference, beyond the budget of 2.5" in found["stopped by its KL budget"]
    assert "unfinished run" not in found


def test_runs_that_stopped_early_and_short_logs_are_named(tmp_path):
    short = {name: values[:4] for name, values in HEALTHY.items()}
    folder = make_run(tmp_path / "run", short, STEPS[:4], finished=False)
    stopped, undecided, few = sorted(examine(read_run(folder)), key=lambda finding: -ord(finding.name[0]))
    assert "when the run has come to its end" in undecided.text
    assert "2,000 of 20,000 tokens" in stopped.text and f"--resume {folder}" in stopped.text
    assert few.name == "short log" and "4 rows" in few.text
    assert read_run(folder).num_timesteps == 2000


# -- several runs -------------------------------------------------------------------------------------------


def test_runs_that_differ_by_the_seed_become_one_mean_and_band(tmp_path):
    shifted = HEALTHY | {"objective/scores": RISING + 1.0}
    folders = [make_run(tmp_path / "ppo-0"), make_run(tmp_path / "ppo-1", shifted, seed=1)]
    other = make_run(tmp_path / "low-kl", env_kwargs={"kl_coef": 0.01})
    report = write_report([*folders, other])
    assert [(group.label, len(group.runs)) for group in report.groups] == [("ppo", 2), ("low-kl", 1)]
    assert report.page == tmp_path / "report.html"
    seen = text_of(report.page.read_text())
    assert "2 settings on TextRLHF-v0 compared" in seen and "kl_coef 0.05 0.01" in seen
    assert "ppo 0, 1 20,000 1.81 1.31 to 2.30" in seen, "mean of the two, lowest and highest"
    alone = text_of(page_of(*folders))
    assert "PPO on TextRLHF-v0, 2 seeds" in alone and f"Runs {folders[0]}, {folders[1]}" in alone
    assert "Seeds 0, 1" in alone


def test_mean_and_band_are_read_off_at_common_timesteps():
    a, b = np.arange(100.0, 2000.0, 100.0), np.arange(150.0, 2100.0, 130.0)
    grid, mean, low, high = mean_and_band([(a, np.full(len(a), 1.0)), (b, np.full(len(b), 3.0))])
    assert grid[0] == 150.0 and grid[-1] == b[-1]
    assert np.allclose(mean, 2.0) and np.allclose(low, 1.0) and np.allclose(high, 3.0)


def test_one_run_of_many_that_went_wrong_moves_neither_mean_nor_band_far():
    steps = np.arange(100.0, 2000.0, 100.0)
    levels = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 50.0]
    _, mean, low, high = mean_and_band([(steps, np.full(len(steps), level)) for level in levels])
    inner = np.sort(levels)[2:6].mean()
    assert np.allclose(mean, inner) and (low <= mean).all() and (mean <= high).all()
    assert low.min() > 0.9 and np.mean(levels) > 7


def test_the_mean_ends_where_the_runs_end():
    a, b = np.arange(100.0, 2000.0, 100.0), np.arange(150.0, 2100.0, 130.0)
    *_, mean, low, high = mean_and_band([(a, a), (b, b)])
    ends = [smoothed(a)[-1], smoothed(b)[-1]]
    assert mean[-1] == np.mean(ends) and low[-1] == min(ends) and high[-1] == max(ends)


def test_a_run_that_broke_off_leaves_the_mean_where_it_ended():
    whole, broken = np.arange(100.0, 2000.0, 100.0), np.arange(100.0, 500.0, 100.0)
    grid, mean, *_ = mean_and_band([(whole, np.full(len(whole), 1.0)), (broken, np.full(len(broken), 3.0))])
    assert grid[-1] == whole[-1] and mean[0] == 2.0 and mean[-1] == 1.0


def test_a_page_does_not_grow_with_the_log(tmp_path):
    long = {name: np.repeat(values, 100) + np.tile(NOISE, 100) for name, values in HEALTHY.items()}
    page = page_of(make_run(tmp_path / "run", long, 5.0 * np.arange(1, 100 * ROWS + 1)))
    assert len(page) < 1_000_000 and "4,000 rows logged" in page


def test_what_makes_runs_hard_to_compare_is_said(tmp_path):
    without_gold = {name: values for name, values in HEALTHY.items() if name != "objective/gold_scores"}
    a = make_run(tmp_path / "a", env_kwargs={"reward": "rules:short"})
    b = make_run(tmp_path / "b", without_gold, env_kwargs={"reward": "rules:long"})
    found = {finding.name: finding.text for finding in write_report([a, b]).findings}
    assert found == {
        "not the same task": "The runs differ in reward.",
        "not logged by all": "Gold score (objective/gold_scores) is missing in b.",
    }


# -- errors and files ---------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a run, a model, a log of SFT, a run that has only begun, and one on another environment."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "begun", {}, [])
    make_run(tmp_path / "runs" / "pole", {"rollout/ep_rew_mean": RISING}, env="CartPole-v1")
    make_run(tmp_path / "runs" / "plain", {"rollout/ep_rew_mean": RISING})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "sft-log").mkdir()
    (tmp_path / "sft-log" / "progress.csv").write_text("train/loss\n0.5\n")
    (tmp_path / "thesis.html").write_text("<p>mine")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["runs/frist"], "there is no folder runs/frist. Did you mean 'first'?"),
        (["empty"], "empty is not a run directory: it has no config.json"),
        (["thesis.html"], "thesis.html is a file"),
        (["model"], "is not the configuration of a run"),
        (["sft-log"], "sft-log/progress.csv has no column 'time/total_timesteps'"),
        (["runs/first", "sft-log"], "sft-log/progress.csv has no column"),
        (["runs"], "it holds some; try: textrl report runs/begun runs/first"),
        (["runs/first/final"], "is a checkpoint; the run is runs/first"),
        (["runs/begun"], "runs/begun has not finished a rollout yet"),
        (["runs/first", "runs/pole"], "different environments"),
        (["runs/first", "runs/plain"], "runs/first logs objective/scores and runs/plain does not"),
        (["runs/first", "runs/first/"], "is given twice"),
        (["runs/first", "--output", "thesis.html"], "thesis.html is already there and is not a report"),
        (["runs/first", "--output", "first.pdf"], "try first.html"),
        (["runs/first", "--output", "empty"], "name a file in it: empty/report.html"),
        ([], "RUN_DIR"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(args, said, here, capsys):
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main(["report", *args]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert before == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


def test_a_config_that_is_cut_short_is_named(here):
    (here / "runs" / "first" / "config.json").write_text('{"format": 1, "ag')
    with pytest.raises(ValueError, match=r"first/config\.json is no JSON .*line 1, column 15"):
        read_run(here / "runs" / "first")


def test_an_earlier_report_is_replaced_and_a_new_run_deletes_it(here):
    page = write_report("runs/first").page
    assert write_report("runs/first").page == page and page.name == runs.REPORT
    runs.prepare_directory(here / "runs" / "first", overwrite=True)
    assert not page.exists()


@pytest.mark.parametrize(
    "args",
    [
        ["--env", "TokenTree-v0", "--agent", "grpo", "--total-timesteps", "1200"],
        ["--env", "CartPole-v1", "--n-steps", "64", "--total-timesteps", "1000"],
        ["--n-episodes", "16", "--max-new-tokens", "6", "--total-timesteps", "1200"],
    ],
)
def test_what_train_leaves_can_be_reported(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--no-progress", *args, "--run-dir", "run"]) == 0
    capsys.readouterr()
    assert main(["report", "run", "--output", "pages/one.html"]) == 0
    shown = capsys.readouterr().out
    assert "The page: pages/one.html" in shown and "first" in shown and "Entropy" in shown
    page = (tmp_path / "pages" / "one.html").read_text()
    assert "Learning curves" in page and "textrl train --no-progress" in page
    assert ("<h2>Samples</h2>" in page) == ("--n-episodes" in args)


def test_numbers_are_written_with_a_real_minus_and_no_negative_zero():
    assert [write_number(x, 2) for x in (-0.001, -1.5, 1234.5, float("nan"))] == [
        "0.00",
        "\N{MINUS SIGN}1.50",
        "1,234.50",
        "–",
    ]
