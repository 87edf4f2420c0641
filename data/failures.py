"""A gallery of failures: what goes wrong in training, what the numbers look like, and what helps.

    python data/failures.py                     writes data/study/failures.md, in some minutes

Each failure is provoked by options of sod_mini.py in the embedded world. Shown are the numbers of
the last iteration, the health lines of the run, and one real rollout.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

import sod_mini as sod
import tools

BASE = dict(preset="world", eval_data="", iterations=3, prompts=8, group_size=4, num_minibatches=1,
            show_every=0, save_every=0, store_tokens=0)
PAGE = ROOT / "study" / "failures.md"
SHOWN = ("correct", "frac_zero_std_groups", "d", "w", "entropy", "teacher_entropy", "tool_calls",
         "tool_fail", "cut_length", "repeated", "length")


@dataclass(frozen=True)
class Failure:
    title: str
    options: dict
    which: object  # function of a row of rollouts.jsonl: the rollout with the largest is shown
    what: str      # what one sees
    helps: str     # what one does


def mean(values):
    return sum(values) / max(len(values), 1)


def repeats(row):
    """The share of a turn's text that stood in it before, in its most repetitive turn."""
    return max((sod.repeated_share([list(turn["text"])]) for turn in row["turns"]), default=0)


d_of = lambda row: [turn["d"] for turn in row["turns"] if turn.get("d") is not None]
failed = lambda row: [turn["outcome"] not in sod.OK_OUTCOMES for turn in row["turns"]]

FAILURES = [
    Failure("Nothing: how a healthy run looks", {},
            lambda row: (row["correct"], any(failed(row)), -len(row["turns"])),
            "Right and wrong in most groups; d rises where a call fails and falls when the student "
            "has recovered.", "Compare the others with it."),
    Failure("A tool that falls silent", dict(silent_rate=0.6, silent_persist=0.9),
            lambda row: sum(failed(row)),
            "Most calls fail, and hardly a rollout is right. d grows after failures, and w takes "
            "the teacher's word away.",
            "Look at the outcomes in metrics.jsonl first: this is the machine's fault, or the "
            "timeout's (`--tool_timeout`), and no lesson for the student."),
    Failure("A lost teacher", dict(silent_rate=0.4),
            lambda row: max([d for d, *two in zip(d_of(row)[2:], failed(row), failed(row)[1:])
                             if all(two)], default=0),
            "After two failed calls in a row this world's teacher no longer knows how to go on: "
            "its entropy rises, and d with it, whatever the student does then.",
            "That is what w is for; where it happens often, a teacher that has seen failures."),
    Failure("The first step is known by heart (d_1 near 0)",
            dict(student=f"{sod.WORLD}/teacher", teacher=f"{sod.WORLD}/teacher", lr=1e-3),
            lambda row: max(d_of(row)[1:] or [0]) if d_of(row)[0] < sod.NEAR_0 else 0,
            "The student starts as a copy of its teacher, so d_1 is near 0. As soon as a later "
            "step differs at all, its w is near 0: distillation is off for the rest of the "
            "rollout.",
            "`--weights floor`, or a student less like its teacher in what every rollout begins "
            "with."),
    Failure("A context that the teacher does not know",
            dict(teacher_system="Answer in French, in rhymes, and never write a program."),
            lambda row: mean(d_of(row)),
            "d is twice that of a healthy run, from the first step on and everywhere alike; so w "
            "is near 1, and SOD trusts a teacher that speaks of something else. No rule sees it.",
            "Give both the same context; a cold start that both have had."),
    Failure("A student that never ends its turn", dict(init="random"),
            lambda row: len(row["turns"][-1]["text"]),
            "Most rollouts are cut, none is right, and the entropy is that of a random choice.",
            "Imitate first (`--method sft`); with a model of your own, see that the end token of "
            "its template is the one that its tokenizer ends with."),
    Failure("A loop", dict(lr=3e-3, iterations=8), repeats,
            "Too large a step, and turns begin to repeat themselves. This teacher is surprised, "
            "and d is large. A pretrained one may go on with the loop itself: on a real pair d "
            "was .06 in one (real_pair.md), so d alone does not find loops.",
            "A lower `--lr`; begin again from the last save before it."),
    Failure("Reward without the tool", dict(method="grpo", tool_shaping=False, silent_rate=0.9,
                                            silent_persist=0.9, lr=2e-3, iterations=8),
            lambda row: -len(row["turns"]),
            "Where calls bring nothing, the student stops to call, and does not come back.",
            "Mend the tool; keep `--tool_shaping`, which pays a little for calls."),
    Failure("Entropy gone", dict(method="grpo", temperature=0.2, lr=5e-4, iterations=8),
            lambda row: (not row["correct"], -len(row["turns"])),
            "The student grows certain of what it does, right or wrong, and what it no longer "
            "samples it cannot learn.",
            "A lower `--lr` or a higher `--temperature`."),
]


