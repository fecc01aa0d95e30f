"""Claims about scripts/chat.py, on tiny models with random weights."""

import io
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from scripts import chat
from scripts.chat import ChatConfig, Conversation
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizers import build_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def conversation(model: str, **options) -> Conversation:
    return Conversation(ChatConfig(model=model, max_new_tokens=8, temperature=0, **options))


def test_lines_are_answered_until_the_input_ends(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat", "--model", model, "--max_new_tokens", "8"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/new\nand again\n"))
    asked: list[tuple[str, int]] = []
    say = Conversation.say

    def noted(talk: Conversation, line: str) -> str:
        asked.append((line, len(talk.turns)))
        return say(talk, line)

    monkeypatch.setattr(Conversation, "say", noted)
    chat.main()
    assert asked == [("hello", 0), ("and again", 0)]


def test_an_answer_is_printed_and_remembered_in_a_chat(model, capsys):
    talk = conversation(model)
    answer = talk.say("hello")
    assert capsys.readouterr().out == answer + "\n"
    assert talk.turns == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    talk.say("why?")
    assert len(talk.turns) == 4
    talk.forget()
    assert talk.say("hello") == answer


def test_plain_continues_each_line_as_the_model_does(model):
    talk = conversation(model, template="plain")
    answer = talk.say("a line")
    ids = talk.tokenizer("a line", add_special_tokens=False)["input_ids"]
    for _ in range(8):
        logits = talk.model(torch.tensor([ids])).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
        if ids[-1] in talk.eos_ids:
            break
    assert answer == talk.tokenizer.decode(ids[len("a line") :], skip_special_tokens=True)
    assert talk.turns == []


def test_a_folder_with_adapters_answers_as_the_merged_model(model, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, lora_alpha=64, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        build_tokenizer(eos="<eos>").save_pretrained(tmp_path / name)
    answers = [conversation(str(tmp_path / name)).say("hello") for name in ("adapter", "merged")]
    assert answers[0] == answers[1] != conversation(model).say("hello")


def test_a_reward_model_is_refused(model, tmp_path, monkeypatch, capsys):
    scorer = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(model, num_labels=1))
    scorer.save_pretrained(tmp_path)
    build_tokenizer(eos="<eos>").save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chat", "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as refused:
        chat.main()
    assert refused.value.code == 2
    assert "holds a reward model or critic" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused_for_chat(tmp_path):
    folder = Path(save_tiny_model(tmp_path))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="use --template plain"):
        conversation(str(folder))
    assert conversation(str(folder), template="plain").say("hello") is not None
