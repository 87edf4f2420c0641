"""The page of a run: what it may do, what it shows, and where its numbers come from."""
import base64
import hashlib
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
import sod_mini as sod
import tools

QWEN = ROOT.parent / "shared" / "qwen3-tokenizer"
WORLD = ROOT / "data" / "world" / "student"
HOSTILE = ("</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>&amp;@STYLE@"
           "\u2028\u2029\ud800")


@pytest.fixture(params=["world", "qwen3"], scope="module")
def tokenizer(request):
    if request.param == "qwen3" and not QWEN.exists():
        pytest.skip("the real Qwen3 tokenizer is not here")
    return AutoTokenizer.from_pretrained(QWEN if request.param == "qwen3" else WORLD)


# --- Rows: what a run stores --------------------------------------------------------------------


def test_token_pieces_join_to_the_text_also_where_a_token_ends_inside_a_character(tokenizer):
    ids = sod.encode(tokenizer, "naïve 東京 \U0001f9ff\U0001fae8 x\n<tool_call><|im_end|>")
    pieces = sod.token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert "" in pieces and pieces[-1] == "<|im_end|>"
    assert not any("\ufffd" in piece for piece in pieces)


def test_token_pieces_of_bytes_that_are_no_text_still_join_to_what_the_tokenizer_says(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(300) for _ in range(rng.randrange(1, 30))]
        pieces = sod.token_pieces(tokenizer, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)


def scored_batch(tokenizer, method="sod"):
    """Two rollouts of two steps and of one, with numbers to follow by hand."""
    first, second = (sod.encode(tokenizer, text + "<|im_end|>") for text in ("1", "2"))
    K, T = len(first), 1 + 2 * len(first) + 1
    rollouts = []
    for turns, truth in (((first, second), "2"), ((second,), "3")):
        r = sod.Rollout(tools.Problem("q", truth), [0], [-1], 1, reward=1.0, finish="answer")
        for k, ids in enumerate(turns):
            r.extend(ids, k)
            r.extend([0], -1) if k + 1 < len(turns) else None
            r.turns.append(tokenizer.decode(ids, skip_special_tokens=True))
            r.outcomes.append("error" if k + 1 < len(turns) else "")
        r.answers = ["no"] * (len(turns) - 1)
        rollouts.append(r)
    step_id = sod.pad([r.step_id for r in rollouts], -1, "cpu")
    logp_s = torch.full((2, T), -0.25)
    logp_t = logp_s - torch.where(step_id == 1, 1.0, 0.5) if method == "sod" else logp_s
    A, d = torch.tensor([0.70711, -0.70711]), sod.step_divergence(logp_s, logp_t, step_id)
    w = sod.step_weights(d) if method == "sod" else torch.ones_like(d)
    advantages = sod.token_advantages(method, A, logp_s, logp_t, step_id, w)
    return sod.Scored(rollouts=rollouts, step_id=step_id, failed=torch.zeros_like(d).bool(), A=A,
                      logp_t=logp_t, entropy_t=-logp_t, logp_s=logp_s, entropy_s=-logp_s, d=d, w=w,
                      advantages=advantages, fresh=False), K


def test_rows_hold_the_scores_of_each_token_of_each_step(tokenizer):
    scored, n = scored_batch(tokenizer)
    row, other = json.loads(json.dumps(list(sod.rollout_rows(scored, 7, tokenizer, 2))))
    one, two = row["turns"]
    assert row["step"] == 7 and row["advantage"] == 0.7071 and other["advantage"] == -0.7071
    assert (one["d"], one["w"], two["d"], two["w"]) == (0.5, 1.0, 1.0, 0.5)
    assert one["logp_s"] == [-0.25] * n and one["logp_t"] == [-0.75] * n
    assert two["logp_t"] == [-1.25] * n
    assert one["token_advantages"] == [0.207] * n  # .70711 + 1 * (-.5), three decimals
    assert two["token_advantages"] == [0.207] * n  # .70711 + .5 * (-1)
    assert (one["tool"], two["tool"], one["outcome"]) == ("no", None, "error")
    for turn in (*row["turns"], *other["turns"]):
        assert "".join(turn["tokens"]) == turn["text"] + "<|im_end|>"


