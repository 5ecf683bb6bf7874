"""`instructue eval`: how good the embeddings are, against baselines, with intervals."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, err, out, print_table
from instructue_feast.cli.jobs import StageDisplay, run_job
from instructue_feast.cli.project import Project, Steps
from instructue_feast.errors import ConfigError, StorageError
from instructue_feast.instructions import Instruction
from instructue_feast.runs.manifest import parse_as_of

if TYPE_CHECKING:
    from instructue_feast.evaluation.suite import SuiteOptions
    from instructue_feast.evaluation.tasks import Task

SYNTHETIC_USERS = 2_000
SYNTHETIC_END = "2025-06-01T00:00:00Z"
"""Where the events of the synthetic data set end."""

DEFAULT_FOLDER = Path("build/eval")


class Suite(StrEnum):
    """The suites."""

    complete_journey = "complete-journey"
    synthetic = "synthetic"


class Dtype(StrEnum):
    """Compute types."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def evaluate(
    suite: Annotated[Suite | None, typer.Option(help="A built-in suite of tasks.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder of a trained model; default: the config's.")] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="The project; a suite makes its own.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where the figures go; .md and .png beside.")] = None,
    rows: Annotated[str | None, typer.Option(help="Rows to compute, with commas between; default: all.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the suite, with commas between; default: all.")] = None,
    soft_prompts: Annotated[
        Path | None, typer.Option(help="Folder of <task>.safetensors, for the rows of few shots; default: the model's.")
    ] = None,
    noise: Annotated[bool, typer.Option(help="Measure the same with irrelevant events added.")] = True,
    explain_users: Annotated[
        int, typer.Option(min=0, help="Users whose attributions are checked against leave-one-out; 0 for none.")
    ] = 100,
    task: Annotated[str | None, typer.Option(help="Name of a task of your own.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Its instruction.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV or Parquet file: user_id, label (0 or 1).")] = None,
    yes: Annotated[str, typer.Option(help="Answer that means 1, for ours_zeroshot.")] = "",
    no: Annotated[str, typer.Option(help="Answer that means 0.")] = "",
    as_of: Annotated[str | None, typer.Option(help="Moment of the histories, for a task of your own.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Compute type of the LLM; default: the config's.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes for the probes; 0 for one per core.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of folds, draws and noise.")] = 0,
    allow_leakage: Annotated[bool, typer.Option("--allow-leakage", help="The model may have seen the future.")] = False,
) -> None:
    """Score embeddings against baselines: a built-in suite, or a task of your own with its instruction and labels.

    Example: [bold]instructue eval --suite complete-journey --model models/x --json build/eval/complete_journey.json[/]

    Example: [bold]instructue eval --task vip --instruction "Is this a big spender?" --labels vip.csv[/]
    """
    own = {"--task": task, "--instruction": instruction, "--labels": labels}
    if (suite is None) == (task is None):
        raise ConfigError("eval needs either --suite or --task", "pass --suite complete-journey, or a task of your own")
    if suite is None and (missing := [name for name, value in own.items() if value is None]):
        raise ConfigError(f"a task of your own needs {' and '.join(missing)}", "pass all three")
    from instructue_feast.evaluation.suite import SuiteOptions
    from instructue_feast.evaluation.tasks import Task

    compute: Literal["float32", "bfloat16"] | None = None if dtype is None else dtype.value
    options = SuiteOptions(
        rows=_names(rows),
        tasks=_names(tasks),
        seed=seed,
        jobs=jobs or os.cpu_count() or 1,
        allow_leakage=allow_leakage,
        explain_users=explain_users if suite is not None else 0,
    )
    if not noise:
        options = dataclasses.replace(options, noise=())
    json_path = json_path or DEFAULT_FOLDER / f"{(suite.value if suite else task or '').replace('-', '_')}.json"
    if suite is None:
        assert task is not None
        assert instruction is not None
        assert labels is not None
        Instruction("task", instruction)  # refuses prompt markup before anything slow starts
        answers = (yes, no) if yes and no else ()
        own_task = Task(name=task, family="custom", subject=task, instruction=instruction, answers=answers)
        project = Project.open(config or DEFAULT_CONFIG, model, compute)
        _custom(project, as_of, own_task, labels, options, json_path)
    elif suite is Suite.complete_journey:
        project = Project.open(config or _journey_project(json_path.parent), model, compute)
        _complete_journey(project, options, soft_prompts, json_path)
    else:
        project = Project.open(config or _synthetic_project(json_path.parent), model, compute)
        _synthetic(project, as_of, options, json_path)


