"""What the health line says, for metrics made by hand and for rollouts that earn it."""
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
             cut_budget=0.02, cut_turns=0.0, loss=0.1, clipped=0.01, grad_norm=1.0, not_taken=0,
             infrastructure=0)


def says(changes, iterations=1):
    """{topic: sentence} after some iterations; a change may be a list, one value an iteration."""
    at = lambda value, n: value[n] if isinstance(value, list) else value
    return sod.health([{**SOUND, "iteration": n + 1, **{k: at(v, n) for k, v in changes.items()}}
                       for n in range(iterations)])


def test_a_sound_iteration_is_not_talked_about():
    assert says({}) == {} and says({}, iterations=30) == {}


TROUBLES = [  # topic, metrics, iterations, sentence
    ("cut_budget", dict(cut_budget=0.62), 1, "62% of rollouts were cut at the token budget"),
    ("cut_turns", dict(cut_turns=0.5), 1, "50% of rollouts ran out of turns: raise --max_turns"),
    ("groups_agree", dict(groups_agree=1.0), 1,
     "100% of groups agree, so GRPO has nothing to learn from"),
    ("w_capped", dict(w_capped=0.405), 1, "w is at its cap in 40% of steps"),
    ("d1_near_0", dict(d1_near_0=0.31), 1,
     "d_1 is near 0 in 31% of rollouts: distillation is off after their first step"),
    ("tool_fail", dict(tool_fail=0.31, faults={"SyntaxError": 20, "timeout": 5}), 1,
     "tool failures 31%, 20 of 25 SyntaxError"),
    ("entropy", dict(entropy=0.07), 1, "entropy fell to 0.07 nats"),
    ("teacher_entropy", dict(teacher_entropy=2.38), 1,
     "the teacher is lost, its entropy is 2.4 nats"),
    ("clipped", dict(clipped=0.3), 1, "30% of tokens left the clip range: lower --lr"),
    ("not_taken", dict(not_taken=2), 1, "2 updates were not taken"),
    ("tool_calls", dict(tool_calls=0.02), 1, "the tool is called 0.02 times a rollout"),
    ("infrastructure", dict(infrastructure=3), 1,
     "the sandbox itself failed in 3 rollouts, which are left out"),
    ("reverse_kl", dict(reverse_kl=[0.5 + 0.02 * n for n in range(10)]), 10,
     "reverse KL rises for 10 iterations, 0.50 to 0.68: lower --lr"),
    ("right", dict(right=0.0), 10, "no rollout was right for 10 iterations"),
    ("right", dict(right=1.0), 10, "every rollout was right for 10 iterations"),
]


@pytest.mark.parametrize("topic, changes, iterations, sentence", TROUBLES)
def test_each_trouble_has_one_sentence(topic, changes, iterations, sentence):
    said = says(changes, iterations)
    assert list(said) == [topic] and sentence in said[topic]


def test_every_topic_has_a_trouble_here_that_earns_it():
    assert {topic for topic, *_ in TROUBLES} == {*sod.HEALTH, *sod.TOO_LOW, "reverse_kl", "right"}


def test_a_trend_needs_ten_iterations_and_survives_noise():
    rising = [0.5, 0.54, 0.52, 0.58, 0.6, 0.63, 0.61, 0.7, 0.72, 0.75]
    assert says(dict(reverse_kl=rising[:9]), 9) == {}
    assert "reverse_kl" in says(dict(reverse_kl=rising), 10)
    torch.manual_seed(0)
    false = sum(bool(says(dict(reverse_kl=(0.5 + 0.1 * torch.rand(10)).tolist()), 10))
                for _ in range(500))
    assert false <= 3  # of 500 stretches of noise around a level


def test_a_sentence_is_said_again_after_ten_iterations_only():
    last_said, said, history = {}, [], []
    for n in range(1, 26):
        history.append({**SOUND, "iteration": n, "cut_budget": 0.9, "cut_turns": 0.9 * (n > 4)})
        said += [(n, sentence) for sentence in sod.news(history, last_said)]
    assert [n for n, sentence in said if "token budget" in sentence] == [1, 11, 21]
    assert [n for n, sentence in said if "of turns" in sentence] == [5, 15, 25]