def test_only_so_many_rollouts_of_a_step_keep_their_tokens(tokenizer):
    first, second = sod.rollout_rows(scored_batch(tokenizer)[0], 1, tokenizer, 1)
    assert "tokens" in first["turns"][0] and second["turns"][0].keys() == evaluate.TURN.keys()


def test_a_run_without_a_teacher_stores_no_teacher(tokenizer):
    (row, _) = sod.rollout_rows(scored_batch(tokenizer, "grpo")[0], 1, tokenizer, 2)
    assert "logp_t" not in row["turns"][0]
    assert set(row["turns"][0]["token_advantages"]) == {0.707}


def test_what_json_does_not_know_is_stored_as_null(tokenizer):
    scored, n = scored_batch(tokenizer)
    scored.logp_t[:] = -torch.inf
    (row, _) = sod.rollout_rows(scored, 1, tokenizer, 2)
    assert row["turns"][0]["logp_t"] == [None] * n
    assert sod.plain([1.5, float("nan"), [float("inf"), 2]]) == [1.5, None, [None, 2]]


def test_quantiles_and_means_by_step_are_those_of_the_steps_that_exist():
    step = torch.tensor([[True, True], [True, False]])
    assert sod.means_by_step(torch.tensor([[1.0, 4.0], [3.0, torch.inf]]), step) == [2.0, 4.0]
    assert sod.quantiles(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])) == pytest.approx(
        [0.4, 1.0, 2.0, 3.0, 3.6])


# --- The page -----------------------------------------------------------------------------------


def a_turn(text="1 ", outcome="ok", tool="2", **changes):
    return {"text": text, "outcome": outcome, "d": 0.31, "w": 1.0, "tool": tool,
            "tokens": [text, "<|im_end|>"], "logp_s": [-0.1, -0.2], "logp_t": [-1.3, -0.25],
            "token_advantages": [-0.493, 0.657]} | changes


def a_row(step, turns=(), **changes):
    return {"step": step, "question": "1 + 1", "truth": "2", "right": True, "reason": "right",
            "reward": 1.0, "advantage": 0.707, "finish": "answer",
            "turns": list(turns) or [a_turn(), a_turn("2", "", None)]} | changes


def a_run(folder, rows, curves=(), **changes):
    """The files of a run, as sod_mini.py writes them."""
    folder.mkdir(exist_ok=True)
    config = vars(sod.Config(**{"name": folder.name, **changes}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curves))
    return folder


class Reader(HTMLParser):
    """What a browser finds: elements with their attributes, and the text of each."""

    def __init__(self, html):
        super().__init__(convert_charrefs=False)
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        self.found.append(["/" + tag, {}, ""])

    def handle_data(self, text):
        if self.found:
            self.found[-1][2] += text

    def all(self, tag):
        return [entry for entry in self.found if entry[0] == tag]


def page_of(folder, steps=()):
    evaluate.write_page(folder, steps)
    reader = Reader((folder / "rollouts.html").read_text(encoding="utf-8"))
    data, code = (entry for entry in reader.all("script"))
    assert data[1] == {"type": "application/json", "id": "data"}
    assert not set("<>&") & set(data[2])  # nothing in it can end the element, or be an entity
    return reader, json.loads(data[2]), code[2]


