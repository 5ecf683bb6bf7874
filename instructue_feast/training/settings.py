"""`TrainingSettings`: everything that decides how a model is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from instructue_feast.errors import ConfigError, did_you_mean

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

_NOT_LEARNING = frozenset(
    {
        "save_steps", "keep_checkpoints", "logging_steps", "eval_steps", "validation_rows", "validation_questions",
        "report_to", "threads", "loader_workers", "gradient_checkpointing", "data_name", "data_terms",
    }
)  # fmt: skip
"""Settings that change nothing about the weights; a run may be resumed with others."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class TrainingSettings:
    """Settings of a training run; all of them may stand under `training:` in a YAML file.

    Attributes:
        steps: Steps of the optimizer.
        users_per_step: B, users in one pass, over all processes.
        questions_per_user: K, questions of one user in one pass.
        questions_per_step: Distinct questions a pass draws from; 0 for all. Fewer make the answer tower cheaper.
        gradient_accumulation: Passes per step.
        gradient_checkpointing: Recompute the LLM's activations instead of keeping them.
        learning_rate: Peak rate of our own weights.
        lora_learning_rate: Peak rate of LoRA.
        warmup_ratio: Share of the steps in which the rates rise; they then fall as a cosine.
        weight_decay: Of matrices; biases, norms, embeddings and scalars have none.
        clip: Largest norm of the gradient.
        lora_r: Rank of LoRA on the LLM; 0 for none.
        lora_alpha: Scale of LoRA, over `lora_r`.
        lora_dropout: Dropout of LoRA's input.
        lora_targets: Names of the LLM's layers that get LoRA, or `all-linear`.
        temperature: Temperature of the contrastive loss at the start; it is learned.
        contrastive_weight: Weight of the user-answer loss.
        autoregressive_weight: Weight of the next-token loss.
        user_user_weight: Weight of the user-user loss: users with the same answer to a question attract each other.
        negatives: `same_question`: an answer meets the other answers to its question. `batch`: it meets all answers
            of the pass, which the instruction alone can tell apart.
        answers_apart: Whether an answer enters the contrastive loss as its difference from the middle of its question's
            answers.
        centre: Whether what all users, and all answers, share is taken away before the projection.
        false_negative_mask: Whether answers of the same text never stand against each other.
        false_negative_margin: Drop negatives whose cosine is higher than the positive's by this much. Only with
            `negatives: batch`: the other answer to the same question is never a false negative.
        autoregressive_pairs: Pairs of each user that get the next-token loss; each costs its answer's tokens. Below 1,
            that share of the passes has one pair per user and the others none.
        family_exponent: A family of n questions is drawn by n to this: 1 draws questions alike, 0 families alike.
        family_cap: Largest share of one family of questions in the sampling.
        instruction_dropout: Share of the pairs that are asked without words, which trains the general embedding.
        event_dropout: Mean share of a user's texts that a pass leaves out, at most one half; against learning users by
            heart, and against depending on a clean log.
        number_dropout: Share of a user's numbers that a pass shows as missing, likewise.
        shuffle_users: Control: give every user the history of another. The contrastive loss must stay at chance.
        validation_fraction: Share of the users, by hash, that is held out.
        validation_rows: Most rows of held-out users that are looked at.
        validation_questions: Most questions of each kind that are looked at.
        eval_steps: Steps between validations; 0 for one at the end only.
        save_steps: Steps between checkpoints.
        keep_checkpoints: Newest checkpoints that are kept.
        logging_steps: Steps between lines of the log.
        report_to: Trackers of Transformers that get the log, such as `tensorboard`, `wandb`, `mlflow`.
        data_name: What to call the data in the model card.
        data_terms: Terms of the data, for the model card.
        bf16: Run the LLM and the contrast's products in bfloat16; our weights and LoRA's stay float32.
        half_weights: Round our trained weights to half precision before they are saved, which halves the folder.
        seed: Seed of the initial weights, of sampling and of dropout.
        threads: Threads of the CPU; 0 leaves them as they are.
        loader_workers: Processes that prepare batches; the result does not depend on it.
        llm_layers: Layers of the LLM to keep; 0 for all.
        prompt_texts: Newest texts of each source in the prompt; 0 for all. The focus token sees all.
        adapter_dim: Middle size of the adapters; 0 for the encoder's.
        focus_dim: Size of the focus keys; 0 for the largest encoder's.
        projection_dim: Middle size of the projection.
        focus_token: Whether instructions get a focus token.
        summary_tokens: Whether sources and users get summary tokens.
        transformer_dim: Hidden size of a small random Transformer, all trained, in place of the LLM's layers; 0 for the
            LLM. For ablations.

    Source: defaults after Q-Anchor (arXiv 2602.14492); the negatives are ours.
    """

    steps: int = Field(default=1000, ge=1)
    users_per_step: int = Field(default=16, ge=1)
    questions_per_user: int = Field(default=16, ge=1)
    questions_per_step: int = Field(default=48, ge=0)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False

    learning_rate: float = Field(default=1e-3, gt=0)
    lora_learning_rate: float = Field(default=2e-4, gt=0)
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    lora_r: int = Field(default=16, ge=0)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"

    temperature: float = Field(default=0.07, ge=0.01, le=10)
    contrastive_weight: float = Field(default=1.0, ge=0)
    autoregressive_weight: float = Field(default=1.0, ge=0)
    user_user_weight: float = Field(default=0.0, ge=0)
    negatives: Literal["same_question", "batch"] = "same_question"
    answers_apart: bool = True
    centre: bool = True
    false_negative_mask: bool = True
    false_negative_margin: float | None = Field(default=None, ge=0)
    autoregressive_pairs: float = Field(default=2, ge=0)
    family_exponent: float = Field(default=0.5, ge=0, le=1)
    family_cap: float = Field(default=0.5, gt=0, le=1)
    instruction_dropout: float = Field(default=0.05, ge=0, le=1)
    event_dropout: float = Field(default=0.0, ge=0, le=0.5)
    number_dropout: float = Field(default=0.0, ge=0, le=1)
    shuffle_users: bool = False

    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    validation_rows: int = Field(default=256, ge=1)
    validation_questions: int = Field(default=32, ge=1)
    eval_steps: int = Field(default=200, ge=0)
    save_steps: int = Field(default=200, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    logging_steps: int = Field(default=10, ge=1)
    report_to: tuple[str, ...] = ("tensorboard",)

    data_name: str = ""
    data_terms: str = ""

    bf16: bool = False
    half_weights: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: int = Field(default=0, ge=0)
    loader_workers: int = Field(default=0, ge=0)
    llm_layers: int = Field(default=0, ge=0)
    prompt_texts: int = Field(default=0, ge=0)
    adapter_dim: int = Field(default=0, ge=0)
    focus_dim: int = Field(default=0, ge=0)
    projection_dim: int = Field(default=512, ge=1)
    focus_token: bool = True
    summary_tokens: bool = True
    transformer_dim: int = Field(default=0, ge=0, multiple_of=16)

    def __post_init__(self) -> None:
        if self.false_negative_margin is not None and self.negatives == "same_question":
            raise ConfigError(
                "false_negative_margin with `negatives: same_question` would drop exactly the answers that teach",
                "leave the margin out, or use `negatives: batch`",
            )
        if not (self.contrastive_weight or self.autoregressive_weight or self.user_user_weight):
            raise ConfigError("all three losses have weight 0", "give one of them a weight")
        if self.autoregressive_weight and not self.autoregressive_pairs:
            raise ConfigError("autoregressive_weight without autoregressive_pairs", "set one to 0 or both above")
        if self.transformer_dim and self.lora_r:
            raise ConfigError("transformer_dim leaves no LLM for LoRA to adapt", "set lora_r to 0")

    def learning(self) -> dict[str, Any]:
        """The settings that decide the weights, by name, JSON-ready."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        left_out = _NOT_LEARNING if self.transformer_dim else _NOT_LEARNING | {"transformer_dim"}
        return {name: value for name, value in values.items() if name not in left_out}

    def digest(self) -> str:
        """Hash of `learning()`."""
        return hashlib.sha256(json.dumps(self.learning(), sort_keys=True).encode()).hexdigest()


_ADAPTER: TypeAdapter[TrainingSettings] = TypeAdapter(TrainingSettings)


def read_settings(file: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainingSettings:
    """Reads settings from a YAML file and from `key=value` texts, which win.

    Args:
        file: A YAML file whose keys are settings, at the top or under `training:`.
        overrides: Texts such as `steps=500` or `lora_targets=[q_proj, v_proj]`; values are YAML.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong.

    Example:
        >>> read_settings(overrides=["steps=5", "lora_r=0"]).steps
        5
    """
    values: dict[str, Any] = _from_file(Path(file)) if file is not None else {}
    where = "training settings" if file is None else str(file)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text!r} is not key=value", "write it as --set steps=500")
        values[key.strip()] = _parsed(value, f"--set {text}")
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = [one.name for one in dataclasses.fields(TrainingSettings)]
            raise ConfigError(f"{where}: unknown setting `{name}`", did_you_mean(name, known)) from None
        raise ConfigError(f"{where}: `{name}`: {first['msg']}", "mend that value") from None


def _from_file(file: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", "pass --settings with a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}", "mend the file at that line") from None
    if isinstance(raw, dict) and isinstance(raw.get("training"), dict):
        raw = raw["training"]
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds no mapping of settings", "write keys such as `steps: 1000`")
    return dict(raw)


def _parsed(value: str, where: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}", "quote the value") from None
