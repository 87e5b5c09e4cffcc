"""What the self-check lets pass, what it refuses, and what can be switched off."""

from __future__ import annotations

import copy
import dataclasses
import sys

import gymnasium as gym
import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.families import FAMILIES, family_lm, random_model
from tests.tiny import PROMPTS, count_a, make_lm, make_model, make_tokenizer, random_sequences
from textrl_env.lm import checkpointing
from textrl_env.lm.causal_lm import FAST_WAYS, CausalLM
from textrl_env.lm.decoding import generate
from textrl_env.lm.self_check import Ways
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.slot_decoder import SlotDecoder
from textrl_env.lm.teacher_forcing import ApartLayout, PackedLayout, PaddedLayout


def batch(seed: int = 0) -> Sequences:
    prompts = random_sequences([4, 6], seed)
    return Sequences.from_responses([*prompts, prompts[0]], random_sequences([5, 3, 7], seed + 1))


def fresh(model: nn.Module, **kwargs) -> CausalLM:
    return CausalLM(model, make_tokenizer(), **kwargs)


# Which models are fused


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize(
    "name, fused", [("Llama", True), ("Granite", False), ("SmolLM3", False), ("ERNIE 4.5", False)]
)
def test_precision_hides_no_multiplier_and_no_layer_without_rotation(name, fused, precision):
    """In bfloat16 the difference would pass as rounding, so it is looked for in float32."""
    model = random_model(name)
    lm = fresh(make_copy(model), autocast=precision == "autocast")
    if precision == "bfloat16":
        lm = lm.in_bfloat16()
    before = [p.data_ptr() for p in lm.model.parameters()]
    assert lm.ways.fused == fused
    assert [p.data_ptr() for p in lm.model.parameters()] == before  # the very same weights afterwards
    assert all(
        p.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
        for p in lm.model.parameters()
    )


def test_a_difference_that_bfloat16_would_hide_is_found_in_a_model_of_bfloat16():
    class Louder(LlamaRMSNorm):
        """Has the parts of a norm, and multiplies by a little more."""

        def forward(self, hidden_states):
            return 1.002 * super().forward(hidden_states)

    model = make_copy(random_model("Llama"))
    model.model.layers[0].input_layernorm.__class__ = Louder
    assert not fresh(model).in_bfloat16().ways.fused


def make_copy(model: nn.Module) -> nn.Module:
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("name", ["ERNIE 4.5", "Granite", "SmolLM3"])
def test_even_a_fresh_model_whose_numbers_hardly_show_it_is_not_fused(name):
    """Untrained attention is so even that positions hardly matter, and a multiplier may be almost 1."""
    family, near = FAMILIES[name], {"residual_multiplier": 1 - 1e-7} if name == "Granite" else {}
    config = type(random_model(name).config)(
        **random_model(name).config.to_dict() | {"initializer_range": 0.02} | near
    )
    torch.manual_seed(0)
    lm = fresh(getattr(transformers, family.model)(config).eval())
    assert not lm.ways.fused
    assert lm.ways.packing and lm.ways.cache


def test_a_capped_head_is_no_matrix_however_small_its_logits():
    lm = family_lm("Gemma 2")
    assert lm.model.config.final_logit_softcapping
    assert lm.ways.packing is None and isinstance(lm.layout(batch()), PaddedLayout)


# What is refused


