"""The capacity model counts what real models, caches, optimisers and graphs hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import llama_costs as costs
from benchmarks.capacity import parse_arguments, table
from benchmarks.capacity_step import DEVICES, Device, Step
from benchmarks.llama_costs import Shape
from benchmarks.random_llama import make_lm
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.slot_decoder import SlotDecoder
from textrl_env.lm.teacher_forcing import CHUNK_LOGITS

SHAPES = (
    Shape(50, 32, 48, 3, 4, 2),
    Shape(64, 48, 80, 2, 3, 3),
    Shape(64, 48, 80, 2, 6, 1, tied=True),
)


@pytest.fixture(params=SHAPES, ids=["grouped", "every head", "tied"])
def shape(request):
    return request.param


def saved_bytes(function, model):
    """Bytes of the storages that autograd saves in a call, the model's own weights and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    assert kept is not None  # alive until here, so that no storage is counted twice
    return sum(saved.values())


def test_parameters_are_those_of_a_real_model(shape):
    model = make_lm(shape).model
    assert costs.parameter_count(shape) == sum(p.numel() for p in model.parameters())
    assert costs.shape_of(model.config) == shape


def test_what_split_learned_weights_save_is_the_states_and_what_they_cost_is_a_whole_copy():
    none, split = (Step(SHAPES[0], gpus=8, sharding=x).resident_bytes() for x in ("none", "learned"))
    count = costs.parameter_count(SHAPES[0])
    assert none["gradients"] == 4 * count == 8 * split["gradients"]
    assert none["optimiser"] == 8 * count == 8 * split["optimiser"]
    assert split["policy and critic"] == 4 * count / 8 + (4 + 2) * count
    assert split["reference"] == none["reference"]


def test_offloading_spares_frozen_models_and_the_copy_in_the_update_and_takes_two_ways(monkeypatch):
    step = {"policy": SHAPES[0], "reward": SHAPES[1], "micro": 64, "response": 200, "reserve": 0}
    stays, leaves = Step(**step), Step(**step, offload=True)
    reward, policy = (costs.parameter_count(shape) for shape in (SHAPES[1], SHAPES[0]))
    assert stays.peak_bytes() - leaves.peak_bytes() == 2 * (policy + reward) + 2 * policy
    assert leaves.seconds()["offloading"] * 25e9 == pytest.approx(2 * 2 * (policy + reward))


def test_four_bits_are_those_of_the_matrices_under_an_adapter():
    whole, packed = (Step(SHAPES[0], lora_rank=2, four_bit=x).resident_bytes() for x in (False, True))
    matrices = SHAPES[0].layers * costs.layer_matrices(SHAPES[0])
    spared = whole["policy and critic"] - packed["policy and critic"]
    assert spared == pytest.approx(matrices * (2 - 0.5 - 1 / 64 - 4 / (64 * 256)))
    assert Step(SHAPES[0], four_bit=True).resident_bytes() == Step(SHAPES[0]).resident_bytes()


def test_a_shape_is_found_for_a_number_of_parameters():
    for params in (5e8, 7e9, 70e9):
        found = costs.parameter_count(costs.shape_for(params))
        assert found == pytest.approx(params, rel=1e-3)
    with pytest.raises(ValueError, match="lower the vocabulary"):
        costs.shape_for(1e6)


def test_lora_parameters_are_those_of_two_thin_matrices_for_each_linear_layer(shape):
    layers = make_lm(shape).model.model.layers
    linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 7 * shape.layers
    assert costs.lora_parameter_count(shape, 4) == sum(4 * (m.in_features + m.out_features) for m in linear)


def test_cache_bytes_are_those_of_the_decoders_cache(shape):
    lm = make_lm(shape)
    decoder = SlotDecoder(lm, 3, 11)
    decoder.prefill(torch.arange(3).numpy(), [torch.arange(1, 5).numpy()] * 3)
    layers = decoder._cache.layers
    tokens = 3 * layers[0].keys.shape[2]  # a cache may be wider than what is in it
    assert costs.kv_bytes(shape, tokens, 4) == sum(each.keys.nbytes + each.values.nbytes for each in layers)


