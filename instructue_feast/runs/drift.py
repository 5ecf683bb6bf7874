"""How far two versions of an instruction's embedding agree: neighbours kept, and what a rotation cannot explain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from instructue_feast.errors import DataError, VersionMismatchError
from instructue_feast.runs.vectors import ViewVectors

# U = users, D = embedding_dim
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Two versions compared on the users they share; all measures lie between 0 and 1 except for the cosines.

    Attributes:
        first: View of the one version.
        second: View of the other.
        users: Users compared.
        k: Neighbours looked at.
        neighbours_kept: Mean share of a user's k nearest users that stay among the k nearest.
        by_chance: The same for neighbours drawn at random.
        cosine_raw: Mean cosine of a user's two vectors as they are; without meaning for two models.
        cosine_aligned: The same after the rotation or reflection that fits best, on users it was not fitted on.
        cosine_aligned_p5: Its 5% quantile: the users who moved most.
    """

    first: str
    second: str
    users: int
    k: int
    neighbours_kept: float
    by_chance: float
    cosine_raw: float
    cosine_aligned: float
    cosine_aligned_p5: float


def compare_versions(
    first: ViewVectors, second: ViewVectors, *, k: int = 10, sample: int = 5_000, seed: int = 0
) -> Drift:
    """Compares two views of one instruction.

    The rotation is orthogonal Procrustes (Schönemann 1966): `R = U V'` of the singular value decomposition of `A' B`,
    fitted on one half of the sample and measured on the other.

    Args:
        first: One version.
        second: The other; of the same instruction and size.
        k: Neighbours.
        sample: Users drawn from those both know.
        seed: Of the draw.

    Raises:
        VersionMismatchError: Another instruction or another size.
        DataError: They share too few users.
    """
    one, other = first.view, second.view
    if (one.instruction, one.embedding_dim) != (other.instruction, other.embedding_dim):
        raise VersionMismatchError(
            f"{one.name} and {other.name} are not two versions of one embedding", "name views of one instruction"
        )
    place = pc.index_in(first.user_ids, value_set=second.user_ids)
    shared = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    need = max(2 * (k + 1), 4)
    if len(shared) < need:
        raise DataError(f"{one.name} and {other.name} share {len(shared)} users, {need} are needed", "lower k")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(shared)[:sample]
    left = first.vectors[rows].astype(np.float32)
    right = second.vectors[place.take(rows).to_numpy(zero_copy_only=False).astype(np.int64)].astype(np.float32)
    half = len(rows) // 2
    u_DD, _, v_DD = np.linalg.svd(left[:half].T.astype(np.float64) @ right[:half].astype(np.float64))
    aligned = (left[half:] @ (u_DD @ v_DD).astype(np.float32) * right[half:]).sum(axis=1)
    near = [_neighbours(matrix, k) for matrix in (left, right)]
    kept = [len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(*near, strict=True)]
    return Drift(
        first=one.name,
        second=other.name,
        users=len(rows),
        k=k,
        neighbours_kept=float(np.mean(kept) / k),
        by_chance=k / (len(rows) - 1),
        cosine_raw=float((left * right).sum(axis=1).mean()),
        cosine_aligned=float(aligned.mean()),
        cosine_aligned_p5=float(np.quantile(aligned, 0.05)),
    )


def _neighbours(vectors: Matrix, k: int) -> npt.NDArray[np.int64]:
    """`[U, k]` nearest other users, in blocks that bound the memory."""
    found = np.empty((len(vectors), k), np.int64)
    for start in range(0, len(vectors), 1024):
        scores = vectors[start : start + 1024] @ vectors.T
        block = np.arange(len(scores))
        scores[block, start + block] = -np.inf
        found[start : start + 1024] = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return found
