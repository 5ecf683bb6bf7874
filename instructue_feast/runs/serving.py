"""Which published view of each instruction the feature service points to: promotion and the way back.

    <root>/serving.json    the promoted views, and those promoted before; moved in one step

Before the first promotion the service follows the publication. From then on it follows the promotion: for good where
`feast.promotion` is `manual`, otherwise until something newer is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from instructue_feast.errors import ConfigError, did_you_mean
from instructue_feast.runs.publish import SERVING, Publication, pointer_lock
from instructue_feast.runs.store import OutputStore

Promotion = Literal["automatic", "manual"]


def served_views(store: OutputStore, publication: Publication, promotion: Promotion) -> dict[str, str]:
    """Instruction -> name of the view the feature service points to.

    An instruction that was never promoted is served as published; so is one whose promoted view is published no more.
    """
    document = store.read_json(SERVING) if store.exists(SERVING) else None
    if document is None or (promotion == "automatic" and document["publication"] != publication.id):
        return dict(publication.current)
    known = {view.name for view in publication.views}
    return {
        instruction: document["views"].get(instruction, view) if document["views"].get(instruction) in known else view
        for instruction, view in publication.current.items()
    }


def promote_views(
    store: OutputStore, publication: Publication, views: Mapping[str, str], promotion: Promotion
) -> dict[str, str]:
    """Makes the service point to some views; the rest stays as it is.

    Args:
        store: The project's output.
        publication: The current publication.
        views: Instruction -> name of a view that is published.
        promotion: `feast.promotion`.

    Returns:
        What is served now.

    Raises:
        ConfigError: A view that is not published, or of another instruction.
    """
    for instruction, name in views.items():
        own = [view.name for view in publication.views if view.instruction == instruction]
        if name not in own:
            raise ConfigError(f"instruction {instruction!r} has no published view {name!r}", did_you_mean(name, own))
    with pointer_lock(store):
        before = served_views(store, publication, promotion)
        after = before | dict(views)
        if after != before or not store.exists(SERVING):  # the first promotion pins what is served
            document = {
                "publication": publication.id,
                "views": after,
                "before": before,
                "promoted": datetime.now(UTC).isoformat(),
            }
            store.write_json(document, SERVING)
    return after


def promoted_before(store: OutputStore) -> dict[str, str]:
    """What was served before the last promotion.

    Raises:
        ConfigError: There was none.
    """
    if not store.exists(SERVING):
        raise ConfigError("nothing was promoted, so there is no way back", "see `instructue runs rollback`")
    return dict(store.read_json(SERVING)["before"])
