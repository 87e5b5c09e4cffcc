"""The reward contract: what can be a reward, how it is called, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from reward_models import (
    Clip,
    Ensemble,
    HFRewardModel,
    Reward,
    RewardResult,
    RunningNormalizer,
    contains,
    exact_answer,
    format_reward,
    length_penalty,
    load_reward,
    numeric_answer,
    overlong_penalty,
    regex_match,
    repetition_penalty,
)
from reward_models.rules import last_number

WORDS = ["<eos>", "<unk>", "<pad>", "two", "and", "is", "four", "water", "wet", "yes", "no", "."]
TWO = ["two and two is", "is water wet"]


def length_of(prompts, completions):
    return [float(len(c)) for c in completions]


def make_tokenizer(words=WORDS, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; ``pad`` may be "<eos>", or None for no pad token."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pads = {} if pad is None else {"pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", **pads)


def make_classifier(kind: str = "llama", num_labels: int = 1, seed: int = 0, **config):
    torch.manual_seed(seed)
    small = {"vocab_size": len(WORDS), "num_labels": num_labels, "eos_token_id": 0, "bos_token_id": None}
    if kind == "gpt2":
        small |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.5}
        return GPT2ForSequenceClassification(GPT2Config(**(small | config)))
    small |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"max_position_embeddings": 32}
    return LlamaForSequenceClassification(LlamaConfig(**(small | config)))


@pytest.fixture(params=["llama", "gpt2"])
def reward_model(request):
    pad = {"llama": "<pad>", "gpt2": "<eos>"}[request.param]
    model = make_classifier(request.param, pad_token_id=WORDS.index(pad))
    return HFRewardModel(model, make_tokenizer(pad=pad))


def scored_alone(model, ids: list[int], position: int = -1) -> float:
    """The score at one position, from the sequence alone and without any padding."""
    with torch.no_grad():
        hidden = model.eval().base_model(torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, position]).item()


# -- importing ------------------------------------------------------------------------------------------


def test_importing_reward_models_loads_neither_torch_nor_the_environments():
    heavy = ("torch", "transformers", "textrl_env", "agents")
    code = f"import reward_models, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- calling functions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda p, c: [float(len(x)) for x in c],
        lambda completions, **kwargs: [len(x) for x in completions],
        lambda *args, **kwargs: [len(x) for x in args[1]],
        lambda completions: np.array([len(x) for x in completions]),
        lambda completions: torch.tensor([[len(x)] for x in completions], dtype=torch.bfloat16),
        lambda completions: [torch.tensor(len(x)) for x in completions],
        lambda prompts, completions, other=None: (np.float32(len(x)) for x in completions),
    ],
)
def test_functions_of_many_shapes_score_the_same(function):
    result = load_reward(function).score(["a", "b"], ["xy", "z"], completion_ids=[[1], [2]])
    assert result.total.dtype == np.float64
    assert result.total.tolist() == [2.0, 1.0]


def test_function_receives_only_the_columns_it_names():
    def fussy(prompts, completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    columns = {"answer": ["4", "5"], "level": [1, 2]}
    assert load_reward(fussy).score(["p", "q"], ["4", "4"], columns=columns).total.tolist() == [1.0, 0.0]


def test_function_with_keywords_receives_every_column_and_the_ids():
    seen = {}

    def greedy(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    load_reward(greedy).score(["p"], ["c"], [[1, 2]], [[3]], {"answer": ["4"]})
    assert callable(seen.pop("log_metric")) and callable(seen.pop("log_extra"))
    assert seen == {"prompts": ["p"], "prompt_ids": [[1, 2]], "completion_ids": [[3]], "answer": ["4"]}


def test_async_function_is_awaited_also_inside_a_running_loop():
    async def judge(prompts, completions):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    reward = load_reward(judge)

    async def in_a_notebook():
        return reward(["p"], ["c"])

    assert reward(["p"], ["c"]) == [1.0] == asyncio.run(in_a_notebook())


def test_a_reward_is_itself_a_reward_function():
    assert load_reward([load_reward(length_of)])(["p"], ["abc"], answer=["4"]) == [3.0]


def test_a_reward_is_shared_and_not_copied():
    reward = load_reward([length_of, RunningNormalizer(length_of)])
    assert copy.deepcopy({"reward": reward})["reward"] is reward


def test_no_rows_give_no_scores_and_call_nothing():
    result = load_reward(lambda prompts, completions: 1 / 0).score([], [])
    assert result.total.shape == (0,)
    assert list(result.parts) == ["reward"]


# -- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0, 2.0, 3.0], ValueError, "'faulty' returned 3 scores for 4 completions"),
        ([0, math.nan, 2, 3], ValueError, r"nan at index 1: not finite.*'p1'.*'c1'"),
        (np.array([0, 1, 2, np.inf]), ValueError, r"inf at index 3: not finite"),
        ([0, 1, "2", 3], TypeError, r"'2' at index 2: not a number"),
        (1.0, TypeError, "returned float .* for 4 completions"),
        (None, TypeError, "returned NoneType"),
        ({"score": 1}, TypeError, "returned dict"),
        (np.zeros((4, 2)), ValueError, r"returned shape \(4, 2\)"),
    ],
)
def test_bad_scores_are_named_with_their_row(returned, error, message):
    def faulty(completions):
        return returned

    rows = range(4)
    with pytest.raises(error, match=message):
        load_reward(faulty)([f"p{i}" for i in rows], [f"c{i}" for i in rows])


def test_missing_column_is_named_with_the_nearest():
    def wants(prompts, completions, answr):
        return [0.0]

    with pytest.raises(TypeError, match=r"'wants' asks for 'answr'.*Did you mean 'answer'"):
        load_reward(wants)(["p"], ["c"], answer=["4"])


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="'completions' has 1 entries for 2 prompts"):
        load_reward(length_of)(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="'answer' has one string"):
        load_reward(length_of)(["a"], ["c"], answer="4")
    with pytest.raises(ValueError, match="cannot be called 'prompts'"):
        load_reward(length_of).score(["a"], ["c"], columns={"prompts": ["x"]})


def test_an_error_inside_a_reward_says_which():
    def broken(completions):
        raise RuntimeError("judge is asleep")

    with pytest.raises(RuntimeError) as caught:
        load_reward([length_of, broken])(["p"], ["c"])
    assert "'broken'" in caught.value.__notes__[0]


@pytest.mark.parametrize("spec", [None, 3, object(), [], [(length_of, math.nan)], Clip])
def test_what_cannot_score_is_refused(spec):
    with pytest.raises((TypeError, ValueError)):
        load_reward(spec)


# -- by name --------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with a file of rewards."""
    (tmp_path / "my_rewards.py").write_text(
        "import dataclasses\n"
        "def brevity(prompts, completions):\n    return [-float(len(c)) for c in completions]\n"
        "both = [(brevity, 2.0), (lambda prompts, completions: [1.0] * len(prompts), 1.0)]\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(
    ("spec", "score"),
    [
        ("my_rewards:brevity", -3.0),
        ("my_rewards.py:brevity", -3.0),
        ("./my_rewards.py:brevity", -3.0),
        ("my_rewards:both", -5.0),
        ("reward_models:contains('abc')", 1.0),
        ("reward_models.rules:regex_match(pattern='^b')", 0.0),
    ],
)
def test_rewards_are_found_by_name_from_the_working_directory(workplace, spec, score):
    before = list(sys.path)
    assert load_reward(spec)(["p"], ["abc"]) == [score]
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("my_rewards:brevty", ImportError, "'my_rewards' has no 'brevty'. Did you mean 'brevity'"),
        ("my_reward:brevity", ModuleNotFoundError, "no module 'my_reward'. Did you mean 'my_rewards'"),
        ("reward_models.rule:contains", ModuleNotFoundError, "Did you mean 'rules'"),
        ("my_reward.py:brevity", FileNotFoundError, "Did you mean 'my_rewards.py'"),
        ("my_rewards.py", ValueError, "name the function in it"),
        (".", FileNotFoundError, r"holds no config\.json, but my_rewards\.py"),
        ("./models/rm", FileNotFoundError, "has no 'models'"),
        ("modles", FileNotFoundError, "has no 'modles'"),
        ("reward_models:contains", TypeError, r"call it: 'reward_models:contains\(\)'"),
        ("reward_models:contains(open('x'))", ValueError, "have to be literals"),
    ],
)
def test_a_name_that_is_not_there_names_the_nearest(workplace, spec, error, message):
    with pytest.raises(error, match=message):
        load_reward(spec)


