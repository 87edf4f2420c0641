"""The study: verdicts over seeds, what is recorded of a run, interruption, figures."""
import csv
import doctest
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import report
import sod_mini as sod
import drift
import study
import tools

TINY = dict(iterations=1, prompts=2, group_size=2, num_minibatches=1, max_response=96,
            eval_problems=6, eval_samples=1)


# --- Verdicts ---------------------------------------------------------------------------------


def runs(*percents):
    """Runs of one row, a seed each, that score so many percent on 100 problems."""
    return {seed: {"correct": [[1]] * p + [[0]] * (100 - p), "tokens": 10, "seconds": 1.0,
                   "seconds_all": 2.0, "curve": [{"correct": 0.1}]}
            for seed, p in enumerate(percents)}


def test_verdicts_are_paired_by_seed_within_one_world():
    results = {"opd": runs(50, 60, 40), "sod": runs(53, 64, 42), "sft": runs(50, 70, 30),
               "opd@brief": runs(9, 8, 7), "sod@brief": runs(4, 5, 3), "grpo": {2: runs(1)[0]}}
    # differences 3, 4, 2: mean 3, std 1, so 3 -+ 4.303 / sqrt(3)
    assert report.against(results, "sod", "opd") == "+3.0 (+0.5 to +5.5) better"
    # 0, 10, -10: mean 0, std 10
    assert report.against(results, "sft", "opd") == "+0.0 (-24.8 to +24.8) open"
    assert report.against(results, "sod@brief", "opd@brief") == "-4.0 (-6.5 to -1.5) worse"
    assert report.against(results, "opd", "opd") == report.against(results, "grpo", "opd") == ""


def test_the_report_says_how_many_seeds_each_row_has():
    text = report.tables({"sod": recorded(50, 52), "opd": runs(49)}, study.BUDGET,
                         study.DIALS)
    assert "3 runs" in text and "| sod | 51.0 ± 1.4 (2) |" in text and "| opd | 49.0 (1) |" in text
    assert "| first | 0.30, 1.00, 0.20 |" in text and "| decay |" not in text


def test_a_dial_has_a_line_for_each_of_its_worlds_that_was_run():
    results = {"sod": recorded(50, 52), "opd": runs(49, 50), "vanilla@digits-0": runs(20, 21),
               "sod@digits-0": recorded(40, 42), "mask_after_error@digits-0": runs(44, 47),
               "sod_full@digits-0": runs(47, 49)}
    values = report.rows_of(results, "digits", (0, 1, 3), 3)
    none, three = report.dial_lines(results, "check digits", values)[-2:]
    assert none.split(" | ")[:8] == ["| 0", "0.30", "2.00", "3.00", "0.40", "0.90", "4.0",
                                     "20.5 ± 0.7 (2)"]
    assert "| 41.0 ± 1.4 (2) | 45.5 ± 2.1 (2) |" in none and "-4.5 (" in none
    assert none.endswith("| +7.0 (+7.0 to +7.0) better |") and three.endswith("|  |")
    assert three.startswith("| 3 |") and "+1.5 (" in three
    assert report.dial_lines({}, "check digits", {0: {}, 3: {}}) == []


def recorded(*percents):
    """Runs of a method that asks a teacher, with what is recorded of its steps."""
    stored = {"drift": {p: [9, 1.2 if p == "after more" else 0.3, 1.0, 0.2]
                        for p in study.premises.PATTERNS},
              "law": {"d_1": 0.3, "B": 2.0, "M": 3.0, "B/(B+M)": 0.4, "w": 0.9}}
    return {seed: run | {"first": stored, "last": stored} for seed, run in runs(*percents).items()}


def test_the_stored_tables_are_those_of_this_report():
    stored = (ROOT / "data" / "study" / "README.md").read_text(encoding="utf-8").split("\n")
    assert stored[:4] == report.tables({}, study.BUDGET, study.DIALS).split("\n")[:4]
    assert [line.split(" | ")[0] for line in stored[10:12]] == ["| vanilla", "| teacher"]
    assert "\n".join(stored).endswith(report.OTHERS + "\n")
    told = report.tables({"sod": recorded(50), "sod@digits-0": recorded(40)}, study.BUDGET,
                         study.DIALS)
    (dials,) = [line for line in told.split("\n") if line.startswith("Dials of the world.")]
    assert dials in stored
    assert all((ROOT / "data" / "study" / name).exists()
               for name in re.findall(r"\((\w+\.svg)\)", stored[2]))


def test_every_interval_that_the_readme_tells_stands_in_the_tables_of_the_study():
    pairs = lambda text: {tuple(sorted(map(float, pair))) for pair in re.findall(
        r"([-+]?[\d.]*\d)\s+to\s+([-+]?[\d.]*\d)", text)}
    stored = set().union(*(pairs((ROOT / "data" / "study" / name).read_text(encoding="utf-8"))
                           for name in ("README.md", "signals.md")))
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What to expect")[2]
    told = pairs(section.partition("\n## ")[0])
    assert len(told) > 10 and all({pair, (-pair[1], -pair[0])} & stored for pair in told)


