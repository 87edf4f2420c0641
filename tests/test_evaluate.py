"""Benchmark files, files of samples, interruption, rescoring, reports and the command line."""
import base64
import collections
import csv
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
import sod_mini as sod
import tools
from evaluate import BENCHMARKS, PAPER, Config, Evaluation, load_benchmark

SHARED = ROOT.parent / "shared"
STUDENT = str(ROOT / "data" / "world" / "student")


def write(folder, *rows, name="set.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows))
    return path


def load(path, **options):
    return load_benchmark(str(path), Config(**options))


# --- GPQA -------------------------------------------------------------------------------------

def gpqa(folder, count, name="gpqa.csv", **changed):
    path = folder / name
    names = ["Record ID", "Question", "Correct Answer",
             *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        for n in range(count):
            cells = [f"rec{n}", f"Which,\nof {n}?", f"right {n}", "x", "y", "z"]
            table.writerow(dict(zip(names, cells), **changed))
    return path


def test_gpqa_options_stand_in_a_fixed_order_that_differs_between_questions(tmp_path):
    random.seed(5)
    before = random.getstate()
    loaded = load(gpqa(tmp_path, 200))
    assert random.getstate() == before
    assert loaded == load(gpqa(tmp_path, 200))
    for n, problem in enumerate(loaded):
        assert f"\n{problem.answer}) right {n}\n" in problem.question
        assert (problem.kind, problem.id) == ("choice", f"rec{n}")
    counts = collections.Counter(problem.answer for problem in loaded)
    assert sorted(counts) == list("ABCD") and min(counts.values()) > 30  # 50 expected, sd 6


def test_gpqa_is_graded_as_a_letter_and_votes_as_one(tmp_path):
    (problem,) = load(gpqa(tmp_path, 1))
    right, wrong = problem.answer, "ABCD".replace(problem.answer, "")[0]
    assert tools.grade(problem, f"\\boxed{{({right}) right 0}}", None).right
    assert not tools.grade(problem, f"\\boxed{{{wrong}}}", None).right
    assert tools.voted_answer(problem, f"\\boxed{{({right})}}") == right
    assert tools.voted_answer(problem, "no idea") is None


def test_broken_csv_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing in incorrect answer 2"):
        load(gpqa(tmp_path, 1, **{"Incorrect Answer 2": ""}))
    with pytest.raises(ValueError, match="line 3: found broken CSV .*2 cells"):
        load(write(tmp_path, "question,answer\na,1\nb", name="cells.csv"))


# --- LiveCodeBench ----------------------------------------------------------------------------

def packed(content):
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
MORE = [{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]
CALLS = [{"input": "[1]\n2", "output": "[1, 2]", "testtype": "functional"}]


def contest(public=CASES, private="[]", name="", **changed):
    return {"question_title": "T", "question_content": "Add.", "question_id": "abc_1",
            "contest_date": "2025-03-01T00:00:00", "starter_code": "", "difficulty": "medium",
            "public_test_cases": json.dumps(public), "private_test_cases": private,
            "metadata": json.dumps({"func_name": name} if name else {}), **changed}


@pytest.mark.parametrize("private", [
    json.dumps(MORE), packed(json.dumps(MORE))], ids=["json", "pickle"])
def test_livecodebench_tests_are_public_and_private(tmp_path, private):
    (problem,) = load(write(tmp_path, contest(private=private)))
    assert [test["output"] for test in problem.tests] == ["3\n", "11\n"]
    assert (problem.kind, problem.id, problem.difficulty) == ("program", "abc_1", 2)
    assert "standard input" in problem.question


def test_livecodebench_functional_tests_know_their_function(tmp_path):
    row = contest(CALLS, name="pair", starter_code="class Solution:\n    def pair(self, xs, y):\n")
    (problem,) = load(write(tmp_path, row))
    assert problem.tests[0]["type"] == "functional" and problem.tests[0]["fn_name"] == "pair"
    assert "def pair(self, xs, y):\n```" in problem.question
    with pytest.raises(ValueError, match="line 1: .*func_name"):
        load(write(tmp_path, contest(CALLS)))


@pytest.mark.parametrize("dates, kept", [
    ("", 3), ("2025-02:2025-05", 2), ("2025-03-01:2025-03-01", 1), ("2025:2025", 3)])
def test_the_window_of_contest_dates_includes_both_ends(tmp_path, dates, kept, capsys):
    path = write(tmp_path, *(contest(contest_date=f"{date}T00:00:00", question_id=date)
                             for date in ("2025-01-31", "2025-03-01", "2025-05-31")))
    assert len(load(path, dates=dates)) == kept
    assert (f"{kept} of 3 problems" in capsys.readouterr().err) == (kept < 3)
    with pytest.raises(ValueError, match="no problem dated 2026:2027"):
        load(path, dates="2026:2027")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    evil = packed(Evil(str(tmp_path / "owned")))
    with pytest.raises(ValueError, match="line 1: found test cases.*asks for posix.mkdir"):
        load(write(tmp_path, contest(private=evil)))
    assert not (tmp_path / "owned").exists()
    pickle.loads(zlib.decompress(base64.b64decode(evil)))  # an ordinary unpickler is owned by it
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("private", [
    packed({1, 2}), packed(7), packed(CASES), "7", packed("7"), "[" * 100_000,
    packed(collections.OrderedDict()), packed("no json"), "AAAA", "%%%",
    packed(json.dumps(CASES))[:-8], packed([1]), "[", packed(b"bytes"), packed([[]]),
    base64.b64encode(zlib.compress(b"\x80\x04garbage")).decode(), packed(json.dumps([{"a": 1}])),
])
def test_broken_test_cases_are_one_sentence(tmp_path, private):
    with pytest.raises(ValueError, match="set.jsonl, line 1: ") as caught:
        load(write(tmp_path, contest(private=private)))
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_TESTS", 1000)
    with pytest.raises(ValueError, match="larger than a gigabyte"):
        load(write(tmp_path, contest(private=packed("x" * 100_000))))


ADD = "print(sum(map(int, input().split())))"
PAIR = "class Solution:\n    def pair(self, xs: List[int], y):\n        return xs + [y]"
PROGRAMS = [  # question, program, verdict, reason
    ("stdin", ADD, True, "right"),
    ("stdin", "a, b = map(int, input().split())\nprint(3 if a == 1 else 0)", False,
     "failed tests: wrong answer"),  # right on the public test only
    ("stdin", "while True: pass", False, "failed tests: timeout"),
    ("stdin", "raise ValueError", False, "failed tests: error"),
    ("call", PAIR, True, "right"),
    ("call", "class Solution:\n    def pair(self, xs, y):\n        return y", False,
     "failed tests: wrong answer"),
    ("call", "exit()", False, "failed tests: no value"),
    ("call", None, False, "no program"),
]


@pytest.fixture(scope="module")
def contest_file(tmp_path_factory):
    rows = (contest(private=packed(json.dumps(MORE)), question_id="stdin"),
            contest(CALLS, json.dumps(CALLS), name="pair", question_id="call"))
    return write(tmp_path_factory.mktemp("lcb"), *rows, name="contest.jsonl")


def test_programs_are_run_in_the_sandbox_against_every_test(contest_file):
    problems = {problem.id: problem for problem in load(contest_file)}
    with tools.PythonTool(timeout=1, unsafe=True) as tool:
        for question, program, right, reason in PROGRAMS:
            turn = "So:" if program is None else f"So:\n```python\n{program}\n```"
            seen = tools.grade(problems[question], turn, tool)
            assert (seen.right, seen.reason) == (right, reason), program
    assert tools.voted_answer(problems["stdin"], f"```python\n{ADD}\n```") is None


# --- Named benchmarks and the shared files ------------------------------------------------------

def test_a_benchmark_is_found_by_name_and_its_count_checked(tmp_path):
    with pytest.raises(ValueError, match="--download gpqa_diamond"):
        load_benchmark("gpqa_diamond", Config(benchmarks=str(tmp_path)))
    with pytest.raises(ValueError, match="neither a file nor a benchmark; .*aime2024"):
        load_benchmark("aime", Config(benchmarks=str(tmp_path)))
    gpqa(tmp_path, 197, "gpqa_diamond.csv")
    with pytest.raises(ValueError, match="gpqa_diamond.csv: found 197 of 198 problems"):
        load_benchmark("gpqa_diamond", Config(benchmarks=str(tmp_path)))
    gpqa(tmp_path, 198, "gpqa_diamond.csv")
    assert len(load_benchmark("gpqa_diamond", Config(benchmarks=str(tmp_path)))) == 198


def test_livecodebench_v6_has_its_window_and_says_how_many_are_in_it(tmp_path, capsys):
    rows = [contest(question_id=f"q{n}", contest_date=f"2025-0{1 + n % 2}-11") for n in range(175)]
    write(tmp_path, *rows, name="livecodebench_v6.jsonl")
    loaded = load_benchmark("livecodebench_v6", Config(benchmarks=str(tmp_path)))
    assert len(loaded) == 87
    assert "87 of 175 problems of livecodebench_v6 are dated 2025-02:2025-05" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("name, told", [("aime2024", ""), ("aime2025", "lines 19, 20, 28")])
def test_the_shared_aime_files_are_benchmarks(name, told, capsys):
    if not (SHARED / "aime").exists():
        pytest.skip("shared/aime is not here")
    loaded = load_benchmark(name, Config(benchmarks=str(SHARED / "aime")))
    assert told in capsys.readouterr().err
    assert all(tools.grade(p, f"\\boxed{{{p.answer}}}", None).right for p in loaded)
    assert len({tools.voted_answer(p, f"\\boxed{{{p.answer}}}") for p in loaded}) > 20


def test_the_shared_gsm8k_test_file_is_a_benchmark(tmp_path):
    if not (SHARED / "gsm8k").exists():
        pytest.skip("shared/gsm8k is not here")
    (tmp_path / "gsm8k.jsonl").symlink_to(SHARED / "gsm8k" / "test.jsonl")
    loaded = load_benchmark("gsm8k", Config(benchmarks=str(tmp_path)))
    assert len(loaded) == BENCHMARKS["gsm8k"].rows == 1319
    for p in loaded[:100]:
        assert evaluate.majority([f"{p.answer}.00", f"\\${p.answer}", "77.5"], [1, 1, 0]) == 1


def test_parquet_is_read_or_the_way_to_convert_it_is_told(tmp_path):
    path = tmp_path / "set.parquet"
    try:
        from pyarrow import Table, parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="pip install pyarrow.*convert"):
            load(path)
    else:
        parquet.write_table(Table.from_pylist([{
            "prompt": [{"role": "user", "content": "Q"}], "data_source": "x",
            "reward_model": {"ground_truth": "7"}}]), path)
        assert load(path)[0].answer == "7"


@pytest.mark.parametrize("name, error, message", [
    *((name, ConnectionError("no route to host"), f"no route to host .*put it at .*{name}")
      for name in BENCHMARKS),
    ("gpqa_diamond", GatedRepoError.__new__(GatedRepoError),
     "accept its conditions at https.*gpqa, log in")])
def test_a_download_that_fails_says_how_to_get_the_file(name, error, message, tmp_path,
                                                        monkeypatch):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=message):
        evaluate.download(name, tmp_path)


def test_a_download_lies_where_it_is_looked_for(tmp_path, monkeypatch):
    source = gpqa(tmp_path, 198, "fetched.csv")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(source))
    place = evaluate.download("gpqa_diamond", tmp_path / "sets")
    assert place == evaluate.find_file("gpqa_diamond", tmp_path / "sets")
    assert [path.name for path in place.parent.iterdir()] == ["gpqa_diamond.csv"]


