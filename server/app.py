"""Flower's ServerApp: reads the run configuration, runs the rounds, releases the adapter. Started by `flwr run`.

Everything of substance is in `server.rounds`; this file is the door that Flower knows.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server import pulling, rounds, settings
from server.alone import Occupied, alone
from server.events import Events
from server.strategy import plain

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the rounds of this configuration; a fault ends the run with one plain sentence in the log."""
    pulling.mend()
    Events.run = int(context.run_id)
    chosen = settings.read(context.run_config)
    root = Path(chosen.checkpoint_dir).expanduser()
    try:
        with alone(root):
            _federate(grid, chosen, root)
    except Occupied as error:  # for whoever follows this run; the events of the one that is at work say another number
        Events(root).add("refused", reason=plain(str(error)))
        raise


def _federate(grid: Grid, chosen: settings.Settings, root: Path) -> None:
    try:
        rounds.federate(grid, chosen)
    except Exception as error:  # told where `afya-server rounds` looks; Flower marks the run as failed
        Events(root).add("failed", reason=plain(str(error) or repr(error)))
        raise
