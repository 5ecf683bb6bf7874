"""Does what is served equal what was computed? Every check a CI job or an operator asks of a project at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as ds
from feast import FeatureStore

from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.errors import InstructueError, StorageError
from instructue_feast.feature_store.lookup import read_stored, served_view
from instructue_feast.feature_store.materialize import CONFIG_NAME
from instructue_feast.feature_store.session import open_store, quiet
from instructue_feast.history.pack import PackedHistory
from instructue_feast.instructions import Instruction
from instructue_feast.runs.publish import Publication, PublishedView
from instructue_feast.runs.reader import run_manifest
from instructue_feast.runs.serving import served_views
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.vectors import ViewVectors, publication_of, read_view
from instructue_feast.schema import PACKED_HISTORY

COSINE = 1 - 1e-5
"""What an embedding computed again must reach with the published one."""

SMALLER_COSINE = 0.99
"""What a vector stored as float16 or int8 must reach."""


@dataclass(frozen=True, slots=True)
class Check:
    """One answer; `ok` is `None` where the question could not be asked, and `detail` says why."""

    name: str
    view: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """What to ask.

    Attributes:
        sample: Users of each view that are compared.
        encode: Users of each view that are embedded again from their packed history; 0 for none.
        min_coverage: Share of the sampled users that must be online.
        max_age: How old the newest run may be; `None` leaves that to the ttl.
        now: The present; by default, now.
    """

    sample: int = 256
    encode: int = 4
    min_coverage: float = 1.0
    max_age: timedelta | None = None
    now: datetime | None = None


def check_repo(repo: Path | str, settings: CheckSettings | None = None) -> list[Check]:
    """Checks what a repo serves: version, coverage, offline = online = direct encode, staleness and ttl.

    Args:
        repo: Folder with `feature_store.yaml` and `instructue.yaml`.
        settings: What to ask.

    Raises:
        ConfigError: The folder is no such repo, or nothing is published.
    """
    settings = settings or CheckSettings()
    folder = Path(repo).resolve()
    config = load_config(folder / CONFIG_NAME)
    output, store = OutputStore(config.output.path), open_store(folder)
    publication = publication_of(output)
    served = served_views(output, publication, config.feast.promotion)
    checks = list(_registry(store, config, publication, served))
    declared = config.registry()
    for instruction, name in served.items():
        if instruction in declared:
            view = publication.view(name)
            checks += _freshness(config, view, settings)
            try:
                published = read_view(output, publication, view)
            except StorageError as error:
                checks.append(Check("offline files", name, False, error.message))
                continue
            users = len(published.user_ids)
            rows = np.linspace(0, users - 1, min(settings.sample, users)).astype(np.int64)
            checks += _online(store, published, rows, settings)
            checks.append(_encoded(output, config, published, rows[: settings.encode]))
    return checks


def _registry(
    store: FeatureStore, config: InstructueConfig, publication: Publication, served: dict[str, str]
) -> Iterator[Check]:
    with quiet():
        registered = {view.name: view.tags for view in store.registry.list_feature_views(store.project)}
        services = {one.name: one for one in store.registry.list_feature_services(store.project)}
    service = services.get(config.feast.service)
    names = {one.name for one in service.feature_view_projections} if service else set()
    wanted = {name for instruction, name in served.items() if instruction in config.registry()}
    detail = "points to the views to be served"
    if names != wanted:
        detail = f"points to {sorted(names)}, to be served are {sorted(wanted)}: apply again"
    yield Check("feature service", config.feast.service, names == wanted, detail)
    for instruction, name in served.items():
        tags, view = registered.get(name), publication.view(name)
        if instruction not in config.registry():
            continue
        if tags is None:
            yield Check("version", name, False, "the registry has no such view: apply again")
            continue
        same = tags.get("embedding_version") == view.embedding_version and tags.get("publication") == publication.id
        yield Check(
            "version", name, same,
            f"embedding version {view.embedding_version[:8]}, model {view.model_version[:8]}" if same
            else f"the registry holds publication {tags.get('publication')}, current is {publication.id}: apply again",
        )  # fmt: skip


def _freshness(config: InstructueConfig, view: PublishedView, settings: CheckSettings) -> Iterator[Check]:
    age = (settings.now or datetime.now(UTC)) - datetime.fromisoformat(view.newest.as_of)
    text = f"as_of {view.newest.as_of}, {age.days} days old"
    if config.feast.ttl_days:
        limit = timedelta(days=config.feast.ttl_days)
        yield Check("ttl", view.name, age <= limit, f"{text}, ttl {config.feast.ttl_days} days")
    if settings.max_age is not None:
        yield Check("staleness", view.name, age <= settings.max_age, f"{text}, allowed {settings.max_age.days}")


def _online(
    store: FeatureStore, published: ViewVectors, rows: npt.NDArray[np.int64], settings: CheckSettings
) -> Iterator[Check]:
    view, users = published.view, published.user_ids.take(rows).to_pylist()
    try:
        with quiet():
            own = served_view(store, view.name)
            vectors, found, as_of = read_stored(store, {view.instruction: own}, users)[view.instruction]
    except InstructueError as error:
        yield Check("coverage", view.name, False, error.message)
        return
    except Exception as error:  # a view the registry does not have, a store that is down
        yield Check("coverage", view.name, False, f"cannot be looked up: {type(error).__name__}")
        return
    share = float(found.mean()) if len(users) else 1.0
    detail = f"{int(found.sum())} of {len(users)} sampled users are online"
    yield Check("coverage", view.name, share >= settings.min_coverage, detail)
    exact = getattr(store.config.online_store, "vector_storage", "float32") == "float32"
    expected = published.vectors[rows]
    same = (vectors == expected).all(axis=1) if exact else (vectors * expected).sum(axis=1) >= SMALLER_COSINE
    wrong = int(np.count_nonzero(found & ~same))
    what = "bit by bit" if exact else f"to a cosine of {SMALLER_COSINE}"
    yield Check("offline = online", view.name, wrong == 0, f"{int(found.sum()) - wrong} of {int(found.sum())} {what}")
    moment = np.datetime64(datetime.fromisoformat(view.newest.as_of).astimezone(UTC).replace(tzinfo=None), "us")
    other = int(np.count_nonzero(found & (as_of != moment)))
    yield Check("as_of", view.name, other == 0, f"{other} sampled users are of another run than {view.newest.run_id}")


def _encoded(
    output: OutputStore, config: InstructueConfig, published: ViewVectors, rows: npt.NDArray[np.int64]
) -> Check:
    """Embeds a few users again, from the packed histories the run was made from."""
    view, name = published.view, "offline = direct encode"
    if not len(rows):
        return Check(name, view.name, None, "not asked for")
    manifest = run_manifest(output, view.newest.run_id) if view.newest.run_id in output.names("runs") else None
    if manifest is None or not output.exists("extracts", manifest.extract_id, "manifest.json"):
        return Check(name, view.name, None, f"run {view.newest.run_id} or its extract is gone")
    instruction = _instruction(config, view)
    if instruction is None:
        return Check(name, view.name, None, "the instruction was tuned, and the config holds another one now")
    try:
        from instructue_feast.inference.from_run import open_embedder
    except ImportError as error:
        return Check(name, view.name, None, f"the extra `model` is not installed: {error}")
    embedder = open_embedder(output, manifest.run_id, dtype=config.model.dtype)
    users = published.user_ids.take(rows)
    files = output.files("extracts", manifest.extract_id, "history", "bucket=*")
    table = ds.dataset(files, filesystem=output.fs, format="parquet", partitioning=None).to_table(
        columns=PACKED_HISTORY.names, filter=ds.field("user_id").isin(users)
    )
    settings = embedder.model.config
    history = PackedHistory.from_arrow(
        table, num_sources=len(settings.sources or []), num_numeric=len(settings.numeric_columns or [])
    )
    if len(history) != len(rows):
        return Check(name, view.name, False, f"the extract holds {len(history)} of {len(rows)} sampled users")
    place = {user: row for row, user in enumerate(history.user_ids)}
    vectors = embedder.encode(history.take([place[user] for user in users.to_pylist()]), [instruction])[:, 0]
    cosine = (vectors * published.vectors[rows]).sum(axis=1)
    lowest = float(cosine.min())
    return Check(name, view.name, lowest >= COSINE, f"lowest cosine of {len(rows)} users {lowest:.7f}")


def _instruction(config: InstructueConfig, view: PublishedView) -> Instruction | None:
    """The instruction as the run used it: as declared now, or with the words alone."""
    declared = config.registry()
    if view.instruction not in declared:
        return None
    found = declared[view.instruction]
    options = [found, dataclasses.replace(found, soft_prompt=None)]
    return next((one for one in options if one.content_hash == view.content_hash), None)