# --- Votes --------------------------------------------------------------------------------------

ANSWERS = [
    "5", "-3.50", r"\frac{1}{2}", "1/2", "1,000", "50%", r"50\%", "5 cm", "x = 5", "(1, 2)",
    r"\left(\tfrac12, -1\right)", "1, 2, 3", "red, green", r"\{1, 2\}", r"\emptyset", "[0, 1)",
    r"(-\infty, 2]", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\text{yes}", "x^2 + 1",
    r"2\sqrt{3}", "NaN", "nan", "inf", "null", "None", "true", '"', "\u2028", "\ud800", "naïve",
    "B", r"\pi", "1e400", "{}", "10^{-2}", "((1, 2), (3, 4))", "[[1, 2], [3]]", r"\frac{1}{0}"]
HEAVY = ["\\boxed{" * 150_000, "\\boxed{" + "9" * 10**6 + "}", "\\boxed{10^{999999}}",
         "\\boxed{" + "{" * 500 + "}" * 500 + "}", "A" * 10**6, "\\boxed{1e999999999}",
         "\\boxed{1/0}", "\\boxed{" + "1," * 290 + "}"]


@pytest.mark.parametrize("text", HEAVY)
@pytest.mark.parametrize("kind", ["math", "choice", "program"])
def test_no_answer_makes_a_vote_slow(kind, text):
    problem, start = tools.Problem("q", "1", kind), time.perf_counter()
    answer = tools.voted_answer(problem, text)
    tools.group_answers([answer, "1"])
    assert time.perf_counter() - start < 0.5


