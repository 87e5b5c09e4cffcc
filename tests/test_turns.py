"""Turns: chat templates, foreign games, discounts and credit by turn, and the truth of a small two-turn game."""

from __future__ import annotations

import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE, GiGPO
from agents.algorithms import maths
from reward_models.data.encoding import TextEncoder
from tests.chat_templates import chat_tokenizer, turns
from tests.games import Copycat, Wild
from tests.test_text_game import bound, make_game, say
from tests.tiny import EOS, WORDS
from tests.vector_checker import assert_same
from textrl_env.games.layout import Layout

# -- chat templates, turn by turn -------------------------------------------------------------------------------

KEEPING = ["qwen2_5", "llama3", "phi3", "qwen3_training", "cohere", "gemma", "inst"]
REWRITING = ["qwen3", "glm4moe", "gptoss", "deepseek_r1_distill", "deepseekv3"]


def layout(name: str, rewriting_template: str = "error") -> Layout:
    tokenizer = chat_tokenizer(name)
    return Layout(TextEncoder(tokenizer), "auto", rewriting_template, len(tokenizer) + 99, turns=True)


@pytest.mark.parametrize("name", KEEPING)
def test_a_conversation_that_grows_by_turns_has_the_tokens_of_the_template_as_a_whole(name):
    game = layout(name)
    opening = game.opening("one?", {})
    encoder = game.encoder
    end = encoder.turn_end_id
    written = [*encoder._plain("yes"), end] if end is not None else encoder._plain("yes")
    answer = game.answer("two?", opening, written[-1])
    whole = encoder.prompt(turns("one?", "yes", "two?"))
    grown = [*opening.ids, *written, *answer]
    text = encoder.tokenizer.decode
    shown = "".join(text(whole).split()).replace(
        "<think></think>", "", 1
    )  # which some show before a turn without one
    assert "".join(text(grown).split()).replace("<think></think>", "", 1) == shown


@pytest.mark.parametrize("name", REWRITING)
def test_a_template_that_changes_earlier_turns_is_refused_with_what_it_changes(name):
    with pytest.raises(
        ValueError, match=r"changes what was written in earlier turns: .*rewriting_template='keep'"
    ):
        layout(name)


def test_dropped_thoughts_stay_where_that_was_asked_for():
    with pytest.warns(UserWarning, match="shown them as they were written"):
        game = layout("qwen3", "keep")
    opening = game.opening("one?", {})
    encoder = game.encoder
    words = "<think>\nhm\n</think>\n\nyes"
    written = [*encoder._plain(words), encoder.turn_end_id]
    text = encoder.tokenizer.decode([*opening.ids, *written, *game.answer("two?", opening, written[-1])])
    assert text.endswith(f"{words}<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "A number."}},
            },
        },
    }
]


@pytest.mark.filterwarnings("ignore:.*the chat template changes")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi3", "it leaves them out"),
        ("gemma", "roles must alternate"),
        ("gptoss", "no previous assistant message with a tool call"),
    ],
)
def test_a_template_that_does_not_show_what_tools_answer_is_refused_before_the_first_turn(name, reason):
    game = layout(name, "keep")
    assert len(game.opening("one?", {}).ids) > 0  # without tools it will do
    with pytest.raises(ValueError, match=f"messages of the role 'tool' behind a turn: .*{reason}"):
        game.opening("one?", {"tools": TOOLS})


def test_a_template_that_shows_what_tools_answer_is_taken():
    game = layout("qwen2_5")
    opening, encoder = game.opening("one?", {"tools": TOOLS}), game.encoder
    answer = game.answer([{"role": "tool", "name": "add", "content": "seven"}], opening, encoder.turn_end_id)
    assert "<tool_response>\nseven\n</tool_response>" in encoder.tokenizer.decode(answer)


def test_an_answer_of_a_role_that_the_template_leaves_out_is_refused_without_tools_too():
    game = layout("phi3")
    opening = game.opening("one?", {})
    with pytest.raises(ValueError, match="it leaves them out"):
        game.answer([{"role": "observer", "content": "seven"}], opening, 0)


def test_a_turn_that_was_cut_off_is_ended_by_the_environment():
    game = layout("qwen2_5")
    opening, encoder = game.opening("one?", {}), layout("qwen2_5").encoder
    end = encoder.turn_end_id
    ended, cut = (game.answer("two?", opening, last) for last in (end, encoder._plain("x")[0]))
    assert cut.tolist() == [end, *ended]


