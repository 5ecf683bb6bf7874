"""A training step with our ops and with plain torch in their places; part of `gpu.py`.

The model is InstructUE around a random Llama of SmolLM2-135M's sizes: users with histories, several questions each,
the contrastive and the next-token loss, forward and backward. Both variants are the same model; `eager` replaces every
op by what one would write in plain torch.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from adapter_bench import one_thread, padded_pool, padding
from kernel_bench import Row, Shape, interleaved, peak_mib, row
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from instructue_feast.history.buckets import NUM_AGE_BUCKETS, NUM_COUNT_BUCKETS
from instructue_feast.history.pack import PackedHistory
from instructue_feast.model import attention
from instructue_feast.model.config import InstructUEConfig
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.training.losses import answer_places
from instructue_feast.training.vectors import TextVectors, embed
from instructue_kernels.adapter import adapter
from instructue_kernels.info_nce import info_nce
from instructue_kernels.next_token import next_token_loss
from instructue_kernels.prompt_slots import prompt_slots

SHARE = 0.15
"""Of the whole time budget."""

SOURCES, ENCODER_DIM, QUESTIONS, ANSWER_TOKENS = 6, 384, 4, 4
FULL = {"hidden": 576, "layers": 30, "heads": 9, "vocabulary": 49152, "users": 64, "texts": 200, "book": 20000}
CUT = FULL | {"layers": 2, "users": 16, "texts": 100}
SMOKE = {"hidden": 32, "layers": 1, "heads": 4, "vocabulary": 300, "users": 4, "texts": 12, "book": 60}


def run(seconds: float, *, smoke: bool = False) -> list[Row]:
    """A step of the whole LLM on a GPU; a tiny one as a smoke test."""
    return measure(SMOKE if smoke else FULL, seconds, repeats=2 if smoke else 15)


def measure(sizes: dict[str, int], seconds: float, *, repeats: int) -> list[Row]:
    """Time and memory of both variants, and the ratio of times."""
    step = Step(sizes, "cuda" if torch.cuda.is_available() else "cpu")

    def eager() -> None:
        with plain_torch():
            step()

    calls: dict[str, Callable[[], object]] = {"ours": step, "eager": eager}
    for call in calls.values():
        call()
    memory = {name: peak_mib(call) for name, call in calls.items()}
    processor = one_thread()
    times = interleaved(calls, repeats=repeats, seconds=seconds, processor=processor)
    metric = "processor time" if processor else "time"
    mode = f"forward+backward {sizes['layers']} layers"
    shape = Shape(
        op="step", mode=mode, n=sizes["users"], m=sizes["users"] * QUESTIONS, d=sizes["hidden"], dtype=step.dtype
    )
    rows = [row(shape, name, values, metric=metric, unit="ms") for name, values in times.items()]
    rows += [row(shape, name, [value], metric="memory", unit="MiB") for name, value in memory.items()]
    ratios = [theirs / ours for theirs, ours in zip(times["eager"], times["ours"], strict=True)]
    return [*rows, row(shape, "eager", ratios, metric="time over ours", unit="1")]


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Every op is plain torch while this lasts."""

    def pool(
        weights_TK: torch.Tensor, soft_NH: torch.Tensor, offsets: torch.Tensor, *, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        return padded_pool(weights_TK, soft_NH, rows, padding(offsets.diff().cpu(), soft_NH.device))

    plain = {
        "instructue_feast.model.adapter.adapter": functools.partial(adapter, impl="reference"),
        "instructue_feast.model.prompt.text_pool": pool,
        "instructue_feast.model.focus.text_pool": pool,
        "instructue_feast.model.prompt.prompt_slots": functools.partial(prompt_slots, impl="reference"),
        f"{__name__}.info_nce": functools.partial(info_nce, impl="reference"),
        f"{__name__}.next_token_loss": functools.partial(next_token_loss, impl="reference"),
    }
    with contextlib.ExitStack() as stack:
        for name, function in plain.items():
            stack.enter_context(mock.patch(name, function))
        yield


class Step:
    """One step over the same users every time."""

    def __init__(self, sizes: dict[str, int], device: str) -> None:
        rng = np.random.default_rng(0)
        self.model = _model(sizes).to(device)
        if device == "cuda":
            self.model.llm.to(torch.bfloat16)
        self.dtype = str(self.model.llm_dtype).removeprefix("torch.")
        self.model.train()
        users, book = sizes["users"], sizes["book"]
        self.history = _history(rng, users, sizes["texts"], book)
        vectors = rng.standard_normal((book + QUESTIONS, ENCODER_DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        events, wordings = torch.from_numpy(vectors[:book]), torch.from_numpy(vectors[book:])
        source = np.arange(book, dtype=np.int32) * SOURCES // book
        self.vectors = TextVectors(np.arange(book), source, np.arange(book), (events,), (wordings,))
        answers = rng.integers(0, sizes["vocabulary"], (QUESTIONS * 3, ANSWER_TOKENS))
        self.answers = list(answers.astype(np.int64))
        self.positive_BK = np.arange(QUESTIONS) * 3 + rng.integers(0, 3, (users, QUESTIONS))
        self.suffixes = [
            [
                self.model.suffix(
                    f"question {k}", answer_ids=self.answers[self.positive_BK[user, k]][:-1], vectors=(wordings[k],)
                )
                for k in range(QUESTIONS)
            ]
            for user in range(users)
        ]
        self.wording_BK = np.tile(np.arange(QUESTIONS), (users, 1))

    def __call__(self) -> torch.Tensor:
        """The loss, after its backward."""
        model = self.model
        model.zero_grad()
        output = embed(model, self.vectors, self.history, self.suffixes, self.wording_BK)
        target_BK = [[self.answers[one] for one in own] for own in self.positive_BK]
        user_X, place_X, target_X = (
            torch.from_numpy(one).to(model.device) for one in answer_places(output.prompts.readout_BK, target_BK)
        )
        head = model.llm.get_output_embeddings()
        loss = next_token_loss(output.hidden[user_X, place_X], head.weight, target_X).float()
        group_N = torch.from_numpy(np.tile(np.arange(QUESTIONS), len(self.history))).to(model.device)
        loss = loss + info_nce(
            output.embeddings.flatten(0, 1),
            model.answer_embeddings(self.answers),
            torch.tensor(-math.log(0.07), device=model.device),
            positives=torch.from_numpy(self.positive_BK.ravel()).to(model.device),
            symmetric=False,
            query_group=group_N,
            key_group=torch.arange(QUESTIONS, device=model.device).repeat_interleave(3),
        )
        loss.backward()
        return loss.detach()


def _model(sizes: dict[str, int]) -> InstructUEModel:
    words = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hidden, heads = sizes["hidden"], sizes["heads"]
    torch.manual_seed(0)
    llm_config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=hidden, intermediate_size=hidden * 8 // 3,
        num_hidden_layers=sizes["layers"], num_attention_heads=heads, num_key_value_heads=heads // 3 or 1,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(llm_config, dtype=torch.float32, attn_implementation=attention.NAME)
    names = [f"source_{one}" for one in range(SOURCES)]
    config = InstructUEConfig(
        sources=names,
        numeric_columns=[],
        encoders=dict.fromkeys(names, "random"),
        encoder_dims={"random": ENCODER_DIM},
        encoder_digests={"random": ""},
        llm="random",
        hidden_size=hidden,
    )
    model = InstructUEModel(config, llm, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"))
    for source in names:
        model.adapters[source].initialise(0.1, seed=0, name=source)
    model.focus.initialise(torch.zeros(hidden), 0.1, seed=0, name="focus")
    model.prompt.initialise(0.1, seed=0, name="prompt")
    model.projection.initialise(seed=0, name="projection")
    return model


def _history(rng: np.random.Generator, users: int, texts: int, book: int) -> PackedHistory:
    lengths = rng.integers(texts // 4, texts + 1, users)
    ids = np.concatenate([np.sort(rng.choice(book, one, replace=False)) for one in lengths])
    return PackedHistory(
        user_ids=[f"user {one}" for one in range(users)],
        as_of_us=np.zeros(users, np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        source_index=(ids * SOURCES // book).astype(np.int32),
        text_id=ids.astype(np.int64),
        count_bucket=rng.integers(0, NUM_COUNT_BUCKETS, len(ids)).astype(np.int32),
        age_bucket=rng.integers(0, NUM_AGE_BUCKETS, len(ids)).astype(np.int32),
        num_events=np.ones((users, SOURCES), np.int32),
        tabular_numeric=np.zeros((users, 0), np.float32),
    )
