"""Claims about the picture of how sure a model is of every token."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from agents.cli import main
from agents.evaluation.token_heatmap import (
    TokenScore,
    colour,
    heatmap_html,
    score_tokens,
    summary,
    token_heatmap,
)
from agents.evaluation.token_heatmap_image import heatmap_image, png
from agents.offline.sft import encode_all, evaluate_sft
from tests.tiny import make_model, make_tokenizer

RECORDS = [
    {"prompt": "a b", "completion": "c d e"},
    {"prompt": "h i a b c", "completion": "d"},
    {"text": "f g h"},
]


def scored(seed: int = 0, records=RECORDS):
    return score_tokens(make_model("llama", seed), make_tokenizer(), records)


def test_the_probabilities_are_those_of_the_model_given_all_before():
    model, tokenizer = make_model("llama"), make_tokenizer()
    ids = torch.tensor([tokenizer("a b c d e")["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        probs = model(ids).logits[0].softmax(-1)
    for t, token in enumerate(scored()[0]):
        if t >= 2:
            assert token.prob == pytest.approx(float(probs[t - 1, ids[0, t]]), rel=1e-5)
            assert token.choice_prob == pytest.approx(float(probs[t - 1].max()), rel=1e-5)
            assert token.choice == tokenizer.decode([int(probs[t - 1].argmax())])


def test_prompts_are_not_scored_and_the_end_token_is():
    shown = [[(token.text, token.prob is not None) for token in record] for record in scored()]
    assert shown[0] == [("a", False), ("b", False), ("c", True), ("d", True), ("e", True), ("<eos>", True)]
    assert [is_scored for _, is_scored in shown[1]] == [False] * 5 + [True] * 2
    assert [is_scored for _, is_scored in shown[2]] == [False] + [
        True
    ] * 3  # nothing comes before the first token


def test_the_summary_is_what_fine_tuning_says_of_the_same_records():
    model, tokenizer = make_model("llama"), make_tokenizer()
    expected = evaluate_sft(model, encode_all(RECORDS, tokenizer), tokenizer.pad_token_id)
    found = summary(scored())
    assert {name: pytest.approx(value, rel=1e-5) for name, value in found.items()} == expected


def test_a_conversation_shows_the_users_turns_unscored_between_the_assistants():
    end = "{% if m['role'] == 'assistant' %}<eos> {% endif %}"
    template = "{% for m in messages %}{{ m['content'] }} " + end + "{% endfor %}"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokens = score_tokens(make_model("llama"), tokenizer, [record])[0]
    marked = [(token.text, token.prob is not None) for token in tokens]
    assert marked == [("a", False), ("b", True), ("<eos>", True), ("c", False), ("d", True), ("<eos>", True)]


def test_scoring_leaves_the_model_in_its_mode_and_leaves_out_what_has_nothing_to_score():
    model = make_model("llama", seed=5).train()
    assert score_tokens(model, make_tokenizer(), [{"text": ""}]) == []
    assert model.training
    model.eval()


def test_colours_go_from_red_over_yellow_to_green_and_prompts_are_grey():
    red, yellow, green = colour(0.0), colour(0.5), colour(1.0)
    assert red[0] > 1.5 * red[1] and green[1] > 1.5 * green[0] and min(yellow[:2]) > 1.5 * yellow[2]
    shades = [colour(k / 100) for k in range(101)]
    redness = [r - g for r, g, _ in shades]
    assert redness == sorted(redness, reverse=True)
    assert max(colour(None)) - min(colour(None)) < 8
    assert all(0 <= c <= 255 for shade in shades for c in shade)


class Page(HTMLParser):
    """Every token of a page: its text, its tip, its kind, its section; and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens, self.sections, self.links, self._open = [], 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sections += tag == "section"
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        self.links += [tag] if tag in ("script", "link") else []
        if tag == "span" and attributes.get("class", "").startswith("t"):
            self.tokens.append({"text": "", **attributes})
        if tag != "meta":  # the one element here that is not closed
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "b":
            self.tokens[-1]["text"] += data


