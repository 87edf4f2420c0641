"""What fits into a GPU's memory, by the plan: `python tests/memory_table.py`, in seconds.

Predicted for `--preset gpu` and a 4B teacher, in bf16, with a tenth of the memory left free. The
first line of OFFLOADS that fits is shown.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1]))
import sod_mini as sod

QWEN3 = {"0.6B": (1024, 28, 16, 3072), "1.7B": (2048, 28, 16, 6144), "4B": (2560, 36, 32, 9728)}
OFFLOADS = ["none", "teacher", "all"]


def shape(name):
    """The Shape of a Qwen3 model: its numbers from its config, its weights counted."""
    D, layers, heads, F = QWEN3[name]
    with torch.device("meta"):
        return sod.Shape.of(AutoModelForCausalLM.from_config(Qwen3Config(
            vocab_size=151_936, hidden_size=D, num_hidden_layers=layers, intermediate_size=F,
            num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
            tie_word_embeddings=True)))


def row(student, teacher, gigabytes, **changes):
    """(offload, config with its sizes, peak in bytes) of what fits, or None."""
    room = (1 - sod.MARGIN) * gigabytes * sod.GIB
    for offload in OFFLOADS:
        config = sod.Config(**{**sod.PRESETS["gpu"], "offload": offload, **changes})
        config = sod.sized(config, student, teacher, 2, room)
        peak = sod.peak(sod.memory_plan(config, student, teacher, 2))
        if peak <= room:
            return offload, config, peak
    return None


def main():
    shapes = {name: shape(name) for name in QWEN3}
    print("| student | GPU | `--offload` | rollouts at once | micro-batch tokens | peak |")
    print("|---|---|---|---|---|---|")
    for student in ("0.6B", "1.7B"):
        for gigabytes in (16, 24, 40, 80):
            found = row(shapes[student], shapes["4B"], gigabytes)
            cells = ["does not fit", "", "", ""]
            if found:
                offload, config, peak = found
                cells = [offload, str(config.rollout_batch), f"{config.micro_batch_tokens:,}",
                         f"{peak / sod.GIB:.1f} GiB"]
            print(f"| {student} | {gigabytes} GB | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
