"""`instructue ablate`: train the model again with one thing less at a time, and put what it costs into one table."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from instructue_feast.cli.ablation_judges import EVALUATION_SEED, Judge, Suite, make_judge
from instructue_feast.cli.ablation_report import SHOWN, VALIDATION, ablation_document, markdown, write_picture
from instructue_feast.cli.ablation_rows import BASELINE, AblationFolder, AblationRow, write_text
from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, err, out, print_json, print_table
from instructue_feast.cli.project import Project
from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, MissingDependencyError, VersionMismatchError

if TYPE_CHECKING:
    from instructue_feast.model.modeling import InstructUEModel
    from instructue_feast.training.ablations import Variant
    from instructue_feast.training.run import TrainingData
    from instructue_feast.training.settings import TrainingSettings

DEFAULT_FOLDER = Path("build/ablations")


def ablate(
    qa_id: Annotated[str | None, typer.Option("--qa", help="The data set that `instructue qa` built.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    settings: Annotated[str | None, typer.Option(help="YAML file of training settings, those of `full`.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value; repeatable.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the table and of the models.")] = DEFAULT_FOLDER,
    variants: Annotated[str | None, typer.Option(help="Variants, with commas between; default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train every variant from so many seeds.")] = 1,
    suite: Annotated[Suite | None, typer.Option(help="Default: the suite of this project's data, if any.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the suite, with commas between; default: all.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes for the probes; 0 for one per core.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rows that are missing.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Say which variants there are, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the model with one thing less at a time; one table says what each costs.

    Example: [bold]instructue ablate --qa QA_ID --settings base.yaml --set steps=600 --out build/ablations[/]

    Example: [bold]instructue ablate --qa QA_ID --settings base.yaml --variants no_llm,without_bill --resume[/]
    """
    project = Project.open(config)
    try:
        from instructue_feast.training.ablations import ablations, chosen
        from instructue_feast.training.run import load_training_data
    except ImportError as error:
        raise MissingDependencyError(
            f"ablations need {error.name}", "pip install 'instructue-feast[model,train,eval]'"
        ) from None
    from instructue_feast.training.settings import read_settings

    base = read_settings(settings, changes or ())
    every, same = ablations(base, project.config)
    plan = chosen(every, _names(variants))
    if show:
        print_table("Variants", ["variant", "what is different"], [[one.name, one.what] for one in plan])
        return
    if qa_id is None:
        raise ConfigError("--qa is missing", "name the data set that `instructue qa` built")
    data = load_training_data(project.config, qa_id)
    judge = make_judge(project, suite, data, base, _names(tasks), jobs or os.cpu_count() or 1)
    table = _Table(project.config, data, base, plan, judge, folder, quiet=as_json)
    table.skipped = [one.name for one in same]
    table.open(resume=resume)
    for seed in range(base.seed, base.seed + seeds):
        for variant in plan:
            table.fill(variant, seed)
    document = table.write(range(base.seed, base.seed + seeds))
    if as_json:
        print_json(document)
        return
    _print(document)
    out.print(f"The table: {folder / 'ablations.md'}", soft_wrap=True)


