from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from instructue_feast.errors import DataError, LeakageError, VersionMismatchError
from instructue_feast.evaluation.ours import TaskEncoder, derangement, encode_texts, load_soft_prompts
from instructue_feast.evaluation.suite import check_leakage
from instructue_feast.evaluation.tasks import Task
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.soft_prompts import save_soft_prompt
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.instructions import Instruction
from tests.evaluation.small import AS_OF, small_book, small_history
from tests.model_data import make_soft_prompt


def task(name, *, family="marketing", subject=None, instruction=None, paraphrase="", answers=()):
    return Task(
        name=name, family=family, subject=subject or name, instruction=instruction or f"Is this about {name}?",
        paraphrase=paraphrase, answers=answers,
    )  # fmt: skip


TASKS = [
    task("tea", paraphrase="What about tea?", answers=("Yes, tea.", "No, no tea.")),
    task("apps", paraphrase="Which apps, then?", answers=("Often.", "Sometimes.", "Never.")),
    task("home"),
]


@pytest.fixture
def encoded(model):
    book = small_book()
    return TaskEncoder(model, book, encode_texts(model, book))


def direct(model, history, *instructions):
    book = small_book()
    table = SoftTokenTable.build(
        model, book.text_ids, book.source_index, model.text_encoder(model.config.encoder_names[0]).encode(book.texts)
    )
    prompts = {one.content_hash: prompt for one, prompt in instructions if prompt is not None}
    return UserEmbedder(model, table, soft_prompts=prompts).encode(history, [one for one, _ in instructions])


def test_every_row_is_what_the_embedder_says_about_its_own_instruction(model, encoded):
    history = small_history(12)
    prompt = make_soft_prompt(model, tokens=2, size=0.05)
    found = encoded.embed(history, TASKS, soft_prompts={"apps": prompt})
    rows = found.rows(derangement(TASKS))
    tuned = Instruction("tuned", TASKS[1].instruction, soft_prompt=prompt.digest)
    expected = {
        ("ours", 0): (Instruction("a", TASKS[0].instruction), None),
        ("ours_paraphrased", 0): (Instruction("b", TASKS[0].paraphrase), None),
        ("ours_none", 2): (Instruction("c", ""), None),
        ("ours_fewshot", 1): (tuned, prompt),
    }
    vectors = direct(model, history, *expected.values())
    for position, (name, row) in enumerate(expected):
        np.testing.assert_allclose(rows[name][row], vectors[:, position], atol=2e-6)
    assert rows["ours_fewshot"][0] is None  # nobody tuned this one
    assert rows["ours_paraphrased"][2] is None
    assert not np.allclose(rows["ours_fewshot"][1], rows["ours"][1], atol=1e-4)


def test_the_mismatched_row_is_the_right_row_of_another_task(encoded):
    found = encoded.embed(small_history(6), TASKS)
    mismatch = derangement(TASKS)
    rows = found.rows(mismatch)
    for own, other in enumerate(mismatch):
        assert own != other
        np.testing.assert_array_equal(rows["ours_mismatched"][own], rows["ours"][other])


def test_every_instruction_is_embedded_once_per_user(encoded, monkeypatch):
    passes = []
    real = UserEmbedder.encode

    def counted(self, history, instructions, on_batch=None):
        passes.append(len(instructions))
        return real(self, history, instructions, on_batch)

    monkeypatch.setattr(UserEmbedder, "encode", counted)
    twice = [*TASKS, task("tea_too", instruction=TASKS[0].instruction)]
    encoded.embed(small_history(4), twice)
    assert passes == [3 + 2 + 1]  # right, held-out wordings, and none


def test_the_zero_shot_score_is_a_difference_of_cosines(model, encoded):
    found = encoded.embed(small_history(8), TASKS)
    for row in (0, 1):
        answers = [model.answer_embeddings([model.answer_ids(text)])[0].detach().numpy() for text in TASKS[row].answers]
        cosine = found.vector_UKE[:, found.right[row]] @ np.array(answers).T
        np.testing.assert_allclose(found.zero_shot_TU[row], cosine[:, 0] - cosine[:, 1:].mean(1), atol=1e-5)
    assert np.isnan(found.zero_shot_TU[2]).all()