def test_a_module_that_fails_to_import_something_else_says_so(workplace):
    Path("needy.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'not_installed_anywhere'"):
        load_reward("needy:reward")


# -- sums -----------------------------------------------------------------------------------------------


def test_weighted_sum_keeps_every_part_raw_and_by_name():
    reward = load_reward([(length_of, 0.5), contains("b"), (lambda p, c: [10.0] * len(p), -1)])
    result = reward.score(["p", "q"], ["ab", "a"])
    assert reward.names == ("length_of", "contains", "reward")
    assert {name: part.tolist() for name, part in result.parts.items()} == {
        "length_of": [2.0, 1.0],
        "contains": [1.0, 0.0],
        "reward": [10.0, 10.0],
    }
    assert result.total.tolist() == [-8.0, -9.5]


def test_rewards_of_the_same_name_stay_apart():
    assert load_reward([length_of, length_of, [length_of]]).names == (
        "length_of",
        "length_of_2",
        "length_of_3",
    )


def test_one_pair_is_a_weighted_reward():
    assert load_reward((length_of, 3.0))(["p"], ["ab"]) == [6.0]


def test_none_in_a_list_contributes_nothing_and_stays_out_of_the_mean():
    def sometimes(prompts, completions):
        return [None, 4.0]

    result = load_reward([(length_of, 1.0), (sometimes, 2.0)]).score(["p", "q"], ["a", "bb"])
    assert result.total.tolist() == [1.0, 10.0]
    assert np.isnan(result.parts["sometimes"][0])
    assert result.means() == {"length_of": 1.5, "sometimes": 4.0}


