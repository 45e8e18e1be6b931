"""Long texts: Python's own library everywhere, the repository's examples, and the user's folder of .txt files.

A document is called KIND/NAME; files called KIND__NAME.txt say both. Each document belongs to one split for good,
decided by its name, so that nothing chosen on "dev" has seen a "test" text. Those that presets were chosen on before
there were splits are "dev" by decree.
"""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from minikv_jax.errors import ConfigError
from minikv_jax.evals.task import Lab

_EXAMPLES = Path(__file__).parents[2] / "examples" / "texts"
_CHOSEN_ON = {
    *("python/argparse", "python/inspect", "python/tarfile", "vim/autocmd", "vim/options", "vim/pattern"),
    *("austen/emma_by_jane_austen_vo", "austen/persuasion_by_jane_aus"),
    "perl",  # all of Debian's perl-doc
}
_SMALLEST = 45_000  # bytes: long enough for a few thousand tokens


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8])


def split_of(name: str) -> str:
    decreed = not _CHOSEN_ON.isdisjoint((name, name.partition("/")[0]))
    return "dev" if decreed else ("dev", "test")[_hash("split", name) % 2]


def documents(folder: Path | None) -> list[Document]:
    """All documents of both splits, sorted by name.

    Raises:
        ConfigError: a folder without .txt files, a file that is not UTF-8, or two of one name.
    """
    found = {**_standard_library(), **(read_folder(_EXAMPLES) if _EXAMPLES.is_dir() else {})}
    if folder is not None:
        found |= read_folder(folder)
    return [Document(name, text) for name, text in sorted(found.items())]


def _standard_library() -> dict[str, str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size > _SMALLEST)
    paths = [path for path in paths if not path.stem.startswith("_sysconfigdata")]  # lists of one machine's settings
    return {f"python/{path.stem}": path.read_text(encoding="utf-8", errors="replace") for path in paths}


def read_folder(folder: Path) -> dict[str, str]:
    """The .txt files of a folder, by KIND/NAME.

    Raises:
        ConfigError: none, two of one name, or one that is not UTF-8.
    """
    found = {}
    for path in sorted(folder.glob("*.txt")):
        kind, _, name = path.stem.rpartition("__")
        document = f"{kind or 'text'}/{name}"
        if document in found:
            raise ConfigError(f"{path} is {document}, as another file there: give one of them another name.")
        try:
            found[document] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read {path} as UTF-8 text: {error}.") from None
    if not found:
        raise ConfigError(f"--texts {folder}: there is no .txt file in it.")
    return found


def passages(lab: Lab, tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Up to `limit` passages (name, token ids) of this many tokens from the split's documents, kinds in turn.

    No two of them overlap: a short text is not met twice, and intervals count what is independent.

    Raises:
        ConfigError: no document of the split is long enough.
    """
    settings = lab.settings
    mine = [x for x in documents(settings.texts) if split_of(x.name) == settings.split]
    mine.sort(key=lambda x: _hash(settings.seed, x.name))
    kinds: dict[str, list[Document]] = {}
    for document in mine:
        kinds.setdefault(document.kind, []).append(document)
    # Kinds in turn, and within a kind its documents in turn; a document met again is cut elsewhere.
    order = (
        (group[i % len(group)], i // len(group))
        for i in range(settings.limit)
        for group in (kinds[kind] for kind in sorted(kinds))
    )
    cut: dict[str, list[range]] = {}
    made, short = 0, set()
    for document, again in order:
        if made == settings.limit:
            return
        where = _place(lab, document, tokens, again)
        taken = any(where.start < other.stop and other.start < where.stop for other in cut.get(document.name, ()))
        if taken or (document.name, where) in short:
            continue
        ids = lab.first_ids(document.text[where.start : where.stop])[:tokens]
        if len(ids) == tokens:
            cut.setdefault(document.name, []).append(where)
            made += 1
            yield f"{document.name}+{again}", tuple(ids)
        else:
            short.add((document.name, where))
    if made == 0:
        raise ConfigError(f"No {settings.split} text has {tokens} tokens: add longer ones with --texts.")


def _place(lab: Lab, document: Document, tokens: int, again: int) -> range:
    """Characters of a passage that starts at a line: enough for the tokens, where the document has them."""
    longest = 8 * tokens  # what takes more than eight a token is no running text
    latest = max(len(document.text) - longest, 0)
    start = _hash("start", lab.settings.seed, document.name, again) % (latest + 1)
    start = document.text.rfind("\n", 0, start) + 1
    return range(start, min(start + longest, len(document.text)))
