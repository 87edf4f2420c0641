"""The study: verdicts over seeds, what is recorded of a run, interruption, figures."""
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
import sod_mini as sod

TINY = dict(steps=1, prompts_per_step=2, group_size=2, updates_per_step=1, max_response=96,
            eval_problems=6, eval_samples=1)


# --- Verdicts ---------------------------------------------------------------------------------


def test_t_interval_is_that_of_the_textbook():
    found = [evaluate.t_975(n) for n in (1, 4, 29)]
    assert found == pytest.approx([12.706, 2.776, 2.045], abs=1e-3)
    # 1..5: mean 3, std sqrt(2.5), so 3 -+ 2.776 sqrt(2.5 / 5)
    assert evaluate.t_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.0368, 4.9632), abs=1e-3)
    mean, low, high = evaluate.t_interval([7])
    assert mean == 7 and math.isnan(low) and math.isnan(high)


def runs(*percents):
    """Runs of one row, a seed each, that score so many percent on 100 problems."""
    return {seed: {"right": [[1]] * p + [[0]] * (100 - p), "tokens": 10, "seconds": 1.0,
                   "seconds_all": 2.0} for seed, p in enumerate(percents)}


def test_verdicts_are_paired_by_seed_within_one_world():
    found = {"opd": runs(50, 60, 40), "sod": runs(53, 64, 42), "sft": runs(50, 70, 30),
             "opd@loud": runs(9, 8, 7), "sod@loud": runs(4, 5, 3), "grpo": {2: runs(1)[0]}}
    # differences 3, 4, 2: mean 3, std 1, so 3 -+ 4.303 / sqrt(3)
    assert evaluate.against(found, "sod", "opd") == "+3.0 (+0.5 to +5.5) better"
    # 0, 10, -10: mean 0, std 10
    assert evaluate.against(found, "sft", "opd") == "+0.0 (-24.8 to +24.8) open"
    assert evaluate.against(found, "sod@loud", "opd").startswith("-4.0 (-6.5 to -1.5) worse")
    assert evaluate.against(found, "opd", "opd") == evaluate.against(found, "grpo", "opd") == ""


def test_the_report_counts_runs_that_are_missing():
    text = evaluate.study_report({"sod": runs(50, 52)}, ["sod", "opd"], 2, 4, evaluate.STUDY)
    assert "2 of 4 runs" in text and "| sod | 51.0 ± 1.4 |" in text and "| opd |" not in text
    text = evaluate.study_report({"sod": runs(50, 52)}, ["sod"], 3, 3, evaluate.STUDY)
    assert "| sod | 51.0 ± 1.4 (2) |" in text


# --- What is recorded of a run ----------------------------------------------------------------


def scored(d, outcomes, right=True):
    """A batch with one token in each step, scored by hand."""
    step_id = sod.pad([[-1] + list(range(len(row))) for row in d], -1, "cpu")
    rollouts = [sod.Rollout(None, [0] * (len(row) + 1), [], 1, outcomes=list(row), right=right)
                for row in outcomes]
    wide = sod.pad([[0.0] + row for row in d], 0.0, "cpu")
    failed = sod.pad([[o not in sod.FINE for o in row] for row in outcomes], False, "cpu")
    return sod.Scored(rollouts, step_id, failed=failed, A=torch.zeros(len(d)), logp_t=0 * wide,
                      entropy_t=wide / 10, logp_s=wide, entropy_s=wide, d=wide[:, 1:],
                      w=torch.ones(len(d), wide.shape[1] - 1), advantages=wide, fresh=False)


def test_steps_are_told_apart_by_the_failed_call_before_or_at_them():
    batch = scored([[.1, .2, .3, .4], [.5, .6]], [["ok", "error", "timeout", ""], ["ok", ""]])
    none, at, after = evaluate.drift_table(batch)
    assert [row[0] for row in none] == [2, 1, 0, 0]  # a step that is not there is not counted
    assert [row[0] for row in at] == [0, 1, 0, 0] and [row[0] for row in after] == [0, 0, 1, 1]
    assert none[0] == [2, pytest.approx(.6), pytest.approx(.06)]
    assert after[2] == [1, pytest.approx(.3), pytest.approx(.03)]


def test_a_rollout_has_the_pattern_of_its_last_step():
    batch = scored([[.1, .1]] * 4, [["ok", ""], ["error", "ok"], ["ok", "timeout"], ["", ""]])
    assert evaluate.pattern_shares(batch) == [.5, .25, .25]


def test_every_token_belongs_to_one_class_of_the_signal():
    batch = scored([[.1] * 5, [.1] * 5], [["ok"] * 5, ["error", "ok", "ok", "ok", ""]])
    everything, *classes = evaluate.signal_classes(batch).values()
    assert sum(c.long() for c in classes).equal(everything.long())
    assert [int(c.sum()) for c in classes] == [2, 1, 1, 2, 1, 1, 2]


