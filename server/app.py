"""Flower's ServerApp: reads the run configuration, runs the rounds, releases the adapter. Started by `flwr run`.

Everything of substance is in `server.rounds`; this file is the door that Flower knows.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server import pulling, rounds, settings
from server.alone import alone
from server.events import Events
from server.strategy import plain

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the rounds of this configuration; a fault ends the run with one plain sentence in the log."""
    pulling.mend()
    chosen = settings.read(context.run_config)
    root = Path(chosen.checkpoint_dir).expanduser()
    with alone(root):  # a refusal here is not written into the events of the run that is at work
        try:
            rounds.federate(grid, chosen)
        except Exception as error:  # told where `afya-server rounds` looks; Flower marks the run as failed
            Events(root).add("failed", reason=plain(str(error) or repr(error)))
            raise
