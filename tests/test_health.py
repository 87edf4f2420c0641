"""What the health line says about metrics made by hand and about rollouts."""
import pytest
import torch

import sod_mini as sod
import tools

SOUND = dict(reward=0.1, correct=0.5, frac_zero_std_groups=0.2, kl_estimate=0.5, entropy=0.4,
             d=0.3, w=0.9,
             teacher_entropy=0.3, w_capped=0.1, d1_near_0=0.1, turns=3.0, tool_calls=2.0,
             tool_fail=0.1, outcomes={"ok": 90, "error": 10}, cut_length=0.02, cut_turns=0.0,
             length=0.3, repeated=0.01,
             loss=0.1, clip_frac=0.01, grad_norm=1.0, skipped_updates=0, infrastructure=0)


def test_nothing_is_said_about_a_sound_iteration():
    assert sod.health([]) == sod.health([SOUND]) == sod.health([SOUND] * 30) == {}


TROUBLES = [  # metric, value, sentence
    ("cut_length", 0.62, "62% of rollouts were cut at the token budget"),
    ("length", 0.75, "responses take 75% of the token budget on average"),
    ("repeated", 0.31, "31% of what was sampled repeats its own turn"),
    ("cut_turns", 0.5, "50% of rollouts ran out of turns: raise --max_turns"),
    ("frac_zero_std_groups", 1.0, "100% of groups agree, so GRPO learns nothing from them"),
    ("w_capped", 0.605, "w is at its cap in 60% of steps"),
    ("d1_near_0", 0.31, "d_1 is near 0 in 31% of rollouts: distillation is off after their first"),
    ("tool_fail", 0.31, "31% of tool calls fail"),
    ("entropy", 0.07, "entropy fell to 0.07 nats"),
    ("teacher_entropy", 2.38, "the teacher is unsure, its entropy is 2.4 nats"),
    ("clip_frac", 0.3, "30% of tokens left the clip range: lower --lr"),
    ("skipped_updates", 2, "2 updates were not taken"),
    ("tool_calls", 0.02, "the tool is called 0.02 times a rollout"),
    ("infrastructure", 3, "the sandbox failed in 3 rollouts, which are left out"),
    ("grader_errors", 2, "the grader broke down on 2 answers, which count as wrong"),
    ("correct", 0.0, "no rollout was correct for 10 iterations"),
]


@pytest.mark.parametrize("metric, value, sentence", TROUBLES)
def test_each_trouble_has_one_sentence(metric, value, sentence):
    history = [{**SOUND, metric: value}] * 10
    assert list(sod.health(history)) == [metric] and sentence in sod.health(history)[metric]
    assert metric != "correct" or sod.health(history[1:]) == {}


def test_tool_calls_that_are_halved_within_ten_iterations_are_told():
    falling = [{**SOUND, "tool_calls": calls} for calls in (4.0, 3.9, 3.0, 2.1, 1.9)]
    assert sod.health(falling[:4]) == {}
    assert "fell from 4.0 to 1.9 in 10 iterations" in sod.health(falling)["calls"]
    assert sod.health(falling[:1] + [{**SOUND, "tool_calls": 1.9}] * 10) == {}  # 4.0 is long ago


def test_every_metric_of_the_table_has_a_case_here():
    assert {metric for metric, *_ in TROUBLES} == {*sod.HEALTH, "correct"}


def test_a_sentence_is_not_repeated_while_it_holds():
    history, said = [], []
    for cut, turns in [(0.9, 0), (0.9, 0), (0, 0.9), (0.9, 0.9)]:
        history.append({**SOUND, "cut_length": cut, "cut_turns": turns})
        said.append([sentence.split(":")[0] for sentence in sod.news(history)])
    cut, turns = "90% of rollouts were cut at the token budget", "90% of rollouts ran out of turns"
    assert said == [[cut], [], [turns], [cut]]


def test_demonstrations_have_few_metrics_and_no_false_alarm():
    row = {"iteration": 9, "loss": 1.0, "grad_norm": 1.0, "skipped_updates": 0}
    assert sod.health([row] * 20) == {}


# --- From rollouts ------------------------------------------------------------------------------