def test_no_request_can_leave_the_page(tmp_path):
    reader, _, code = page_of(a_run(tmp_path / "r", [a_row(1)]))
    assert {tag for tag, _, _ in reader.found}.isdisjoint(
        {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"})
    assert not any({"src", "href", "style"} & attributes.keys()
                   or any(name.startswith("on") for name in attributes)
                   for _, attributes, _ in reader.found)
    (style,) = reader.all("style")
    assert "url(" not in style[2] and "@import" not in style[2]
    for word in ("fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "import ", "import("):
        assert word not in code


def test_the_policy_allows_one_script_and_one_style_by_hash_and_nothing_else(tmp_path):
    reader, _, code = page_of(a_run(tmp_path / "r", [a_row(1)]))
    policy = next(a["content"] for _, a, _ in reader.all("meta")
                  if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    hashed = lambda text: f"'sha256-{digest(text)}'"
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'",
                     "script-src": hashed(code), "style-src": hashed(reader.all("style")[0][2])}


def test_markup_in_model_text_is_inert(tmp_path):
    turn = a_turn(HOSTILE, HOSTILE, HOSTILE)
    plain, _, _ = page_of(a_run(tmp_path / "r", [a_row(1)]))
    row = a_row(1, [turn], question=HOSTILE, truth="@DATA@", finish=HOSTILE)
    folder = tmp_path / "<img src=x onerror=alert(1)>&amp;@STYLE@"
    reader, data, _ = page_of(a_run(folder, [row], name=""))
    assert [tag for tag, _, _ in reader.found] == [tag for tag, _, _ in plain.found]
    (shown,) = data["steps"]["1"]
    assert shown == row | {"patterns": ["erroneous"]} and data["name"] == folder.name
    raw = (folder / "rollouts.html").read_text()
    assert "onerror" not in re.sub(r'(?s)<script type="application/json".*?</script>', "", raw)
    assert raw.isascii() or not set("\u2028\u2029") & set(raw)


def test_the_script_makes_text_nodes_only_and_finds_every_element_it_names():
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "Function(", "setTimeout", "srcdoc", "DOMParser", "createContextualFragment"):
        assert word not in evaluate.SCRIPT
    named, made = set(re.findall(r'\$\("(\w+)"\)', evaluate.SCRIPT)), evaluate.PAGE
    assert len(named) > 8 and all(f'id="{name}"' in made for name in named)


def test_every_number_on_the_page_stands_in_the_files_of_the_run(tmp_path):
    rows = [a_row(step, reward=reward) for step in (1, 2) for reward in (1.0, -0.9)]
    curves = [{"step": step, "reward": 0.05, "d_by_step": [0.31, None], "tokens": 8}
              for step in (1, 2)]
    _, data, code = page_of(a_run(tmp_path / "r", rows, curves))
    assert data["steps"] == {str(step): [row | {"patterns": ["stable", "stable"]}
                                         for row in rows if row["step"] == step] for step in (1, 2)}
    assert data["curves"] == [{k: v for k, v in row.items() if k != "tokens"} for row in curves]
    for name in evaluate.CURVES + evaluate.TEACHER_CURVES:
        assert f'"{name}"' in code or f".{name}" in code


def test_patterns_come_from_what_became_of_the_calls_alone():
    for outcomes, found in [
            (["ok", "ok", ""], "stable stable stable"),
            (["timeout"], "erroneous"),
            (["ok", "error", "malformed", "not_run"], "stable erroneous erroneous erroneous"),
            (["error", "output_truncated", "", "error"], "erroneous recovery recovery erroneous")]:
        assert evaluate.patterns(outcomes) == found.split()


def test_without_a_choice_the_page_holds_the_first_the_middle_and_the_last_step(tmp_path):
    folder = a_run(tmp_path / "r", [a_row(step) for step in range(1, 10)])
    assert list(page_of(folder)[1]["steps"]) == ["1", "5", "9"]
    assert list(page_of(folder, [7, 2])[1]["steps"]) == ["2", "7"]
    assert page_of(folder)[1]["about"].endswith("Shown: 3 of 9 training steps.")


def test_what_the_words_mean_is_told_for_the_method_of_the_run(tmp_path):
    def said(**changes):
        _, data, _ = page_of(a_run(tmp_path / "r", [a_row(1)], **changes))
        return data["about"].split(". ")[0].split("scored by ")[1], data["words"]
    scorer, words = said(teacher="T", opd_coef=0.5)
    assert scorer == "T" and words["w"].endswith("min(d of step 1 / d of this step, 1 + delta)")
    assert words["token advantage"].startswith(
        "advantage + 0.5 · w · (log p teacher − log p student);")
    assert said(weights="decay")[1]["w"].endswith("decay ^ (steps since the first failed call)")
    assert said(method="opd_only")[1]["token advantage"].startswith("1.0 · w ·")
    assert said(method="sod_only", kl="full")[1]["token advantage"].startswith("0, for the exact")
    assert said(method="opsd_gt")[0] == "its own frozen start, told the answer"
    assert evaluate.SCHEMES.keys() == sod.WEIGHTS.keys()


def test_without_a_teacher_nothing_is_shown_of_one(tmp_path):
    curves = [{"step": 1, "reward": 0.5, "reverse_kl": 0.0, "d_by_step": [0.0]}]
    _, data, _ = page_of(a_run(tmp_path / "r", [a_row(1)], curves, method="grpo"))
    assert not data["scored"] and data["curves"] == [{"step": 1, "reward": 0.5}]
    assert "scored by nobody" in data["about"] and not {"d", "w"} & data["words"].keys()


def test_a_run_of_sft_has_curves_and_no_rollouts(tmp_path):
    _, data, _ = page_of(a_run(tmp_path / "s", [], [{"step": 1, "loss": 2.5}], method="sft"))
    assert data["about"].endswith("No rollouts stored.")
    assert data["steps"] == {} and data["curves"] == [{"step": 1, "loss": 2.5}]


def test_rollouts_of_older_runs_without_tokens_are_shown_all_the_same(tmp_path):
    bare = {name: value for name, value in a_turn().items() if name in evaluate.TURN}
    _, data, _ = page_of(a_run(tmp_path / "r", [a_row(1, [bare, bare | {"d": math.nan}])]))
    assert data["steps"]["1"][0]["turns"] == [bare, bare | {"d": None}]


@pytest.mark.parametrize("line, sentence", [
    ("{broken", "line 2: found no rollout"),
    ('{"step": 1, "question"', "line 2: found broken JSON"),
    ('{"step": 1, "question": "q"}', "line 2: found no rollout; its truth, right, reward"),
    (json.dumps(a_row(1, [a_turn(text=5)])), "line 2: found no step; its text cannot be used"),
    (json.dumps(a_row(1, ["text"])), "line 2: found no step"),
    (json.dumps(a_row(1, [a_turn(logp_s=[0.1])])), "do not hold a number for each token"),
    (json.dumps(a_row(1, [a_turn(logp_t=["a", "b"])])), "do not hold a number for each token"),
])
def test_a_broken_row_is_one_sentence_and_the_older_page_stays(tmp_path, capsys, line, sentence):
    folder = a_run(tmp_path / "r", [a_row(1)])
    (folder / "rollouts.html").write_text("older")
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write(line + "\n")
    assert evaluate.main(["--page", str(folder)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said and (folder / "rollouts.html").read_text() == "older"


def test_bad_usage_is_one_sentence(tmp_path, capsys):
    def said(*arguments):
        assert evaluate.main([str(a) for a in arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line
    assert "there is no folder" in said("--page", tmp_path / "gone")
    assert "config.json does not exist" in said("--page", tmp_path)
    assert "neither rollouts nor metrics" in said("--page", a_run(tmp_path / "e", []))
    folder = a_run(tmp_path / "r", [a_row(1), a_row(3)])
    assert "step 2 is not in" in said("--page", folder, "--step", 2)
    (folder / "config.json").write_text('{"method": "ppo"}')
    assert "method is 'ppo'; choose from" in said("--page", folder)
    (folder / "config.json").write_text("[1]")
    assert "config.json: found a list" in said("--page", folder)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--step", "2"])
    assert stop.value.code == 2 and "--step goes with --page" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_told_and_does_no_harm(tmp_path):
    assert sod.page_of(tmp_path / "gone").startswith("not written (error: there is no folder")
