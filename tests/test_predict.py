"""The answers of data/study/predict.md are measured again, by its own commands."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sod_mini as sod
from conftest import ROOT

PAGE = (ROOT / "data" / "study" / "predict.md").read_text()
COMMANDS = re.findall(r"^python sod_mini\.py (.+)$", PAGE, re.M)


def measured(words, folder):
    """(rows of metrics.jsonl, {name: % of results.json}) of a run with these options."""
    assert sod.main([*shlex.split(words), "--out", str(folder), "--name", "run"]) is None
    run = Path(folder) / "run"
    results = json.loads((run / "results.json").read_text()) if (
        run / "results.json").exists() else {}
    return ([json.loads(line) for line in (run / "metrics.jsonl").open()],
            {name: sod.mean_ci(stored["correct"])[0] for name, stored in results.items()})


def test_the_first_answer():
    code = re.search(r'^python -c "(.+)"$', PAGE, re.M)[1]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "[[1.0000e+00, 5.0500e-04, 2.5250e-04]]" in said and "[[1.0000, 1.0000, 0.5000]]" in said
    assert "`w = 1, .0005, .0003`" in PAGE and "`w = 1, 1, .5`" in PAGE


def test_every_question_has_a_command_and_a_folded_answer():
    assert len(re.findall("^## ", PAGE, re.M)) == PAGE.count("<details>") == 5
    for words in COMMANDS:
        sod.parse_config(shlex.split(words))


@pytest.mark.slow
def test_without_the_cap_w_has_a_mean_of_some_thirty(tmp_path):
    m, _ = measured(COMMANDS[0], tmp_path)
    assert "26 to 33 in place of .9" in PAGE and all(20 < row["w"] < 40 for row in m)


@pytest.mark.slow
def test_a_silent_tool_doubles_d_and_halves_w_and_the_two_still_come_closer(tmp_path):
    m, _ = measured(COMMANDS[1], tmp_path)
    assert m[0]["d"] == pytest.approx(1.3, abs=0.2) and m[0]["w"] == pytest.approx(0.45, abs=0.1)
    assert m[-1]["kl_estimate"] < m[0]["kl_estimate"] - 0.1
    assert all(row["correct"] <= 0.04 for row in m)


@pytest.mark.slow
@pytest.mark.parametrize("n, after", [(2, 65.0), (3, 61.0)])
def test_a_teacher_worse_than_its_student(tmp_path, n, after):
    _, results = measured(COMMANDS[n], tmp_path)
    assert results["student after"] == pytest.approx(after, abs=6) and f"{after}%" in PAGE
    assert results["student after"] > results["teacher"] + 20


@pytest.mark.slow
def test_in_groups_of_two_about_half_agree(tmp_path):
    m, _ = measured(COMMANDS[4], tmp_path)
    assert all(0.3 < row["frac_zero_std_groups"] < 0.7 for row in m) and "38 to 61%" in PAGE
