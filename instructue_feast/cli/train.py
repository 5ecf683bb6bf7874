"""`instructue train`: from a UserQA data set to a model folder."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Annotated

import typer

from instructue_feast.cli.console import (
    DEFAULT_CONFIG,
    ConfigOption,
    JsonOption,
    err,
    out,
    print_json,
    print_table,
)
from instructue_feast.config import load_config
from instructue_feast.errors import MissingDependencyError


def train(
    qa_id: Annotated[str, typer.Option("--qa", help="The data set that `instructue qa` built.")],
    folder: Annotated[str, typer.Option("--out", help="Folder of the trained model.")],
    config: ConfigOption = DEFAULT_CONFIG,
    settings: Annotated[str | None, typer.Option(help="YAML file of training settings.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier model.")] = False,
    stop_after: Annotated[int | None, typer.Option(help="Stop at this step with a checkpoint.", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Train adapters, focus, heads and LoRA on a UserQA data set.

    Example: [bold]instructue train --qa QA_ID --out models/mine --set steps=2000 --set llm_layers=6[/]
    """
    from instructue_feast.training.settings import read_settings

    project = load_config(config)
    chosen = read_settings(settings, changes or ())
    try:
        from instructue_feast.training.progress import ProgressBar
        from instructue_feast.training.run import load_training_data, make_model
        from instructue_feast.training.run import train as run
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs {error.name}", "pip install 'instructue-feast[model,train]'"
        ) from None
    data = load_training_data(project, qa_id)
    with contextlib.nullcontext() if as_json else err.status("loading the LLM"):
        model = make_model(project, chosen)
    result = run(
        model, data, chosen, folder, config=project, resume=resume, overwrite=overwrite, stop_after=stop_after,
        callbacks=[] if as_json else [ProgressBar(err)],
    )  # fmt: skip
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    names = ["contrastive_loss", "chance_loss", "autoregressive_loss", "accuracy", "temperature"]
    names += ["eval_auc_users", "eval_auc_wordings", "eval_auc_subjects"]
    rows = [[name, f"{result.metrics[name]:.4f}"] for name in names if name in result.metrics]
    print_table(f"Step {result.step} of {chosen.steps}", ["metric", "last value"], rows)
    if result.unusable_questions:
        out.print(f"{result.unusable_questions} questions left out: all their answers are equal.")
    if not result.finished:
        out.print("Stopped early. Go on with the same command and --resume.", soft_wrap=True)
        return
    out.print(f"Model: {result.out}. Put it into the config as model.path, then backfill.", soft_wrap=True)