def scripted(finals, problem):
    """In place of sample_rollouts: rollouts of one turn each, graded as usual."""
    def sample(agent, model, prompts, key, first, temperature, top_p):
        rollouts = [sod.Rollout(problem, ids, [sod.Turn([1], finals[first + n])], (*key, first + n),
                                finish="answer") for n, (_, ids) in enumerate(prompts)]
        for r in rollouts:
            sod.grade_rollout(r, agent.tool, agent.config)
        return rollouts
    return sample


@pytest.mark.parametrize("kind", ["math", "choice"])
def test_every_form_of_answer_goes_through_write_read_report_and_rescoring(
        kind, tmp_path, monkeypatch, capsys):
    finals = [*(f"\\boxed{{{answer}}}" for answer in ANSWERS), *HEAVY, "", "no", "\\boxed{", "B"]
    row = {"question": "q", "answer": "5"} if kind == "math" else {
        "question": "q\nA) 1\nB) 2", "answer": "B", "kind": "choice"}
    (problem,) = loaded = load(data := write(tmp_path, row))
    assert problem.kind == kind
    monkeypatch.setattr(sod, "sample_rollouts", scripted(finals, problem))
    config = Config(k=len(finals), rollout_batch=7, out=str(tmp_path), tool_unsafe=True)
    model = sod.load_model(STUDENT, "cpu", sod.torch.float32)
    one, path = evaluate.evaluate("m", str(data), loaded, model, sod.load_tokenizer(STUDENT),
                                  config)
    assert evaluate.read_finished(path) == one and len(one.rows) == len(finals)
    assert all(isinstance(row["vote"], (str, type(None))) for row in one.rows)
    votes = sum(row["vote"] is not None for row in one.rows)
    assert votes >= (len(ANSWERS) if kind == "math" else 1)
    assert f"| maj@{len(finals)} |" in evaluate.report([one])
    assert evaluate.main(["--rescore", str(path)]) == 0
    assert evaluate.read_finished(path.with_suffix(".rescored.jsonl")).rows == one.rows


