"""`train`: from a UserQA data set and an untrained model to a model folder.

models/mine/             the trained model with its card; appears complete, at the end
models/mine.training/    checkpoints and TensorBoard's logs; may be removed afterwards
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, DataError, MissingDependencyError, VersionMismatchError, listed
from instructue_feast.files import replacing
from instructue_feast.inference.version import model_version
from instructue_feast.model.factory import untrained
from instructue_feast.model.lora import wrap_with_lora
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.model.saving import CONFIG_NAME, read_config, torch_dtype
from instructue_feast.runs.store import OutputStore
from instructue_feast.training import checkpoint
from instructue_feast.training.card import write_card
from instructue_feast.training.collate import Passes
from instructue_feast.training.losses import Learner
from instructue_feast.training.plan import Ints, Sampler
from instructue_feast.training.settings import TrainingSettings
from instructue_feast.training.trainer import UserQATrainer, training_arguments
from instructue_feast.training.validation import make_probes, split_rows
from instructue_feast.training.vectors import TextVectors
from instructue_feast.user_qa.dataset import UserQA
from instructue_feast.user_qa.loading import load_manifest, load_phrasebook, load_user_qa


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        qa_id: Name of the data set.
        train: Pairs of subjects that are trained on.
        held_out: Pairs of subjects that never are, for validation only.
        lengths: Lengths by which users of `train` share passes; those of its histories for `None`.
        phrasebook: `schema.PHRASEBOOK` of every text in the histories.
        history_digest: `InstructueConfig.history_digest()` the histories were made with.
    """

    qa_id: str
    train: UserQA
    phrasebook: pa.Table
    history_digest: str
    held_out: UserQA | None = None
    lengths: Ints | None = None

    def digest(self) -> str:
        """Hash of everything of the training split that decides the weights."""
        data, history = self.train, self.train.history
        digest = hashlib.sha256()
        for part in (data.offsets, data.question_P, data.answer_P, data.weight_P, history.as_of_us, history.offsets,
                     history.text_id, history.count_bucket, history.age_bucket, history.tabular_numeric):  # fmt: skip
            digest.update(np.ascontiguousarray(part).tobytes())
        if self.lengths is not None:
            digest.update(self.lengths.tobytes())
        digest.update(repr((data.questions, data.answers, history.user_ids)).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        out: The model folder.
        finished: False if it stopped early; then there is a checkpoint but no model folder.
        step: Steps done.
        metrics: Last values of the log.
        history: Every line of the log.
        unusable_questions: Questions left out because all their answers are equal.
    """

    out: str
    finished: bool
    step: int
    metrics: dict[str, float]
    history: list[dict[str, float]]
    unusable_questions: int


def load_training_data(config: InstructueConfig, qa_id: str) -> TrainingData:
    """Loads a data set that `instructue qa` built.

    Raises:
        ConfigError: There is no such data set.
        DataError: It has no pairs to train on.
        VersionMismatchError: It was made with other history settings than the config's.
    """
    store = OutputStore(config.output.path)
    manifest = load_manifest(store, qa_id)
    return TrainingData(
        qa_id=qa_id,
        train=load_user_qa(store, qa_id, config),
        held_out=load_user_qa(store, qa_id, config, "held_out") if manifest.pairs.get("held_out") else None,
        phrasebook=load_phrasebook(store, qa_id),
        history_digest=manifest.history_digest,
    )


def make_model(config: InstructueConfig, settings: TrainingSettings) -> InstructUEModel:
    """The untrained model a run starts from: the project's sources and base models, and LoRA.

    Raises:
        DataError: A base model is missing.
        MissingDependencyError: PEFT is not installed.
    """
    model = untrained(
        encoders={source: config.encoder_of(source) for source in config.source_names},
        numeric_columns=config.numeric_columns,
        llm=config.model.llm,
        embedding_dim=config.model.embedding_dim,
        adapter_dim=settings.adapter_dim,
        focus_dim=settings.focus_dim,
        projection_dim=settings.projection_dim,
        llm_layers=settings.llm_layers,
        prompt_texts=settings.prompt_texts,
        focus_token=settings.focus_token,
        summary_tokens=settings.summary_tokens,
        transformer_dim=settings.transformer_dim,
        seed=settings.seed,
        dtype=torch_dtype("bfloat16" if settings.bf16 else config.model.dtype),
    )
    add_lora(model, settings)
    return model


def add_lora(model: InstructUEModel, settings: TrainingSettings) -> None:
    """Puts LoRA on the LLM, in float32; nothing with `lora_r: 0`.

    Raises:
        ConfigError: The LLM has none of the named layers.
        MissingDependencyError: PEFT is not installed.
    """
    if not settings.lora_r:
        return
    try:
        from peft import LoraConfig
    except ImportError:
        raise MissingDependencyError("LoRA needs PEFT", "pip install 'instructue-feast[model]', or lora_r: 0") from None
    targets = settings.lora_targets
    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        try:
            model.llm = wrap_with_lora(model.llm, lora)
        except ValueError as error:
            raise ConfigError(f"lora_targets {targets}: {error}", "name linear layers of the LLM") from None


def train(
    model: InstructUEModel,
    data: TrainingData,
    settings: TrainingSettings,
    out: str | Path,
    *,
    config: InstructueConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Trains a model and saves it with its card.

    Start it with `torchrun` for several processes; users of a pass are then divided among them.

    Args:
        model: From `make_model`. It is trained in place.
        data: The data set.
        settings: The settings.
        out: Folder of the trained model; checkpoints go to `<out>.training`.
        config: The project, for the checks against the data set and for the model version in the card.
        resume: Go on from the last checkpoint.
        overwrite: Replace an earlier model in `out`.
        stop_after: Stop at this step, as if interrupted.
        callbacks: Further callbacks of Transformers' Trainer.

    Returns:
        How it ended. On processes other than the first the folder is only waited for.

    Raises:
        ConfigError: `out` is taken, or users cannot be divided among the processes.
        DataError: The data set cannot teach anything.
        VersionMismatchError: The data set belongs to another config, or the run to resume to other settings or data.
        StorageError: A checkpoint or the model cannot be written.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    out = Path(out)
    work = out.with_name(f"{out.name}.training")
    arguments = training_arguments(settings, work)
    rank, world = arguments.process_index, arguments.world_size
    _check_out(out, overwrite=overwrite or resume)
    _check_match(model, data, config)
    if settings.users_per_step % world:
        raise ConfigError(
            f"users_per_step {settings.users_per_step} cannot be divided among {world} processes", "use a multiple"
        )
    rows, held_out_rows = split_rows(data.train, settings.validation_fraction)
    sampler = Sampler(data.train, rows, settings, data.lengths)
    identity = _identity(model, data, settings)
    if rank == 0:
        checkpoint.open_work(work, identity, resume=resume)
    if world > 1:
        dist.barrier()
    start = checkpoint.open_work(work, identity, resume=True) if resume else None

    model.numeric.set_statistics(torch.from_numpy(data.train.history.tabular_numeric[rows]).to(model.device))
    learner = Learner(model, TextVectors.encode(model, data.phrasebook, sampler.wordings), settings)
    if settings.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    length = settings.steps * settings.gradient_accumulation
    passes = Passes(model, data.train, sampler, length, rank=rank, world=world, vectors=learner.vectors)
    probes = make_probes(data.train, data.held_out, sampler.question_indices, settings)
    trainer = UserQATrainer(
        learner,
        passes,
        settings,
        arguments,
        probes=[(one, learner.vectors.asking(model, [one.wording(q) for q in one.questions])) for one in probes],
        stop_after=stop_after,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    finished = trainer.state.global_step >= settings.steps
    metrics = trainer.evaluate() if finished and probes and not _just_evaluated(trainer) else {}
    model.eval()
    history = [dict(one) for one in trainer.state.log_history]
    result = TrainingResult(
        out=str(out),
        finished=finished,
        step=trainer.state.global_step,
        metrics=_last_values(history) | metrics,
        history=history,
        unusable_questions=sampler.unusable,
    )
    if finished and rank == 0:
        known = {"held_out_rows": len(held_out_rows), **_trained_on(data.train, rows, sampler, settings)}
        _finish(model, data, settings, result, config, known)
    trainer.accelerator.wait_for_everyone()
    return result


def _finish(
    model: InstructUEModel,
    data: TrainingData,
    settings: TrainingSettings,
    result: TrainingResult,
    config: InstructueConfig | None,
    known: dict[str, int],
) -> None:
    model.config.trained = True
    model.config.trained_through = data.train.trained_through
    model.config.history_digest = data.history_digest
    if settings.half_weights:
        _round_to_half(model)
    version = model_version(model, config) if config else None
    with replacing(Path(result.out)) as scratch:
        model.save_pretrained(scratch)
        write_card(
            scratch, model, settings, result.history, result.metrics,
            data={"qa_id": data.qa_id, "digest": data.digest(), **known},
            version=version,
        )  # fmt: skip


def _trained_on(data: UserQA, rows: Ints, sampler: Sampler, settings: TrainingSettings) -> dict[str, int]:
    """What of a data set is trained on: not the pairs of held-out users, nor questions that are never asked.

    Args:
        data: The training split.
        rows: Rows that train.
        sampler: Draws from them.
        settings: How often.

    Returns:
        `rows`, `questions`, `pairs`, `pairs_drawn` (at most: users with few pairs fill their places with repeats that
        have no weight), `unusable_questions`.
    """
    trains_U = np.zeros(len(data), bool)
    trains_U[rows] = True
    asked_Q = np.zeros(len(data.questions), bool)
    asked_Q[sampler.question_indices] = True
    pairs_P = np.repeat(trains_U, np.diff(data.offsets)) & asked_Q[data.question_P] & (data.weight_P > 0)
    per_pass = settings.users_per_step * settings.questions_per_user
    return {
        "rows": len(rows),
        "questions": len(sampler.question_indices),
        "pairs": int(pairs_P.sum()),
        "pairs_drawn": settings.steps * settings.gradient_accumulation * per_pass,
        "unusable_questions": sampler.unusable,
    }


def _identity(model: InstructUEModel, data: TrainingData, settings: TrainingSettings) -> dict[str, Any]:
    """What decides the weights of a run."""
    return {
        "settings": settings.learning(),
        "data": data.digest(),
        "history_digest": data.history_digest,
        "model": model.config.identity(),
        "dtype": str(model.llm_dtype),
    }


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    ours = out.is_dir() and (out / CONFIG_NAME).is_file()
    if ours:
        read_config(out)
    elif out.is_file() or any(out.iterdir()):
        raise ConfigError(f"{out} exists and is no model folder", "choose another --out")
    if ours and not overwrite:
        raise ConfigError(f"{out} holds a model already", "choose another --out, or pass --overwrite")


def _check_match(model: InstructUEModel, data: TrainingData, config: InstructueConfig | None) -> None:
    sources, columns = len(model.config.sources or []), len(model.config.numeric_columns or [])
    history = data.train.history
    if not len(history) or not data.train.num_pairs:
        raise DataError(f"data set {data.qa_id} is empty", "build it again with more users or as_ofs")
    if history.num_events.shape[1] != sources or history.tabular_numeric.shape[1] != columns:
        raise VersionMismatchError(
            f"data set {data.qa_id} has {history.num_events.shape[1]} sources and {history.tabular_numeric.shape[1]} "
            f"numeric columns, the model {sources} and {columns}",
            "build the data set with the config the model is made from",
        )
    if config is not None and data.history_digest != config.history_digest():
        raise VersionMismatchError(
            f"data set {data.qa_id} was built with other history settings ({data.history_digest[:12]}) than the config "
            f"declares ({config.history_digest()[:12]}); its sources are {listed(config.source_names)}",
            "build the data set again with this config",
        )
    model.prompt.check(history)


def _just_evaluated(trainer: UserQATrainer) -> bool:
    return any(
        one.get("step") == trainer.state.global_step and any(name.startswith("eval_auc") for name in one)
        for one in trainer.state.log_history
    )


def _last_values(history: list[dict[str, float]]) -> dict[str, float]:
    last: dict[str, float] = {}
    for line in history:
        last |= line
    return last


@torch.no_grad()
def _round_to_half(model: InstructUEModel) -> None:
    """Rounds our weights to values that half precision holds; a saved model is then half as large."""
    for value in model.own_state().values():
        if bool((value.abs() < torch.finfo(torch.half).max).all()):
            value.copy_(value.half().float())
