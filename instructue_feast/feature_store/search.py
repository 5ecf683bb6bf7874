"""Finding users and items by embedding: who is like whom, whom a description fits, what fits a user.

Exact by default: the published vectors of a view are one matrix, and a query one product with it. Feast 0.67's own
`retrieve_online_documents_v2` gives features to the wrong entities, and its SQLite search needs Python 3.10.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, DataError, MissingDependencyError, VersionMismatchError, did_you_mean
from instructue_feast.feature_store.hnsw import UserIndex, build_index, open_index
from instructue_feast.runs.items import ItemsManifest, item_sets, read_items, write_items
from instructue_feast.runs.publish import Publication, current_publication
from instructue_feast.runs.reader import run_manifest
from instructue_feast.runs.serving import served_views
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from instructue_feast.runs.vectors import ViewVectors, publication_of, read_view

if TYPE_CHECKING:
    from instructue_feast.model.modeling import InstructUEModel

# U = users, I = items, D = embedding_dim
Matrix = npt.NDArray[np.float32]
_CHUNK = 65_536
_CHECK_SECONDS = 1.0
CONFIG_NAME = "instructue.yaml"


@dataclass(frozen=True, slots=True)
class Hits:
    """What was found, the best first.

    Attributes:
        ids: User or item ids.
        scores: `[k]` float32 cosines.
        view: The feature view the user embeddings came from, which names the embedding version.
    """

    ids: list[str]
    scores: Matrix
    view: str


class UserSearch:
    """Searches what a project serves now. One object serves any number of threads.

    Follows the publication and the items, and forgets erased users, within a second.

    Args:
        repo: Folder with `instructue.yaml`.

    Example:
        search = UserSearch("feature_repo")
        search.similar("1228", "churn", k=20).ids
        search.target("families that buy organic baby food", "next_basket", k=500).ids
    """

    def __init__(self, repo: Path | str) -> None:
        self._config = load_config(Path(repo) / CONFIG_NAME)
        self._store = OutputStore(self._config.output.path)
        self._lock = threading.RLock()
        self._state: tuple[str, tuple[str, ...], dict[str, str]] | None = None
        self._check_at = 0.0
        self._publication: Publication | None = None
        self._erased = Tombstones(self._store)
        self._views: dict[str, ViewVectors] = {}
        self._indexes: dict[str, UserIndex] = {}
        self._item_versions: dict[str, str] = {}
        self._items: dict[str, tuple[dict[str, int], Matrix]] = {}
        self._models: dict[str, InstructUEModel] = {}

    def similar(self, user_id: str, instruction: str, k: int = 10, *, exact: bool = True) -> Hits:
        """The users most like one under an instruction, that user left out.

        Args:
            user_id: The user.
            instruction: Instruction id.
            k: How many.
            exact: Compare with everybody; `False` asks the view's HNSW index (`instructue index`).

        Raises:
            ConfigError: An unknown instruction or user (the message does not name the user), or no index.
            VersionMismatchError: The index is of another run.
        """
        view = self._view(instruction)
        row = self._row(view, user_id)
        return self._nearest(view, view.vectors[row], k, exact, without=row)

    def target(self, audience: str, instruction: str, k: int = 10, *, exact: bool = True) -> Hits:
        """The users a description in words fits best: the answer tower against user embeddings.

        Args:
            audience: The description, in the words an answer would have.
            instruction: Instruction id: what the description is about.
            k: How many.
            exact: As in `similar`.

        Raises:
            ConfigError: An unknown instruction, an empty description, or no index.
            MissingDependencyError: The extra `model` is not installed.
        """
        if not audience.strip():
            raise ConfigError("an empty description fits nobody", "say whom you look for")
        view = self._view(instruction)
        return self._nearest(view, answer_vectors(self._model(view), [audience])[0], k, exact)

    def recommend(
        self, user_id: str, instruction: str, k: int = 10, *, items: Sequence[str] | Mapping[str, str] | None = None
    ) -> Hits:
        """The items that fit a user best.

        Args:
            user_id: The user.
            instruction: Instruction id, such as one about the next purchase.
            k: How many.
            items: Ids among the published items; or id -> text, read now; all published items for `None`.

        Raises:
            ConfigError: An unknown instruction, user or item; no published items.
        """
        if k < 1:
            raise ConfigError(f"cannot find {k} items", "ask for at least one")
        view = self._view(instruction)
        vector = view.vectors[self._row(view, user_id)]
        if isinstance(items, Mapping):
            ids, matrix = list(items), answer_vectors(self._model(view), list(items.values()))
        else:
            place, matrix = self._published_items(view.view.model_version)
            ids = list(place)
            if items is not None:
                for one in items:
                    if one not in place:
                        raise ConfigError(f"unknown item {one!r}", did_you_mean(one, place))
                matrix, ids = matrix[[place[one] for one in items]], list(items)
        rows, scores = best(matrix, vector, k)
        return Hits([ids[row] for row in rows], scores, view.view.name)

    def embed_answers(self, texts: Sequence[str], instruction: str) -> Matrix:
        """`[A, D]` answers in the space of an instruction's user embeddings."""
        view = self._view(instruction)
        return answer_vectors(self._model(view), texts)

    def _view(self, instruction: str) -> ViewVectors:
        self._follow()
        with self._lock:
            assert self._state is not None
            assert self._publication is not None
            current = self._state[2]
            if instruction not in current:
                raise ConfigError(f"unknown instruction {instruction!r}", did_you_mean(instruction, current))
            name = current[instruction]
            if name not in self._views:
                view = read_view(self._store, self._publication, self._publication.view(name))
                self._views[name] = _without(view, self._erased)
            return self._views[name]

    def _follow(self) -> None:
        """Reads again what has changed: another publication, promotion or erasure."""
        with self._lock:
            if self._state is not None and time.monotonic() < self._check_at:
                return
            publication = current_publication(self._store) or publication_of(self._store)
            served = served_views(self._store, publication, self._config.feast.promotion)
            state = (publication.id, tuple(self._store.names("tombstones")), served)
            if state != self._state:
                self._state, self._publication = state, publication
                self._erased = Tombstones(self._store)
                self._views.clear()
                self._indexes.clear()
            item_versions = {one.model_version: one.created for one in item_sets(self._store)}
            if item_versions != self._item_versions:
                self._item_versions = item_versions
                self._items.clear()
            self._check_at = time.monotonic() + _CHECK_SECONDS

    def _published_items(self, model_version: str) -> tuple[dict[str, int], Matrix]:
        """The row of each item, and `[I, D]` vectors."""
        with self._lock:
            if model_version not in self._items:
                ids, matrix = read_items(self._store, model_version)
                self._items[model_version] = {one: row for row, one in enumerate(ids)}, matrix
            return self._items[model_version]

    def _row(self, view: ViewVectors, user_id: str) -> int:
        row = pc.index(view.user_ids, user_id).as_py()
        if row < 0:
            raise ConfigError(f"view {view.view.name} has no such user", "use an id of the project's users table")
        return int(row)

    def _nearest(self, view: ViewVectors, vector: Matrix, k: int, exact: bool, without: int | None = None) -> Hits:
        if k < 1:
            raise ConfigError(f"cannot find {k} users", "ask for at least one")
        more = k + (without is not None)
        if exact:
            rows, scores = best(view.vectors, vector, more)
            ids = view.user_ids.take(rows).to_pylist()
            keep = [at for at, row in enumerate(rows) if row != without][:k]
        else:
            ids, scores = self._index(view).search(vector, more)
            own, gone = None if without is None else view.user_ids[without].as_py(), self._erased.contains(ids)
            keep = [at for at, one in enumerate(ids) if one != own and not gone[at]][:k]
        return Hits([ids[at] for at in keep], scores[keep], view.view.name)

    def _index(self, view: ViewVectors) -> UserIndex:
        with self._lock:
            if view.view.name not in self._indexes:
                self._indexes[view.view.name] = open_index(self._store, view.view)
            return self._indexes[view.view.name]

    def _model(self, view: ViewVectors) -> InstructUEModel:
        version, run_id = view.view.model_version, view.view.newest.run_id
        with self._lock:
            if version not in self._models:
                self._models = {version: open_run_model(self._store, run_id, version)}
            return self._models[version]


