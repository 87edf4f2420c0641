"""What is known before the weights are read, and what is done about it."""
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import memory_table
import sod_mini as sod

GIB = 2 ** 30


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shapes():
    return {name: memory_table.shape(name) for name in memory_table.QWEN3}


def gpu(**changes):
    return sod.Config(**{**sod.PRESETS["gpu"], **changes})


def test_a_sound_world_passes_and_says_what_was_found(monkeypatch):
    monkeypatch.setattr(sod, "load_model", None)  # no weights are read
    agent = sod.preflight(sod.Config())
    first, last = agent.notes[0], agent.notes[-1]
    assert "same ids on 7 probes, same template, 2,000 rows to learn from, tool answers" in first
    assert "rollout_batch 256, micro_batch_tokens 2048" in last and agent.student is None


def test_weights_of_qwen3_are_counted_exactly(shapes):
    assert [shapes[n].weights for n in ("0.6B", "1.7B", "4B")] == [
        596_049_920, 1_720_574_976, 4_022_468_096]


def test_cache_and_checkpoints_by_hand(shapes):
    """0.6B in bf16: 2 * 28 layers * 8 heads * 128 * 2 bytes = 112 KiB of cache a token."""
    c = gpu(rollout_batch=1, micro_batch_tokens=10_000)
    plan = sod.memory_plan(replace(c, rollout_engine="generate"), shapes["0.6B"], None, 2)
    assert plan["KV cache"][0] == 112 * 1024 * 5120 * 29 // 28  # one layer's is being copied
    assert plan["student"][0] == 2 * 596_049_920 and plan["AdamW"][0] == 10 * 596_049_920
    saved = 10_000 * (28 * 1024 * 2 + 10 * 1024)  # the input of each layer, and the last norm
    assert plan["activations"][3] == saved


def test_the_teacher_is_there_only_while_it_scores_if_it_is_sent_away(shapes):
    s, t = shapes["0.6B"], shapes["4B"]
    c = gpu(rollout_batch=1, micro_batch_tokens=8192)
    home, away = (sod.memory_plan(replace(c, offload=o), s, t, 2) for o in ("none", "teacher"))
    assert home["teacher"] == [2 * t.weights] * 5
    assert away["teacher"] == [0, 2 * t.weights, 2 * t.weights, 0, 0]
    assert sod.memory_plan(replace(c, offload="all"), s, t, 2)["AdamW"] == [0] * 5


def test_sizes_left_open_are_the_largest_that_fit_and_others_stay(shapes):
    s, t, room = shapes["0.6B"], shapes["4B"], 36 * GIB
    c = sod.sized(gpu(), s, t, 2, room)
    assert sod.peak(sod.memory_plan(c, s, t, 2)) <= room
    twice = replace(c, rollout_batch=2 * c.rollout_batch)
    assert sod.peak(sod.memory_plan(twice, s, t, 2)) > room
    fixed = sod.sized(gpu(rollout_batch=3, micro_batch_tokens=5000), s, t, 2, room)
    assert (fixed.rollout_batch, fixed.micro_batch_tokens) == (3, 5000)
    assert sod.sized(sod.Config(), s, t, 2, 1) == sod.Config()  # the world's are never touched


def test_more_memory_never_means_smaller_sizes(shapes):
    found = [sod.sized(gpu(), shapes["1.7B"], None, 2, n * GIB) for n in (8, 30, 45, 70, 140)]
    sizes = [(c.rollout_batch, c.micro_batch_tokens) for c in found]
    assert sizes == sorted(sizes) and sizes[0] == (1, 1) and sizes[-1][0] == 64


@pytest.mark.parametrize("name, value, sentence", [
    ("free_memory", lambda device: 10_000_000, r"the run needs 0.\d GiB of 0.0 GiB .*Lower"),
    ("shutil", SimpleNamespace(disk_usage=lambda place: SimpleNamespace(free=1000)),
     r"0.0 GiB are free in .* and the checkpoints need 0.0; make room"),
])
def test_what_does_not_fit_is_refused_unless_told_otherwise(monkeypatch, name, value, sentence):
    monkeypatch.setattr(sod, name, value)
    with pytest.raises(ValueError, match=sentence):
        sod.preflight(sod.Config())
    assert sod.preflight(sod.Config(preflight=False)).notes


@pytest.mark.parametrize("text, outcome", [("", "timeout"), ("3", "ok"), ("[failed]", "error")])
def test_a_tool_that_cannot_add_is_refused(monkeypatch, text, outcome):
    seen = sod.tools.Observation(text, outcome, 0.1)
    monkeypatch.setattr(sod.tools.PythonTool, "run", lambda self, codes: [seen] * len(codes))
    with pytest.raises(ValueError, match=f"answers '.*' .{outcome}. to .*, not 2; see"):
        sod.preflight(sod.Config())


def test_a_model_no_better_than_chance_is_refused_unless_it_is_to_start_from_nothing(tmp_path):
    c = sod.Config()
    sod.load_tokenizer(c.student).save_pretrained(tmp_path)
    fresh = sod.load_model(c.student, "cpu", torch.float32, "random")
    fresh.generation_config = fresh.shipped_generation
    fresh.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chance is -6.24: its weights are random, damaged or"):
        sod.load_agent(replace(c, student=str(tmp_path)))
    sod.load_agent(replace(c, student=str(tmp_path), preflight=False))
    agent = sod.load_agent(replace(c, init="random"))
    assert any(str(c.teacher) in note for note in agent.notes)  # the teacher is held to it still


def test_another_template_of_the_teacher_is_a_note(tmp_path):
    c = sod.Config()
    AutoModelForCausalLM.from_pretrained(c.teacher).save_pretrained(tmp_path)
    tokenizer = sod.load_tokenizer(c.teacher)
    tokenizer.chat_template = tokenizer.chat_template.replace("Tools:", "Start with:")
    tokenizer.save_pretrained(tmp_path)
    notes = sod.preflight(replace(c, teacher=str(tmp_path))).notes
    assert "NOTE: their templates differ from token" in notes[0]


def test_held_out_problems_are_read_before_the_weights(monkeypatch, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{")
    monkeypatch.setattr(sod, "load_model", None)
    status = sod.main(["--preset", "world", "--eval_data", str(tmp_path / "bad.jsonl"),
                       "--out", str(tmp_path / "out")])
    assert status == 1 and "bad.jsonl, line 1: found broken JSON" in capsys.readouterr().err
