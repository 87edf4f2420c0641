"""Benchmark files, files of samples, interruption, rescoring, reports and the command line."""
import base64
import collections
import csv
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest

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
    assert evaluate.vote(problem, f"\\boxed{{({right})}}") == right
    assert evaluate.vote(problem, "no idea") is None


def test_broken_csv_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing in incorrect answer 2"):
        load(gpqa(tmp_path, 1, **{"Incorrect Answer 2": ""}))
    with pytest.raises(ValueError, match="broken CSV.*quotes"):
        load(write(tmp_path, 'Question,Correct Answer\n"a,b', name="cut.csv"))
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
    assert evaluate.vote(problems["stdin"], f"```python\n{ADD}\n```") is None


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
    assert len({evaluate.vote(p, f"\\boxed{{{p.answer}}}") for p in loaded}) > 20


def test_the_shared_gsm8k_test_file_is_a_benchmark(tmp_path):
    if not (SHARED / "gsm8k").exists():
        pytest.skip("shared/gsm8k is not here")
    (tmp_path / "gsm8k.jsonl").symlink_to(SHARED / "gsm8k" / "test.jsonl")
    loaded = load_benchmark("gsm8k", Config(benchmarks=str(tmp_path)))
    assert len(loaded) == BENCHMARKS["gsm8k"].rows == 1319
    votes = [evaluate.vote(p, f"\\boxed{{{p.answer}.00}}") for p in loaded]
    assert votes == [evaluate.vote(p, f"\\boxed{{\\${p.answer}}}") for p in loaded]


def test_ids_must_tell_problems_apart(tmp_path):
    row = {"question": "a", "answer": "1", "id": "x"}
    with pytest.raises(ValueError, match="the id x stands in several rows"):
        load(write(tmp_path, row, row))


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


@pytest.mark.parametrize("name", BENCHMARKS)
def test_downloads_without_a_network_say_where_to_put_the_file(name, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=f"no route to host .*put it at .*{name}"):
        evaluate.download(name, tmp_path)


def test_downloads_of_gated_sets_say_how_to_get_in(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    with pytest.raises(ValueError, match="accept its conditions at https.*gpqa, log in"):
        evaluate.download("gpqa_diamond", tmp_path)


def test_a_download_lies_where_it_is_looked_for(tmp_path, monkeypatch):
    import huggingface_hub
    source = gpqa(tmp_path, 198, "fetched.csv")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(source))
    place = evaluate.download("gpqa_diamond", tmp_path / "sets")
    assert place == evaluate.find_file("gpqa_diamond", tmp_path / "sets")
    assert [path.name for path in place.parent.iterdir()] == ["gpqa_diamond.csv"]


# --- Votes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("one, other", [
    ("1/2", "0.5"), (r"\frac12", r"\dfrac{1}{2}"), ("1,000", "1000.0"), (r"\text{ yes}", "yes")])
def test_equal_answers_vote_together(one, other):
    problem = tools.Problem("q", "1")
    votes = [evaluate.vote(problem, f"\\boxed{{{text}}}") for text in (one, other, "7")]
    assert votes[0] == votes[1] != votes[2] and None not in votes


@pytest.mark.parametrize("text", ["\\boxed{" * 150_000, "\\boxed{" + "9" * 10**6 + "}",
                                  "\\boxed{10^{999999}}", "\\boxed{" + "{" * 500 + "}" * 500 + "}",
                                  "A" * 10**6, "\\boxed{1e999999999}", "\\boxed{1/0}",
                                  "\\boxed{" + "1," * 290 + "}"])
@pytest.mark.parametrize("kind", ["math", "choice", "program"])
def test_no_answer_makes_a_vote_slow(kind, text):
    problem, start = tools.Problem("q", "1", kind), time.perf_counter()
    evaluate.vote(problem, text)
    assert time.perf_counter() - start < 0.5


# --- Interruption -------------------------------------------------------------------------------

TINY = ["--model", STUDENT, "--limit", "12", "--k", "2", "--runs", "2", "--rollout_batch", "4"]


def command(folder, *more):
    return [sys.executable, str(ROOT / "evaluate.py"), *TINY, "--out", str(folder), *more]


