"""The model: seeded, sized like the LLM's own embeddings, trainable where it should be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from instructue_feast.errors import ConfigError, DataError
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.model.encoders import TextEncoder
from instructue_feast.model.factory import untrained
from instructue_feast.model.prompt import UserBatch
from tests.model_data import INSTRUCTIONS, NUMERIC, SOURCES, make_history, make_model, make_table
from tests.tiny_models import make_tiny_encoder, make_tiny_llm

HISTORY = make_history([(5, 3, 1), (0, 0, 0), (20, 8, 2), (0, 2, 0)])


def test_the_same_seed_gives_the_same_weights(tiny):
    assert make_model(*tiny).weights_digest() == make_model(*tiny).weights_digest()
    assert make_model(*tiny, seed=1).weights_digest() != make_model(*tiny).weights_digest()


def test_one_more_source_leaves_the_weights_of_the_others_alone(tiny, model):
    llm, encoder = tiny
    more = untrained(encoders=dict.fromkeys([*SOURCES, "search"], encoder), llm=llm, embedding_dim=16)
    for name in SOURCES:
        torch.testing.assert_close(more.adapters[name].up, model.adapters[name].up, rtol=0, atol=0)
    torch.testing.assert_close(more.projection.up.weight, model.projection.up.weight, rtol=0, atol=0)


@torch.inference_mode()
def test_untrained_soft_tokens_are_as_large_as_the_llms_own_embeddings(model):
    vectors = torch.nn.functional.normalize(torch.randn(500, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    wanted = model.llm.get_input_embeddings().weight.pow(2).mean().sqrt()
    for source in SOURCES:
        assert 0.8 < float(model.soft_tokens(source, vectors).pow(2).mean().sqrt() / wanted) < 1.25


def test_the_untrained_similarity_is_the_cosine(model, encoder):
    texts = ["grocery item 1", "Does the user rent?"]
    vectors = TextEncoder.load(encoder).encode(texts)
    queries = model.focus_queries(texts)
    keys = model.focus_keys("bill", torch.from_numpy(vectors))
    np.testing.assert_allclose((keys @ queries[0].T).detach(), vectors @ vectors.T, atol=1e-5)


def test_a_small_focus_size_keeps_similar_texts_similar(tiny):
    llm, encoder = tiny
    model = untrained(encoders={"bill": encoder}, llm=llm, focus_dim=8)
    for parameter in (model.focus.keys[0].weight, model.focus.queries[0].weight):
        torch.testing.assert_close(parameter @ parameter.T, torch.eye(8), atol=1e-5, rtol=0)


def test_markers_start_from_the_llms_words_and_leave_its_vocabulary_alone(model):
    embedding = model.llm.get_input_embeddings().weight
    for index, name in enumerate(SOURCES):
        expected = embedding[torch.from_numpy(model.word_ids(f"<{name}>"))].mean(0)
        torch.testing.assert_close(model.prompt.opening[index], expected)
    assert len(embedding) == len(model.tokenizer)


def test_the_announced_prefix_length_is_the_assembled_one(model, encoder):
    output = run(model, encoder)
    assert (output.prompts.segment_BS == 0).sum(1).tolist() == model.prefix_lengths(HISTORY).tolist()


def run(model, encoder):
    embedder = UserEmbedder(model, make_table(model, encoder))
    prepared = embedder._prepare(INSTRUCTIONS[:3])
    batch, similarity = embedder._gather(HISTORY, prepared)
    return model(batch, [prepared.suffixes] * len(HISTORY), similarity)


def test_gradients_reach_all_weights_of_ours_and_none_of_the_llm(model, encoder):
    model.train()
    table = make_table(model, encoder)
    rows = torch.from_numpy(table.rows(HISTORY.text_id))
    vectors = torch.randn(len(rows), model.focus_dim)
    soft = torch.cat(
        [
            model.soft_tokens(SOURCES[source], vectors[index : index + 1])
            for index, source in enumerate(HISTORY.source_index)
        ]
    )
    keys = model.focus_keys("bill", vectors)
    similarity = keys @ model.focus_queries([one.text for one in INSTRUCTIONS[1:3]])[0].T
    suffixes = [model.suffix(one.text, answer_ids=np.array([5, 6])) for one in INSTRUCTIONS[1:3]]
    output = model(UserBatch(HISTORY, soft), [suffixes] * len(HISTORY), similarity)
    weights = torch.randn(output.embeddings.shape, generator=torch.Generator().manual_seed(0))
    answers = model.answer_embeddings([model.answer_ids(text) for text in ("yes", "not at all")])
    ((output.embeddings * weights).sum() + answers[0, 0] - answers[1, 0]).backward()
    missing = [name for name, one in model.named_parameters() if not name.startswith("llm.") and one.grad is None]
    assert missing == []
    assert all(one.grad is None for one in model.llm.parameters())


@torch.inference_mode()
def test_an_answer_is_embedded_the_same_alone_and_among_longer_ones(model):
    short, long = model.answer_ids("yes"), model.answer_ids("no, this user never does")
    together = model.answer_embeddings([short, long])
    torch.testing.assert_close(together[:1], model.answer_embeddings([short]), atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert short[-1] == model.tokenizer.eos_token_id


def test_instructions_read_once_equal_instructions_in_every_users_row(tiny, encoder):
    """Gradient checkpointing cannot use cached keys, so it puts instructions in line: same values, same gradients."""
    results = []
    for checkpointing in (False, True):
        model = make_model(*tiny).train()
        if checkpointing:
            model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        table = make_table(model, encoder)
        rows = torch.from_numpy(table.rows(HISTORY.text_id))
        soft = table.soft_tokens[rows].clone().requires_grad_()
        tuned = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        suffixes = [model.suffix("who drinks tea", soft_prompt=tuned), model.suffix(""), model.suffix("who")]
        similarity = table.focus_keys[rows] @ model.focus_queries(["who drinks tea", "", "who"])[0].T
        states = model.instruction_states(suffixes)
        assert bool(states.layers) is not checkpointing
        output = model(UserBatch(HISTORY, soft), [suffixes] * len(HISTORY), similarity.detach(), states)
        weights = torch.randn(output.embeddings.shape, generator=torch.Generator().manual_seed(0))
        (output.embeddings * weights).sum().backward()
        results.append((output.embeddings.detach(), soft.grad, tuned.grad))
    for shared, in_line in zip(*results, strict=True):
        torch.testing.assert_close(shared, in_line, atol=1e-5, rtol=1e-4)
    assert results[0][2].abs().max() > 0


@torch.inference_mode()
def test_a_cut_llm_computes_what_its_first_layers_compute(tiny):
    llm, encoder = tiny
    whole, cut = (untrained(encoders={"bill": encoder}, llm=llm, llm_layers=layers) for layers in (0, 1))
    inputs = torch.randn(2, 5, whole.config.hidden_size)
    expected = whole.backbone(inputs_embeds=inputs, output_hidden_states=True).hidden_states[1]
    actual = cut.backbone(inputs_embeds=inputs).last_hidden_state
    torch.testing.assert_close(actual, whole.backbone.norm(expected))
    assert cut.config.identity() != whole.config.identity()
    with pytest.raises(ConfigError, match="llm_layers is 99"):
        untrained(encoders={"bill": encoder}, llm=llm, llm_layers=99)


@torch.inference_mode()
def test_texts_beyond_prompt_texts_leave_the_prompt_but_not_the_focus(tiny, model, encoder):
    llm, _ = tiny
    short = make_model(llm, encoder, prompt_texts=3)
    lengths = short.prefix_lengths(HISTORY)
    shown = np.minimum(short.prompt.texts_per_source(HISTORY), 3).sum(1)
    full = model.prompt.texts_per_source(HISTORY).sum(1)
    assert (model.prefix_lengths(HISTORY) - lengths).tolist() == (full - shown).tolist()
    table = make_table(short, encoder)
    before = UserEmbedder(short, table).focus_weights(HISTORY, INSTRUCTIONS[1:2])
    assert (before > 0).all()  # the oldest texts too
    assert before.shape == (len(HISTORY.text_id), 1)


@pytest.mark.parametrize("switch", ["focus_token", "summary_tokens"])
@torch.inference_mode()
def test_switched_off_tokens_keep_their_place(switch, tiny, model, encoder):
    llm, _ = tiny
    other = make_model(llm, encoder, **{switch: False})
    one = UserEmbedder(model, make_table(model, encoder)).encode(HISTORY, INSTRUCTIONS[1:3])
    two = UserEmbedder(other, make_table(other, encoder)).encode(HISTORY, INSTRUCTIONS[1:3])
    assert model.prefix_lengths(HISTORY).tolist() == other.prefix_lengths(HISTORY).tolist()
    assert np.abs(one - two).max() > 1e-4


@torch.inference_mode()
def test_numbers_reach_the_focus_of_the_instruction_that_names_them(model, encoder):
    """Raising a column moves the focus token in proportion to how near the instruction is to the column's name."""
    table = make_table(model, encoder)
    history = make_history([(5, 3, 1)])
    rows = torch.from_numpy(table.rows(history.text_id))
    suffixes = [[model.suffix(name.replace("_", " ")) for _, _, name in NUMERIC]]
    queries = torch.stack([one.vectors[0] for one in suffixes[0]])
    similarity = torch.zeros(len(rows), len(NUMERIC))
    before = model.focus_tokens(UserBatch(history, table.soft_tokens[rows]), suffixes, similarity)
    for column in range(len(NUMERIC)):
        more = history.tabular_numeric.copy()
        more[0, column] = np.nan_to_num(more[0, column]) + 100.0
        changed = dataclasses.replace(history, tabular_numeric=more)
        after = model.focus_tokens(UserBatch(changed, table.soft_tokens[rows]), suffixes, similarity)
        moved = (after - before)[0].norm(dim=-1)
        near = (queries @ queries[column]).abs()
        torch.testing.assert_close(moved / moved.max(), near / near.max(), atol=1e-3, rtol=1e-2)


