"""Do the premises of SOD hold in a world? One batch of rollouts, measured.

    python data/premises.py                 data/world, about a minute
    python data/premises.py --world FOLDER  another that make_world.py has made

SOD trusts the teacher by d_1 / d_k. This can help only where student and teacher differ a little
at every step, much where the teacher is lost, and little again after a recovery. The two functions
`drift_premises` and `competence_premises` say what this means in numbers. The world is made so that
these premises hold; how the methods rank in it is another question.

The pattern of a step says what became of the calls before it:
    first, clean    the first step, and later ones before which no call has failed
    after one       the last call failed, the one before it did not
    after more      the last two calls failed, or more
    recovered       a call has failed before, and the last one worked
"""
import argparse
import re
import sys
from collections import defaultdict
from functools import partial
from math import inf
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import numpy as np

import make_world
import sod_mini as sod
import tools

PATTERNS = ("first", "clean", "after one", "after more", "recovered")

# --- What a batch shows ----------------------------------------------------------------------


def step_patterns(rollout):
    """The pattern of each step of a rollout."""
    found, failures, before = [], 0, False
    for k, turn in enumerate(rollout.turns):
        found.append("first" if k == 0 else "after one" if failures == 1 else
                     "after more" if failures else "recovered" if before else "clean")
        failures = failures + 1 if turn.failed else 0
        before |= turn.failed
    return found


def without_lost(batch):
    """The Batch without the rollouts that the machine failed, for they have no scores."""
    return batch.select([i for i, r in enumerate(batch.rollouts) if not r.lost])


def drift(batch):
    """{pattern: (steps, median d, mean w, the teacher's mean entropy)}, entropy in nats a token."""
    batch = without_lost(batch)
    steps, entropy = defaultdict(list), sod.step_entropy(batch)
    for i, rollout in enumerate(batch.rollouts):
        for k, pattern in enumerate(step_patterns(rollout)):
            steps[pattern].append([float(x[i, k]) for x in (batch.d, batch.w, entropy)])
    rows = {pattern: np.array(steps.get(pattern, [[np.nan] * 3])) for pattern in PATTERNS}
    return {pattern: (len(steps[pattern]), np.median(d), w.mean(), h.mean())
            for pattern, (d, w, h) in ((pattern, row.T) for pattern, row in rows.items())}


def instructions(question):
    """(program, operand) of each instruction of a question."""
    found = []
    for sentence in re.findall(r"[A-Z][^.]*\.", question)[1:]:
        for text, program, _ in make_world.INSTRUCTIONS:
            form = re.escape(text).replace(r"\{a\}", r"(\d+)")
            if match := re.fullmatch(form, sentence):
                found.append((program, "".join(match.groups())))
    return found


def right_calls(rollout):
    """(pattern, is it right?) of each call, up to the first wrong one that the tool has answered.

    A call is right if it carries out the next instruction with its numbers; its check digits do
    not matter. An answer before the last instruction counts as a wrong call.
    """
    question = rollout.problem.question
    steps, x = instructions(question), re.search(r"\d+", question)[0]
    for pattern, turn in zip(step_patterns(rollout), rollout.turns):
        if not steps:
            return
        program, a = steps[0]
        call = tools.parse_tool_call(turn.text)
        code = (call.code if call else "").partition("  #")[0]
        right = code == f"print({program.format(x=x, a=a)})"
        yield pattern, right
        if not right and not turn.failed:
            return
        if right and not turn.failed:
            x, steps = turn.tool_text.strip(), steps[1:]


def share_of_right_calls(rollouts):
    """{pattern: share of right calls}"""
    calls = defaultdict(list)
    for rollout in rollouts:
        for pattern, right in right_calls(rollout):
            calls[pattern].append(right)
    return {pattern: float(np.mean(calls[pattern])) if calls[pattern] else np.nan
            for pattern in PATTERNS}


def success(rollouts):
    """{how its calls failed: (rollouts, share of correct ones)}"""
    groups = defaultdict(list)
    for rollout in rollouts:
        patterns = step_patterns(rollout)
        groups["two failures in a row" if "after more" in patterns else
               "single failures" if "after one" in patterns else
               "no failed call"].append(rollout.correct)
    return {name: (len(groups[name]), float(np.mean(groups[name])) if groups[name] else np.nan)
            for name in ("no failed call", "single failures", "two failures in a row")}


# --- The premises ----------------------------------------------------------------------------


def times(a, b):
    """a over b, nan where b is 0 because there was nothing to count."""
    return a / b if b else np.nan


