"""What of a conversation a model learns to write: the assistant's messages, by the model's own chat template.

Where a template has `{% generation %}` blocks, these are it. Where it has none, the conversation is rendered up to
each answer: what comes between the end of the generation prompt and the end of the message is the answer, with the
tokens that end it. A template that renders a conversation otherwise than its beginning (one that drops the reasoning of
earlier answers, say) leaves that open, and is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.base.errors import DataError
from tenfold.data.chat import ANSWER_BEGINS, ANSWER_ENDS
from tenfold.data.packing import Example
from tenfold.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int]


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], length: int) -> list[Example]:
    """A conversation as one example in which the assistant's tokens are predicted; none if it has nothing to learn.

    Answers whose message has "weight": 0 are not learned, as in OpenAI's format. What does not fit into `length` tokens
    is cut off at the end.

    Raises:
        DataError: if there is no answer, or the template does not say what the assistant writes.
        TokenizerError: if the template refuses the messages, or the vocabulary cannot spell them.
    """
    text, spans = find_answers(tokenizer, messages)
    ids, starts = tokenizer.encode_at(text)
    learned = [any(begin <= at < end for begin, end in spans) for at in starts]
    return _cut(ids, learned, length)


def encode_completion(tokenizer: Tokenizer, prompt: str, completion: str, length: int) -> list[Example]:
    """A prompt and the completion that is learned, with the token that ends a text after it; cut as conversations.

    Raises TokenizerError if the vocabulary cannot spell them.
    """
    before = tokenizer.encode(prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    after = [*tokenizer.encode(completion, add_special_tokens=False), *end]
    return _cut([*before, *after], [False] * len(before) + [True] * len(after), length)


def _cut(ids: list[int], learned: list[bool], length: int) -> list[Example]:
    ids, learned = ids[:length], learned[:length]
    return [(ids, learned)] if any(learned[1:]) else []


def find_answers(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """A conversation's text, and where in it the answers are that shall be learned.

    Raises DataError and TokenizerError as `encode_conversation`.
    """
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise DataError("the conversation has no message of the assistant, so there is nothing to learn from it")
    if tokenizer.marks_answers:
        text, spans = _marked(tokenizer, messages)
        if len(spans) != len(answers) and any(messages[i].get("weight") == 0 for i in answers):
            raise DataError(
                f"the chat template marks {len(spans)} answers of {len(answers)}, so it is open which of them the "
                "weight 0 means; remove the weights"
            )
    else:
        text = _render(tokenizer, messages)
        spans = [_between(tokenizer, messages, i, text) for i in answers]
    weights = [messages[i].get("weight", 1) for i in answers] if len(spans) == len(answers) else [1] * len(spans)
    return text, [span for span, weight in zip(spans, weights, strict=True) if weight != 0]


def _render(tokenizer: Tokenizer, messages: Sequence[Message], *, answering: bool = False, marked: bool = False) -> str:
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return tokenizer.apply_chat_template(plain, add_generation_prompt=answering, mark_answers=marked)


def _marked(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    marked = _render(tokenizer, messages, marked=True)
    pieces: list[str] = []
    spans: list[Span] = []
    at = 0
    for i, piece in enumerate(marked.replace(ANSWER_ENDS, ANSWER_BEGINS).split(ANSWER_BEGINS)):
        pieces.append(piece)
        if i % 2:
            spans.append((at, at + len(piece)))
        at += len(piece)
    text = "".join(pieces)
    if text != _render(tokenizer, messages):
        raise DataError(
            f"the conversation has the characters {ANSWER_BEGINS!r} or {ANSWER_ENDS!r}, or its template changes what "
            "{% generation %} encloses; remove them"
        )
    return text, spans


def _between(tokenizer: Tokenizer, messages: Sequence[Message], index: int, text: str) -> Span:
    """Where an answer is in the text of the whole conversation."""
    if index == 0:
        raise DataError("the conversation begins with a message of the assistant; put what it answers before it")
    before = _render(tokenizer, messages[:index], answering=True)
    after = _render(tokenizer, messages[: index + 1])
    if not (text.startswith(after) and after.startswith(before)):
        raise DataError(
            f"the chat template renders message {index + 1} otherwise when more messages follow, or after another "
            "generation prompt, so what of it the assistant writes is open; put {% generation %} and "
            "{% endgeneration %} around that in the template, or end the conversation there"
        )
    return len(before), len(after)
