"""What a class says of its arguments in tables holds whoever calls its constructors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agents import GRPO, GSPO, LUSPO, PPO, RLOO, SAPO, VAPO, DrGRPO, REINFORCEPlusPlus
from agents.algorithms import methods
from agents.arguments import argument_names, entries, named_parameters
from agents.commands.flags import hyper_parameters
from agents.policies.tabular import TabularPolicy
from agents.runs.settings import in_force, origin

TREE = {"vocab_size": 3, "horizon": 2, "num_prompts": 1}


def make(cls, *args, **kwargs):
    return cls(TabularPolicy, "TokenTree-v0", *args, n_episodes=16, env_kwargs=TREE, seed=0, **kwargs)


class Halved(SAPO):
    """Another default, another setting that is part of it, and an argument of its own."""

    fixed = {"average": "token"}
    defaults = {"tau_neg": 2.0, "ent_coef": 0.5}

    def __init__(self, *args, share: float = 0.5, **kwargs):
        self.share = share
        super().__init__(*args, **kwargs)


class Closed(RLOO):
    """A constructor that hands nothing on."""

    def __init__(self, policy, env, **kwargs):
        super().__init__(policy, env, group_size=4, n_episodes=8, env_kwargs=TREE, seed=0)


def test_settings_that_are_part_of_a_method_reach_its_base():
    agent = make(REINFORCEPlusPlus)
    assert (agent.group_size, agent.scale, agent.average, agent.kl_in) == (1, "none", "token", "reward")
    agent = Closed(TabularPolicy, "TokenTree-v0")
    assert (agent.scale, agent.group_size) == ("leave-one-out", 4)


def test_the_nearest_class_decides():
    agent = make(LUSPO)
    assert agent.average == "sum"
    assert (agent.clip_range, agent.clip_range_high) == (3e-4, 4e-4), (
        "those of GSPO, which it does not change"
    )
    agent = make(Halved)
    assert (agent.average, agent.tau_neg, agent.tau_pos, agent.ent_coef) == ("token", 2.0, 1.0, 0.5)


def test_another_default_may_be_changed_by_name_and_by_place():
    assert make(GSPO, clip_range=0.1).clip_range == 0.1
    assert make(GSPO, 1e-3, 4, clip_range_high=None).clip_range_high is None
    assert make(Halved, 1e-3, 4, tau_neg=3.0).tau_neg == 3.0
    assert make(Halved, 1e-3, 4).group_size == 4


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
def test_giving_what_is_part_of_a_method_is_an_error_that_names_it(method):
    import agents

    cls = getattr(agents, method.class_name)
    for name, said in entries(cls).items():
        if said.fixed:
            with pytest.raises(
                TypeError, match=rf"^{cls.__name__} takes no {name}: {said.value!r} is part of the method"
            ):
                cls("auto", "TokenTree-v0", **{name: said.value})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "three"], ids=str)
@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
def test_a_number_that_is_none_is_an_error_that_names_the_argument(method, bad):
    import agents

    cls = getattr(agents, method.class_name)
    own = [p.name for p in named_parameters(vars(cls).get("__init__", lambda self: None))]
    for flag in hyper_parameters(cls):
        if flag.name in own and {"int", "float", "Schedule"} & set(flag.types):
            with pytest.raises((ValueError, TypeError), match=flag.name):
                make(cls, **{flag.name: bad})


def test_a_constructor_that_gives_another_value_than_the_class_it_calls_is_told_where_to_say_so():
    class Divided(DrGRPO):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, scale="std", **kwargs)

    with pytest.raises(TypeError, match=r"Divided gives scale='std' to GRPO.*fixed = \{\"scale\": 'std'\}"):
        make(Divided)

    class Told(DrGRPO):
        fixed = {"scale": "std"}

    agent = make(Told)
    assert (agent.scale, agent.average) == ("std", "constant")


def test_what_was_given_is_remembered_by_name_and_nothing_else():
    assert make(Halved, 1e-3, 4, share=0.25).init_kwargs == {
        "policy": TabularPolicy,
        "env": "TokenTree-v0",
        "learning_rate": 1e-3,
        "group_size": 4,
        "share": 0.25,
        "n_episodes": 16,
        "env_kwargs": TREE,
        "seed": 0,
    }


def test_a_checkpoint_holds_what_was_given_and_comes_back_with_the_tables(tmp_path):
    agent = make(GSPO, 1e-3, 4, clip_range=0.1)
    agent.save(tmp_path)
    kwargs = json.loads((tmp_path / "agent.json").read_text())["kwargs"]
    assert kwargs["clip_range"] == 0.1 and "clip_range_high" not in kwargs and "average" not in kwargs
    loaded = GSPO.load(tmp_path)
    assert (loaded.clip_range, loaded.clip_range_high, loaded.group_size) == (0.1, 4e-4, 4)
    assert np.array_equal(loaded.policy.logits.detach(), agent.policy.logits.detach())


def test_flags_are_what_may_be_given_with_the_defaults_of_the_class():
    flags = {flag.name: flag for flag in hyper_parameters(VAPO)}
    assert flags["group_size"].default == 16 and flags["clip_range_high"].default == 0.28
    assert flags["critic_warmup"].default == 50 and flags["critic_warmup"].owner == "VCPPO"
    assert "gae_lambda" not in flags and "n_steps" not in flags
    assert flags["alpha"].help and flags["group_size"].help
    for cls, fixed in (
        (LUSPO, {"average"}),
        (REINFORCEPlusPlus, {"group_size", "scale", "average", "kl_in"}),
    ):
        assert not fixed & {flag.name for flag in hyper_parameters(cls)}
        assert fixed <= set(argument_names(cls))


def test_the_settings_in_force_say_what_is_part_of_the_method():
    agent = make(LUSPO, clip_range=0.1)
    assert in_force(agent)["agent"]["average"] == "sum"
    assert [origin(agent, name) for name in ("average", "clip_range", "clip_range_high")] == [
        "method",
        "given",
        "default",
    ]


def test_signatures_stay_those_that_were_written():
    for cls in (GRPO, PPO):
        assert argument_names(cls)[:3] == ["policy", "env", "learning_rate"]
    with pytest.raises(TypeError, match="Did you mean 'tau_neg'"):
        make(SAPO, tau_negative=1.0)