def stored_runs():
    """{row: {seed: run}} of data/study/runs.csv."""
    found = {}
    with open(ROOT / "data" / "study" / "runs.csv", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            found.setdefault(line["row"], {})[int(line["seed"])] = {
                "correct": [float(line["percent"]) / 100]}
    return found


def test_each_figure_of_signals_md_comes_from_the_runs_that_are_listed_beside_it():
    folder, found = ROOT / "data" / "study", stored_runs()
    assert all(seeds.keys() == set(range(len(seeds))) for seeds in found.values())
    text = (folder / "signals.md").read_text(encoding="utf-8")
    asked = {}
    for seeds, rows in re.findall(r"study\.py(?: --seeds (\d+))? --rows ([\w@. -]+)\n", text):
        asked |= {row: min(int(seeds or 10), study.STUDY[row]) for row in rows.split()}
    assert asked == {row: len(seeds) for row, seeds in found.items()}
    table = [line for line in report.gate_lines(found) if line.startswith("|")]
    assert len(table) == 10 and "\n".join(["", *table, ""]) in text
    averages = re.findall(r"^\| `(\w+)` \|.*?(\d\d\.\d ± \d\.\d \(\d+\))", text, re.M)
    assert len(averages) > 5
    assert [told for _, told in averages] == [report.average(found, row) for row, _ in averages]
    verdicts = re.findall(r"`([\w@.-]+)` minus `([\w@.-]+)` \| ([-+\d.]+ \(.*?\) \w+)", text)
    assert len(verdicts) > 5
    assert [told for *_, told in verdicts] == [report.against(found, a, b) for a, b, _ in verdicts]
    worlds = re.findall(r"^\| `@(\S+)` \| (.*) \|$", text, re.M)
    assert worlds == [(world, " | ".join(
        [report.average(found, f"{row}@{world}") for row in ("opd", "sod", "sod_full")]
        + [report.against(found, f"{a}@{world}", f"{b}@{world}")
           for a, b in (("sod", "opd"), ("sod_full", "sod"), ("sod_full", "opd"))]))
        for world in ("digits-0", "persist-0.8", "sure-1")]
    others = re.findall(r"^\| `(\w+)` \| [^|]+ \| (\d.* \(\d\)) \| (.*) \| (.*) \|$", text, re.M)
    assert len(others) > 5 and others == [
        (row, report.average(found, row), report.against(found, row, "sod"),
         report.against(found, row, "opd")) for row, *_ in others]
    schemes = {row: [report.score(run) for run in seeds.values()] for row, seeds in found.items()
               if row not in report.NO_SCHEMES and "@" not in row}
    assert {row for row in schemes if report.against(found, row, "sod").endswith(" better")} == {
        "sod_full", "sod_only_full"}  # no gate or weight of others
    assert (folder / "schemes.svg").read_text(encoding="utf-8") == report.schemes_chart(schemes)


def test_what_others_put_in_place_of_the_signal_stands_beside_a_random_mask():
    found = {"opd": runs(40, 42), "sod": runs(50, 52), "agree": runs(44, 46), "dial": runs(1),
             "random_keep": runs(43, 45), "sod_agree": runs(49, 51),
             "sod_random_keep": runs(50, 53)}
    agree, control = report.gate_lines(found)[5:]
    assert agree == ("| agree | 45.0 ± 1.4 (2) | +4.0 (+4.0 to +4.0) better | +1.0 (+1.0 to +1.0) "
                     "better | 50.0 ± 1.4 (2) | -1.0 (-1.0 to -1.0) worse | "
                     + report.against(found, "sod_agree", "sod_random_keep") + " |")
    assert control.startswith("| random_keep | 44.0 ± 1.4 (2) | +3.0 (+3.0 to +3.0) better |  | ")
    assert report.gate_lines({"opd": runs(40), "agree": runs(40)}) == []
    assert report.run_lines(found | {"signal": runs(1)})[:3] == [
        "row,seed,percent", "opd,0,40.000", "opd,1,42.000"]
    assert len(report.run_lines(found)) == 14


# --- What is recorded of a run ----------------------------------------------------------------


def scored(d, outcomes, correct=True):
    """A batch with one token in each step, scored by hand."""
    rollouts = [sod.Rollout(None, [0], [sod.Turn([0], "", outcome) for outcome in row],
                            correct=correct) for row in outcomes]
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


def test_how_far_apart_two_methods_are_is_the_cosine_of_their_token_advantages():
    """w = 1, .5 by Eq. 7, whatever the run weighed by; gaps 1 and 2. Without an outcome sod has
    1, 1, opd 1, 2 and grpo nothing; with A = 1 they have 2, 2 and 2, 3 and 1, 1."""
    turns = [{"d": d, "w": 9.0, "logp_s": [-3.0], "logp_t": [-3.0 + gap]}
             for d, gap in ((0.2, 1.0), (0.4, 2.0))]
    for A, to_opd, to_grpo in ((0.0, 3 / 10 ** 0.5, 0.0), (1.0, 10 / 104 ** 0.5, 1.0)):
        found = drift.cosines([{"advantage": A, "turns": turns}])
        assert found == pytest.approx((to_opd, to_grpo, 2), abs=1e-5)


def test_a_run_of_ones_own_is_profiled_from_its_rollouts(tmp_path, capsys):
    d = [[.1, .2, .3, .4], [.5, .6], [.1, .9, .8, .7]]
    batch = scored(d, [["ok", "error", "timeout", ""], ["ok", ""], ["ok", "error", "ok", ""]])
    batch.w = sod.step_weights(batch.d)
    batch.A, batch.advantages = torch.zeros(3), batch.logp_s
    for r in batch.rollouts:
        r.problem = tools.Problem("question", "42")
    path = tmp_path / "rollouts.jsonl"
    rollouts = list(sod.rollout_rows(batch, 1, None, 0))
    path.write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    by_pattern = lambda: drift.by_pattern(drift.steps_of(drift.read(tmp_path)[0]))
    found = by_pattern()
    for name, (steps, d_k, w, entropy) in study.premises.drift(batch).items():
        assert found[name][0] == steps
        assert found[name][2:] == pytest.approx((d_k, w, entropy), abs=1e-4)
    assert found["its call fails"][:3] == pytest.approx((3, 1, .3))
    assert found["clean"][1] == pytest.approx(2 / 3)
    assert drift.main([str(tmp_path)]) == 0 and "| after more | 1 |" in (
        said := capsys.readouterr().out) and "cosine" not in said  # no token is stored
    assert (tmp_path / "drift.svg").read_text().startswith("<svg")
    shown = (tmp_path / "drift.svg").read_text()
    unscored = [{"text": "", "outcome": "sandbox_error", "tool": "", "d": d, "w": w, "entropy_t": h}
                for d, w, h in ((0.0, 1.0, 0.0), (None, None, None))]  # as it was, as it is stored
    lost = [rollouts[0] | {"finish_reason": "infrastructure", "turns": [turn]} for turn in unscored]
    path.write_text("".join(json.dumps(row) + "\n" for row in rollouts + lost))
    assert by_pattern() == found
    assert drift.main([str(tmp_path)]) == 0 and (tmp_path / "drift.svg").read_text() == shown
    assert "3 rollouts" in (said := capsys.readouterr().out) and "without 2 that" in said
    untaught = rollouts[0] | {"turns": [unscored[1]]}
    for rows in ([untaught], [untaught, *lost], lost, []):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert drift.main([str(tmp_path)]) == 1 and "with a teacher" in capsys.readouterr().err


def test_the_help_of_drift_is_its_docstring(capsys):
    with pytest.raises(SystemExit) as caught:
        drift.main(["--help"])
    assert not caught.value.code and drift.__doc__.strip() in capsys.readouterr().out


def test_the_law_of_w_separates_check_digits_from_everything_else():
    tokenizer = sod.load_tokenizer(sod.Config.student)
    ids = sod.encode(tokenizer, "print(1 + 2)  #345")
    digit = [w == 0 for w in study.make_world.token_worth(tokenizer, ids, 0.0)]
    rollout = sod.Rollout(None, [0], [sod.Turn(list(ids), "", "ok"), sod.Turn(list(ids), "", "")])
    batch = sod.collate([rollout], "cpu")
    gap = torch.tensor([0.0] + 2 * [1.0 if d else 0.5 for d in digit])[None]
    batch.logp_s, batch.logp_t, batch.d, batch.w = gap, 0 * gap, gap[:, :2], gap[:, 1:3] + 1
    law, M = study.law(batch, tokenizer), 0.5 * (len(ids) - 3)
    assert law["B"] == 3 and law["M"] == M and law["B/(B+M)"] == pytest.approx(3 / (3 + M))


def test_a_rollout_has_the_pattern_of_its_last_step():
    batch = scored([[.1, .1]] * 4, [["ok", ""], ["error", "ok"], ["ok", "timeout"], ["", ""]])
    assert study.pattern_shares(batch) == [.5, .25, .25]


def test_the_example_is_a_right_rollout_whose_weight_rises_again():
    d, failed = [.2, .4, .8, .4, .2], ["ok", "error", "ok", "ok", ""]
    batch = scored([d, d], [failed, ["ok"] * 4 + [""]])
    # w falls to .2 / .8 and rises to 1; in the other one no call failed
    assert study.recoveries(batch) == pytest.approx([.75, 0], abs=1e-5)
    assert study.recoveries(scored([d], [failed], correct=False)) == [0.0]


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
    assert sod.WEIGHTS["constant_d1"](batch, config).flatten().tolist() == pytest.approx(
        [1.2, .29 / .4, 1.2, 1.2], rel=1e-4)  # .29 / .2 and .29 / .1 are above the cap
    assert doctest.testmod(study) == doctest.TestResults(failed=0, attempted=1)


def test_two_schemes_teach_only_wrong_rollouts_or_only_what_follows_a_failure():
    batch = scored([[.1, .1, .1], [.1, .1]], [["ok", "error", ""], ["ok", ""]], correct=False)
    batch.rollouts[1].correct = True
    only = lambda name: sod.WEIGHTS[name](batch, sod.Config()).tolist()
    assert only("wrong_only") == [[1, 1, 1], [0, 0, 0]]
    assert only("after_failure") == [[0, 0, 1], [0, 0, 0]]


def test_rollouts_that_the_machine_failed_are_left_out_of_the_premises():
    d, outcomes = [[.1, .2], [.3, .4], [9., 8.]], [["ok", ""], ["error", ""], ["error", ""]]
    with_lost, without = scored(d, outcomes), scored(d[:2], outcomes[:2])
    with_lost.rollouts[2].finish_reason = "infrastructure"
    for batch in (with_lost, without):
        batch.w = sod.step_weights(batch.d)
    for measure in (study.premises.drift, study.premises.drift_premises):
        np.testing.assert_equal(measure(with_lost), measure(without))  # nan is equal to nan


# --- Controls and suspects --------------------------------------------------------------------


class Run:
    """As much of an Agent as a control needs."""
    config = sod.Config(iterations=4)


def test_controls_put_something_else_in_place_of_the_teacher():
    batch = scored([[.1] * 5], [["ok"] * 5])
    batch.logp_s = torch.tensor([[0.0, -1.0, -2.0, -3.0, -4.0, -9.0]])
    logp_t = torch.tensor([[0.0, -1.5, -5.0, -1.0, -4.0, -8.0]])
    term = lambda control: (control(Run, batch, logp_t) - batch.logp_s)[0, 1:].tolist()
    assert term(study.clip) == [-.5, -1, 1, 0, 1]
    assert term(study.negative) == [0, 0, 0, 0, -.5]  # one of five, the least likely
    for iteration, expected in ((2, [-.5, -3, 2, 0, 1]), (3, [0] * 5)):
        batch.rollouts[0].key = (0, "rollouts", iteration, 0)
        assert term(study.then) == expected


def gated(control, right, gaps, agent=Run, p_s=None):
    """What a control leaves of the gaps of rollouts that are right or not, each of one step a token;
    p_s: the student's probabilities of these tokens."""
    batch = scored([[.1] * len(row) for row in gaps], [["ok"] * len(row) for row in gaps])
    wide = lambda rows: sod.pad([[0.0] + row for row in rows], 0.0, "cpu")
    batch.logp_s = wide([np.log(row).tolist() for row in p_s or [[.1] * len(row) for row in gaps]])
    for n, (r, correct) in enumerate(zip(batch.rollouts, right)):
        r.correct, r.key = correct, (0, "rollouts", 1, n)
    left = study.CONTROLS[control](agent, batch, batch.logp_s + wide(gaps)) - batch.logp_s
    return [pytest.approx(row[:len(gap)], abs=1e-4) for row, gap in zip(left[:, 1:].tolist(), gaps)]


def test_a_gap_counts_where_it_points_as_the_outcome_does():
    gaps = [[.5, -1.0, 2.0], [.5, -1.0]]
    assert gated("agree", [True, False], gaps) == [[.5, 0, 2], [0, -1]]
    assert gated("agree", [False, True], gaps) == [[0, -1, 0], [.5, 0]]


def test_a_rollout_counts_unless_its_gaps_in_all_point_against_the_outcome():
    gaps = [[.5, -1.0, 2.0], [.5, -1.0], [1.0, -1.0]]
    assert gated("aligned", [True, True, True], gaps) == [[.5, -1, 2], [0, 0], [1, -1]]
    assert gated("aligned", [False, False, False], gaps) == [[0, 0, 0], [.5, -1], [1, -1]]


def test_the_tokens_that_count_are_those_whose_probabilities_differ_most_in_each_rollout():
    p_s, p_t = np.array([.5, .01, .5, .2, .1]), np.array([.1, .0001, .45, .4, .1])
    gaps = np.log(p_t / p_s).tolist()  # -1.6 -4.6 -.1 .7 0, where p_t - p_s is -.4 -.01 -.05 .2 0
    left = gated("dial", [True, False], [gaps, [.01, .02]], p_s=[p_s, [.1, .1]])
    assert left == [[gaps[0], 0, 0, gaps[3], 0], [0, .02]]  # two of five, and one of two


def test_the_control_of_all_masks_keeps_a_random_80_percent_the_same_in_a_rerun():
    kept = lambda agent: gated("random_keep", [True], [[1.0] * 4000], agent)[0].expected
    other = type("Other", (), {"config": sod.Config(seed=1)})
    assert np.mean(kept(Run)) == pytest.approx(.8, abs=.03)
    assert kept(Run) == kept(Run) != kept(other)


def test_a_return_holds_the_discounted_gaps_of_all_later_tokens():
    assert gated("return_9", [True, True], [[1.0, -2.0, 3.0], [1.0, 1.0]]) == [
        [1 + .9 * (-2 + .9 * 3), -2 + .9 * 3, 3], [1.9, 1]]
    assert gated("return_99", [True], [[1.0, 2.0]]) == [[1 + .99 * 2, 2]]


def test_residuals_are_differences_of_probabilities_centred_in_each_rollout(monkeypatch):
    monkeypatch.setattr(study, "at_each_token", lambda agent, batch, f: torch.full(
        batch.logp_s.shape, -.1))
    double = math.log(2)  # p_s is .25, p_t .5 .25 .25: with the .1 that is expected, .35 .1 .1
    left = gated("residual", [True, True], [[double, 0.0, 0.0], [double]], p_s=[[.25] * 3, [.25]])
    assert left == [[.35 - .55 / 3, .1 - .55 / 3, .1 - .55 / 3], [0]]


def test_the_residual_to_be_expected_is_the_mean_over_the_students_own_distribution():
    agent = sod.load_agent(sod.Config(**TINY))
    prompt = (agent.eval_set[0], sod.encode_prompt(agent.tokenizer, agent.eval_set[0]))
    with agent.tool:
        (rollout,) = sod.sample_rollouts(agent, agent.student, [prompt], (0, "rollouts", 1))
    batch = sod.collate([rollout], "cpu")
    with torch.no_grad():
        p_s, p_t = (model(input_ids=batch.ids).logits.softmax(-1)[:, :-1]
                    for model in (agent.student, agent.teacher))
    batch.logp_s = torch.zeros(batch.ids.shape)
    found = study.at_each_token(agent, batch, study.mean_residual)
    assert torch.allclose(found[:, 1:], (p_s * (p_t - p_s)).sum(-1) * batch.sampled[:, 1:],
                          atol=1e-5)
    assert float(found.abs().max()) > 0.01


def test_the_gap_counts_by_the_teachers_lead_on_problems_of_the_same_difficulty(monkeypatch):
    problem = lambda difficulty: tools.Problem("q", "1", difficulty=difficulty)
    batch = scored([[.1]] * 8, [["ok"]] * 8)
    for n, (r, correct) in enumerate(zip(batch.rollouts, [1, 0, 0, 0, 1, 1, 0, 0])):
        r.problem, r.correct = problem(3 if n < 6 else 4), bool(correct)
        r.key = (0, "rollouts", 1, n)
    tried = []

    def solve(agent, model, prompts, key):
        tried.append((model, len(prompts), key))
        return [sod.Rollout(p, ids, [], correct=right) for (p, ids), right in
                zip(prompts, [True, True, False, False])]
    monkeypatch.setattr(sod, "sample_rollouts", solve)
    agent = sod.Agent(sod.Config(group_size=2), None, "teacher", None, None)
    batch.logp_s = torch.full((8, 2), -2.0)
    left = study.lead(agent, batch, batch.logp_s + 1) - batch.logp_s
    # T is 2/3 where the difficulty is 3 and 0 where it is 4; S is .5, 0, 1 and 0
    assert left[:, 1].tolist() == pytest.approx([.25, .25, 1, 1, 0, 0, 0, 0])
    assert tried == [("teacher", 4, (0, "teacher", 1))]


def test_the_control_variate_adds_the_exact_kl_of_each_place():
    agent = sod.load_agent(sod.Config(**TINY))
    prompt = (agent.eval_set[0], sod.encode_prompt(agent.tokenizer, agent.eval_set[0]))
    with agent.tool:
        (rollout,) = sod.sample_rollouts(agent, agent.student, [prompt], (0, "rollouts", 1))
    batch, full = sod.collate([rollout], "cpu"), {}
    with torch.no_grad():
        for name in ("student", "teacher"):
            logits = getattr(agent, name)(input_ids=batch.ids).logits
            full[name] = logits.log_softmax(-1)[:, :-1]
    kl = (full["student"].exp() * (full["student"] - full["teacher"])).sum(-1)
    added = study.vopd(agent, batch, torch.zeros(batch.ids.shape))
    assert torch.allclose(added[:, 1:], kl * batch.sampled[:, 1:], atol=1e-5)
    assert float(added.max()) > 0.01


class Answers:
    """A tool that answers at once, and is silent at turn 1."""
    is_silent = staticmethod(lambda place: place[-1] == 1)

    def submit(self, call, place):
        silent = self.is_silent(place)
        answer = ("[no answer in time]", "timeout") if silent else ("42", "ok")
        return tools.finished(tools.Observation(*answer, 0.0))


def test_the_sandbox_breaks_down_at_the_stated_rate_and_only_for_a_stretch_of_training():
    def share(purpose, iteration):
        runs = [tool.submit(None, (0, purpose, iteration, i, 0)) for i in range(1000)]
        return sum(run.result().outcome == "sandbox_error" for run in runs) / 1000
    tool = Answers()
    study.break_down(tool, 0.3)
    assert share("rollouts", 3) == 0 == share("rollouts", 10) == share("evaluation", 5)
    assert share("rollouts", 4) == pytest.approx(0.3, abs=0.05) == share("rollouts", 9)


def test_a_fault_that_is_scored_is_a_wrong_answer_and_one_that_is_not_is_left_out():
    problem = tools.Problem("Start with 12. Add 30.", "42")

    def reward(grade):
        turn = sod.Turn([1], tools.render_tool_call("print(12 + 30)"), "sandbox_error")
        r = sod.Rollout(problem, [0], [turn], finish_reason="infrastructure")
        grade(r, None, "")
        r.reward = sod.outcome_reward(r, sod.Config())
        return sod.collate([r], "cpu").reward.item(), r.correct
    assert reward(study.grade_faults) == (pytest.approx(-0.9), False)
    assert math.isnan(reward(sod.grade_rollout)[0])


def test_a_time_out_can_be_told_as_a_success_without_output():
    tool = Answers()
    study.say_nothing(tool)
    answers = [tool.submit(None, (0, purpose, 1, 0, turn)).result() for purpose, turn in
               (("rollouts", 0), ("rollouts", 1), ("evaluation", 1))]
    assert [(a.text, a.outcome) for a in answers] == [("42", "ok"), ("no stdout here", "ok"),
                                                      ("[no answer in time]", "timeout")]


def test_success_along_training_is_that_of_rollouts_which_the_sandbox_did_not_fail():
    batch = scored([[.1] * 3, [.1] * 2, [.1] * 2],
                   [["ok", "error", ""], ["ok", "sandbox_error"], ["ok", ""]])
    batch.rollouts[0].correct = False
    assert study.of_the_student(batch) == {"correct": 0.5, "tool_calls": 1.5}


def test_rows_change_what_they_say_they_change():
    agent = sod.Agent(sod.Config(), None, None, None, Answers())
    study.change(agent, "faults_30")
    assert agent.grade is sod.grade_rollout
    study.change(agent, "scored_30")
    assert agent.grade is study.grade_faults
    study.change(agent, "told_as_success")
    assert agent.tool.submit(None, (0, "rollouts", 1, 0, 1)).result().outcome == "ok"


@pytest.mark.parametrize("row, scheme", [("clip", "uniform"), ("sod_clip", "sod")])
def test_a_control_replaces_the_signal_and_leaves_weights_and_divergence(row, scheme, monkeypatch):
    weigh = sod.WEIGHTS[scheme]
    monkeypatch.setitem(sod.WEIGHTS, scheme, weigh)  # so that it is put back at the end
    agent = sod.Agent(study.config_of(row, 0, ".", study.BUDGET), None, None, None, None)
    batch = scored([[3.0, 6.0]], [["ok", ""]])  # logp_s 3 and 6, logp_t 0
    w, d = weigh(batch, agent.config), batch.d.clone()
    study.change(agent, row)
    assert sod.WEIGHTS[scheme](batch, agent.config).equal(w) and batch.d.equal(d)
    assert batch.logp_t.tolist() == [[0, 2, 5]]
    assert w.tolist() == [[1, pytest.approx(.5)]] if scheme == "sod" else w.tolist() == [[1, 1]]


def test_the_table_of_suspects_shows_the_first_the_lowest_and_the_last_iteration():
    curve = lambda *calls: {"curve": [{"tool_calls": c, "correct": c / 10} for c in calls],
                            "correct": [[1]], "seconds_all": 1}
    (line,) = report.collapse_lines({"lr_tenfold": {0: curve(4, 1, 2), 1: curve(4, 2, 2)}})[5:]
    assert line.startswith("| lr_tenfold | 2 | 4.0, 1.5 (2), 2.0 | 40%, 15% (2), 20% | 100.0")
    assert report.collapse_lines({"sod": runs(50)}) == []  # stored before calls were counted


def test_a_teachers_lead_is_its_own_success_less_that_of_the_start():
    results = {"vanilla": runs(30, 30), "grpo": runs(40, 42), "teacher": runs(70),
               "opd": runs(50, 52), "sod": runs(51, 53), "teacher@practice-0.4": runs(40),
               "opd@practice-0.4": runs(39, 41)}
    less, full = report.lead_lines(results, study.DIALS)[5:7]
    assert less == "| 0.4 | 40.0 (1) | +10.0 | -1.0 (-1.0 to -1.0) worse |  |"
    assert full.startswith("| 1 | 70.0 (1) | +40.0 | +10.0 (")
    curves = report.lead_curves(results, study.DIALS)
    assert [point[0] for point in curves["opd, here"]] == [10, 40] and "sod, here" not in curves


def test_a_move_along_the_signal_changes_all_parameters_alike_and_makes_good_tokens_likelier():
    config = sod.Config(**TINY, lr=1e-12)
    agent = sod.load_agent(config)
    with agent.tool:
        _, batch = next(sod.train(agent))
    before, tokens = [p.detach().clone() for p in agent.student.parameters()], batch.step_id > 0
    study.move_along(agent.student, batch, tokens.float(), config, lr=1e-4)
    for p, old in zip(agent.student.parameters(), before):
        moved = (p.detach() - old).abs()
        assert bool(((moved - 1e-4).abs() < 1e-6).logical_or(moved == 0).all())
    after, _ = sod.score(agent, agent.student, batch)
    assert float((after - batch.logp_s)[tokens].mean()) > 0.01


# --- Runs -------------------------------------------------------------------------------------


def test_every_row_has_settings_and_files_of_other_settings_are_not_mixed(
        tmp_path, capsys, monkeypatch):
    files = {study.file_of(row, 0, tmp_path, budget)
             for row in study.STUDY for budget in (TINY, study.BUDGET)}
    assert len(files) == 2 * len(study.STUDY)
    config = study.config_of("sod@digits-5", 3, tmp_path, study.BUDGET)
    assert config.seed == 3 and config.teacher == str(tmp_path / "worlds" / "digits-5" / "teacher")
    assert study.config_of("opd@persist-0.8", 0, tmp_path, study.BUDGET).silent_persist == 0.8
    teacher = str(tmp_path / "worlds" / "practice-0.4" / "teacher")
    config = study.config_of("teacher@practice-0.4", 0, tmp_path, study.BUDGET)
    assert config.student == teacher and config.method == "vanilla"
    monkeypatch.chdir(tmp_path)
    assert study.main(["--rows", "sodd"]) == 1 and not [*tmp_path.iterdir()]
    assert "the study has no row sodd; choose from vanilla" in capsys.readouterr().err


def test_the_list_tells_stored_seeds_and_the_hours_that_are_missing(tmp_path, capsys, monkeypatch):
    plan = study.planned({"sod": 3, "agree": 2}, 10, tmp_path)
    assert len(plan) == 5 and list(study.listing(plan, 2))[-1].startswith(
        f"5 of 5 runs are missing: about {5 * study.SECONDS / 7200:.1f} hours, 2 at a time, by "
        f"{study.SECONDS} s a run, as those of data/study took")
    for seed, seconds in ((0, 3600), (2, 7200)):
        plan["sod", seed].write_text(json.dumps({"seconds_all": seconds}))
    sod_line, agree_line, last = study.listing(plan, 2)
    assert sod_line.split()[:4] == ["sod", "2", "of", "3"] and sod_line.endswith("s a run: 0 2")
    assert agree_line.split()[:4] == ["agree", "0", "of", "2"]
    assert last.startswith("3 of 5 runs are missing: about 2.2 hours")  # 3 of 5400 s, two at a time
    assert len(list(study.notes_on(plan))) == 1
    plan["sod", 0].write_text(json.dumps({"seconds_all": 1, "scripts": study.SCRIPTS}))
    (note,) = study.notes_on(plan)
    assert "has changed since 1 of the stored runs were made (sod); delete" in note
    plan["sod", 2].unlink()
    assert not list(study.notes_on(plan))
    monkeypatch.chdir(tmp_path)
    assert study.main(["--list", "--rows", "sod_agree", "--seeds", "2"]) == 0
    assert capsys.readouterr().out.startswith("sod_agree") and not list(tmp_path.glob("runs"))
    assert study.main(["--list", "--rows", "sodd"]) == 1


def test_the_help_tells_the_plan_and_how_long_the_whole_study_takes(capsys):
    with pytest.raises(SystemExit) as caught:
        study.main(["--help"])
    told = capsys.readouterr().out
    assert not caught.value.code and study.__doc__.strip() in told
    whole = sum(study.STUDY.values())
    assert (f"{whole} runs of {len(study.STUDY)} rows" in told
            and f"{whole * study.SECONDS / 7200:.0f} hours on two cores" in told)


def test_every_scheme_and_control_is_a_row_alone_and_most_controls_also_with_sods_weights():
    for name in study.CONTROLS:
        alone = study.config_of(name, 0, ".", study.BUDGET)
        assert sod.METHODS[alone.method] == sod.METHODS["opd"]
        if name != "negative":
            both = study.config_of(f"sod_{name}", 0, ".", study.BUDGET)
            assert (both.method, both.weights, both.kl) == ("sod", "sod", "sampled")
    for row, method in (("opd_full", "opd"), ("sod_full", "sod"), ("sod_only_full", "sod_only")):
        config = study.config_of(row, 0, ".", study.BUDGET)
        assert (config.method, config.kl) == (method, "full")


def test_the_exact_kl_has_the_gradient_of_the_sampled_one_with_less_noise():
    found = study.variance(4, budget=dict(TINY, prompts=4, group_size=4))
    assert set(found) == set(study.ESTIMATES) and found["full"][2] == pytest.approx(1)
    assert found["full"][0] < found["sampled"][0] and found["sampled"][2] > 0.5
    lines = report.variance_lines({"sampled": (8.0, 4.0, .5), "full": (2.0, -1.0, 1.0)}, "mine", 9)
    assert lines[0].startswith("Gradient of distillation alone of mine, over 9 batches.")
    assert lines[4:] == ["| sampled | 4.00 | 2.0 | 0.50 |", "| full | 1.00 | not seen | 1.00 |"]


def test_the_noise_of_a_student_is_written_where_no_study_has_been(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    measured = lambda batches, student: {"sampled": (8.0, 4.0, 0.5), "full": (2.0, 1.0, 1.0)}
    monkeypatch.setattr(study, "variance", measured)
    assert study.main(["--variance", "2", "--student", "runs/mine"]) == 0
    text = (tmp_path / "runs" / "study" / "variance-mine.md").read_text()
    assert "of runs/mine, over 2 batches" in text and text in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study.main(["--rows", "sod", "--student", "runs/mine"])
    assert "is the model of --variance" in capsys.readouterr().err


def test_the_noise_is_that_of_the_student_who_is_named(monkeypatch):
    def load(config):
        raise AssertionError(f"loaded {config.student}")
    monkeypatch.setattr(study.sod, "load_agent", load)
    for named, loaded in (({"student": "mine"}, "mine"), ({}, study.WORLD.student)):
        with pytest.raises(AssertionError, match=f"loaded {loaded}"):
            study.variance(2, **named)


def test_imitation_gets_as_many_conversations_and_updates_as_the_others(tmp_path):
    config = study.config_of("sft", 0, tmp_path, dict(TINY, iterations=3, num_minibatches=2))
    agent = sod.load_agent(config)
    with agent.tool:
        result = study.learn(agent)
    assert len(agent.train_set) == 12 and len(result["curve"]) == 6 and result["tokens"] > 100


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
    assert "2 runs, 1 done" in (said := capsys.readouterr().out) and "NOTE" not in said
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".svg", ".csv"}


# --- Figures ----------------------------------------------------------------------------------

EXAMPLE = {"question": "<b>&", "turns": [
    {"text": "x </text><script>", "outcome": "timeout", "tool": "a\n<b>", "d": 1.0, "w": 0.2},
    {"text": "\\boxed{1}", "outcome": "", "tool": None, "d": .1, "w": 1.2}]}
STEPS = [[[30, 9.0, 3.0]], [[0, 0, 0]], [[25, 50.0, 20.0]]]


@pytest.mark.parametrize("run, names", [
    (dict(curve=[{"correct": .1}, {"correct": .3}], steps=[STEPS, STEPS],
          patterns=[[.5, .3, .2]] * 2, example=EXAMPLE),
     {"learning.svg", "drift.svg", "patterns.svg", "dials.svg", "weights.svg",
      "schemes.svg"}),
    (dict(curve=[{"correct": 0.0}], steps=[[[[1, 1, 1]]] * 3], patterns=[[1, 0, 0]], example=None),
     {"learning.svg", "drift.svg", "patterns.svg", "dials.svg", "schemes.svg"})],
    ids=["usual", "nothing right or often seen"])
def test_figures_are_whole_svg_with_title_and_description_and_escape_text(run, names):
    run = run | {"correct": [[1], [0]]}
    figures = report.figures({"sod": {0: run, 1: run}, "grpo": {0: run},
                              "sod@persist-0.8": {0: run}}, study.DIALS)
    assert set(figures) == names
    for text in figures.values():
        root = ElementTree.fromstring(text)
        assert [child.tag.split("}")[1] for child in root[:2]] == ["title", "desc"]
        assert "script" not in {node.tag.split("}")[1] for node in root.iter()}
        assert not re.search(r"\bnan\b|\binf\b", text)


def texts_of(root):
    """(left, right, y, words) of each text of a figure; a letter is .6 of its height wide."""
    for node in root.iter():
        moved = float(re.search(r" (\d+)", node.get("transform", " 0"))[1])
        for text in filter(lambda text: text.text, node.findall("{*}text")):
            size = 15 if text.get("class") == "small" else 16
            x, wide = float(text.get("x")), 0.6 * size * len(text.text)
            left = x - wide * {"end": 1, "middle": 0.5}.get(text.get("text-anchor"), 0)
            yield left, left + wide, float(text.get("y")) + moved, text.text


def readable(svg):
    """No word leaves the sheet or lies on another one; in 344 pixels no letter is below 9."""
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.get("viewBox").split()[2:])
    texts = list(texts_of(root))
    assert 15 * 344 / width > 9
    for left, right, y, words in texts:
        assert left >= 0 and right <= width and 12 <= y <= height - 3, words
        assert not [other for other in texts if other[3] != words and abs(other[2] - y) < 12
                    and other[0] < right and left < other[1]], words
    grids = [node for node in root.iter() if node.get("class") == "grid"]
    ends = [tuple(map(float, re.findall(r"[\d.]+", node.get("d")))) for node in grids]
    panels = len(root.findall("{*}g"))
    tall = max((y for _, y, _ in ends), default=0) - min((y for _, y, _ in ends), default=0)
    assert not panels or panels * tall * ends[0][2] > 0.5 * width * height


