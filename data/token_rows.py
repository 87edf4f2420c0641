"""Rows for tokens that a model never learnt: <tool_call> and </tool_call> of Qwen2.5-Coder.

    python data/token_rows.py MODEL FOLDER

The template of this model has Hermes tool calls. But the two tokens that enclose a call have the
same row in embedding and head as 270 ids that nobody uses. They are 20 nats too unlikely to be
sampled, and a cold start at a usual learning rate moves all of these rows together. Here each of
the two tokens gets the row of the piece of text that it begins with ("<", "</"). The row is made a
tenth longer, so that the token is likelier than the piece. A model that tells the two tokens apart
is left as it is.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sod_mini as sod

TOKENS = ["<tool_call>", "</tool_call>"]


@torch.no_grad()
def lend_rows(model, tokenizer):
    """Change embedding and head, (vocabulary, hidden) each, in place. Returns {token: the piece
    whose row it got}, empty where the model tells the two TOKENS apart."""
    rows = tokenizer.convert_tokens_to_ids(TOKENS)
    pieces = [tokenizer.encode(token[:-1], add_special_tokens=False)[0] for token in TOKENS]
    tables = {table.weight.data_ptr(): table.weight  # one, where the head is tied
              for table in (model.get_input_embeddings(), model.get_output_embeddings())}.values()
    if any(torch.cosine_similarity(*table[rows].float(), 0) < 0.99 for table in tables):
        return {}
    for table in tables:
        table[rows] = 1.1 * table[pieces]
    return dict(zip(TOKENS, map(tokenizer.decode, pieces)))


def command(source, target):
    tokenizer = sod.load_tokenizer(source)
    model = sod.load_model(source, "cpu", torch.bfloat16)
    if not (lent := lend_rows(model, tokenizer)):
        raise sod.UserError(f"{source} tells {' and '.join(TOKENS)} apart; train it as it is")
    model.save_pretrained(target)
    model.shipped_generation.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"{target}: " + ", ".join(f"{token} has the row of {piece!r}"
                                    for token, piece in lent.items()))


def main(argv=None):
    """The exit status."""
    source, target = sys.argv[1:] if argv is None else argv
    return sod.run_command(lambda: command(source, target), "begin again")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main())
