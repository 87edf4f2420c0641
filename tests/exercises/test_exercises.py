"""Judges exercises.py; it fails until they are solved, so the suite leaves it out."""
import pytest

import exercises
from judge import ANSWERS, judge


@pytest.mark.parametrize("name", ANSWERS)
def test(name):
    if said := judge(name, getattr(exercises, name)):
        pytest.fail(f"{name}: {said}", pytrace=False)
