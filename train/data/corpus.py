"""Texts to pre-train on: the sources of documents, and the choice of held-out ones.

A source yields documents in an order that depends on its files alone. It is a function and a row of
`SOURCES`. Documents that are empty or not UTF-8 are left out and counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from jaxlib_unlearn.reading import one_line
from train.data import hub_table

SUFFIXES = (".txt", ".jsonl", ".parquet")
COLUMN = "text"
LONGEST = 256 * 2**20  # bytes of a document, which is in memory as a whole


@dataclass(frozen=True)
class CorpusConfig:
    """Options of the corpus that a model is pre-trained on."""

    source: str = option(
        "packages",
        "The documents: `packages` (Python files of installed packages, no download), `text` "
        "(your files, see `path`) or `hub` (a data set of the Hugging Face Hub, streamed).",
        choices=("packages", "text", "hub"),
    )
    packages: tuple[str, ...] = option(
        ("transformers", "scipy", "pandas"),
        "The Python files of these installed packages are read as text; none is imported.",
    )
    path: Path | None = option(
        None,
        "With `text`, the documents are here: a .txt file (one document), a .jsonl or .parquet "
        "file (a document a row, column `text`), or a folder of such files.",
    )
    repository: str = option("HuggingFaceFW/fineweb", "With `hub`, the data set has this id.")
    subset: str = option("sample-10BT", "With `hub`, this configuration of the data set is read.")
    revision: str | None = option(
        None,
        "With `hub`, this commit, branch or tag is read; None: the newest. The run notes the "
        "commit.",
    )
    documents: int | None = option(
        None, "At most this many documents are read, from the first on; None: all.", low=1
    )
    validation: float = option(
        0.01,
        "This share of the documents is held out: those whose sha256 is lowest.",
        above=0,
        below=1,
        wanted="above 0 and below 1",
    )
    tokenizer: str = option(
        "train",
        "The tokenizer: `train` (byte-level BPE, trained on the training documents), or the "
        "folder or Hub id of a model that has one.",
    )
    context: int = option(
        256, "A row has this many tokens, which is also the longest context of the model.", low=2
    )
    cache: Path | None = option(
        None,
        "Tokenised corpora are kept in this local folder, which runs share; None: `corpora` "
        "beside the run folder.",
    )
    digest: str | None = option(
        None, "The corpus must have this sha256; None: any. The run notes it in config.json."
    )


class Document(NamedTuple):
    """A text, and the sha256 of its bytes."""

    text: str
    sha: bytes


@dataclass
class Counts:
    """The numbers of documents and bytes that were read from a source, and of those left out."""

    documents: int = 0
    num_bytes: int = 0
    empty: int = 0
    not_utf8: int = 0
    duplicates: int = 0

    def words(self) -> str:
        """One line for the user."""
        left = [
            f"{count} {what}"
            for count, what in (
                (self.empty, "empty"),
                (self.not_utf8, "not UTF-8"),
                (self.duplicates, "duplicate"),
            )
            if count
        ]
        said = f"; left out: {', '.join(left)}" if left else ""
        return f"{self.documents} documents, {self.num_bytes / 1e6:.1f} MB{said}"


def is_validation(sha: bytes, share: float) -> bool:
    """Whether a document is held out: its sha256, as a number below 1, lies below `share`.

    Example:
        >>> is_validation(b"\\x00" * 32, 0.01), is_validation(b"\\x03" + b"\\x00" * 31, 0.01)
        (True, False)
    """
    return int.from_bytes(sha[:8], "big") < share * 2**64


def is_test(path: Path) -> bool:
    """Whether a Python file belongs to the tests of its package.

    Example:
        >>> [is_test(Path(p)) for p in ("a/tests/b.py", "a/test_b.py", "a/testing.py")]
        [True, True, False]
    """
    inside = {"test", "tests"} & set(path.parts[:-1])
    name = path.stem
    return bool(inside) or name.startswith("test_") or name.endswith("_test") or name == "conftest"


def python_files(packages: tuple[str, ...]) -> list[Path]:
    """The Python files of installed packages without their tests, in the order of their paths.

    Raises:
        UserError: a package is not installed, or there is no file.
    """
    found: dict[str, Path] = {}
    for package in packages:
        spec = None if "." in package or not package.isidentifier() else _spec(package)
        if spec is None:
            raise UserError(
                f"--data.packages {package}: no such package is installed; install it, or name "
                "others"
            )
        for folder in spec.submodule_search_locations or ():
            for path in Path(folder).rglob("*.py"):
                inside = path.relative_to(folder)
                if not is_test(inside):
                    found.setdefault(f"{package}/{inside.as_posix()}", path)
        if not spec.submodule_search_locations and str(spec.origin).endswith(".py"):
            found.setdefault(f"{package}.py", Path(str(spec.origin)))
    if not found:
        raise UserError(
            f"--data.packages {' '.join(packages)}: no Python file in them; name other packages"
        )
    return [found[name] for name in sorted(found)]


def _spec(package: str) -> Any:
    try:
        return importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None


def _packages(config: CorpusConfig) -> Iterator[bytes]:
    for path in python_files(config.packages):
        yield _bytes(path)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise _too_long(str(path))
        return data
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct that") from None


def _too_long(where: str) -> UserError:
    return UserError(
        f"{where}: is one document of more than {LONGEST >> 20} MiB; write it as JSONL, a line a "
        "shorter document"
    )


def text_files(path: Path | None) -> list[Path]:
    """The files of a `--data.path`, in the order of their paths.

    Raises:
        UserError: there is none.
    """
    kinds = ", ".join(SUFFIXES)
    if path is None:
        raise UserError("--data.source text needs --data.path, a file or a folder of texts")
    path = path.expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"--data.path {path}: no {kinds} file in it; give another folder")
        return files
    if not path.is_file():
        raise UserError(f"--data.path {path} does not exist; give a file or a folder of texts")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--data.path {path}: cannot be read; give {kinds}, or a folder of them")
    return [path]


def _text(config: CorpusConfig) -> Iterator[bytes]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in text_files(config.path):
        yield from readers[path.suffix.lower()](path)


def _read_txt(path: Path) -> Iterator[bytes]:
    yield _bytes(path)


def _read_jsonl(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(LONGEST + 1), b"")
            for number, line in enumerate(lines, 1):
                if len(line) > LONGEST:
                    raise _too_long(f"{path}, line {number}")
                if line.strip():
                    yield _of_row(line, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct that") from None


def _of_row(line: bytes, where: str) -> bytes:
    """The text of a JSON object; text that is not UTF-8 is kept for `documents` to count."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return line
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({one_line(error, 80)}); correct it") from None
    text = row.get(COLUMN) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: has no "{COLUMN}", a string; add it, or leave the line out')
    return text.encode("utf-8", "surrogatepass")  # a lone surrogate is then no UTF-8