def test_no_word_of_a_figure_is_cut_or_covered_and_what_is_drawn_fills_most_of_the_sheet():
    for path in (ROOT / "data" / "study").glob("*.svg"):
        readable(path.read_text(encoding="utf-8"))
    curve = [(k, 5.0, 4.0, 6.0) for k in (1, 2, 3)]
    for names in (["sod"], ["mask_after_error", "told_as_success", "after_failure", "x" * 40]):
        readable(report.line_chart("t", "d", [("Right", "iteration", "%", dict.fromkeys(
            names, curve))]))
    turn = {"text": "print(12345 * 6789 + 12345678)  #922", "outcome": "error", "tool": "E" * 99,
            "d": 12.34, "w": 1.2}
    readable(report.weights_picture({"question": "Add 12. " * 20, "turns": [turn] * 3}))


def test_schemes_stand_in_order_with_an_interval_from_three_seeds_on_and_chance_marked():
    drawn = report.schemes_chart({"opd": [40, 41], "sod": [50, 52, 54], "random_keep": [45] * 3,
                                  "sod_random_keep": [46] * 10, "agree": [44] * 3})
    readable(drawn)
    names = re.findall(r'text-anchor="end">(\w+)<', drawn)
    assert names == ["sod", "sod_random_keep", "random_keep", "agree", "opd"]
    assert ">52.0 (3)<" in drawn and ">40.5 (2)<" in drawn
    ends = [(float(a), float(b)) for a, b in re.findall(r'd="M([\d.]+) \d+H([\d.]+)"', drawn)]
    assert [b - a > 1 for a, b in ends] == [True, False, False, False, False]
    blue, grey, orange = report.COLOURS[0], report.COLOURS[4], report.COLOURS[1]
    assert re.findall(r'<circle .* fill="(.*)"', drawn) == [blue, orange, orange, grey, blue]
    assert drawn.count("stroke-dasharray") == 1
    far = report.schemes_chart({"sod": [50, 52, 54], "opd": [40] * 3, "return_99": [0, 1, 2]})
    readable(far)
    assert far.count("<circle") == 2 and far.count("z\"/>") == 1 and ">1.0 (3)<" in far
    assert re.findall(r'middle">(\d+)<', far)[0] == "40"
    alone = report.figures({"opd": runs(50), "teacher": runs(70), "signal": {},
                            "opd@digits-0": runs(40)}, study.DIALS)
    assert alone["schemes.svg"].count("<circle") == 1