def _complete_journey(project: Project, options: SuiteOptions, soft_prompts: Path | None, json_path: Path) -> None:
    from instructue_feast.evaluation.document import suite_document
    from instructue_feast.evaluation.extracts import read_extract
    from instructue_feast.evaluation.journey import read_journey
    from instructue_feast.evaluation.journey_tasks import CUT, journey_tasks
    from instructue_feast.evaluation.ours import load_soft_prompts
    from instructue_feast.evaluation.plots import write_plots
    from instructue_feast.evaluation.report import markdown
    from instructue_feast.evaluation.suite import FEW_SHOT, run_journey_suite
    from instructue_feast.inference.soft_prompts import FOLDER

    config = project.config
    journey = read_journey(config)
    tasks = journey_tasks(journey, config).select(options.tasks).tasks  # refuses an unknown name before Spark starts
    _warn_of_old_model(project)
    model = project.load_model()
    folder = soft_prompts or (Path(config.model.path) / FOLDER if config.model.path is not None else None)
    if folder is not None and options.wants(*FEW_SHOT):
        prompts = load_soft_prompts(folder, tasks, model, required=soft_prompts is not None)
        options = dataclasses.replace(options, soft_prompts=prompts)
    history, book = read_extract(config, project.extract(CUT))
    options = dataclasses.replace(options, max_batch_tokens=config.model.max_batch_tokens)
    with StageDisplay() as display:
        result = run_journey_suite(config, journey, model, history, book, options, Steps(display).report)
    data = "The Complete Journey (84.51°, 2017), cut at 2017-10-01."
    document = suite_document(result, model, options, suite=Suite.complete_journey.value, data=data)
    _write(document, json_path, markdown, write_plots)
    _print_means(document)


def _custom(
    project: Project,
    as_of: str | None,
    task: Task,
    labels: Path,
    options: SuiteOptions,
    json_path: Path,
) -> None:
    from instructue_feast.evaluation.custom import MIN_OF_A_CLASS, run_custom_task
    from instructue_feast.evaluation.document import suite_document
    from instructue_feast.evaluation.extracts import latest_extract, read_extract
    from instructue_feast.evaluation.label_file import read_labels
    from instructue_feast.evaluation.plots import write_plots
    from instructue_feast.evaluation.report import markdown
    from instructue_feast.evaluation.tasks import require_learnable

    config = project.config
    extract_id = project.extract(parse_as_of(as_of)) if as_of else latest_extract(config)
    history, book = read_extract(config, extract_id)
    found = read_labels(labels, history.user_ids)
    require_learnable(task.name, found.labels, least=MIN_OF_A_CLASS)
    model = project.load_model()
    options = dataclasses.replace(options, noise=(), max_batch_tokens=config.model.max_batch_tokens)
    with StageDisplay() as display:
        result = run_custom_task(config, model, history, book, found, task, options, Steps(display).report)
    data = f"Project {config.project}, extract {extract_id}."
    document = suite_document(result, model, options, suite=f"task {task.name}", data=data)
    _write(document, json_path, markdown, write_plots)
    _print_means(document)


def _synthetic(project: Project, as_of: str | None, options: SuiteOptions, json_path: Path) -> None:
    from instructue_feast.evaluation.document import recovery_document
    from instructue_feast.evaluation.extracts import read_extract
    from instructue_feast.evaluation.plots import write_recovery_plot
    from instructue_feast.evaluation.recovery import read_truth, read_vocabulary, run_recovery
    from instructue_feast.evaluation.report import recovery_markdown

    config = project.config
    if config.users is None or config.users.table.path is None:
        raise ConfigError(f"project {config.project} has no users table", "make it with `instructue data synthetic`")
    raw = Path(config.users.table.path).parent
    truth = read_truth(raw / "truth")
    vocabulary = read_vocabulary(raw / "vocabulary") if options.wants_attributions else None
    model = project.load_model()
    history, book = read_extract(config, project.extract(parse_as_of(as_of or SYNTHETIC_END)))
    options = dataclasses.replace(options, max_batch_tokens=config.model.max_batch_tokens)
    with StageDisplay() as display:
        found, attributions, seconds = run_recovery(
            config, model, history, book, truth, options, Steps(display).report, vocabulary=vocabulary
        )
    document = recovery_document(
        found, model, options, users=len(truth.user_ids), seconds=seconds, attributions=attributions
    )
    _write(document, json_path, recovery_markdown, write_recovery_plot)
    print_table(
        "AUC of an interest, linear probe",
        ["instruction", "auc", "low", "high"],
        [[name, *(f"{one:.4f}" for one in document[key].values())] for key, name in _RECOVERY_ROWS.items()],
    )


