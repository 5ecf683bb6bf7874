"""The soft-token table: the adapter, computed once per text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from instructue_feast.errors import DataError, InvalidEmbeddingError, StorageError
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.model.encoders import TextEncoder
from instructue_feast.model.factory import untrained
from tests.model_data import SOURCES, make_table, phrasebook
from tests.tiny_models import make_tiny_encoder


@pytest.fixture
def vectors(encoder):
    return TextEncoder.load(encoder).encode(phrasebook()[2])


@torch.inference_mode()
def test_a_row_is_the_adapter_of_its_source_applied_to_its_text(model, vectors):
    ids, sources, _ = phrasebook()
    table = SoftTokenTable.build(model, ids, sources, vectors)
    rows = table.rows(ids)
    for place in (0, 29, 30, 41):
        own = torch.from_numpy(vectors[place : place + 1])
        source = SOURCES[sources[place]]
        torch.testing.assert_close(
            table.soft_tokens[rows[place]], model.soft_tokens(source, own)[0], atol=1e-6, rtol=1e-4
        )
        torch.testing.assert_close(
            table.focus_keys[rows[place]], model.focus_keys(source, own)[0], atol=1e-6, rtol=1e-4
        )
    assert (np.diff(table.text_ids) > 0).all()
    np.testing.assert_array_equal(table.source_index[rows], sources)


def test_neither_order_nor_the_form_of_the_vectors_matters(model, vectors):
    ids, sources, _ = phrasebook()
    plain = SoftTokenTable.build(model, ids, sources, vectors)
    order = np.random.default_rng(0).permutation(len(ids))
    shuffled = SoftTokenTable.build(model, ids[order], sources[order], vectors[order])
    per_source = [vectors[sources == index] for index in range(len(SOURCES))]
    listed = SoftTokenTable.build(model, ids, sources, per_source)
    named = SoftTokenTable.build(model, ids, sources, dict(zip(SOURCES, per_source, strict=True)))
    for other in (shuffled, listed, named):
        np.testing.assert_array_equal(other.text_ids, plain.text_ids)
        torch.testing.assert_close(other.soft_tokens, plain.soft_tokens, atol=1e-6, rtol=1e-5)


def test_a_saved_table_is_the_same_and_is_mapped_not_read(model, encoder, tmp_path):
    table = make_table(model, encoder)
    table.save(tmp_path / "run" / "soft_tokens.safetensors")
    loaded = SoftTokenTable.load(tmp_path / "run" / "soft_tokens.safetensors")
    np.testing.assert_array_equal(loaded.text_ids, table.text_ids)
    assert torch.equal(loaded.soft_tokens, table.soft_tokens)
    assert torch.equal(loaded.focus_keys, table.focus_keys)
    assert loaded.model_digest == model.weights_digest()
    assert [one.name for one in (tmp_path / "run").iterdir()] == ["soft_tokens.safetensors"]


def test_an_empty_phrasebook_makes_an_empty_table(model, tmp_path):
    empty = SoftTokenTable.build(
        model, np.zeros(0, np.int64), np.zeros(0, np.int32), [np.zeros((0, 0), np.float32)] * len(SOURCES)
    )
    empty.save(tmp_path / "table")
    assert len(SoftTokenTable.load(tmp_path / "table")) == 0
    with pytest.raises(DataError, match="1 of 1"):
        empty.rows(np.array([5]))


def test_an_unknown_text_id_is_counted_and_not_guessed(model, encoder):
    table = make_table(model, encoder)
    with pytest.raises(DataError, match="2 of 3 text ids are not in the table of 42 soft tokens"):
        table.rows(np.array([table.text_ids[3], table.text_ids[-1] + 1, table.text_ids[0] - 1]))


def test_sources_may_have_encoders_of_different_size(tmp_path, tiny):
    llm, encoder = tiny
    wide = make_tiny_encoder(tmp_path / "wide", dim=40)
    model = untrained(encoders={"bill": encoder, "app": wide, "tabular": encoder}, llm=llm)
    ids, sources, texts = phrasebook()
    own = [
        TextEncoder.load(wide if name == "app" else encoder).encode(
            [texts[i] for i in np.flatnonzero(sources == index)]
        )
        for index, name in enumerate(SOURCES)
    ]
    assert SoftTokenTable.build(model, ids, sources, own).focus_keys.shape == (42, 40)
    with pytest.raises(DataError, match=r"source app: vectors of shape \[10, 24\], expected \[10, 40\]"):
        SoftTokenTable.build(model, ids, sources, [own[0], own[0][:10], own[2]])


def test_bad_phrasebooks_are_refused(model, vectors):
    ids, sources, _ = phrasebook()
    with pytest.raises(DataError, match="occurs twice"):
        SoftTokenTable.build(model, np.where(np.arange(len(ids)) == 1, ids[0], ids), sources, vectors)
    with pytest.raises(DataError, match=r"outside 0\.\.2"):
        SoftTokenTable.build(model, ids, sources + 1, vectors)
    with pytest.raises(DataError, match="42 text ids, but 41 vectors"):
        SoftTokenTable.build(model, ids, sources, vectors[1:])
    with pytest.raises(DataError, match="42 text ids, but 41 source"):
        SoftTokenTable.build(model, ids, sources[1:], vectors)
    with pytest.raises(DataError, match="no vectors for source app"):
        SoftTokenTable.build(model, ids, sources, {"bill": vectors[:30]})


def test_vectors_that_are_not_numbers_are_refused(model, vectors):
    ids, sources, _ = phrasebook()
    vectors[7, 3] = np.nan
    with pytest.raises(InvalidEmbeddingError, match="NaN"):
        SoftTokenTable.build(model, ids, sources, vectors)


def test_a_damaged_or_foreign_file_is_refused(model, encoder, tiny, tmp_path):
    file = tmp_path / "table"
    make_table(model, encoder).save(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        SoftTokenTable.load(file)
    with pytest.raises(DataError, match="cannot be read"):
        SoftTokenTable.load(tmp_path / "nothing")
    with pytest.raises(DataError, match="not a soft-token table"):
        SoftTokenTable.load(f"{tiny[0]}/model.safetensors")


def test_a_table_that_cannot_be_written_leaves_nothing(model, encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        make_table(model, encoder).save(tmp_path / "file" / "table")
    assert [one.name for one in tmp_path.iterdir() if one.name != "cache"] == ["file"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_loaded_table_is_a_view_of_the_file_that_all_workers_of_a_host_share(model, encoder, tmp_path):
    file = tmp_path / "table.safetensors"
    make_table(model, encoder).save(file)
    table = SoftTokenTable.load(file)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    spans = [tuple(int(one, 16) for one in line[0].split("-")) for line in maps]
    places = [table.soft_tokens.data_ptr(), table.focus_keys.data_ptr(), table.text_ids.ctypes.data]
    for place in places:
        assert any(start <= place < end for start, end in spans)
