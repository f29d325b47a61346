"""Chat templates: the Jinja that a checkpoint carries to turn a conversation into its prompt.

Templates are code from whoever published the checkpoint, so they run in Jinja's immutable sandbox (no access to
Python's internals, and nothing that they are given can be changed), and within bounds:

- Time: every turn of a loop and every call checks the clock.
- Size, in characters or items: of the prompt, and of each value that an operator or a call produces.

Not bounded here are the time and memory of one built-in function while it runs (`"x"|center(10**9)`), and text that is
collected in a macro or a `set` block before it is written. For checkpoints that you do not trust at all, limit the
memory of the process.
"""

import json
import time
import traceback
from collections.abc import Mapping, Sequence, Sized
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tenfold.base.errors import TokenizerError

MAX_CHARS = 1 << 24
"""Default bound on a prompt, in characters: several times the longest context of any model."""

MAX_SECONDS = 10.0
"""Default bound on the time to render one prompt, in seconds. A usual template takes a millisecond."""

_MAX_POWER_BITS = 4096
_RESERVED = ("messages", "tools", "add_generation_prompt")
_MAPPING_FILTERS = ("map", "select", "selectattr", "reject", "rejectattr")

# Follows the final message's text in the rendering, to find its end. The space at its end shows whether the template
# trims the message.
_CONTINUATION = "<|continue-final-message|> "

# None of these is an identifier, so no template can name them.
_DEADLINE = "deadline!"
_TICK = "tick!"
_BOUNDED = "bounded!"
_MARK = "mark!"

ANSWER_BEGINS, ANSWER_ENDS = "\ufdd0", "\ufdd1"
"""Stand around what `{% generation %}` encloses, if asked for: no text has them (Unicode, section 23.7)."""


