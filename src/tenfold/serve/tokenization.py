"""/tokenize and /detokenize, in vLLM's shapes."""

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from tenfold.serve.body import read_body
from tenfold.serve.prompt import encode_messages
from tenfold.serve.protocol import DetokenizeRequest, TokenizeRequest, parse_body
from tenfold.serve.state import ServerState


async def tokenize(state: ServerState, http: Request) -> Response:
    """The token ids of a prompt, which gets special tokens by default, or of a conversation, whose template has them.

    Raises:
        TenfoldError: see `errors.as_http_error`.
    """
    request = parse_body(TokenizeRequest, await read_body(http, state.config.max_request_bytes))
    state.require_model(request.model)
    if request.messages is not None:
        ids = await encode_messages(state, request.messages, request)
    else:
        add_special_tokens = request.add_special_tokens is not False
        encoded = await state.encode([request.prompt or ""], add_special_tokens=add_special_tokens, param="prompt")
        ids = encoded[0]
    info = state.engine.info
    response: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": None if info is None else info.max_model_len,
        "tokens": ids,
        "token_strs": [state.tokenizer.piece(i) for i in ids] if request.return_token_strs else None,
    }
    return Response(orjson.dumps(response), media_type="application/json")


async def detokenize(state: ServerState, http: Request) -> Response:
    """The text of token ids, special tokens included.

    Raises:
        TenfoldError: see `errors.as_http_error`.
    """
    request = parse_body(DetokenizeRequest, await read_body(http, state.config.max_request_bytes))
    state.require_model(request.model)
    text = await state.run_text(state.tokenizer.decode, request.tokens, skip_special_tokens=False)
    return Response(orjson.dumps({"prompt": text}), media_type="application/json")