class _Table:
    """A table that is being filled.

    Args:
        config: The project.
        data: What `full` trains on.
        base: What `full` trains with.
        plan: The variants, `full` first.
        judge: Measures them.
        folder: Where rows, models and the table go.
        quiet: Show no progress.
    """

    def __init__(
        self,
        config: InstructueConfig,
        data: TrainingData,
        base: TrainingSettings,
        plan: Sequence[Variant],
        judge: Judge,
        folder: Path,
        *,
        quiet: bool,
    ) -> None:
        self._config, self._data, self._base = config, data, base
        self._plan, self._judge, self._quiet = plan, judge, quiet
        self._folder = AblationFolder(folder)
        self.skipped: list[str] = []

    def open(self, *, resume: bool) -> None:
        """Starts the table or goes on with it, and measures what no variant changes."""
        from instructue_feast.model.artifacts import folder_digest
        from instructue_feast.model.bundled import resolve_folder
        from instructue_feast.model.encoders import describe_encoder

        model = self._config.model
        encoders = sorted({self._config.encoder_of(name) for name in self._config.source_names})
        identity = {
            "suite": self._judge.suite.value,
            "data": self._data.digest(),
            "history_digest": self._data.history_digest,
            "settings": self._base.learning(),
            "llm": folder_digest(resolve_folder(model.llm, kind="LLM")),
            "encoders": [describe_encoder(name).version for name in encoders],
            "embedding_dim": model.embedding_dim,
            "dtype": model.dtype,
            **self._judge.identity(),
        }
        self._folder.open(identity, resume=resume)
        if self._folder.read(BASELINE) is None:
            with err.status("baseline"):
                row = AblationRow(BASELINE, {"seed": EVALUATION_SEED}, self._judge.baseline())
            self._folder.write(row)

    def fill(self, variant: Variant, seed: int) -> None:
        """Trains and measures a variant, unless its row is done.

        Raises:
            VersionMismatchError: Its row is of a variant that was defined otherwise.
        """
        name = _row_name(variant, seed)
        definition = json.loads(json.dumps([dict(variant.changes), variant.source, variant.one_token_per_event]))
        done = self._folder.read(name)
        if done is not None:
            if done.document["definition"] != definition:
                raise VersionMismatchError(
                    f"row {name} is of a variant with other changes", "remove the row, or take another --out"
                )
            return
        if not self._quiet:
            err.print(f"[bold]{variant.name}[/], seed {seed}: {variant.what}")
        training = self._train(variant, seed)
        started = time.monotonic()
        with err.status(f"measuring {variant.name}"):
            scores = self._judge.scores(self._load(name), variant)
        training["measuring_seconds"] = round(time.monotonic() - started, 1)
        document = {"variant": variant.name, "seed": seed, "definition": definition, "training": training}
        self._folder.write(AblationRow(name, document, scores))
        shutil.rmtree(self._folder.model(name).with_name(f"{name}.training"), ignore_errors=True)
        self.write(range(self._base.seed, seed + 1))

    def _train(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Trains a variant, goes on where it was interrupted, or does nothing if its model is there."""
        from instructue_feast.training import checkpoint
        from instructue_feast.training.card import RECORD
        from instructue_feast.training.progress import ProgressBar
        from instructue_feast.training.run import make_model, train

        target = self._folder.model(_row_name(variant, seed))
        if not (target / RECORD).is_file():
            # Validation happens once, at the end: it decides nothing, and costs as much as many steps.
            settings = dataclasses.replace(variant.settings(self._base), seed=seed, eval_steps=0, report_to=())
            begun = bool(checkpoint.checkpoints(target.with_name(f"{target.name}.training")))
            train(
                make_model(self._config, settings), variant.data(self._data, self._config), settings, target,
                config=self._config, resume=begun, callbacks=[] if self._quiet else [ProgressBar(err)],
            )  # fmt: skip
            gc.collect()  # the Trainer refers to itself, and the next model needs the room
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        seconds = [one["train_runtime"] for one in record["log"] if "train_runtime" in one]
        return {**record["metrics"], "seconds": sum(seconds), "trained_weights": record["trained_weights"]}

    def _load(self, name: str) -> InstructUEModel:
        """The model as it is served."""
        from instructue_feast.model.modeling import InstructUEModel

        return InstructUEModel.from_pretrained(
            self._folder.model(name), dtype=self._config.model.dtype, merge_lora=True
        )

    def write(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Writes JSON, Markdown and picture of all rows that are done."""
        rows = {
            one.name: [row for seed in seeds if (row := self._folder.read(_row_name(one, seed))) is not None]
            for one in self._plan
        }
        baseline = self._folder.read(BASELINE)
        document = ablation_document(
            self._plan,
            rows,
            unseen=self._judge.unseen(),
            baseline=baseline.scores if baseline else None,
            about={
                "suite": self._judge.suite.value,
                "sentence": self._sentence(len(seeds)),
                "qa_id": self._data.qa_id,
                "settings": self._base.learning(),
                "skipped": self.skipped,
                **self._judge.identity(),
            },
        )
        folder = self._folder.folder
        write_text(
            folder / "ablations.json", json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )
        write_text(folder / "ablations.md", markdown(document))
        write_picture(document, folder / "ablations.png")
        return document

    def _sentence(self, seeds: int) -> str:
        base = self._base
        layers = f"its first {base.llm_layers} layers" if base.llm_layers else "all layers"
        text = (
            f"Data set `{self._data.qa_id}`; {base.steps} steps of {base.users_per_step} users; LLM "
            f"{Path(self._config.model.llm).name}, {layers}; {seeds} seed{'s' if seeds > 1 else ''}. Every variant has "
            "the same steps, seeds, users, questions and wordings."
        )
        if self._judge.suite is Suite.validation:
            return text
        return (
            f"{text} Mean AUC over tasks; square brackets hold 95% intervals over users, those of differences paired."
        )


def _row_name(variant: Variant, seed: int) -> str:
    return f"{variant.name}-seed{seed}"


def _print(document: dict[str, Any]) -> None:
    rows = []
    for row in document["rows"]:
        if "mean" in row:
            cells = [row["mean"].get(name, {}).get("auc") for name in SHOWN]
            moved = row.get("difference", {}).get("ours", {}).get("difference")
        else:
            cells = [row["training"].get(f"eval_{name}") for name in VALIDATION]
            moved = row.get("validation_difference", {}).get(next(iter(VALIDATION)))
        shown = ["" if one is None else f"{one:.4f}" for one in cells]
        rows.append([row["variant"], *shown, "" if moved is None else f"{moved:+.4f}"])
    names = SHOWN if any("mean" in row for row in document["rows"]) else tuple(VALIDATION)
    print_table("Ablations: AUC", ["variant", *names, f"{names[0]} − full"], rows)


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(one.strip() for one in (text or "").split(",") if one.strip()) or None
