"""Which files of a folder or glob are data."""

import os
from pathlib import Path

import pytest

from zeta_core.contract.data_files.file_types import TOKEN_SUFFIXES, file_suffixes
from zeta_core.system.data_folder import DataFiles, find_data_files

SUFFIXES = file_suffixes("auto")


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"content of {name}")
    return folder


def used(found: DataFiles) -> list[str]:
    return [file.relative_to(found.folder).as_posix() for file in found.used]


def reasons(found: DataFiles) -> dict[str, str]:
    return {skipped.path: skipped.reason for skipped in found.skipped}


@pytest.mark.parametrize(
    ("name", "entry", "reason"),
    [
        (".hg/store.txt", ".hg/", "hidden"),
        (".ipynb_checkpoints/rows-checkpoint.jsonl", ".ipynb_checkpoints/", "hidden"),
        ("sub/._rows.jsonl", "sub/._rows.jsonl", "hidden"),
        ("__MACOSX/rows.jsonl", "__MACOSX/", "system folder"),
        ("sub/__pycache__/x.txt", "sub/__pycache__/", "system folder"),
        ("README.md", "README.md", "documentation"),
        ("sub/readme_zh-CN.TXT", "sub/readme_zh-CN.TXT", "documentation"),
        ("LICENSE-APACHE.txt", "LICENSE-APACHE.txt", "documentation"),
        ("Dataset Card.md", "Dataset Card.md", "documentation"),
        ("cache-0123456789abcdef.arrow", "cache-0123456789abcdef.arrow", "cache of datasets"),
        ("rows.jsonl~", "rows.jsonl~", "backup or temporary file"),
        ("rows.bak.jsonl", "rows.bak.jsonl", "backup or temporary file"),
        ("~$rows.txt", "~$rows.txt", "backup or temporary file"),
        ("notes.pdf", "notes.pdf", f"not one of {', '.join(SUFFIXES)}"),
        ("ids.bin", "ids.bin", f"not one of {', '.join(SUFFIXES)}"),
    ],
)
def test_entries_that_are_not_data_are_skipped_with_a_reason(
    name: str, entry: str, reason: str, tmp_path: Path
) -> None:
    found = find_data_files(tree(tmp_path, "good.jsonl", name), SUFFIXES)
    assert used(found) == ["good.jsonl"]
    assert reasons(found) == {entry: reason}


def test_suffixes_match_in_any_case_and_files_are_sorted_by_name(tmp_path: Path) -> None:
    names = ["B.JSONL", "a/c.Txt", "a.parquet", "licensed_texts.jsonl", "readme/poem.txt"]
    assert used(find_data_files(tree(tmp_path, *names), SUFFIXES)) == sorted(names, key=lambda name: name.split("/"))


@pytest.mark.parametrize(
    "name",
    ["test.jsonl", "Validation-00000-of-00002.parquet", "dev/a.txt", "my_eval.jsonl", "TestSet.txt", "held-out.txt"],
)
def test_a_held_out_split_is_data_only_for_evaluation(name: str, tmp_path: Path) -> None:
    folder = tree(tmp_path, "train/a.jsonl", name)
    trained = find_data_files(folder, SUFFIXES)
    assert used(trained) == ["train/a.jsonl"]
    assert [reason.partition(":")[0] for reason in reasons(trained).values()] == ["held-out split"]
    assert used(find_data_files(folder, SUFFIXES, split="held_out")) == [name]


@pytest.mark.parametrize("name", ["contest.jsonl", "latest.txt", "train_test.jsonl", "evaluations2.txt", "devices.txt"])
def test_a_name_that_only_contains_the_letters_of_a_split_is_data(name: str, tmp_path: Path) -> None:
    assert used(find_data_files(tree(tmp_path, name), SUFFIXES)) == [name]


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", "far.txt")
    folder = tree(tmp_path / "data", "near.txt", "sub/deep.txt")
    (folder / "linked.jsonl").symlink_to(tmp_path / "elsewhere" / "far.txt")
    (folder / "other").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "sub" / "again").symlink_to(folder / "sub")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "self.txt").symlink_to(folder / "self.txt")
    found = find_data_files(folder, SUFFIXES)
    assert used(found) == ["linked.jsonl", "near.txt", "other/far.txt", "sub/deep.txt"]
    repeated = "folder that is listed already"
    assert reasons(found) == {
        "gone.txt": "broken link",
        "self.txt": "broken link",
        "sub/loop/": repeated,
        "sub/again/": repeated,
    }
    for pattern in ("**/*.txt", "**"):  # `glob` itself walks a cycle as deep as the kernel lets it
        assert used(find_data_files(folder, SUFFIXES, pattern=pattern))[-2:] == ["other/far.txt", "sub/deep.txt"]


def test_unreadable_entries_are_skipped(tmp_path: Path) -> None:
    tree(tmp_path, "good.txt")
    (tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe.txt")
    assert reasons(find_data_files(tmp_path, SUFFIXES)) == {"empty.txt": "empty", "pipe.txt": "not a regular file"}


def test_a_glob_skips_excluded_entries_that_it_does_not_name(tmp_path: Path) -> None:
    folder = tree(
        tmp_path, "a.txt", "test1.txt", "README.md", ".old/b.txt", "sub/c.txt", "cache-1.arrow", "sub/d.jsonl"
    )

    def matched(pattern: str) -> list[str]:
        return used(find_data_files(folder, SUFFIXES, pattern=pattern))

    assert matched("*") == ["a.txt"]
    assert matched("*.txt") == ["a.txt"]
    assert matched("**/*.txt") == ["a.txt", "sub/c.txt"]
    assert matched("test*.txt") == ["test1.txt"]
    assert matched("README*") == ["README.md"]
    assert matched(".old/*") == [".old/b.txt"]
    assert matched("s?b/*.[jt]*") == ["sub/c.txt", "sub/d.jsonl"]
    assert matched("*.csv") == []


def test_token_files_are_data_only_if_token_ids_are_expected(tmp_path: Path) -> None:
    folder = tree(tmp_path, "rows.jsonl", "text.txt", "ids.npy", "ids.offsets.npy")
    assert used(find_data_files(folder, file_suffixes("auto"))) == ["rows.jsonl", "text.txt"]
    assert used(find_data_files(folder, file_suffixes("messages"))) == ["rows.jsonl"]
    assert used(find_data_files(folder, file_suffixes("tokens"))) == ["ids.npy", "rows.jsonl"]
    assert set(TOKEN_SUFFIXES) <= set(file_suffixes(None, pretokenized=True))


def test_the_summary_has_counts_kinds_and_the_first_names(tmp_path: Path) -> None:
    tree(tmp_path, "b.jsonl", ".git/x.txt", "evil\x1b[31m\nname.txt", *(f"part-{n:02}.txt" for n in range(30)))
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    sentence = find_data_files(tmp_path, SUFFIXES).summary("corpus")
    assert sentence.startswith(
        "Using 33 data files of corpus (1 .jsonl, 32 .txt): b.jsonl, caf\\xe9.txt, evil\\x1b[31m"
    )
    assert sentence.endswith(" and 23 more. Skipped 1 entry: .git/ (hidden).")
    assert sentence.isprintable()