def test_a_line_of_one_point_is_a_dot_and_steps_are_whole_numbers():
    panel = ("d", "step k", "nats", {"a": [(1, 1.0, 1.0, 1.0), (4, 2.0, 2.0, 2.0)],
                                     "b": [(4, 1.0, 1.0, 1.0)]})
    drawn = report.line_chart("t", "d", [panel])
    assert drawn.count("<circle") == 1 and ">2.5<" not in drawn and ">3<" in drawn


def test_axes_enclose_all_values_in_round_numbers():
    assert report.ticks(0, 0.56) == pytest.approx([0, .2, .4, .6])
    assert report.ticks(0, 2.6) == [0, 1, 2, 3] and report.ticks(0, 0) == [0, .2]
    assert report.ticks(-10, 41, 8) == [-10, 0, 10, 20, 30, 40, 50]
    assert doctest.testmod(report) == doctest.TestResults(failed=0, attempted=1)


def test_a_line_shows_only_steps_that_every_seed_has_seen_often():
    few, many = {"steps": [[[[19, 19., 0]]]]}, {"steps": [[[[20, 40., 0]]], [[[20, 80., 0]]]]}
    assert report.drift_line([many, few], 0, 1, 20) == []
    assert report.drift_line([many], 0, 1, 20) == [(1, 3.0, 3.0, 3.0)]
