"""The judge of the exercises knows right from wrong, and which mistake it was."""
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import conftest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "exercises"))
import exercises
import judge


@pytest.mark.parametrize("name", judge.ANSWERS)
def test_the_judge_accepts_the_answer_and_names_each_usual_mistake(name):
    assert judge.judge(name, judge.ANSWERS[name]) == ""
    assert judge.judge(name, getattr(exercises, name)) == "not written yet"
    for sentence, wrong in judge.MISTAKES[name].items():
        assert judge.judge(name, wrong) == sentence
    said = judge.judge(name, lambda *given: None)  # a mistake that is not usual
    assert said.startswith("for ") and "it gives" in said and "and not" in said


def test_the_worked_examples_of_the_exercises_are_right():
    texts = {name: getattr(exercises, name).__doc__ for name in judge.ANSWERS}
    numbers = lambda values: [round(float(x), 3) for x in values]
    first = lambda name: judge.result(judge.ANSWERS[name], judge.cases()[name][0])
    assert "1.155 -.577 -.577\n    | 0 0 0" in texts["group_advantages"]
    assert numbers(first("group_advantages")[0]) == [1.155, -0.577, -0.577, 0, 0, 0]
    assert "w = 1 .5 1.2" in texts["step_weights"]
    assert numbers(first("step_weights")[0][0]) == [1, 0.5, 1.2]
    assert "gaps 5 1 -3 9 2" in texts["step_divergence"] and "d = 2 2" in texts["step_divergence"]
    assert numbers(first("step_divergence")[0][0]) == [2, 2.5]
    assert "A_it = 0 0 .5" in texts["token_advantages"]
    assert numbers(first("token_advantages")[0][0]) == [0, 0, 0.5]
    assert ".511" in texts["reverse_kl"] and numbers(first("reverse_kl")[0])[0] == 0.511
    assert "ids 7 8 1 2 9 9 3, step_id 0 0 1 1 0 0 2" in texts["put_together"]
    assert first("put_together") == ([7, 8, 1, 2, 9, 9, 3], [0, 0, 1, 1, 0, 0, 2])


def test_the_exercises_are_judged_where_they_are_named_and_are_no_part_of_the_suite():
    asked = lambda *args: conftest.pytest_ignore_collect(ROOT / "tests" / "exercises",
                                                         SimpleNamespace(args=args))
    assert asked("tests") and asked(str(ROOT)) and not asked("tests/exercises")
    judged = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/exercises"], cwd=ROOT,
                            capture_output=True, text=True)
    assert len(re.findall("not written yet", judged.stdout)) >= 8 and "8 failed" in judged.stdout
