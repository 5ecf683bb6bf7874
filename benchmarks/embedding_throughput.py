"""Embedding ragged real histories: our path against a plain Transformers loop over the same prompts.

Households of The Complete Journey, packed at 2017-10-01. Both sides run the same LLM in the same type on the same
threads, in turns. Ours gathers soft tokens, pools the focus, builds prompts and runs the LLM (`UserEmbedder.encode`);
instructions are read before, once. The peer (`padded_loop.py`) gets the embeddings of its prompts for nothing and runs
the LLM over `history, instruction, <USER>`, 16 prompts at a time in the order they arrive. Where both compute the same
thing, the vector without an instruction, they are compared.

Times on a CPU are those the process computed, with one thread as in the workers of a backfill; on a GPU wall time.

    python benchmarks/embedding_throughput.py --model full --instructions 8 --users 16 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, Measurement, append_csv, interleaved, measure, write_json
from journey_sample import INSTRUCTIONS, open_model, open_project, sample
from padded_loop import PaddedLoop, prompt_embeddings

from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction

NAME = "embedding_throughput"
PACKAGES = ("torch", "transformers", "instructue-feast")
GOALS = {1: (1.5, 2.0), 8: (6.0, 10.0)}
NOTHING = Instruction("nothing", "")


def main() -> None:
    """Measures, prints the ratio, appends to `results/embedding_throughput.csv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--project", help="folder of the data set's project; made when missing; default: a temporary one"
    )
    parser.add_argument("--model", choices=("full", "checkpoint"), default="checkpoint")
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--instructions", type=int, nargs="+", choices=range(1, 9), default=[1, 8])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--padding", choices=("right", "left"), default="right", help="of the peer")
    parser.add_argument("--batch-tokens", type=int, help="our budget; default: what suits the device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="turns before, in which shapes are compiled")
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results file")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        config = open_project(args.project or Path(scratch) / "journey")
        model = open_model(config, args.model, args.dtype).to(args.device)
        users = sample(config, args.users)
        embedder = UserEmbedder(model, users.table(model), max_batch_tokens=args.batch_tokens)
        prefixes, tails = prompt_embeddings(embedder, users.history, NOTHING)
        loop = PaddedLoop(embedder, prefixes, left=args.padding == "left")
    difference = float(np.abs(embedder.encode(users.history, [NOTHING])[:, 0] - loop.encode_behind(tails)).max())
    print(f"{args.model}, {args.users} users, {args.dtype}: largest difference without instruction {difference:.1e}")

    few = users.history.take(range(min(4, args.users)))
    rows: list[Measurement] = []
    ratios: dict[str, float] = {}
    for count in args.instructions:
        chosen = INSTRUCTIONS[:count]
        embedder.encode(few, chosen)  # reads the instructions
        functions: dict[str, Callable[[], object]] = {
            "instructue": lambda chosen=chosen: embedder.encode(users.history, chosen),
            "padded loop": lambda chosen=chosen: loop.encode(chosen),
        }
        clock = time.process_time if args.device == "cpu" else time.perf_counter
        seconds = interleaved(functions, args.repeats, warmup=args.warmup, clock=clock)
        scale = (
            f"model={args.model},layers={model.backbone.config.num_hidden_layers},users={args.users},"
            f"instructions={count},prefix={np.mean([len(one) for one in prefixes]):.0f},"
            f"peer_tokens={loop.num_tokens(chosen)},padding={args.padding},dtype={args.dtype}"
        )
        # Ratios within a turn: the machine's mood is nearly the same for both.
        ratio = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
        for name, values in seconds.items():
            rows.append(row(name, values, "cpu_seconds" if args.device == "cpu" else "seconds", "s", scale))
            rows.append(row(name, [args.users / one for one in values], "users_per_second", "1/s", scale))
        rows.append(row("padded loop / instructue", ratio, "ratio", "1", scale))
        rows.append(row("padded loop - instructue", [difference], "max_abs_difference", "1", scale))
        ratios[str(count)] = float(np.median(ratio))
        wanted = f" (wanted {GOALS[count][0]}, goal {GOALS[count][1]})" if count in GOALS else ""
        ours, theirs = (args.users / float(np.median(values)) for values in seconds.values())
        print(f"  {count} instructions: {ours:.2f} against {theirs:.2f} users/s, {ratios[str(count)]:.2f}x{wanted}")
    if not args.no_csv:
        append_csv(RESULTS / f"{NAME}.csv", rows)
    write_json(args.json, rows, speedup_by_instructions=ratios, max_abs_difference=difference)


def row(variant: str, values: list[float], metric: str, unit: str, scale: str) -> Measurement:
    """One stamped result of this benchmark."""
    return measure(NAME, variant, values, scale=scale, metric=metric, unit=unit, packages=PACKAGES)


if __name__ == "__main__":
    main()
