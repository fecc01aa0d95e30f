"""Text to token ids: where a prompt ends, which tokens are the response, what begins and ends a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from training.formats import DataError, Demonstration, Example, Message, Preference, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["plain", "chat"]
LossOn = Literal["response", "all"]


@dataclass(frozen=True)
class Rendering:
    """An example as text. The pieces of the prompt that the assistant said earlier in the chat are marked true."""

    prompt: tuple[tuple[str, bool], ...]
    responses: tuple[str, ...]

    @property
    def prompt_text(self) -> str:
        """The prompt in one piece."""
        return "".join(text for text, _ in self.prompt)


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and the responses to it: none for a prompt alone, one for a demonstration, more for a preference."""

    prompt_text: str
    prompt_ids: list[int]
    said_by_assistant: list[bool]
    """As long as `prompt_ids`: true on earlier turns of the assistant."""
    response_ids: tuple[list[int], ...]


def tokenize_examples(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[TokenizedExample]:
    """Tokenize many examples in one call of the tokenizer.

    Prompt and response are tokenized apart, so that the ids of a prompt are those it has alone, before a response
    is sampled. Every response ends with EOS. A prompt begins with BOS if the tokenizer itself puts one before a text
    (a chat template writes its own). An empty prompt gets BOS or, without one, EOS, to predict the first token from.
    """
    eos_id = _eos_id(tokenizer)
    renderings = [render(example, tokenizer, template) for example in examples]
    texts = [text for each in renderings for text in (*(text for text, _ in each.prompt), *each.responses)]
    ids = iter(_encode(texts, tokenizer))
    bos = [tokenizer.bos_token_id] if template == "plain" and _adds_bos(tokenizer) else []
    tokenized = []
    for rendering in renderings:
        prompt_ids, said_by_assistant = list(bos), [False] * len(bos)
        for _, is_assistant in rendering.prompt:
            piece = next(ids)
            prompt_ids += piece
            said_by_assistant += [is_assistant] * len(piece)
        if not prompt_ids:
            prompt_ids = [eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
            said_by_assistant = [False]
        responses = tuple(_ended(next(ids), eos_id) for _ in rendering.responses)
        tokenized.append(TokenizedExample(rendering.prompt_text, prompt_ids, said_by_assistant, responses))
    return tokenized


def tokenize_demonstration(
    example: Demonstration, tokenizer: "PreTrainedTokenizerBase", template: Template, loss_on: LossOn = "response"
) -> tuple[list[int], list[bool]]:
    """The ids of prompt and response, and the mask of the tokens to learn."""
    (tokenized,) = tokenize_examples([example], tokenizer, template)
    return demonstration_row(tokenized, loss_on)


def demonstration_row(tokenized: TokenizedExample, loss_on: LossOn) -> tuple[list[int], list[bool]]:
    """Join prompt and response. Learnt are all turns of the assistant, or all tokens that have one before them."""
    ids = tokenized.prompt_ids + tokenized.response_ids[0]
    mask = tokenized.said_by_assistant + [True] * len(tokenized.response_ids[0])
    if loss_on == "all":
        mask = [True] * len(ids)
    mask[0] = False
    return ids, mask


def preference_rows(tokenized: TokenizedExample) -> list[tuple[list[int], list[bool]]]:
    """The prompt joined to each response, best first; masks are true on that response alone."""
    before = [False] * len(tokenized.prompt_ids)
    return [(tokenized.prompt_ids + ids, before + [True] * len(ids)) for ids in tokenized.response_ids]


def tokenize_prompt(example: Example, tokenizer: "PreTrainedTokenizerBase", template: Template) -> list[int]:
    """The ids that a response to this example's prompt follows; in a chat they end with the generation prompt."""
    prompt = Prompt(example.prompt, example.source, {})
    (tokenized,) = tokenize_examples([prompt], tokenizer, template)
    return tokenized.prompt_ids


def render(example: Example, tokenizer: "PreTrainedTokenizerBase", template: Template) -> Rendering:
    """Write an example as the text that the model reads. In a chat, a prompt that is plain text is one user turn."""
    responses: tuple[str, ...] = ()
    if isinstance(example, Demonstration):
        responses = (example.response,)
    elif isinstance(example, Preference):
        responses = example.responses
    if template == "chat":
        turns: tuple[Message, ...] = (
            ({"role": "user", "content": example.prompt},) if isinstance(example.prompt, str) else example.prompt
        )
        return _render_chat(turns, responses, tokenizer, example.source)
    if not isinstance(example.prompt, str):
        raise DataError(f"{example.source}: a chat of several turns cannot be written as plain text: use template chat")
    return Rendering(((example.prompt, False),), responses)


def _render_chat(
    turns: tuple[Message, ...], responses: Sequence[str], tokenizer: "PreTrainedTokenizerBase", source: str
) -> Rendering:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use template plain, or a model made for chat")

    def rest(turns: Sequence[Message], written: str, is_prompt: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=is_prompt)
        except TemplateError as error:
            raise DataError(f"{source}: the chat template refuses these turns: {error}") from error
        if not text.startswith(written):
            raise DataError(
                f"{source}: the chat template writes the first turns differently once more turns follow, so prompt "
                "and response cannot be told apart: use single-turn data, another template, or template plain"
            )
        return text[len(written) :]

    def response_after(turns: Sequence[Message], response: str, written: str) -> str:
        turn: Message = {"role": "assistant", "content": response}
        return _cut_after(tokenizer.eos_token, rest([*turns, turn], written, is_prompt=False))

    pieces: list[tuple[str, bool]] = []
    written = ""
    for end, turn in enumerate(turns):
        if turn["role"] == "assistant":
            prompt = rest(turns[:end], written, is_prompt=True)
            response = response_after(turns[:end], turn["content"], written + prompt)
            pieces += [(prompt, False), (response, True)]
            written += prompt + response
    prompt = rest(turns, written, is_prompt=True)
    written += prompt
    responses = tuple(response_after(turns, response, written) for response in responses)
    return Rendering((*pieces, (prompt, False)), responses)


def _cut_after(eos: str, turn: str) -> str:
    """Drop the space that templates write after the end of a turn: generation stops before it."""
    before, found, after = turn.rpartition(eos)
    return before + found if found and not after.strip() else turn


def _ended(ids: list[int], eos_id: int) -> list[int]:
    return ids if ids[-1:] == [eos_id] else [*ids, eos_id]


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    # Not verbose: lengths are checked by whoever knows the limits, with file and line.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _eos_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no response could end: set its eos_token")
    return int(tokenizer.eos_token_id)


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts BOS before a text. Having a BOS token is not enough: GPT-2 has one and does not."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer("a")["input_ids"][: len(alone) + 1] == [tokenizer.bos_token_id, *alone]
