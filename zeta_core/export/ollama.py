"""Writing the ``Modelfile`` of Ollama: the chat template as a Go template, and the stop tokens.

A Hugging Face chat template is a Jinja program, and Ollama needs a Go template. Most programs only put a text before
and after each message, so these texts are read from rendered conversations. The result is used only if it renders
other conversations exactly like the original; otherwise the Modelfile has no TEMPLATE, and Ollama chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Turn = Mapping[str, str]
_USER, _ASSISTANT, _SYSTEM = "⟪user⟫", "⟪assistant⟫", "⟪system⟫"
_CHECKED: tuple[tuple[Turn, ...], ...] = (
    ({"role": "user", "content": "one"},),
    ({"role": "system", "content": "two"}, {"role": "user", "content": "three"}),
    (
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "five"},
        {"role": "user", "content": "six"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "eight"},
    ),
)


@dataclass(frozen=True)
class SimpleTemplate:
    """The texts around messages. ``preamble`` begins a conversation without a system message."""

    around: Mapping[str, tuple[str, str]]  # by role
    preamble: str
    generation_prompt: str

    def render(self, turns: Sequence[Turn]) -> str:
        start = "" if turns[0]["role"] == "system" else self.preamble
        parts = (f"{self.around[turn['role']][0]}{turn['content']}{self.around[turn['role']][1]}" for turn in turns)
        return f"{start}{''.join(parts)}{self.generation_prompt}"

    def as_go_template(self) -> str:
        preamble = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.preamble}{{{{ end }}}}'
        branches = "".join(
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for number, (role, (before, after)) in enumerate(self.around.items())
        )
        messages = f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
        return f"{preamble if self.preamble else ''}{messages}{self.generation_prompt}"


def simple_template(tokenizer: Any) -> SimpleTemplate | None:
    """The template of the tokenizer, without the token that begins a text; ``None`` if it isn't that simple."""
    if not tokenizer.chat_template:
        return None
    try:
        found = _read(tokenizer)
        if found is None or any(found.render(turns) != _rendered(tokenizer, turns) for turns in _CHECKED):
            return None
    except Exception:  # noqa: BLE001 - a template may raise anything
        return None
    texts = f"{found.preamble}{found.generation_prompt}{found.around}"
    return None if '"""' in texts or "{{" in texts else found


def modelfile(model_file: str, tokenizer: Any, stops: Sequence[str]) -> str:
    """The text of the file for ``ollama create``."""
    lines = [f"FROM ./{model_file}"]
    template = simple_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template.as_go_template()}"""')
    elif tokenizer.chat_template:
        lines.append("# The chat template has no equivalent in Ollama; Ollama chooses one for the model.")
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _read(tokenizer: Any) -> SimpleTemplate | None:
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
    system = {"role": "system", "content": _SYSTEM}
    with_prompt = _rendered(tokenizer, (user,))
    without_prompt = _rendered(tokenizer, (user,), add_generation_prompt=False)
    if not with_prompt.startswith(without_prompt):
        return None
    generation_prompt = with_prompt[len(without_prompt) :]
    whole = _rendered(tokenizer, (system, user, answer, user), add_generation_prompt=False)
    first, _, rest = whole.partition(_SYSTEM)
    after_system, _, rest = rest.partition(_USER)
    after_user, _, rest = rest.partition(_ASSISTANT)
    between, _, last = rest.partition(_USER)
    # The text after a user's message and before an answer is split where the last message ends.
    if not after_user.startswith(last):
        return None
    user_suffix, answer_prefix = last, after_user[len(last) :]
    before_user = without_prompt.partition(_USER)[0]
    user_prefix = _without_end_of_turn(_common_end(before_user, after_system, between), user_suffix)
    system_suffix, answer_suffix = after_system.removesuffix(user_prefix), between.removesuffix(user_prefix)
    return SimpleTemplate(
        around={
            "system": (first, system_suffix),
            "user": (user_prefix, user_suffix),
            "assistant": (answer_prefix, answer_suffix),
        },
        preamble=before_user.removesuffix(user_prefix),
        generation_prompt=generation_prompt,
    )


def _common_end(*texts: str) -> str:
    """The longest common end of the texts."""
    shortest = min(texts, key=len)
    lengths = range(len(shortest), 0, -1)
    return next((shortest[-length:] for length in lengths if all(t.endswith(shortest[-length:]) for t in texts)), "")


def _without_end_of_turn(text: str, suffix: str) -> str:
    """``text`` without the end of the previous turn at its start, which most templates write after every role."""
    lengths = (length for length in range(len(suffix), 0, -1) if text.startswith(suffix[-length:]))
    return text[next(lengths, 0) :]


def _rendered(tokenizer: Any, turns: Sequence[Turn], *, add_generation_prompt: bool = True) -> str:
    text = tokenizer.apply_chat_template(
        [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    begin = tokenizer.bos_token
    # Ollama adds this token itself, unless the template writes it for each message.
    return str(text).removeprefix(begin) if begin and str(text).count(begin) == 1 else str(text)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