# --- Interruption -------------------------------------------------------------------------------

TINY = ["--model", STUDENT, "--limit", "12", "--k", "2", "--runs", "2", "--rollout_batch", "4"]


def command(folder, *more):
    return [sys.executable, str(ROOT / "evaluate.py"), *TINY, "--out", str(folder), *more]


def printed(capsys):
    """What was printed, without the paths of the files."""
    return re.sub(r"samples  .*\n", "", capsys.readouterr().out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(file of samples, what was printed) of an evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(command(folder), capture_output=True, text=True, check=True)
    (path,) = folder.iterdir()
    return path, re.sub(r"samples  .*\n", "", done.stdout)


def test_a_killed_evaluation_continues_and_ends_with_the_same_table(whole, tmp_path, capsys):
    path = tmp_path / whole[0].name
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 9):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = path.read_text()
    assert 9 <= killed.count("\n") < 49  # a header, 2 runs of 12 problems, 2 samples each
    path.write_text(killed + '{"run": 0, "problem": "hel')  # killed while it wrote a line
    assert evaluate.main(["--rescore", str(path)]) == 1
    assert "of 48 samples: the evaluation was interrupted" in capsys.readouterr().err
    assert evaluate.main([*TINY, "--out", str(tmp_path)]) == 0
    assert printed(capsys) == whole[1]
    assert path.read_text() == whole[0].read_text()


def test_an_evaluation_killed_in_its_first_line_or_amid_a_batch_continues(whole, tmp_path):
    lines = whole[0].read_text().splitlines(keepends=True)
    cases = (("", 1), (lines[0][:40], 1), (lines[0], 1), ("".join(lines[:4]), 1),
             ("".join(lines[:5]), 5), ("".join(lines[:44]) + '{"run', 41), ("".join(lines), 49))
    for kept, left in cases:  # batches of four samples
        path = tmp_path / "a.jsonl"
        path.write_text(kept)
        one = evaluate.read_samples(whole[0])
        one.rows = []
        with open(path, "a") as file:
            evaluate.resume(file, one)
        assert path.read_text() == "".join(lines[:left])
        assert len(one.rows) == left - 1


def test_two_processes_cannot_write_one_file(whole, tmp_path):
    one = evaluate.read_samples(whole[0])
    with open(tmp_path / "a.jsonl", "a") as first, open(tmp_path / "a.jsonl", "a") as second:
        evaluate.resume(first, one)
        with pytest.raises(ValueError, match="written by another process"):
            evaluate.resume(second, one)


def test_every_sample_has_random_numbers_of_its_own_whatever_came_before(monkeypatch):
    seen = []

    def sample(agent, model, prompts, key, first, temperature, top_p):
        assert (temperature, top_p) == (0.7, 0.6)
        for n, (problem, _) in enumerate(prompts, start=first):
            seen.append((problem.id, n, sod.random_numbers(*key, n).random()))
        return [sod.Rollout(problem, [], [sod.Turn()]) for problem, _ in prompts]
    monkeypatch.setattr(sod, "sample_rollouts", sample)
    prompts = [(tools.Problem("q", "1", id=name), []) for name in "ab"]

    def samples(seed, done, batch):
        config = Config(k=3, runs=2, seed=seed, temperature=0.7, top_p=0.6, rollout_batch=batch)
        one = Evaluation("m", "d", 2, 0, 1, 1, asdict(config), [{}] * done)
        seen.clear()
        rows = [row for rows in evaluate.sample_the_rest(sod.Agent(config, *[None] * 4), one,
                                                         prompts) for row in rows]
        places = [(row["run"], row["problem"], row["sample"]) for row in rows]
        assert places == [(r, p, s) for r in (0, 1) for p in "ab" for s in range(3)][done:]
        return list(seen)
    whole = samples(0, 0, 12)
    assert len({noise for *_, noise in whole}) == 12
    assert samples(0, 0, 5) == whole and samples(0, 5, 5) == whole[5:]
    assert not {noise for *_, noise in whole} & {noise for *_, noise in samples(1, 0, 12)}


