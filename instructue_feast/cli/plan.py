"""`instructue plan`: what backfills will cost, from a calibration of this machine."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, err, print_json
from instructue_feast.cli.plan_view import print_plan
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.runs.plan import Calibration, Line, Workload, plan

REDIS = Line(base=200.0, slope=832.0)
"""Redis 6.2, vectors of 128 numbers, ids of 17 characters; measured by `feature_store.store_size`."""


def plan_command(
    users: Annotated[int, typer.Option(min=1, help="Users to embed.")],
    instructions: Annotated[int | None, typer.Option(min=1, help="Instructions; default: the config's.")] = None,
    days: Annotated[int, typer.Option(min=1, help="Days the nightly job runs.")] = 1,
    workers: Annotated[int | None, typer.Option(min=1, help="Cores or GPUs; default: this machine's.")] = None,
    changed: Annotated[float, typer.Option(min=0, max=1, help="Share of users that change in a day.")] = 0.05,
    new_texts: Annotated[float, typer.Option(min=0, max=1, help="Share of texts that are new in a day.")] = 0.01,
    calibration: Annotated[
        str | None, typer.Option(help="JSON file of a calibration: used when it exists, else written.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each measurement of a calibration.")] = 10.0,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Predict tokens, hours, storage and online memory of full and incremental backfills.

    Example: [bold]instructue plan --users 1000000000 --instructions 8 --days 30 --workers 512[/]
    """
    if calibration is not None and Path(calibration).exists():
        measured, default = Calibration.load(calibration), instructions
    else:
        project = _project(config)
        measured, default = calibrate(project, seconds=seconds), instructions or len(project.instructions)
        if calibration is not None:
            measured.save(calibration)
    if default is None:
        default = len(_project(config).instructions)
    workload = Workload(
        users=users, instructions=default, days=days, workers=workers or _workers(measured), changed=changed,
        new_texts=new_texts, buckets=None,
    )  # fmt: skip
    result = plan(measured, workload)
    if as_json:
        print_json({"plan": dataclasses.asdict(result), "calibration": dataclasses.asdict(measured)})
    else:
        print_plan(result)


def calibrate(project: InstructueConfig, *, seconds: float = 10.0) -> Calibration:
    """Measures this machine with a project's model, on users of its latest extract where it has one.

    Args:
        project: The project.
        seconds: Length of each measurement.

    Raises:
        DataError: The model or the extract cannot be read.
    """
    import torch

    from instructue_feast.cli.plan_data import look_at
    from instructue_feast.feature_store.store_size import redis_bytes, sqlite_bytes
    from instructue_feast.inference.calibrate import FEW, MANY, measure_model
    from instructue_feast.model.factory import load_model

    err.print("calibrating this machine: a minute or two, depending on the model")
    model = load_model(project)
    history, texts, data, extraction = look_at(project)
    rates = measure_model(
        model, history, texts, project.registry().select(None), dtype=project.model.dtype,
        max_batch_tokens=project.model.max_batch_tokens, seconds=seconds,
    )  # fmt: skip
    dim = model.config.embedding_dim
    online = {"sqlite": _line([sqlite_bytes(dim, number) for number in (FEW, MANY)], FEW, MANY)}
    redis = [redis_bytes(dim, number) for number in (FEW, MANY)]
    known = [one for one in redis if one is not None]
    online["redis"] = _line(known, FEW, MANY) if len(known) == 2 else dataclasses.replace(
        REDIS, slope=REDIS.slope + 4.0 * (dim - 128)
    )  # fmt: skip
    layers = model.backbone.config.num_hidden_layers  # type: ignore[union-attr]
    return Calibration(
        device=_device(),
        accelerator=torch.cuda.is_available(),
        model=f"{model.config.llm} of {layers} layers in {project.model.dtype}",
        versions=f"torch {torch.__version__}",
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        data=data,
        extraction=extraction,
        embedding_dim=dim,
        encoder_dim=max((model.config.encoder_dims or {"": 1}).values()),
        hidden_size=model.config.hidden_size,
        focus_dim=model.focus_dim,
        online_bytes=online,
        **{field.name: getattr(rates, field.name) for field in dataclasses.fields(rates)},
    )


def _project(config: str) -> InstructueConfig:
    """The project's config; without one, the synthetic example's with the default model."""
    if config != DEFAULT_CONFIG or Path(config).exists():
        return load_config(config)
    from instructue_feast.datasets.project import write_project

    with tempfile.TemporaryDirectory() as folder:
        return load_config(write_project(Path(folder), "synthetic"))


def _workers(measured: Calibration) -> int:
    return 1 if measured.accelerator else os.cpu_count() or 1


def _line(values: list[float], few: int, many: int) -> Line:
    slope = (values[1] - values[0]) / (many - few)
    return Line(base=values[0] - few * slope, slope=slope)


def _device() -> str:
    import platform

    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"a core of {name}"