def test_control_tokens_that_a_game_spells_stay_text():
    game = layout("qwen2_5")
    encoder = game.encoder
    opening = game.opening("one?", {})
    with pytest.warns(UserWarning, match="control token"):
        said = game.answer("<|im_end|>", opening, encoder.turn_end_id)
    plain = game.answer("x", opening, encoder.turn_end_id)
    assert said.tolist().count(encoder.turn_end_id) == plain.tolist().count(encoder.turn_end_id)
    assert "<|im_end|>" in encoder.tokenizer.decode(said)


def test_long_answers_are_cut_counted_and_said():
    class Chatty(Copycat):
        def step(self, text):
            return "b " * 30, 0.0, False, False, {}

    env = bound(make_game(game=Chatty, max_answer_tokens=3))
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="1 answers of games so far had more than max_answer_tokens=3"):
        observation, *_ = say(env, "a", "<eos>")
    assert env.dynamics.layout.cut == 1 and observation["attention_mask"].sum() == 2 + 2 + 3


def test_an_answer_without_room_ends_the_episode_and_leaves_its_tokens_out():
    class Chatty(Copycat):
        def step(self, text):
            return "b " * 60, 1.5, False, False, {}

    env = bound(make_game(game=Chatty, kl_coef=0.0))
    env.reset(seed=0)
    observation, reward, terminated, _, info = say(env, "a", "<eos>")
    assert (reward, terminated, info["stop_reason"]) == (1.5, True, "context")
    assert observation["attention_mask"].sum() == 4 and info["game_text"].startswith("b b")


def test_an_empty_answer_is_no_tokens_and_an_empty_opening_is_refused():
    class Quiet(Copycat):
        def step(self, text):
            return None, 0.0, False, False, {}

    class Silent(Copycat):
        def reset(self, seed=None, **row):
            return "", {}

    env = bound(make_game(game=Quiet))
    env.reset(seed=0)
    observation, *_, info = say(env, "a", "<eos>")
    assert info["game_text"] == "" and observation["attention_mask"].sum() == 4
    say(env, "b", "<eos>")
    assert env.written_by_policy[-4:].all()
    with pytest.raises(ValueError, match="opening '' has no tokens"):
        make_game(game=Silent).reset(seed=0)


# -- games as foreign code --------------------------------------------------------------------------------------


class Broken(Copycat):
    """Fails at a word that is said to it."""

    def step(self, text):
        if "i" in text.split():
            raise RuntimeError("no i, please")
        if "h" in text.split():
            time.sleep(30)
        return super().step(text)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("b", "must return .observation, reward, terminated, truncated, info., got 'b'"),
        (("b", "x", False, False, {}), "the reward must be a number, got 'x'"),
        (("b", float("nan"), False, False, {}), "the reward must be finite, got nan"),
        (("b", 1.0, 1, False, {}), "terminated must be True or False, got 1"),
        (("b", 1.0, True, False, None), "info must be a dict, got None"),
        ((7, 1.0, True, False, {}), "an observation is a text or a list of messages, got 7"),
    ],
)
def test_what_is_no_answer_is_refused_by_name(returned, message):
    class Odd(Copycat):
        def step(self, text):
            return returned

    env = bound(make_game(game=Odd))
    env.reset(seed=0)
    with pytest.raises((TypeError, ValueError), match=rf"Odd.step\('a'\).*{message}"):
        say(env, "a", "<eos>")


def test_an_error_of_a_game_says_at_which_turn_it_came():
    env = bound(make_game(game=Broken))
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="no i, please") as caught:
        say(env, "i", "<eos>")
    assert "in the game: Broken.step('i')" in caught.value.__notes__


def test_with_a_fallback_a_failed_game_ends_its_episode_and_is_counted():
    env = bound(
        make_game(game=Broken, game_fallback=-1.0, game_timeout=1.0, kl_coef=0.0, game_kwargs={"rounds": 9})
    )
    env.reset(seed=0)
    say(env, "a", "<eos>")
    with pytest.warns(UserWarning, match="1 turns so far got the fallback -1.*no i, please"):
        _, reward, terminated, _, info = say(env, "i", "<eos>")
    assert (reward, terminated, info["stop_reason"], info["score/game/failed"]) == (-1.0, True, "game", 1.0)
    env.reset(seed=1)
    with pytest.warns(UserWarning, match="took more than game_timeout=1 seconds: Broken.step"):
        *_, info = say(env, "h", "<eos>")
    assert info["score/game/failed"] == 1.0
    prompt = env.reset(seed=1)[1]["prompt"]  # with another game, since the first one hangs
    assert say(env, prompt.split()[0], "<eos>")[-1]["turn_reward"] == 1.0


