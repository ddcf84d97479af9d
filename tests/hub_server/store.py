"""What the Hub holds: repositories of commits of files, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any


class HubError(Exception):
    """An answer that is an error: HTTP status, the Hub's code for its kind, and a sentence."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class File:
    """A file in a commit."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """What git calls it; with LFS, git holds a pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass(frozen=True)
class Commit:
    """All files by path, and where they came from."""

    id: str
    title: str
    user: str
    date: str
    parent: str | None
    files: dict[str, File]

    def entries(self) -> dict[str, dict[str, Any]]:
        """What the Hub says of each folder and file, by path."""
        parts = [path.split("/") for path in self.files]
        folders = sorted({"/".join(part[:end]) for part in parts for end in range(1, len(part))})
        last = {"lastCommit": {"id": self.id, "title": self.title, "date": self.date}}
        entries: dict[str, dict[str, Any]] = {
            path: {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
            for path in folders
        }
        for path, file in sorted(self.files.items()):
            lfs = {"lfs": {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}} if file.lfs else {}
            entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content), **last, **lfs}
        return entries


@dataclass
class Repo:
    """A repository: `kind` is model, dataset or space; branches (pull requests among them) and tags name commits."""

    kind: str
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], title: str, user: str) -> Commit:
        parent = self.branches.get(branch)
        what = repr((self.name, parent, title, len(self.commits), sorted((path, f.oid) for path, f in files.items())))
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        made = Commit(hashlib.sha1(what.encode()).hexdigest(), title, user, date, parent, files)
        self.commits[made.id], self.branches[branch] = made, made.id
        return made

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag or commit id names."""
        found = self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)
        if found is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def history(self, revision: str) -> Iterator[Commit]:
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent or "")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content: what a clone would hold."""
        return {path: file.content for path, file in self.at(revision).files.items()}
