"""`instructue qa`: what users did, as questions and answers to learn from."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

import numpy as np
import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, out, print_json, print_table
from instructue_feast.cli.extract import CoresOption, log_file
from instructue_feast.cli.jobs import run_job
from instructue_feast.cli.moments import moment, moments
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.errors import ConfigError
from instructue_feast.runs.manifest import to_json
from instructue_feast.runs.store import OutputStore
from instructue_feast.user_qa.dataset import UserQA
from instructue_feast.user_qa.loading import load_manifest, load_user_qa

_DAY_US = 86_400_000_000


def qa(
    config: ConfigOption = DEFAULT_CONFIG,
    start: Annotated[str | None, typer.Option("--from", help="First as_of, ISO 8601; a date is midnight UTC.")] = None,
    end: Annotated[str | None, typer.Option("--to", help="Last possible as_of.")] = None,
    every: Annotated[str, typer.Option(help="Step between as_ofs: 14d, 4w.")] = "14d",
    as_of: Annotated[list[str] | None, typer.Option("--as-of", help="One more as_of; repeatable.")] = None,
    cut: Annotated[str | None, typer.Option(help="Nothing at or after this is looked at, answers included.")] = None,
    extract_id: Annotated[list[str] | None, typer.Option("--extract", help="Finished extract; repeatable.")] = None,
    qa_id: Annotated[str | None, typer.Option(help="Id of the data set; of an existing one with --show alone.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Print this many example triplets.")] = 0,
    cores: CoresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build a UserQA data set: (user history, instruction, answer) triplets at many points in time.

    Example: [bold]instructue qa --from 2017-03-15 --to 2017-07-01 --every 14d --cut 2017-10-01 --show 5[/]
    """
    project = load_config(config)
    store = OutputStore(project.output.path)
    asked = moments(start, end, every, as_of)
    if asked:
        manifest = _build(config, project, asked, cut, extract_id, qa_id, cores, quiet=as_json)
    elif qa_id is not None:
        manifest = to_json(load_manifest(store, qa_id))
    else:
        raise ConfigError("no as_of given", "pass --from, --to and --cut, or --as-of; or --qa-id to look at a data set")
    examples = _examples(load_user_qa(store, manifest["qa_id"], project), show) if show else []
    if as_json:
        print_json(manifest | ({"examples": examples} if show else {}))
        return
    _print(manifest)
    if examples:
        columns = ["as of", "events", "instruction", "answer"]
        print_table("Examples; user ids are left out", columns, [list(one.values()) for one in examples])
    out.print(f"Next: instructue train --qa {manifest['qa_id']} --out <folder>", soft_wrap=True)


def _build(
    config: str,
    project: InstructueConfig,
    as_ofs: list[datetime],
    cut: str | None,
    extracts: list[str] | None,
    qa_id: str | None,
    cores: int | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    if cut is None:
        raise ConfigError("--cut is missing", "say from when on nothing may be looked at, for example 2017-10-01")
    if project.user_qa is None:
        raise ConfigError(f"{config} has no `user_qa` section", "declare question families; see docs/user_qa.md")
    arguments = ["--config", config, "--as-ofs", ",".join(one.isoformat() for one in as_ofs)]
    arguments += ["--cut", moment(cut, "--cut").isoformat()]
    arguments += ["--extracts", ",".join(extracts)] if extracts else []
    arguments += ["--qa-id", qa_id] if qa_id else []
    arguments += ["--cores", str(cores)] if cores else []
    return run_job("instructue_spark.user_qa", arguments, log=log_file(project.output.path, "qa"), quiet=quiet).value


def _examples(qa: UserQA, number: int) -> list[dict[str, Any]]:
    """Triplets of different rows and families, the same ones every time."""
    rng = np.random.default_rng(0)
    families = sorted({one.family for one in qa.questions})
    found = []
    for place in range(number):
        row = int(rng.integers(len(qa)))
        pairs = np.arange(qa.offsets[row], qa.offsets[row + 1])
        wanted = families[place % len(families)]
        mine = [pair for pair in pairs if qa.questions[qa.question_P[pair]].family == wanted]
        pair = int(rng.choice(mine or pairs))
        at = datetime.fromisoformat("1970-01-01T00:00:00+00:00") + timedelta(microseconds=int(qa.history.as_of_us[row]))
        found.append(
            {
                "as_of": at.isoformat(),
                "events": int(qa.history.num_events[row].sum()),
                "instruction": qa.questions[qa.question_P[pair]].wordings[0],
                "answer": qa.answers[qa.answer_P[pair]],
            }
        )
    return found


def _print(manifest: dict[str, Any]) -> None:
    rows, dropped = [], []
    for name, one in manifest["families"].items():
        rows.append(
            [name, one["kind"], one["source"], one["days"], one["questions"], one["held_out"], one["pairs"],
             one["first_rate"]]
        )  # fmt: skip
        dropped += [[name, reason, number] for reason, number in one["dropped"].items()]
    columns = ["family", "kind", "source", "days", "questions", "held out", "pairs", "rate of first answer"]
    print_table(f"UserQA {manifest['qa_id']}, nothing from {manifest['trained_through']} on", columns, rows)
    if dropped:
        print_table("Left out", ["family", "reason", "questions"], dropped)
    totals = [
        ["users and as_ofs", manifest["users"]],
        ["questions", manifest["num_questions"]],
        ["of them never trained on", manifest["num_held_out"]],
        *[[f"pairs, {split}", number] for split, number in manifest["pairs"].items()],
        ["answers checked a second time", manifest["checked"]],
        *[[f"skipped rows, {reason}", number] for reason, number in manifest["dropped"].items()],
    ]
    print_table("Totals", ["what", "number"], totals)
