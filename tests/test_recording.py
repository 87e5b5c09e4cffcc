"""A token's step with fixed shapes, recorded and replayed, writes what steps launched one by one write.

On a CPU a tape of operations stands for a CUDA graph (:mod:`tests.taped_cuda`): it knows addresses, nothing of Python.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from agents.policies.causal_lm import CausalLMPolicy
from tests.taped_cuda import TapedCuda
from tests.tiny import make_env, make_lm, make_model, make_tokenizer, random_sequences
from textrl_env.lm import causal_lm, decoding, recording, slot_decoder
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import DecodedSequences, generate
from textrl_env.lm.recording import Compiled, CudaGraphs, PlainCalls
from textrl_env.lm.streams import Streams

PROMPTS = [*random_sequences([7, 7, 3, 5], seed=3)]
PROMPTS = [PROMPTS[i] for i in (0, 0, 1, 1, 2, 3)]


@pytest.fixture
def short(monkeypatch):
    """Widths and prompts of a few tokens do what those of many do."""
    monkeypatch.setattr(slot_decoder, "FIRST_WIDTH", 4)
    monkeypatch.setattr(decoding, "SHARED_TOKENS", 4)


@pytest.fixture
def cuda(monkeypatch):
    """Steps of "static" models are recorded as CUDA graphs on a CPU that stands for a GPU."""
    cuda = TapedCuda()

    def make(decode_step, device):
        return CudaGraphs(device, cuda) if decode_step == "static" else None

    monkeypatch.setattr(causal_lm, "make_recorder", make)
    return cuda


def make(decode_step, kind="llama", **kwargs):
    return CausalLM(make_model(kind), make_tokenizer(), decode_step=decode_step, **kwargs)


def written(lm, prompts=PROMPTS, budget=14, seed=5, **kwargs):
    streams = Streams(np.arange(len(prompts), dtype=np.uint64) * np.uint64(2**55) + np.uint64(seed))
    responses, log_probs = generate(lm, prompts, budget, streams, **kwargs)
    return [r.tolist() for r in responses], np.concatenate(log_probs)


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1] == pytest.approx(other[1], abs=1e-5)


HOW = {
    "sampled": {},
    "likeliest": {"deterministic": True},
    "cut": {"limit": lambda logits, t: logits.masked_fill(logits < logits.amax(-1, keepdim=True) - 2, -torch.inf)},
}  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_fixed_shapes_give_the_tokens_of_growing_ones(kind, how, short):
    assert_same(written(make("static", kind), **HOW[how]), written(make("eager", kind), **HOW[how]))


@pytest.mark.parametrize("disable", [(), ("fused",), ("shared_prompts",)])
def test_replays_of_records_give_the_tokens_of_calls(cuda, short, disable):
    taped, eager = make("static", disable=disable), make("eager", disable=disable)
    assert_same(written(taped), written(eager))
    assert cuda.log.count("replay") > 2 * cuda.log.count("record on side") > 0


def test_a_work_is_rehearsed_on_the_stream_of_the_recording_and_both_streams_wait(cuda):
    calls = CudaGraphs(torch.device("cpu"), cuda)
    number = torch.zeros(())
    calls.rehearse(lambda: number.add_(1.0))
    assert cuda.log == ["side waits for usual", "work on side", "usual waits for side"]
    replay = calls.record(lambda: number.add_(1.0))
    replay()
    assert cuda.log[3:] == ["record on side", "replay"]


def test_a_step_that_is_made_once_is_not_recorded(cuda):
    lm = make("static")
    assert lm.recorder() is not None  # by now it has been checked
    cuda.log.clear()
    generate(lm, random_sequences([3, 4]), 2)
    assert "work on side" in cuda.log and "record on side" not in cuda.log


def test_new_weights_are_those_that_the_next_responses_are_written_with(cuda, short):
    taped = make("static").clone()
    before = written(taped)
    with torch.no_grad():
        for weight in taped.model.parameters():
            weight.mul_(0.9)
    eager = taped.clone()
    eager.decode_step = "eager"
    assert_same(written(taped), written(eager))
    assert written(taped)[0] != before[0]


def test_a_model_that_looks_at_numbers_cannot_be_recorded_and_is_decoded_as_before(cuda, recwarn):
    """Positions of "dynamic" rotations are compared with a bound at every pass."""
    config = copy.deepcopy(make_model("llama").config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model = LlamaForCausalLM(config).eval()
    lm = CausalLM(model, make_tokenizer(), decode_step="static")
    assert_same(written(lm), written(CausalLM(model, make_tokenizer(), decode_step="eager")))
    assert lm.recorder() is None and "replay" not in cuda.log
    assert [w for w in recwarn if "cannot be recorded" in str(w.message)]


def test_a_record_that_gives_other_numbers_is_not_used(monkeypatch):
    class Stale(PlainCalls):
        def record(self, work):
            return lambda: None

    monkeypatch.setattr(causal_lm, "make_recorder", lambda step, device: Stale())
    assert make("static").recorder() is None


def test_hooks_are_called_at_every_token_since_nothing_is_recorded_then(cuda):
    lm, calls = make("static").clone(), []
    lm.recorder()
    handle = lm.model.model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    assert lm.recorder() is None
    (response,), _ = generate(lm, random_sequences([3]), 6, torch.Generator().manual_seed(1))
    assert len(calls) == len(response)
    handle.remove()
    assert lm.recorder() is not None


def test_turns_go_on_from_what_was_recorded(cuda, short):
    def talk(lm):
        memory, streams = DecodedSequences(40), Streams(np.arange(6, dtype=np.uint64) << np.uint64(50))
        first = generate(lm, PROMPTS, 6, streams, memory=memory)
        answered = first.extended([np.array([3, 4])] * 6, 2)
        return generate(lm, answered, 6, Streams(streams.keys + np.uint64(7)), memory=memory)

    taped, eager = talk(make("static")), talk(make("eager"))
    assert taped.tokens.tolist() == eager.tokens.tolist()
    assert taped.log_probs == pytest.approx(eager.log_probs, abs=1e-5)


def test_what_is_compiled_is_the_work_after_its_first_call():
    """With torch's own operations behind the compiler: it traces and guards, and makes no code."""
    held = torch.zeros(4, dtype=torch.float64)

    def compute(numbers):
        held.index_copy_(0, numbers[:1].long(), numbers[1:])
        return held * 2

    step = recording.Recording(Compiled(PlainCalls(), "eager"), compute, torch.device("cpu"))
    for place in range(4):
        result = step(np.array([place, place + 1.0]))
    assert result.tolist() == [2.0, 4.0, 6.0, 8.0] and held.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("decode_step", ["eager", "static"])
