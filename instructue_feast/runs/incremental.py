"""Which run an incremental backfill starts from, or why it has to be a full one."""

from __future__ import annotations

from instructue_feast.runs.ledger import Plan
from instructue_feast.runs.progress import extract_manifest
from instructue_feast.runs.publish import current_publication
from instructue_feast.runs.reader import finished_runs, run_manifest
from instructue_feast.runs.store import OutputStore


def choose_base(store: OutputStore, plan: Plan) -> tuple[str | None, str | None]:
    """Chooses the published run whose unchanged users can be carried over.

    Args:
        store: The project's output.
        plan: The run that is planned.

    Returns:
        The base run and `None`, or `None` and why all users must be embedded.
    """
    publication = current_publication(store)
    if publication is None:
        return None, "nothing is published yet"
    run_id = publication.run_id
    if run_id not in finished_runs(store):
        return None, f"the published run {run_id} is not on disk any more"
    base = run_manifest(store, run_id)
    if base.history_digest != plan.history_digest:
        return None, "the history settings or sources have changed"
    if base.model_version != plan.model_version:
        return None, "the model has changed"
    known = {one.id: one.embedding_version for one in base.instructions}
    changed = [one.id for one in plan.instructions if known.get(one.id) != one.embedding_version]
    if changed:
        return None, f"instructions are new or have changed: {', '.join(changed)}"
    if len(base.buckets) != plan.buckets:
        return None, f"`output.buckets` has changed from {len(base.buckets)} to {plan.buckets}"
    extract = extract_manifest(store, base.extract_id)
    if extract is None:
        return None, f"the extract {base.extract_id} of the published run is not on disk any more"
    if extract.buckets != plan.buckets:
        return None, "the extract of the published run has another number of buckets"
    return run_id, None
