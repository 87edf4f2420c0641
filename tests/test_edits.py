"""The scripts are there to be edited: an edit works, or ends with its reason.

Each test edits a copy of the scripts as a reader would, and runs it as a command. So that this
takes seconds, the command runs in a fork of this process, which has imported all that is slow.
"""
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback

import pytest

import sod_mini as sod
from conftest import ROOT, WORLD, a_dozen, json_lines

SMALL = dict(iterations=1, prompts=2, group_size=2, num_minibatches=1, max_response=100,
             overlong_buffer=0, preset="world", train_data="few.jsonl", eval_data="", name="run")
LAST_FIELD = '    resume: str = ""  '
SCHEME = '    "uniform": lambda batch, c: torch.ones_like(batch.d),\n'
REWARD = "    return reward - penalty\n"
ADVANTAGE = "    batch.A = group_advantages(batch.reward, config.group_size)\n"
SANDBOX = "    check_sandbox(rollouts)\n    #"
DIFFS = re.findall(r"```diff\n(.*?)```\n`python (.*?)`",
                   (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The code of the models, which transformers imports when the first one is made."""
    sod.skeleton(WORLD / "student")


@pytest.fixture
def scripts(tmp_path):
    """A folder with a copy of the scripts, the embedded world and a dozen problems of it."""
    a_dozen(tmp_path)
    for name in ("sod_mini", "tools", "evaluate"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


def edit(scripts, old, new, name="sod_mini.py"):
    """Replace a text that stands once in a script."""
    text = (scripts / name).read_text(encoding="utf-8")
    assert text.count(old) == 1, (
        f"this test edits a copy of {name} where it says {old!r}; if you have changed that line "
        "yourself, this test says nothing about your change")
    (scripts / name).write_text(text.replace(old, new), encoding="utf-8")


def edit_by_diff(scripts, diff):
    """Replace the old lines of each hunk by the new ones, wherever they stand; the added lines."""
    name, hunks = re.fullmatch(r"--- a/(\S+)\n\+\+\+ b/\1\n(@@.*)", diff, re.S).groups()
    for old_lines, new_lines, hunk in re.findall(
            r"@@ -\d+,(\d+) \+\d+,(\d+) @@.*\n((?:[ +-].*\n)+)", hunks):
        old, new = ([line[1:] for line in hunk.splitlines(True) if line[0] in signs]
                    for signs in (" -", " +"))
        assert (len(old), len(new)) == (int(old_lines), int(new_lines)), "the sizes after @@ are so"
        edit(scripts, "".join(old), "".join(new), name)


def fork(scripts, script, *arguments, screen=None):
    """The exit status of `python script arguments` in that folder."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        if screen:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(screen.fileno(), number)
                setattr(sys, name, open(number, "w", closefd=False))
        os.chdir(scripts)
        for name in ("sod_mini", "tools", "evaluate"):
            sys.modules.pop(name, None)
        sys.path.insert(0, str(scripts))
        sys.argv = [str(script), *map(str, arguments)]
        # A run has evaluate.py write its page in a process of its own; here this is a fork, too.
        subprocess.run = lambda command, stdout: subprocess.CompletedProcess(
            command, fork(scripts, *command[1:]), b"")
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture
def python(scripts):
    """A function: python(script, ...) is the exit status and what came to the screen."""
    def run(script, *arguments):
        with open(scripts / "screen", "w+", encoding="utf-8") as screen:
            status = fork(scripts, script, *arguments, screen=screen)
        return status, (scripts / "screen").read_text(encoding="utf-8")
    return run


def words(**changes):
    """The options of a small run."""
    options = {**SMALL, **changes}
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture
def train(python, scripts):
    """A function: train(...) is the rollouts of a small run, which ends well and has a page."""
    def run(*first, **changes):
        status, said = python("sod_mini.py", *first, *words(**changes))
        assert status == 0 and (scripts / "runs/run/rollouts.html").exists(), said
        return json_lines(scripts / "runs/run/rollouts.jsonl")
    return run


def column(rows, *names):
    """The named values of each step of all rollouts."""
    return [tuple(turn[name] for name in names) for row in rows for turn in row["turns"]]


# --- The diffs of README.md -------------------------------------------------------------------


def readme_diff(scripts, word):
    """Apply the diff that has the word, and that word's alone; the arguments of its command."""
    (diff, command), = [pair for pair in DIFFS if word in pair[0]]
    edit_by_diff(scripts, diff)
    script, *arguments = command.split()
    assert script == "sod_mini.py"
    return arguments


def test_readme_has_three_short_diffs():
    assert len(DIFFS) == 3 and all(3 <= diff.count("\n") - 3 <= 8 for diff, _ in DIFFS)


def test_the_weights_of_readme_are_those_of_the_run(scripts, train):
    steps = column(train(*readme_diff(scripts, "WEIGHTS")), "d", "w")
    assert len(steps) > 8 and all(w == pytest.approx(1 / (1 + d), abs=2e-4) for d, w in steps)


def test_the_advantage_of_readme_is_the_reward_minus_the_mean_of_its_group(scripts, train):
    rows = train(*readme_diff(scripts, "group_advantages"), group_size=4)
    rewards = [row["reward"] for row in rows]
    expected = [r - sum(rewards[i // 4 * 4:][:4]) / 4 for i, r in enumerate(rewards)]
    assert [row["advantage"] for row in rows] == pytest.approx(expected, abs=1e-3)
    assert max(expected) > 0.01  # not all rewards are equal


def test_the_reward_of_readme_costs_each_token(scripts, train):
    arguments = readme_diff(scripts, "outcome_reward")
    cost = float(arguments[arguments.index("--token_cost") + 1])
    for row in train(*arguments):
        calls = sum(turn["outcome"] != "" for turn in row["turns"])
        free = 1.0 if row["correct"] else -1.0 + 0.1 * min(calls, 4)
        tokens = (free - row["reward"]) / cost
        assert tokens == pytest.approx(round(tokens), abs=0.06)
        assert sum(len(turn["tokens"]) for turn in row["turns"]) <= round(tokens) <= 100


# --- Settings -----------------------------------------------------------------------------------


def test_a_default_that_is_edited_holds_and_what_a_preset_replaces_is_told(scripts, python):
    edit(scripts, "    lr: float = 3e-4", "    lr: float = 5e-5")
    fields = "    mine: int = 3\n    other: int = 4  # for 5% of it\n"
    edit(scripts, LAST_FIELD, fields + LAST_FIELD)
    (scripts / "check.py").write_text(
        "import sod_mini as sod\n"
        "for arguments in ([], ['--preset', 'world'], ['--preset', 'gpu', '--lr', '4e-5',\n"
        "                  '--train_data', 'x']):\n"
        "    config, preset = sod.parse_config(arguments)\n"
        "    sod.print_start(preset)\n"
        "    print(config.lr, config.mine, config.other)\n")
    status, said = python("check.py")
    lines = said.splitlines()
    assert status == 0 and lines[1] == lines[3] == "5e-05 3 4" and lines[6] == "4e-05 3 4"
    assert lines[4].startswith("preset  gpu; ") and ", lr 1e-06, " in lines[5]
    shown = python("sod_mini.py", "--help")[1]
    assert re.search(r"--mine int +\[3\]\n", shown)
    assert re.search(r"--other int +for 5% of it \[4\]\n", shown)


@pytest.mark.parametrize("default", ["(1, 2)", "field(default_factory=list)"])
def test_a_setting_of_another_kind_ends_with_a_sentence(scripts, python, default):
    edit(scripts, LAST_FIELD, f"    mine: list[int] = {default}\n" + LAST_FIELD)
    assert python("sod_mini.py", *words()) == (1, "error: Config.mine is of the type list[int]; an "
                                               "option can be bool, int, float or str\n")


def test_a_group_of_one_ends_with_a_sentence(python):
    status, said = python("sod_mini.py", *words(group_size=1))
    assert status == 2 and said.endswith("error: group_size is 1, and sod compares the rollouts "
                                         "of a group: use 2 or more\n")


# --- Reward, advantage, weights, methods ----------------------------------------------------------


def test_a_setting_of_the_reward_alone_troubles_nobody_else(scripts, python, train):
    """Whole numbers are rewards, too."""
    edit(scripts, LAST_FIELD, "    penny: int = 7\n" + LAST_FIELD)
    edit(scripts, REWARD, "    return config.penny * len(rollout.turns)\n")
    assert all(row["reward"] == 7 * len(row["turns"]) for row in train())
    assert python("evaluate.py", "--page", "runs/run")[0] == 0
    for _ in range(2):
        status, said = python("evaluate.py", "--limit", 2, "--k", 1,
                              "--model", "data/world/student")
        assert status == 0 and "| data/world/student | " in said, said
    # What is stored is not sampled again, though there may have been an edit in the meantime.
    assert "2 of 2 samples were in runs/evaluate/" in said and "delete that file" in said


def test_calls_are_rewarded_where_wrong_is_worth_0(scripts, train):
    edit(scripts, "1.0 if rollout.correct else -1.0", "1.0 if rollout.correct else 0.0")
    for row in train():
        calls = sum(turn["outcome"] != "" for turn in row["turns"])
        assert row["reward"] == (1 if row["correct"] else pytest.approx(0.1 * min(calls, 4)))
        assert calls


def test_a_reward_that_is_no_number_stops_the_run(scripts, python):
    edit(scripts, REWARD, "    return math.nan\n")
    status, said = python("sod_mini.py", *words())
    assert status == 1 and "AssertionError: a reward is nan or infinite" in said


def test_advantages_may_be_of_tokens(scripts, train):
    """The stored one is their mean over the tokens that the student sampled."""
    edit(scripts, ADVANTAGE, "    batch.A = 0.5 * batch.sampled\n")
    rows = train(method="grpo")
    assert {row["advantage"] for row in rows} == {0.5}
    assert {A for values, in column(rows, "token_advantages") for A in values} == {0.5}


@pytest.mark.parametrize("weights, line, more, sentence", [
    ("sod", ADVANTAGE, "    batch.A = batch.A.view(2, 2)\n",
     r"advantages are of rollouts \(4,\) or of tokens \(4, \d+\), not \(2, 2\)"),
    ("mine", SCHEME, '    "mine": lambda batch, c: batch.d.mean(1, keepdim=True),\n',
     r"weights are of steps \(4, \d\), not \(4, 1\)"),
], ids=["advantages", "weights"])
def test_a_wrong_shape_ends_with_both_shapes(scripts, python, weights, line, more, sentence):
    edit(scripts, line, line + more)
    status, said = python("sod_mini.py", *words(weights=weights))
    assert status == 1 and re.search(f"AssertionError: {sentence}\n$", said), said


def test_a_mask_can_be_a_weight_scheme_and_its_run_is_shown_when_it_is_gone(scripts, python, train):
    mine = '    "mine": lambda batch, c: batch.d < 0.5,\n'
    edit(scripts, SCHEME, SCHEME + mine)
    steps = column(train(weights="mine"), "d", "w")
    assert steps and all(w == (d < 0.5) for d, w in steps)
    edit(scripts, mine, "")
    (scripts / "runs/run/rollouts.html").unlink()
    assert python("evaluate.py", "--page", "runs/run")[0] == 0
    assert "with the weights mine" in (scripts / "runs/run/rollouts.html").read_text()
    status, said = python("sod_mini.py", "--resume", "runs/run")
    assert status == 2 and re.search(r"does not fit this sod_mini.py \(weights is 'mine'; .*\)"
                                     "; bring back what the run was started with", said), said


def test_a_script_of_ones_own_adds_a_scheme_without_an_edit(scripts, python):
    (scripts / "mine.py").write_text(
        "import sod_mini as sod\n"
        "sod.WEIGHTS['half'] = lambda batch, c: sod.WEIGHTS['sod'](batch, c) / 2\n"
        f"sod.main({words(weights='half')})\n")
    status, said = python("mine.py")
    assert status == 0 and (scripts / "runs/run/rollouts.html").exists(), said
    rows = json_lines(scripts / "runs/run/rollouts.jsonl")
    assert {row["turns"][0]["w"] for row in rows} == {0.5}


def test_a_method_of_ones_own_trains(scripts, train):
    edit(scripts, "METHODS = {\n", 'METHODS = {\n    "mine": Method("teacher", False, True),\n')
    steps = column(train(method="mine", weights="uniform"), "logp_s", "logp_t", "token_advantages")
    assert all(A == pytest.approx(t - s, abs=2e-3) for step in steps for s, t, A in zip(*step))


# --- Errors, and how a run goes on -----------------------------------------------------------


def test_a_bug_in_the_making_of_prompts_is_no_fault_of_the_template(scripts, python):
    line = "    own_system = [m for m in before if"
    edit(scripts, line, f'    last["nothing"]\n{line}')
    status, said = python("sod_mini.py", *words())
    assert status == 1 and said.endswith("KeyError: 'nothing'\n"), said
    assert "in encode_prompt" in said


def test_a_bug_is_a_traceback_and_a_resumed_run_names_what_has_changed(scripts, python):
    """The data change while the run is under way: it has read them as they were before."""
    bug = ('    if iteration == 2:\n        Path("few.jsonl").open("a").write("\\n")\n'
           "        print(max([]))\n")
    edit(scripts, SANDBOX, bug + SANDBOX)
    options = words(iterations=3, save_every=0)
    # As a process of its own, once.
    run = subprocess.run([sys.executable, "sod_mini.py", *options], cwd=scripts, text=True,
                         capture_output=True)
    number = (scripts / "sod_mini.py").read_text().splitlines().index("        print(max([]))") + 1
    assert run.returncode == 1 and f'sod_mini.py", line {number}, in train_step' in run.stderr
    assert run.stderr.endswith("ValueError: max() arg is an empty sequence\n")
    assert "saved runs/run/saves/iteration-1\n" in run.stderr
    edit(scripts, bug, "")
    edit(scripts, "    lr: float = 3e-4", "    lr: float = 5e-5")
    status, said = python("sod_mini.py", "--resume", "runs/run")
    assert status == 0 and re.findall("NOTE: (.*)", said) == [
        "few.jsonl has changed since this run was last started",
        "sod_mini.py has changed since this run was last started"]
    assert "resumed runs/run after iteration 1; its settings come from its config.json" in said
    assert '"lr": 0.0003' in (scripts / "runs/run/config.json").read_text()
    assert len(json_lines(scripts / "runs/run/metrics.jsonl")) == 3
