"""`vitnas storage`."""

from __future__ import annotations

import json
import shlex
import socket
from typing import Annotated

import typer

from nas.cli.options import Json, Quiet, Verbose

app = typer.Typer(no_args_is_help=True)


@app.callback()
def storage() -> None:
    """Share one storage among hundreds of workers."""


@app.command(
    short_help="Put a gRPC proxy in front of a database or a journal.",
    epilog="Example:  vitnas storage serve postgresql://user:password@host/database --host 0.0.0.0",
)
def serve(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="postgresql://, mysql:// or sqlite:///, or a journal file.", envvar="VITNAS_STORAGE"
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; anyone who reaches it can change the studies.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.")] = 13000,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Serve a storage to workers, which name it --storage grpc://HOST:PORT.

    Ctrl-C ends it; workers wait 10 minutes for it to come back. Exit codes: 0 ended, 2 bad input.
    """
    from nas.errors import UserError
    from nas.files import tell
    from nas.study.database import SCHEME, is_proxy, joined, need_grpc
    from nas.text import mask_url

    if not url:
        raise UserError("the URL is empty: give a database's, or a journal file")
    if is_proxy(url):
        raise UserError(f"{mask_url(url)} is a proxy already: give the database or the journal that it is to serve")
    need_grpc("vitnas storage serve")
    from nas.study.serve import serve as serve_storage

    def started(port: int) -> None:
        every, alone = host in ("0.0.0.0", "::"), host == "localhost" or host.startswith("127.") or host == "::1"
        address = SCHEME + joined(socket.gethostname() if every else host, port)
        if as_json:
            print(json.dumps({"storage": mask_url(url), "address": address}), flush=True)
            return
        print(f"{mask_url(url)} is served at {address} (Ctrl-C ends it)", flush=True)
        if not quiet:
            print(f"workers: vitnas search ... --storage {shlex.quote(address)}", flush=True)
        if not alone:
            tell("it has no login and no encryption: whoever reaches this address can read and change the studies")

    serve_storage(url, host, port, started)
