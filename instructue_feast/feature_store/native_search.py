"""Vector search by the online store itself, asked directly.

Feast 0.67's `FeatureStore.retrieve_online_documents_v2` sorts the entities of an answer but not their features, so it
gives features and distances to the wrong entities. The stores' own method of that name pairs them rightly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from feast import FeatureStore
from feast.protos.feast.types.Value_pb2 import Value

from instructue_feast.errors import ConfigError, DataError, StorageError, listed
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.online import expired, online_store
from instructue_feast.feature_store.search import Hits


# D = embedding_dim
@dataclass(frozen=True, slots=True)
class Search:
    """How an online store is asked: what it calls the cosine, and how its `distance` becomes one."""

    metric: str
    cosine: Callable[[Value], float]


SEARCHES = {
    "PostgreSQLOnlineStore": Search("cosine", lambda value: 1 - value.double_val),  # with pgvector
    "MilvusOnlineStore": Search("COSINE", lambda value: value.float_val),  # its distance is a similarity
}
"""Online stores whose answers were tested."""


def search_online(embeddings: UserEmbeddings, instruction: str, vector: npt.ArrayLike, k: int = 10) -> Hits:
    """The users nearest to a vector, found by the online store of a repo.

    Values that have outlived their view's ttl are left out, so there can be fewer than `k`. The online store compares
    with every row of the view: it is exact, and holds what `materialize` wrote, which can be behind the publication.

    Args:
        embeddings: Which views are served, and where.
        instruction: Instruction id.
        vector: `[D]`, of any length: a user embedding, or an answer's.
        k: How many.

    Returns:
        Ids and cosines, the best first.

    Raises:
        ConfigError: An unknown instruction, or an online store whose search is not known to be right.
        DataError: A vector of another size, or that is not finite, or zero.
        StorageError: The store cannot search; for Postgres, see `docs/search.md`.

    Example:
        embeddings = UserEmbeddings("feature_repo")
        search_online(embeddings, "churn", embeddings.get(["1228"], ["churn"]).vectors["churn"][0], k=20).ids
    """
    if k < 1:
        raise ConfigError(f"cannot find {k} users", "ask for at least one")
    store = embeddings.store
    online, search = _searchable(store)
    served = embeddings.served()
    if instruction not in served:
        raise ConfigError(f"unknown instruction {instruction!r}", f"known are {listed(list(served))}")
    view = store.registry.get_feature_view(served[instruction].name, store.project, allow_cache=True)
    query = np.asarray(vector, dtype=np.float32)
    if query.shape != (served[instruction].embedding_dim,) or not np.isfinite(query).all() or not query.any():
        raise DataError(
            f"view {view.name} cannot be searched with this vector of shape {query.shape}",
            f"pass {served[instruction].embedding_dim} finite numbers that are not all zero",
        )
    try:
        answer = online.retrieve_online_documents_v2(
            store.config, view, [instruction], query.tolist(), k, search.metric
        )
    except Exception as error:  # each store has errors of its own
        raise StorageError(
            f"the online store cannot search view {view.name}: {type(error).__name__}",
            "is `vector_enabled` set, and was it when the view was applied and materialized?",
        ) from error
    now, ids, scores = datetime.now(UTC), [], []
    for time, key, values in answer:
        aware = time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time
        if not expired(view, aware, now):
            ids.append(key.entity_values[0].string_val)
            scores.append(search.cosine(values["distance"]))
    return Hits(ids, np.array(scores, dtype=np.float32), view.name)


def _searchable(store: FeatureStore) -> tuple[Any, Search]:
    online = online_store(store)
    for kind in type(online).__mro__:
        if kind.__name__ in SEARCHES:
            return online, SEARCHES[kind.__name__]
    raise ConfigError(
        f"vector search of {type(online).__name__} is not known to be right",
        f"search with `UserSearch`, or serve from one of {listed(SEARCHES)}",
    )
