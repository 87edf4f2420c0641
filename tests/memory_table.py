"""What fits into a GPU's memory: `python tests/memory_table.py`, in two or three minutes.

Scores and one update at full size on tensors without data (memory.py), for `--preset gpu` and a 4B
teacher in bf16: rollouts of 5,120 tokens, read one at a time, which is the least that a run shrinks
to, or twelve (--micro_batch_tokens 0). A GPU fits where a tenth of it stays free. Sampling shrinks
by itself, too: a rollout's KV cache takes .5 GiB.
"""
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from memory import peak_of_iteration, sod

GPUS = (16, 24, 40, 48, 80)  # GiB
CONFIG = sod.Config(**sod.PRESETS["gpu"])
ROWS = [(student, offload, rollouts) for student in ("0.6B", "1.7B")
        for offload, rollouts in (("none", 12), ("none", 1), ("teacher", 1), ("all", 1))]


def row(student, offload, rollouts):
    """A line of the table."""
    most = peak_of_iteration(replace(CONFIG, offload=offload), student, "4B", CONFIG.max_prompt,
                             CONFIG.max_response, rollouts)
    peak = max(most.values())
    gpu = next((f"{size} GB" for size in GPUS if peak <= 0.9 * size), "none")
    cells = [student, offload, str(rollouts), *(f"{size:.1f}" for size in most.values()), gpu]
    return f"| {' | '.join(cells)} |"


def main():
    print("| student | `--offload` | rollouts side by side | at rest, GiB | scoring | gradient | "
          "AdamW | fits into |\n|---|---|---|---|---|---|---|---|")
    with ProcessPoolExecutor(2) as pool:
        for line in pool.map(row, *zip(*ROWS)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
