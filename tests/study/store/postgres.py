"""A PostgreSQL server of a test's own: on loopback, in a temporary folder, gone afterwards."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path


def programs() -> Path | None:
    """Folder of PostgreSQL's server programs, or None where it is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "pg_ctl").exists()), None)


class Server:
    """A server that can be stopped and started; ``url`` names its only database. Root hands it to the user postgres."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.folder = programs(), folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        self._run("initdb", "--pgdata", folder / "data", "--auth", "trust", "--no-sync", "--username", "normkit")
        self.url = f"postgresql+psycopg2://normkit:secret@127.0.0.1:{self.port}/postgres"

    def _run(self, program: str, *arguments: object) -> None:
        as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*as_user, str(self.programs / program), *map(str, arguments)]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start(self) -> None:
        """Start and wait until it answers."""
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off -c max_connections=200"
        log = self.folder / "log"
        self._run("pg_ctl", "start", "--wait", "--pgdata", self.folder / "data", "--options", options, "--log", log)

    def stop(self) -> None:
        """End at once, as a crash does."""
        self._run("pg_ctl", "stop", "--mode", "immediate", "--pgdata", self.folder / "data")

    def restart(self, away_seconds: float) -> None:
        """Go away for a while."""
        self.stop()
        time.sleep(away_seconds)
        self.start()


@contextlib.contextmanager
def server() -> Generator[Server, None, None]:
    """A running server."""
    folder = Path(tempfile.mkdtemp(prefix="normkit-postgres-"))
    try:
        made = Server(folder)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
