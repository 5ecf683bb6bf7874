"""Moving the feature service from one embedding version to another, once the online store holds the new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instructue_feast.config import load_config
from instructue_feast.errors import StorageError
from instructue_feast.feature_store.lookup import read_stored, served_view
from instructue_feast.feature_store.materialize import CONFIG_NAME, apply_repo
from instructue_feast.feature_store.session import open_store, quiet
from instructue_feast.runs.publish import Publication
from instructue_feast.runs.serving import promote_views, promoted_before, served_views
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.vectors import publication_of, published_view, read_view

SAMPLE = 1_000
"""Users of each view that must be in the online store, with the right vector, before anything moves."""


@dataclass(frozen=True, slots=True)
class Promoted:
    """What moved: instruction -> view before and view now; and how many users of each were looked up first."""

    moved: dict[str, tuple[str, str]]
    checked: dict[str, int]


def promote(repo: Path | str, views: Mapping[str, str] | None = None, *, back: bool = False) -> Promoted:
    """Moves the feature service, after looking the new views up in the online store.

    Args:
        repo: Folder with `feature_store.yaml` and `instructue.yaml`.
        views: Instruction -> view; the views of the current publication for `None`.
        back: Return to what was served before the last promotion instead.

    Raises:
        ConfigError: A view that is not published, or nothing to go back to.
        StorageError: The online store does not hold a view; the service stays where it is.
    """
    folder = Path(repo).resolve()
    config = load_config(folder / CONFIG_NAME)
    output = OutputStore(config.output.path)
    publication = publication_of(output)
    before = served_views(output, publication, config.feast.promotion)
    wanted = promoted_before(output) if back else dict(publication.current if views is None else views)
    declared = config.registry()
    wanted = {name: view for name, view in wanted.items() if views is not None or name in declared}
    apply_repo(folder)  # the views must be registered to be looked up; the service does not move yet
    checked = {
        name: _check_served(folder, output, publication, view)
        for name, view in wanted.items()
        if before.get(name) != view
    }
    after = promote_views(output, publication, wanted, config.feast.promotion)
    apply_repo(folder)
    moved = {name: (before[name], view) for name, view in after.items() if before.get(name) != view}
    return Promoted(moved, checked)


def _check_served(folder: Path, output: OutputStore, publication: Publication, name: str) -> int:
    published = read_view(output, publication, published_view(publication, name))
    rows = np.linspace(0, len(published.user_ids) - 1, min(SAMPLE, len(published.user_ids))).astype(np.int64)
    users = published.user_ids.take(rows).to_pylist()
    store = open_store(folder)
    with quiet():
        view = served_view(store, name)
        vectors, found, _ = read_stored(store, {view.instruction: view}, users)[view.instruction]
    exact = getattr(store.config.online_store, "vector_storage", "float32") == "float32"
    cosine = (vectors * published.vectors[rows]).sum(axis=1)
    right = (vectors == published.vectors[rows]).all(axis=1) if exact else cosine > 0.99
    wrong = int(np.count_nonzero(~found | ~right))
    if wrong:
        raise StorageError(
            f"view {name}: the online store serves {wrong} of {len(users)} sampled users not at all or with another "
            f"vector than run {published.view.newest.run_id} holds; the service was not moved",
            "run `instructue materialize`, then promote again",
        )
    return len(users)
