"""Any endpoint that speaks OpenAI's chat protocol: a vendor's, or vLLM and the like in one's own network."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from instructue_feast.errors import ConfigError, StorageError
from instructue_feast.user_qa.proposals import Fact, Proposal, chat_messages, parse_proposals

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_SECONDS = 30.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Refuses, so that the redirect becomes an HTTPError."""
        return


_OPENER = urllib.request.build_opener(_NoRedirects)


class OpenAIGenerator:
    """A chat model behind HTTP. The key is read from the environment and never shown.

    Args:
        model: Name of the model.
        base_url: Address up to and with `/v1`.
        key_env: Environment variable with the key; `None` sends none.
        max_new_tokens: Upper bound of one reply.
        timeout_seconds: How long one reply may take.
        retries: How often a busy or failing endpoint is asked again.
        first_wait_seconds: Wait before the first retry, doubled each time, unless the endpoint asks for another.

    Raises:
        ConfigError: The environment variable is not set, or the address is no HTTP address.
    """

    parallel = 4

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key_env: str | None = None,
        max_new_tokens: int = 512,
        timeout_seconds: float = 60.0,
        retries: int = 3,
        first_wait_seconds: float = 1.0,
    ) -> None:
        self.name = f"openai:{model}"
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url {base_url!r} is no HTTP address", "write it as https://host/v1")
        if key_env is not None and not os.environ.get(key_env):
            raise ConfigError(f"environment variable {key_env} is not set", "put the endpoint's key there")
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model, self._key_env, self._max_new_tokens = model, key_env, max_new_tokens
        self._timeout, self._retries, self._first_wait = timeout_seconds, retries, first_wait_seconds

    def propose(self, facts: Sequence[Fact]) -> list[Proposal]:
        """Asks the model; a reply in another form than asked for gives no proposals.

        Raises:
            StorageError: The endpoint refuses, or cannot be reached after all retries.
        """
        return parse_proposals(self.reply(chat_messages(facts)))

    def reply(self, messages: list[dict[str, str]]) -> str:
        """The model's answer to a chat, at temperature 0."""
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self._max_new_tokens,
            "temperature": 0,
        }
        document = self._post(json.dumps(body).encode())
        try:
            return str(document["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise StorageError(f"{self._url} answered in another protocol", "is it an OpenAI endpoint?") from None

    def _post(self, data: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self._key_env]}"
        why = ""
        for attempt in range(self._retries + 1):
            request = urllib.request.Request(self._url, data, headers)  # noqa: S310 - the scheme was checked
            wait = min(self._first_wait * 2**attempt, _LONGEST_WAIT_SECONDS)
            try:
                with _OPENER.open(request, timeout=self._timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                why = f"answered {error.code}"
                if error.code not in _BUSY:
                    hint = "check the key" if error.code in (401, 403) else "check `base_url` and `model`"
                    raise StorageError(f"{self._url} {why}", hint) from None
                wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                why = f"cannot be reached: {type(getattr(error, 'reason', error)).__name__}"
            except ValueError:
                why = "answered something that is not JSON"
            if attempt < self._retries:
                time.sleep(wait)
        raise StorageError(f"{self._url} {why}, {self._retries + 1} times", "try later, or check `base_url`") from None


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        return min(float(header or ""), _LONGEST_WAIT_SECONDS)
    except ValueError:
        return otherwise
