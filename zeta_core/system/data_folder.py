"""Selects the training data files in a folder or glob, with the same rules for clients, workers and the Trainer.

A file is data if its suffix is supported and no rule excludes it or one of its parent folders. Hidden entries, caches,
documentation, backups and files of another split are skipped, and every skipped entry is reported with the reason.
Names given by the user are never skipped: a single file is data whatever its name, and a glob such as ``test*.jsonl``
includes the test split.

Links to folders are followed. Each folder is read only once, so cycles of links end.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from zeta_core.contract.data_files.file_types import ROW_SUFFIXES, TOKEN_SUFFIXES, file_type
from zeta_core.contract.printable import printable
from zeta_core.contract.strict_json import JsonFault, read_json

Split = Literal["train", "held_out"]

SAVED_STATE, MAX_STATE_BYTES = "state.json", 1 << 20  # in a folder of `Dataset.save_to_disk`
SHOWN_NAMES = 10  # shown of the used files, and of the skipped entries for each reason

# As whole words, as `datasets` finds splits by name (NON_WORDS_CHARS in src/datasets/data_files.py).
_LETTER = r"[^\W\d_]"
_HELD_OUT_WORDS = (
    r"tests?|testing|validation|valid|val|dev|development|eval|evals|evaluation|held[-_ ]?out|hold[-_ ]?out"
)


def _words(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!{_LETTER})(?:{words})(?:[-_ ]?(?:sets?|data|split))?(?!{_LETTER})", re.IGNORECASE)


_SPLIT_PATTERNS: dict[Split, re.Pattern[str]] = {
    "train": _words(r"train|training"),
    "held_out": _words(_HELD_OUT_WORDS),
}
_SPLIT_REASONS: dict[Split, str] = {
    "held_out": "held-out split: use it as eval_dataset, or name the file itself to train on it",
    "train": "training split: use it as dataset, or name the file itself to evaluate on it",
}
_DOCUMENTATION = (
    r"readme|licen[cs]es?|copying|copyright|notice|changelog|citation|contributing|contributors|code[-_ ]of[-_ ]conduct"
    r"|data(?:set)?[-_ ]?card|model[-_ ]?card|datasheet|requirements|checksums?|(?:md5|sha\d+)(?:sums?)?"
)
# Files of `Dataset.save_to_disk`, of the Hub's dataset viewer, and of `save_pretrained`.
_METADATA = r"dataset_infos?|dataset_dict|state|config|tokenizer|tokenizer_config|special_tokens_map|generation_config"
_REPEATED = "folder that is listed already"
_OUTSIDE = "link that leaves the folder"


@dataclass(frozen=True)
class _Rule:
    """A pattern of names that aren't data; ``folders`` and ``files`` tell what the rule applies to."""

    reason: str
    pattern: re.Pattern[str]
    folders: bool
    files: bool


_NOT_TEXT = "|".join(map(re.escape, (*ROW_SUFFIXES, *TOKEN_SUFFIXES)))


def _rule(reason: str, pattern: str, *, folders: bool = False, files: bool = True) -> _Rule:
    return _Rule(reason, re.compile(pattern, re.IGNORECASE), folders, files)


_RULES = (
    _rule("hidden", r"\.", folders=True),
    # As `datasets` skips them: `__pycache__`, and the `__MACOSX` of an archive made by macOS.
    _rule("system folder", r"__", folders=True, files=False),
    _rule("backup or temporary file", r".*~$|~\$|#.*#$|.*\.(?:bak|backup|orig|tmp)(?:\.[^.]*)?$|.*\.(?:old|sw[a-p])$"),
    _rule("cache of datasets", r"cache-.*\.arrow$|.*\.incomplete$"),
    _rule("documentation", rf"(?!.*(?:{_NOT_TEXT})$)(?:{_DOCUMENTATION})(?:[-_. ].*)?$"),
    _rule("document bounds of a token file", r".*\.offsets\.npy$"),
    _rule("metadata", rf"(?:{_METADATA})\.json$"),
)


