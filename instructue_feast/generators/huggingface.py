"""Any Hugging Face chat model, greedy, on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructue_feast.model.artifacts import local_folder, quiet, require_safetensors
from instructue_feast.model.bundled import resolve
from instructue_feast.user_qa.proposals import Fact, Proposal, chat_messages, parse_proposals


class HuggingFaceGenerator:
    """A causal LM with a chat template; one without gets the text of the messages alone.

    Args:
        model: Folder, Hugging Face name, or bundled alias.
        max_new_tokens: Upper bound of one reply.

    Raises:
        DataError: There is no such model.
        UnsafeArtifactError: It has no safetensors weights.
    """

    parallel = 1

    def __init__(self, model: str, *, max_new_tokens: int = 512) -> None:
        self.name = f"hf:{model.rstrip('/').rsplit('/', 1)[-1]}"
        folder = local_folder(resolve(model), kind="chat model")
        require_safetensors(folder, kind="chat model")
        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._max_new_tokens = max_new_tokens

    def propose(self, facts: Sequence[Fact]) -> list[Proposal]:
        """Asks the model; a reply in another form than asked for gives no proposals."""
        return parse_proposals(self.reply(chat_messages(facts)))

    def reply(self, messages: list[dict[str, str]]) -> str:
        """The model's greedy answer to a chat."""
        if self._tokenizer.chat_template:
            prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt = "\n".join(one["content"] for one in messages) + "\n"
        inputs = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            )
        return str(self._tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
