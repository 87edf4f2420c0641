"""What is known before the weights are read, and what is done about it."""
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sod_mini as sod

WORLD = sod.Config()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_sound_world_passes_and_says_what_was_found(monkeypatch, capsys):
    monkeypatch.setattr(sod, "load_model", None)  # no weights are read
    agent = sod.preflight(WORLD)
    said = capsys.readouterr().out
    assert "same ids on 7 probes, same template, 2,000 rows to learn from, tool answers" in said
    assert "seed 0" in said and "MiB on cpu for weights, AdamW and gradient" in said
    assert "NOTE" not in said and agent.student is None and len(agent.practice) == 2000



STUDENT, TEACHER = 344_928, 771_456  # parameters


@pytest.mark.parametrize("options, device, need", [
    # Bytes a weight: 4 or 2 to compute with; 8 for the moments, 4 for the gradient, 4 for a master
    # where it is another tensor.
    (dict(), "cpu", {"cpu": 16 * STUDENT + 4 * TEACHER}),
    (dict(method="grpo"), "cpu", {"cpu": 16 * STUDENT}),
    (dict(method="vanilla"), "cpu", {"cpu": 4 * STUDENT}),
    (dict(method="opsd_gt"), "cpu", {"cpu": 20 * STUDENT}),
    (dict(dtype="bfloat16"), "cuda", {"cuda": 18 * STUDENT + 2 * TEACHER}),
    (dict(dtype="bfloat16", offload="teacher"), "cuda",
     {"cuda": 18 * STUDENT + 2 * TEACHER, "cpu": 2 * TEACHER}),
    (dict(dtype="bfloat16", offload="all"), "cuda",
     {"cuda": 2 * STUDENT + 2 * TEACHER, "cpu": 16 * STUDENT + 2 * TEACHER}),
])
def test_the_memory_that_a_run_holds_for_certain_by_hand(monkeypatch, options, device, need):
    config = replace(WORLD, **options)
    teacher = {"teacher": WORLD.teacher, "answer": WORLD.student}.get(
        sod.METHODS[config.method].view)
    arguments = (config, sod.skeleton(WORLD.student), teacher and sod.skeleton(teacher),
                 torch.device(device), getattr(torch, config.dtype, torch.float32))
    monkeypatch.setattr(sod, "free_memory", lambda place: need[str(place)])
    monkeypatch.setattr(sod, "in_bytes", str)
    said = sod.check_memory(*arguments)
    assert {place: int(n) for n, place in re.findall(r"(\d+) on (\w+)", said)} == need
    for short in need:  # a byte less, anywhere
        monkeypatch.setattr(sod, "free_memory", lambda p: need[str(p)] - (str(p) == short))
        with pytest.raises(ValueError, match=f"are free on {short}; choose smaller models"):
            sod.check_memory(*arguments)


def test_what_does_not_fit_is_refused_unless_told_otherwise(monkeypatch):
    """In fp32: weight, two moments and gradient of the student, weight of the teacher."""
    assert round((16 * 344_928 + 4 * 771_456) / 2 ** 20, 1) == 8.2
    monkeypatch.setattr(sod, "free_memory", lambda device: 5 * 2 ** 20)
    with pytest.raises(ValueError, match="take 8.2 MiB, and 5.0 MiB are free on cpu; choose"):
        sod.preflight(WORLD)
    assert sod.preflight(replace(WORLD, preflight=False)).practice


@pytest.mark.parametrize("text, outcome", [("", "timeout"), ("3", "ok"), ("[failed]", "error")])
def test_a_tool_that_cannot_add_is_refused(monkeypatch, text, outcome):
    seen = sod.tools.Observation(text, outcome, 0.1)
    monkeypatch.setattr(sod.tools.PythonTool, "run", lambda self, codes: [seen] * len(codes))
    with pytest.raises(ValueError, match=f"answers '.*' .{outcome}. to .*, not 2") as stop:
        sod.load_tool(WORLD)
    assert "unsafe" not in str(stop.value)


def test_dropping_the_sandbox_is_not_advised_for_another_reason_than_missing_locks():
    with pytest.raises(ValueError) as stop:
        sod.load_tool(replace(WORLD, tool_timeout=0.001))
    assert "0.001 s (timeout): raise" in str(stop.value)
    assert "unsafe" not in str(stop.value)


def test_a_model_no_better_than_chance_is_refused_unless_it_is_to_start_from_nothing(tmp_path,
                                                                                     capsys):
    sod.load_tokenizer(WORLD.student).save_pretrained(tmp_path)
    fresh = sod.load_model(WORLD.student, "cpu", torch.float32, "random")
    fresh.generation_config = fresh.shipped_generation
    fresh.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chance is -6.24: its weights are random, damaged or"):
        sod.load_agent(replace(WORLD, student=str(tmp_path)))
    sod.load_agent(replace(WORLD, student=str(tmp_path), preflight=False))
    capsys.readouterr()
    sod.load_agent(replace(WORLD, init="random"))
    assert f"teacher {WORLD.teacher}, 771,456 parameters; -0.00 nats" in capsys.readouterr().out


def test_another_template_of_the_teacher_is_a_note(tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(WORLD.teacher).save_pretrained(tmp_path)
    tokenizer = sod.load_tokenizer(WORLD.teacher)
    tokenizer.chat_template = tokenizer.chat_template.replace("Tools:", "Start with:")
    tokenizer.save_pretrained(tmp_path)
    sod.preflight(replace(WORLD, teacher=str(tmp_path)))
    assert "NOTE: their templates differ from token" in capsys.readouterr().out


def test_held_out_problems_are_read_before_the_weights(monkeypatch, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{")
    monkeypatch.setattr(sod, "load_model", None)
    status = sod.main(["--preset", "world", "--eval_data", str(tmp_path / "bad.jsonl"),
                       "--out", str(tmp_path / "out")])
    assert status == 1 and "bad.jsonl, line 1: found broken JSON" in capsys.readouterr().err
