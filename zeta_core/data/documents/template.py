"""The chat template of a tokenizer: rendering messages, and what differs between tokenizers.

All data is untrusted. Templates run in the sandbox of transformers, which does not limit memory and time. The rendering
process therefore has limits for both (`zeta_core.data.sandbox`), and a text is limited to `MAX_CHARACTERS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import cached_property
from typing import Any, cast

from zeta_core.contract.text import is_template
from zeta_core.data.documents import control_tokens
from zeta_core.data.rows.turns import Message
from zeta_core.data.sandbox import Position, run_in_sandbox
from zeta_core.failures import CannotTrain

Tools = list[dict[str, Any]]

# ChatML (OpenAI 2023), with the tokenizer's own end token after each assistant turn. It ends generation with every
# tokenizer, including those without <|im_end|>.
DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
_BEGIN = "{{%- set zeta_begin = {} -%}}{{{{- zeta_begin }}}}"  # the statement that `with_beginning` adds
MAX_CHARACTERS = 1 << 24  # limit for a rendered conversation, several times the longest context of any model
_DATE_FUNCTION = "strftime_now"


class Unlearnable(Exception):
    """A conversation that cannot be trained on. The message completes a sentence that starts with its location."""


def uses_date(template: object) -> bool:
    """Whether a template renders the current date, so that its text depends on the day."""
    return _DATE_FUNCTION in str(template)


def with_beginning(template: Any, beginning: str) -> Any:
    """The template, or all of several named ones, with the text ``beginning`` in front of every conversation."""
    if isinstance(template, Mapping):
        return {name: with_beginning(text, beginning) for name, text in cast("Mapping[str, str]", template).items()}
    return _BEGIN.format(json.dumps(beginning, ensure_ascii=False)) + template


def without_beginning(template: Any) -> Any:
    """The inverse of `with_beginning`; other templates are returned unchanged."""
    if isinstance(template, Mapping):
        return {name: without_beginning(text) for name, text in cast("Mapping[str, str]", template).items()}
    head, _, tail = _BEGIN.format("\0").partition("\0")
    if isinstance(template, str) and template.startswith(head) and tail in template:
        return template.partition(tail)[2]
    return template


def is_default(template: object) -> bool:
    return without_beginning(template) == DEFAULT_TEMPLATE


def set_template(tokenizer: Any, chat_template: str | None) -> None:
    """Set the requested template, by its text or by its name among the tokenizer's. Raises `CannotTrain`."""
    if chat_template is None:
        return
    if is_template(chat_template):

        def compile_it(position: Position) -> str | None:
            position.move("chat_template", "rendering")
            return _syntax_error(chat_template)

        fault: str | None = run_in_sandbox(compile_it)
        if fault is not None:
            raise CannotTrain(f"chat_template is not a valid Jinja template: {fault}.", param="chat_template")
        tokenizer.chat_template = chat_template
        return
    own = tokenizer.chat_template
    named = cast("dict[str, str]", own) if isinstance(own, dict) else {"default": own} if own else {}
    if chat_template not in named:
        names = ", ".join(map(repr, named)) or "none"
        raise CannotTrain(
            f"chat_template is {chat_template!r}, but the tokenizer's templates are: {names}; use one of these names, "
            "or the text of a Jinja template.",
            param="chat_template",
        )
    tokenizer.chat_template = named[chat_template]


def _syntax_error(template: str) -> str | None:
    """What is wrong with a template, which is only compiled."""
    try:
        _compiled(template)
    except MemoryError:
        raise
    except Exception as error:  # jinja's errors have a line; jinja is not a direct dependency
        if (line := getattr(error, "lineno", None)) is None:
            raise
        return f"line {line}: {error}".rstrip(".")
    return None


def _compiled(template: str) -> Any:
    """The compiled template that `apply_chat_template` renders; transformers compiles each one only once."""
    from transformers.utils import chat_template_utils

    return cast(Any, chat_template_utils)._compile_jinja_template(template)


