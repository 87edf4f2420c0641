"""The embedded world: it can be made again, and its parts are as README tells."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
import make_world

import sod_mini as sod

WORLD = ROOT / "data" / "world"


def test_the_whole_script_runs_with_little_of_everything(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "data" / "make_world.py", "--quick", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for course in ("student, clean", "student, noisy", "teacher, single time-outs"):
        assert course in done.stdout  # two optimisers, one after the other, on one model
    for name in ("student", "teacher"):
        model = sod.load_model(str(tmp_path / name), "cpu", torch.float32)
        shipped = sod.load_model(str(WORLD / name), "cpu", torch.float32)
        assert {n: p.shape for n, p in model.named_parameters() if "embed" not in n} == {
            n: p.shape for n, p in shipped.named_parameters() if "embed" not in n}


@pytest.mark.slow
def test_the_data_files_come_out_the_same_again(tmp_path):
    tokenizer = make_world.make_files(tmp_path, 1.0)
    tokenizer.save_pretrained(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl", "demonstrations.jsonl"):
        assert (tmp_path / name).read_bytes() == (WORLD / name).read_bytes(), name
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (WORLD / "student" / name).read_bytes(), name


def test_sizes_of_the_embedded_world_are_as_told():
    for name, rows in (("train", 2000), ("heldout", 400), ("demonstrations", 3000)):
        assert len((WORLD / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) == rows
    for name, parameters in (("student", 344_928), ("teacher", 771_456)):
        model = sod.load_model(str(WORLD / name), "cpu", torch.float32)
        assert sum(p.numel() for p in model.parameters()) == parameters
