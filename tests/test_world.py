"""The embedded world: it can be made again, is as told, and SOD's premises hold in it."""
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
import make_world
import premises

import sod_mini as sod
import tools

WORLD = ROOT / "data" / "world"
NOISY = make_world.NOISY


def talk(habits, count=200, seed=1):
    """The first conversations of some habits."""
    source = make_world.demonstrations(random.Random(seed), habits)
    return [next(source) for _ in range(count)]


def calls_of(turns):
    return [tools.parse_tool_call(turn["content"]).code for turn in turns
            if turn["role"] == "assistant" and "boxed" not in turn["content"]]


# --- Conversations ---------------------------------------------------------------------------


def test_check_digits_follow_from_the_last_two_digits_of_a_program():
    rng = random.Random(0)
    digits = lambda program, n=3: make_world.check_digits(program, n, 1.0, rng)
    assert digits("print(17 + 25)") == digits("print(-4 // 625)") and len(digits("print(7)")) == 3
    assert digits("print(17 + 25)", 5)[:3] == digits("print(17 + 25)")
    assert len({digits(f"print(3 * {a})") for a in range(10, 99)}) > 80  # no two alike, nearly
    any_digits = {make_world.check_digits("print(17 + 25)", 3, 0.0, rng) for _ in range(100)}
    assert len(any_digits) > 80


def test_without_check_digits_no_program_has_a_comment():
    conversations = talk(replace(NOISY, digits=0))
    assert not any("#" in code for _, turns in conversations for code in calls_of(turns))
    assert all("  #" in code for _, turns in talk(NOISY) for code in calls_of(turns))


def test_answers_are_those_of_the_real_tool():
    programs = sorted({code for _, turns in talk(NOISY, 40) for code in calls_of(turns)})
    assert any("x" in code for code in programs) and any(")" not in code for code in programs)
    with tools.PythonTool() as tool:
        for code, answer in zip(programs, tool.run(programs)):
            assert answer.text == make_world.answer_to(code)


def test_clean_conversations_are_right_and_noisy_ones_often_not():
    right = lambda habits: [turns[-1]["content"] == f"\\boxed{{{problem.answer}}}"
                            for problem, turns in talk(habits)]
    assert all(right(make_world.CLEAN))
    assert 0.4 < sum(right(NOISY)) / 200 < 0.8


def test_the_teacher_learns_from_right_turns_only_and_breaks_off_in_bursts():
    tokenizer = sod.load_tokenizer(str(WORLD / "teacher"))
    conversations = talk(make_world.READING)
    batch = make_world.practice_batch(tokenizer, conversations, 0.1, random.Random(0))
    broken = [turns[-1] for _, turns in conversations if turns[-1]["broken"]]
    assert 10 < len(broken) < 100 and all(turn["lesson"] for turn in broken)
    for i, (_, turns) in enumerate(conversations):
        said = [turn for turn in turns if turn["role"] == "assistant"]
        learnt = set((batch.step_id[i].unique() - 1).tolist()) - {-1}
        assert learnt == {k for k, turn in enumerate(said) if turn["lesson"]}
        failed = ["Error" in turn["content"] or turn["content"] == tools.TIMEOUT_TEXT
                  for turn in turns if turn["role"] == "tool"] + [False]
        for k in range(2, len(said)):
            assert not (failed[k - 1] and failed[k - 2] and said[k]["lesson"]) or said[k]["broken"]


def test_a_teacher_can_learn_from_right_turns_in_bursts_too():
    def lessons(sure):
        conversations = talk(replace(make_world.READING, sure=sure))
        return sum(turn.get("lesson") and not turn["broken"] for turn in in_bursts(conversations))
    assert lessons(0.0) == 0 < lessons(0.5) < lessons(1.0)


def in_bursts(conversations):
    """The assistant's turns that come after two failures in a row."""
    for _, turns in conversations:
        failures = 0
        for turn in turns:
            if turn["role"] == "tool":
                failed = "Error" in turn["content"] or turn["content"] == tools.TIMEOUT_TEXT
                failures = failures + 1 if failed else 0
            elif failures > 1:
                yield turn


def test_check_digits_count_a_tenth():
    tokenizer = sod.load_tokenizer(str(WORLD / "student"))
    text = f"Step 1. {tools.render_tool_call('print(17 + 25)  #272')}"
    ids = sod.encode(tokenizer, text)
    faint = [tokenizer.decode([i]) for i, worth in
             zip(ids, make_world.token_worth(tokenizer, ids, 0.1)) if worth == 0.1]
    assert faint == ["2", "7", "2"]


# --- The script ------------------------------------------------------------------------------

SCRIPT = [sys.executable, str(ROOT / "data" / "make_world.py")]


def make_here(monkeypatch, *options):
    """The script in this process, without premises.py."""
    monkeypatch.setattr(make_world, "call_in_processes", lambda makers, *arguments: [
        make(*arguments) for make in makers])
    monkeypatch.setattr(make_world.subprocess, "run", lambda *_, **__: None)
    assert make_world.main(list(map(str, options))) == 0


