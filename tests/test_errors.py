from __future__ import annotations

import copy

import pytest

from instructue_feast import errors


def every_error() -> list[type[errors.InstructueError]]:
    found, pending = [], [errors.InstructueError]
    while pending:
        cls = pending.pop()
        found.append(cls)
        pending += cls.__subclasses__()
    return found


@pytest.mark.parametrize("cls", every_error())
def test_errors_keep_their_attributes_across_process_borders(cls):
    one = cls("what happened", "how to mend it")
    again = copy.copy(one)  # copies through __reduce__, as pickle does
    assert type(again) is cls
    assert (again.message, again.hint) == ("what happened", "how to mend it")
    rebuilt = errors.error_from_name(cls.__name__, one.message, one.hint)
    assert type(rebuilt) is cls
    assert "Hint: how to mend it" in str(rebuilt)


def test_each_kind_of_error_has_its_own_exit_code_family():
    assert errors.ConfigError.exit_code == 2
    assert errors.SchemaError.exit_code == errors.DataError.exit_code == 3
    assert errors.PublishConflictError.exit_code == errors.RunConflictError.exit_code == 7


def test_a_long_list_of_names_is_cut():
    assert errors.listed([f"n{i:02d}" for i in range(40)], limit=2) == "[n00, n01, and 38 more]"
