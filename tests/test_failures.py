"""The gallery of failures is what data/failures.py makes."""
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import failures


def test_a_section_shows_numbers_health_and_the_rollout_with_its_weights():
    row = {"question": "q", "answer": "1", "reason": "wrong", "correct": False, "turns": [
        {"text": "\\boxed{2}", "outcome": "", "d": 0.25, "w": 1.0},
        {"text": '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(1)"}}\n'
                 "</tool_call>", "outcome": "timeout", "d": 1.0, "w": 0.25}]}
    text = "\n".join(failures.section(failures.FAILURES[1], {"d": 0.5, "repeated": 0.125},
                                      ["w is low"], row))
    for part in ("## A tool that falls silent", "`--silent_rate 0.6 --silent_persist 0.9`",
                 "| d | repeated |", "| 0.50 | 0.12 |", "    health: w is low",
                 "step 1  d 0.25  w 1.00  '\\\\boxed{2}'",
                 "step 2  d 1.00  w 0.25  'print(1)'  (timeout)"):
        assert part in text


def test_the_page_has_every_failure_of_the_table_in_its_order():
    page = failures.PAGE.read_text()
    places = [page.index(f"## {failure.title}\n") for failure in failures.FAILURES]
    assert places == sorted(places) and page.count("\n## ") == len(places)


def test_a_title_that_does_not_exist_is_refused_and_a_folder_is_made_before_the_work(
        tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        failures.main(["--only", "Typo", "--out", str(tmp_path / "page.md")])
    assert stop.value.code == 2 and "no title holds 'Typo'" in capsys.readouterr().err
    page = tmp_path / "new" / "page.md"
    monkeypatch.setattr(failures, "provoke", lambda *_: [page.parent.exists() or pytest.fail()])
    monkeypatch.setattr(failures, "page", lambda results: ["made"])
    failures.main(["--only", "falls silent", "--out", str(page)])
    assert page.read_text() == "made"


@pytest.mark.slow
def test_a_failure_is_provoked_again(tmp_path):
    failures.main(["--only", "falls silent", "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "of tool calls fail" in page and "(timeout)" in page