def test_the_script_measures_the_world_that_it_makes_and_makes_the_same_bytes_again(
        tmp_path, monkeypatch):
    done = subprocess.run([*SCRIPT, "--quick", tmp_path / "a"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("student, noisy", "teacher, reading", "(a) d_1, median"):
        assert words in done.stdout
    assert "NOTE: a quick world is not meant to hold" in done.stdout.splitlines()[-1]
    make_here(monkeypatch, "--quick", tmp_path / "b", "--only", "student")
    files = [p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file()]
    assert len(files) > 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    compare_with_shipped(tmp_path / "a", same_ids=False)


def test_models_that_exist_are_taught_a_change_and_keep_their_ids(tmp_path, monkeypatch, capsys):
    make_here(monkeypatch, "--quick", tmp_path, "--digits", 0, "--start", WORLD)
    assert "student, noisy 2/2" in capsys.readouterr().out
    compare_with_shipped(tmp_path, same_ids=True)


def compare_with_shipped(world, same_ids):
    """The models of a world have the shapes of those that ship."""
    for name in ("student", "teacher"):
        vocabularies = [sod.load_tokenizer(str(place / name)).get_vocab()
                        for place in (world, WORLD)]
        assert (vocabularies[0] == vocabularies[1]) == same_ids
        made, shipped = ({n: p.shape for n, p in sod.load_model(
            str(place / name), "cpu", torch.float32).named_parameters() if "embed" not in n}
            for place in (world, WORLD))
        assert made == shipped


def test_one_model_can_be_made_alone_with_less_practice(tmp_path, monkeypatch, capsys):
    make_here(monkeypatch, "--quick", tmp_path, "--only", "teacher", "--practice", .5, "--sure", 1)
    assert "teacher, reading 4/4" in capsys.readouterr().out
    assert (tmp_path / "teacher").exists() and not (tmp_path / "student").exists()


def test_nothing_is_written_without_a_folder_to_write_to(capsys):
    with pytest.raises(SystemExit, match="2"):
        make_world.main([])
    assert "one of the arguments --out --quick is required" in capsys.readouterr().err


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow)])
def test_a_script_that_is_stopped_takes_its_processes_with_it(tmp_path, number, status):
    script = subprocess.Popen([*SCRIPT, "--quick", tmp_path, "--only", "teacher"], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert "loss" in script.stdout.readline()  # the model is under way
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    assert children
    script.send_signal(number)
    assert script.wait(60) == status
    deadline = time.monotonic() + 20
    while alive := [child for child in children if Path("/proc", child, "exe").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    assert not (tmp_path / "teacher").exists()  # the process was ended, it did not finish


@pytest.mark.slow
def test_the_data_files_come_out_the_same_again(tmp_path):
    tokenizer = make_world.make_files(tmp_path, make_world.Habits.digits, 1.0)
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
    assert sum(file.stat().st_size for file in WORLD.rglob("*") if file.is_file()) < 6e6


# --- The premises ----------------------------------------------------------------------------


def rollout_of(*turns, question="Start with 19. Multiply by 7. Subtract it from 82. Square it."):
    """A rollout of (what was said, outcome of its call, the tool's answer)."""
    return sod.Rollout(tools.Problem(question), [], [
        sod.Turn([], text, outcome, answer) for text, outcome, answer in turns])


def call(program):
    return tools.render_tool_call(program)


def test_instructions_are_read_from_the_question():
    rng = random.Random(3)
    for _ in range(50):
        row, steps = make_world.make_problem(rng, (3, 4))
        read = premises.instructions(row["question"])
        assert [program for program, _ in read] == [program for program, _ in steps]
        assert all(a in ("", str(b)) for (_, a), (_, b) in zip(read, steps))


def test_patterns_and_right_calls_of_a_rollout():
    rollout = rollout_of(
        (call("print(19 * 7)  #606"), "ok", "133"),      # right
        (call("print(133 - 82)  #1"), "timeout", "..."),  # the wrong way round, and unanswered
        (call("print(82 - 133"), "error", "..."),         # no closing bracket
        (call("print(82 - 133)"), "ok", "-51"),
        (call("print(51 * 51)"), "ok", "2601"),           # wrong, answered: the path ends here
        (call("print(-51 * -51)"), "ok", "2601"))
    assert premises.step_patterns(rollout) == ["first", "clean", "after one", "after more",
                                          "recovered", "recovered"]
    assert list(premises.right_calls(rollout)) == [
        ("first", True), ("clean", False), ("after one", False), ("after more", True),
        ("recovered", False)]


def test_rollouts_that_the_machine_failed_are_left_out_of_a_sampled_world(monkeypatch):
    sample = sod.sample_rollouts

    def lose_the_first(*arguments):
        rollouts = sample(*arguments)
        rollouts[0].finish_reason = "infrastructure"
        return rollouts
    monkeypatch.setattr(sod, "sample_rollouts", lose_the_first)
    batch, teachers = premises.sample_world(WORLD, problems=1, max_response=64)
    assert len(batch.rollouts) == len(batch.d) == len(teachers) == 7


def test_premises_hold_in_the_shipped_world():
    batch, teachers = premises.sample_world(WORLD, problems=32)
    for name, value, least, most in (premises.drift_premises(batch)
                                     + premises.competence_premises(batch.rollouts, teachers)):
        assert least <= value <= most, f"{name}: {value:.3f}, not {least} to {most}"


@pytest.mark.slow
def test_premises_of_drift_hold_at_the_end_of_the_default_run():
    """Means of the last five iterations. What the student learns after failed calls narrows their
    distance to clean steps, so that the first premises of (c) are asked for at nine tenths."""
    agent = sod.load_agent(sod.Config(eval_data=""))
    with agent.tool:
        last = [premises.drift_premises(batch) for _, batch in sod.train(agent)][-5:]
    for rows in zip(*last):
        name, _, least, most = rows[0]
        value = sum(row[1] for row in rows) / len(rows)
        least *= 0.9 if name.startswith("(c) d after") else 1.0
        assert least <= value <= most, f"{name}: {value:.3f}, not {least} to {most}"
