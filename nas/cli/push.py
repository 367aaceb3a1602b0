"""`vitnas push`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.options import Json, Quiet, Verbose
from nas.errors import UserError

if TYPE_CHECKING:
    from nas.hub.request import Plan

app = typer.Typer()


@app.command(
    short_help="Upload a network to the Hugging Face hub.",
    epilog="Example:  vitnas push runs/pets me/pets --private\n\nExample:  vitnas push runs/pets me/pets --out look",
)
def push(
    run: Annotated[str, typer.Argument(help="A run's folder, or one that `vitnas export` has written.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME; made where there is none.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; made where there is none.  [default: the main one]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Upload nothing: write the files into this folder, to look at them.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the upload.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Upload a trained network to the Hugging Face hub in one commit: its ONNX files, safetensors, arch.json, how its
    images are prepared (also in timm's form), labels, and a page with its accuracy and latency.

    It shows what it will upload, and asks. Names of this machine's folders, users and hosts are left out. The token is
    that of HF_TOKEN or of `hf auth login`. `hf-hub:REPO` then names the network in every command.

    Exit codes: 0 done, 1 it was not confirmed, 2 bad input, or the hub does not take it, 130 Ctrl-C.
    """
    from dataclasses import asdict

    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from nas.cli.progress import load

    load("nas.hub.push", quiet)
    from nas.hub.folder import write_to
    from nas.hub.push import push as run_push
    from nas.hub.request import PushRequest

    request = PushRequest(run, repository, private, revision)
    request.check()
    if out is not None:
        files = write_to(request, out)
        if as_json:
            print(json.dumps({"folder": str(out), "files": [asdict(file) for file in files]}))
        elif not quiet:
            print(f"{out}: {len(files)} files as `vitnas push` would upload them; nothing was uploaded")
        return
    asking = sys.stdin.isatty() and not yes
    if not asking and not yes:
        raise UserError("nobody can be asked whether to upload: add --yes, or look first with --out DIR")
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()

    def confirm(plan: Plan) -> bool:
        if asking or not quiet:
            print("\n".join(plan.lines), file=sys.stderr)
        return not asking or typer.confirm("upload?", err=True)

    result = run_push(request, confirm)
    if result is None:
        print("nothing was uploaded", file=sys.stderr)
        raise typer.Exit(1)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print(f"{result.url}: commit {result.commit[:7]}; hf-hub:{result.repository} names it in every command")
