"""The example in the kernels' README runs as it stands there."""

from __future__ import annotations

import doctest
from pathlib import Path

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_a_user_of_the_package_alone_trains_a_two_tower_model():
    failures, examples = doctest.testfile(str(README), module_relative=False)
    assert examples > 15
    assert failures == 0
