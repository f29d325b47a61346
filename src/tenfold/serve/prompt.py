"""From a conversation to the prompt's token ids."""

from collections.abc import Sequence
from typing import Any, Protocol

from tenfold.base.errors import RequestError
from tenfold.serve.protocol import ChatMessage
from tenfold.serve.state import ServerState

_RESERVED_VARIABLES = frozenset(
    {"self", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"}
)


class TemplateRequest(Protocol):
    """The fields of a request that say how its conversation becomes a prompt."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    chat_template_kwargs: dict[str, Any] | None


async def encode_messages(state: ServerState, messages: Sequence[ChatMessage], request: TemplateRequest) -> list[int]:
    """Token ids of a conversation. The template writes special tokens itself, so none are added unless asked for.

    Raises:
        RequestError: a template variable has a reserved name, or the conversation is far too long.
        TokenizerError: there is no chat template, or it refuses the conversation.
    """
    variables = request.chat_template_kwargs or {}
    if taken := sorted(_RESERVED_VARIABLES & variables.keys()):
        raise RequestError(
            f"chat_template_kwargs must not set {', '.join(taken)}; a field does, or the template itself",
            param="chat_template_kwargs",
        )
    continued = bool(request.continue_final_message)
    # One of the two is on by default, so asking for the other is enough.
    generation = not continued if request.add_generation_prompt is None else request.add_generation_prompt
    text = await state.run_text(
        state.tokenizer.apply_chat_template,
        [message.for_template() for message in messages],
        add_generation_prompt=generation,
        continue_final_message=continued,
        **variables,
    )
    encoded = await state.encode([text], add_special_tokens=bool(request.add_special_tokens), param="messages")
    return encoded[0]
