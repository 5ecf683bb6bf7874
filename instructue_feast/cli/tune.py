"""`instructue tune-instruction`: a soft prompt from a few labels."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, err, out, print_json, print_table
from instructue_feast.cli.jobs import StageDisplay
from instructue_feast.cli.project import Project, Steps, soft_tokens_of
from instructue_feast.errors import ConfigError
from instructue_feast.runs.manifest import parse_as_of

if TYPE_CHECKING:
    from instructue_feast.history.pack import PackedHistory
    from instructue_feast.inference.soft_tokens import SoftTokenTable
    from instructue_feast.instructions import Instruction
    from instructue_feast.model.modeling import InstructUEModel
    from instructue_feast.training.instruction_tuning import Tuned, TuningJob, TuningSettings


class Suite(StrEnum):
    """Suites whose tasks can be tuned in one go."""

    complete_journey = "complete-journey"


def tune_instruction(
    instruction: Annotated[str | None, typer.Argument(help="Id of the instruction; not with --suite.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    model: Annotated[str | None, typer.Option(help="Folder of a trained model; default: the config's.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV or Parquet file: user_id, label (0 or 1).")] = None,
    shots: Annotated[int, typer.Option(help="Users of each class to learn from.")] = 128,
    as_of: Annotated[str | None, typer.Option(help="Moment of the histories; default: the latest extract's.")] = None,
    yes: Annotated[str, typer.Option(help="Answer that means 1, if the instruction is a question.")] = "",
    no: Annotated[str, typer.Option(help="Answer that means 0.")] = "",
    suite: Annotated[Suite | None, typer.Option(help="Tune every task of a suite on what came before its cut.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: soft_prompts beside the config.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Most steps.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the soft prompt.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw of shots and of the steps.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Tune an instruction on a few labels: some vectors behind its words; model and backfill stay as they are.

    Example: [bold]instructue tune-instruction churn --labels churned.csv --shots 64 --as-of 2017-07-01T00:00:00Z[/]

    Example: [bold]instructue tune-instruction --suite complete-journey --out build/soft_prompts --shots 300[/]
    """
    if (instruction is None) == (suite is None):
        raise ConfigError("name either an instruction or a --suite", "one of the two")
    if instruction is not None and labels is None:
        raise ConfigError("--labels is missing", "pass a CSV or Parquet file with user_id and label")
    if bool(yes) != bool(no):
        raise ConfigError("--yes and --no belong together", "give both answers, or none")
    from instructue_feast.inference.soft_prompts import FOLDER
    from instructue_feast.training.instruction_tuning import TuningSettings

    changes = {"steps": steps, "tokens": tokens}
    settings = TuningSettings(seed=seed, **{name: value for name, value in changes.items() if value is not None})
    project = Project.open(config, model)
    folder = folder or Path(config).resolve().parent / FOLDER
    with StageDisplay(quiet=as_json) as display:
        show = Steps(display)
        if suite is not None:
            work = _suite(project, settings, shots, as_of, quiet=as_json)
        else:
            assert instruction is not None
            assert labels is not None
            answers = (yes, no) if yes else ()
            words = project.words(instruction)
            work = _labelled(project, words, labels, answers, settings, shots, as_of, quiet=as_json)
        found = _tune(work, settings, show)
    files = _save(work, found, folder)
    report = [_row(name, one) for name, one in found.items()]
    notes = [note] if (note := _seen_in_training(work)) else []
    if as_json:
        without = list(work.without_labels)
        print_json({"folder": str(folder), "instructions": report, "without_labels": without, "notes": notes})
        return
    columns = ["instruction", "positive", "negative", "untuned", "tuned", "step"]
    title = "AUC on the shots kept aside: of a linear probe, with answers the mean of that and of the cosine to them"
    print_table(title, columns, [[row["instruction"], *(row[key] for key in _COLUMNS)] for row in report])
    for name in work.without_labels:
        out.print(f"{name}: too few labels before the cut; written without vectors, so it stays untuned.")
    for note in notes:
        out.print(f"[yellow]{note}[/]", soft_wrap=True)
    err.print(f"wrote {len(files)} files to {folder}", soft_wrap=True)
    if instruction is not None:
        out.print(f"Put it into the config: soft_prompt: {files[0]}. Then backfill.", soft_wrap=True)