_RECOVERY_ROWS = {"own": "about that interest", "others": "about another interest", "gap": "difference"}


def _journey_project(folder: Path) -> str:
    """The whole data set as a project; see `_must_be_made`."""
    from instructue_feast.datasets.complete_journey import NUM_HOUSEHOLDS, write_complete_journey

    root = folder / "complete_journey"
    if _must_be_made(root, "complete_journey"):
        with StageDisplay() as display:
            display.timed("data", lambda: (NUM_HOUSEHOLDS, sum(write_complete_journey(root).rows.values())))
    return str(root / "instructue.yaml")


def _synthetic_project(folder: Path) -> str:
    """A synthetic project; see `_must_be_made`."""
    from instructue_feast.datasets.project import write_project

    root = folder / "synthetic"
    if _must_be_made(root, "synthetic"):
        arguments = ["--out", str(root), "--users", str(SYNTHETIC_USERS)]
        run_job("instructue_spark.synthetic", arguments, log=root / "logs" / "synthetic.log")
        write_project(root, "synthetic")
    return str(root / "instructue.yaml")


def _must_be_made(root: Path, template: str) -> bool:
    """Whether a suite's own project is missing, or of another version of the package.

    Such a one is moved aside, with whatever was trained in it, but only in `DEFAULT_FOLDER`, which is ours.
    """
    from instructue_feast.datasets.project import is_current

    if not (root / "instructue.yaml").is_file():
        return True
    if is_current(root, template):
        return False
    if root.parent.resolve() != DEFAULT_FOLDER.resolve():
        err.print(f"[yellow]{root} is of another version of this package; remove it for a new one.[/]", soft_wrap=True)
        return False
    old = root.with_name(f"{root.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    try:
        root.rename(old)
    except OSError as error:
        raise StorageError(f"cannot move {root}: {error.strerror}", "remove that folder") from None
    err.print(f"{root} was of another version of this package: kept as {old}, made again.", soft_wrap=True)
    return True


def _warn_of_old_model(project: Project) -> None:
    """Says that the project's copy of the trained model is not the one that comes with this package."""
    from instructue_feast.datasets.project import CHECKPOINT, checkpoint_folder, has_old_checkpoint

    folder = Path(project.file).resolve().parent
    if project.config.model.path == str(folder / CHECKPOINT) and has_old_checkpoint(folder, "complete_journey"):
        err.print(
            f"[yellow]{folder / CHECKPOINT} is older than the model that comes with this package; that one is measured "
            f"with --model {checkpoint_folder('complete_journey')}[/]",
            soft_wrap=True,
        )


def _write(
    document: dict[str, Any],
    json_path: Path,
    markdown: Callable[[dict[str, Any]], str],
    plots: Callable[[dict[str, Any], Path], list[Path]],
) -> None:
    """Writes JSON, Markdown and pictures beside each other."""
    texts = {
        json_path: json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        json_path.with_suffix(".md"): markdown(document),
    }
    try:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            scratch = file.with_name(f".{file.name}.tmp")
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(file)
        pictures = plots(document, json_path.with_suffix(""))
    except OSError as error:
        raise StorageError(f"cannot write {json_path}: {error.strerror}", "free disk or mend the rights") from None
    for file in [*texts, *pictures]:
        err.print(f"wrote {file}", soft_wrap=True)


def _print_means(document: dict[str, Any]) -> None:
    rows, unseen = [], document["mean_unseen"]
    for name, value in document["mean"].items():
        figures = [f"{value[key]:.4f}" for key in ("auc", "auc_low", "auc_high")]
        never = [f"{unseen[name]['auc']:.4f}" if name in unseen else ""] if unseen else []
        rows.append([name, *figures, *never])
    title = f"Mean AUC over {len(document['tasks'])} tasks" if len(document["tasks"]) > 1 else "AUC"
    print_table(title, ["row", "auc", "low", "high", *(["never trained on"] if unseen else [])], rows)
    if not document["model"]["trained"]:
        out.print("[yellow]The model is untrained: its rows are a floor.[/]")


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(one.strip() for one in (text or "").split(",") if one.strip()) or None