def rollout_of(finish, outcome=""):
    turns = [sod.Turn([1, 2], "call", "ok", "5", [3]), sod.Turn([4, 5], "\\boxed{4}", outcome)]
    return sod.Rollout(tools.Problem("q", "4", id="p"), [1] * 6, turns, finish=finish)


def test_only_a_final_turn_is_graded_and_only_sampled_tokens_count():
    for finish, outcome, final in (("answer", "", "\\boxed{4}"), ("budget", "", ""),
                                   ("turns", "not_run", ""), ("infrastructure", "", "\\boxed{4}"),
                                   ("infrastructure", "sandbox_error", "")):
        r = rollout_of(finish, outcome)
        row = evaluate.sample_row(r, 0, 3, transcripts=False)
        assert row["final"] == final and row["vote"] == ("4" if final else None)
        assert (row["tokens"], row["sample"]) == (4, 3)
        assert row["calls"] == ["ok"] + [outcome] * (outcome != "") and "turns" not in row
        assert evaluate.sample_row(r, 0, 3, transcripts=True)["turns"] == ["call", "\\boxed{4}"]


def test_other_settings_problems_or_weights_start_another_file():
    base = dict(model="m", data="d", problems=2, skipped=0, weights=1, questions=1, settings={})
    changes = [{}, {"settings": {"seed": 1}}, {"weights": 2}, {"questions": 2}, {"model": "n"}]
    assert len({evaluate.file_of(Evaluation(**base | change), "x") for change in changes}) == 5
    problems = [tools.Problem("q", "1"), tools.Problem("q", "2"), tools.Problem("r", "1"),
                tools.Problem("q", "1", tests=[{"input": ""}])]
    assert len({evaluate.crc_of([problem]) for problem in problems}) == 4
    model = sod.torch.nn.Linear(3, 2, dtype=sod.torch.bfloat16)
    before = evaluate.weights_crc(model)
    assert before == evaluate.weights_crc(model)
    with sod.torch.no_grad():
        model.bias[0] += 1
    assert before != evaluate.weights_crc(model)


# --- Files of samples, without a model ----------------------------------------------------------

def row(problem, right, run=0, sample=0, **changed):
    return {"run": run, "problem": problem, "sample": sample, "right": right,
            "reason": "right" if right else "wrong", "vote": "1" if right else "2", "truth": "1",
            "final": f"\\boxed{{{1 if right else 2}}}", "finish": "answer", "calls": ["ok"],
            "tokens": 10, **changed}


def stored(path, rows, model="m", data="d", **changed):
    """A file of samples as evaluate.py writes it."""
    used = {k: v for k, v in asdict(Config(**changed)).items() if k not in evaluate.FOLDERS}
    problems = len(rows) // (used["k"] * used["runs"])
    evaluate.write_samples(path, Evaluation(model, str(data), problems, 0, 1, 1, used, rows))
    return path


def four_by_two(path, runs=1, **changed):
    """Two problems, four samples: one right, and three right, in every run."""
    rows = [row(f"p{p}", s <= 2 * p, run, s) for run in range(runs) for p in (0, 1)
            for s in range(4)]
    return stored(path, rows, k=4, runs=runs, **changed)


def test_the_numbers_of_a_report_by_hand(tmp_path):
    one = evaluate.read_finished(four_by_two(tmp_path / "a.jsonl", runs=2))
    assert one.correct().tolist() == [[1, 0, 0, 0] * 2, [1, 1, 1, 0] * 2]
    assert one.scores() == {"p0": 0.25, "p1": 0.75}
    detail = evaluate.detail(one)
    assert detail["mean ± std over runs"] == "50.00 ± 0.00"
    # p0 has 2 of 8 right: 1 - C(6,2)/C(8,2) = 13/28; p1 has 6: 1 - 1/28; their mean is 71.4%
    assert detail["pass@k, k = 1, 2, 4, 8"] == "50.0, 71.4, 89.3, 100.0"
    assert detail["maj@4"] == "50.0"
    assert detail["not right, because"] == "50.0% (wrong 50.0%)"


UNJUDGED = "samples the sandbox failed, counted as not right"


