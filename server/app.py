"""Flower's ServerApp: reads the run configuration, runs the rounds, releases the adapter. Started by `flwr run`.

Everything of substance is in `server.rounds`; this file is the door that Flower knows.
"""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server import rounds, settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the rounds of this configuration; a fault ends the run with one plain sentence in the log."""
    rounds.federate(grid, settings.read(context.run_config))
