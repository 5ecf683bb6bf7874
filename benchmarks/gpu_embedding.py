"""Embedding on a GPU: tokens per second, and the share of the card's own matrix products that is.

For the LLM of the project (135 M parameters) and for one in the shape of a 0.5 B model with random weights. The ceiling
is the speed of a large matrix product in the same type on the same device, measured between the turns. Work is counted
as `2 x weights` per token of the layers that a token really passes: the last layer reads a prefix for its keys and
values only. What attention multiplies is left out, so the true share is a little higher.

    python benchmarks/gpu_embedding.py --users 512 --instructions 8
    python benchmarks/gpu_embedding.py --device cpu --users 4 --dtype float32 --layers 2 --no-csv   # does it run?
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Measurement, append_csv, interleaved, measure, write_json
from journey_sample import INSTRUCTIONS
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from instructue_feast.inference.calibrate import random_history, random_table
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.model.bundled import resolve_folder
from instructue_feast.model.factory import untrained
from instructue_feast.model.modeling import InstructUEModel

NAME = "gpu_embedding"
PACKAGES = ("torch", "transformers", "instructue-feast")
TEXTS_PER_USER = {"bill": 64, "mini_program": 24, "spm": 24, "app": 12, "search": 12, "tabular": 6}
NUMERIC = (("tabular", "recency", "days"), ("tabular", "money", "spend"), ("tabular", "money", "visits"))
CEILING_SIZE = {"cuda": 8192, "cpu": 1024}


def main() -> None:
    """Measures, prints, appends to `results/gpu_embedding.csv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("135m", "0.5b"), default=["135m", "0.5b"])
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--instructions", type=int, choices=range(1, 9), default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=0, help="layers to keep; 0 for all")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[8_192, 32_768, 131_072])
    parser.add_argument("--compile", action="store_true", help="also with the layers compiled by torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results file")
    args = parser.parse_args()
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            rows += measure_model(args, name, make_model(args, name, Path(scratch)))
    if not args.no_csv:
        append_csv(RESULTS / f"{NAME}.csv", rows)
    write_json(args.json, rows)


def measure_model(args: argparse.Namespace, name: str, model: InstructUEModel) -> list[Measurement]:
    """Rows of one model."""
    history = random_history(list(TEXTS_PER_USER.values()), len(NUMERIC), users=args.users)
    table, chosen = random_table(model, history), INSTRUCTIONS[: args.instructions]
    model.to(args.device)
    prefix = int(model.prefix_lengths(history).sum())
    suffix = 2 * args.instructions * args.users
    operations = 2 * (prefix * prefix_weights(model) + suffix * layer_weights(model))
    size = CEILING_SIZE[torch.device(args.device).type]
    left, right = (torch.randn(size, size, device=args.device, dtype=model.llm_dtype) for _ in range(2))
    embedders = {
        f"{budget} tokens": UserEmbedder(model, table, max_batch_tokens=budget) for budget in args.batch_tokens
    }

    def timed(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()

        return run

    functions = {"ceiling": timed(lambda: [left @ right for _ in range(10)])}
    functions |= {
        variant: timed(lambda embedder=embedder: embedder.encode(history, chosen))
        for variant, embedder in embedders.items()
    }
    seconds = interleaved(functions, args.repeats)
    if args.compile:
        for layer in layers_of(model):
            layer.compile(dynamic=True)
        compiled = {f"{variant}, compiled": functions[variant] for variant in embedders}
        seconds |= interleaved(compiled, args.repeats, warmup=2)
    ceilings = [10 * 2 * size**3 / one for one in seconds.pop("ceiling")]
    ceiling = float(np.median(ceilings))
    scale = (
        f"model={name},layers={len(layers_of(model))},users={args.users},instructions={args.instructions},"
        f"prefix={prefix / args.users:.0f},dtype={args.dtype}"
    )

    def row(variant: str, values: list[float], metric: str, unit: str) -> Measurement:
        return measure(NAME, variant, values, scale=scale, metric=metric, unit=unit, packages=PACKAGES)

    rows = [row("matrix product", ceilings, "flop_per_second", "1/s")]
    print(f"{scale}: matrix products {ceiling / 1e12:.2f} TFLOP/s")
    for variant, values in seconds.items():
        speeds = [(prefix + suffix) / one for one in values]
        shares = [operations / one / ceiling for one in values]
        rows += [row(variant, speeds, "tokens_per_second", "1/s"), row(variant, shares, "share_of_ceiling", "1")]
        print(f"  {variant:<24} {np.median(speeds):12,.0f} tokens/s, {np.median(shares):.1%} of them (goal 40%)")
    return rows


def layers_of(model: InstructUEModel) -> Any:
    """The LLM's layers."""
    return model.backbone.layers


def layer_weights(model: InstructUEModel) -> int:
    """Weights of all matrices in the layers."""
    return sum(one.numel() for one in layers_of(model).parameters() if one.dim() == 2)


def prefix_weights(model: InstructUEModel) -> int:
    """The same, without what the last layer does not do for a prefix: everything but queries, keys and values."""
    last = layers_of(model)[-1]
    read = sum(getattr(last.self_attn, name).weight.numel() for name in ("q_proj", "k_proj", "v_proj"))
    return layer_weights(model) - sum(one.numel() for one in last.parameters() if one.dim() == 2) + read


def make_model(args: argparse.Namespace, name: str, scratch: Path) -> InstructUEModel:
    """An untrained model around the LLM."""
    llm = "smollm2-135m-instruct" if name == "135m" else str(half_billion(scratch / "half-billion"))
    started = time.perf_counter()
    model = untrained(
        encoders=dict.fromkeys(TEXTS_PER_USER, "all-minilm-l6-v2"), numeric_columns=NUMERIC, llm=llm,
        llm_layers=args.layers, dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    print(f"{name}: loaded in {time.perf_counter() - started:.0f} s")
    return model


def half_billion(folder: Path) -> Path:
    """A random LLM in the shape of Qwen2.5-0.5B, with the tokenizer of the default LLM."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_folder("smollm2-135m-instruct", kind="LLM"))
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