@pytest.mark.parametrize(
    "wrap",
    [lambda r: r, lambda r: [r], lambda r: [r, r], lambda r: Clip(r, 0, 1), lambda r: Ensemble([r, r])],
)
def test_none_where_no_other_reward_applies_counts_as_nothing_and_is_said_once(wrap):
    def picky(prompts, completions):
        return [None if prompt == "p" else 0.25 for prompt in prompts]

    reward = load_reward(wrap(picky))
    with pytest.warns(
        UserWarning, match=r"does not apply \(None\) to 1 of 2 completions.*nothing is learned from them.*'p'"
    ) as told:
        result = reward.score(["p", "q"], ["c", "d"])
        reward.score(["p", "q"], ["c", "d"])
    assert len(told) == 1
    assert result.total[0] == 0.0 and result.total[1] > 0 and result.scored.tolist() == [False, True]
    assert all(np.isnan(part[0]) and part[1] == 0.25 for part in result.parts.values())
    assert set(result.means().values()) == {0.25}


# -- composition ----------------------------------------------------------------------------------------


def lookup(prompts, completions):
    return [float(c) for c in completions]


def test_running_normalizer_has_the_statistics_of_everything_scored_however_it_was_split():
    numbers = np.random.default_rng(0).normal(5.0, 3.0, size=40)
    texts = [repr(x) for x in numbers.tolist()]
    split, whole = RunningNormalizer(lookup), RunningNormalizer(lookup)
    for part in (texts[:1], texts[1:7], texts[7:]):
        result = split.score(part, part)
    whole.score(texts, texts)
    assert split.mean == pytest.approx(numbers.mean()) == whole.mean
    assert split.std == pytest.approx(numbers.std()) == whole.std
    expected = (numbers[7:] - numbers.mean()) / numbers.std()
    np.testing.assert_allclose(result.total, expected)
    np.testing.assert_allclose(result.parts["lookup"], numbers[7:])


def test_running_normalizer_goes_on_from_its_state_through_json():
    first = load_reward([RunningNormalizer(lookup), length_of])
    first(["a", "b"], ["1", "4"])
    second = load_reward([RunningNormalizer(lookup), length_of])
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert first(["a", "b"], ["2", "7"]) == second(["a", "b"], ["2", "7"])
    with pytest.raises(ValueError, match="state"):
        load_reward(length_of).set_state(first.get_state())


def test_running_normalizer_of_a_constant_reward_is_zero_not_nan():
    reward = RunningNormalizer(lookup)
    for _ in range(3):
        assert reward(["p", "q"], ["0.1", "0.1"]) == pytest.approx([0.0, 0.0], abs=1e-9)


def test_running_normalizer_clips_and_can_stand_still():
    reward = RunningNormalizer(lookup, clip=1.0)
    reward(["p", "q"], ["-1", "1"])
    reward.update = False
    assert reward(["p", "q"], ["100", "0.5"]) == [1.0, 0.5]
    assert reward.count == 2


