"""The study: verdicts over seeds, what is recorded of a run, interruption, figures."""
import doctest
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import sod_mini as sod
import study

TINY = dict(iterations=1, prompts=2, group_size=2, updates=1, max_response=96, eval_problems=6,
            eval_samples=1)


# --- Verdicts ---------------------------------------------------------------------------------


def runs(*percents):
    """Runs of one row, a seed each, that score so many percent on 100 problems."""
    return {seed: {"right": [[1]] * p + [[0]] * (100 - p), "tokens": 10, "seconds": 1.0,
                   "seconds_all": 2.0} for seed, p in enumerate(percents)}


def test_verdicts_are_paired_by_seed_within_one_world():
    results = {"opd": runs(50, 60, 40), "sod": runs(53, 64, 42), "sft": runs(50, 70, 30),
               "opd@brief": runs(9, 8, 7), "sod@brief": runs(4, 5, 3), "grpo": {2: runs(1)[0]}}
    # differences 3, 4, 2: mean 3, std 1, so 3 -+ 4.303 / sqrt(3)
    assert study.against(results, "sod", "opd") == "+3.0 (+0.5 to +5.5) better"
    # 0, 10, -10: mean 0, std 10
    assert study.against(results, "sft", "opd") == "+0.0 (-24.8 to +24.8) open"
    assert study.against(results, "sod@brief", "opd").startswith("-4.0 (-6.5 to -1.5) worse")
    assert study.against(results, "opd", "opd") == study.against(results, "grpo", "opd") == ""


def test_the_report_says_how_many_seeds_each_row_has():
    text = study.report({"sod": recorded(50, 52), "opd": runs(49)}, study.BUDGET)
    assert "3 runs" in text and "| sod | 51.0 ± 1.4 (2) |" in text and "| opd | 49.0 (1) |" in text
    assert "| first | 0.30, 1.00, 0.20 |" in text and "| decay |" not in text


def test_a_dial_has_a_line_for_each_of_its_worlds_that_was_run():
    results = {"sod": recorded(50, 52), "opd": runs(49, 50), "vanilla@digits-0": runs(20, 21),
               "sod@digits-0": recorded(40, 42), "mask_after_error@digits-0": runs(44, 47)}
    none, three = study.dial_lines(results, "check digits", study.DIGITS)[-2:]
    assert none.split(" | ")[:7] == ["| 0", "0.30", "2.00", "3.00", "0.40", "0.90",
                                     "20.5 ± 0.7 (2)"]
    assert "| 41.0 ± 1.4 (2) | 45.5 ± 2.1 (2) |" in none and "-4.5 (" in none
    assert three.startswith("| 3 |") and "+1.5 (" in three
    assert study.dial_lines({}, "check digits", study.DIGITS) == []


def recorded(*percents):
    """Runs of a method that asks a teacher, with what is recorded of its steps."""
    seen = {"drift": {p: [9, 0.3, 1.0, 0.2] for p in study.premises.PATTERNS},
            "law": {"d_1": 0.3, "B": 2.0, "M": 3.0, "B/(B+M)": 0.4, "w": 0.9}}
    return {seed: run | {"first": seen, "last": seen} for seed, run in runs(*percents).items()}


def test_the_stored_tables_are_those_of_this_report():
    stored = (ROOT / "data" / "study" / "README.md").read_text(encoding="utf-8").split("\n")
    assert stored[:4] == study.report({}, study.BUDGET).split("\n")[:4]
    assert [line.split(" | ")[0] for line in stored[10:12]] == ["| vanilla", "| teacher"]
    assert all((ROOT / "data" / "study" / name).exists()
               for name in re.findall(r"\((\w+\.svg)\)", stored[2]))


# --- What is recorded of a run ----------------------------------------------------------------


def scored(d, outcomes, right=True):
    """A batch with one token in each step, scored by hand."""
    rollouts = [sod.Rollout(None, [0], [sod.Turn([0], "", outcome) for outcome in row], right=right)
                for row in outcomes]
    batch = sod.collate(rollouts, "cpu")
    wide = sod.pad([[0.0] + row for row in d], 0.0, "cpu")
    batch.logp_s, batch.logp_t, batch.entropy_t, batch.d = wide, 0 * wide, wide / 10, wide[:, 1:]
    return batch