def provoke(failure, folder):
    """Run it; (numbers of the last iteration, all health lines, the rollout to show)."""
    options = {**BASE, **failure.options, "out": folder, "name": "run"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()):
        sod.main(words)
    rows, numbers = ([json.loads(line) for line in (Path(folder) / "run" / name).open()]
                     for name in ("rollouts.jsonl", "metrics.jsonl"))
    lines = list(dict.fromkeys(sentence for n in range(len(numbers))
                               for sentence in sod.news(numbers[:n + 1])))
    return numbers[-1], lines, max(rows, key=failure.which)


def section(failure, numbers, lines, row):
    options = " ".join(f"--{name} {value}" for name, value in failure.options.items())
    yield f"## {failure.title}\n"
    if options:
        yield f"`{options}`\n"
    yield failure.what + "\n"
    yield "| " + " | ".join(name for name in SHOWN if name in numbers) + " |"
    yield "|" + "---|" * sum(name in numbers for name in SHOWN)
    yield "| " + " | ".join(f"{numbers[name]:.2f}" for name in SHOWN if name in numbers) + " |\n"
    for line in lines:
        yield f"    health: {line}"
    yield ("" if lines else "No health line.") + "\n```"
    yield f"{row['question']}  [answer {row['answer']}, {row['reason']}]"
    for k, turn in enumerate(row["turns"], start=1):
        trust = f"d {turn['d']:.2f}  w {turn['w']:.2f}  " if turn.get("d") is not None else ""
        call = tools.HERMES.parse(turn["text"])
        wrote = (call.code if call and call.code else turn["text"]).strip()
        yield (f"step {k}  {trust}{wrote[:70]!r}"
               + (f"  ({turn['outcome']})" if turn["outcome"] else ""))
    yield "```\n"
    yield f"What helps: {failure.helps}\n"


def page(results):
    yield "# A gallery of failures\n"
    yield ("Made by `python data/failures.py`, which provokes each in the embedded world; the "
           "numbers are those of the last of 3 or 8 iterations of 32 rollouts, as `batch_metrics` "
           "explains them.\n")
    for result in results:
        yield from section(*result)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE, help=f"the page [{PAGE.name}]")
    parser.add_argument("--only", default="", help="those whose title holds this text")
    options = parser.parse_args(argv)
    if options.only and options.out == PAGE:
        parser.error("--only makes a part of the page: name another file for it with --out")
    chosen = [failure for failure in FAILURES if options.only in failure.title]
    if not chosen:
        parser.error(f"no title holds {options.only!r}; they are: "
                     + "; ".join(failure.title for failure in FAILURES))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for failure in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results.append((failure, *provoke(failure, folder)))
        print(failure.title, file=sys.stderr)
    tools.write_whole(options.out, "\n".join(page(results)))


if __name__ == "__main__":
    sys.exit(sod.run_command(partial(main, None)))