@dataclass(frozen=True)
class Skipped:
    """An entry that isn't data; ``path`` is relative to the folder, and ends in ``/`` for a folder."""

    path: str
    reason: str


@dataclass(frozen=True)
class DataFiles:
    """The data files of ``folder`` in the order of their names, and what was skipped."""

    folder: Path
    used: tuple[Path, ...]
    skipped: tuple[Skipped, ...]

    @property
    def leaves_boundary(self) -> bool:
        """Whether a link that leads out of ``boundary`` was skipped."""
        return any(skipped.reason == _OUTSIDE for skipped in self.skipped)

    def summary(self, name: str) -> str:
        """The files used and skipped, in one or two sentences with counts and the first names.

        ``name`` is the folder as given by the user.
        """
        used = f"Using {_count(len(self.used), 'data file')} of {printable(name)}"
        kinds = sorted({file.suffix.lower() for file in self.used})
        if len(kinds) > 1:
            counts = ", ".join(f"{sum(file.suffix.lower() == kind for file in self.used)} {kind}" for kind in kinds)
            used += f" ({counts})"
        names = _first([file.relative_to(self.folder).as_posix() for file in self.used])
        return f"{used}: {names}. {self.skipped_summary()}".rstrip()

    def skipped_summary(self) -> str:
        """The skipped entries by reason in one sentence; empty if nothing was skipped."""
        if not self.skipped:
            return ""
        by_reason: dict[str, list[str]] = {}
        for skipped in self.skipped:
            by_reason.setdefault(skipped.reason, []).append(skipped.path)
        groups = [f"{_first(paths)} ({reason})" for reason, paths in by_reason.items()]
        return f"Skipped {_count(len(self.skipped), 'entry', 'entries')}: {'; '.join(groups)}."


def find_data_files(
    folder: Path,
    suffixes: Sequence[str],
    *,
    split: Split = "train",
    pattern: str | None = None,
    boundary: Path | None = None,
) -> DataFiles:
    """The data files below ``folder`` whose names end in one of ``suffixes``, in any case.

    ``split`` is the use of the data: names of the other split are skipped. ``pattern`` is a glob relative to ``folder``
    (``**`` matches any number of folders); rules that it names itself do not apply. Links out of ``boundary`` are not
    followed. Raises `OSError` if ``folder`` itself cannot be read.
    """
    search = _Search(folder, tuple(suffixes), split, None if pattern is None else tuple(pattern.split("/")), boundary)
    search.run()
    used = sorted(search.used, key=lambda path: path.relative_to(folder).parts)
    return DataFiles(folder, tuple(used), tuple(sorted(search.skipped, key=lambda skipped: skipped.path)))


def split_glob(pattern: str) -> tuple[str, str]:
    """The part of a glob before its first wildcard, and the rest: ``a/b/*.txt`` is ``a/b`` and ``*.txt``."""
    parts = pattern.split("/")
    first = next((index for index, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts) - 1)
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "."), "/".join(parts[first:])