def test_a_game_that_has_never_answered_raises_in_spite_of_the_fallback():
    env = bound(make_game(game=Broken, game_fallback=0.0))
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="no i, please"):
        say(env, "i", "<eos>")


def test_games_answer_at_the_same_time_and_slow_ones_do_not_hold_up_the_others():
    together = threading.Barrier(3, timeout=20)

    class Slow(Copycat):
        def step(self, text):
            if self.round == 0:
                together.wait()  # nobody passes alone
            if self.word == self.slow:
                time.sleep(0.3)
            return super().step(text)

        def reset(self, seed=None, **row):
            self.slow = "h" if seed == 2 else None
            return super().reset(seed, word="h" if seed == 2 else "a")

    env = make_game(game=Slow, game_workers=3, game_patience=0.01, game_kwargs={"rounds": 2})
    sizes = []

    def generate(contexts):
        sizes.append(len(contexts))
        turn = np.array([WORDS.index("a"), EOS])
        return [turn] * len(contexts), [np.full(2, -1.0)] * len(contexts)

    episodes = env.run_episodes(generate, np.arange(3))
    assert sizes[0] == 3 and len(sizes) > 2 and sum(sizes) == 6
    assert episodes.turns.tolist() == [2, 2, 2]
    assert episodes.score.tolist() == [2.0, 2.0, 0.0]
    assert episodes.prompts[2] == "h h"


# -- discounts and credit by turn -------------------------------------------------------------------------------


def test_a_turn_discounts_only_where_it_ends():
    turn = np.array([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]])
    assert maths.turn_discounts(turn, 0.5, 0.1) == pytest.approx(
        np.array([[0.5, 0.05, 0.5, 0.05, 0.5], [0.5, 0.5, 0.5, 0.5, 0.5]])
    )
    rewards = np.array([[0.0, 1.0, 0.0, 2.0, 4.0]])
    mask, done = np.ones((1, 5), bool), np.array([[False] * 4 + [True]])
    to_go = maths.reward_to_go(rewards, mask, done, maths.turn_discounts(turn[:1], 1.0, 0.5))
    assert to_go.tolist() == [[1 + 1 + 1, 1 + 1 + 1, 2 + 2, 2 + 2, 4]]