def test_calls_cuts_and_failures_are_counted_and_the_sandbox_apart(tmp_path):
    rows = [row("p", True, sample=0, calls=["ok", "timeout", "error", "timeout"]),
            row("p", False, sample=1, calls=["sandbox_error"], finish="infrastructure"),
            row("p", False, sample=2, calls=[], finish="budget", reason="no boxed answer"),
            row("p", False, sample=3, calls=["not_run"], finish="turns", reason="no boxed answer")]
    detail = evaluate.detail(evaluate.read_finished(stored(tmp_path / "a.jsonl", rows, k=4)))
    assert detail["tool calls a trajectory"] == "1.50"
    assert detail["failed calls"] == "50.0% (timeout 33.3%, error 16.7%)"
    assert detail["cut off, by"] == "50.0% (turns 25.0%, budget 25.0%)"
    assert detail[UNJUDGED] == "1"
    assert detail["not right, because"] == "75.0% (no boxed answer 50.0%, wrong 25.0%)"
    assert detail["sampled tokens a trajectory"] == "10"


def test_a_benchmark_of_the_paper_has_the_papers_result_beside_it(tmp_path):
    def told(data):
        path = four_by_two(tmp_path / f"{data}.jsonl", data=data)
        return evaluate.report([evaluate.read_finished(path)])
    text = told("aime2025")
    assert "SOD 0.6B, SOD 1.7B, their 4B teacher: 26.13, 41.72, 60.42\n" in text
    assert "the paper" not in told("gsm8k")
    # the means of the paper's tables: SOD 24.22 and 42.98, the teacher 61.59
    figures = [list(map(float, b.paper.split(", "))) for b in BENCHMARKS.values() if b.paper]
    assert np.mean(figures, axis=0) == pytest.approx([24.22, 42.98, 61.59], abs=0.0101)


def test_a_report_without_a_verdict_still_has_its_table(tmp_path):
    a = evaluate.read_finished(four_by_two(tmp_path / "a.jsonl"))
    b = evaluate.read_finished(four_by_two(tmp_path / "b.jsonl", model="n"))
    b.questions = 2
    text = evaluate.report([a, b])
    assert "| n | 50.0% |" in text and "no verdict: d and d are different problems" in text
    assert sod.results_table({"m": a.correct(), "n": b.correct()}) in text  # as in the model card


# --- Rescoring ----------------------------------------------------------------------------------

def test_rescoring_grades_stored_programs_without_a_model(contest_file, tmp_path, capsys):
    rows = [row(question, not right, sample=sample, vote=None,
                final="" if program is None else f"```python\n{program}\n```")
            for sample, (question, program, right, _) in enumerate(PROGRAMS)]
    path = stored(tmp_path / "a.jsonl", rows, data=contest_file, k=4, tool_unsafe=True,
                  tool_timeout=1.0)
    assert evaluate.main(["--rescore", str(path)]) == 0
    assert "8 of 8 verdicts changed; 0 samples stay unjudged" in capsys.readouterr().out
    new = evaluate.read_finished(tmp_path / "a.rescored.jsonl")
    assert [(r["right"], r["reason"]) for r in new.rows] == [p[2:] for p in PROGRAMS]
    assert evaluate.read_finished(path).rows == rows  # the old file is as it was


def test_rescoring_takes_the_answers_of_today(tmp_path, capsys):
    data = write(tmp_path, *({"question": f"q{p}", "answer": "2", "id": f"p{p}"} for p in (0, 1)))
    path = four_by_two(tmp_path / "a.jsonl", data=data)
    assert evaluate.main(["--rescore", str(path), "--tool_unsafe", "true", "--k", "3"]) == 0
    out = capsys.readouterr()
    assert "8 of 8 verdicts changed" in out.out and "not used by this command: k" in out.err
    new = evaluate.read_finished(tmp_path / "a.rescored.jsonl")
    assert new.scores() == {"p0": 0.75, "p1": 0.25} and new.settings["k"] == 4
    write(tmp_path, {"question": "q", "answer": "2", "id": "p0"})
    assert evaluate.main(["--rescore", str(path)]) == 1
    assert "lacks 1 problems of" in capsys.readouterr().err


class BrokenTool:
    """A sandbox that fails whatever it is asked to run."""
    __enter__ = lambda self: self
    __exit__ = lambda self, *_: None
    run = lambda self, codes, stdins=None, raw=False: [
        tools.Observation("the sandbox failed", "sandbox_error", 0.0) for _ in codes]


