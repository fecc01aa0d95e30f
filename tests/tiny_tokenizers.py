"""A real tokenizer built in code, whose ids one can write down by hand: five special tokens, then one id per byte."""

from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, IM_START, IM_END = range(5)
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>")
NUM_SPECIAL = len(SPECIAL_TOKENS)
VOCAB_SIZE = NUM_SPECIAL + 256

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(
    pad: Literal["own", "eos"] | None = "own",
    *,
    eos: Literal["<eos>", "<|im_end|>"] = "<|im_end|>",
    has_bos: bool = True,
    adds_bos: bool = False,
    chat_template: str | None = CHATML,
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer without merges.

    Args:
        pad: its own token, the EOS token, or none.
        eos: "<|im_end|>" ends the turns of the chat template, as in instruct models; "<eos>" does not, as in base ones.
        has_bos: whether there is a BOS token.
        adds_bos: whether the tokenizer puts it before every text, as Llama's does and GPT-2's does not.
        chat_template: ChatML unless told otherwise.
    """
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {character: NUM_SPECIAL + byte for byte, character in enumerate(_byte_characters())}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>" if has_bos else None,
        eos_token=eos,
        pad_token={"own": "<pad>", "eos": eos, None: None}[pad],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def byte_ids(text: str) -> list[int]:
    """The ids of a text without special tokens."""
    return [NUM_SPECIAL + byte for byte in text.encode()]


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2's encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
