"""Writing published embeddings into the online store: our engine and stores against stock Feast.

    python benchmarks/materialize.py                                        # everything; about 20 minutes
    python benchmarks/materialize.py --rows 20000 --dim 256 --store redis   # one corner of it

What is timed is `FeatureStore.materialize`, what `feast materialize` calls, of one feature view: one run of 16 Parquet
files. Stock Feast is measured with its default offline store (dask) and with duckdb. Every measurement has a process of
its own, because its peak memory counts, and an empty online store; variants take turns. Processor time, of the process
and of the Redis server, is measured too: it says the same on a machine that does other work. A view of 100 rows goes
first and does not count: it pays for imports and connections.

After each turn of ours, stock `get_online_features` reads 1,000 of the rows and must get the same numbers bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import RESULTS, Measurement, append_csv, measure, write_json
from lookup import redis_server
from redis import Redis

PACKAGES = ("feast", "duckdb", "dask", "redis", "pyarrow", "numpy")
AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
FILES = 16
CHECKED = 1_000
OURS = "instructue_feast.feature_store"
SETTINGS = """\
project: {project}
provider: local
registry: {{path: data/registry.db}}
entity_key_serialization_version: 3
materialization: {{online_write_batch_size: 10000}}
data_quality_monitoring: {{auto_baseline: false}}
offline_store: {{type: {offline}}}
batch_engine: {{type: {engine}}}
online_store: {{type: {online}, {place}}}
"""
UNITS = {"seconds": "s", "cpu_seconds": "s", "peak_memory": "MiB"}
VARIANTS = {"ours": ("duckdb", True), "stock_duckdb": ("duckdb", False), "stock": ("dask", False)}


def vectors(rows: int, dim: int) -> np.ndarray:
    """`[rows, dim]` float32 unit vectors."""
    found = np.random.default_rng(dim).normal(size=(rows, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def users(rows: int) -> list[str]:
    """Ids of users."""
    return [f"user-{row:07d}" for row in range(rows)]


def write_files(folder: Path, rows: int, dim: int) -> None:
    """One run as a publication holds it: one row per user, cut into files."""
    folder.mkdir(parents=True)
    matrix, ids = vectors(rows, dim), users(rows)
    for number in range(FILES):
        own = ids[number::FILES]
        offsets = np.arange(0, (len(own) + 1) * dim, dim, dtype=np.int32)
        times = pa.array([AS_OF] * len(own), pa.timestamp("us", "UTC"))
        values = np.ascontiguousarray(matrix[number::FILES]).ravel()
        lists = pa.ListArray.from_arrays(offsets, values)
        table = pa.table({"user_id": own, "event_timestamp": times, "created": times, "churn": lists})
        pq.write_table(table, folder / f"{number:05d}.parquet", compression="zstd", use_dictionary=False)


def write_settings(repo: Path, project: str, variant: str, store: str, address: str | None) -> None:
    """`feature_store.yaml` of one variant."""
    offline, ours = VARIANTS[variant]
    name = "Sqlite" if store == "sqlite" else "Redis"
    settings = SETTINGS.format(
        project=project,
        offline=offline,
        engine=f"{OURS}.engine.EmbeddingEngine" if ours else "local",
        online=f"{OURS}.{store}.Instructue{name}OnlineStore" if ours else store,
        place=f'connection_string: "{address}"' if address else "path: data/online.db",
    )
    (repo / "data").mkdir(parents=True, exist_ok=True)
    (repo / "feature_store.yaml").write_text(settings)


def apply(repo: Path, views: dict[str, tuple[Path, int]]) -> None:
    """Registers views as `feature_views` makes them."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource
    from feast.data_format import ParquetFormat
    from feast.types import Array, Float32, String
    from feast.value_type import ValueType

    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    objects = [user]
    for name, (folder, dim) in views.items():
        vector = Field(name="churn", dtype=Array(Float32), vector_index=True, vector_length=dim,
                       vector_search_metric="COSINE")  # fmt: skip
        source = FileSource(
            name=f"{name}__source", path=str(folder), file_format=ParquetFormat(), timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )  # fmt: skip
        objects.append(
            FeatureView(
                name=name,
                entities=[user],
                ttl=dt.timedelta(0),
                source=source,
                tags={"managed_by": "instructue-feast"},
                schema=[Field(name="user_id", dtype=String), vector],
            )
        )
    FeatureStore(repo_path=str(repo)).apply(objects)


