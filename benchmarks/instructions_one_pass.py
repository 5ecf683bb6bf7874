"""What K instructions cost in one pass over a shared prefix, against one instruction and against K passes.

Random histories over real texts, real default models, untrained adapters: time does not depend on the weights.

    python benchmarks/instructions_one_pass.py --repeats 5 --json build/one_pass.json
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import RESULTS, Measurement, append_csv, interleaved, measure, write_json

from instructue_feast.history.buckets import NUM_AGE_BUCKETS, NUM_COUNT_BUCKETS
from instructue_feast.history.pack import PackedHistory
from instructue_feast.history.render import text_id
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.instructions import Instruction
from instructue_feast.model.factory import untrained

NAME = "instructions_one_pass"
PACKAGES = ("torch", "transformers", "instructue-feast")
TEXTS_PER_USER = {"bill": 64, "mini_program": 32, "spm": 24, "app": 16, "search": 8, "tabular": 6}
TEXTS = (
    "Will the shopper stop coming in the next month?",
    "What kinds of food does the shopper like?",
    "How sensitive is the shopper to prices and coupons?",
    "Is there a baby in the household?",
    "Which pets does the household keep?",
    "Does the shopper care for health and fitness?",
    "When and how often does the shopper visit the store?",
    "Which new product would the shopper try next?",
)
INSTRUCTIONS = [Instruction(f"instruction_{index}", text) for index, text in enumerate(TEXTS)]


def main() -> None:
    """Measures, prints the ratios, appends to `results/instructions_one_pass.csv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--llm", default="smollm2-135m-instruct")
    parser.add_argument("--encoder", default="all-minilm-l6-v2")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results file")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    embedder, history = prepare(args)
    num = len(INSTRUCTIONS)
    outputs: dict[str, np.ndarray] = {}
    one, all_at_once, passes = "1 instruction", f"{num} instructions, one pass", f"{num} instructions, {num} passes"

    def run(name: str, groups: list[list[Instruction]]) -> None:
        outputs[name] = np.concatenate([embedder.encode(history, group) for group in groups], axis=1)

    seconds = interleaved(
        {
            one: lambda: run(one, [INSTRUCTIONS[:1]]),
            all_at_once: lambda: run(all_at_once, [INSTRUCTIONS]),
            passes: lambda: run(passes, [[instruction] for instruction in INSTRUCTIONS]),
        },
        args.repeats,
    )
    prefix = int(np.median(embedder.model.prefix_lengths(history)))
    suffix = float(np.mean([len(embedder.model.suffix(instruction.text)) for instruction in INSTRUCTIONS]))
    scale = f"users={args.users},prefix={prefix},suffix={suffix:.1f},instructions={num},dtype={args.dtype}"
    # Ratios within a turn: the machine's mood is nearly the same for all three.
    cost = [b / a for a, b in zip(seconds[one], seconds[all_at_once], strict=True)]
    speedup = [c / b for b, c in zip(seconds[all_at_once], seconds[passes], strict=True)]
    difference = float(np.abs(outputs[all_at_once] - outputs[passes]).max())
    rows: list[Measurement] = [
        *(row(name, values, "seconds", "s", scale) for name, values in seconds.items()),
        row("one pass / 1 instruction", cost, "ratio", "1", scale),
        row("passes / one pass", speedup, "ratio", "1", scale),
        row("one pass - passes", [difference], "max_abs_difference", "1", scale),
    ]
    print(f"{scale}, {rows[0].device}")
    for name, values in seconds.items():
        print(f"  {name:<28} {np.median(values):8.3f} s")
    print(f"  {num} in one pass cost {np.median(cost):.2f}x one instruction (wanted: at most 2)")
    print(f"  {num} in one pass are {np.median(speedup):.2f}x faster than {num} passes (wanted: at least 4)")
    print(f"  largest difference {difference:.1e} (wanted in float32: at most 1e-4)")
    if not args.no_csv:
        append_csv(RESULTS / f"{NAME}.csv", rows)
    write_json(
        args.json, rows, cost_of_all_over_one=float(np.median(cost)), speedup_over_passes=float(np.median(speedup)),
        max_abs_difference=difference,
    )  # fmt: skip


def row(variant: str, values: list[float], metric: str, unit: str, scale: str) -> Measurement:
    """One stamped result of this benchmark."""
    return measure(NAME, variant, values, scale=scale, metric=metric, unit=unit, packages=PACKAGES)


def prepare(args: argparse.Namespace) -> tuple[UserEmbedder, PackedHistory]:
    """Default models, a phrasebook of 600 texts, and users with a prefix of about 190 tokens."""
    rng = np.random.default_rng(0)
    sources = list(TEXTS_PER_USER)
    numeric = (("tabular", "recency", "days"), ("tabular", "money", "spend"), ("tabular", "money", "visits"))
    model = untrained(
        encoders=dict.fromkeys(sources, args.encoder), numeric_columns=numeric, llm=args.llm,
        dtype=getattr(torch, args.dtype),
    ).to(args.device)  # fmt: skip
    texts = [[f"{name.replace('_', ' ')} {index}: item {index % 7}" for index in range(100)] for name in sources]
    ids = [np.array([text_id(name, text) for text in own]) for name, own in zip(sources, texts, strict=True)]
    vectors = model.text_encoder(args.encoder).encode([text for own in texts for text in own])
    table = SoftTokenTable.build(model, np.concatenate(ids), np.repeat(np.arange(len(sources)), 100), vectors)
    sizes = np.array(list(TEXTS_PER_USER.values()))
    total = args.users * int(sizes.sum())
    chosen = [
        rng.choice(ids[source], size, replace=False) for _ in range(args.users) for source, size in enumerate(sizes)
    ]
    history = PackedHistory(
        user_ids=[f"user-{index}" for index in range(args.users)],
        as_of_us=np.zeros(args.users, np.int64),
        offsets=np.arange(args.users + 1, dtype=np.int64) * int(sizes.sum()),
        source_index=np.tile(np.repeat(np.arange(len(sources)), sizes), args.users).astype(np.int32),
        text_id=np.concatenate(chosen),
        count_bucket=rng.integers(0, NUM_COUNT_BUCKETS, total).astype(np.int32),
        age_bucket=rng.integers(0, NUM_AGE_BUCKETS, total).astype(np.int32),
        num_events=np.tile(sizes, (args.users, 1)).astype(np.int32),
        tabular_numeric=rng.normal(0, 10, (args.users, len(numeric))).astype(np.float32),
    )
    return UserEmbedder(model, table), history


if __name__ == "__main__":
    main()