def test_the_few_shot_score_is_the_same_under_the_tuned_instruction(model, encoded):
    prompt = make_soft_prompt(model, tokens=2, size=0.05)
    found = encoded.embed(small_history(8), TASKS, soft_prompts={"apps": prompt})
    answers = [model.answer_embeddings([model.answer_ids(text)])[0].detach().numpy() for text in TASKS[1].answers]
    cosine = found.vector_UKE[:, found.few_shot[1]] @ np.array(answers).T
    np.testing.assert_allclose(found.few_shot_TU[1], cosine[:, 0] - cosine[:, 1:].mean(1), atol=1e-5)
    assert not np.allclose(found.few_shot_TU[1], found.zero_shot_TU[1], atol=1e-4)
    assert np.isnan(found.few_shot_TU[[0, 2]]).all()


def test_progress_ends_at_all_users(encoded):
    seen = []
    encoded.embed(small_history(9), TASKS, on_users=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_derangement_prefers_other_families_and_avoids_the_same_subject():
    tasks = [task(f"m{i}") for i in range(3)] + [task(f"r{i}", family="recommendation") for i in range(3)]
    mismatch = derangement(tasks)
    assert sorted(mismatch) == list(range(6))
    assert all(tasks[own].family != tasks[other].family for own, other in enumerate(mismatch))
    alike = [task("a", subject="x"), task("b", subject="x"), task("c"), task("d")]
    assert all(alike[own].subject != alike[other].subject for own, other in enumerate(derangement(alike)))
    assert derangement(tasks[:1]) == []


def test_shared_texts_are_encoded_once(model):
    book = small_book()
    doubled = book.with_texts(book.text_ids + 1, book.source_index, book.texts)
    encoder = model.text_encoder(model.config.encoder_names[0])
    before = encoder.num_encoded
    vectors = encode_texts(model, doubled)[model.config.encoder_names[0]]
    assert encoder.num_encoded - before == len(set(book.texts))
    np.testing.assert_allclose(vectors[doubled.rows(book.text_ids)], encoder.encode(book.texts), atol=1e-6)


def tune(folder, model, one, *, words=None):
    """What `instructue tune-instruction` leaves for a task."""
    prompt = make_soft_prompt(model, instruction_id=one.name, text=words or one.instruction)
    save_soft_prompt(prompt, folder / f"{one.name}.safetensors")
    return prompt


def test_soft_prompts_are_read_by_task_name(model, tmp_path):
    prompt = tune(tmp_path, model, TASKS[0])
    tune(tmp_path, model, task("unrelated"))
    found = load_soft_prompts(tmp_path, TASKS, model)
    assert {name: one.digest for name, one in found.items()} == {"tea": prompt.digest}


def test_a_folder_without_soft_prompts_of_the_tasks_is_refused_only_when_they_are_required(model, tmp_path):
    tune(tmp_path, model, task("unrelated"))
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert load_soft_prompts(folder, TASKS, model, required=False) == {}
        with pytest.raises(DataError, match="no soft prompt of any of 3 tasks"):
            load_soft_prompts(folder, TASKS, model)


@pytest.mark.parametrize("required", [True, False])
def test_soft_prompts_of_another_model_or_of_other_words_are_refused(model, tmp_path, required):
    tune(tmp_path, model, TASKS[0], words="Is this about coffee?")
    with pytest.raises(
        VersionMismatchError, match=r"tea\.safetensors was tuned for the words 'Is this about coffee\?'"
    ):
        load_soft_prompts(tmp_path, TASKS, model, required=required)
    tune(tmp_path, model, TASKS[0])
    with torch.no_grad():
        next(iter(model.own_state().values())).add_(1)
    with pytest.raises(VersionMismatchError, match="'tea' was tuned with model"):
        load_soft_prompts(tmp_path, TASKS, model, required=required)


def test_damaged_soft_prompts_are_refused(model, tmp_path):
    file = tmp_path / "tea.safetensors"
    save_file({"a": torch.ones(3, 8)}, file)
    with pytest.raises(DataError, match="damaged or something else"):
        load_soft_prompts(tmp_path, TASKS, model)
    file.write_bytes(b"pickle")
    with pytest.raises(DataError, match="damaged or something else"):
        load_soft_prompts(tmp_path, TASKS, model)
    tune(tmp_path, model, TASKS[0])
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="the values are not those it was saved with"):
        load_soft_prompts(tmp_path, TASKS, model)


def test_a_model_that_has_seen_the_future_is_refused(model):
    model.config.trained_through = "2017-10-01T00:00:00+00:00"
    check_leakage(model, AS_OF)
    model.config.trained_through = "2017-10-02T00:00:00+00:00"
    with pytest.raises(LeakageError, match="2017-10-02"):
        check_leakage(model, AS_OF)
    check_leakage(model, AS_OF, allow=True)
