"""`UserQATrainer`: the Trainer of Transformers with our passes, losses, checkpoints and log."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from instructue_feast.errors import InvalidEmbeddingError
from instructue_feast.training import checkpoint
from instructue_feast.training.collate import Passes, TrainingBatch
from instructue_feast.training.losses import Learner, Losses
from instructue_feast.training.settings import TrainingSettings
from instructue_feast.training.validation import Probe, validate
from instructue_feast.training.vectors import TextVectors


class UserQATrainer(Trainer):  # type: ignore[misc]
    """Trains a `Learner`.

    Args:
        learner: Model, temperature and losses.
        passes: Every pass of the run, as this process sees it.
        settings: The settings.
        arguments: `training_arguments(settings, work)`.
        probes: Validation questions, with the vectors of their words.
        stop_after: Stop at this step, with a checkpoint, as if interrupted.
        callbacks: Further callbacks, such as a progress bar.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        learner: Learner,
        passes: Passes,
        settings: TrainingSettings,
        arguments: TrainingArguments,
        *,
        probes: Sequence[tuple[Probe, TextVectors]] = (),
        stop_after: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.settings = settings
        self.probes = list(probes)
        self._passes = passes
        self._meter = _Meter()
        super().__init__(
            model=learner,
            args=arguments,
            train_dataset=passes,
            eval_dataset=passes,  # only has to be there: `evaluate` asks the probes
            callbacks=[*callbacks, _Guard(), *([_StopAfter(stop_after)] if stop_after else [])],
        )
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)

    @property
    def learner(self) -> Learner:
        """The unwrapped learner."""
        learner: Learner = self.model
        return learner

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Passes in order. They are already this process's share, so nothing is left to distribute."""
        return DataLoader(
            self._passes,
            batch_size=1,
            shuffle=False,
            num_workers=self.settings.loader_workers,
            collate_fn=_only,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with three groups: our matrices, our vectors and scalars (no decay), and LoRA."""
        del model
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameter_groups(self.learner, self.settings))
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, TrainingBatch],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The joint loss of a pass.

        Raises:
            InvalidEmbeddingError: It is NaN or infinite.
        """
        del num_items_in_batch
        batch = inputs["batch"]
        torch.manual_seed(dropout_seed(self.settings.seed, batch.index, self.args.process_index))
        losses: Losses = model(batch)
        if not bool(losses.total.detach().isfinite()):
            raise InvalidEmbeddingError(
                f"the loss is NaN or infinite in pass {batch.index}", "lower the learning rates, or set bf16 to false"
            )
        self._meter.add(losses)
        return (losses.total, losses) if return_outputs else losses.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds both losses, chance, temperature, accuracy and throughput to each line of the log."""
        if "loss" in logs:
            logs |= self._meter.read(self.accelerator.device) | {"temperature": self.learner.temperature}
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Asks every probe."""
        if not self.probes:
            return {}
        started = time.monotonic()
        self.learner.eval()
        metrics: dict[str, float] = {}
        for probe, words in self.probes:
            metrics |= validate(self.learner, probe, words, rank=self.args.process_index, world=self.args.world_size)
        self.learner.train()
        self._meter.pause(time.monotonic() - started)
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(metrics | {"eval_seconds": round(time.monotonic() - started, 3)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Our own files instead of pickled ones, written in one step."""
        del model, trial
        if self.args.should_save:
            work = Path(self.args.output_dir)
            folder = work / f"checkpoint-{self.state.global_step}"
            checkpoint.write(folder, self.learner, self.optimizer, self.lr_scheduler, self.state)
            checkpoint.remove_old(work, self.settings.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model
        checkpoint.read_learner(Path(resume_from_checkpoint), self.learner)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            checkpoint.read_optimizer(Path(checkpoint_folder), optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Nothing to load: every pass seeds itself."""


def parameter_groups(learner: Learner, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Trainable weights by learning rate and decay.

    Markers and bucket embeddings stand for one thing each, rarely seen; like biases they are not pulled to zero.
    """
    ours_decay, ours, lora = [], [], []
    for name, one in learner.named_parameters():
        if not one.requires_grad:
            continue
        if name.startswith("model.llm.") and not settings.transformer_dim:
            lora.append(one)
        elif one.dim() >= 2 and ("summary" in name or not name.startswith(("model.prompt.", "to_head."))):
            ours_decay.append(one)
        else:
            ours.append(one)
    groups = [
        {"params": ours_decay, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": ours, "lr": settings.learning_rate, "weight_decay": 0.0},
        {"params": lora, "lr": settings.lora_learning_rate, "weight_decay": settings.weight_decay},
    ]
    return [one for one in groups if one["params"]]


def dropout_seed(seed: int, index: int, rank: int) -> int:
    """Seed of the random numbers of one pass in one process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{rank}".encode()).digest()[:8], "big") >> 1


def _only(items: list[TrainingBatch]) -> dict[str, TrainingBatch]:
    return {"batch": items[0]}


def training_arguments(settings: TrainingSettings, work: Path) -> TrainingArguments:
    """Our settings in the words of Transformers; creating them joins the other processes, if any."""
    return TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup_ratio * settings.steps),
        max_grad_norm=settings.clip,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not find each other
        label_names=[],
        seed=settings.seed,
        ddp_find_unused_parameters=True,
        dataloader_num_workers=settings.loader_workers,
        log_level="error",
    )


class _Meter:
    """Means of what was logged since the last line, and throughput."""

    _NAMES = ("contrastive_loss", "autoregressive_loss", "user_user_loss", "chance_loss", "accuracy")

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums = [0.0] * len(self._NAMES)
        self._passes = self._pairs = self._tokens = 0
        self._started = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Leaves time out that was not spent on training."""
        self._started += seconds

    def add(self, losses: Losses) -> None:
        values: list[Any] = [losses.contrastive, losses.autoregressive, losses.user_user, losses.chance]
        values.append(losses.accuracy)
        self._sums = [total + float(value) for total, value in zip(self._sums, values, strict=True)]
        self._passes += 1
        self._pairs += losses.pairs
        self._tokens += losses.tokens

    def read(self, device: torch.device) -> dict[str, float]:
        """Means over passes and processes, and totals per second; starts anew."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        totals = torch.tensor([*self._sums, self._pairs, self._tokens], dtype=torch.float64, device=device)
        world = 1
        if dist.is_available() and dist.is_initialized():
            world = dist.get_world_size()
            dist.all_reduce(totals)
        *sums, pairs, tokens = totals.tolist()
        means = {name: one / world / max(self._passes, 1) for name, one in zip(self._NAMES, sums, strict=True)}
        self._reset()
        return means | {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}


class _Guard(TrainerCallback):  # type: ignore[misc]
    """Keeps numbers that are none out of the weights, and today's intervals in a run that goes on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A checkpoint's state brings the intervals of the run that wrote it.
        del control
        state.compute_steps(args, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        del args, control
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        if grads and not torch.stack(torch._foreach_norm(grads)).isfinite().all():
            raise InvalidEmbeddingError(
                f"the gradient of step {state.global_step + 1} is not finite; the weights were not changed",
                "lower learning_rate or clip, or leave out bf16; checkpoints written before are sound",
            )


class _StopAfter(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        del args
        if state.global_step >= self._step:
            control.should_training_stop = control.should_save = True
        return control
