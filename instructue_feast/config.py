"""`instructue.yaml`: the sources, instructions, model and output of a project.

The YAML is validated straight into frozen, slotted dataclasses; unknown keys are refused with the keys that exist.
`${NAME}` and `${NAME:-default}` are replaced from the environment. Relative paths are relative to the YAML file; a
model name is a path when it starts with `./`, `../` or `~`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from instructue_feast.errors import ConfigError, VersionMismatchError, did_you_mean
from instructue_feast.instructions import Instruction, InstructionRegistry
from instructue_feast.question_specs import KINDS, AttributeSpec, GeneratorConfig, UserQAConfig
from instructue_feast.soft_prompt_file import read_soft_prompt
from instructue_feast.template import Field as TemplateField
from instructue_feast.template import parse_template

_STRICT = ConfigDict(extra="forbid")
_SOURCE_NAME = re.compile(r"^[a-z][a-z0-9_]{0,40}$")
_ENV = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class TableConfig:
    """Where a raw table lives: a `path` with a Spark format, or a `catalog` table such as `lake.sales.lines`."""

    path: str | None = None
    catalog: str | None = None
    format: str = "parquet"
    options: dict[str, str] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.catalog is None):
            raise ConfigError("a table needs exactly one of `path` and `catalog`", "keep one of the two keys")

    @property
    def location(self) -> str:
        """What to call this table in a message."""
        return self.catalog or self.path or ""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class UsersConfig:
    """The roster: users listed here get a row even when they have no event at all."""

    table: TableConfig
    user_id: str
    where: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class EventSourceConfig:
    """One event source.

    Attributes:
        table: The raw table.
        user_id: Column of the user id; any type, cast to string.
        time: Timestamp column.
        time_zone: Zone of a timestamp column that carries none.
        event_id: Column or columns that identify an event; all columns of the row when left out. Events whose id
            columns are all null are told apart by the columns named here.
        text: Template of the event text.
        where: SQL conditions a row must meet.
        max_texts: Distinct texts kept per user; also the source's share of the prompt, in tokens.
        rank: Which texts are kept: the most recent, or the most frequent ones.
        days: Window of this source; the project's `history.days` when left out.
        encoder: Text encoder of this source; the project's when left out.
        allow_empty: Accept a raw table without rows.
    """

    kind: Literal["events"] = "events"
    table: TableConfig
    user_id: str
    time: str
    time_zone: str = "UTC"
    event_id: tuple[str, ...] | str = ()
    text: str
    where: tuple[str, ...] = ()
    max_texts: int = Field(default=64, ge=1, le=4096)
    rank: Literal["recency", "frequency"] = "recency"
    days: int | None = Field(default=None, ge=1)
    encoder: str | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        parse_template(self.text)

    @property
    def event_id_columns(self) -> tuple[str, ...]:
        """The id columns as a tuple; empty when the whole row identifies the event."""
        return (self.event_id,) if isinstance(self.event_id, str) else self.event_id

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column of the raw table this source names, without `where` conditions, each once."""
        text = [part.column for part in parse_template(self.text) if isinstance(part, TemplateField)]
        return tuple(dict.fromkeys([self.user_id, self.time, *self.event_id_columns, *text]))


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class TabularSourceConfig:
    """A snapshot source: the last row of each user strictly before `as_of`.

    Attributes:
        table: The raw table.
        user_id: Column of the user id.
        time: Column saying since when a row holds. Without it rows hold forever, which can leak the future.
        time_zone: Zone of a timestamp column that carries none.
        numeric: Numeric columns, as a list (one group) or as `{group: [columns]}`; each group is one soft token.
        categorical: Columns rendered as `column: value`; each value is one soft token.
        where: SQL conditions a row must meet.
        encoder: Text encoder of the categorical values; the project's when left out.
        allow_empty: Accept a raw table without rows.
    """

    kind: Literal["tabular"]
    table: TableConfig
    user_id: str
    time: str | None = None
    time_zone: str = "UTC"
    numeric: dict[str, tuple[str, ...]] | tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    encoder: str | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        if not self.numeric and not self.categorical:
            raise ConfigError("a tabular source needs `numeric` or `categorical` columns", "list at least one column")

    @property
    def numeric_groups(self) -> dict[str, tuple[str, ...]]:
        """Numeric columns by group, in the order of the config."""
        if isinstance(self.numeric, dict):
            return {name: columns for name, columns in self.numeric.items() if columns}
        return {"numeric": self.numeric} if self.numeric else {}

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column of the raw table this source names, each once."""
        numeric = [column for columns in self.numeric_groups.values() for column in columns]
        time = [self.time] if self.time else []
        return tuple(dict.fromkeys([self.user_id, *time, *numeric, *self.categorical]))


SourceConfig = EventSourceConfig | TabularSourceConfig
_AnySource = Annotated[EventSourceConfig | TabularSourceConfig, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class HistoryConfig:
    """How much of the past makes an embedding: events in `[as_of - days, as_of)`."""

    days: int = Field(default=90, ge=1)
    max_text_chars: int = Field(default=256, ge=8, le=4096)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class InstructionConfig:
    """One instruction, as in `instructue_feast.instructions.Instruction`.

    Attributes:
        id: Name of the feature.
        text: What the embedding should be about.
        soft_prompt: File that `instructue tune-instruction` wrote for these words and this model.
    """

    id: str
    text: str
    soft_prompt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class ModelSettings:
    """Which model makes the embeddings.

    Attributes:
        path: Folder of a saved `InstructUEModel`. Left out: a seeded, untrained one is made from the keys below.
        llm: Hugging Face causal LM by name or path.
        text_encoder: Hugging Face text encoder by name or path, for sources that name none.
        embedding_dim: Size of the user embedding.
        seed: Seed of an untrained model's adapters and heads.
        dtype: Compute type of the LLM.
        max_batch_tokens: Upper bound on the padded tokens of one forward pass; left out, what suits the device.
    """

    path: str | None = None
    llm: str = "smollm2-135m-instruct"
    text_encoder: str = "all-minilm-l6-v2"
    embedding_dim: int = Field(default=128, ge=2, le=4096)
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_batch_tokens: int | None = Field(default=None, ge=64)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class OutputConfig:
    """Where extracts, event vectors, runs and publications go (any fsspec URL).

    Attributes:
        path: Root of everything this project writes.
        buckets: Files a run is cut into by a hash of the user id; the unit of work.
        min_free_gib: A job refuses to start with less free disk than this.
        keep_runs: How many published runs per feature view stay readable for historical retrieval.
        keep_publications: How many publications stay on disk for readers that still hold an older registry.
    """

    path: str
    buckets: int = Field(default=16, ge=1, le=65_536)
    min_free_gib: float = Field(default=1.0, ge=0)
    keep_runs: int = Field(default=400, ge=1)
    keep_publications: int = Field(default=3, ge=1)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class GatesConfig:
    """Limits a run must keep to be published; see docs/backfill.md. Comparisons are with the newest published run.

    Attributes:
        min_rows_ratio: Users, over those of the published run, at least.
        max_rows_ratio: The same, at most.
        max_empty_share: Share of users without any event or number.
        max_empty_share_rise: How much that share may rise.
        max_identical_share: Share of sampled users with a history whose vector another user has as well.
        max_mean_cosine: Mean cosine of two sampled users.
        max_mean_shift: Distance of the mean vectors over the spread of users.
        max_psi: Population stability index, mean over dimensions; above 0.25 is usually called a shift.
        min_knn_overlap: Share of the 10 nearest neighbours that stay so.
        sample_users: Users that are sampled, the same ones in every run.
        min_sample_users: With fewer, distributions are not compared.
    """

    min_rows_ratio: float = Field(default=0.5, ge=0)
    max_rows_ratio: float = Field(default=2.0, ge=0)
    max_empty_share: float = Field(default=0.95, ge=0, le=1)
    max_empty_share_rise: float = Field(default=0.2, ge=0, le=1)
    max_identical_share: float = Field(default=0.5, ge=0, le=1)
    max_mean_cosine: float = Field(default=0.9999, ge=-1, le=1)
    max_mean_shift: float = Field(default=0.5, ge=0)
    max_psi: float = Field(default=0.25, ge=0)
    min_knn_overlap: float = Field(default=0.05, ge=0, le=1)
    sample_users: int = Field(default=5000, ge=2)
    min_sample_users: int = Field(default=200, ge=2)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class FeastConfig:
    """Names under which Feast knows the embeddings.

    Attributes:
        entity: The entity.
        join_key: Its key.
        service: The feature service of all current embeddings.
        ttl_days: How long an embedding is good for after its `as_of`; 0 for ever.
        promotion: Whether the service follows every publication, or waits for `instructue promote`.
    """

    entity: str = "user"
    join_key: str = "user_id"
    service: str = "user_embeddings"
    ttl_days: int = Field(default=0, ge=0)
    promotion: Literal["automatic", "manual"] = "automatic"


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class InstructueConfig:
    """A whole project. See `load_config`."""

    project: str
    sources: dict[str, _AnySource]
    instructions: tuple[InstructionConfig, ...]
    output: OutputConfig
    users: UsersConfig | None = None
    history: HistoryConfig = Field(default_factory=HistoryConfig)
    model: ModelSettings = Field(default_factory=ModelSettings)
    feast: FeastConfig = Field(default_factory=FeastConfig)
    gates: GatesConfig = Field(default_factory=GatesConfig)
    user_qa: UserQAConfig | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("`sources` is empty", "declare at least one source")
        for name in self.sources:
            if not _SOURCE_NAME.match(name):
                raise ConfigError(f"source name {name!r}", "use lower-case letters, digits and underscores")
        if not self.instructions:
            raise ConfigError("`instructions` is empty", "declare at least one instruction")
        InstructionRegistry(Instruction(one.id, one.text) for one in self.instructions)
        for spec in self.user_qa.questions if self.user_qa else ():
            where = f"question family {spec.id}"
            if spec.source not in self.sources:
                raise ConfigError(f"{where}: unknown source {spec.source!r}", did_you_mean(spec.source, self.sources))
            fitting = self.tabular_sources if isinstance(spec, AttributeSpec) else self.event_sources
            if spec.source not in fitting:
                message = f"{where}: kind {spec.kind} cannot be asked about source {spec.source}"
                raise ConfigError(message, did_you_mean(spec.source, fitting))

    def registry(self) -> InstructionRegistry:
        """The declared instructions, with the digests of their soft prompts.

        Raises:
            DataError: A soft prompt is missing or damaged.
            VersionMismatchError: A soft prompt was tuned for other words.
        """
        return InstructionRegistry(_instruction(one) for one in self.instructions)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Sources in config order; the position is the `source_index` of packed histories."""
        return tuple(self.sources)

    @property
    def event_sources(self) -> dict[str, EventSourceConfig]:
        """The event sources by name."""
        return {name: one for name, one in self.sources.items() if isinstance(one, EventSourceConfig)}

    @property
    def tabular_sources(self) -> dict[str, TabularSourceConfig]:
        """The snapshot sources by name."""
        return {name: one for name, one in self.sources.items() if isinstance(one, TabularSourceConfig)}

    @property
    def numeric_columns(self) -> tuple[tuple[str, str, str], ...]:
        """`(source, group, column)` of each position of a packed history's `tabular_numeric`."""
        return tuple(
            (name, group, column)
            for name, source in self.tabular_sources.items()
            for group, columns in source.numeric_groups.items()
            for column in columns
        )

    def source_days(self, name: str) -> int:
        """Window of an event source, in days."""
        return self.event_sources[name].days or self.history.days

    def encoder_of(self, name: str) -> str:
        """Text encoder of a source."""
        return self.sources[name].encoder or self.model.text_encoder

    def history_digest(self) -> str:
        """Hash of all settings that determine a packed history; table locations do not count.

        Part of every embedding version, so that a changed template or window can never be mixed with older vectors.
        """
        sources = []
        for name, source in self.sources.items():
            settings = dataclasses.asdict(source)
            for key in ("allow_empty", "encoder"):
                settings.pop(key)
            settings["table"] = [source.table.format, source.table.options]  # how it is read, not where it lies
            sources.append([name, settings])
        # In the order of the config, which is the order of tokens and numbers; hence no sort_keys.
        text = json.dumps({"sources": sources, "history": dataclasses.asdict(self.history)}, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _instruction(settings: InstructionConfig) -> Instruction:
    plain = Instruction(settings.id, settings.text)
    if settings.soft_prompt is None:
        return plain
    prompt = read_soft_prompt(settings.soft_prompt)
    if prompt.text != plain.text:
        raise VersionMismatchError(
            f"instruction {settings.id!r}: {settings.soft_prompt} was tuned for the words {prompt.text!r}",
            "use those words, or tune it again with `instructue tune-instruction`",
        )
    return Instruction(settings.id, settings.text, soft_prompt=prompt.digest)


def load_config(path: str | Path) -> InstructueConfig:
    """Reads and validates an `instructue.yaml`.

    Args:
        path: The file.

    Returns:
        The project, with absolute paths.

    Raises:
        ConfigError: The file is missing or not YAML, a key or value is wrong; the message lists what exists.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no config file at {file}", "pass --config, or run `instructue data` to write an example")
    raw = _read_yaml(file)
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds no mapping", "start with `project:`, `sources:`, `instructions:`, `output:`")
    if isinstance(raw.get("user_qa"), str):
        raw["user_qa"] = _read_user_qa(file.parent / raw["user_qa"])
    for source in (raw.get("sources") or {}).values() if isinstance(raw.get("sources"), dict) else ():
        if isinstance(source, dict):
            source.setdefault("kind", "events")
    _mend_yes_and_no(raw.get("user_qa"))
    try:
        config = _ADAPTER.validate_python(raw)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.message}", error.hint) from None
    except ValidationError as error:
        raise ConfigError(*_explain(file, error)) from None
    return _absolute(config, file.resolve().parent)


_ADAPTER: TypeAdapter[InstructueConfig] = TypeAdapter(InstructueConfig)
_CLASSES: dict[str, type] = {
    "table": TableConfig, "users": UsersConfig, "history": HistoryConfig, "instructions": InstructionConfig,
    "events": EventSourceConfig, "tabular": TabularSourceConfig, "model": ModelSettings, "output": OutputConfig,
    "feast": FeastConfig, "gates": GatesConfig, "user_qa": UserQAConfig,
    "generator": GeneratorConfig, **KINDS,
}  # fmt: skip


def _explain(file: Path, error: ValidationError) -> tuple[str, str]:
    """Turns pydantic's first complaint into `what, where` and `what exists`."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] in unknown), errors[0])
    loc = [str(piece) for piece in first["loc"]]
    path = [*loc[:2], *loc[3:]] if loc[0] == "sources" and loc[2:3] in (["events"], ["tabular"]) else loc
    path = [*loc[:3], *loc[4:]] if loc[:2] == ["user_qa", "questions"] and loc[3:4] and loc[3] in KINDS else path
    where = ".".join(path)
    if first["type"] in unknown:
        names = [field.name for field in dataclasses.fields(_class_at(loc[:-1]))]
        return f"{file}: unknown key `{where}`", did_you_mean(path[-1], names)
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{file}: `{where}` is missing", "add the key"
    return f"{file}: `{where}`: {first['msg']}", "mend that key in the file"


def _class_at(parents: list[str]) -> Any:
    for piece in reversed(parents):
        if piece in _CLASSES:
            return _CLASSES[piece]
    return InstructueConfig


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(_interpolate(file.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}", "mend the file at that line") from None


def _read_user_qa(file: Path) -> Any:
    """The questions, when they stand in a file of their own, under `user_qa:` or at the top."""
    if not file.is_file():
        raise ConfigError(f"user_qa: no file at {file}", "mend the path, or write the questions in the config itself")
    raw = _read_yaml(file)
    return raw["user_qa"] if isinstance(raw, dict) and "user_qa" in raw else raw


def _mend_yes_and_no(section: Any) -> None:
    """YAML 1.1 reads the keys `yes` and `no` as booleans."""
    questions = section.get("questions") if isinstance(section, dict) else None
    for question in questions if isinstance(questions, list) else ():
        for key, name in ((True, "yes"), (False, "no")):
            if isinstance(question, dict) and key in question:
                question[name] = question.pop(key)


def _interpolate(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match.group(1), match.group(2))
        if found is None:
            raise ConfigError(
                f"environment variable {match.group(1)} is not set", f"set it, or write ${{{match.group(1)}:-default}}"
            )
        return found

    return _ENV.sub(value, text)


def _absolute(config: InstructueConfig, base: Path) -> InstructueConfig:
    def resolve(path: str) -> str:
        return path if "://" in path else str((base / Path(path).expanduser()).resolve())

    def table(one: TableConfig) -> TableConfig:
        return dataclasses.replace(one, path=resolve(one.path)) if one.path else one

    sources = {name: dataclasses.replace(one, table=table(one.table)) for name, one in config.sources.items()}
    users = config.users and dataclasses.replace(config.users, table=table(config.users.table))
    output = dataclasses.replace(config.output, path=resolve(config.output.path))

    def named(name: str) -> str:
        """Resolves what is clearly a path; anything else is a name for Hugging Face."""
        return resolve(name) if name.startswith(("./", "../", "~")) else name

    sources = {
        name: dataclasses.replace(one, encoder=one.encoder and named(one.encoder)) for name, one in sources.items()
    }
    model = dataclasses.replace(
        config.model,
        path=config.model.path and resolve(config.model.path),
        llm=named(config.model.llm),
        text_encoder=named(config.model.text_encoder),
    )
    instructions = tuple(
        dataclasses.replace(one, soft_prompt=one.soft_prompt and resolve(one.soft_prompt))
        for one in config.instructions
    )
    return dataclasses.replace(
        config, sources=sources, users=users, output=output, model=model, instructions=instructions
    )