def printed(capsys):
    """What was printed, without the paths of the files."""
    return re.sub(r"samples .*\n", "", capsys.readouterr().out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(file of samples, what was printed) of an evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(command(folder), capture_output=True, text=True, check=True)
    (path,) = folder.iterdir()
    return path, re.sub(r"samples .*\n", "", done.stdout)


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
    assert evaluate.main(["--table", str(path)]) == 1
    assert "of 48 samples, and its last line is cut off" in capsys.readouterr().err
    assert evaluate.main([*TINY, "--out", str(tmp_path)]) == 0
    assert printed(capsys) == whole[1]
    assert path.read_text() == whole[0].read_text()


def test_an_evaluation_killed_in_its_first_line_or_amid_a_chunk_continues(whole, tmp_path):
    lines = whole[0].read_text().splitlines(keepends=True)
    plan = evaluate.chunks(12, Config(k=2, runs=2, rollout_batch=4))
    cases = (("", 0, 1), (lines[0][:40], 0, 1), (lines[0], 0, 1), ("".join(lines[:4]), 0, 1),
             ("".join(lines[:5]), 1, 5), ("".join(lines[:44]) + '{"run', 10, 41),
             ("".join(lines), 12, 49))
    for kept, done, left in cases:  # chunks of two problems, two samples each
        path = tmp_path / "a.jsonl"
        path.write_text(kept)
        found = evaluate.read_samples(whole[0])
        found.rows = []
        with open(path, "a") as file:
            assert evaluate.resume(file, found, plan) == done
        assert path.read_text() == "".join(lines[:left])
        assert len(found.rows) == left - 1


def test_two_processes_cannot_write_one_file(whole, tmp_path):
    found = evaluate.read_samples(whole[0])
    with open(tmp_path / "a.jsonl", "a") as one, open(tmp_path / "a.jsonl", "a") as two:
        evaluate.resume(one, found, [])
        with pytest.raises(ValueError, match="written by another process"):
            evaluate.resume(two, found, [])


def test_every_chunk_has_a_seed_of_its_own_whatever_came_before(monkeypatch):
    seen = []

    def sample(model, tokenizer, prompts, tool, config, rng, temperature, top_p):
        seen.append((rng.random(), len(prompts), temperature, top_p))
        return []
    monkeypatch.setattr(sod, "sample_rollouts", sample)
    agent = sod.Agent(sod.Config(), None, None, None, None)
    places = [(seed, run, start) for seed in (0, 1) for run in (0, 1) for start in (0, 2)]
    for seed, run, start in places + places[::-1]:
        config = Config(k=3, seed=seed, temperature=0.7, top_p=0.6)
        evaluate.sample_chunk(agent, ["a", "b"], config, run, start)
    assert len({one[0] for one in seen}) == len(places) == 8
    assert seen == seen[::-1] and {one[1:] for one in seen} == {(6, 0.7, 0.6)}


def test_only_an_answer_turn_is_graded_and_only_sampled_tokens_count():
    problem = tools.Problem("q", "4", id="p")
    for finish, final in (("answer", "\\boxed{4}"), ("budget", ""), ("turns", "")):
        r = sod.Rollout(problem, [1] * 6, [-1, 0, 0, -1, 1, 1], 1, ["call", "\\boxed{4}"], ["5"],
                        ["ok", ""], finish)
        stored = evaluate.sample_row(r, 0, 3, transcripts=False)
        assert stored["final"] == final and stored["vote"] == ("4" if final else None)
        assert (stored["tokens"], stored["calls"], stored["sample"]) == (4, ["ok"], 3)
        assert "turns" not in stored
        assert evaluate.sample_row(r, 0, 3, transcripts=True)["turns"] == r.turns


def test_other_settings_problems_or_weights_start_another_file():
    base = dict(model="m", data="d", problems=2, skipped=0, weights=1, questions=1, settings={})
    changes = [{}, {"settings": {"seed": 1}}, {"weights": 2}, {"questions": 2}, {"model": "n"}]
    assert len({evaluate.file_of(Evaluation(**base | change), "x") for change in changes}) == 5
    problems = [tools.Problem("q", "1"), tools.Problem("q", "2"), tools.Problem("r", "1"),
                tools.Problem("q", "1", tests=[{"input": ""}])]
    assert len({evaluate.crc_of([problem]) for problem in problems}) == 4


def test_a_change_of_one_weight_changes_the_crc():
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


def test_calls_cuts_and_failures_are_counted_and_the_sandbox_apart(tmp_path):
    rows = [row("p", True, sample=0, calls=["ok", "timeout", "error", "timeout"]),
            row("p", False, sample=1, calls=["sandbox_error"]),
            row("p", False, sample=2, calls=[], finish="budget", reason="no boxed answer"),
            row("p", False, sample=3, calls=["not_run"], finish="turns", reason="no boxed answer")]
    one = evaluate.read_finished(stored(tmp_path / "a.jsonl", rows, k=4))
    detail = evaluate.detail(one)
    assert detail["tool calls a trajectory"] == "1.50"
    assert detail["failed calls"] == "50.0% (timeout 33.3%, error 16.7%)"
    assert detail["cut off, by"] == "50.0% (turns 25.0%, budget 25.0%)"
    assert detail["samples the sandbox failed"] == "1"
    assert detail["not right, because"] == "75.0% (no boxed answer 50.0%, wrong 25.0%)"
    assert detail["sampled tokens a trajectory"] == "10"


def test_rescoring_grades_stored_programs_without_a_model(contest_file, tmp_path, capsys):
    rows = [row(question, not right, sample=sample, vote=None,
                final="" if program is None else f"```python\n{program}\n```")
            for sample, (question, program, right, _) in enumerate(PROGRAMS)]
    path = stored(tmp_path / "a.jsonl", rows, data=contest_file, k=4, tool_unsafe=True,
                  tool_timeout=1.0)
    assert evaluate.main(["--rescore", str(path)]) == 0
    assert "8 of 8 verdicts changed" in capsys.readouterr().out
    new = evaluate.read_finished(tmp_path / "a.rescored.jsonl")
    assert [(r["right"], r["reason"]) for r in new.rows] == [p[2:] for p in PROGRAMS]
    assert evaluate.read_finished(path).rows == rows  # the old file is as it was


def test_rescoring_takes_the_answers_of_today(tmp_path, capsys):
    data = write(tmp_path, *({"question": f"q{p}", "answer": "2", "id": f"p{p}"} for p in (0, 1)))
    path = four_by_two(tmp_path / "a.jsonl", data=data)
    assert evaluate.main(["--rescore", str(path), "--tool_unsafe", "true"]) == 0
    assert "8 of 8 verdicts changed" in capsys.readouterr().out
    new = evaluate.read_finished(tmp_path / "a.rescored.jsonl")
    assert new.scores() == {"p0": 0.75, "p1": 0.25}
    write(tmp_path, {"question": "q", "answer": "2", "id": "p0"})
    assert evaluate.main(["--rescore", str(path)]) == 1
    assert "lacks 1 problems of" in capsys.readouterr().err


def test_two_files_are_compared_by_problem(tmp_path, capsys):
    a, b = ([row(f"p{p}", p % 10 < share) for p in range(100)] for share in (2, 4))
    a, b = stored(tmp_path / "a.jsonl", a, "opd", k=1), stored(tmp_path / "b.jsonl", b, "sod", k=1)
    assert evaluate.main(["--compare", str(a), str(b)]) == 0
    assert re.fullmatch(r"sod is better by 20.0 points, 95% interval 1[23]\.\d to 2[78]\.\d\n",
                        capsys.readouterr().out)
    assert evaluate.main(["--compare", str(a), str(a)]) == 0
    assert "100 problems cannot tell these apart" in capsys.readouterr().out
    other = evaluate.read_finished(b)
    other.questions = 2
    evaluate.write_samples(b, other)
    assert evaluate.main(["--compare", str(a), str(b)]) == 1
    assert "different problems" in capsys.readouterr().err


def test_a_report_without_a_verdict_still_has_its_table(tmp_path):
    a = evaluate.read_finished(four_by_two(tmp_path / "a.jsonl"))
    b = evaluate.read_finished(four_by_two(tmp_path / "b.jsonl", model="n"))
    b.questions = 2
    text = evaluate.report([a, b])
    assert "| n | 50.0% |" in text and "no verdict: d and d are different problems" in text
    assert sod.results_table({"m": a.correct(), "n": b.correct()}) in text  # as in the model card


# --- The paper's table --------------------------------------------------------------------------

def test_the_papers_rows_agree_with_their_own_means():
    rows = [line.split() for line in evaluate.PAPER_ROWS.split("\n") if line]
    assert len(rows) == 15 and set(map(len, rows)) == {7}
    for *_, a, b, c, d, mean in rows:
        assert float(mean) == pytest.approx(sum(map(float, (a, b, c, d))) / 4, abs=0.0101)


def test_measured_rows_stand_under_the_row_they_belong_to(tmp_path):
    names = ["aime2024", "aime2025", "gpqa_diamond", "livecodebench_v6"]
    usual = {name: value for name, value in PAPER.items() if name not in ("k", "runs")}
    four = [four_by_two(tmp_path / f"{name}.jsonl", 2, data=name, **usual) for name in names]
    world = four_by_two(tmp_path / "w.jsonl", model="a|b", data="world", limit=2, top_p=0.5)
    files = [f"0.6B/sod={path}" for path in four] + [str(world)]
    lines = evaluate.paper_table(files).splitlines()
    head = "| model | method | AIME24 | AIME25 | GPQA-Diamond | LiveCodeBench-v6 | mean | world |"
    assert lines[0] == head and len(lines) == 2 + 15 + 2
    place = next(n for n, line in enumerate(lines) if line.startswith("| 0.6B | sod |"))
    assert lines[place] == "| 0.6B | sod | 20.84 | 26.13 | 22.19 | 27.72 | 24.22 |  |"
    cells = lines[place + 1].split(" | ")
    assert cells[:2] == ["| 0.6B", "**m, average@4 of 2**"] and cells[6:] == ["50.00", " |"]
    assert all(re.fullmatch(r"50\.00 ± 0\.00 \(.*\)", cell) for cell in cells[2:6])
    label = "a\\|b, average@4 of 1, limit 2, top_p 0.5"
    assert lines[-1].startswith(f"|  | **{label}** |  |  |  |  |  | 50.00 (")
    assert evaluate.paper_table(four[:3]).splitlines()[-1].split(" | ")[-1] == " |"  # no mean
    with pytest.raises(ValueError, match="measure AIME24 in the same way"):
        evaluate.paper_table([four[0], str(four[0])])
    with pytest.raises(ValueError, match="8B/sod is not in the paper's table; choose"):
        evaluate.paper_table([f"8B/sod={world}"])


# --- The command line ---------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["--k", "0"], "k is 0; it must be at least 1"), (["--top_p", "1.5"], "top_p is 1.5"),
    (["--temperature", "0"], "temperature is 0"), (["--dates", "may"], "dates is 'may'"),
    (["--kk", "1"], "unrecognized"), (["--table", "x", "--k", "2"], "makes no use of --k"),
    (["--download", "x", "--data", "world"], "makes no use of --data"),
    (["--rescore", "x", "--table", "y"], "not allowed with"), (["--k", "many"], "invalid int"),
])
def test_wrong_options_are_a_sentence_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ("", "no file of samples"), ("{}\n", "no file of samples"), ("[]\n", "no file of samples"),
    ("[]\n" * 3, "no file of samples"), ("x\n", "line 1: found broken JSON"),
    ('{"model": "m"}\n', "no file of samples"),
])
def test_wrong_files_are_a_sentence_and_status_1(text, message, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(text)
    assert evaluate.main(["--table", str(tmp_path / "a.jsonl")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_broken_line_amid_a_file_is_named(tmp_path, capsys):
    path = four_by_two(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    for bad, message in (("{", "line 4: found broken JSON"), ("{}", "line 4: found no sample"),
                         (lines[3].replace("true", "1").replace("false", "0"), "no sample")):
        path.write_text("\n".join(lines[:3] + [bad] + lines[4:]) + "\n")
        assert evaluate.main(["--compare", str(path), str(path)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--model", "/nowhere"], "there is no folder '/nowhere'"), (["--data", "nowhere"], "neither"),
    (["--table", "/nowhere.jsonl"], "does not exist"), (["--rescore", "/nowhere.jsonl"], "exist"),
    (["--download", "world"], "cannot be downloaded"),
    (["--model", STUDENT, "--max_response", "5000"], "reads 1024 tokens"),
    (["--model", STUDENT, "--max_prompt", "4"], "longer than 4 tokens"),
])
def test_what_is_not_there_is_a_sentence_and_status_1(argv, message, tmp_path, capsys):
    assert evaluate.main([*argv] + ["--out", str(tmp_path)] * ("--model" in argv)) == 1
    assert message in capsys.readouterr().err


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