def _read_parquet(path: Path) -> Iterator[bytes]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs the package `pyarrow`; pip install pyarrow, or give a "
            "JSONL file"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        if COLUMN not in (names := file.schema_arrow.names):
            raise UserError(
                f"{path}: no column {COLUMN!r}; it has {', '.join(names[:8])}; rename the column"
            )
        for batch in file.iter_batches(columns=[COLUMN]):
            for value in batch.column(0).to_pylist():
                if value is not None and not isinstance(value, str):
                    raise UserError(f"{path}: column {COLUMN!r} holds no strings; give another")
                yield (value or "").encode("utf-8", "surrogatepass")
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types; all mean the same to the user
        raise UserError(
            f"{path}: cannot be read as parquet ({type(error).__name__}: {one_line(error, 100)}); "
            "write the file again"
        ) from None


def _hub(config: CorpusConfig) -> Iterator[bytes]:
    name = f"{config.repository} {config.subset}"
    rows = hub_table.stream(
        *(config.repository, config.subset or None, "train", config.revision),
        place=name,
        advice="use --data.source packages or text; check --data.repository and --data.subset too",
    )
    for row in rows:
        if COLUMN not in row:
            raise UserError(
                f"{name}: its rows have no column {COLUMN!r}, but {one_line(', '.join(row), 120)}; "
                "give another --data.repository"
            )
        yield str(row[COLUMN]).encode("utf-8", "surrogatepass")