def child(repo: Path) -> None:
    """One measurement, in a process of its own."""
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(repo))
    with contextlib.redirect_stdout(sys.stderr):
        store.materialize(AS_OF, AS_OF, feature_views=["warm"])
        started, worked = time.perf_counter(), cpu_seconds(store.config.online_store)
        store.materialize(AS_OF, AS_OF, feature_views=["churn__bench"])
        seconds, worked = time.perf_counter() - started, cpu_seconds(store.config.online_store) - worked
    print(json.dumps({"seconds": seconds, "cpu_seconds": worked, "peak_memory": peak_mib()}))


def peak_mib() -> float:
    """The most memory this process has had. `ru_maxrss` would begin with what its parent had when it started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = [one for one in status.read_text().splitlines() if one.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def cpu_seconds(online: object) -> float:
    """Processor time of this process, and of the Redis server where there is one."""
    address = getattr(online, "connection_string", None)
    info = Redis.from_url(f"redis://{address}").info("cpu") if address else {}
    return time.process_time() + info.get("used_cpu_user", 0.0) + info.get("used_cpu_sys", 0.0)


def check(repo: Path, rows: int, dim: int) -> None:
    """Stock Feast must read the very numbers of the files."""
    from feast import FeatureStore

    asked = np.random.default_rng(0).choice(rows, min(rows, CHECKED), replace=False)
    ids = users(rows)
    answer = FeatureStore(repo_path=str(repo)).get_online_features(
        features=["churn__bench:churn"], entity_rows=[{"user_id": ids[row]} for row in asked]
    )
    got = np.asarray(answer.to_dict()["churn"], dtype=np.float32)
    if got.tobytes() != vectors(rows, dim)[asked].tobytes():
        raise SystemExit("stock Feast does not read the numbers that were written")


def compare(folder: Path, store: str, rows: int, dim: int, repeats: int, address: str | None) -> list[Measurement]:
    """All variants in turns on one set of files."""
    data = folder / f"{rows}x{dim}"
    if not data.exists():
        write_files(data / "churn", rows, dim)
        write_files(data / "warm", 100, dim)
    found: dict[str, dict[str, list[float]]] = {name: {one: [] for one in UNITS} for name in VARIANTS}
    for _turn in range(repeats):
        for variant in VARIANTS:
            repo = folder / f"{store}-{rows}x{dim}-{variant}"
            shutil.rmtree(repo, ignore_errors=True)
            if address:
                Redis.from_url(f"redis://{address}").flushall()
            project = f"bench_{variant}"
            write_settings(repo, project, variant, store, address)
            apply(repo, {"warm": (data / "warm", dim), "churn__bench": (data / "churn", dim)})
            command = [sys.executable, __file__, "--child", str(repo)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
            for metric, value in json.loads(done.stdout).items():
                found[variant][metric].append(value)
            if variant == "ours":
                write_settings(repo, project, "stock", store, address)
                check(repo, rows, dim)
            shutil.rmtree(repo)
    scale = f"store={store} rows={rows} dim={dim}"
    result = [
        measure("materialize", name, found[name][one], scale=scale, metric=one, unit=UNITS[one], packages=PACKAGES)
        for name in VARIANTS
        for one in UNITS
    ]
    told = []
    for name in VARIANTS:
        middle = {one: float(np.median(values)) for one, values in found[name].items()}
        line = f"{name} {middle['seconds']:.2f} s, {middle['cpu_seconds']:.2f} CPU s, {middle['peak_memory']:.0f} MiB"
        if name != "ours":
            ratios = [
                measure(
                    "materialize",
                    f"{name}/ours",
                    [theirs / ours for theirs, ours in zip(found[name][one], found["ours"][one], strict=True)],
                    scale=scale,
                    metric=f"ratio_of_{one}",
                    unit="1",
                    packages=PACKAGES,
                )
                for one in UNITS
            ]
            result += ratios
            line += " ({:.1f}x, {:.1f}x, {:.2f}x)".format(*(one.p50 for one in ratios))
        told.append(line)
    print(f"{scale:<34} {'   '.join(told)}", flush=True)
    return result


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="default: 20000 and 100000")
    parser.add_argument("--dim", type=int, action="append", help="default: 128 and 256")
    parser.add_argument("--store", choices=["sqlite", "redis"], action="append", help="default: both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        for store in arguments.store or ("sqlite", "redis"):
            address = stack.enter_context(redis_server()) if store == "redis" else None
            for count in arguments.rows or (20_000, 100_000):
                for dim in arguments.dim or (128, 256):
                    found = compare(Path(scratch), store, count, dim, arguments.repeats, address)
                    rows += found
                    if not arguments.no_csv:
                        append_csv(RESULTS / "materialize.csv", found)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