def test_credit_by_turn_compares_turns_that_answer_the_same_state():
    """Two episodes of a group answer 7; the second passes 5, as a turn of another group does, and 7 once more."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    turn = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 2], [0, 0, 0, 0]])
    state = torch.tensor([[7, 7, 0, 0], [7, 5, 5, 7], [5, 0, 0, 0]])
    rewards = torch.tensor([[0.0, 1.0, 0, 0], [0.0, 0.0, 4.0, 2.0], [9.0, 0, 0, 0]], dtype=torch.float64)
    group = torch.tensor([0, 0, 1])
    got, shared = maths.turn_advantages(rewards, mask, turn, state, group, 0.5, "none")
    # Returns: [1], [0 + 0.5 * (4 + 0.5 * 2) = 2.5, 5, 2], [9]; state 7 has 1, 2.5 and 2, mean 11 / 6.
    mean = 5.5 / 3
    expected = [[1 - mean, 1 - mean, 0, 0], [2.5 - mean, 0, 0, 2 - mean], [0, 0, 0, 0]]
    assert got.numpy() == pytest.approx(np.array(expected))
    assert shared == pytest.approx(3 / 5)


def test_turns_are_numbered_alike_by_both_ways():
    fused = GRPO("auto", make_game(game=Wild, num_seeds=2), n_episodes=4, group_size=2, seed=0)
    stepped = GRPO(
        "auto", gym.wrappers.TransformReward(make_game(game=Wild), float), n_episodes=4, group_size=2
    )
    for agent in (fused, stepped):
        agent.learn(1)
        rollout = agent.collect()
        written_by = rollout.inputs["sequences"]
        for row, mask, turn in zip(range(4), rollout.mask, rollout.turn, strict=True):
            places = written_by[np.array([row])].policy
            # A turn ends with an end token or at the budget of four; here no answer is empty unless the game says so.
            own = turn[mask].numpy()
            assert own[0] == 0 and set(np.diff(own)) <= {0, 1} and len(own) == len(places)
            gaps = np.diff(places) > 1
            assert (np.diff(own)[gaps] == 1).all()
        assert (rollout.state[:, 0] == rollout.state[:, 0]).all() and (rollout.turn[~rollout.mask] == 0).all()


@pytest.mark.parametrize("agent", [REINFORCE, PPO, GRPO])
def test_a_discount_by_turn_is_that_of_the_turns_returns(agent):
    kwargs = (
        {"critic": None}
        if agent is PPO
        else {"baseline": "none"}
        if agent is REINFORCE
        else {"scale": "none"}
    )
    kwargs |= {"group_size": 2} if agent is GRPO else {}
    learner = agent("auto", make_game(kl_coef=0.0), n_episodes=4, gamma_turn=0.5, seed=0, **kwargs)
    learner.learn(1)
    rollout = learner.collect()
    turns_of = rollout.turn.numpy()
    weight = 0.5**turns_of * rollout.mask.numpy()
    returns = (rollout.rewards.numpy() * weight).sum(1)
    if agent is GRPO:
        assert learner.episode_scores(rollout).numpy() == pytest.approx(returns)
    else:
        assert learner.advantages(rollout).numpy()[:, 0] == pytest.approx(returns)


def test_gigpo_adds_the_turns_own_advantage_to_that_of_the_episode():
    kwargs = {"n_episodes": 8, "group_size": 8, "seed": 0, "scale": "none"}
    agent = GiGPO("auto", make_game(kl_coef=0.0, game_kwargs={"rounds": 3}), turn_weight=2.0, **kwargs)
    agent.learn(1)
    rollout = agent.collect()
    rewards, mask, turn = rollout.rewards, rollout.mask, rollout.turn
    total = (rewards * mask).sum(1)
    got = agent.advantages(rollout)
    # The game says the same word after every turn, so all later turns of the group answer one state.
    of_turn = torch.stack([(rewards * (mask & (turn == k))).sum(1) for k in range(3)], dim=1)
    returns = torch.stack(
        [sum(0.95 ** (j - k) * of_turn[:, j] for j in range(k, 3)) for k in range(3)], dim=1
    )
    later = returns[:, 1:]
    own = torch.cat([returns[:, :1] - returns[:, :1].mean(), later - later.mean()], dim=1)
    expected = (total - total.mean())[:, None] + 2.0 * own.gather(1, turn)
    assert got.numpy() == pytest.approx((expected * mask).numpy(), abs=1e-6)


def test_gigpo_is_grpo_where_there_are_no_turns():
    agents = [cls("MlpPolicy", "LineWorld-v0", n_episodes=8, group_size=4, seed=0) for cls in (GRPO, GiGPO)]
    for agent in agents:
        agent.learn(1)
    first, second = (agent.policy.state_dict() for agent in agents)
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- critics and peers ------------------------------------------------------------------------------------------


def test_a_critic_looks_ahead_over_the_games_tokens_to_the_policys_next_one(monkeypatch):
    """Values are those of one plain pass over each text alone, at the token before each of the policy's."""
    env = make_game(game=Wild, max_turns=5, game_kwargs={"ends": 0.1, "limits": 0.3}, num_seeds=30)
    agent = PPO("auto", env, n_episodes=24, seed=0, critic="head", policy_kwargs={"value_hidden": 0})
    agent.learn(1)
    torch.nn.init.normal_(agent.policy.value_head.weight, std=1.0)
    seen = []
    monkeypatch.setattr(agent, "record_text_episodes", seen.append)
    rollout = agent.collect()
    (episodes,) = seen
    assert 0 < episodes.truncated.sum() < len(rollout)
    for i in range(len(rollout)):
        one = rollout.inputs["sequences"][np.array([i])]
        with torch.no_grad():
            ids = torch.from_numpy(one.tokens)[None]
            states = agent.policy.model(ids, output_hidden_states=True).hidden_states[-1][0]
            values = agent.policy.value_head(states.float())[:, 0].numpy()
        expected = values[one.policy - 1]
        # What follows an episode that was cut off is the policy's next token behind the game's last answer.
        ahead = np.append(expected[1:], values[-1] if episodes.truncated[i] else 0.0)
        n = len(expected)
        assert rollout.values[i, :n].numpy() == pytest.approx(expected, abs=1e-4)
        assert rollout.next_values[i, :n].numpy() == pytest.approx(ahead, abs=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_loss_and_gradient_are_those_of_trl_with_its_tool_mask(loss_type, tmp_path):
    from tests.test_variants import BETA, GROUP, LENGTHS, trl_trainer

    count = len(LENGTHS)
    average = {"grpo": "sequence", "bnpo": "token"}[loss_type]
    kwargs = {"n_episodes": count, "group_size": GROUP, "average": average, "kl_in": "loss", "seed": 0}
    agent = GRPO("auto", make_game(game=Wild, kl_coef=BETA, max_turns=5, num_seeds=50), **kwargs)
    agent.learn(1)
    batch = agent.prepare_batch(agent.prepare_rollout(agent.collect()))
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    batch.log_probs, batch.ref_log_probs = (x + 0.1 * noise for x in (batch.log_probs, batch.ref_log_probs))
    losses, _ = agent.loss(batch, agent.policy.evaluate(batch))
    loss = (losses * agent.loss_weights(batch)).sum()
    weights = list(agent.policy.model.parameters())
    ours = torch.autograd.grad(loss, weights)

    trainer = trl_trainer("GRPO", tmp_path, loss_type=loss_type)
    trainer.model.load_state_dict(agent.policy.model.state_dict())
    trainer.beta = BETA
    whole = batch.inputs["sequences"]
    first = whole.first
    width, room = int(first.max()), int((whole.lengths - first).max())
    inputs = {
        name: torch.zeros(count, room, dtype=torch.long)
        for name in ("completion_ids", "completion_mask", "tool_mask")
    }
    inputs |= {name: torch.zeros(count, width, dtype=torch.long) for name in ("prompt_ids", "prompt_mask")}
    inputs |= {name: torch.zeros(count, room) for name in ("old_per_token_logps", "ref_per_token_logps")}
    for i in range(count):
        one = whole[np.array([i])]
        k, n = int(first[i]), len(one.tokens)
        inputs["prompt_ids"][i, width - k :] = torch.from_numpy(one.tokens[:k])
        inputs["prompt_mask"][i, width - k :] = 1
        inputs["completion_ids"][i, : n - k] = torch.from_numpy(one.tokens[k:])
        inputs["completion_mask"][i, : n - k] = 1
        places = torch.from_numpy(one.policy - k)
        inputs["tool_mask"][i, places] = 1
        for name, values in (
            ("old_per_token_logps", batch.log_probs),
            ("ref_per_token_logps", batch.ref_log_probs),
        ):
            inputs[name][i] = 7.0  # beside the game's tokens stands what must not count
            inputs[name][i, places] = values[i, : len(places)]
    assert (inputs["completion_mask"] > inputs["tool_mask"]).any()
    inputs |= {"advantages": batch.advantages[:, 0], "num_items_in_batch": inputs["tool_mask"].sum()}
    theirs = trainer._compute_loss(trainer.model, inputs)
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-7)
    gradients = torch.autograd.grad(theirs, list(trainer.model.parameters()))
    scale = max(float(g.abs().max()) for g in gradients)
    for mine, other in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-4, atol=1e-5 * scale)


