"""Baselines made of text: pooled event vectors, a text profile of each user, and an LLM as it comes that reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from instructue_feast.evaluation.extracts import Phrasebook
from instructue_feast.evaluation.journey import Journey
from instructue_feast.evaluation.journey_features import HandFeatures
from instructue_feast.history.buckets import COUNT_EDGES
from instructue_feast.history.pack import PackedHistory
from instructue_feast.model.layout import token_budget_batches
from instructue_feast.model.saving import load_llm

# U = users, N = texts, D = encoder size, H = hidden size, B = batch, S = sequence

Matrix = npt.NDArray[np.float32]
OnUsers = Callable[[int, int], None]

MAX_PROFILE_TOKENS = 120
"""LLM tokens of a profile that are read; the rest is cut."""

TOP_CATEGORIES = 12
RECENT_CATEGORIES = 4
_LLM_BATCH_TOKENS = 2048


def bucket_counts() -> npt.NDArray[np.float64]:
    """A count for each count bucket: the middle of what falls into it, by ratio."""
    low = np.array([1, *COUNT_EDGES], np.float64)
    high = np.array([*(edge - 1 for edge in COUNT_EDGES), COUNT_EDGES[-1] * 2], np.float64)
    return np.sqrt(low * np.maximum(low, high))


def mean_event_vectors(history: PackedHistory, book: Phrasebook, vector_ND: Matrix) -> Matrix:
    """Mean encoder vector of each user's events, every text weighted by its count.

    Args:
        history: U users.
        book: The texts.
        vector_ND: Their encoder vectors.

    Returns:
        `[U, D]`; zero for a user without any event.
    """
    rows = book.rows(history.text_id)
    weight = bucket_counts()[history.count_bucket]
    user = np.repeat(np.arange(len(history)), history.num_tokens)
    pooled = np.zeros((len(history), vector_ND.shape[1]))
    np.add.at(pooled, user, vector_ND[rows] * weight[:, None])
    total = np.bincount(user, weight, minlength=len(history))
    return (pooled / np.maximum(total, 1e-9)[:, None]).astype(np.float32)


def journey_profiles(past: Journey, hand: HandFeatures, profile: Sequence[str]) -> list[str]:
    """A short text about each household: how often it comes, what it pays, what it buys, coupons, demographics.

    Args:
        past: What happened before the cut.
        hand: Its hand features.
        profile: Text of each household's demographics; empty where nobody knows them.
    """
    names = [name.lower() for name in hand.category_names]
    recent_UC = (
        hand.recency_counts - hand.counts * (hand.recency_counts.sum(1) / np.maximum(1, hand.counts.sum(1)))[:, None]
    )
    texts = []
    for user in range(past.num_users):
        often = [names[c] for c in np.argsort(-hand.counts[user], kind="stable")[:TOP_CATEGORIES]]
        rising = [names[c] for c in np.argsort(-recent_UC[user], kind="stable") if names[c] not in often]

        def number(name: str, row: int = user) -> str:
            return f"{hand.column(name)[row]:.0f}"

        texts.append(
            f"Shopper: last visit {number('recency_days')} days ago, {number('visits_30d')} visits in 30 days, "
            f"{number('visits_90d')} in 90 days, spent {number('spend_90d')} dollars in 90 days, "
            f"{number('avg_basket')} per visit, {number('redemptions_total')} coupons redeemed, "
            f"{number('campaigns_total')} campaigns received. {profile[user]}"
            f"Buys {', '.join(often)}; lately {', '.join(rising[:RECENT_CATEGORIES])}."
        )
    return texts


def demographic_texts(past: Journey) -> list[str]:
    """The last known demographics of each household as a sentence, or nothing."""
    texts = [""] * past.num_users
    for row in np.lexsort((past.profile.time_E, past.profile.user_E)):
        words = [f"{name.replace('_', ' ')} {one[row]}" for name, one in past.profile.columns.items() if one[row]]
        texts[past.profile.user_E[row]] = f"Household: {', '.join(words)}. " if words else ""
    return texts


@torch.inference_mode()
def llm_vectors(
    name: str, texts: Sequence[str], *, max_tokens: int = MAX_PROFILE_TOKENS, on_users: OnUsers | None = None
) -> tuple[Matrix, Matrix]:
    """Last and mean hidden state of an LLM as it comes over each text, in bfloat16.

    Args:
        name: The LLM.
        texts: U texts.
        max_tokens: How many tokens of a text are read.
        on_users: Called with texts done and texts in all.

    Returns:
        Two `[U, H]` arrays.

    Raises:
        DataError: There is no such model.
    """
    causal, tokenizer, _ = load_llm(name, torch.bfloat16)
    backbone = causal.base_model
    ids = [
        np.asarray(one[:max_tokens], np.int64)
        for one in tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ]
    lengths = np.array([len(one) for one in ids], np.int64)
    hidden_size = causal.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    last, mean = np.empty((len(ids), hidden_size), np.float32), np.empty((len(ids), hidden_size), np.float32)
    done = 0
    for members in token_budget_batches(lengths, [str(n) for n in range(len(ids))], _LLM_BATCH_TOKENS):
        longest = int(lengths[members].max())
        tokens_BS, mask_BS = np.zeros((len(members), longest), np.int64), np.zeros((len(members), longest), np.int64)
        for row, member in enumerate(members):
            tokens_BS[row, : lengths[member]], mask_BS[row, : lengths[member]] = ids[member], 1
        hidden_BSH = backbone(  # type: ignore[operator]
            input_ids=torch.from_numpy(tokens_BS), attention_mask=torch.from_numpy(mask_BS), use_cache=False
        ).last_hidden_state.float()
        mask = torch.from_numpy(mask_BS)[:, :, None].float()
        last[members] = hidden_BSH[torch.arange(len(members)), torch.from_numpy(lengths[members] - 1)].numpy()
        mean[members] = ((hidden_BSH * mask).sum(1) / mask.sum(1)).numpy()
        done += len(members)
        if on_users is not None:
            on_users(done, len(ids))
    return last, mean
