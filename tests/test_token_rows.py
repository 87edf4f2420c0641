"""Rows for tokens that a model never learnt (data/token_rows.py)."""
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from conftest import WORLD, sod, tiny

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
import token_rows
import tools

CALL = tools.render_tool_call("print(6 * 7)")


def unlearnt(folder, tied):
    """A Qwen2 of random weights, in a folder, for which the two tokens are one."""
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student")
    model = tiny("Qwen2", vocab_size=len(tokenizer) + 8, tie_word_embeddings=tied)
    opening, closing = tokenizer.convert_tokens_to_ids(token_rows.TOKENS)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[[opening, closing]] = table[-1].clone()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return opening, closing


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_are_one_row_get_rows_of_their_own(tied, tmp_path, capsys):
    opening, _ = unlearnt(tmp_path / "source", tied)
    assert token_rows.main([str(tmp_path / "source"), str(tmp_path / "lent")]) == 0
    assert "<tool_call> has the row of '<', </tool_call> has the row of" in capsys.readouterr().out
    tokenizer = sod.load_tokenizer(tmp_path / "lent")
    before, after = (sod.load_model(tmp_path / name, "cpu", torch.float32)
                     for name in ("source", "lent"))
    ids = torch.tensor([tokenizer.encode("Say so.\n")])
    assert tokenizer.encode(CALL)[0] == opening
    piece = tokenizer.encode("<")[0]
    with torch.no_grad():
        old, new = (model(ids).logits[0, -1] for model in (before, after))
    assert torch.allclose(new[opening], 1.1 * new[piece], rtol=0.02)
    others = [i for i in range(len(tokenizer)) if i not in tokenizer.convert_tokens_to_ids(
        token_rows.TOKENS)]
    assert torch.allclose(old[others], new[others], atol=0.02)  # bf16


def test_a_model_that_tells_them_apart_is_left_as_it_is(tmp_path, capsys):
    assert token_rows.main([str(WORLD / "student"), str(tmp_path / "lent")]) == 1
    assert "tells <tool_call> and </tool_call> apart; train it as it is" in capsys.readouterr().err
    assert not (tmp_path / "lent").exists()