class LooksAhead(LlamaForCausalLM):
    """A model whose tokens see those after them."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits + 0.1 * out.logits.flip(1).cumsum(1).flip(1)
        return out


class Noisy(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.randn_like(out.logits)
        return out


class NeedsMore(LlamaForCausalLM):
    def forward(self, pixels, **kwargs):
        return super().forward(**kwargs)


class NotANumber(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * torch.nan
        return out


@pytest.mark.parametrize(
    "cls, message",
    [
        (LooksAhead, "LooksAhead lets tokens depend on later ones, so it is no causal language model"),
        (Noisy, "Noisy gives other log-probabilities at every call"),
        (NeedsMore, "NeedsMore gives no logits for token ids alone: .*pixels"),
        (NotANumber, "NotANumber gives log-probabilities that are not finite"),
    ],
)
def test_a_model_without_a_right_way_is_an_error_where_the_env_is_made(cls, message):
    model = cls(make_model("llama").config).eval()
    with pytest.raises(ValueError, match=message):
        gym.make(
            "textrl_env:TextRLHF-v0", model=model, tokenizer=make_tokenizer(), reward=count_a, prompts=PROMPTS
        )


def test_beyond_its_original_length_a_longrope_model_is_refused():
    """There all positions turn by other angles as soon as a sequence is that long."""
    lm = family_lm("Llama, long RoPE")
    assert lm.max_length == 32 < lm.model.config.max_position_embeddings
    with pytest.raises(ValueError, match="holds 32"):
        gym.make("textrl_env:TextRLHF-v0", model=lm, reward=count_a, prompts=["a"], max_new_tokens=32)


# Switches


@pytest.mark.parametrize("name", FAST_WAYS)
def test_every_fast_way_can_be_switched_off_by_argument_and_environment(name, monkeypatch):
    lm = fresh(make_copy(make_model("llama")), disable=[name])
    monkeypatch.setenv("TEXTRL_DISABLE", f"{name}, ")
    by_environment = fresh(make_copy(make_model("llama")))
    off = {"packing": None, "cache": None, "fused": False, "shared_prompts": False}[name]
    for model in (lm, by_environment):
        assert getattr(model.ways, name) == off
        others = set(FAST_WAYS) - {name} - ({"shared_prompts"} if name == "cache" else set())
        assert all(getattr(model.ways, other) for other in others)
    assert lm.log_probs(batch()) == pytest.approx(make_lm().log_probs(batch()), abs=1e-5)


def test_a_way_that_there_is_not_cannot_be_switched_off(monkeypatch):
    with pytest.raises(ValueError, match=r"no fast way 'fuse' to disable\. Did you mean 'fused'"):
        fresh(make_model("llama"), disable=["fuse"])
    monkeypatch.setenv("TEXTRL_DISABLE", "caches")
    with pytest.raises(ValueError, match="no fast way 'caches'"):
        fresh(make_model("llama"))


# Hooks and gradient checkpointing


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_forward_hooks_are_called_by_evaluation_and_generation(kind):
    lm = make_lm(kind).clone()
    expected = lm.log_probs(batch())
    layers = lm.body.layers if kind == "llama" else lm.body.h
    watched = [lm.model, lm.body, layers[0], layers[1], *layers[0].children(), lm.head]
    for module in watched:
        calls = []
        handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert lm.log_probs(batch()) == pytest.approx(expected, abs=1e-5)
        assert calls, type(module).__name__
        calls.clear()
        generate(lm, batch().prompts, 3, torch.Generator().manual_seed(0))
        assert calls, type(module).__name__
        handle.remove()
    assert isinstance(lm.layout(batch()), PackedLayout)
    assert (lm.fused_body() is not None) == (kind == "llama")


def gradients(lm: CausalLM) -> torch.Tensor:
    lm.model.zero_grad()
    lm.evaluate(batch())[0].sum().backward()
    return torch.cat([p.grad.flatten() for p in lm.model.parameters()])


def saved_elements(lm: CausalLM) -> int:
    """Of the tensors that autograd keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        lm.evaluate(batch())
    return sum(sizes)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(kind, autocast):
    lm = make_lm(kind).clone()
    lm.autocast = autocast
    lm.model.requires_grad_(True)
    wanted, much = gradients(lm), saved_elements(lm)
    checkpointing.switch_on(lm.body)
    assert isinstance(lm.layout(batch()), ApartLayout)
    # Prompts that are read for each response are rounded otherwise.
    tolerance = 0.3 if autocast else 1e-4
    torch.testing.assert_close(gradients(lm), wanted, atol=tolerance, rtol=tolerance)
    assert saved_elements(lm) < 0.6 * much
    with torch.no_grad():
        assert not isinstance(lm.layout(batch()), ApartLayout)  # without gradient prompts are shared as ever