# -- other agents, and runs that stop ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PPO", "A2C"])
def test_agents_of_stable_baselines3_play_games(name, monkeypatch):
    import stable_baselines3

    from textrl_env.sb3.policy import CausalLMActorCriticPolicy, GymVecEnv, TextRLHFCallback

    envs = GymVecEnv(make_game(8, Wild, num_seeds=20))
    kwargs = {"batch_size": 96, "n_epochs": 1} if name == "PPO" else {}
    model = getattr(stable_baselines3, name)(
        CausalLMActorCriticPolicy,
        envs,
        policy_kwargs={"lm": envs.get_attr("lm")[0]},
        n_steps=12,
        seed=0,
        device="cpu",
        learning_rate=1e-3,
        **kwargs,
    )
    before = model.policy.parameters_to_vector()
    log_probs = []
    evaluate = model.policy.evaluate_actions

    def compare(obs, actions):
        found = evaluate(obs, actions)
        log_probs.append(found[1].detach())
        return found

    monkeypatch.setattr(model.policy, "evaluate_actions", compare)
    model.learn(96, TextRLHFCallback())
    assert not np.array_equal(before, model.policy.parameters_to_vector())
    # The first update is of what has just been acted: a cache that grows over the game's tokens says the same.
    acted = model.rollout_buffer.log_probs
    assert np.sort(log_probs[0].numpy()) == pytest.approx(np.sort(acted.flatten()), abs=1e-4)