class ChatTemplate:
    """One compiled chat template. Never changes: may render in several threads at once.

    Args:
        source: Jinja source.
        max_chars: bound on the prompt and on each value inside the template, in characters or items.
        max_seconds: bound on the time of one `render`.

    Attributes:
        handles_parts: the template itself goes through message contents that are lists of parts.
        marks_answers: it says by `{% generation %}` what the model writes.

    Raises:
        TokenizerError: the source is not valid Jinja.
    """

    def __init__(self, source: str, *, max_chars: int = MAX_CHARS, max_seconds: float = MAX_SECONDS) -> None:
        self._max_chars = max_chars
        self._max_seconds = max_seconds
        environment = _ChatEnvironment(max_chars)
        try:
            tree = environment.parse(source)
            self.handles_parts = _iterates_content(tree)
            self.marks_answers = any(found.name == _MARK for found in tree.find_all(nodes.Filter))
            _Instrumentation().visit(tree)
            tree.set_environment(environment)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template has a syntax error in line {error.lineno}: {error.message}; correct it, or give "
                "another template"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        mark_answers: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation.

        The template sees plain copies of the messages. Fields that are None are left out. Contents that are lists of
        text parts stay lists if the template handles those, and are joined with newlines otherwise. Arguments of
        tool calls that are JSON text become objects, which is what templates expect.

        Args:
            messages: at least one, each with a role, in the shape of OpenAI's chat API.
            add_generation_prompt: end with the beginning of an assistant message.
            continue_final_message: end inside the last message, right after its content; excludes the former.
            mark_answers: put `ANSWER_BEGINS` and `ANSWER_ENDS` around what the template says that the model writes.
            tools: JSON schemas of the tools that the model may call; none is the same as None.
            variables: further variables, such as the special tokens. JSON values only.

        Raises:
            TokenizerError: a message is malformed or is not text; or the template refuses the conversation (the error
                has the template's own words), fails, or exceeds its bounds.
        """
        if add_generation_prompt and continue_final_message:
            raise TokenizerError(
                "add_generation_prompt begins a new message and continue_final_message continues the last one; "
                "set one of them to false"
            )
        if taken := sorted(set(_RESERVED) & set(variables or {})):
            raise TokenizerError(f"template variables must not be called {taken}, which hold the conversation")
        if not messages:
            raise TokenizerError("the conversation is empty; send at least one message")
        try:
            prepared = [_prepare(message, keep_parts=self.handles_parts) for message in messages]
            context = {"documents": None, **_plain(variables or {}), "tools": _plain(tools or None)}
        except RecursionError as error:
            raise TokenizerError("the messages, tools or variables are nested too deeply; flatten them") from error
        if continue_final_message:
            _mark_end(prepared[-1])
        context |= {"messages": prepared, "add_generation_prompt": add_generation_prompt, _MARK: mark_answers}
        prompt = self._generate(context)
        return _cut_at_mark(prompt) if continue_final_message else prompt

    def _generate(self, context: dict[str, Any]) -> str:
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate({**context, _DEADLINE: _Deadline(self._max_seconds)}):
                length += len(part)
                if length > self._max_chars:
                    _raise_too_large(self._max_chars)
                parts.append(part)
        except TokenizerError:
            raise
        except _RefusalError as error:
            raise TokenizerError(f"the chat template refused the conversation: {error.message}") from error
        except Exception as error:  # a template can fail in any way that an expression can
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)
            raise TokenizerError(
                f"the chat template failed in line {line} with {type(error).__name__}: {error}; "
                "check that the messages have the fields that this model expects"
            ) from error
        return "".join(parts)


class _RefusalError(TemplateError):
    """The template called `raise_exception`."""


class _Deadline:
    """The time by which one rendering must be done."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._at:
            raise TokenizerError(
                f"the chat template took longer than {self._seconds:g} s; "
                "shorten the conversation or use another template"
            )


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with the bounds of this module and what Hugging Face's templates expect to find."""

    filters: dict[str, Any]
    globals: dict[str, Any]
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, max_chars: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._max_chars = max_chars
        self.filters.update({"tojson": _to_json, _TICK: _tick, _BOUNDED: self._bounded, _MARK: _mark})
        self.globals.update({"raise_exception": _raise_exception, "strftime_now": _format_now})
        # It writes as much placeholder text as it is asked for, in one call.
        del self.globals["lipsum"]

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        context[_DEADLINE].check()
        return self._bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and _size(left) * _count(right) + _count(left) * _size(right) > self._max_chars:
            _raise_too_large(self._max_chars)
        is_power = operator == "**" and isinstance(left, int) and isinstance(right, int)
        if is_power and left.bit_length() * right > _MAX_POWER_BITS:
            raise TokenizerError(f"the chat template raises {left} to the power {right}, which is too large")
        return self._bounded(super().call_binop(context, operator, left, right))

    def _bounded(self, value: Any) -> Any:
        if _size(value) > self._max_chars:
            _raise_too_large(self._max_chars)
        return value


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what a trainer learns from: renders its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([_filter(nodes.Const(mark), _MARK, lineno)], lineno=lineno)
            for mark in (ANSWER_BEGINS, ANSWER_ENDS)
        )
        return nodes.Scope([begin, *body, end], lineno=lineno)