def test_an_answer_behind_the_user_token_cannot_leak_into_the_embedding(model, encoder):
    embedder = UserEmbedder(model, make_table(model, encoder))
    prepared = embedder._prepare(INSTRUCTIONS[1:2])
    batch, similarity = embedder._gather(HISTORY, prepared)
    answers = [None, np.array([7]), np.array([9, 10, 11])]
    with torch.inference_mode():
        results = [
            model(batch, [[model.suffix(INSTRUCTIONS[1].text, answer_ids=one)]] * len(HISTORY), similarity).embeddings
            for one in answers
        ]
    for one in results[1:]:
        torch.testing.assert_close(one, results[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_other_llm_families_give_the_same_in_one_pass_as_in_many(tmp_path, encoder, family):
    model = make_model(make_tiny_llm(tmp_path / family, family=family), encoder)
    embedder = UserEmbedder(model, make_table(model, encoder))
    together = embedder.encode(HISTORY, INSTRUCTIONS)
    alone = np.concatenate([embedder.encode(HISTORY, [one]) for one in INSTRUCTIONS], axis=1)
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_encoders_of_different_size_can_stand_side_by_side(tmp_path, tiny):
    llm, encoder = tiny
    wide = make_tiny_encoder(tmp_path / "wide", dim=40)
    model = untrained(encoders={"bill": encoder, "app": wide, "tabular": encoder}, numeric_columns=NUMERIC, llm=llm)
    assert model.focus_dim == 40
    assert model.focus_queries(["churn", ""]).shape == (2, 2, 40)
    assert model.adapters["app"].up.shape == (40, 40)


def test_numbers_are_standardised_and_missing_ones_flagged(model):
    values = torch.tensor([[1.0, 100.0, 3.0], [3.0, float("nan"), 4.0], [5.0, 900.0, float("inf")]])
    model.numeric.set_statistics(values)
    torch.testing.assert_close(model.numeric.mean[0], torch.asinh(values[:, 0]).mean())
    tokens = model.numeric(values)
    assert tokens.shape == (3, 2, model.config.hidden_size)
    assert tokens.isfinite().all()
    same = model.numeric(torch.tensor([[3.0, float("-inf"), 4.0]]))[0]
    torch.testing.assert_close(same, tokens[1])
    assert not torch.allclose(tokens[1], model.numeric(torch.tensor([[3.0, 0.0, 4.0]]))[0])


def test_bfloat16_concerns_the_llm_alone(tiny, encoder):
    llm, _ = tiny
    model = untrained(
        encoders=dict.fromkeys(SOURCES, encoder),
        numeric_columns=NUMERIC,
        llm=llm,
        embedding_dim=16,
        dtype=torch.bfloat16,
    )
    assert {one.dtype for one in model.own_state().values()} == {torch.float32}
    assert model.llm_dtype == torch.bfloat16
    full = make_model(*tiny)
    a, b = (UserEmbedder(one, make_table(one, encoder)).encode(HISTORY, INSTRUCTIONS[:2]) for one in (model, full))
    assert a.dtype == np.float32
    assert (a * b).sum(-1).min() > 0.98


def test_a_soft_prompt_of_another_size_is_refused(model):
    with pytest.raises(ConfigError, match=r"\[2, 5\].*32"):
        model.suffix("churn", soft_prompt=torch.zeros(2, 5))


@pytest.mark.parametrize("name", ["source_index", "count_bucket", "age_bucket"])
def test_indices_no_embedding_stands_for_are_refused(model, name):
    history = make_history([(2, 0, 0)])
    getattr(history, name)[0] = 99
    with pytest.raises(DataError, match=name):
        model.prompt.check(history)


def test_a_history_with_other_numeric_columns_is_refused(tiny):
    llm, encoder = tiny
    model = untrained(encoders=dict.fromkeys(SOURCES, encoder), llm=llm)
    with pytest.raises(DataError, match="3 numeric columns, the model has 0"):
        model.prompt.check(HISTORY)


def test_tokens_out_of_source_order_are_refused(model):
    history = make_history([(2, 1, 0)])
    history.source_index[:] = [1, 0, 0]
    with pytest.raises(DataError, match="not ordered by source"):
        model.prompt.check(history)