class Template:
    """The chat template of a tokenizer, as it renders on a fixed date.

    If the tokenizer has no template, the default one is set. If the tokenizer begins every text with a token that the
    template does not write, the template is extended to write it, so that conversations begin as texts do, in training
    and later in use. Both changes are made to the tokenizer, with which they are saved.
    """

    def __init__(self, tokenizer: Any, today: date, *, beginning: Sequence[int] = ()) -> None:
        """``beginning`` are the ids that the tokenizer puts before every text."""
        self._tokenizer = tokenizer
        self._today = today
        self.checked_shapes: set[object] = set()  # kinds of turns that `coverage` has checked
        if not tokenizer.chat_template:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        begin = "".join(tokenizer.convert_ids_to_tokens(list(beginning)))
        self.added_beginning = ""
        if begin and not self._starts_with(begin):
            self.added_beginning = begin
            tokenizer.chat_template = with_beginning(without_beginning(tokenizer.chat_template), begin)

    @property
    def is_default(self) -> bool:
        return is_default(self._tokenizer.chat_template)

    def source(self, tools: Tools | None = None) -> str:
        """The text of the template, which may depend on whether there are tools."""
        return str(self._tokenizer.get_chat_template(None, tools))

    def render(self, messages: Sequence[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        """Render ``messages``; with ``prompt``, append the generation prompt. Raises `Unlearnable`."""
        if not messages and prompt and self.is_default:
            return f"{self.added_beginning}<|im_start|>assistant\n"  # transformers refuses an empty conversation
        try:
            text = self._render(messages, tools, prompt=prompt)
        except (MemoryError, Unlearnable):
            raise
        except Exception as error:  # a template may raise anything; jinja is not a direct dependency
            if not messages:
                raise Unlearnable(
                    "starts with an assistant turn, which the tokenizer's chat template does not support; put a user "
                    "turn before it."
                ) from error
            reason = str(error).strip().rstrip(".")[:200] or type(error).__name__
            raise Unlearnable(f"the tokenizer's chat template rejects the conversation: {reason}.") from error
        return text if prompt else text.removesuffix(self._unconditional_prompt)

    def prompt_without_thinking(self, messages: Sequence[Message], tools: Tools | None) -> str | None:
        """Render ``messages`` with the generation prompt that disables thinking, or None if there is none."""
        if "enable_thinking" not in self.source(tools):
            return None
        try:
            return self._render(messages, tools, prompt=True, enable_thinking=False)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - a template may raise anything, for example if thinking cannot be disabled
            return None

    def _render(self, messages: Sequence[Message], tools: Tools | None = None, *, prompt: bool, **more: Any) -> str:
        self._fix_date(tools)
        text = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **more
        )
        if len(text) > MAX_CHARACTERS:
            raise Unlearnable(
                f"the tokenizer's chat template produced {len(text):,} characters for this row, more than the "
                f"{MAX_CHARACTERS:,} allowed; use a template with less output, or remove the row."
            )
        return text

    def _fix_date(self, tools: Tools | None) -> None:
        """Let the template's `strftime_now` return the fixed date, so that the same data gives the same tokens.

        transformers 5 replaces functions among the arguments of a template by text. It compiles each template once, so
        the function is set in the compiled template, which is the one that `apply_chat_template` renders.
        """
        source = self.source(tools)
        if uses_date(source):
            _compiled(source).globals[_DATE_FUNCTION] = datetime.combine(self._today, datetime.min.time()).strftime

    def _starts_with(self, begin: str) -> bool:
        """Whether every conversation begins with ``begin``; also if the template rejects the one that is tried."""
        tried: list[Message] = [{"role": "user", "content": "Hi"}]
        try:
            return self._render(tried, prompt=True).startswith(begin)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - if the template rejects conversations, `render` reports it
            return True

    @cached_property
    def _unconditional_prompt(self) -> str:
        """The generation prompt if the template appends it to every conversation, as Llama 3's first template does.

        It is found by rendering a conversation without turns. An end token is not a prompt: it ends the conversation.
        """
        question: list[Message] = [{"role": "user", "content": "Hi"}]
        answered: list[Message] = [*question, {"role": "assistant", "content": "Hey"}]
        try:
            [nothing] = self._tokenizer.apply_chat_template([[]], tokenize=False)  # a batch of one without turns
            texts = [self._render(turns, prompt=prompt) for turns in (question, answered) for prompt in (False, True)]
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - if the template rejects conversations, `render` reports it
            return ""
        nothing = nothing.removeprefix(self.added_beginning)
        always = texts[0] == texts[1] and texts[2] == texts[3] and all(text.endswith(nothing) for text in texts)
        return nothing if always and not (self.end and nothing.rstrip().endswith(self.end)) else ""

    @property
    def end(self) -> str:
        return self._tokenizer.eos_token or ""

    # --- control tokens ---

    def mark(self, messages: Sequence[Message], tools: Tools | None) -> tuple[list[Message], Tools | None, int]:
        """The messages and tools with the control tokens in their texts marked, and the number of these tokens."""
        found = [control_tokens.mark(message, self.control_tokens(message["role"])) for message in messages]
        marked_tools, num_in_tools = control_tokens.mark(tools, self.control_tokens("system"))
        return [message for message, _ in found], marked_tools, num_in_tools + sum(count for _, count in found)

    def control_tokens(self, role: str) -> Any:
        """A pattern of the control tokens in the turns of a role, or ``None``."""
        return self._control_tokens_of_input if role in ("user", "tool") else self._control_tokens_of_output

    @cached_property
    def _control_tokens_of_input(self) -> Any:
        others = control_tokens.other_added_tokens(self._tokenizer)
        templates = str(self._tokenizer.chat_template)
        written = {token for token in others if token in templates}
        return control_tokens.compile_pattern(control_tokens.special_tokens(self._tokenizer) | written)

    @cached_property
    def _control_tokens_of_output(self) -> Any:
        others = control_tokens.other_added_tokens(self._tokenizer)
        between = self._between_turns if others else ""
        bounds = {token for token in others if token in between}
        return control_tokens.compile_pattern(control_tokens.special_tokens(self._tokenizer) | bounds)

    @cached_property
    def _between_turns(self) -> str:
        """What the template writes between the content of an assistant turn and that of the next user turn."""
        texts = ("ZETAQUESTION", "ZETAANSWER", "ZETANEXT")
        turns: list[Message] = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts, strict=True)
        ]
        try:
            text = self._render(turns, prompt=False)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - if the template rejects conversations, `render` reports it
            return ""
        return text.partition(texts[1])[2].partition(texts[2])[0]