def test_weights_that_are_not_finite_are_an_error_and_no_token(decode_step):
    lm = make(decode_step).clone()
    assert lm.recorder() is None or decode_step == "static"
    with torch.no_grad():
        lm.model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="no token can be drawn"):
        generate(lm, random_sequences([3]), 3)


def test_recording_can_be_switched_on_and_off(monkeypatch):
    assert make("auto").recorder() is None  # on a CPU
    assert isinstance(make("static").recorder(), PlainCalls)
    assert make("static", disable=["recorded"]).recorder() is None
    monkeypatch.setenv("TEXTRL_DISABLE", "recorded")
    assert make("static").recorder() is None
    with pytest.raises(ValueError, match=r"decode_step.*'statc'.*static"):
        make("statc")
    with pytest.raises(ValueError, match="needs a CUDA device, and the model is on 'cpu'"):
        make("cuda_graph")


def test_cuda_records_by_default(monkeypatch):
    monkeypatch.setattr(recording, "CudaGraphs", lambda device: ("graphs", device.type))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert (
        recording.make_recorder("auto", gpu)
        == recording.make_recorder("cuda_graph", gpu)
        == ("graphs", "cuda")
    )
    assert recording.make_recorder("auto", cpu) is None is recording.make_recorder("eager", gpu)
    assert isinstance(recording.make_recorder("compile", cpu), Compiled)


def test_a_policy_says_how_its_own_decoder_steps():
    env, lm = make_env(), make_lm()
    spaces = (env.observation_space, env.action_space)
    static = {"generator_kwargs": {"decode_step": "static"}}
    policy = CausalLMPolicy(*spaces, model=lm, **static)
    assert policy.lm.decode_step == "static" and isinstance(policy.lm.recorder(), PlainCalls)
    with pytest.raises(ValueError, match=r"takes \['decode_step'\] in generator_kwargs, got 'dtype'"):
        CausalLMPolicy(*spaces, model=lm, generator_kwargs={"dtype": "bfloat16"})