def test_ensemble_is_the_mean_less_the_spread():
    reward = Ensemble([lookup, lambda p, c: [2 * float(x) for x in c]], k=1.0)
    result = reward.score(["p", "q"], ["2", "0"])
    assert result.total.tolist() == [3.0 - 1.0, 0.0]
    assert list(result.parts) == ["lookup", "reward"]


def test_clip_bounds_the_total_and_leaves_the_parts():
    result = Clip(lookup, -1, 1).score(["p", "q"], ["5", "-0.5"])
    assert result.total.tolist() == [1.0, -0.5]
    assert result.parts["lookup"].tolist() == [5.0, -0.5]
    with pytest.raises(ValueError, match="low must be below high"):
        Clip(lookup, 1, -1)


def test_a_subclass_of_reward_fits_in_a_list():
    class Constant(Reward):
        name = "constant"

        def evaluate(self, batch, optional=False):
            return RewardResult(np.ones(len(batch)), {self.name: np.ones(len(batch))})

    assert load_reward([Constant(), length_of])(["p"], ["ab"]) == [3.0]


# -- rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.5", 1234.5),
        ("7-3=4", 4.0),
        ("10-5", 5.0),
        ("it is -5.", -5.0),
        ("3/4", 0.75),
        (".5", 0.5),
        ("1, 2, 3", 3.0),
        ("$1,000,000", 1e6),
        (r"\boxed{42}", 42.0),
        ("\u22124", -4.0),
        ("1e3", 1000.0),
        ("12,34", 34.0),
        ("1/0", None),
        ("1e999", None),
        ("none at all", None),
        ("9" * 5000, None),
        (7, 7.0),
    ],
)
def test_last_number_reads_numbers_as_people_write_them(text, number):
    assert last_number(text) == number


def scores(rule, completions, completion_ids=None, **columns):
    return (
        load_reward(rule)
        .score([""] * len(completions), completions, None, completion_ids, columns)
        .total.tolist()
    )


def test_numeric_answer_compares_the_last_number():
    completions = ["2 + 2 = 4", "it is 4.0!", "5", "four"]
    assert scores(numeric_answer(), completions, answer=["#### 4", 4, "4", 4.0]) == [1, 1, 0, 0]
    assert scores(numeric_answer(extract=r"<a>(.*?)</a>"), ["<a>4</a> or 5", "4"], answer=[4, 4]) == [1, 0]
    with pytest.raises(ValueError, match="holds no number at index 0"):
        scores(numeric_answer(), ["4"], answer=["four"])


def test_exact_answer_compares_what_is_extracted():
    assert scores(exact_answer(), [" Paris ", "paris"], answer=["Paris", "Paris"]) == [1, 0]
    assert scores(exact_answer("city", ignore_case=True), ["PARIS"], city=["Paris"]) == [1]
    rule = exact_answer(extract=r"answer: (\w+)")
    assert scores(rule, ["answer: a, no, answer: b", "b"], answer=["b", "b"]) == [1, 0]


def test_a_checker_without_its_column_names_the_nearest():
    with pytest.raises(KeyError, match=r"column 'answer'.*Did you mean 'answers'"):
        scores(numeric_answer(), ["4"], answers=["4"])


def test_a_checker_does_not_apply_where_the_answer_is_none():
    rewards = [numeric_answer("number"), exact_answer("word")]
    assert scores(rewards, ["4", "yes"], number=[4, None], word=[None, "yes"]) == [1.0, 1.0]


def test_format_reward_counts_a_tag_that_the_prompt_has_opened():
    answer = "x</think><answer>4</answer>"
    whole = f"<think>{answer}"
    prompts = ["q <think>", "q <think>\n", "q", "q <think>", [{"role": "user", "content": "q"}]]
    completions = [answer, answer, answer, whole, [{"role": "assistant", "content": answer}]]
    assert load_reward(format_reward())(prompts, completions) == [1, 1, 0, 0, 1]
    assert load_reward(format_reward(opened=True))(prompts, completions) == [1, 1, 1, 0, 1]
    assert load_reward(format_reward(opened=False))(prompts, completions) == [0, 0, 0, 1, 0]


def test_behind_messages_a_thought_may_be_opened_by_the_template_or_by_the_answer():
    """The generation prompt of some templates ends with "<think>", and no reward is shown it."""
    answers = ["x</think><answer>4</answer>", "<think>x</think><answer>4</answer>"]
    wrong = ["x<answer>4</answer>", "</think>", "<think>x</think>y</think><answer>4</answer>"]
    wrong += ["x</think><think>y</think><answer>4</answer>", "<answer>4</answer>"]
    prompts = [[{"role": "user", "content": "q"}]] * 7
    completions = [[{"role": "assistant", "content": text}] for text in (*answers, *wrong)]
    assert load_reward(format_reward())(prompts, completions) == [1, 1, 0, 0, 0, 0, 0]


