"""Real text that a Debian machine with Python already has, by domain. Knows files and markup, not tokens.

Every file belongs to one split, decided by a hash of its name, so a held-out file is never trained on.
"""

import gzip
import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from model.training.errors import TrainingDataMissing

MAX_FILE_CHARS = 60_000  # one large file must not become the domain
MIN_FILE_CHARS = 800


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one kind: where they lie, which of them count, how they become plain text."""

    root: Path
    pattern: str
    read: Callable[[Path], str]
    package: str  # what to install when the folder is missing
    licence: str


@dataclass(frozen=True, slots=True)
class Domain:
    """A kind of text. Untrained domains are for evaluation only: no variant ever trains on them."""

    name: str
    sources: tuple[Source, ...]
    trained: bool = True


def read_plain(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="strict")


def read_html(path: Path) -> str:
    parser = _TextOfHtml()
    parser.feed(path.read_text(encoding="utf-8", errors="strict"))
    return re.sub(r"\n{3,}", "\n\n", "".join(parser.parts)).strip()


def read_manpage(path: Path) -> str:
    """A manual page as a terminal shows it, without overstriking or hyphenation."""
    groff = shutil.which("groff")
    if groff is None:
        raise TrainingDataMissing("manual pages need groff: apt-get install groff-base")
    source = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if source.startswith(b".so "):
        return ""  # a link to another page
    shown = subprocess.run(  # noqa: S603 - a fixed program, the page on its standard input
        [groff, "-Kutf8", "-Tutf8", "-P-cbou", "-man", "-rHY=0", "-rLL=100n"],
        input=source,
        capture_output=True,
        check=False,
        timeout=20,
    )
    return shown.stdout.decode("utf-8", errors="replace").strip()


def _manpages(language: str) -> Source:
    return Source(
        Path(f"/usr/share/man/{language}"),
        "**/*.gz",
        read_manpage,
        f"manpages-{language}",
        "GPL-2+ and others",
    )


def _handbook(locale: str) -> Source:
    root = Path(f"/usr/share/doc/debian-handbook/html/{locale}")
    return Source(root, "*.html", read_html, "debian-handbook", "GPL-2+ or CC-BY-SA-3.0")


DOMAINS: tuple[Domain, ...] = (
    Domain(
        "english",
        (
            _handbook("en-US"),
            Source(
                Path("/usr/share/doc/postgresql-doc-15/html"),
                "*.html",
                read_html,
                "postgresql-doc-15",
                "PostgreSQL",
            ),
        ),
    ),
    Domain(
        "python",
        (Source(Path(sysconfig.get_paths()["stdlib"]), "**/*.py", read_plain, "python3", "PSF-2.0"),),
    ),
    Domain(
        "c",
        (Source(Path("/usr/include"), "**/*.h", read_plain, "libc6-dev linux-libc-dev", "LGPL-2.1+, GPL-2"),),
    ),
    Domain("german", (_manpages("de"), _handbook("de-DE"))),
    Domain("french", (_manpages("fr"), _handbook("fr-FR"))),
    Domain(
        "perl",
        (Source(Path("/usr/share/perl"), "**/*.pod", read_plain, "perl-doc", "Artistic or GPL-1+"),),
    ),
    Domain("spanish", (_manpages("es"), _handbook("es-ES")), trained=False),
    Domain(
        "rust-books",
        (
            Source(
                Path("/usr/share/doc/rust-doc/html"),
                "*book*/**/*.html",
                read_html,
                "rust-doc",
                "MIT or Apache-2.0",
            ),
            Source(
                Path("/usr/share/doc/rust-doc/html"),
                "reference/**/*.html",
                read_html,
                "rust-doc",
                "MIT or Apache-2.0",
            ),
        ),
        trained=False,
    ),
    Domain(
        "javascript",
        (
            Source(
                Path("/usr/lib/node_modules"), "**/*.js", read_plain, "nodejs and npm", "Artistic-2.0, MIT"
            ),
            Source(Path("/usr/share/nodejs"), "**/*.js", read_plain, "npm", "Artistic-2.0, MIT"),
        ),
        trained=False,
    ),
)


@dataclass(frozen=True, slots=True)
class Document:
    """One file's text and where it came from."""

    path: Path
    split: str  # train, validation or heldout
    text: str
    sha256: str


def split_of(path: Path) -> str:
    """The split of a file, by its name: one tenth held out, one tenth for validation."""
    bucket = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4], "big") % 10
    return {0: "heldout", 1: "validation"}.get(bucket, "train")


def documents(domain: Domain, split: str, seed: int) -> Iterator[Document]:
    """The domain's files of one split in an order that only the seed decides.

    Files without readable text are passed over: duplicates, other encodings, nearly empty ones.
    Raises TrainingDataMissing when no source of the domain is installed.
    """
    found = [source for source in domain.sources if source.root.is_dir()]
    if not found:
        wanted = " or ".join(source.package for source in domain.sources)
        raise TrainingDataMissing(f"no text for domain {domain.name!r}: apt-get install {wanted}")
    chosen = [
        (path, source)
        for source in found
        for path in source.root.glob(source.pattern)
        if path.is_file() and not path.is_symlink() and split_of(path) == split
    ]
    chosen.sort(key=lambda item: hashlib.sha256(f"{seed}{item[0]}".encode()).digest())
    seen: set[str] = set()
    for path, source in chosen:
        try:
            text = source.read(path)[:MAX_FILE_CHARS]
        except (UnicodeDecodeError, subprocess.TimeoutExpired, gzip.BadGzipFile):
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        if len(text) >= MIN_FILE_CHARS and digest not in seen:
            seen.add(digest)
            yield Document(path, split, text, digest)


class _TextOfHtml(HTMLParser):
    """Text of a page with paragraphs apart, without scripts, styles and navigation."""

    SILENT = frozenset({"script", "style", "head", "nav"})
    BREAKS = frozenset({"p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "br", "dt", "dd", "table"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self.SILENT
        self._verbatim += tag == "pre"
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in self.SILENT
        self._verbatim -= tag == "pre"
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))
