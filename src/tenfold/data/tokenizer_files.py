"""The files of a Hugging Face checkpoint that define its tokenizer, read as transformers 5 reads them.

- `tokenizer.json` decides how text is split and which special tokens are put around it. `add_bos_token` and
  `add_eos_token` in `tokenizer_config.json` count only where there is no `tokenizer.json`.
- `tokenizer_config.json` names the special tokens; `special_tokens_map.json` and `added_tokens.json` count only if it
  has no `added_tokens_decoder`.
- `chat_template.jinja` and `additional_chat_templates/*.jinja`, if there are any, replace the templates in
  `tokenizer_config.json`.

It differs from transformers 5 in two points. The splitting rules of `tokenizer.json` are always used as they stand;
transformers writes its own for a few classes, Llama 2's among them. And `clean_up_tokenization_spaces` is not applied;
transformers ignores it for BPE only, which is what every supported model uses.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken

from tenfold.base.errors import TokenizerError

DEFAULT_TEMPLATE = "default"
"""Name of the template that a conversation uses, and of the only one where a checkpoint has one."""

_EXTRA_TOKENS = "extra_special_tokens"
_OLD_EXTRA_TOKENS = "additional_special_tokens"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a checkpoint says about its tokenizer outside the vocabulary.

    Attributes:
        special_tokens: by the name that chat templates know them by ("bos_token", ...).
        extra_special_tokens: special tokens without a name.
        added_tokens: tokens that must not be split, by id.
        chat_templates: Jinja sources by name.
        split_special_tokens: treat the special tokens' names in a text as plain text.
    """

    special_tokens: Mapping[str, AddedToken]
    extra_special_tokens: Sequence[AddedToken]
    added_tokens: Mapping[int, AddedToken]
    chat_templates: Mapping[str, str]
    split_special_tokens: bool


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read the tokenizer's small files in a checkpoint directory; each of them is optional.

    Raises:
        TokenizerError: a file is damaged.
    """
    config_path = path / "tokenizer_config.json"
    config = _read_json(config_path)
    config[_EXTRA_TOKENS] = config.get(_EXTRA_TOKENS) or config.get(_OLD_EXTRA_TOKENS)
    added: Mapping[str, Any] = config.get("added_tokens_decoder", {})
    if "added_tokens_decoder" not in config:
        tokens_map = _read_json(path / "special_tokens_map.json")
        extra = config[_EXTRA_TOKENS] or tokens_map.get(_EXTRA_TOKENS) or tokens_map.get(_OLD_EXTRA_TOKENS)
        config |= {**tokens_map, _EXTRA_TOKENS: extra}
        listed = _read_json(path / "added_tokens.json")
        added = {index: {"content": content, "normalized": True} for content, index in listed.items()}
    try:
        named, nameless = _special_tokens(config)
        return TokenizerFiles(
            special_tokens=named,
            extra_special_tokens=nameless,
            added_tokens={int(index): _added_token(token) for index, token in added.items()},
            chat_templates=_read_chat_templates(path, config.get("chat_template")),
            split_special_tokens=bool(config.get("split_special_tokens", False)),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TokenizerError(f"{config_path} or a file beside it has an unexpected form: {error!r}") from error


def load_backend(path: Path, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Load `tokenizer.json` and give it the special and added tokens that the other files declare.

    Raises:
        TokenizerError: the file is damaged.
    """
    vocabulary = path / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(vocabulary))
    except Exception as error:  # tokenizers raises a bare Exception, whatever the damage
        raise TokenizerError(
            f"{vocabulary} cannot be read ({error}); download it again, or upgrade tokenizers"
        ) from error
    backend.encode_special_tokens = files.split_special_tokens
    present = list(backend.get_added_tokens_decoder().values())
    known = {repr(token) for token in present}
    missing = [token for _, token in sorted(files.added_tokens.items()) if repr(token) not in known]
    contents = {token.content for token in (*present, *missing)}
    for token in (*files.special_tokens.values(), *files.extra_special_tokens):
        if token.content not in contents:
            contents.add(token.content)
            missing.append(token)
    names = {token.content for token in files.special_tokens.values()}
    for token in missing:
        token.special = token.special or token.content in names
    backend.add_tokens(missing)  # pyright: ignore[reportUnknownMemberType] - a bare list in its stub
    return backend


def convert_backend(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Have transformers convert a vocabulary of another format, such as `tokenizer.model` or `vocab.json`.

    Returns the vocabulary and the special tokens by name.

    Raises:
        TokenizerError: transformers is not installed, or cannot convert what is there.
    """
    try:
        import transformers  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TokenizerError(
            f"{path} has no tokenizer.json. To convert the vocabulary that it has: pip install 'tenfold[hf]'"
        ) from error
    try:
        auto_tokenizer = cast("Any", transformers.AutoTokenizer)  # pyright: ignore[reportUnknownMemberType]
        converted = auto_tokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # anything at all, depending on the tokenizer's class
        raise TokenizerError(f"{path} has no tokenizer.json, and transformers cannot convert it: {error}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TokenizerError(
            f"{path} has no tokenizer.json, and {type(converted).__name__} has no form that could be saved as one"
        )
    return backend, dict(converted.special_tokens_map)


def choose_chat_template(choice: str, templates: Mapping[str, str]) -> str:
    """The source that a user's choice of template means: a template's name, a file's path, or Jinja source itself.

    Raises:
        TokenizerError: it is none of these.
    """
    if choice in templates:
        return templates[choice]
    if "{%" in choice or "{{" in choice:
        return choice
    file = Path(choice)
    if file.is_file():
        return _read_text(file)
    names = f" (it has {sorted(templates)})" if templates else ""
    raise TokenizerError(
        f"the chat template {choice!r} is neither Jinja source, nor a file, nor a template of this checkpoint{names}"
    )


def _special_tokens(config: Mapping[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens with a name and those without. Any string under a key `..._token` is a named one."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    extra: Any = config[_EXTRA_TOKENS] or []
    if isinstance(extra, dict):
        named |= cast("dict[str, Any]", extra)
        extra = []
    return (
        {
            name: _added_token(token, special=True)
            for name, token in named.items()
            if token and not isinstance(token, bool)  # flags such as add_bos_token end like this too
        },
        [_added_token(token, special=True) for token in extra],
    )


def _added_token(value: Any, *, special: bool = False) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special)
    options = {key: option for key, option in value.items() if key not in ("content", "__type")}
    if special:
        options["special"] = True
    return AddedToken(value["content"], **options)


def _read_chat_templates(path: Path, declared: str | Sequence[Mapping[str, str]] | None) -> dict[str, str]:
    """Chat templates by name, from their own files or else from the configuration's `chat_template`."""
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    main = path / "chat_template.jinja"
    if main.is_file():
        files[DEFAULT_TEMPLATE] = main
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    if declared is None:
        return {}
    if isinstance(declared, str):
        return {DEFAULT_TEMPLATE: declared}
    return {template["name"]: template["template"] for template in declared}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return cast("dict[str, Any]", content)
