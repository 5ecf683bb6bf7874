"""Instructions: what an embedding should be about, in words."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from instructue_feast.errors import ConfigError, did_you_mean

ID_PATTERN = re.compile(r"^[a-z][a-z0-9_]{0,62}$")
"""An instruction id becomes a feature name and a table name in every online store, so it is kept to this."""

MAX_TEXT_CHARS = 2_000
_MARKUP = re.compile(r"</?\w+>|<\|.*?\|>|\[(?:CLS|SEP|PAD|MASK|UNK|INST)\]")


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction, identified by a hash of its content.

    Args:
        id: Name of the feature the embedding is served under, `[a-z][a-z0-9_]*` without a double underscore.
        text: What the embedding should be about. Empty gives the general-purpose embedding of the paper.
        soft_prompt: Optional digest of a tuned soft prompt that is placed before `<USER>`.

    Raises:
        ConfigError: The id is not usable as a feature name, or the text holds prompt markup such as `<USER>`.

    Example:
        >>> Instruction("churn", "Will the shopper stop coming?").id
        'churn'
    """

    id: str
    text: str
    soft_prompt: str | None = None
    content_hash: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not ID_PATTERN.match(self.id) or "__" in self.id:
            raise ConfigError(
                f"instruction id {self.id!r} cannot be a feature name",
                "use a lower-case letter, then lower-case letters, digits and single underscores, 63 at most",
            )
        text = " ".join(unicodedata.normalize("NFC", self.text).split())
        if len(text) > MAX_TEXT_CHARS:
            raise ConfigError(
                f"instruction {self.id!r} is {len(text)} characters long, {MAX_TEXT_CHARS} at most", "shorten its text"
            )
        found = _MARKUP.search(text)
        if found or "\x00" in text:
            raise ConfigError(
                f"instruction {self.id!r} holds prompt markup ({found.group() if found else 'NUL'})",
                "write the instruction as plain words",
            )
        object.__setattr__(self, "text", text)
        content = json.dumps({"text": text, "soft_prompt": self.soft_prompt}, sort_keys=True, ensure_ascii=False)
        object.__setattr__(self, "content_hash", hashlib.sha256(content.encode()).hexdigest())


class InstructionRegistry(Mapping[str, Instruction]):
    """The instructions of a project, by id, in the order of the config.

    Raises:
        ConfigError: Two instructions share an id, or an unknown id is asked for.
    """

    def __init__(self, instructions: Iterable[Instruction]) -> None:
        self._by_id: dict[str, Instruction] = {}
        for instruction in instructions:
            if instruction.id in self._by_id:
                raise ConfigError(f"instruction id {instruction.id!r} is declared twice", "give each its own id")
            self._by_id[instruction.id] = instruction

    def __getitem__(self, key: str) -> Instruction:
        try:
            return self._by_id[key]
        except KeyError:
            raise ConfigError(f"unknown instruction {key!r}", did_you_mean(key, self._by_id)) from None

    def __contains__(self, key: object) -> bool:
        return key in self._by_id

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def select(self, ids: Iterable[str] | None) -> tuple[Instruction, ...]:
        """Returns the named instructions in the order asked for; all of them for `None`."""
        return tuple(self._by_id.values()) if ids is None else tuple(self[one] for one in ids)
