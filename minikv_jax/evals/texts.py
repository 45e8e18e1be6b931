"""Long texts: Python's own library everywhere, the repository's examples, and the user's folder of .txt files.

A document is called KIND/NAME; files called KIND__NAME.txt say both. Each document belongs to one split for good,
decided by its name, so that nothing chosen on "dev" has seen a "test" text.
"""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from minikv_jax.errors import ConfigError
from minikv_jax.evals.task import Lab

_EXAMPLES = Path(__file__).parents[2] / "examples" / "texts"
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
    return ("dev", "test")[_hash("split", name) % 2]


def documents(folder: Path | None) -> list[Document]:
    """All documents of both splits, sorted by name.

    Raises:
        ConfigError: a folder without .txt files, or a file that is not UTF-8.
    """
    found = {**_standard_library(), **(_folder(_EXAMPLES) if _EXAMPLES.is_dir() else {})}
    if folder is not None:
        own = _folder(folder)
        if not own:
            raise ConfigError(f"--texts {folder}: there is no .txt file in it.")
        found |= own
    return [Document(name, text) for name, text in sorted(found.items())]


def _standard_library() -> dict[str, str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size > _SMALLEST)
    return {f"python/{path.stem}": path.read_text(encoding="utf-8", errors="replace") for path in paths}


def _folder(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.txt")):
        kind, _, name = path.stem.rpartition("__")
        try:
            found[f"{kind or 'text'}/{name}"] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read {path} as UTF-8 text: {error}.") from None
    return found


def passages(lab: Lab, tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """`limit` passages (name, token ids) of this many tokens from the split's documents, kinds in turn.

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
    order = [
        (group[i % len(group)], i // len(group))
        for i in range(settings.limit)
        for group in (kinds[kind] for kind in sorted(kinds))
    ]
    made = 0
    for document, again in order:
        if made == settings.limit:
            return
        ids = _cut(lab, document, tokens, again)
        if ids is not None:
            made += 1
            yield f"{document.name}+{again}", ids
    if made == 0:
        raise ConfigError(f"No {settings.split} text has {tokens} tokens: add longer ones with --texts.")


def _cut(lab: Lab, document: Document, tokens: int, again: int) -> tuple[int, ...] | None:
    """Token ids of a passage that starts at a line; None if the document is too short."""
    text = document.text
    longest = 8 * tokens  # characters; what takes more than eight a token is no running text
    latest = max(len(text) - longest, 0)
    start = _hash("start", lab.settings.seed, document.name, again) % (latest + 1)
    start = text.rfind("\n", 0, start) + 1
    ids = lab.first_ids(text[start : start + longest])[:tokens]
    return tuple(ids) if len(ids) == tokens else None