def test_demonstrations_have_few_metrics_and_no_false_alarm():
    history = [{"iteration": n, "iterations": 20, "loss": 1.0, "grad_norm": 1.0, "not_taken": 0}
               for n in range(1, 21)]
    assert sod.health(history) == {}


# --- From rollouts ------------------------------------------------------------------------------


def rollout(calls, finish="answer", right=False):
    """A rollout of one-token turns that made these (outcome, tool text) calls and ended."""
    turns = [sod.Turn([5], "t", outcome, text) for outcome, text in calls]
    turns += [sod.Turn([5], "t")] * (finish == "answer")
    return sod.Rollout(tools.Problem("q", "1"), [5], turns, finish=finish, right=right,
                       reward=1.0 if right else -1.0)


def metrics(rollouts, d, **options):
    """The metrics of rollouts whose teacher is d[i][k] nats away at step k."""
    config = sod.Config(**{"group_size": 2, **options})
    batch, method = sod.collate(rollouts, "cpu"), sod.METHODS[config.method]
    batch.logp_s = torch.where(batch.step_id >= 0, -1.0, 0.0)
    batch.entropy_s = batch.entropy_t = torch.full(batch.ids.shape, 0.5)
    if method.view:
        batch.logp_t = batch.logp_s + sod.pad([[0.0, *row] for row in d], 0.0, "cpu")
        batch.d = sod.step_divergence(batch.logp_s, batch.logp_t, batch.step_id)
        scheme = config.weights if method.weights == "sod" else method.weights
        batch.w = sod.WEIGHTS[scheme](batch, config)
    batch.A = sod.group_advantages(batch.reward, config.group_size)
    agent = sod.Agent(config, None, None, None, None, iteration=1)
    return sod.batch_metrics(agent, batch, [(0.1, 1.0, 0.0)])


def test_a_batch_whose_first_steps_are_known_by_heart_is_named_with_its_share():
    batch = [rollout([("ok", "7")], right=i % 2 == 0) for i in range(4)]
    m = metrics(batch, [[0.001, 0.5], [0.3, 0.4], [0.3, 0.4], [0.01, 0.6]])
    assert m["d1_near_0"] == 0.5 and m["w_capped"] == 0.0
    said = sod.health([m])
    assert list(said) == ["d1_near_0"] and "50% of rollouts" in said["d1_near_0"]
    single = metrics([rollout([], right=i % 2 == 0) for i in range(4)], [[0.0]] * 4)
    assert single["d1_near_0"] == 0.0  # no later step whose weight could vanish


def test_failures_are_counted_by_the_name_of_their_error():
    syntax = "error", "  File \"<code>\", line 1\n    print(\nSyntaxError: '(' was never closed\n"
    batch = [rollout([syntax, ("timeout", "[no answer in time]")], right=i % 2 == 0)
             for i in range(4)] + [rollout([("ok", "7"), syntax], finish="budget", right=i == 0)
                                   for i in range(2)]
    m = metrics(batch, [[0.3, 0.3, 0.3]] * 4 + [[0.3, 0.3]] * 2)
    assert m["faults"] == {"SyntaxError": 6, "timeout": 4}
    said = sod.health([m])
    assert said["tool_fail"] == "tool failures 83%, 6 of 10 SyntaxError"
    assert "33% of rollouts were cut" in said["cut_budget"] and len(said) == 2


@pytest.mark.parametrize("options, topics", [
    (dict(), {"groups_agree", "w_capped"}), (dict(group_size=1), {"groups_agree", "w_capped"}),
    (dict(method="sod_only"), {"w_capped"}), (dict(weights="uniform"), {"groups_agree"}),
    (dict(method="opd"), {"groups_agree"}), (dict(method="opd_only"), set()),
    (dict(method="grpo"), {"groups_agree"}), (dict(weights="unclipped"), {"groups_agree"}),
])
def test_what_means_nothing_to_a_method_is_not_said(options, topics):
    """Groups that agree, and weights at their cap: two of three steps come after a larger d."""
    m = metrics([rollout([("ok", "7"), ("ok", "8")]) for _ in range(4)], [[0.9, 0.2, 0.1]] * 4,
                **options)
    assert set(sod.health([m])) == topics
    assert m.get("w_capped", 2 / 3) == pytest.approx(2 / 3)