def test_format_reward_wants_each_tag_once_and_in_order():
    right = "<think>2+2</think>\n<answer>4</answer>\n"
    wrong = [
        right + "more",
        "<answer>4</answer><think></think>",
        "<think><think></think><answer></answer>",
        "<think></think><answer>4",
    ]
    assert scores(format_reward(), [right, *wrong]) == [1, 0, 0, 0, 0]


def test_contains_and_regex_match():
    assert scores(contains(["Please", "thank"]), ["please", "PLEASE, thanks", ""]) == [0.5, 1, 0]
    assert scores(regex_match(r"\d", full=True), ["7", "77"]) == [1, 0]
    with pytest.raises(ValueError, match="not a regular expression"):
        regex_match("(")


def test_length_penalty_counts_tokens_where_they_are_known_and_words_otherwise():
    assert scores(length_penalty(2.0), ["a b c", ""]) == pytest.approx([-2 * math.log(3), 0.0])
    assert scores(length_penalty(2.0), ["a b c"], [[5] * 7]) == pytest.approx([-2 * math.log(7)])


def test_overlong_penalty_is_the_slope_of_dapo():
    ids = [[0] * n for n in (5, 10, 15, 20, 30)]
    assert scores(overlong_penalty(20, 10), [""] * 5, ids) == [0, 0, -0.5, -1, -1]


def test_repetition_penalty_is_the_share_of_repeated_ngrams():
    assert scores(repetition_penalty(2), ["a b a b a", "a b c", "a"]) == [-0.5, 0, 0]
    assert scores(repetition_penalty(1, weight=2.0), [""], [[7, 7, 7, 7]]) == [-1.5]


@pytest.mark.parametrize("rule", [exact_answer(), numeric_answer(), format_reward(), length_penalty()])
def test_rules_have_readable_names(rule):
    assert load_reward(rule).names == (rule.__name__,)


# -- classifiers ----------------------------------------------------------------------------------------


def test_score_is_that_of_the_last_real_token_also_when_pad_is_eos(reward_model):
    sequences = [[3, 4, 3, 0], [7, 8, 0, 0], [9], [5, 6, 7, 8, 9, 10, 11, 0]]
    expected = [scored_alone(reward_model.model, ids) for ids in sequences]
    np.testing.assert_allclose(reward_model.score_ids(sequences), expected, atol=1e-5)
    assert abs(expected[0] - scored_alone(reward_model.model, sequences[0], position=-2)) > 1e-3


def test_score_does_not_depend_on_the_batch_it_is_in(reward_model):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, len(WORDS), size=n).tolist() for n in rng.integers(1, 30, size=23)]
    together = reward_model.score_ids(sequences)
    for batch_size in (1, 4):
        reward_model.batch_size = batch_size
        np.testing.assert_allclose(reward_model.score_ids(sequences), together, atol=1e-5)


def test_dropout_is_off_while_scoring_and_the_mode_comes_back(reward_model):
    reward_model.model.train()
    first = reward_model(TWO, ["four", "yes"])
    assert first == reward_model(TWO, ["four", "yes"])
    assert reward_model.model.training


def test_a_tokenizer_without_pad_token_still_works():
    tokenizer = make_tokenizer(pad=None)
    assert tokenizer.pad_token is None
    reward = HFRewardModel(make_classifier("gpt2"), tokenizer)
    texts = ["four", "yes and no"]
    alone = [reward([p], [c])[0] for p, c in zip(TWO, texts, strict=True)]
    assert reward(TWO, texts) == pytest.approx(alone, abs=1e-5)


def test_ids_are_read_only_when_the_environment_has_told_their_vocabulary(reward_model):
    ids = {"prompt_ids": [[3, 4, 3, 5]], "completion_ids": [[9, 9, 0]]}
    text = ["two and two is"], ["four"]
    from_text = scored_alone(reward_model.model, [3, 4, 3, 5, 6, 0])
    from_ids = scored_alone(reward_model.model, [3, 4, 3, 5, 9, 9, 0])
    assert reward_model(*text, **ids) == pytest.approx([from_text], abs=1e-5)
    assert reward_model.use_ids(make_tokenizer())
    assert reward_model(*text, **ids) == pytest.approx([from_ids], abs=1e-5)


