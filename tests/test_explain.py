"""data/explain.py shows the numbers of train_step, each beside the function that made it."""
import re
import sys

import pytest
import torch

import sod_mini as sod
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import explain


def test_the_walk_shows_the_numbers_of_an_iteration_and_the_lines_of_its_functions(capsys):
    explain.main(["--max_response", "200"])
    said = capsys.readouterr().out
    source = (ROOT / "sod_mini.py").read_text().splitlines()
    places = set(re.findall(r"\[(?:\w+\.)?(\w+), sod_mini.py:(\d+)\]", said))
    assert len(places) >= 11
    for name, line in places:  # a decorator stands above its function
        assert any(f"def {name}(" in text for text in source[int(line) - 1:int(line) + 1])
    config, _ = sod.parse_config(explain.ASKED + ["--max_response", "200"])
    agent = sod.load_agent(config)
    agent.optimizer = sod.make_optimizer(agent)
    m, batch = sod.train_step(agent, 1)
    assert f"loss {m['loss']:+.4f} nats" in said and f"gradient {m['grad_norm']:.2f}" in said
    assert explain.numbers(batch.reward) in said and explain.numbers(batch.A) in said
    assert len(batch.reward.unique()) > 1 and batch.failed.any()  # there is something to see
    for i, r in enumerate(batch.rollouts):
        assert explain.numbers(batch.w[i, :len(r.turns)], "{:5.2f}") in said
    shown = [float(x) for x in re.findall(r"= ([+-]\d+\.\d\d)\n", said)]
    assert len(shown) == 2 and all(
        (batch.advantages - x).abs().min() < 0.006 for x in torch.tensor(shown))
    # What is worth more has become likelier.
    up, down = map(float, re.findall(r"(?:above|below) 0: ([+-][.\d]+) nats", said))
    assert up > 0 > down


def test_a_walk_without_a_teacher_and_one_without_rollouts(capsys):
    explain.main(["--method", "grpo", "--max_response", "100"])
    said = capsys.readouterr().out
    assert "Drift" not in said and "teacher" not in said and "7. The update" in said
    with pytest.raises(sod.UserError, match="method sft samples no rollouts to explain"):
        explain.main(["--method", "sft"])
