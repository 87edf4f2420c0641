"""The page of a run: what it may do, what it shows, and where its numbers come from."""
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

import evaluate
import sod_mini as sod
import tools

TEMPLATE = evaluate.TEMPLATE.read_text(encoding="utf-8")
HOSTILE = ("</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>&amp;@NAME@"
           "\u2028\u2029\ud800")


# --- Rows: what a run stores --------------------------------------------------------------------


def scored_batch(tokenizer, method="sod"):
    """Two rollouts of two steps and of one, with numbers to follow by hand."""
    first, second = (sod.encode(tokenizer, text + "<|im_end|>") for text in ("1", "2"))
    rollouts = [
        sod.Rollout(tools.Problem("q", "2"), [0], [sod.Turn(first, "1", "error", "no", [0]),
                                                   sod.Turn(second, "2")]),
        sod.Rollout(tools.Problem("q", "3"), [0], [sod.Turn(second, "2")])]
    batch = sod.collate(rollouts, "cpu")
    batch.logp_s = torch.full(batch.ids.shape, -0.25)
    batch.A = torch.tensor([0.70711, -0.70711])
    if method == "sod":
        batch.logp_t = batch.logp_s - torch.where(batch.step_id == 2, 1.0, 0.5)
        batch.d = sod.step_divergence(batch.logp_s, batch.logp_t, batch.step_id)
        batch.w = sod.step_weights(batch.d)
    batch.advantages = sod.token_advantages(method, batch.A, batch.logp_s, batch.logp_t,
                                            batch.step_id, batch.w)
    return batch, len(first)


def rows_of(batch, tokenizer, with_tokens=2):
    return json.loads(json.dumps(list(sod.rollout_rows(batch, 7, tokenizer, with_tokens))))


def test_rows_hold_the_scores_of_each_token_of_each_step(tokenizer):
    batch, n = scored_batch(tokenizer)
    row, other = rows_of(batch, tokenizer)
    one, two = row["turns"]
    assert row["iteration"] == 7
    assert row["advantage"] == 0.7071 and other["advantage"] == -0.7071
    assert (one["d"], one["w"], two["d"], two["w"]) == (0.5, 1.0, 1.0, 0.5)
    assert one["logp_s"] == [-0.25] * n and one["logp_t"] == [-0.75] * n
    assert two["logp_t"] == [-1.25] * n
    assert one["token_advantages"] == [0.207] * n  # .70711 + 1 * (-.5), three decimals
    assert two["token_advantages"] == [0.207] * n  # .70711 + .5 * (-1)
    assert (one["tool"], two["tool"], one["outcome"]) == ("no", None, "error")
    for turn in (*row["turns"], *other["turns"]):
        assert "".join(turn["tokens"]) == turn["text"] + "<|im_end|>"


def test_without_a_teacher_none_is_stored_and_only_so_many_rollouts_keep_their_tokens(tokenizer):
    row, other = rows_of(scored_batch(tokenizer, "grpo")[0], tokenizer, with_tokens=1)
    assert other["turns"][0].keys() == {"text", "outcome", "d", "w", "entropy_t", "tool"}
    turn = row["turns"][0]
    assert "logp_t" not in turn and turn["d"] is None and turn["w"] is None
    assert set(turn["token_advantages"]) == {0.707}


def test_what_json_does_not_know_is_stored_as_null(tokenizer):
    batch, n = scored_batch(tokenizer)
    batch.logp_t[:] = -torch.inf
    row, _ = rows_of(batch, tokenizer)
    assert row["turns"][0]["logp_t"] == [None] * n
    assert sod.plain([1.5, float("nan"), [float("inf"), 2]]) == [1.5, None, [None, 2]]


# --- The page -----------------------------------------------------------------------------------


def a_turn(text="1 ", outcome="ok", tool="2", **changes):
    return {"text": text, "outcome": outcome, "d": 0.31, "w": 1.0, "tool": tool,
            "tokens": [text, "<|im_end|>"], "logp_s": [-0.1, -0.2], "logp_t": [-1.3, -0.25],
            "token_advantages": [-0.493, 0.657]} | changes


def a_row(iteration, turns=(), **changes):
    return {"iteration": iteration, "question": "1 + 1", "answer": "2", "correct": True,
            "reason": "correct", "reward": 1.0, "advantage": 0.707, "finish_reason": "answer",
            "turns": list(turns) or [a_turn(), a_turn("2", "", None)]} | changes


