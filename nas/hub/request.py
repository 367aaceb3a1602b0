"""What is to be pushed to the Hugging Face hub, and what became of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nas.errors import UserError
from nas.networks.hub import HUB, bad_name


@dataclass(frozen=True)
class PushRequest:
    """What is to be pushed."""

    run: str
    """A folder with arch.json, model.safetensors and model.onnx, or one whose best/ has them."""
    repository: str
    """OWNER/NAME; made where there is none."""
    private: bool = False
    """Whether a repository that is made is private."""
    revision: str | None = None
    """The branch, made where there is none; None: main."""

    def check(self) -> None:
        """Raises UserError where the hub has no such names."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        name = self.repository
        if name.startswith(HUB):
            raise UserError(f"{name}: give the repository as {name.removeprefix(HUB)}")
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"{name}: {bad_name(error)}") from None
        if "/" not in name:
            raise UserError(f"{name}: give the repository with its owner, as in OWNER/{name}")
        if self.revision is not None and not re.fullmatch(r"[\w.][\w./-]*", self.revision):
            raise UserError(f"--revision {self.revision!r}: give the name of a branch, such as v1")


@dataclass(frozen=True)
class PushedFile:
    """A file of a repository."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What an upload will do, before it does."""

    request: PushRequest
    files: tuple[PushedFile, ...]
    """In the order of their names."""
    made: bool
    """Whether the repository is made."""
    private: bool
    replaced: tuple[str, ...]
    """Names of files that are there and get another content, or may."""
    removed: tuple[str, ...]
    """Names of files of an earlier push that are not in this one."""

    @property
    def lines(self) -> list[str]:
        """What will be done, in words."""
        branch = f", branch {self.request.revision}" if self.request.revision else ""
        seen = "private" if self.private else "public"
        what = f"a new {seen} repository" if self.made else f"a commit to a {seen} repository"
        total = sum(file.bytes for file in self.files) / 1e6
        found = [f"{self.request.repository}{branch}: {what}, {len(self.files)} files, {total:.1f} MB:"]
        found += [f"  {file.name} ({file.bytes / 1e6:.3f} MB)" for file in self.files]
        for verb, names in (("replaces", self.replaced), ("removes", self.removed)):
            if names:
                found.append(f"it {verb} {', '.join(names)}")
        return found


@dataclass(frozen=True)
class PushResult:
    """What was pushed."""

    repository: str
    url: str
    """Of the repository's page."""
    commit: str
    """Its SHA-1."""
    made: bool
    """Whether the repository was made."""
    files: tuple[PushedFile, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields by their names."""
        files = [{"name": file.name, "bytes": file.bytes} for file in self.files]
        return {
            "repository": self.repository,
            "url": self.url,
            "commit": self.commit,
            "made": self.made,
            "files": files,
        }