def test_steps_after_a_failure_at_step_2_are_told_apart_as_in_the_papers_figure():
    batch = scored([[.1, .2, .3, .4], [.5, .6], [.1, .9, .8, .7]],
                   [["ok", "error", "timeout", ""], ["ok", ""], ["ok", "error", "ok", ""]])
    none, fails, recovers = study.steps_after_a_failure(batch)
    assert [row[0] for row in none] == [1, 1, 0, 0]  # the rollout without a failed call
    assert [row[0] for row in fails] == [2, 2, 2, 1]
    assert [row[0] for row in recovers] == [0, 0, 0, 1]
    assert fails[1][1:] == pytest.approx([1.1, .11 - .02])  # d, and entropy less that of step 1
    assert recovers[3] == pytest.approx([1, .7, .06])


def test_the_law_of_w_separates_check_digits_from_everything_else():
    tokenizer = sod.load_tokenizer(sod.Config.student)
    ids = sod.encode(tokenizer, "print(1 + 2)  #345")
    digit = [w == 0 for w in study.make_world.token_worth(tokenizer, ids, 0.0)]
    rollout = sod.Rollout(None, [0], [sod.Turn(list(ids), "", "ok"), sod.Turn(list(ids), "", "")])
    batch = sod.collate([rollout], "cpu")
    gap = torch.tensor([0.0] + 2 * [1.0 if d else 0.5 for d in digit])[None]
    batch.logp_s, batch.logp_t, batch.d, batch.w = gap, 0 * gap, gap[:, :2], gap[:, 1:3] + 1
    seen, M = study.law(batch, tokenizer), 0.5 * (len(ids) - 3)
    assert seen["B"] == 3 and seen["M"] == M and seen["B/(B+M)"] == pytest.approx(3 / (3 + M))


def test_a_rollout_has_the_pattern_of_its_last_step():
    batch = scored([[.1, .1]] * 4, [["ok", ""], ["error", "ok"], ["ok", "timeout"], ["", ""]])
    assert study.pattern_shares(batch) == [.5, .25, .25]


def test_the_example_is_a_right_rollout_whose_weight_rises_again():
    d, failed = [.2, .4, .8, .4, .2], ["ok", "error", "ok", "ok", ""]
    batch = scored([d, d], [failed, ["ok"] * 4 + [""]])
    # w falls to .2 / .8 and rises to 1; in the other one no call failed
    assert study.recoveries(batch) == pytest.approx([.75, 0], abs=1e-5)
    assert study.recoveries(scored([d], [failed], right=False)) == [0.0]


def test_every_token_belongs_to_one_class_of_the_signal():
    batch = scored([[.1] * 5, [.1] * 5], [["ok"] * 5, ["error", "timeout", "ok", "ok", ""]])
    everything, *classes = study.signal_classes(batch).values()
    assert sum(c.long() for c in classes).equal(everything.long())
    assert [int(c.sum()) for c in classes] == [2, 4, 1, 1, 2]


def test_weight_schemes_of_the_study_keep_the_scale_or_the_shape_of_sods():
    batch, config = scored([[.2, .4], [.1, .1]], [["ok", ""]] * 2), sod.Config()
    w = sod.WEIGHTS["sod"](batch, config)  # 1 .5 and 1 1, a token each: mean .875
    assert sod.WEIGHTS["constant"](batch, config).flatten().tolist() == pytest.approx([.875] * 4)
    assert sod.WEIGHTS["rescaled"](batch, config).equal(w / w.mean())
    # the teacher's entropies are a tenth of these: (.02 + .1) / (.04 + .1)
    assert sod.WEIGHTS["confident"](batch, config).flatten().tolist() == pytest.approx(
        [1, .12 / .14, 1, 1])
    assert doctest.testmod(study) == doctest.TestResults(failed=0, attempted=1)


def test_a_move_along_the_signal_changes_all_parameters_alike_and_makes_good_tokens_likelier():
    config = sod.Config(**TINY, lr=1e-12)
    agent = sod.load_agent(config)
    with agent.tool:
        _, batch = next(sod.train(agent))
    before, tokens = [p.detach().clone() for p in agent.student.parameters()], batch.step_id >= 0
    study.move_along(agent.student, batch, tokens.float(), config, lr=1e-4)
    for p, old in zip(agent.student.parameters(), before):
        moved = (p.detach() - old).abs()
        assert bool(((moved - 1e-4).abs() < 1e-6).logical_or(moved == 0).all())
    after, _ = sod.score(agent, agent.student, batch)
    assert float((after - batch.logp_s)[tokens].mean()) > 0.01


# --- Runs -------------------------------------------------------------------------------------


