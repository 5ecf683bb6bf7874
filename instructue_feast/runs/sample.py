"""A sample of a run's users, the same ones in every run of a project, and how two samples differ.

A bucket is a hash of the user id, so whole buckets are a random sample; of their users those with the smallest hash
are taken. Two runs with the same number of buckets therefore sample the same users, as far as both know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from instructue_feast.errors import StorageError
from instructue_feast.runs.audit import vector_matrix
from instructue_feast.runs.manifest import BucketMarker
from instructue_feast.runs.publish import Publication, PublishedView
from instructue_feast.runs.reader import read_bucket
from instructue_feast.runs.store import OutputStore

# N = sampled users, D = embedding_dim
BINS = 10
NEIGHBOURS = 10
_MAX_NEIGHBOUR_USERS = 2000


@dataclass(frozen=True, slots=True)
class Sample:
    """Sampled users and their vectors: `vectors[instruction]` is `[N, D]` float32, rows in the order of `user_ids`."""

    user_ids: list[str]
    vectors: dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How one instruction's embeddings moved between two samples.

    Attributes:
        users: Users in the new sample.
        common: Users in both.
        mean_cosine: Cosine of the two mean vectors; says little for centred embeddings, whose means are near zero.
        mean_shift: Distance of the means over the root mean square distance of users from their mean.
        psi: Population stability index over deciles of the old sample, averaged over dimensions.
        ks: Largest Kolmogorov-Smirnov statistic of a dimension.
        moved: Mean of `1 - cosine` of a user's two vectors; NaN without common users.
        knn_overlap: Share of a user's 10 nearest neighbours that stay so, among common users; NaN with too few.
        psi_by_dimension: The index of every dimension.
    """

    users: int
    common: int
    mean_cosine: float
    mean_shift: float
    psi: float
    ks: float
    moved: float
    knn_overlap: float
    psi_by_dimension: list[float]


def sample_run(
    store: OutputStore, run_id: str, markers: Sequence[BucketMarker], instructions: Sequence[str], users: int
) -> Sample:
    """Samples a run.

    Args:
        store: The project's output.
        run_id: The run.
        markers: Its buckets.
        instructions: Columns to read.
        users: How many users at most.

    Raises:
        StorageError: A file is missing or damaged.
    """
    tables, rows = [], 0
    for marker in sorted(markers, key=lambda one: one.bucket):
        if rows >= users:
            break
        rows += marker.rows
        tables.append(read_bucket(store, run_id, marker.bucket, ["user_id", *instructions]))
    return _sampled(tables, instructions, users)


def sample_view(store: OutputStore, publication: Publication, view: PublishedView, users: int) -> Sample:
    """Samples the newest run of a published view, from the publication's own files."""
    folder = ("published", publication.id, view.name)
    mine = [name for name in store.names(*folder) if name.rpartition("-")[0] == view.newest.run_id]
    tables, rows = [], 0
    for name in mine:  # names end with the number of the bucket
        if rows >= users:
            break
        try:
            with store.fs.open(store.path(*folder, name), "rb") as stream:
                tables.append(pq.ParquetFile(stream).read(columns=["user_id", view.instruction]))
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"{store.url(*folder, name)} is missing or damaged ({type(error).__name__})", "restore the file"
            ) from None
        rows += len(tables[-1])
    return _sampled(tables, [view.instruction], users)


def _sampled(tables: list[pa.Table], instructions: Sequence[str], users: int) -> Sample:
    if not tables:
        return Sample([], {name: np.empty((0, 0), np.float32) for name in instructions})
    table = pa.concat_tables(tables)
    ids = np.asarray(table.column("user_id").to_pylist(), dtype=object)
    hashes = np.fromiter((xxhash.xxh64_intdigest(one.encode()) for one in ids), np.uint64, len(ids))
    rows = np.argsort(hashes, kind="stable")[:users]
    return Sample(ids[rows].tolist(), {name: vector_matrix(table, name, name)[rows] for name in instructions})


def drift(new: Sample, old: Sample, instruction: str, *, neighbours: bool = True) -> Drift:
    """Compares two samples of at least one user each; see `Drift`."""
    left, right = new.vectors[instruction].astype(np.float64), old.vectors[instruction].astype(np.float64)
    means = left.mean(axis=0), right.mean(axis=0)
    spread = np.sqrt((left.var(axis=0).sum() + right.var(axis=0).sum()) / 2)
    distance = float(np.linalg.norm(means[0] - means[1]))
    psi, ks = _by_dimension(left, right)
    places = {user: row for row, user in enumerate(old.user_ids)}
    common = [(row, places[user]) for row, user in enumerate(new.user_ids) if user in places]
    ours = left[[row for row, _ in common]] if common else left[:0]
    theirs = right[[row for _, row in common]] if common else right[:0]
    return Drift(
        users=len(left),
        common=len(common),
        mean_cosine=float(means[0] @ means[1] / max(np.linalg.norm(means[0]) * np.linalg.norm(means[1]), 1e-12)),
        mean_shift=distance / float(spread) if spread > 0 else (0.0 if distance == 0 else float("inf")),
        psi=float(psi.mean()),
        ks=float(ks.max()),
        moved=float(np.maximum(0.0, 1 - (ours * theirs).sum(axis=1)).mean()) if common else float("nan"),
        knn_overlap=_overlap(ours, theirs) if neighbours else float("nan"),
        psi_by_dimension=[round(float(one), 5) for one in psi],
    )


def mean_pairwise_cosine(vectors: npt.NDArray[np.floating]) -> float:
    """Mean cosine of two different users; near 1 when all embeddings have collapsed into one. NaN for one user."""
    users = len(vectors)
    total = vectors.astype(np.float64).sum(axis=0)
    return float((total @ total - users) / (users * (users - 1))) if users > 1 else float("nan")


def _by_dimension(
    new: npt.NDArray[np.float64], old: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """`[D]` population stability index over the old sample's deciles, and `[D]` Kolmogorov-Smirnov statistic."""
    psi, ks = np.empty(new.shape[1]), np.empty(new.shape[1])
    for dim in range(new.shape[1]):
        left, right = np.sort(new[:, dim]), np.sort(old[:, dim])
        edges = np.unique(np.quantile(right, np.linspace(0, 1, BINS + 1)[1:-1]))
        shares = []
        for values in (left, right):
            counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
            # Half a user in every bin keeps the logarithm finite and hardly moves a full one.
            shares.append((counts + 0.5) / (len(values) + 0.5 * len(counts)))
        psi[dim] = ((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum()
        grid = np.concatenate([left, right])
        cdfs = [np.searchsorted(values, grid, side="right") / len(values) for values in (left, right)]
        ks[dim] = np.abs(cdfs[0] - cdfs[1]).max()
    return psi, ks


def _overlap(new: npt.NDArray[np.float64], old: npt.NDArray[np.float64]) -> float:
    if len(new) <= NEIGHBOURS + 1:
        return float("nan")
    new, old = new[:_MAX_NEIGHBOUR_USERS], old[:_MAX_NEIGHBOUR_USERS]
    nearest = []
    for vectors in (new, old):
        cosine = vectors @ vectors.T
        np.fill_diagonal(cosine, -np.inf)
        nearest.append(np.argpartition(-cosine, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    shared = [len(np.intersect1d(one, other, assume_unique=True)) for one, other in zip(*nearest, strict=True)]
    return float(np.mean(shared)) / NEIGHBOURS