def test_state_bytes_are_those_of_real_weights_gradients_and_adam(shape):
    model = make_lm(shape).model
    optimizer = torch.optim.Adam(model.parameters())
    model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    count = costs.parameter_count(shape)
    expected = costs.state_bytes(count, count, "float32")
    assert expected["weights"] == sum(p.nbytes for p in model.parameters())
    assert expected["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert expected["optimizer"] == sum(moments)


@pytest.mark.parametrize("precision", ["float32", "autocast", "mixed"])
def test_activation_bytes_are_what_autograd_saves_in_a_layer(shape, precision):
    rows, width, saved = 3, 10, []
    ids = torch.arange(rows * width).reshape(rows, width) % shape.vocab
    for layers in (1, 2):  # the difference leaves embeddings and head out
        model = make_lm(
            shape._replace(layers=layers), dtype=torch.bfloat16 if precision == "mixed" else torch.float32
        ).model

        def forward(model=model):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                return model.model(input_ids=ids, use_cache=False).last_hidden_state

        saved.append(saved_bytes(forward, model))
    one = shape._replace(layers=1)
    keys = costs.key_elements(one, rows, width, 0, shared=False)
    expected = costs.activation_bytes(one, rows * width, keys, precision)
    if precision == "autocast":
        expected += 2 * costs.layer_matrices(one)  # the copies of the weights, counted as "cast" elsewhere
    assert saved[1] - saved[0] == expected


def test_a_shared_prompt_costs_every_row_a_copy_of_its_keys_and_the_fused_body_spares_that(monkeypatch):
    shape, rows, prompt, response = Shape(50, 32, 48, 2, 4, 2), 4, 6, 9
    lm = make_lm(shape)
    prompts = [torch.arange(1, prompt + 1).numpy()] * rows
    responses = [torch.arange(1, response + 1).numpy()] * rows
    lm.teacher_forcing_works(prompt + response)  # measured once, before what is counted
    spared = saved_bytes(lambda: lm.policy_states(Sequences.from_responses(prompts, responses)), lm.model)
    monkeypatch.setattr(lm, "fused_body", lambda body=None, max_length=0: None)
    saved = saved_bytes(lambda: lm.policy_states(Sequences.from_responses(prompts, responses)), lm.model)
    assert spared < 0.9 * saved
    step = Step(
        shape,
        episodes=rows,
        prompt=prompt,
        response=response - 1,
        group=rows,
        micro=rows,
        precision="float32",
    )
    assert sum(step._activations()) == pytest.approx(saved, rel=0.1)  # beside it embeddings and the last norm


def test_checkpointing_keeps_less_and_computes_more():
    plain, again = (Step(costs.shape_for(7e9), checkpointing=on, group=1) for on in (False, True))
    assert again.update_bytes() < 0.5 * plain.update_bytes()
    assert again.seconds()["update"] > 1.2 * plain.seconds()["update"]


def test_logits_held_at_once_are_the_trainers_own_default():
    assert Step(SHAPES[0]).logits_at_once == CHUNK_LOGITS


def test_sharding_divides_what_lies_there_and_sends_what_it_gathers():
    shape = costs.shape_for(7e9)
    one, eight = (Step(shape, gpus=n, precision="mixed") for n in (1, 8))
    assert sum(eight.resident_bytes().values()) == pytest.approx(sum(one.resident_bytes().values()) / 8)
    assert sum(one.network_bytes().values()) == 0
    weights = 2 * costs.parameter_count(shape)
    assert eight.network_bytes()["weights to decode with"] == pytest.approx(7 / 8 * weights)
    assert eight.network_bytes()["gradients"] == pytest.approx(7 / 8 * weights * 2 * eight.micro_batches)
    repeated = Step(shape, gpus=8, sharding="none", precision="mixed")
    assert repeated.network_bytes() == {"gradients": pytest.approx(2 * 7 / 8 * weights)}


def test_small_batches_wait_for_memory_large_ones_for_arithmetic_small_models_for_the_host():
    shape = costs.shape_for(7e9)
    device = Device(989e12, 3.35e12, 1e15, 450e9)

    def bound(step):
        seconds = step.token_seconds()
        return max(seconds, key=seconds.get)

    assert bound(Step(shape, device=device, episodes=1)) == "memory bandwidth"
    assert bound(Step(shape, device=device, episodes=8192, prompt=1, response=1)) == "arithmetic"
    assert bound(Step(costs.shape_for(5e8), device=device, episodes=1, layer_seconds=2e-4)) == "host"


def test_the_largest_policy_that_fits_is_the_border():
    step = Step(costs.shape_for(1e9))
    border = step.largest()
    assert 1e9 < border < 1e10
    for factor, fits in ((0.98, True), (1.02, False)):
        policy = costs.shape_for(border * factor)
        assert Step(policy).fits() is fits


def test_what_does_not_fit_gets_no_time():
    steps, what = parse_arguments(["--params", "70e9", "--gpus", "1", "64"])
    assert [step.fits() for step in steps] == [False, False]
    steps, what = parse_arguments(["--params", "7e9", "--gpus", "1", "8"])
    assert [step.fits() for step in steps] == [False, True]
    line = next(line for line in table(steps).splitlines() if line.startswith("| **step, s**"))
    assert line.split("|")[2].strip() == "" and float(line.split("|")[3]) > 0
    assert "7.00B" in what and steps[0].device == DEVICES["H100"]


def test_the_page_on_scaling_shows_what_its_commands_print():
    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    commands = re.findall(r"benchmarks/capacity.py (--layer-seconds .*)", page)
    assert len(commands) == 6
    for words in commands:
        assert table(parse_arguments(words.split())[0]) in page, words
