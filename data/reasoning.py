"""Problems that a short program solves, from reasoning-gym, for a real model on a CPU.

    pip install reasoning-gym
    python data/reasoning.py FOLDER

Makes train.jsonl (1,760 problems to learn from), test.jsonl (327 others to measure on) and
worked.jsonl, one worked example for --examples. reasoning-gym (Apache-2.0) makes each problem from
a seed; it is needed for these files alone.
"""
import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sod_mini as sod
import tools

TASKS = ["count_primes", "gcd", "lcm", "letter_counting", "base_conversion", "products",
         "count_bits", "chain_sum", "basic_arithmetic", "leg_counting", "simple_equations"]
# Seeds near each other give the same problems: item n of seed s is item n - 1 of seed s + 1.
TRAIN_SEED, TEST_SEED, TRAIN_SIZE, TEST_SIZE = 1, 900_001, 160, 30

WORKED = [
    {"role": "user", "content": "What is the sum of the squares of the numbers from 3 to 40?"},
    {"role": "assistant",
     "content": "```python\nprint(sum(n * n for n in range(3, 41)))\n```"},
    {"role": "tool", "content": "22135"},
    {"role": "assistant", "content": "\\boxed{22135}"}]


def problems(create_dataset, seed, size):
    """Rows of task, question and answer: `size` of each task, shuffled."""
    rows = [{"task": task, "question": item["question"].strip(), "answer": str(item["answer"])}
            for task in TASKS for item in create_dataset(task, size=size, seed=seed)]
    random.Random(seed).shuffle(rows)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the three files are written")
    options = parser.parse_args(argv)
    try:
        from reasoning_gym import create_dataset
    except ModuleNotFoundError as error:
        raise tools.UserError("the problems come from the package reasoning-gym, which cannot be "
                              f"imported, for {error.name} is not installed: pip install "
                              "reasoning-gym") from None
    train = problems(create_dataset, TRAIN_SEED, TRAIN_SIZE)
    known = {row["question"] for row in train}
    test = [row for row in problems(create_dataset, TEST_SEED, TEST_SIZE)
            if row["question"] not in known]
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in [("train.jsonl", train), ("test.jsonl", test),
                       ("worked.jsonl", [{"messages": WORKED}])]:
        path = options.folder / name
        tools.write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{path}  {len(rows):,} rows")


if __name__ == "__main__":
    sys.exit(sod.run_command(partial(main, None)))