def test_a_step_along_the_signal_moves_every_parameter_alike_and_makes_good_tokens_likelier():
    config = sod.Config(**TINY, lr=1e-12)
    agent = sod.load_agent(config)
    with agent.tool:
        next(sod.train(config, agent))
    scored, before = agent.scored, [p.detach().clone() for p in agent.student.parameters()]
    tokens = scored.step_id >= 0
    evaluate.step_along(agent.student, scored, tokens.float(), config, lr=1e-4)
    for p, old in zip(agent.student.parameters(), before):
        moved = (p.detach() - old).abs()
        assert bool(((moved - 1e-4).abs() < 1e-6).logical_or(moved == 0).all())
    after = sod.score(agent.student, scored.rollouts, config)[0]
    assert float((after - scored.logp_s)[tokens].mean()) > 0.01


# --- Runs -------------------------------------------------------------------------------------


def test_every_row_has_settings_and_files_of_other_settings_are_not_mixed(tmp_path):
    files = {evaluate.study_file(row, 0, tmp_path, budget)
             for row in evaluate.STUDY_ROWS for budget in (TINY, evaluate.STUDY)}
    assert len(files) == 2 * len(evaluate.STUDY_ROWS)
    config = evaluate.study_config("sod@seasoned", 3, tmp_path, evaluate.STUDY)
    assert config.seed == 3 and config.teacher.endswith("checkpoint")
    assert evaluate.main(["--study", "--rows", "sodd"]) == 1


def test_imitation_gets_as_many_conversations_and_steps_as_the_others(tmp_path):
    budget = dict(TINY, steps=3, updates_per_step=2)
    config = evaluate.study_config("sft", 0, tmp_path, budget)
    agent = sod.load_agent(config)
    found = evaluate.learn(agent, config)
    assert len(agent.practice[0]) == 12 and len(found["curve"]) == 6 and found["tokens"] > 100


def table(folder):
    """The study's table without its last column, the seconds."""
    return re.sub(r"\| \S+ \|\n", "|\n", (folder / "study.md").read_text().split("\n\n", 1)[1])


def test_a_killed_run_is_lost_alone_and_the_same_command_continues(tmp_path, monkeypatch, capsys):
    rows, start = ["vanilla", "opd"], evaluate.start_job

    def start_and_kill(row, *more):
        process = start(row, *more)
        if row == "vanilla":
            process.kill()
        return process

    monkeypatch.setattr(evaluate, "start_job", start_and_kill)
    assert evaluate.study(rows, 1, 2, tmp_path, TINY) == 1
    assert "vanilla seed 0 FAILED with status -9" in capsys.readouterr().out
    assert [path.name[:5] for path in tmp_path.glob("*.json")] == ["opd-0"]
    monkeypatch.undo()
    assert evaluate.study(rows, 1, 2, tmp_path, TINY) == 0
    assert "2 runs, 1 done" in capsys.readouterr().out
    whole = table(tmp_path)
    next(tmp_path.glob("opd-0*.json")).unlink()
    assert evaluate.study(rows, 1, 2, tmp_path, TINY) == 0 and table(tmp_path) == whole
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.log"))


# --- Figures ----------------------------------------------------------------------------------


def test_figures_are_whole_svg_with_title_and_description_and_escape_text(tmp_path):
    example = {"question": "<b>&", "turns": [
        {"text": "x </text><script>", "outcome": "timeout", "tool": "a\n<b>", "d": 1.0, "w": 0.2},
        {"text": "\\boxed{1}", "outcome": "", "tool": None, "d": .1, "w": 1.2}]}
    drift = [[[30, 9.0, 3.0]], [[0, 0, 0]], [[25, 50.0, 20.0]]]
    run = {"curve": [{"right": .1}, {"right": .3}], "drift": [drift, drift],
           "patterns": [[.5, .3, .2]] * 2, "example": example}
    figures = evaluate.study_figures({"sod": {0: run, 1: run}, "grpo": {0: run}})
    assert set(figures) == {"learning.svg", "drift.svg", "patterns.svg", "weights.svg"}
    for text in figures.values():
        root = ElementTree.fromstring(text)
        assert [child.tag.split("}")[1] for child in root[:2]] == ["title", "desc"]
        assert "script" not in {node.tag.split("}")[1] for node in root.iter()}
        assert not re.search(r"\bnan\b|\binf\b", text)


def test_axes_start_at_0_and_reach_the_highest_value():
    assert evaluate.ticks(0.56) == pytest.approx([0, .2, .4, .6])
    assert evaluate.ticks(73) == [0, 20, 40, 60, 80] and evaluate.ticks(2.6) == [0, 1, 2, 3]


def test_labels_do_not_cover_each_other():
    assert evaluate.spread_out([50, 48, 100]) == [64, 48, 100]


def test_a_line_shows_only_steps_that_every_seed_has_seen_often():
    few, many = {"drift": [[[[19, 19., 0]]]]}, {"drift": [[[[20, 40., 0]]], [[[20, 80., 0]]]]}
    assert evaluate.drift_line([many, few], 0, 1) == []
    assert evaluate.drift_line([many], 0, 1) == [(1, 3.0, 3.0, 3.0)]