def drift_premises(batch):
    """[(premise, measured, least, most)] of a batch of any iteration."""
    by_pattern, d_1 = drift(batch), without_lost(batch).d[:, 0]
    _, d, w, entropy = by_pattern["clean"]
    _, d_one, _, _ = by_pattern["after one"]
    _, d_more, w_more, entropy_more = by_pattern["after more"]
    return [
        ("(a) d_1, median", float(d_1.median()), 0.1, 0.5),
        ("(a) share of rollouts with d_1 under .02", float((d_1 < 0.02).float().mean()), 0, 0.05),
        ("(b) w on clean later steps, mean", w, 0.8, 1.1),
        ("(c) d after one failed call, over that of clean steps", times(d_one, d), 1.5, 4),
        ("(c) d after two and more, over that of clean steps", times(d_more, d), 4, inf),
        ("(c) the teacher's entropy there, over that on clean steps", times(entropy_more, entropy),
         4, inf),
        ("(c) w there, mean", w_more, 0, 0.4),
        ("(d) w after a recovery, mean", by_pattern["recovered"][2], 0.65, inf)]


def competence_premises(student, teacher):
    """[(premise, measured, least, most)] of rollouts of both models."""
    calls, solved = share_of_right_calls(student), success(teacher)
    return [
        ("(d) the teacher's success with single failures, over that without a failed call",
         times(solved["single failures"][1], solved["no failed call"][1]), 0.75, inf),
        ("(d) the student's right calls after a failed one, over those on clean steps",
         times(calls["after one"], calls["clean"]), 0.5, inf),
        ("(d) the student's right calls after a recovery, over those on clean steps",
         times(calls["recovered"], calls["clean"]), 0.5, inf)]


def files_of(world):
    """The options of sod_mini.py that name the files of a world."""
    files = {"train_data": "train.jsonl", "eval_data": "heldout.jsonl", "student": "student",
             "teacher": "teacher", "demonstrations": "demonstrations.jsonl"}
    return {name: str(Path(world) / file) for name, file in files.items()}


def sample_world(world, problems=64, **changes):
    """A scored Batch of the student, 8 rollouts a problem, and as many rollouts of the teacher; in
    both without those that the machine failed."""
    config = sod.Config(prompts=problems, group_size=8, num_minibatches=1, iterations=1,
                        **files_of(world) | changes)
    agent = sod.load_agent(config)
    with agent.tool:
        _, batch = next(sod.train(agent))
        prompts = sod.draw(agent.train_set, config, 1, problems, 8)
        teachers = sod.sample_rollouts(agent, agent.teacher, prompts, (config.seed, "teacher", 1))
    return without_lost(batch), [r for r in teachers if not r.lost]


def describe(batch, teachers):
    """Yield lines of text: the numbers of each pattern, and whether the premises hold."""
    ours, theirs = map(share_of_right_calls, (batch.rollouts, teachers))
    yield (f"{'pattern':11} steps  median d  mean w  teacher's entropy  right calls: student, "
           "teacher")
    for name, (steps, d, w, entropy) in drift(batch).items():
        yield (f"{name:11}{steps:6}{d:10.2f}{w:8.2f}{entropy:19.2f}{ours[name]:21.2f}"
               f"{theirs[name]:9.2f}")
    for name, rollouts in (("student", batch.rollouts), ("teacher", teachers)):
        parts = [f"{100 * share:.0f}% of {n} with {group}"
                 for group, (n, share) in success(rollouts).items()]
        cut = np.mean([r.finish_reason in ("length", "turns") for r in rollouts])
        yield (f"{name}: correct {100 * np.mean([r.correct for r in rollouts]):.0f}%, "
               f"{', '.join(parts)}; cut off {100 * cut:.0f}%")
    for name, value, least, most in (drift_premises(batch)
                                     + competence_premises(batch.rollouts, teachers)):
        verdict = "holds" if least <= value <= most else "DOES NOT HOLD"
        yield f"{name:82} {value:6.3f}  {least:4} to {most:4}  {verdict}"


def command(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--world", type=Path, default=ROOT / "world", help="[data/world]")
    parser.add_argument("--silent_persist", type=float, default=sod.Config.silent_persist,
                        help="chance that a silent tool stays so [as in sod_mini.py]")
    parser.add_argument("--problems", type=int, default=64, help="problems to sample [64]")
    given = parser.parse_args(argv)
    batch, teachers = sample_world(given.world, given.problems,
                                   silent_persist=given.silent_persist)
    print(*describe(batch, teachers), sep="\n")


def main(argv=None):
    """The exit status."""
    return sod.run_command(partial(command, argv), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