def _without(view: ViewVectors, erased: Tombstones) -> ViewVectors:
    """A view without users who were erased; its files hold them until the erasure has come to these."""
    if not len(erased):
        return view
    kept = np.flatnonzero(~erased.contains(view.user_ids.to_pylist()))
    return ViewVectors(view.view, view.user_ids.take(pa.array(kept)), view.vectors[kept])


def open_run_model(store: OutputStore, run_id: str, version: str) -> InstructUEModel:
    """The model of a run.

    Raises:
        MissingDependencyError: The extra `model` is not installed.
        VersionMismatchError: The run was made by another model version.
    """
    try:
        from instructue_feast.inference.from_run import open_model
    except ImportError as error:
        raise MissingDependencyError(
            f"reading words needs the model: {error}", "pip install 'instructue-feast[serve,model]'"
        ) from None
    found = run_manifest(store, run_id).model_version
    if found != version:
        raise VersionMismatchError(
            f"run {run_id} was made by model version {found[:8]}, the view by {version[:8]}", "publish the run again"
        )
    return open_model(store, run_id)


def answer_vectors(model: InstructUEModel, texts: Sequence[str], batch: int = 64) -> Matrix:
    """`[A, D]` float32 unit vectors of answers, in batches of like length.

    Raises:
        DataError: A text is empty; the message gives its position.
    """
    import torch

    empty = [row for row, one in enumerate(texts) if not one.strip()]
    if empty:
        raise DataError(f"the text at position {empty[0]} is empty", "give every item a text")
    ids = [model.answer_ids(one) for one in texts]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    out = np.empty((len(ids), model.config.embedding_dim), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            out[rows] = model.answer_embeddings([ids[row] for row in rows]).float().cpu().numpy()
    return out


def best(matrix: Matrix, vector: Matrix, k: int) -> tuple[npt.NDArray[np.int64], Matrix]:
    """Rows of the k largest products, and the products: the largest first, ties by row."""
    scores = np.empty(len(matrix), np.float32)
    for start in range(0, len(matrix), _CHUNK):
        np.matmul(matrix[start : start + _CHUNK], vector, out=scores[start : start + _CHUNK])
    k = min(k, len(scores))
    if k == 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    bound = np.partition(scores, len(scores) - k)[len(scores) - k]
    rows = np.flatnonzero(scores >= bound)
    rows = rows[np.argsort(-scores[rows], kind="stable")][:k]
    return rows.astype(np.int64), scores[rows]


def build_indexes(repo: Path | str, instructions: Sequence[str] | None = None) -> dict[str, int]:
    """Builds the HNSW index of the served view of each instruction; returns the users in each, by view.

    Raises:
        ConfigError: An unknown instruction, or nothing is published.
        MissingDependencyError: The extra `search` is not installed.
        StorageError: A view cannot be read, or an index not written.
    """
    config = load_config(Path(repo) / CONFIG_NAME)
    store = OutputStore(config.output.path)
    publication = publication_of(store)
    served = served_views(store, publication, config.feast.promotion)
    built = {}
    for name in instructions or served:
        if name not in served:
            raise ConfigError(f"unknown instruction {name!r}", did_you_mean(name, served))
        view = read_view(store, publication, publication.view(served[name]))
        build_index(store, view)
        built[view.view.name] = len(view.user_ids)
    return built


def embed_items(repo: Path | str, item_ids: Sequence[str], texts: Sequence[str]) -> ItemsManifest:
    """Embeds items through the answer tower of the published model and puts them beside its runs.

    They become a feature view, `items__<model version>`, with the next apply, and are served with the next
    materialization.

    Raises:
        ConfigError: Nothing is published.
        DataError: No items, an id twice, an empty text (by position).
    """
    config = load_config(Path(repo) / CONFIG_NAME)
    store = OutputStore(config.output.path)
    publication = publication_of(store)
    manifest = run_manifest(store, publication.run_id)
    model = open_run_model(store, publication.run_id, manifest.model_version)
    return write_items(store, manifest.model_version, item_ids, answer_vectors(model, texts))