SOURCES: dict[str, Callable[[CorpusConfig], Iterator[bytes]]] = {
    "packages": _packages,
    "text": _text,
    "hub": _hub,
}
OF_SOURCE = {
    "packages": "packages",
    "path": "text",
    "repository": "hub",
    "subset": "hub",
    "revision": "hub",
}
UNIQUE = ("packages",)  # sources without repeated documents; others may be too large to check


def documents(config: CorpusConfig, counts: Counts | None = None) -> Iterator[Document]:
    """The documents of a corpus, in its order.

    Args:
        config: the options of the corpus.
        counts: the counts, updated as documents are read; None: none are kept.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    counts = Counts() if counts is None else counts
    seen: set[bytes] = set()
    for data in SOURCES[config.source](config):
        if config.documents is not None and counts.documents == config.documents:
            return
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            counts.not_utf8 += 1
            continue
        if not text.strip():
            counts.empty += 1
            continue
        sha = hashlib.sha256(data).digest()
        if config.source in UNIQUE:
            if sha in seen:
                counts.duplicates += 1
                continue
            seen.add(sha)
        counts.documents += 1
        counts.num_bytes += len(data)
        yield Document(text, sha)


class Known(NamedTuple):
    """The properties of a corpus that are known before it is tokenised.

    Args:
        config: the options of the corpus, with its revision and its digest.
        counts: the counts of its documents; None: it is streamed, and they have not been counted.
    """

    config: CorpusConfig
    counts: Counts | None


def identify(config: CorpusConfig) -> Known:
    """Read a corpus once for its digest; a corpus at the Hub is identified by its commit.

    Raises:
        UserError: it cannot be read, does not have the given `digest`, or one of its two parts has
            no document.
    """
    check(config)
    if config.source == "hub":
        commit = _commit(config)
        said = [config.repository, config.subset, commit, config.documents]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        found, counts = dataclasses.replace(config, revision=commit), None
    else:
        counts, whole, held_out = Counts(), hashlib.sha256(), 0
        for document in documents(config, counts):
            whole.update(document.sha)
            held_out += is_validation(document.sha, config.validation)
        digest, found = whole.hexdigest(), config
        if not held_out or held_out == counts.documents:
            what = "validation" if not held_out else "training"
            raise UserError(
                f"the corpus has no {what} document ({counts.words()}); give more documents, or "
                f"another --data.validation than {config.validation:g}"
            )
    if config.digest is not None and config.digest != digest:
        raise UserError(
            f"the corpus has sha256 {digest[:16]}…, not --data.digest {config.digest[:16]}…: its "
            "files are others; leave --data.digest out to train on these (a config.json that was "
            "given has it: set data.digest to null in a copy)"
        )
    return Known(dataclasses.replace(found, digest=digest), counts)


def check(config: CorpusConfig) -> None:
    """Raise `UserError` for options of another source."""
    for name, source in OF_SOURCE.items():
        field = next(f for f in dataclasses.fields(config) if f.name == name)
        if source != config.source and getattr(config, name) != field.default:
            raise UserError(
                f"--data.{name} is of --data.source {source}, and the source is {config.source}; "
                "leave one of them out"
            )
    if config.source == "packages" and not config.packages:
        raise UserError("--data.packages is empty; name installed packages")


def _commit(config: CorpusConfig) -> str:
    """The commit of a data set at the Hub."""
    try:
        import huggingface_hub

        info = huggingface_hub.HfApi().dataset_info(
            config.repository, revision=config.revision, timeout=10
        )
        return str(info.sha)
    except Exception as error:
        raise UserError(
            f"--data.repository {config.repository}: the Hub gave no such data set "
            f"({type(error).__name__}: {one_line(error, 120)}); check the name and the network, or "
            "use --data.source packages"
        ) from None