@pytest.mark.parametrize("way", ["fused", "stepped"])
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(way, tmp_path):
    def env():
        game = make_game(game=Wild, num_seeds=20)
        return game if way == "fused" else gym.wrappers.TransformReward(game, float)

    def agent(which):
        return GRPO("auto", which, n_episodes=8, group_size=4, seed=0, learning_rate=1e-3)

    whole = agent(env())
    whole.learn(1)
    whole.learn(1, reset_num_timesteps=False)
    stopped = agent(env())
    stopped.learn(1)
    stopped.save(tmp_path / "stopped")
    again = GRPO.load(tmp_path / "stopped", env=env())
    again.learn(1, reset_num_timesteps=False)
    assert whole.num_timesteps == again.num_timesteps
    for one, other in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_game_in_the_middle_is_brought_back_by_its_turns():
    env, later = (bound(make_game(game=Wild, game_kwargs={"ends": 0.0, "limits": 0.0})) for _ in range(2))
    env.reset(seed=3)
    later.reset(seed=99)
    say(env, "a", "<eos>")
    say(env, "b")
    later.set_state(env.get_state())
    # Played again in other batches, so that sums may differ in their last digits.
    assert_same(say(env, "c", "<eos>"), say(later, "c", "<eos>"), "the turn after", 1e-5)


def test_a_game_that_goes_another_way_when_it_is_brought_back_says_so():
    class Moody(Copycat):
        moods = iter("abcdefghi")

        def step(self, text):
            return next(Moody.moods), 0.0, False, False, {}

    env, later = (bound(make_game(game=Moody)) for _ in range(2))
    env.reset(seed=3)
    later.reset(seed=3)
    say(env, "a", "<eos>")
    with pytest.warns(UserWarning, match="slot 0 went another way when it was played again from prompt_id="):
        later.set_state(env.get_state())


def test_what_a_policy_says_in_games_can_be_evaluated():
    from agents.evaluation.evaluation import evaluate_policy

    env = make_game(num_seeds=4)
    result = evaluate_policy(env.lm, env, n_samples=2)
    assert result.score.shape == (4, 2) and result.kl == pytest.approx(np.zeros((4, 2)), abs=1e-4)
    assert result.ended.all() and len(result.responses[0]) == 2
    with pytest.raises(ValueError, match="100,000 starts, too many to play them all"):
        evaluate_policy(env.lm, make_game())


@pytest.mark.parametrize("way", ["fused", "stepped"])
def test_a_games_word_of_success_is_in_the_log(way):
    class Winner(Copycat):
        def step(self, text):
            return "b", 0.0, True, False, {"is_success": self.word in "abcde"}

    game = make_game(game=Winner, num_seeds=9)
    agent = REINFORCE(
        "auto", game if way == "fused" else gym.wrappers.TransformReward(game, float), n_episodes=16, seed=0
    )
    agent.learn(1)
    prompts = agent.latest["samples/table"] if way == "fused" else None
    assert 0 < agent.latest["rollout/success_rate"] < 1
    if prompts is not None:
        assert agent.latest["completions/mean_turns"] == 1.0


def test_a_game_in_a_chat_template_is_the_conversation_that_the_template_writes():
    from transformers import LlamaConfig, LlamaForCausalLM

    from textrl_env.lm.causal_lm import CausalLM

    tokenizer = chat_tokenizer("qwen2_5")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    lm = CausalLM(LlamaForCausalLM(config), tokenizer)
    env = bound(make_game(lm=lm, max_new_tokens=6, kl_coef=0.0, game_kwargs={"rounds": 3}))
    written = np.array([*lm.encoder.insertion("yes"), lm.encoder.turn_end_id])

    def generate(contexts):
        return [written] * len(contexts), [np.zeros(len(written))] * len(contexts)

    episodes = env.run_episodes(generate, [0])
    word = episodes.prompts[0].split()[0]
    whole = lm.encoder.prompt(turns(f"{word} {word}", "yes", word, "yes", word, "yes", word))
    assert episodes.sequences.tokens.tolist() == whole
    assert episodes.sequences.actions.tolist() == [*written] * 3
    observation, _ = env.reset(options={"prompt_id": 0})
    for action in [*written] * 3:
        observation, *_, info = env.step(int(action))
    assert observation["input_ids"][observation["attention_mask"] > 0].tolist() == whole
    assert info["stop_reason"] == "game" and info["response"] == f"yes\n{word}\nyes\n{word}\nyes"