def a_run(folder, rows, curves=(), **changes):
    """The files of a run, as sod_mini.py writes them."""
    folder.mkdir(exist_ok=True)
    config = vars(sod.Config()) | {"name": folder.name, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for name, lines in (("rollouts.jsonl", rows), ("metrics.jsonl", curves)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
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


def page_of(folder, *iterations):
    evaluate.write_page(folder, *iterations)
    reader = Reader((folder / "rollouts.html").read_text(encoding="utf-8"))
    data, code = (entry for entry in reader.all("script"))
    assert data[1] == {"type": "application/json", "id": "data"}
    assert not set("<>&") & set(data[2])  # nothing in it can end the element, or be an entity
    return reader, json.loads(data[2]), code[2]


def test_no_request_can_leave_the_page_and_its_policy_lets_it_fetch_nothing(tmp_path):
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
    policy = next(a["content"] for _, a, _ in reader.all("meta")
                  if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'",
                     "script-src": "'unsafe-inline'", "style-src": "'unsafe-inline'"}


def test_markup_in_model_text_and_in_names_is_inert(tmp_path):
    turn = a_turn(HOSTILE, HOSTILE, HOSTILE)
    plain, _, _ = page_of(a_run(tmp_path / "r", [a_row(1)]))
    row = a_row(1, [turn], question=HOSTILE, truth="@DATA@", finish_reason=HOSTILE)
    folder = tmp_path / "<img src=x onerror=alert(1)>&amp;@DATA@\udcff"
    reader, data, _ = page_of(a_run(folder, [row], name=""))
    assert [tag for tag, _, _ in reader.found] == [tag for tag, _, _ in plain.found]
    (shown,) = data["iterations"]["1"]
    assert shown == row | {"patterns": ["erroneous"]} and data["name"] == folder.name
    raw = (folder / "rollouts.html").read_text(encoding="utf-8")
    assert "<img" not in raw and not set("\u2028\u2029") & set(raw)
    assert "<title>Rollouts of &lt;img src=x onerror=alert(1)&gt;&amp;amp;@DATA@" in raw


def test_the_script_makes_text_nodes_only_and_finds_every_element_it_names():
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "Function(", "setTimeout", "srcdoc", "DOMParser", "createContextualFragment"):
        assert word not in TEMPLATE
    named = set(re.findall(r'\$\("(\w+)"\)', TEMPLATE))
    assert len(named) > 8 and all(f'id="{name}"' in TEMPLATE for name in named)


def test_every_number_on_the_page_stands_in_the_files_of_the_run(tmp_path):
    rows = [a_row(n, reward=reward) for n in (1, 2) for reward in (1.0, -0.9)]
    curves = [{"iteration": n, "reward": 0.05, "d_by_step": [0.31, None]} for n in (1, 2)]
    _, data, code = page_of(a_run(tmp_path / "r", rows, curves))
    assert data["iterations"] == {
        str(n): [row | {"patterns": ["stable", "stable"]} for row in rows if row["iteration"] == n]
        for n in (1, 2)}
    assert data["curves"] == curves
    for name in set(re.findall(r"\bdata\.(\w+)", code)):
        assert name in data


def test_patterns_come_from_what_became_of_the_calls_alone():
    for outcomes, found in [
            (["ok", "ok", ""], "stable stable stable"),
            (["timeout"], "erroneous"),
            (["ok", "error", "malformed", "not_run"], "stable erroneous erroneous erroneous"),
            (["error", "output_truncated", "", "error"], "erroneous recovery recovery erroneous")]:
        assert evaluate.patterns(outcomes) == found.split()


def test_without_a_choice_the_page_holds_the_first_the_middle_and_the_last_iteration(tmp_path):
    folder = a_run(tmp_path / "r", [a_row(n) for n in range(1, 10)])
    assert list(page_of(folder)[1]["iterations"]) == ["1", "5", "9"]
    assert list(page_of(folder, "7", "2")[1]["iterations"]) == ["2", "7"]
    assert list(page_of(a_run(tmp_path / "s", [a_row(4)]))[1]["iterations"]) == ["4"]
    assert page_of(folder)[1]["about"].endswith("Shown: 3 of 9 iterations.")


def test_the_page_tells_what_the_method_of_the_run_does(tmp_path):
    def told(**changes):
        _, data, _ = page_of(a_run(tmp_path / "r", [a_row(1)], **changes))
        return data["about"].split(". ")[0], data["worth"]
    about, worth = told(teacher="T", opd_coef=0.5, weights="decay")
    assert about.startswith("Method sod with the weights decay, ") and about.endswith("by T")
    assert worth == "advantage + 0.5 · w · (log p teacher − log p student)"
    assert told(method="opd_only")[1].startswith("1.0 · w ·")
    assert told(method="sod_only", kl="full")[1].startswith("0, for the exact")
    assert told(method="opsd_gt")[0].endswith("by its own frozen start")
    assert told(method="grpo") == (f"Method grpo, student {sod.Config.student}, scored by nobody",
                                   "advantage")


def test_a_run_of_sft_has_curves_and_neither_rollouts_nor_words_about_a_teacher(tmp_path):
    curves = [{"iteration": 1, "loss": 2.5}]
    _, data, code = page_of(a_run(tmp_path / "s", [], curves, method="sft"))
    assert data["about"].endswith("Shown: 0 of 0 iterations.") and not data["iterations"]
    assert data["curves"] == curves and not data["scored"]
    assert '$("trust").hidden = !data.scored' in code


def test_rollouts_without_tokens_are_shown_all_the_same_and_nan_is_null(tmp_path):
    bare = {name: a_turn()[name] for name in ("text", "outcome", "d", "w", "tool")}
    _, data, _ = page_of(a_run(tmp_path / "r", [a_row(1, [bare, bare | {"d": math.nan}])]))
    assert data["iterations"]["1"][0]["turns"] == [bare, bare | {"d": None}]


def test_a_rollout_that_the_machine_failed_has_no_numbers_and_is_in_no_count(tmp_path):
    stored = a_turn(outcome="sandbox_error", d=0.0, w=1.0, tokens=[])  # as older versions wrote it
    lost = [a_row(1, [turn], finish_reason="infrastructure", correct=False)
            for turn in (stored, stored | {"d": None, "w": None})]
    _, data, code = page_of(a_run(tmp_path / "r", [a_row(1), *lost]))
    kept, *failed = data["iterations"]["1"]
    assert kept["turns"][0]["d"] == 0.31 and failed[0] == failed[1]
    assert failed[0]["turns"] == [{"text": "1 ", "outcome": "sandbox_error", "tool": "2"}]
    kinds = code[code.index("const kinds"):code.index("let rows")].split("\n")
    assert 'const failed = rollout => rollout.finish_reason === "infrastructure"' in code
    assert sum("counted(rows" in line for line in kinds) == 4  # all but the two that show it


@pytest.mark.parametrize("line, sentence", [
    ("{broken", "line 2: found broken JSON"), ("[1]", "line 2: found a list"),
    ('{"step": 1, "question": "q", "turns": []}', "line 2: found no rollout with iteration"),
    ('{"iteration": 1, "question": "q"}', "line 2: found no rollout with iteration, turns"),
    (json.dumps(a_row(1, ["text"])), "line 2: found no rollout"),
    (json.dumps(a_row(1, [{"text": "t"}])), "line 2: found no rollout")])
def test_a_broken_row_is_one_sentence_and_the_older_page_stays(tmp_path, capsys, line, sentence):
    folder = a_run(tmp_path / "r", [a_row(1)])
    (folder / "rollouts.html").write_text("older")
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write(line + "\n" + '{"still being writ')
    assert evaluate.main(["--page", str(folder)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said and (folder / "rollouts.html").read_text() == "older"


def test_bad_usage_is_one_sentence(tmp_path, capsys):
    def said(*arguments):
        assert evaluate.main([str(a) for a in arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line
    assert "gone/config.json does not exist" in said("--page", tmp_path / "gone")
    folder = a_run(tmp_path / "r", [a_row(1), a_row(3)])
    assert "iteration 2 is not in" in said("--page", folder, 2)
    (folder / "config.json").write_text("[1]")
    assert "config.json: found a list" in said("--page", folder)


@pytest.mark.parametrize("stored", [dict(method="ppo"), dict(weights="sqrt"), dict(gone=True)])
def test_a_run_of_a_method_or_scheme_that_is_gone_can_still_be_looked_at(tmp_path, stored):
    folder = a_run(tmp_path / "r", [a_row(1)], **stored)
    _, data, _ = page_of(folder)
    assert str([*stored.values()][0]) in data["about"] or "gone" in stored


def test_a_page_that_cannot_be_written_is_told_and_does_no_harm(tmp_path, capfd):
    sod.write_page(tmp_path / "gone")
    assert "does not exist" in capfd.readouterr().err
