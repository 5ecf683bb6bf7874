"""`InstructUEConfig`: what a saved model is, without its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedConfig

from instructue_feast.errors import ConfigError, VersionMismatchError, listed

FORMAT = 3
"""Layout of `config.json` and of the weights' names. Raise it when older folders could not be read."""

PREAMBLE = "The behaviour of one user, source by source, the oldest first."

INSTRUCTION_TOKENS = 128


class InstructUEConfig(PreTrainedConfig):  # type: ignore[misc]
    """Settings of an `InstructUEModel`.

    Attributes:
        sources: Source names in order; the position is the `source_index` of packed histories.
        numeric_columns: `[source, group, column]` of each position of `tabular_numeric`.
        encoders: Text encoder by source.
        encoder_dims: Vector size by encoder.
        encoder_digests: Version by encoder; checked on load.
        llm: The base LLM: alias, folder or hub name. Its weights are never part of a saved model.
        llm_digest: Hash of the base LLM's files; checked on load.
        hidden_size: Hidden size of the LLM.
        llm_layers: Layers of the LLM that are kept, from the first; 0 for all. Its vocabulary head stays.
        embedding_dim: Size of the user embedding.
        adapter_dim: Middle size of the adapters; 0 for the size of the encoder.
        focus_dim: Size of the focus keys; 0 for the largest encoder.
        projection_dim: Middle size of the projection.
        instruction_tokens: Room for an instruction and its soft prompt; the prefix begins at this position.
        prompt_texts: Newest texts of each source that stand in the prompt; 0 for all. Summaries and focus see all.
        focus_token: Whether each instruction gets its focus token.
        summary_tokens: Whether sources and user get summary tokens.
        transformer_dim: Hidden size of a small Transformer, all trained, in place of the LLM's layers; 0 for the LLM.
        preamble: Text at the head of every prompt.
        seed: Seed the weights were initialised from.
        history_digest: `InstructueConfig.history_digest()` of the training data, if any.
        trained: Whether any weight was ever trained.
        trained_through: ISO time up to which events were seen in training; a later `as_of` does not leak.
        format: Layout of the folder.
    """

    model_type = "instructue"

    sources: list[str] | None = None
    numeric_columns: list[list[str]] | None = None
    encoders: dict[str, str] | None = None
    encoder_dims: dict[str, int] | None = None
    encoder_digests: dict[str, str] | None = None
    llm: str = ""
    llm_digest: str = ""
    hidden_size: int = 0
    llm_layers: int = 0
    embedding_dim: int = 128
    adapter_dim: int = 0
    focus_dim: int = 0
    projection_dim: int = 512
    instruction_tokens: int = INSTRUCTION_TOKENS
    prompt_texts: int = 0
    focus_token: bool = True
    summary_tokens: bool = True
    transformer_dim: int = 0
    preamble: str = PREAMBLE
    seed: int = 0
    history_digest: str | None = None
    trained: bool = False
    trained_through: str | None = None
    format: int = FORMAT

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not isinstance(self.sources or [], list | tuple):
            raise TypeError(f"sources must be a list of names, not {type(self.sources).__name__}")
        self.sources = list(self.sources or [])
        self.numeric_columns = [list(one) for one in self.numeric_columns or []]
        self.encoders = dict(self.encoders or {})
        self.encoder_dims = dict(self.encoder_dims or {})
        self.encoder_digests = dict(self.encoder_digests or {})
        missing = [name for name in self.sources if name not in self.encoders]
        if missing:
            raise ConfigError(f"model config: no encoder for sources {listed(missing)}", "name one for every source")
        unknown = {source for source, _, _ in self.numeric_columns} - set(self.sources)
        if unknown:
            raise ConfigError(f"model config: numeric columns of unknown sources {listed(unknown)}", "declare them")
        if self.format != FORMAT:
            raise VersionMismatchError(
                f"the model was saved in format {self.format}, this release reads {FORMAT}", "install that release"
            )

    @property
    def encoder_names(self) -> list[str]:
        """The distinct encoders, sorted."""
        return sorted(set((self.encoders or {}).values()))

    @property
    def numeric_groups(self) -> list[tuple[str, str, list[int]]]:
        """`(source, group, positions in tabular_numeric)` in order; each is one soft token."""
        groups: dict[tuple[str, str], list[int]] = {}
        for position, (source, group, _) in enumerate(self.numeric_columns or []):
            groups.setdefault((source, group), []).append(position)
        return [(source, group, positions) for (source, group), positions in groups.items()]

    def identity(self) -> str:
        """Hash of all settings that determine an embedding, apart from weights.

        Models are identified by their digests, not by name or path, so moving a folder changes nothing.
        """
        encoders, digests = self.encoders or {}, self.encoder_digests or {}
        settings = {
            "sources": [[name, digests[encoders[name]]] for name in self.sources or []],
            "numeric_columns": self.numeric_columns,
            "llm": self.llm_digest,
            "dims": [self.hidden_size, self.embedding_dim, self.adapter_dim, self.focus_dim, self.projection_dim],
            "prompt": [
                self.instruction_tokens,
                self.prompt_texts,
                self.focus_token,
                self.summary_tokens,
                self.preamble,
            ],
            "llm_layers": self.llm_layers,
            "format": self.format,
        }
        if self.transformer_dim:  # models with an LLM keep the versions they have
            settings["transformer_dim"] = self.transformer_dim
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
