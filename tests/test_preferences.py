"""Collecting preferences, the judges, and the verbs that make a pipeline of files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from agents.cli import main
from agents.preferences import judges
from agents.preferences.collection import collect_preferences
from agents.preferences.judges import RUBRIC, OpenAIJudge, load_judge, parse_verdict
from reward_models.data.lengths import DataWarning
from tests.tiny import PROMPTS, count_a, make_lm, make_tokenizer
from textrl_env import embedded


def length_of(prompts, completions):
    return [float(len(completion)) for completion in completions]


def collect(judge=count_a, **kwargs):
    return collect_preferences(make_lm(), PROMPTS, judge, **{"max_new_tokens": 6, "device": "cpu"} | kwargs)


# -- collecting ---------------------------------------------------------------------------------------------


def test_without_noise_the_answer_of_higher_score_is_chosen_and_equal_scores_are_skipped():
    records, statistics = collect(answers_per_prompt=6)
    for record in records:
        assert record["chosen_score"] > record["rejected_score"]
        assert record["chosen_score"] == record["chosen"].split().count("a")
    assert statistics["ties"] > 0
    assert statistics["records"] == statistics["pairs"] - statistics["ties"] == len(records)


def test_every_pair_of_answers_is_judged_identical_ones_are_skipped_and_counted():
    _, statistics = collect(answers_per_prompt=8, max_new_tokens=1)
    assert statistics["answers"] == 8 * len(PROMPTS)
    assert statistics["identical"] > 0
    assert statistics["pairs"] + statistics["identical"] == 28 * len(PROMPTS)


def test_ties_are_decided_by_a_coin_where_asked_for():
    def same(prompts, completions):
        return [0.0] * len(completions)

    assert collect(same).records == []
    records, statistics = collect(same, ties="coin", answers_per_prompt=4)
    assert len(records) == statistics["ties"] == statistics["pairs"]


def test_pairs_per_prompt_is_a_limit():
    _, statistics = collect(answers_per_prompt=5, pairs_per_prompt=3)
    assert statistics["pairs"] + statistics["identical"] == 3 * len(PROMPTS)


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_another_sample():
    noisy = {"rater_scale": 1.0, "answers_per_prompt": 4, "raters": 2}
    assert collect(seed=5, **noisy) == collect(seed=5, **noisy)
    assert collect(seed=5, **noisy).records != collect(seed=6, **noisy).records


def test_more_raters_judge_the_same_pairs_and_the_first_rater_does_not_change():
    one = collect(rater_scale=1.0, answers_per_prompt=4)
    three = collect(rater_scale=1.0, answers_per_prompt=4, raters=3)
    assert len(three.records) == 3 * len(one.records)
    assert [record for record in three.records if record["rater"] == 0] == one.records


def test_raters_choose_by_bradley_terry():
    """At a scale of log 3 an answer one better is preferred three times in four, by every rater alike."""
    records, statistics = collect(
        rater_scale=float(np.log(3)), answers_per_prompt=16, raters=4, max_new_tokens=4, seed=1
    )
    gaps = [record["chosen_score"] - record["rejected_score"] for record in records]
    right, wrong = gaps.count(1.0), gaps.count(-1.0)
    assert right + wrong > 300
    assert right / (right + wrong) == pytest.approx(0.75, abs=0.05)
    assert statistics["agreement"] == pytest.approx(statistics["expected_agreement"], abs=0.03)


def test_the_first_place_wins_as_often_as_the_second():
    """With even raters, which answer was sampled first does not tell which is chosen."""
    records, _ = collect(ties="coin", judge=lambda p, c: [0.0] * len(c), answers_per_prompt=16)
    chosen_first = [record["chosen"] < record["rejected"] for record in records]
    assert np.mean(chosen_first) == pytest.approx(0.5, abs=0.1)


def test_records_say_which_answers_were_cut_off_at_the_budget():
    records, statistics = collect(length_of, answers_per_prompt=16, max_new_tokens=3)
    sides = [(r[side], r[f"{side}_ended"]) for r in records for side in ("chosen", "rejected")]
    assert {ended for _, ended in sides} == {True, False}
    assert all(len(text.split()) <= 2 for text, ended in sides if ended)  # the end token is the third
    assert 0 < statistics["cut_off"] < 1


def test_the_judge_sees_the_prompt_s_columns_and_the_sampled_tokens():
    seen = {}

    def judge(prompts, completions, completion_ids, answer):
        seen.update(ids=completion_ids, answer=answer, completions=completions)
        return [float(sum(ids)) for ids in completion_ids]

    lm = make_lm()
    rows = [{"prompt": "a", "answer": 1, "kind": "x"}, {"prompt": "b", "answer": 2, "kind": "y"}]
    records = collect_preferences(lm, rows, judge, max_new_tokens=4, device="cpu").records
    kinds = {record["prompt"]: record["kind"] for record in records}  # so that a reward model is told by them
    assert kinds.items() <= {"a": "x", "b": "y"}.items() and "answer" not in records[0]
    assert seen["answer"] == [1, 1, 2, 2]
    decoded = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in seen["ids"]]
    assert decoded == seen["completions"]


def test_the_file_holds_the_records_line_by_line(tmp_path):
    path = tmp_path / "new" / "pairs.jsonl"
    records, _ = collect(length_of, output=path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    with pytest.raises(ValueError, match=r"\.jsonl"):
        collect(output=tmp_path / "pairs.csv")


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="answers_per_prompt must be at least 2"):
        collect(answers_per_prompt=1)
    with pytest.raises(ValueError, match="ties='flip'"):
        collect(ties="flip")
    with pytest.raises(ValueError, match="one that compares"):
        collect(OpenAIJudge("http://127.0.0.1:9/v1", "m"), raters=2)


def test_a_pair_of_records_trains_a_reward_model_and_dpo(tmp_path):
    from agents.offline.dpo import dpo
    from reward_models.comparisons import load_comparisons

    path = tmp_path / "pairs.jsonl"
    records, _ = collect(length_of, output=path, answers_per_prompt=3)
    comparisons = load_comparisons(path)
    assert [c.chosen for c in comparisons] == [r["chosen"] for r in records]
    result = dpo(make_lm().clone().model, path, tokenizer=make_tokenizer(), device="cpu")
    assert result["records"] == len(records)


def test_raters_of_the_embedded_world_agree_with_one_another_most_of_the_time():
    prompts = embedded.path("prompts_heldout")
    _, statistics = collect_preferences(
        embedded.path("sft"), prompts, "gold", raters=2, answers_per_prompt=3, device="cpu"
    )
    assert statistics["agreement"] == pytest.approx(statistics["expected_agreement"], abs=0.06)
    assert 0.66 < statistics["expected_agreement"] < 0.8


# -- a language model as the judge --------------------------------------------------------------------------


class Server:
    """An OpenAI-style endpoint on a free port of this machine; ``reply(question)`` is a status and a body."""

    def __init__(self, reply) -> None:
        self.requests = requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, dict(self.headers), body))
                status, answer, *more = reply(body["messages"][0]["content"])
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in dict(*more).items():
                    self.send_header(name, value)
                with contextlib.suppress(ConnectionError):  # the client may have given up waiting
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                """Not to the test's output."""

        class Listener(ThreadingHTTPServer):
            request_queue_size = (
                128  # with five, as is usual, some systems refuse what comes at the same time
            )

        self.server = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def says(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def answers_in(question):
    """The two answers, as the rubric lays them out."""
    first = question.split("[Answer A]\n")[1].split("\n\n[Answer B]")[0]
    return first, question.split("[Answer B]\n")[1].split("\n\nWhich")[0]


def longer(question):
    first, second = answers_in(question)
    return says("C" if len(first) == len(second) else "A" if len(first) > len(second) else "B")


def test_a_language_model_s_verdict_counts_when_both_orders_agree(serve):
    judge = OpenAIJudge(serve(longer).url, "judge", retries=0)
    assert judge.compare(["p", "p", "p"], ["long", "x", "same"], ["s", "longer", "size"]) == [1.0, 0.0, 0.5]


def test_a_judge_that_likes_the_first_place_finds_only_ties(serve):
    judge = OpenAIJudge(serve(lambda question: says("A")).url, "judge", retries=0)
    assert judge.compare(["p"], ["x"], ["y"]) == [0.5]
    assert judge.unclear == 0


def test_a_reply_without_a_verdict_is_a_tie_and_counted(serve):
    judge = OpenAIJudge(serve(lambda question: says("no idea")).url, "judge", retries=0)
    assert judge.compare(["p"], ["x"], ["y"]) == [0.5]
    assert judge.unclear == 2


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", 1.0), (" b ", 0.0), ("B.", 0.0), ("**A**", 1.0), ("C", 0.5), ("Answer A is rude, so B", 0.0),
        ("BAD", None), ("", None), ("neither", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_from_what_models_reply(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_the_question_holds_the_rubric_model_and_key_and_braces_in_answers_are_left_alone(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve(longer)
    judge = OpenAIJudge(server.url, "my-judge", api_key_env="MY_KEY", retries=0, workers=1)
    judge.compare(["why {first}?"], ["{second}"], ["{}"])
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "my-judge" and body["temperature"] == 0
    question = body["messages"][0]["content"]
    assert "why {first}?" in question and answers_in(question) == ("{second}", "{}")
    assert question.startswith(RUBRIC[:40])


def test_a_refused_key_names_the_environment_variable(serve):
    server = serve(lambda question: (401, {"error": "bad key"}))
    with pytest.raises(ConnectionError, match=r"401.*bad key.*OPENAI_API_KEY, which is not set"):
        OpenAIJudge(server.url, "judge").compare(["p"], ["x"], ["y"])


def test_a_missing_model_or_path_says_what_to_look_at(serve):
    server = serve(lambda question: (404, {"error": "no"}))
    with pytest.raises(ConnectionError, match=r"404.*/v1.*'judge'"):
        OpenAIJudge(server.url, "judge").compare(["p"], ["x"], ["y"])


def test_a_busy_server_is_asked_again(serve):
    replies = iter([(503, {}), (429, {}), says("A"), says("B")])
    judge = OpenAIJudge(serve(lambda question: next(replies)).url, "judge", retry_wait=0.0, workers=1)
    assert judge.compare(["p"], ["x"], ["y"]) == [1.0]


def test_a_server_that_stays_busy_is_given_up_with_its_status(serve):
    server = serve(lambda question: (503, b"overloaded"))
    with pytest.raises(ConnectionError, match=r"503.*overloaded.*tried 3 times"):
        OpenAIJudge(server.url, "judge", retries=2, retry_wait=0.0, workers=1).ask("p", "x", "y")
    assert len(server.requests) == 3


def test_a_server_that_does_not_answer_in_time_is_named(serve):
    release = threading.Event()

    def slow(question):
        release.wait(5)
        return says("A")

    try:
        with pytest.raises(ConnectionError, match=r"did not answer within 0.05 seconds"):
            OpenAIJudge(serve(slow).url, "judge", timeout=0.05, retries=0).ask("p", "x", "y")
    finally:
        release.set()


def test_nobody_listening_is_said_as_such(serve):
    server = serve(longer)
    url = server.url
    server.server.server_close()
    with pytest.raises(ConnectionError, match=r"nothing answers at .*is the server running"):
        OpenAIJudge(url, "judge", retries=0).ask("p", "x", "y")


@pytest.mark.parametrize("answer", [b"<html>", {"object": "list"}])
def test_something_that_is_no_completion_is_shown(serve, answer):
    judge = OpenAIJudge(serve(lambda question: (200, answer)).url, "judge", retries=0)
    with pytest.raises(ValueError, match=r"html|OpenAI-style"):
        judge.ask("p", "x", "y")


def test_a_redirect_takes_neither_key_nor_question_to_another_host(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    thief = serve(longer)
    server = serve(lambda question: (307, b"", {"Location": thief.url.replace("127.0.0.1", "localhost")}))
    with pytest.raises(ConnectionError, match=r"answered 307 and points to the host localhost.*not sent"):
        OpenAIJudge(server.url, "judge").ask("p", "x", "y")
    assert not thief.requests and len(server.requests) == 1


def test_a_key_or_password_that_a_server_echoes_is_blotted_out(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a/b")
    echoes = "bad key sk-a/b, also sk-a%2Fb, and pass-word " + "x" * 470 + "sk-a/b"
    for status, answer in ((400, {"error": echoes}), (200, echoes.encode()), (200, {"echo": echoes})):
        url = serve(lambda question, reply=(status, answer): reply).url.replace("//", "//me:pass-word@")
        with pytest.raises((ConnectionError, ValueError)) as error:
            OpenAIJudge(url, "judge").ask("p", "x", "y")
        assert "[secret]" in str(error.value)
        assert not any(secret in str(error.value) for secret in ("sk-a", "pass-word", "Fb"))


def test_a_password_in_the_address_is_sent_as_a_login(serve):
    server = serve(longer)
    OpenAIJudge(server.url.replace("//", "//me:pass-word@"), "judge").ask("p", "x", "y")
    assert server.requests[0][1]["Authorization"].startswith("Basic ")


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_server_that_keeps_dripping_is_given_up_in_time(part):
    stop = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\n" + (b"X: " if part == "header" else b"Content-Length: 9999\r\n\r\n")
        )
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                connection.sendall(b" ")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        judge = OpenAIJudge(f"http://127.0.0.1:{listener.getsockname()[1]}", "judge", timeout=0.3, retries=0)
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=r"did not answer within 0\.3 seconds"):
            judge.ask("p", "x", "y")
        assert time.monotonic() - started < 5
        stop.set()


@pytest.mark.parametrize(("content", "named"), [(5, "int"), ([{"type": "text"}], "list"), ({}, "dict")])
def test_a_content_that_is_no_text_is_named(serve, content, named):
    judge = OpenAIJudge(serve(lambda question: says(content)).url, "judge", retries=0)
    with pytest.raises(ValueError, match=f"content of type {named}.*expected a text"):
        judge.ask("p", "x", "y")


def test_an_answer_without_end_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(judges, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        OpenAIJudge(serve(lambda question: (200, b" " * 2000)).url, "judge", retries=0).ask("p", "x", "y")


def test_a_judge_works_where_an_event_loop_is_running(serve):
    judge = OpenAIJudge(serve(longer).url, "judge", retries=0)

    async def notebook():
        return judge.compare(["p"], ["long"], ["x"])

    assert asyncio.run(notebook()) == [1.0]


def test_a_judge_by_url_needs_a_model_and_a_rubric_its_places():
    with pytest.raises(ValueError, match="--judge-model"):
        load_judge("http://127.0.0.1:8000/v1")
    with pytest.raises(ValueError, match="http://"):
        OpenAIJudge("127.0.0.1:8000", "m")
    with pytest.raises(ValueError, match="must end with a path"):
        OpenAIJudge("http://127.0.0.1/v1?key=x", "m")
    with pytest.raises(ValueError, match=r"\{second\}"):
        OpenAIJudge("http://127.0.0.1/v1", "m", rubric="{prompt} {first}")


def test_the_embedded_world_s_judges_go_by_name():
    prompts, answers = ["what is 2 plus 2?"] * 2, ["sure, it is 4.", "go away"]
    for name in ("gold", "reward"):
        good, bad = load_judge(name).score(prompts, answers).total
        assert good > bad


def test_preferences_from_a_language_model_follow_its_verdicts(serve):
    judge = OpenAIJudge(serve(longer).url, "judge", retries=0)
    records, statistics = collect(judge, answers_per_prompt=3)
    assert records and all(len(r["chosen"]) > len(r["rejected"]) for r in records)
    assert "chosen_score" not in records[0] and statistics["unclear"] == 0


# -- the command line ---------------------------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def textrl(monkeypatch, tmp_path):
    """The command line, run in an empty folder, on the CPU."""
    monkeypatch.chdir(tmp_path)
    return lambda verb, *args: main([verb, *map(str, args), "--device", "cpu"])


def test_files_go_through_the_whole_pipeline_verb_by_verb(textrl, model_folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from reward_models import load_reward

    rows = [{"prompt": p, "completion": "a b"} for p in PROMPTS]
    data = write_lines(tmp_path / "demos.jsonl", rows)
    assert textrl("sft", "--model", model_folder, "--data", data, "--output", "my-sft", "--epochs", 4) == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ("--prompts", prompts, "--judge", "tests.tiny:count_a", "--answers-per-prompt", 8)
    pairs = ("--output", "pairs.jsonl", "--max-new-tokens", 6)
    assert textrl("preferences", "--model", "my-sft", *arguments, *pairs) == 0
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert lines and all(line["chosen_score"] > line["rejected_score"] for line in lines)
    learn = ("--data", "pairs.jsonl", "--epochs", 2, "--learning-rate", 1e-3)
    assert textrl("reward", "--model", "my-sft", *learn, "--output", "my-reward") == 0
    assert textrl("dpo", "--model", "my-sft", *learn, "--output", "my-dpo", "--log-dir", "log") == 0
    assert textrl("dpo", "--model", "my-sft", *learn, "--output", "my-kto", "--loss", "kto") == 0
    assert len(load_reward(str(tmp_path / "my-reward")).score(["a"], ["b"]).total) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "my-dpo")
    assert "rewards/margins" in (tmp_path / "log" / "progress.csv").read_text()
    shown = capsys.readouterr().out
    for words in ("my-sft: fine-tuned in", "comparisons in", "my-dpo: sigmoid", "Next"):
        assert words in shown


def test_a_reward_model_below_a_coin_is_told_before_what_comes_next_and_kinds_have_their_own_accuracy(
    textrl, model_folder, tmp_path, capsys
):
    right = [
        {"prompt": p, "chosen": "a a", "rejected": "b c", "kind": kind} for p in PROMPTS for kind in "xy"
    ]
    wrong = [{**row, "chosen": "b c", "rejected": "a a"} for row in right if row["kind"] == "x"]
    data = write_lines(tmp_path / "pairs.jsonl", 8 * right)
    mixed = write_lines(tmp_path / "mixed.jsonl", [*wrong, *(row for row in right if row["kind"] == "y")])
    upside_down = write_lines(tmp_path / "wrong.jsonl", wrong)
    learn = ("reward", "--model", model_folder, "--data", data, "--epochs", 4, "--learning-rate", 5e-3)
    assert textrl(*learn, "--eval-data", mixed, "--output", "mixed") == 0
    shown = " ".join(capsys.readouterr().out.split())
    count = len(PROMPTS)
    assert (
        f"held-out accuracy, x 0.000 of {count}" in shown
        and f"held-out accuracy, y 1.000 of {count}" in shown
    )
    assert main(["report", "mixed"]) == 0
    page = (tmp_path / "mixed" / "report.html").read_text()
    assert f"<td>held-out accuracy, y</td><td>1.000 of {count}</td>" in page
    assert "<pre>textrl reward --model" in page and "--output mixed --device cpu</pre>" in page
    capsys.readouterr()
    assert textrl(*learn, "--eval-data", upside_down, "--output", "wrong") == 0
    told = capsys.readouterr()
    assert "No better than a coin: it prefers the chosen answer in 0.0% of held-out" in told.err
    assert textrl(*learn, "--eval-data", data, "--output", "good") == 0
    assert "coin" not in capsys.readouterr().err


def test_a_bad_row_stops_a_verb_with_its_place_unless_it_may_be_skipped(
    textrl, model_folder, tmp_path, capsys
):
    data = write_lines(tmp_path / "demos.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    arguments = ("sft", "--model", model_folder, "--data", data)
    assert textrl(*arguments) == 2
    assert "demos.jsonl, line 2" in capsys.readouterr().err
    assert textrl(*arguments, "--skip-bad-rows") == 0
    assert "1 bad rows were left out" in capsys.readouterr().out


def test_an_output_that_is_there_is_not_written_over_unasked(textrl, model_folder, tmp_path, capsys):
    data = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    arguments = ("dpo", "--model", model_folder, "--data", data, "--output", "out")
    assert textrl(*arguments) == 0
    assert textrl(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert textrl(*arguments, "--overwrite") == 0


def test_verbs_that_miss_their_comparisons_say_which_verb_makes_them(textrl, capsys):
    for verb in ("reward", "dpo"):
        assert textrl(verb) == 2
        assert "textrl preferences" in capsys.readouterr().err


def test_a_language_model_judges_from_the_command_line(textrl, serve, model_folder, tmp_path):
    server = serve(longer)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    arguments = ("--model", model_folder, "--prompts", prompts, "--judge", server.url)
    fields = ("--judge-arg", "max_tokens=null", "--judge-arg", "max_completion_tokens=99")
    assert textrl("preferences", *arguments, "--judge-model", "judge", "--max-new-tokens", 6, *fields) == 0
    body = server.requests[0][2]
    assert body["model"] == "judge" and body["max_completion_tokens"] == 99 and "max_tokens" not in body
    lines = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert lines and all(len(line["chosen"]) > len(line["rejected"]) for line in lines)


def test_conversations_are_demonstrations_too(tmp_path):
    from agents.offline.demonstration_data import load_demonstrations

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": turns, "source": "x"}])
    assert load_demonstrations(path, False)[0][0]["messages"] == turns
    path = write_lines(tmp_path / "apart.jsonl", [{"prompt": turns[:1], "completion": turns[1:]}])
    assert load_demonstrations(path, False)[0] == [{"prompt": turns[:1], "completion": turns[1:]}]


def test_prompts_that_leave_no_room_for_an_answer_are_cut_or_left_out_and_counted():
    lm, long = make_lm(), " ".join(["a", "b", "c", "d"] * 20)
    seen = []

    def judge(prompts, completions, prompt_ids):
        seen.extend(len(ids) for ids in prompt_ids)
        return [float(len(c)) for c in completions]

    settings = {"device": "cpu", "max_new_tokens": 6}
    with pytest.warns(DataWarning, match="1 of 2 records are longer than 42 tokens and were cut"):
        found = collect_preferences(lm, [long, "b"], judge, **settings)
    assert set(seen) == {42, 1} and found.statistics["cut"] == 1 and found.statistics["prompts"] == 2
    seen.clear()
    with pytest.warns(DataWarning, match="1 of 2 records are longer than 42 tokens and were left out"):
        found = collect_preferences(lm, [long, "b"], judge, too_long="skip", **settings)
    assert set(seen) == {1} and found.statistics["skipped"] == 1 and found.statistics["prompts"] == 1
    with pytest.raises(ValueError, match="is longer than 42; too_long='cut' shortens such"):
        collect_preferences(lm, [long, "b"], judge, too_long="error", **settings)
    with pytest.raises(
        ValueError, match="max_new_tokens=48 leaves no room for prompts in the model's context"
    ):
        collect_preferences(lm, ["b"], judge, device="cpu", max_new_tokens=48)
    with pytest.warns(UserWarning, match="max_new_tokens is 47 and not 256"):
        collect_preferences(lm, ["b"], judge, device="cpu")
