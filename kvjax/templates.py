"""Chat templates: from messages to the text that a model was tuned on, in jinja2's sandbox.

`pip install 'kvjax[chat]'` adds the library. What a template may use is what Hugging Face Transformers gives it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from kvjax.checkpoint.folder import read_json_if_there
from kvjax.checkpoint.reader import show
from kvjax.errors import CheckpointError, InputError

FILE = "chat_template.jinja"
TOKENS = ("bos_token", "eos_token", "eot_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that tokenizer_config.json may name; a template sees them under these names."""

LONGEST = 1 << 24
"""Characters that a template may make."""

SAFE = (3, 1, 6)
"""The first jinja2 without a known way out of its sandbox."""


@dataclasses.dataclass(frozen=True)
class Template:
    """What turns messages into a text.

    A template is a program by whoever made the folder, and runs in jinja2's immutable sandbox: it reaches neither files
    nor modules nor attributes that begin with an underscore, and a text of more than 2²⁴ characters is an error. Time
    and memory are not bounded: loops within loops may take for ever, and one expression may make a huge string. Take a
    stranger's template as you would take a program.

    Args:
        text: the template; None where a folder has none.
        tokens: special tokens by name, such as `bos_token`.
        where: it was found, for messages.
    """

    text: str | None = None
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: str = "template"

    def render(
        self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True, now: datetime | None = None
    ) -> str:
        """The text of a conversation. Special tokens stand in it as text, the one that begins it too: encode it with
        `Tokenizer.encode_bare`. What a message contains is put in as it is, names of special tokens too.

        Args:
            messages: `{"role": …, "content": …}`, both str; usual roles are "system", "user" and "assistant".
            generation_prompt: the text ends where an answer begins.
            now: what `strftime_now` formats; None is the present.

        Raises:
            InputError: there is no template, messages are none, or the template refuses them or fails.
            CheckpointError: the template is no jinja2, or the library is not installed.
        """
        template, made, size = self.check(), [], 0
        values = {
            **self.tokens,
            "messages": _checked(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            "strftime_now": (datetime.now() if now is None else now).strftime,
        }
        try:
            for piece in template.generate(values):
                made.append(piece)
                size += len(piece)
                if size > LONGEST:
                    raise InputError(f"the text has more than {LONGEST:,} characters")
        except InputError as error:
            raise InputError(f"{self.where}: the chat template cannot take these messages: {error}") from error
        except Exception as error:  # whatever a stranger's program comes to
            reason = f"{type(error).__name__}: {_one_line(error)}"
            raise InputError(f"{self.where}: the chat template failed: {reason}") from error
        return "".join(made)

    def check(self) -> Any:
        """The template, compiled.

        Raises:
            InputError, CheckpointError: as `render`.
        """
        if self.text is None:
            raise InputError(f"{self.where}: has no chat template")
        try:
            return _compiled(self.text)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from error


def read_template(folder: Path) -> Template:
    """The chat template of a Hugging Face folder: chat_template.jinja, or what tokenizer_config.json has.

    Raises:
        CheckpointError: a damaged file, a template that is no text, or several of which none is the default.
    """
    path = folder / "tokenizer_config.json"
    values = read_json_if_there(path)
    tokens = {}
    for key in TOKENS:
        token = values.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[key] = token
    if (folder / FILE).exists():
        return Template(read_text(folder / FILE), tokens, str(folder / FILE))
    found = values.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        if "default" not in named:
            raise CheckpointError(f"{path}: chat_template has {show(list(named))}, and no default")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{path}: chat_template must be text, not {show(found)}")
    return Template(found, tokens, str(folder if found is None else path))


def read_text(path: Path) -> str:
    """A file of UTF-8 text.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _checked(messages: Any) -> list[dict[str, str]]:
    made = []
    for i, message in enumerate(messages):
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"messages: {i} must have role and content, both str, not {show(message)}")
        made.append({"role": str(role), "content": str(content)})
    if not made:
        raise InputError("messages: there is none")
    return made


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    jinja2, environment = _environment()
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"line {error.lineno} of the chat template: {_one_line(error)}") from error
    except Exception as error:  # what it was made into is no Python: a `break` outside of loops, a thousand brackets
        raise CheckpointError(f"the chat template: {type(error).__name__}: {_one_line(error)}") from error


def _library() -> Any:
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise CheckpointError("is rendered by a library that is not installed: pip install 'kvjax[chat]'") from None
    version = metadata.version("jinja2")
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < SAFE:
        least = ".".join(map(str, SAFE))
        raise CheckpointError(f"jinja2 {version} has known ways out of its sandbox, {least} has none: upgrade it")
    return jinja2


@functools.cache
def _environment() -> tuple[Any, Any]:
    jinja2 = _library()
    extension: Any = jinja2.ext.Extension
    namespace: Any = jinja2.utils.Namespace

    class Generation(extension):
        """`{% generation %}`, which marks what the model writes: its body as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Names(namespace):
        """A namespace that keeps no name which Python might look up by itself."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace keeps no name such as {name!r}")
            super().__setitem__(name, value)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _json
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "dict": _dict, "namespace": Names}
    environment.globals.update(functions)
    return jinja2, environment


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own writes <, > and & as HTML does
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: Any) -> None:
    raise InputError(" ".join(str(message).split()))


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


__all__ = ["Template", "read_template", "read_text"]
