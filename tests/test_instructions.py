from __future__ import annotations

import pytest

from instructue_feast.errors import ConfigError
from instructue_feast.instructions import Instruction, InstructionRegistry


def test_an_instruction_is_identified_by_its_content_not_by_its_id():
    one, other = Instruction("a", "Will  they\tleave?"), Instruction("b", "Will they leave?")
    assert one.content_hash == other.content_hash
    assert one.content_hash != Instruction("a", "Will they stay?").content_hash
    assert one.content_hash != Instruction("a", "Will they leave?", soft_prompt="abc").content_hash


@pytest.mark.parametrize("text", ["a <USER> b", "x </bill>", "<|im_end|>", "[SEP] y", "nul\x00", "x" * 2001])
def test_prompt_markup_in_an_instruction_is_refused(text):
    with pytest.raises(ConfigError):
        Instruction("a", text)


@pytest.mark.parametrize("name", ["", "A", "1a", "a-b", "a__b", "a b", "x" * 70])
def test_an_id_that_cannot_be_a_feature_name_is_refused(name):
    with pytest.raises(ConfigError, match="feature name"):
        Instruction(name, "text")


def test_an_unknown_instruction_lists_those_that_exist():
    registry = InstructionRegistry([Instruction("churn", "x"), Instruction("taste", "y")])
    with pytest.raises(ConfigError, match=r"unknown instruction 'chrun'(?s:.)*did you mean churn"):
        registry.select(["taste", "chrun"])
    assert [one.id for one in registry.select(["taste", "churn"])] == ["taste", "churn"]
    assert [one.id for one in registry.select(None)] == ["churn", "taste"]