@dataclass
class _Search:
    """One traversal of a folder; the results are in ``used`` and ``skipped``."""

    folder: Path
    suffixes: tuple[str, ...]
    split: Split
    pattern: tuple[str, ...] | None
    boundary: Path | None
    used: list[Path] = field(default_factory=list[Path])
    skipped: list[Skipped] = field(default_factory=list[Skipped])
    _saved: frozenset[str] | None = None

    def run(self) -> None:
        seen: set[tuple[int, int]] = {_identity(self.folder.stat())}
        waiting: list[tuple[Path, tuple[str, ...]]] = [(self.folder, ())]
        while waiting:
            at, above = waiting.pop()
            try:
                entries = sorted(os.scandir(at), key=lambda entry: entry.name)
            except OSError as error:
                if not above:
                    raise
                self._skip(above, f"cannot be read: {error.strerror}", is_folder=True)
                continue
            self._saved = _files_of_saved_dataset(at)
            for entry in entries:
                names = (*above, entry.name)
                if self._enters(entry, names):
                    identity = _identity(entry.stat())
                    if identity in seen:
                        self._skip(names, _REPEATED, is_folder=True)
                    else:
                        seen.add(identity)
                        waiting.append((Path(entry.path), names))

    def _enters(self, entry: os.DirEntry[str], names: tuple[str, ...]) -> bool:
        """Whether to descend into the entry; a file is added to ``used`` or ``skipped``."""
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if self._fits(names, is_folder=False):
                self._skip(names, "broken link" if entry.is_symlink() else f"cannot be read: {error.strerror}")
            return False
        is_folder = stat.S_ISDIR(mode)
        if not self._fits(names, is_folder=is_folder):
            return False
        if reason := self._reason(entry, mode):
            self._skip(names, reason, is_folder=is_folder)
            return False
        if not is_folder:
            self.used.append(Path(entry.path))
        return is_folder

    def _reason(self, entry: os.DirEntry[str], mode: int) -> str | None:
        """The reason why a matching entry is skipped, or ``None``."""
        is_folder = stat.S_ISDIR(mode)
        for rule in _RULES:
            if (rule.folders if is_folder else rule.files) and self._applies(rule.pattern, entry.name):
                return rule.reason
        if self._is_other_split(entry.name):
            return _SPLIT_REASONS["held_out" if self.split == "train" else "train"]
        if entry.is_symlink() and self.boundary is not None and _leads_out_of(self.boundary, entry):
            return _OUTSIDE
        if is_folder:
            return None
        if file_type(entry.name).suffix not in self.suffixes:
            return f"not one of {', '.join(self.suffixes)}"
        if not stat.S_ISREG(mode):
            return "not a regular file"
        if self._saved is not None and entry.name.endswith(".arrow") and entry.name not in self._saved:
            return "not a file of the saved dataset"
        return "empty" if entry.stat().st_size == 0 else None

    def _applies(self, rule: re.Pattern[str], name: str) -> bool:
        return rule.match(name) is not None and not any(rule.match(written) for written in self._written())

    def _is_other_split(self, name: str) -> bool:
        own, other = _SPLIT_PATTERNS[self.split], _SPLIT_PATTERNS["held_out" if self.split == "train" else "train"]
        if own.search(name) or not other.search(name):
            return False
        return not any(other.search(written) for written in self._written())

    def _written(self) -> Iterator[str]:
        """The parts of the pattern that the user wrote, with a hyphen for each wildcard."""
        for part in self.pattern or ():
            yield re.sub(r"\[[^]]*\]|[*?]", "-", part)

    def _fits(self, names: tuple[str, ...], *, is_folder: bool) -> bool:
        """Whether the pattern matches a file, or may match one below a folder."""
        if self.pattern is None:
            return True
        if not is_folder:
            return _matches(names, self.pattern)
        for name, part in zip(names, self.pattern, strict=False):
            if part == "**":
                return True
            if not fnmatchcase(name, part):
                return False
        return len(names) < len(self.pattern)

    def _skip(self, names: tuple[str, ...], reason: str, *, is_folder: bool = False) -> None:
        self.skipped.append(Skipped("/".join(names) + ("/" if is_folder else ""), reason))


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[start:], pattern[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _files_of_saved_dataset(folder: Path) -> frozenset[str] | None:
    """The Arrow files that `Dataset.save_to_disk` wrote to this folder; ``None`` if it did not write it."""
    state = folder / SAVED_STATE
    try:
        if not state.is_file() or state.stat().st_size > MAX_STATE_BYTES:
            return None
        content = read_json(state.read_bytes())
    except (OSError, JsonFault):
        return None
    files = content.get("_data_files") if isinstance(content, dict) else None
    if not isinstance(files, list):
        return None
    return frozenset(str(file.get("filename")) for file in files if isinstance(file, dict))


def _leads_out_of(boundary: Path, link: os.DirEntry[str]) -> bool:
    return not Path(link.path).resolve().is_relative_to(boundary)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:SHOWN_NAMES])
    return shown + (f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else "")