def test_what_the_sandbox_failed_to_judge_is_judged_later_or_stays_unjudged(
        contest_file, tmp_path, monkeypatch, capsys):
    problems = {problem.id: problem for problem in load(contest_file)}
    rows = []
    for sample, (question, program, *_) in enumerate(PROGRAMS[:4]):
        r = sod.Rollout(problems[question], [0], [sod.Turn([1], f"```python\n{program}\n```")],
                        finish="answer")
        sod.grade_rollout(r, BrokenTool(), Config())
        rows.append(evaluate.sample_row(r, 0, sample, transcripts=False))
    lost = sod.Rollout(problems["stdin"], [0], [sod.Turn([1], "call", "sandbox_error")],
                       finish="infrastructure")
    sod.grade_rollout(lost, BrokenTool(), Config())
    rows[1] = evaluate.sample_row(lost, 0, 1, transcripts=False)
    path = stored(tmp_path / "a.jsonl", rows, data=contest_file, k=4, tool_unsafe=True,
                  tool_timeout=1.0)
    assert evaluate.detail(evaluate.read_finished(path))[UNJUDGED] == "4"
    with monkeypatch.context() as patch:  # the sandbox is still broken
        patch.setattr(sod, "load_tool", lambda config: (BrokenTool(), 0.0))
        assert evaluate.main(["--rescore", str(path)]) == 0
    assert "4 samples stay unjudged" in capsys.readouterr().out
    assert evaluate.main(["--rescore", str(tmp_path / "a.rescored.jsonl")]) == 0
    assert "1 of 4 verdicts changed; 1 samples stay unjudged" in capsys.readouterr().out
    new = evaluate.read_finished(tmp_path / "a.rescored.rescored.jsonl")
    assert [r["right"] for r in new.rows] == [True, False, False, False]
    assert [r["finish"] for r in new.rows] == ["answer", "infrastructure", "answer", "answer"]
    assert new.rows[1] == rows[1] and evaluate.detail(new)[UNJUDGED] == "1"


# --- Comparing ----------------------------------------------------------------------------------

def test_two_files_are_compared_by_problem(tmp_path, capsys):
    a, b = ([row(f"p{p}", p % 10 < share) for p in range(100)] for share in (2, 4))
    a, b = stored(tmp_path / "a.jsonl", a, "opd", k=1), stored(tmp_path / "b.jsonl", b, "sod", k=1)
    assert evaluate.main(["--compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out == (
        "sod is better by 20.0 points, 95% interval 12.0 to 28.0\n")
    other = evaluate.read_finished(b)
    other.questions = 2
    evaluate.write_samples(b, other)
    assert evaluate.main(["--compare", str(a), str(b)]) == 1
    assert "different problems" in capsys.readouterr().err


def test_a_comparison_with_itself_is_a_sentence_and_with_a_copy_a_verdict(tmp_path, capsys):
    a = four_by_two(tmp_path / "a.jsonl")
    for name in (a, STUDENT):
        assert evaluate.main(["--compare", str(name), str(name)]) == 1
        out = capsys.readouterr()
        assert f"names {name} twice" in out.err and not out.out
    (tmp_path / "b.jsonl").write_text(a.read_text())
    assert evaluate.main(["--compare", str(a), str(tmp_path / "b.jsonl")]) == 0
    assert "both score the same on every problem" in capsys.readouterr().out


@pytest.mark.parametrize("changed, note", [
    ({"max_turns": 3}, "max_turns 12 and 3"), ({"temperature": 0.5}, "temperature 1.0 and 0.5"),
    ({"runs": 2}, "runs 1 and 2"), ({"system": "S"}, "system '' and 'S'"),
    ({"dtype": "bfloat16"}, "dtype 'auto' and 'bfloat16'"), ({"seed": 3}, None),
    ({"rollout_batch": 8, "transcripts": True, "threads": 2}, None)])
def test_evaluations_with_other_settings_are_compared_with_a_note(changed, note, tmp_path, capsys):
    a, b = four_by_two(tmp_path / "a.jsonl"), four_by_two(tmp_path / "b.jsonl", **changed)
    assert evaluate.main(["--compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert (f"; NOTE: not only the models differ, but the settings: {note}\n" in said if note
            else "NOTE" not in said)


# --- The command line ---------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["--top_p", "1.5"], "top_p is 1.5"), (["--runs", "0"], "runs is 0; it must be at least 1"),
    (["--max_turns", "0"], "max_turns is 0"), (["--temperature", "0"], "temperature is 0"),
    (["--kk", "1"], "unrecognized"), (["--rescore", "x", "--page", "y"], "not allowed with"),
    (["--k", "many"], "invalid int")])
def test_wrong_options_are_a_sentence_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("argv, idle", [
    (["--rescore", "x", "--k", "2", "--data", "world"], "data, k"),
    (["--download", "x", "--k", "2"], "k"),
    (["--page", "x", "--temperature", ".5"], "temperature"), (["--iteration", "3"], "iteration"),
    (["--data", "gsm8k", "--look", "3", "--silent_persist", ".1"], "look, silent_persist"),
    (["--k", "2", "--look", "3"], None),
    (["--rescore", "x", "--tool_timeout", "3"], None), (["--page", "x", "--iteration", "2"], None)])
