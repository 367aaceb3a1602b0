"""`vitnas push`: a network's folder becomes a commit to a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.files import scratch
from nas.hub.folder import PAGE, write_repository
from nas.hub.request import Plan, PushRequest, PushResult
from nas.networks.hub import ARCH, BESIDE, CONFIG, WEIGHTS, told

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OURS = (ARCH, CONFIG, WEIGHTS, PAGE, *BESIDE, *(f"model{each}.onnx" for each in ("", ".int8", ".fp16", ".bf16")))
"""What an earlier push may have left."""


def push(request: PushRequest, confirm: Callable[[Plan], bool] = lambda _: True) -> PushResult | None:
    """Make a repository of a run's network, or commit to one. The token is that of huggingface_hub: HF_TOKEN, or what
    `hf auth login` has kept.

    Args:
        confirm: called before anything is changed on the hub; where it says no, nothing is.

    Returns:
        What was pushed; None where it was not confirmed.

    Raises:
        UserError: as `PushRequest.check` and `write_repository`, no token, or a hub that does not take the upload.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    request.check()
    api = HfApi(token=True)
    with scratch() as folder:
        files = tuple(write_repository(request, folder))
        made = ""
        try:
            there = _files_there(api, request)
            names = {file.name for file in files}
            plan = Plan(
                request,
                files,
                made=there is None,
                private=request.private if there is None else there.private,
                replaced=tuple(sorted(names & there.names)) if there else (),
                removed=tuple(sorted((set(OURS) & there.names) - names)) if there else (),
            )
            if request.private and not plan.private:
                raise UserError(
                    f"{request.repository} is public already: make it private on its page, or leave out --private"
                )
            if not confirm(plan):
                return None
            if plan.made:
                api.create_repo(request.repository, private=request.private)
                made = "; the repository was made, and is empty"
            if request.revision is not None:
                api.create_branch(request.repository, branch=request.revision, exist_ok=True)
            added = [CommitOperationAdd(file.name, folder / file.name) for file in files]
            with _without_xet():
                for each in added:  # in this thread, which Ctrl-C ends: a commit's own threads go on
                    api.preupload_lfs_files(request.repository, [each], revision=request.revision, free_memory=False)
                commit = api.create_commit(
                    request.repository,
                    [*added, *(CommitOperationDelete(name) for name in plan.removed)],
                    commit_message=f"Push with vitnas {version('vitnas')}",
                    revision=request.revision,
                )
        except UserError:
            raise
        except Exception as error:  # the hub's client raises what its many layers do
            why = told(error)
            again = ": the same command tries again" if why.passing else ""
            raise UserError(f"could not push to {request.repository} ({why}){made}{again}") from None
    return PushResult(request.repository, f"{api.endpoint}/{request.repository}", commit.oid, plan.made, files)


@contextmanager
def _without_xet() -> Iterator[None]:
    """Upload by LFS, as with HF_HUB_DISABLE_XET: the client of Xet waits for a hub that has no Xet without an end, in
    code that no Ctrl-C reaches."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@dataclass(frozen=True)
class _There:
    """A repository as it is. names: of its files, in the branch."""

    private: bool
    names: frozenset[str]


def _files_there(api: HfApi, request: PushRequest) -> _There | None:
    """None where there is no such repository. A branch that there is not yet begins as the main one."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(request.repository, revision=request.revision)
    except RevisionNotFoundError:
        info = api.model_info(request.repository)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    return _There(bool(info.private), frozenset(each.rfilename for each in info.siblings or ()))