def test_gradient_checkpointing_of_padded_passes_and_of_a_critic_keeps_less():
    lm = CausalLM(make_model("gpt2"), make_tokenizer(), disable=["packing"]).clone()
    lm.model.requires_grad_(True)
    wanted, much = gradients(lm), saved_elements(lm)
    body = copy.deepcopy(lm.body)
    checkpointing.switch_on(lm.body)
    torch.testing.assert_close(gradients(lm), wanted)
    assert saved_elements(lm) < 0.6 * much
    apart = lm.policy_states(batch(), body)
    checkpointing.switch_on(body)
    assert torch.equal(lm.policy_states(batch(), body), apart)


def test_transformers_own_switch_acts_on_layers_in_eval_mode_too():
    lm = make_lm("gpt2").clone()
    lm.model.requires_grad_(True)
    much = saved_elements(lm)
    for layer in lm.body.h:
        layer.gradient_checkpointing = True
    assert saved_elements(lm) < 0.6 * much


def test_a_model_without_layers_to_checkpoint_is_refused():
    with pytest.raises(ValueError, match="Linear has no layers that gradient_checkpointing could act on"):
        checkpointing.switch_on(torch.nn.Linear(2, 2))


# Another transformers


@pytest.mark.parametrize("broken", ["textrl_env.lm.caches", "transformers.cache_utils"])
def test_a_change_inside_transformers_costs_speed_and_nothing_else(broken, monkeypatch):
    expected = make_lm().log_probs(batch())
    monkeypatch.delitem(sys.modules, "textrl_env.lm.caches", raising=False)
    monkeypatch.setitem(sys.modules, broken, None)  # importing it raises an ImportError
    lm = fresh(make_copy(make_model("llama")))
    assert lm.ways.cache is None
    with pytest.warns(UserWarning, match="without a key/value cache"):
        assert not SlotDecoder(lm, 2, 20).use_cache
    assert lm.log_probs(batch()) == pytest.approx(expected, abs=1e-5)
    written = generate(lm, batch().prompts, 6, torch.Generator().manual_seed(0))
    assert written.log_probs[written.policy] == pytest.approx(lm.log_probs(written), abs=1e-5)


def test_an_attention_interface_that_is_elsewhere_costs_shared_prompts_alone(monkeypatch):
    monkeypatch.delattr("transformers.modeling_utils.AttentionInterface")
    lm = fresh(make_copy(make_model("gpt2")))
    assert not lm.ways.shared_prompts and lm.ways.cache and lm.ways.packing


def test_parts_that_a_later_llama_adds_leave_it_to_its_modules():
    model = make_copy(make_model("llama"))
    model.model.layers[1].self_attn.logit_temperature = 1.0
    assert not fresh(model).ways.fused


def test_the_installed_transformers_is_one_that_is_promised():
    """An upper bound that the installed version breaks would be found here and not by a stranger."""
    import tomllib
    from pathlib import Path

    from packaging.requirements import Requirement

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    requirement = next(r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    assert transformers.__version__ in requirement.specifier
    assert "6.0" not in requirement.specifier and any(s.operator == "<" for s in requirement.specifier)


# Precision of the check itself


def test_what_was_found_of_one_model_is_not_looked_for_again(monkeypatch):
    lm = make_lm("llama")
    lm.check()
    monkeypatch.setattr("textrl_env.lm.causal_lm.find_ways", lambda *_: pytest.fail("looked again"))
    assert lm.clone().ways == lm.in_bfloat16().ways == fresh(lm.model).ways == lm.ways
    assert isinstance(lm.ways, Ways) and dataclasses.is_dataclass(lm.ways)


# Weights in half precision


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autocast_over_bfloat16_weights_says_what_the_weights_say(kind, implementation):
    lm = make_lm(kind).clone()
    lm.model.set_attn_implementation(implementation)
    expected = lm.log_probs(batch())
    low = lm.in_bfloat16()
    low.autocast = True
    assert low.log_probs(batch()) == pytest.approx(expected, abs=0.3)
    low.evaluate(batch())[0].sum().backward()