_COLUMNS = ("positive", "negative", "auc_untuned", "auc", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What there is to tune.

    Attributes:
        model: The model.
        table: Soft tokens of the users' texts.
        history: The users any job needs.
        jobs: By name of the file.
        without_labels: Instructions nobody is labelled for, likewise.
    """

    model: InstructUEModel
    table: SoftTokenTable
    history: PackedHistory
    jobs: dict[str, TuningJob]
    without_labels: dict[str, Instruction]


def _labelled(
    project: Project,
    instruction: Instruction,
    labels: Path,
    answers: tuple[str, ...],
    settings: TuningSettings,
    shots: int,
    as_of: str | None,
    *,
    quiet: bool,
) -> _Work:
    from instructue_feast.evaluation.extracts import latest_extract, read_extract, users_in_order
    from instructue_feast.evaluation.label_file import read_labels
    from instructue_feast.training.instruction_tuning import TuningJob, draw_shots, shared_users

    config = project.config
    extract_id = project.extract(parse_as_of(as_of), quiet=quiet) if as_of else latest_extract(config)
    history, book = read_extract(config, extract_id)
    found = read_labels(labels, history.user_ids)
    drawn = draw_shots(found.user_ids, found.labels, shots, settings=settings, name=f"instruction {instruction.id}")
    users, (job,) = shared_users([TuningJob(instruction=instruction, shots=drawn, answers=answers)])
    history = users_in_order(history, [found.user_ids[user] for user in users])
    model = project.load_model()
    return _Work(
        model=model,
        table=soft_tokens_of(model, book, history),
        history=history,
        jobs={instruction.id: job},
        without_labels={},
    )


def _suite(project: Project, settings: TuningSettings, shots: int, as_of: str | None, *, quiet: bool) -> _Work:
    """Labels of the suite's tasks over an earlier quarter: what happens after the suite's cut is never looked at."""
    from instructue_feast.evaluation.extracts import read_extract, users_in_order
    from instructue_feast.evaluation.journey import read_journey
    from instructue_feast.evaluation.journey_tasks import CUT, END, journey_tasks
    from instructue_feast.instructions import Instruction
    from instructue_feast.training.instruction_tuning import TuningJob, draw_shots, shared_users

    config = project.config
    cut = parse_as_of(as_of) if as_of else CUT - (END - CUT)
    _require_before(cut, CUT - (END - CUT))
    journey = read_journey(config)
    tasks = journey_tasks(journey, config).tasks
    earlier = journey_tasks(journey, config, cut=cut, end=cut + (END - CUT))
    known = {task.name: label_U for task, label_U in zip(earlier.tasks, earlier.labels, strict=True)}
    instructions = {task.name: Instruction(task.name, task.instruction) for task in tasks}
    jobs = {
        task.name: TuningJob(
            instruction=instructions[task.name],
            shots=draw_shots(
                earlier.user_ids, known[task.name], shots, settings=settings, name=f"task {task.name}", fewer=True
            ),
            answers=task.answers if len(task.answers) > 1 else (),
            num_positive=task.num_positive_answers,
        )
        for task in tasks
        if task.name in known
    }
    users, moved = shared_users(list(jobs.values()))
    history, book = read_extract(config, project.extract(cut, quiet=quiet))
    history = users_in_order(history, [earlier.user_ids[user] for user in users])
    model = project.load_model()
    return _Work(
        model=model,
        table=soft_tokens_of(model, book, history),
        history=history,
        jobs=dict(zip(jobs, moved, strict=True)),
        without_labels={name: one for name, one in instructions.items() if name not in jobs},
    )


def _require_before(cut: datetime, latest: datetime) -> None:
    if cut > latest:
        raise ConfigError(
            f"--as-of {cut.isoformat()} is less than a quarter before the suite's cut",
            f"take {latest.isoformat()} or earlier, so that no label looks behind the cut",
        )


def _seen_in_training(work: _Work) -> str:
    """A note when the model was trained on what the labels ask; empty when it was not."""
    through = work.model.config.trained_through
    as_of = datetime.fromtimestamp(int(work.history.as_of_us.max()) / 1e6, UTC)
    if through is None or datetime.fromisoformat(through) <= as_of:
        return ""
    return (
        f"The model was trained on events up to {through}, later than the histories' as_of {as_of.isoformat()}: it may "
        "know these labels, so both figures are optimistic, and so is the choice of the step. Measure the soft prompt "
        "on labels from after the training."
    )


def _tune(work: _Work, settings: TuningSettings, show: Steps) -> dict[str, Tuned]:
    from instructue_feast.training.instruction_tuning import InstructionTuner
    from instructue_feast.training.user_prefixes import UserPrefixes

    prefixes = UserPrefixes(work.model, work.table, work.history, on_users=show.of("users"))
    tuner = InstructionTuner(prefixes, settings)
    report, found = show.of("tune"), {}
    report(0, len(work.jobs))
    for done, (name, job) in enumerate(work.jobs.items(), 1):
        found[name] = tuner.tune(job)
        report(done, len(work.jobs))
    return found


def _save(work: _Work, found: dict[str, Tuned], folder: Path) -> list[Path]:
    from instructue_feast.inference.soft_prompts import save_soft_prompt
    from instructue_feast.training.instruction_tuning import untuned_prompt

    prompts = {name: one.prompt for name, one in found.items()}
    prompts |= {name: untuned_prompt(one, work.model) for name, one in work.without_labels.items()}
    files = [folder / f"{name}.safetensors" for name in prompts]
    for file, prompt in zip(files, prompts.values(), strict=True):
        save_soft_prompt(prompt, file)
    return files


def _row(name: str, tuned: Tuned) -> dict[str, Any]:
    counts = tuned.prompt.labels
    return {
        "instruction": name,
        "positive": counts["positive"],
        "negative": counts["shots"] - counts["positive"],
        "auc_untuned": tuned.auc_untuned,
        "auc": tuned.auc,
        "step": tuned.step,
        "digest": tuned.prompt.digest,
    }
