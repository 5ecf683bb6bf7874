"""Chat models word questions; only what the data support is kept; keys stay secret."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from instructue_feast.errors import ConfigError, DataError, StorageError
from instructue_feast.generators.choose import make_generator
from instructue_feast.generators.openai import OpenAIGenerator
from instructue_feast.question_specs import GeneratorConfig
from instructue_feast.user_qa.proposals import (
    Fact,
    Proposal,
    TemplateGenerator,
    chat_messages,
    counter_answers,
    parse_proposals,
    question_id,
    refusal,
)
from tests.tiny_models import make_tiny_llm

FACTS = [
    Fact("buys:tea", "Will this user buy tea?", "Yes, tea.", ("No tea.",)),
    Fact("level", "How much?", "Low.", ("Medium.", "High.")),
]
SECRET = "sk-very-secret"


def line(question: str, answer: str, **claims: str) -> str:
    names = {"tea": "buys:tea", "level": "level", "other": "buys:gold"}
    return json.dumps(
        {"question": question, "answer": answer, "claims": {names[key]: value for key, value in claims.items()}}
    )


@pytest.mark.parametrize(
    ("proposal", "why"),
    [
        (line("A tea drinker?", "Yes, though a small one.", tea="Yes, tea.", level="Low."), None),
        (line("A tea drinker?", "No.", tea="No tea."), "claim not supported"),
        (line("A tea drinker?", "Yes.", tea="Yes, tea.", level="High."), "claim not supported"),
        (line("Rich?", "Yes.", other="Yes, gold."), "claim about an unknown question"),
        (line("Rich?", "Yes."), "no claim"),
        (line("", "Yes.", tea="Yes, tea."), "empty text"),
        (line("Tea?", "Yes. " * 100, tea="Yes, tea."), "text too long"),
    ],
)
def test_a_proposal_stands_or_falls_with_its_claims(proposal: str, why: str | None):
    (found,) = parse_proposals(proposal)
    assert refusal(found, FACTS) == why


def test_what_a_template_says_is_always_supported():
    proposals = TemplateGenerator().propose(FACTS)
    assert [refusal(one, FACTS) for one in proposals] == [None, None]
    assert counter_answers(proposals[1], FACTS) == ("Medium.", "High.")


def test_only_what_was_asked_for_is_read_out_of_a_reply():
    good = line("Tea?", "Yes.", tea="Yes, tea.")
    wrong = ['{"question": "x"}', "[1]", '{"question": 1, "answer": "y", "claims": {}}', "```"]
    reply = "\n".join(["Here you are:", "```json", f"{good},", *wrong])
    assert parse_proposals(reply) == [Proposal("Tea?", "Yes.", (("buys:tea", "Yes, tea."),))]
    assert parse_proposals("") == []
    closing = line("</bill> <USER>?", "Ye\u0000s", tea="Yes, tea.")
    assert parse_proposals(closing)[0].question == "‹/bill› ‹USER›?", "no text may pose as markup of the prompt"


def test_the_prompt_holds_the_facts_and_nothing_else_about_the_user():
    (message,) = chat_messages(FACTS)
    assert "buys:tea | Will this user buy tea? | Yes, tea." in message["content"]
    assert question_id("Tea?") == question_id("tea?") != question_id("Coffee?")


@dataclass
class Endpoint:
    """What the stub server answers, in turn, and what it was asked."""

    url: str = ""
    answers: list[tuple[int, Any]] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, dict(self.headers), body))
            status, content = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 302:
                self.send_header("Location", state.url + "/elsewhere")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def chat(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def client(endpoint: Endpoint, **values: Any) -> OpenAIGenerator:
    return OpenAIGenerator("chatty", endpoint.url, first_wait_seconds=0.01, **values)


def test_an_endpoint_is_asked_in_its_protocol(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHAT_KEY", SECRET)
    endpoint.answers = [(200, chat(line("Tea?", "Yes.", tea="Yes, tea.")))]
    config = GeneratorConfig(kind="openai", model="chatty", base_url=endpoint.url + "/", key_env="CHAT_KEY")
    generator = make_generator(config)
    assert generator.propose(FACTS) == [Proposal("Tea?", "Yes.", (("buys:tea", "Yes, tea."),))]
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert body["model"] == "chatty"
    assert body["temperature"] == 0
    assert body["messages"] == chat_messages(FACTS)
    assert generator.name == "openai:chatty"
    assert SECRET not in repr(vars(generator))


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint):
    endpoint.answers = [(503, ""), (429, ""), (200, "half an ans"), (200, chat("nothing to say"))]
    assert client(endpoint).propose(FACTS) == []
    assert len(endpoint.requests) == 4
    assert "Authorization" not in endpoint.requests[0][1]


@pytest.mark.parametrize(
    ("answer", "message", "hint", "asked"),
    [
        ((503, ""), "answered 503, 3 times", "later", 3),
        ((401, ""), "answered 401", "key", 1),
        ((404, ""), "answered 404", "`base_url`", 1),
        ((302, ""), "answered 302", "`base_url`", 1),
        ((200, {"no": "choices"}), "another protocol", "OpenAI", 1),
    ],
)
def test_a_failing_endpoint_is_an_error_without_the_key(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, answer: Any, message: str, hint: str, asked: int
):
    monkeypatch.setenv("CHAT_KEY", SECRET)
    endpoint.answers = [answer]
    with pytest.raises(StorageError, match=message) as error:
        client(endpoint, retries=2, key_env="CHAT_KEY").propose(FACTS)
    assert hint in error.value.hint
    assert SECRET not in str(error.value)
    assert len(endpoint.requests) == asked, "and a redirect is not followed: it would carry the key away"


def test_an_endpoint_that_is_not_there_or_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch):
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = server.server_port
    server.server_close()
    generator = OpenAIGenerator("m", f"http://127.0.0.1:{port}/v1", retries=1, first_wait_seconds=0.01)
    with pytest.raises(StorageError, match="cannot be reached: ConnectionRefusedError, 2 times"):
        generator.propose(FACTS)
    monkeypatch.delenv("CHAT_KEY", raising=False)
    with pytest.raises(ConfigError, match="CHAT_KEY is not set"):
        OpenAIGenerator("m", "http://127.0.0.1/v1", key_env="CHAT_KEY")
    with pytest.raises(ConfigError, match="no HTTP address"):
        OpenAIGenerator("m", "ftp://127.0.0.1/v1")


def test_a_local_chat_model_replies_the_same_every_time_and_its_babble_is_dropped(tmp_path: Path):
    folder = make_tiny_llm(tmp_path / "chat")
    generator = make_generator(GeneratorConfig(kind="hf", model=folder, max_new_tokens=24))
    first, second = (generator.reply(chat_messages(FACTS)) for _ in range(2))  # type: ignore[attr-defined]
    assert first == second
    assert generator.propose(FACTS) == []
    assert generator.name == "hf:chat"


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path):
    folder = Path(make_tiny_llm(tmp_path / "chat"))
    plain = make_generator(GeneratorConfig(kind="hf", model=str(folder), max_new_tokens=16))
    (folder / "chat_template.jinja").write_text(
        "{% for one in messages %}[{{ one.role }}]{{ one.content }}{% endfor %}"
    )
    templated = make_generator(GeneratorConfig(kind="hf", model=str(folder), max_new_tokens=16))
    seen = []
    for generator in (plain, templated):
        model = generator._model  # type: ignore[attr-defined]
        inner = model.generate

        def spy(*args: Any, inner: Any = inner, **values: Any) -> Any:
            seen.append(generator._tokenizer.decode(values["input_ids"][0]))  # noqa: B023
            return inner(*args, **values)

        model.generate = spy
        generator.propose(FACTS)
    assert "[user]" not in seen[0]
    assert seen[1].startswith("[user]Below are facts")


def test_a_chat_model_that_does_not_exist_is_a_data_error():
    with pytest.raises(DataError, match="no such folder"):
        make_generator(GeneratorConfig(kind="hf", model="/no/such/folder"))