class _Instrumentation(NodeTransformer):
    """Adds the checks that Jinja has no hook for: of the clock in loops, and of the size of what `~` joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(True), _TICK, node.lineno), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(True), _TICK, node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(node, _BOUNDED, node.lineno)


def _filter(node: nodes.Expr, name: str, lineno: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=lineno)


@pass_context
def _tick(context: Context, value: Any) -> Any:
    """Check the clock; the value passes through."""
    context[_DEADLINE].check()
    return value


@pass_context
def _mark(context: Context, value: str) -> str:
    """The mark, where it is wanted."""
    return value if context[_MARK] else ""


def _size(value: Any) -> int:
    """Number of items of a text or container, 0 for anything else."""
    return len(cast("Sized", value)) if isinstance(value, str | list | tuple | dict) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _raise_too_large(max_chars: int) -> NoReturn:
    raise TokenizerError(
        f"the chat template produced more than {max_chars} characters; shorten the conversation or use another template"
    )


def _raise_exception(message: str) -> NoReturn:
    raise _RefusalError(str(message))


def _format_now(format_string: str) -> str:
    return datetime.now().strftime(format_string)  # local time, as transformers has it


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own `tojson` escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether a template goes through the parts of a message's content.

    That is, whether some loop or mapping filter runs over an expression that is a content: a field or variable of that
    name, or a variable that was set to one.
    """
    names = {"content"}

    def is_content(node: nodes.Node | None) -> bool:
        match node:
            case nodes.Name():
                return node.name in names
            case nodes.Getattr():
                return node.attr == "content"
            case nodes.Getitem():
                return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
            case nodes.Filter():
                return is_content(node.node)
            case nodes.CondExpr():
                return is_content(node.expr1) or is_content(node.expr2)
            case _:
                return False

    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            names.add(assignment.target.name)
    if any(is_content(loop.iter) for loop in tree.find_all(nodes.For)):
        return True
    return any(node.name in _MAPPING_FILTERS and is_content(node.node) for node in tree.find_all(nodes.Filter))


def _prepare(message: Any, *, keep_parts: bool) -> dict[str, Any]:
    """A plain copy of a message as templates expect it; see `ChatTemplate.render`."""
    plain = _object(_plain(message))
    if not isinstance(plain.get("role"), str):
        raise TokenizerError(f"each message must be an object with a role, and one is {message!r:.200}")
    prepared = {key: value for key, value in plain.items() if value is not None}
    if isinstance(prepared.get("content"), list):
        parts = [_text_part(part) for part in prepared["content"]]
        prepared["content"] = parts if keep_parts else "\n".join(part["text"] for part in parts)
    calls = prepared.get("tool_calls")
    for call in cast("list[Any]", calls) if isinstance(calls, list) else ():
        function = _object(_object(call).get("function"))
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _parse_arguments(function["arguments"])
    return prepared


def _object(value: Any) -> dict[str, Any]:
    """The value if it is an object (the same one, to change it in place), and an empty one otherwise."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _parse_arguments(text: str) -> Any:
    """The object that a tool call's arguments spell, or the text itself if they spell none."""
    try:
        arguments = json.loads(text or "{}")
    except json.JSONDecodeError:
        return text
    return cast("dict[str, Any]", arguments) if isinstance(arguments, dict) else text


def _text_part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    part = _object(part)
    kind = part.get("type")
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "text" and isinstance(part.get("text"), str):
        return part
    raise TokenizerError(
        f"this model reads text only, and a message's content has a part of type {kind!r}; "
        'send parts like {"type": "text", "text": "..."}'
    )


def _plain(value: Any) -> Any:
    """A deep copy in plain JSON types, so that a template gets no object with methods that do more than hold data."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
        case list() | tuple():
            return [_plain(item) for item in cast("Sequence[Any]", value)]
        case _:
            raise TokenizerError(
                f"messages, tools and template variables must be JSON values, and one is a {type(value).__name__}"
            )


def _mark_end(message: dict[str, Any]) -> None:
    """Put the continuation mark at the end of the message's text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUATION
    elif content and isinstance(content, list):
        cast("list[dict[str, Any]]", content)[-1]["text"] += _CONTINUATION
    else:
        raise TokenizerError("continue_final_message needs a final message with text to continue; add a content to it")


def _cut_at_mark(prompt: str) -> str:
    """The prompt up to the continuation mark, without the space before it if the template trimmed the message."""
    end = prompt.rfind(_CONTINUATION.rstrip())
    if end < 0:
        raise TokenizerError(
            "the chat template does not write the final message as it is, so it cannot be continued; "
            "set continue_final_message to false"
        )
    trimmed = not prompt.startswith(_CONTINUATION, end)
    return prompt[:end].rstrip() if trimmed else prompt[:end]