def test_options_that_a_command_does_not_use_are_told_and_dropped(argv, idle, capsys):
    args, given = evaluate.parse(argv)
    said = capsys.readouterr().err
    assert said == (f"not used by this command: {idle}\n" if idle else "")
    assert not given.keys() & set((idle or "").split(", "))


@pytest.mark.parametrize("text, message", [
    ("", "no file of samples"), ("{}\n", "no file of samples"), ("[]\n", "no file of samples"),
    ("[]\n" * 3, "no file of samples"), ("x\n", "line 1: found broken JSON"),
    ('{"model": "m"}\n', "no file of samples"), ('{"model": "m"}', "no file of samples")])
def test_wrong_files_are_a_sentence_and_status_1(text, message, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(text)
    assert evaluate.main(["--rescore", str(tmp_path / "a.jsonl")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_broken_line_or_header_is_named(tmp_path, capsys):
    path = four_by_two(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    for number, bad, message in (
            (4, "{", "line 4: found broken JSON"), (4, "{}", "line 4: found no sample"),
            (4, lines[3].replace("true", "1").replace("false", "0"), "line 4: found no sample"),
            (4, lines[3].replace('"vote": "', '"vote": ["').replace('", "truth', '"], "truth'),
             "line 4: found no sample"),
            (1, lines[0].replace('"top_p": 1.0', '"top_p": 7'), "no file of samples"),
            (1, lines[0].replace('"look": ', '"chunk": '), "no file of samples")):
        path.write_text("\n".join([*lines[:number - 1], bad, *lines[number:]]) + "\n")
        assert evaluate.main(["--rescore", str(path)]) == 1
        assert message in capsys.readouterr().err


def test_prompts_that_do_not_fit_are_a_sentence_and_status_1(tmp_path, capsys):
    assert evaluate.main(["--model", STUDENT, "--max_prompt", "4", "--out", str(tmp_path)]) == 1
    assert "longer than 4 tokens" in capsys.readouterr().err


def test_a_model_that_is_measured_on_its_training_file_is_told(tmp_path, capsys):
    def told(model, data):
        evaluate.check_before_weights(str(model), [str(data)], {"max_prompt": 128,
                                                                "max_response": 384})
        return "was trained on" in capsys.readouterr().err
    world, mine = ROOT / "data" / "world", write(tmp_path, {"question": "q", "answer": "1"})
    assert told(STUDENT, world / "train.jsonl") and not told(STUDENT, "world")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"train_data": str(mine)}))
    (tmp_path / "link.jsonl").symlink_to(mine)
    for place in ("checkpoint", "saves/iteration-5"):
        shutil.copytree(STUDENT, tmp_path / "run" / place)
        assert told(tmp_path / "run" / place, tmp_path / "link.jsonl")
        assert not told(tmp_path / "run" / place, world / "train.jsonl")


def test_a_closed_or_plain_screen_ends_no_command(tmp_path, monkeypatch, capsys):
    a, b = (four_by_two(tmp_path / f"{name}.jsonl", model="naïve\u2028" + name)
            for name in "ab")
    compare = ["--compare", str(a), str(b)]
    monkeypatch.setattr(sys, "stdout", None)  # started with >&-
    assert evaluate.main(compare) == 0
    monkeypatch.setattr(sys, "stdout", screen := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert evaluate.main(compare) == 0
    assert rb"na\xefve\u2028b minus" in screen.buffer.getvalue()
    reader, writer = os.pipe()
    os.close(reader)  # as | head does
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    assert evaluate.main(compare) == 1
    assert capsys.readouterr().err == (
        "error: the reader of this output has gone, so the command stopped\n")


def test_the_papers_settings_are_those_of_other_data_and_can_be_changed():
    paper = evaluate.settings("gsm8k", {"k": 8})
    assert (paper.max_turns, paper.temperature, paper.top_p) == (16, 1.0, 0.6)
    assert (paper.max_prompt, paper.max_response, paper.k, paper.runs) == (4096, 20_480, 8, 5)
    assert paper.silent_rate == 0 and paper.system == sod.SYSTEM and PAPER["k"] == 32
    for data in ("world", str(ROOT / "data" / "world" / "train.jsonl")):
        world = evaluate.settings(data, {})
        assert (world.k, world.top_p, world.silent_rate) == (4, 1.0, sod.Config.silent_rate)


def test_importing_runs_nothing_and_every_option_has_help(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in asdict(Config()))
    assert "as in 2025-02:2025-05" in text