def test_ids_of_another_vocabulary_are_never_read(reward_model):
    other = make_tokenizer([*WORDS[:3], *reversed(WORDS[3:])])
    assert not reward_model.same_vocabulary(other)
    assert reward_model.use_ids(make_tokenizer())
    with pytest.warns(UserWarning, match="different vocabularies"):
        assert not reward_model.use_ids(other)
    with pytest.warns(UserWarning, match="different vocabularies"):
        assert not reward_model.use_ids(make_tokenizer())


def test_text_and_ids_of_a_finished_response_score_the_same(reward_model):
    text = reward_model(TWO, ["four", "yes ."])
    reward = load_reward([reward_model])
    assert reward.use_ids(make_tokenizer())
    ids = {"prompt_ids": [[3, 4, 3, 5], [5, 7, 8]], "completion_ids": [[6, 0], [9, 11, 0]]}
    assert reward(TWO, ["?", "?"], **ids) == pytest.approx(text, abs=1e-6)


def test_a_folder_is_a_reward_and_scores_as_the_model_did(tmp_path, reward_model):
    folder = tmp_path / "politeness"
    reward_model.model.save_pretrained(folder)
    reward_model.tokenizer.save_pretrained(folder)
    loaded = load_reward(str(folder))
    assert loaded.names == ("politeness",)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded(TWO, ["four", "yes"]) == pytest.approx(reward_model(TWO, ["four", "yes"]), abs=1e-6)


def test_a_language_model_is_no_reward_model(tmp_path):
    config = make_classifier().config
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"no trained reward model.*score\.weight"):
        load_reward(str(tmp_path / "lm"))


def test_several_labels_ask_which_one():
    names = {0: "rude", 1: "polite", 2: "neither"}
    model = make_classifier(num_labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    with pytest.raises(ValueError, match=r"3 labels.*rude, polite, neither"):
        HFRewardModel(model, make_tokenizer())
    with pytest.raises(ValueError, match="Did you mean 'polite'"):
        HFRewardModel(model, make_tokenizer(), label="polit")
    logits = [HFRewardModel(model, make_tokenizer(), label=i)(["two"], ["four"])[0] for i in range(3)]
    polite = HFRewardModel(model, make_tokenizer(), label="polite", output="log_prob")(["two"], ["four"])
    expected = torch.tensor(logits, dtype=torch.float64).log_softmax(0)[1].item()
    assert polite == pytest.approx([expected], abs=1e-6)


def test_templates_put_the_text_together_and_keep_ids_out(reward_model):
    framed = HFRewardModel(
        reward_model.model, reward_model.tokenizer, template="is {prompt} {completion} .", end_token=False
    )
    expected = scored_alone(reward_model.model, [5, 3, 6, 11])
    assert not framed.use_ids(make_tokenizer())
    assert framed(["two"], ["four"]) == pytest.approx([expected], abs=1e-5)
    with pytest.raises(ValueError, match="completion"):
        HFRewardModel(reward_model.model, reward_model.tokenizer, template="{prompt}")
    with pytest.raises(ValueError, match="no chat template"):
        HFRewardModel(reward_model.model, reward_model.tokenizer, template="chat")


def test_chat_template_and_message_prompts_agree(reward_model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
    chat = HFRewardModel(reward_model.model, tokenizer, template="chat")
    expected = scored_alone(reward_model.model, [3, 11, 6, 11])
    assert chat(["two"], ["four"]) == pytest.approx([expected], abs=1e-5)
    assert chat([[{"role": "user", "content": "two"}]], ["four"]) == pytest.approx([expected], abs=1e-5)


def test_long_sequences_keep_their_end(reward_model):
    with pytest.warns(UserWarning, match="at most 32 tokens"):
        score = reward_model(["two " * 40], ["four"])
    assert score == pytest.approx([scored_alone(reward_model.model, [3] * 30 + [6, 0])], abs=1e-5)


def test_an_encoder_classifier_pools_its_own_way():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, max_position_embeddings=32, pad_token_id=2,
    )  # fmt: skip
    reward = HFRewardModel(BertForSequenceClassification(config), make_tokenizer())
    texts = [" four", " yes and no ."]
    alone = [reward([p], [c])[0] for p, c in zip(TWO, texts, strict=True)]
    assert reward(TWO, texts) == pytest.approx(alone, abs=1e-5)
    assert not reward.use_ids(make_tokenizer())
