"""What the health line says, for metrics made by hand and for real rollouts that earn it."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sod_mini as sod
import tools

SOUND = dict(reward=0.1, right=0.5, groups_agree=0.2, reverse_kl=0.5, entropy=0.4, d=0.3, w=0.9,
             teacher_entropy=0.3, w_capped=0.1, d1_near_0=0.1, turns=3.0, tool_calls=2.0,
             tool_fail=0.1, outcomes={"ok": 90, "error": 10}, faults={"NameError": 10},
             cut_budget=0.02, cut_turns=0.0, loss=0.1, clipped=0.01, grad_norm=1.0, not_taken=0)


def says(changes, steps=1, **options):
    """The sentences after some steps; a change may be a list, one value a step."""
    at = lambda value, n: value[n] if isinstance(value, list) else value
    history = [{**SOUND, "step": n + 1, **{k: at(v, n) for k, v in changes.items()}}
               for n in range(steps)]
    return list(sod.health(history, sod.Config(**options)).values())


def test_a_sound_step_is_not_talked_about():
    assert says({}) == [] and says({}, steps=30) == []


@pytest.mark.parametrize("changes, steps, sentence", [
    (dict(cut_budget=0.62), 1, "62% of rollouts were cut at the token budget"),
    (dict(cut_turns=0.5), 1, "50% of rollouts ran out of turns: raise --max_turns"),
    (dict(groups_agree=1.0), 1, "100% of groups agree, so GRPO has nothing to learn from"),
    (dict(w_capped=0.405), 1, "w is at its cap in 40% of steps"),
    (dict(d1_near_0=0.31), 1, "d_1 is near 0 in 31% of rollouts: distillation is off after their "
                              "first step"),
    (dict(tool_fail=0.31, faults={"SyntaxError": 20, "timeout": 5}), 1,
     "tool failures 31%, 20 of 25 SyntaxError"),
    (dict(entropy=0.07), 1, "entropy fell below 0.1 nats (0.07)"),
    (dict(teacher_entropy=2.38), 1, "the teacher is lost, its entropy is 2.4 nats"),
    (dict(clipped=0.3), 1, "30% of tokens left the clip range: lower --lr"),
    (dict(not_taken=2), 1, "2 optimiser steps were not taken"),
    (dict(loss=float("nan")), 1, "the loss is nan: lower --lr"),
    (dict(tool_calls=0.02), 1, "the tool is hardly called (0.02 times a rollout)"),
    (dict(infrastructure=3), 1, "the sandbox itself failed in 3 rollouts, which are left out"),
    (dict(reverse_kl=[0.5 + 0.02 * n for n in range(10)]), 10,
     "reverse KL rises for 10 steps, 0.50 to 0.68: lower --lr"),
    (dict(right=0.0), 10, "no rollout was right for 10 steps"),
    (dict(right=1.0), 10, "every rollout was right for 10 steps"),
])
def test_each_trouble_has_one_sentence(changes, steps, sentence):
    said = says(changes, steps)
    assert len(said) == 1 and sentence in said[0]


def test_a_trend_needs_ten_steps_and_survives_noise():
    rising = [0.5, 0.54, 0.52, 0.58, 0.6, 0.63, 0.61, 0.7, 0.72, 0.75]
    assert says(dict(reverse_kl=rising[:9]), 9) == []
    assert "reverse KL rises" in says(dict(reverse_kl=rising), 10)[0]
    torch.manual_seed(0)
    false = sum(bool(says(dict(reverse_kl=(0.5 + 0.1 * torch.rand(10)).tolist()), 10))
                for _ in range(500))
    assert false <= 3  # of 500 stretches of noise around a level


def test_what_means_nothing_to_a_method_is_not_said():
    bad = dict(groups_agree=1.0, w_capped=0.9, d1_near_0=0.9)
    assert len(says(bad)) == 3
    assert len(says(bad, method="opd")) == 1 and len(says(bad, method="sod_only")) == 2
    assert says(bad, method="opd_only") == []
    assert len(says(bad, weights="uniform")) == 1 and len(says(bad, group_size=1)) == 2


def test_a_sentence_is_said_again_after_ten_steps_only():
    told, said, history = {}, [], []
    for step in range(1, 26):
        history.append({**SOUND, "step": step, "cut_budget": 0.9, "cut_turns": 0.9 * (step > 4)})
        said += [(step, s) for s in sod.news(history, told, sod.Config())]
    assert [step for step, s in said if "token budget" in s] == [1, 11, 21]
    assert [step for step, s in said if "of turns" in s] == [5, 15, 25]


def test_demonstrations_have_few_metrics_and_no_false_alarm():
    history = [{"step": n, "steps": 20, "loss": 1.0, "grad_norm": 1.0} for n in range(1, 21)]
    assert sod.health(history, sod.Config(method="sft")) == {}


# --- From real rollouts -----------------------------------------------------------------------


def rollout(calls, finish="answer", right=False):
    """A rollout that made these (outcome, tool text) calls and ended."""
    turns = len(calls) + (finish == "answer")
    r = sod.Rollout(tools.Problem("q", "1"), [5] * (1 + turns), [-1, *range(turns)], 1,
                    turns=["t"] * turns, answers=[text for _, text in calls],
                    outcomes=[o for o, _ in calls] + [""] * (finish == "answer"), finish=finish)
    r.right, r.reward = right, 1.0 if right else -1.0
    return r


def metrics(rollouts, d, c):
    """batch_metrics of rollouts whose teacher is d[i][k] nats away at step k."""
    step_id = sod.pad([r.step_id for r in rollouts], -1, "cpu")
    B, T = step_id.shape
    gap = sod.pad([[0.0, *row] for row in d], 0.0, "cpu")[:, :T]
    logp_s, zeros, K = torch.full((B, T), -1.0), torch.zeros(B, T), max(map(len, d))
    divergence = sod.step_divergence(logp_s, logp_s + gap, step_id, K)
    A = sod.group_advantages(torch.tensor([r.reward for r in rollouts]), c.group_size)
    scored = sod.Scored(rollouts, step_id, torch.zeros(B, K, dtype=torch.bool), A, logp_s + gap,
                        zeros, logp_s, zeros + 0.5, divergence,
                        sod.step_weights(divergence, c.epsilon, c.delta), zeros, False)
    return {"step": 1, "loss": 0.0, **sod.batch_metrics(scored, c)}


def test_a_batch_whose_first_steps_are_known_by_heart_is_named_with_its_share():
    c = sod.Config(group_size=2)
    batch = [rollout([("ok", "7")], right=i % 2 == 0) for i in range(4)]
    m = metrics(batch, [[0.001, 0.5], [0.3, 0.4], [0.3, 0.4], [0.01, 0.6]], c)
    assert m["d1_near_0"] == 0.5 and m["w_capped"] == 0.0
    said = sod.health([m], c)
    assert list(said) == ["d1_near_0"] and "50% of rollouts" in said["d1_near_0"]
    single = metrics([rollout([], right=i % 2 == 0) for i in range(4)], [[0.0]] * 4, c)
    assert single["d1_near_0"] == 0.0  # no later step whose weight could vanish


def test_failures_are_counted_by_the_name_of_their_error():
    c = sod.Config(group_size=2)
    syntax = "error", "  File \"<code>\", line 1\n    print(\nSyntaxError: '(' was never closed\n"
    batch = [rollout([syntax, ("timeout", "[no answer in time]")], right=i % 2 == 0)
             for i in range(4)] + [rollout([("ok", "7"), syntax], finish="budget", right=i == 0)
                                   for i in range(2)]
    m = metrics(batch, [[0.3, 0.3, 0.3]] * 6, c)
    assert m["faults"] == {"SyntaxError": 6, "timeout": 4}
    said = sod.health([m], c)
    assert said["tool_fail"] == "tool failures 83%, 6 of 10 SyntaxError"
    assert "33% of rollouts were cut" in said["cut_budget"] and len(said) == 2


def test_groups_that_agree_and_weights_at_their_cap_come_from_the_batch():
    c = sod.Config(group_size=2)
    batch = [rollout([("ok", "7"), ("ok", "8")]) for _ in range(4)]
    m = metrics(batch, [[0.9, 0.2, 0.1]] * 4, c)
    said = sod.health([m], c)
    assert set(said) == {"groups_agree", "w_capped"} and m["w_capped"] == pytest.approx(2 / 3)


def test_every_topic_is_explained_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for word in [*sod.HEALTH, "entropy", "tool_calls", "infrastructure", "loss", "reverse_kl",
                 "right", "faults"]:
        assert f"`{word}`" in readme, word