def test_every_row_has_settings_and_files_of_other_settings_are_not_mixed(tmp_path, capsys):
    files = {study.file_of(row, 0, tmp_path, budget)
             for row in study.STUDY for budget in (TINY, study.BUDGET)}
    assert len(files) == 2 * len(study.STUDY)
    config = study.config_of("sod@digits-5", 3, tmp_path, study.BUDGET)
    assert config.seed == 3 and config.teacher == str(tmp_path / "worlds" / "digits-5" / "teacher")
    assert study.config_of("opd@lasting", 0, tmp_path, study.BUDGET).silent_persist == 0.8
    assert study.main(["--rows", "sodd"]) == 1
    assert "the study has no row sodd; choose from vanilla" in capsys.readouterr().err


def test_imitation_gets_as_many_conversations_and_updates_as_the_others(tmp_path):
    config = study.config_of("sft", 0, tmp_path, dict(TINY, iterations=3, updates=2))
    agent = sod.load_agent(config)
    with agent.tool:
        result = study.learn(agent)
    assert len(agent.practice) == 12 and len(result["curve"]) == 6 and result["tokens"] > 100


def table(folder):
    """The study's table without its last column, the seconds."""
    return re.sub(r"\| \S+ \|\n", "|\n", (folder / "README.md").read_text().split("\n\n", 3)[3])


def test_a_killed_run_is_lost_alone_and_the_same_command_continues(tmp_path, monkeypatch, capsys):
    rows, start = {"vanilla": 1, "opd": 1}, study.subprocess.Popen

    def start_and_kill(command, **options):
        process = start(command, **options)
        if json.loads(command[-1])["row"] == "vanilla":
            process.kill()
        return process

    monkeypatch.setattr(study.subprocess, "Popen", start_and_kill)
    assert study.study(rows, 1, 2, tmp_path, TINY) == 1
    assert "vanilla seed 0 FAILED with status -9" in capsys.readouterr().out
    assert [path.name[:5] for path in tmp_path.glob("*.json")] == ["opd-0"]
    monkeypatch.undo()
    assert study.study(rows, 1, 2, tmp_path, TINY) == 0
    assert "2 runs, 1 done" in capsys.readouterr().out
    whole = table(tmp_path)
    next(tmp_path.glob("opd-0*.json")).unlink()
    assert study.study(rows, 1, 2, tmp_path, TINY) == 0 and table(tmp_path) == whole
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".svg"}


# --- Figures ----------------------------------------------------------------------------------

EXAMPLE = {"question": "<b>&", "turns": [
    {"text": "x </text><script>", "outcome": "timeout", "tool": "a\n<b>", "d": 1.0, "w": 0.2},
    {"text": "\\boxed{1}", "outcome": "", "tool": None, "d": .1, "w": 1.2}]}
STEPS = [[[30, 9.0, 3.0]], [[0, 0, 0]], [[25, 50.0, 20.0]]]


@pytest.mark.parametrize("run, names", [
    (dict(curve=[{"right": .1}, {"right": .3}], steps=[STEPS, STEPS],
          patterns=[[.5, .3, .2]] * 2, example=EXAMPLE),
     {"learning.svg", "drift.svg", "patterns.svg", "persist.svg", "weights.svg"}),
    (dict(curve=[{"right": 0.0}], steps=[[[[1, 1, 1]]] * 3], patterns=[[1, 0, 0]], example=None),
     {"learning.svg", "drift.svg", "patterns.svg", "persist.svg"})],
    ids=["usual", "nothing right or often seen"])
def test_figures_are_whole_svg_with_title_and_description_and_escape_text(run, names):
    run = run | {"right": [[1], [0]]}
    figures = study.figures({"sod": {0: run, 1: run}, "grpo": {0: run}, "sod@lasting": {0: run}})
    assert set(figures) == names
    for text in figures.values():
        root = ElementTree.fromstring(text)
        assert [child.tag.split("}")[1] for child in root[:2]] == ["title", "desc"]
        assert "script" not in {node.tag.split("}")[1] for node in root.iter()}
        assert not re.search(r"\bnan\b|\binf\b", text)


def test_axes_start_at_0_and_reach_the_highest_value():
    assert study.ticks(0.56) == pytest.approx([0, .2, .4, .6])
    assert study.ticks(73) == [0, 20, 40, 60, 80] and study.ticks(2.6) == [0, 1, 2, 3]


def test_a_line_shows_only_steps_that_every_seed_has_seen_often():
    few, many = {"steps": [[[[19, 19., 0]]]]}, {"steps": [[[[20, 40., 0]]], [[[20, 80., 0]]]]}
    assert study.drift_line([many, few], 0, 1) == []
    assert study.drift_line([many], 0, 1) == [(1, 3.0, 3.0, 3.0)]