def rollout(calls, finish="answer", correct=False):
    """A rollout of one-token turns that made these (outcome, tool text) calls and ended."""
    turns = [sod.Turn([5], "t", outcome, text) for outcome, text in calls]
    turns += [sod.Turn([5], "t")] * (finish == "answer")
    return sod.Rollout(tools.Problem("q", "1"), [5], turns, finish_reason=finish, correct=correct,
                       reward=1.0 if correct else -1.0)


def metrics(rollouts, d, **options):
    """The metrics of rollouts whose teacher is d[i][k] nats away at step k."""
    config = sod.Config(**{"group_size": 2, **options})
    batch, method = sod.collate(rollouts, "cpu"), sod.METHODS[config.method]
    batch.logp_s = torch.where(batch.step_id > 0, -1.0, 0.0)
    batch.entropy_s = batch.entropy_t = torch.full(batch.ids.shape, 0.5)
    if method.scorer:
        batch.logp_t = batch.logp_s + sod.pad([[0.0, *row] for row in d], 0.0, "cpu")
        batch.d = sod.step_divergence(batch.logp_s, batch.logp_t, batch.step_id)
        scheme = config.weights if method.weighted else "uniform"
        batch.w = sod.WEIGHTS[scheme](batch, config)
    batch.A = sod.group_advantages(batch.reward, config.group_size)
    agent = sod.Agent(config, None, None, None, None)
    return sod.batch_metrics(agent, 1, batch, [(0.1, 1.0, 0.0)])


def test_a_batch_whose_first_steps_are_known_by_heart_is_named_with_its_share():
    batch = [rollout([("ok", "7")], correct=i % 2 == 0) for i in range(4)]
    m = metrics(batch, [[0.001, 0.5], [0.3, 0.4], [0.3, 0.4], [0.01, 0.6]])
    assert m["d1_near_0"] == 0.5 and m["w_capped"] == 0.0
    assert list(sod.health([m])) == ["d1_near_0"]
    single = metrics([rollout([], correct=i % 2 == 0) for i in range(4)], [[0.0]] * 4)
    assert single["d1_near_0"] == 0.0  # no later step whose weight could vanish


def test_calls_are_counted_by_outcome_and_failures_and_cuts_have_their_shares():
    calls = [("error", "SyntaxError"), ("timeout", "[no answer in time]")]
    batch = [rollout(calls, correct=i % 2 == 0) for i in range(4)] + [
        rollout([("ok", "7"), calls[0]], finish="length", correct=i == 0) for i in range(2)]
    m = metrics(batch, [[0.3, 0.3, 0.3]] * 4 + [[0.3, 0.3]] * 2)
    assert m["outcomes"] == {"error": 6, "timeout": 4, "ok": 2} and m["tool_calls"] == 2
    assert m["tool_fail"] == 10 / 12 and m["cut_length"] == 2 / 6
    assert set(sod.health([m])) == {"tool_fail", "cut_length"}


def test_loops_and_long_responses_have_their_shares():
    batch = [rollout([("ok", "7")], correct=i % 2 == 0) for i in range(4)]
    batch[0].turns[0].ids = [5, 6] * 14  # 21 runs of 8 tokens, of which two are new
    batch[1].turns[0].ids = list(range(30))
    m = metrics(batch, None, method="grpo")
    new = sum(max(len(turn.ids) - 7, 0) for r in batch for turn in r.turns)
    assert m["repeated"] == 19 / new and "repeated" in sod.health([m])
    mean = sum(r.response_len for r in batch) / 4
    assert m["length"] == mean / sod.Config.max_response


@pytest.mark.parametrize("options, topics", [
    (dict(), {"frac_zero_std_groups", "w_capped"}),
    (dict(method="sod_only"), {"w_capped"}), (dict(weights="uniform"), {"frac_zero_std_groups"}),
    (dict(method="opd"), {"frac_zero_std_groups"}), (dict(method="opd_only"), set()),
    (dict(method="grpo"), {"frac_zero_std_groups"}),
    (dict(weights="unclipped"), {"frac_zero_std_groups"}),
])
def test_what_means_nothing_to_a_method_is_not_said(options, topics):
    """Groups that agree, and weights at their cap: two of three steps come after a larger d."""
    m = metrics([rollout([("ok", "7"), ("ok", "8")]) for _ in range(4)], [[0.9, 0.2, 0.1]] * 4,
                **options)
    assert set(sod.health([m])) == topics
    assert m.get("w_capped", 2 / 3) == pytest.approx(2 / 3)
