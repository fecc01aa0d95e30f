"""Talks with a trained model in the terminal: `python -m scripts.chat --model FOLDER [--template plain|chat]`.

With template chat the model remembers what was said, until a line /new. With template plain it continues each line on
its own. Ctrl-D ends.
"""

import contextlib
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from training import distributed
from training.config import ModelConfig
from training.config_files import load_config
from training.formats import Message, Prompt
from training.generation.interface import SamplingConfig
from training.models import eos_token_ids, is_reward_model, load_causal_lm, load_tokenizer
from training.tokenization import tokenize_prompt
from training.untrusted import check_versions


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A conversation with a causal language model in the terminal."""

    model: str
    """Hub name or folder, as step1_sft/final or step3_ppo/final/actor; a folder with LoRA adapters will do."""
    template: Literal["plain", "chat"] = "chat"
    """How a line becomes text; choose what the model was trained with. plain continues the line as it stands."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 1.0
    """1 draws from the model's own distribution, as PPO does; smaller is more predictable; 0 takes the likeliest."""
    seed: int = 1
    """Seed of the sampling: the same lines get the same answers."""

    def __post_init__(self) -> None:
        SamplingConfig(max_new_tokens=self.max_new_tokens, temperature=self.temperature)


class Conversation:
    """A model and what was said so far."""

    def __init__(self, config: ChatConfig) -> None:
        """
        Raises:
            ValueError: the folder holds a reward model, or no chat template where one is needed.
        """
        source = ModelConfig(path=config.model)
        self.config = config
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(source)
        if is_reward_model(source):
            raise ValueError(
                f"{config.model} holds a reward model or critic, which scores text and writes none: "
                "give the final folder of step 1, or final/actor of step 3"
            )
        if config.template == "chat" and not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {config.model} has no chat template: use --template plain")
        device = distributed.device()
        model: Any = load_causal_lm(source, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.model = model.to(device).eval()
        self.eos_ids = eos_token_ids(source, self.tokenizer)
        self.turns: list[Message] = []

    def say(self, line: str) -> str:
        """Prints the model's answer to `line` as it comes, and returns it."""
        self.turns.append({"role": "user", "content": line})
        ids = torch.tensor([self._prompt_ids()], device=self.model.device)
        sampled = {"temperature": self.config.temperature, "top_k": 0, "top_p": 1.0}
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=self.config.temperature > 0,
            max_new_tokens=self.config.max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **(sampled if self.config.temperature > 0 else {}),
        )
        answer = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        self.turns.append({"role": "assistant", "content": answer})
        if self.config.template == "plain":
            self.forget()
        return answer

    def forget(self) -> None:
        """Starts anew."""
        self.turns.clear()

    def _prompt_ids(self) -> list[int]:
        if self.config.template == "plain":
            return tokenize_prompt(Prompt(self.turns[-1]["content"], "the terminal", {}), self.tokenizer, "plain")
        text = self.tokenizer.apply_chat_template(list(self.turns), tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def main() -> None:
    config = load_config(ChatConfig)
    try:
        check_versions()
        conversation = Conversation(config)
    except (OSError, ValueError) as error:  # OSError is how transformers says that there is no such model
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    torch.manual_seed(config.seed)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line == "/new":
                conversation.forget()
            elif line:
                conversation.say(line)


if __name__ == "__main__":
    main()