def test_the_page_holds_every_token_under_every_model_with_its_probability_and_the_models_choice():
    before, after = scored(0), scored(1)
    text = heatmap_html({"before": before, "after": after}, "A title")
    page = Page(text)
    assert page.sections == len(RECORDS) and "A title" in text and not page.links
    responses = [[t for t in record if t.prob is not None] for found in (before, after) for record in found]
    coloured = [token for token in page.tokens if "data-tip" in token]
    assert len(coloured) == sum(map(len, responses))
    tips = [token["data-tip"] for token in coloured]
    for token in (t for record in responses for t in record):
        tip = next(tip for tip in tips if tip.startswith(f"“{token.text}” at {100 * token.prob:.1f} %"))
        assert "first choice" in tip or f"its own choice: “{token.choice}”" in tip
    grey = [token["text"] for token in page.tokens if "data-tip" not in token]
    assert grey == ["a", "b", "h", "i", "a", "b", "c", "f"]  # each prompt once


def test_text_that_looks_like_markup_stays_text():
    record = [TokenScore("<script>"), TokenScore('"><b>', 0.5, "<i>&", 0.9)]
    page = Page(heatmap_html({"<m>": [record]}, "<title>"))
    assert [token["text"] for token in page.tokens] == ["<script>", '"><b>']
    assert "<i>&" in page.tokens[1]["data-tip"] and not page.links


def test_the_picture_shows_sure_tokens_green_surprising_ones_red_and_grows_with_the_records():
    def picture(*probs, records=1):
        record = [TokenScore("prompt"), *(TokenScore("word", prob, "other", 0.6) for prob in probs)]
        return heatmap_image({"model": [record] * records})

    def has(image, prob):
        return bool((image == colour(prob)).all(-1).any())

    sure, torn = picture(1.0, 1.0), picture(1.0, 0.0)
    assert has(sure, 1.0) and not has(sure, 0.0) and has(torn, 1.0) and has(torn, 0.0) and has(sure, None)
    assert sure.dtype.name == "uint8" and sure.shape[2] == 3
    assert picture(1.0, records=3).shape[0] > sure.shape[0]
    assert picture(*[0.5] * 60).shape[0] > sure.shape[0]  # a long answer goes on in the next line
    assert png(sure).startswith(b"\x89PNG")


def test_dollars_and_white_space_can_be_drawn():
    record = [TokenScore("$x"), TokenScore("$^$", 0.5), TokenScore("␣", 0.2), TokenScore("⏎", 0.1)]
    assert heatmap_image({"m": [record]}).size


@pytest.mark.parametrize("show", [heatmap_html, heatmap_image])
def test_models_that_scored_different_records_are_refused(show):
    with pytest.raises(ValueError, match=r"'a': 3, 'b': 2"):
        show({"a": scored(), "b": scored()[:2]})
    with pytest.raises(ValueError, match="one or more"):
        show({"a": []})


def test_the_page_of_a_model_in_a_folder(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    from_folder = token_heatmap(tmp_path, RECORDS, device="cpu")
    live = token_heatmap(make_model("llama"), RECORDS, make_tokenizer(), device="cpu")
    assert from_folder.replace(str(tmp_path), "model") == live


def test_sft_on_the_command_line_shows_the_tokens_before_and_after(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model("llama").save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    (tmp_path / "demos.jsonl").write_text("\n".join(json.dumps(r) for r in RECORDS[:2] * 8))
    args = ["sft", "--model", "model", "--data", "demos.jsonl", "--output", "out", "--log-dir", "log"]
    assert main([*args, "--epochs", "10", "--learning-rate", "1e-2", "--device", "cpu"]) == 0
    assert "out/tokens.html" in capsys.readouterr().out
    text = (tmp_path / "out" / "tokens.html").read_text(encoding="utf-8")
    assert Page(text).sections == 8
    losses = dict(re.findall(r"<tr><td>(\w+)</td><td>([\d.]+)</td>", text))
    assert float(losses["after"]) < 0.5 * float(losses["before"])
    trained = AutoModelForCausalLM.from_pretrained("out")
    after = score_tokens(trained, make_tokenizer(), RECORDS[:1])  # eight rows of sixteen: every other one
    assert math.isclose(summary(after)["loss"], float(losses["after"]), abs_tol=1e-3)
    events = EventAccumulator("log").Reload()
    assert events.Tags()["images"] == ["samples/tokens"]
    assert "train/loss" in events.Tags()["scalars"]
