"""What models and files have written is shown and never obeyed: by a terminal, by TensorBoard, on a page."""

from __future__ import annotations

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agents.cli import main
from agents.commands.terminal import samples_table
from agents.evaluation.evaluation import EvaluationResult
from agents.rollouts.episode_log import EpisodeLog, read_table
from textrl_env.printable import markdown_cell, printable

#: Clears the screen, sets the title, makes a link, starts colours, rings, overwrites the line, turns the direction.
OBEYED = ["\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x9b31m", "\x07", "\r", "\x7f", "\u202e"]


@pytest.mark.parametrize("text", OBEYED, ids=ascii)
def test_control_characters_are_written_out(text):
    shown = printable(f"a{text}b")
    assert shown.startswith("a\\") and shown.endswith("b") and shown.isprintable()


def test_ordinary_text_stays_as_it_is():
    text = "Größe 7 € 漢字 🙂\n\ttab; 2 < 3 [x]"
    assert printable(text) == text


@given(st.text())
def test_nothing_that_is_obeyed_gets_through(text):
    shown = printable(text)
    assert not any(c in shown for c in map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202E]))


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cf"])))
def test_a_cell_is_read_back_as_it_was_written(text):
    cell = markdown_cell(text)
    assert "|" not in cell and "\n" not in cell and html.unescape(cell) == text


def test_tensorboard_shows_an_image_and_a_link_of_an_answer_as_text():
    from tensorboard.plugin_util import markdown_to_safe_html

    log = EpisodeLog(1)
    answers = [
        "![x](http://evil/a.png)",
        "[here](http://evil)",
        "<img src=http://evil/a.png>",
        "**bold** `code`",
    ]
    log.text = {"prompt": ["p"] * 4, "response": answers, "score": [0.0] * 4}
    page = markdown_to_safe_html(log.table())
    assert "<table>" in page
    assert not any(tag in page for tag in ("<img", "<a ", "<strong", "<code"))
    assert [row["response"] for row in read_table(log.table())] == answers


def test_the_terminal_gets_no_escape_of_a_prompt_or_an_answer(capsys):
    import numpy as np

    one = EvaluationResult(
        prompts=[f"p{OBEYED[0]}"],
        responses=[[f"r{OBEYED[1]}[red]"]],
        score=np.zeros((1, 1)),
        gold=None,
        parts={},
        kl=np.zeros((1, 1)),
        length=np.ones((1, 1)),
        ended=np.ones((1, 1), dtype=bool),
        prompt_ids=np.zeros(1, dtype=np.int64),
    )
    console = Console(force_terminal=False, width=200)
    console.print(samples_table(one, one, [0], "t"))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown
    assert "p\\x1b[2J" in shown and "[red]" in shown


def test_an_error_on_the_command_line_holds_no_escape(capsys):
    assert main(["train", "--resume", "no\x1b[31mwhere"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "no\\x1b[31mwhere" in said
