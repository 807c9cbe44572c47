"""Flower's SuperNode with the patience that a clinic's line needs: `flower-supernode` with three things changed.

Flower 1.41 sends a call again without end when a connection breaks, except when the error names TLS; a line that is
cut or silent while TLS greets does, and then the SuperNode throws the message away or ends. Here only a certificate
that cannot be believed is a reason to give up. And a clinic counts as gone, with its round lost, after a minute
without a sign of life; here after three, which is what the SuperLink grants a half-sent reply. And where the
server no longer accepts the clinic's key Flower just ends; here a sentence says so. None of it has a setting in
Flower, so it is replaced by name, in the one version that was read. Not here: chunks that are small against
such a line and sent one by one, which Flower's environment sets (`client.node`), and answers lost on the way
(`server.again`).
"""

import functools
import sys
from importlib.metadata import version
from typing import Any

FLWR = "1.41.0"  # the version whose names are replaced here
AWAY_SECONDS = 180  # how long a line may be down in the middle of a round
REFUSED = (
    "The server does not accept this clinic's key any more, so taking part ends here; afya-client doctor says why."
)


def patient(invoker: Any) -> Any:
    """Flower's RetryInvoker, told to give up on a broken connection only where a certificate is not believed."""
    import httpx

    flowers = invoker.should_giveup

    def gives_up(error: Exception) -> bool:
        if isinstance(error, httpx.TransportError):
            return "certificate" in str(error).lower()
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
            _say_refused()  # before Flower is asked: at 401 it ends this process and does not come back
        return flowers(error)

    invoker.should_giveup = gives_up
    return invoker


@functools.cache
def _say_refused() -> None:
    """Say it once, whichever of the calls learns of it first."""
    print(REFUSED, file=sys.stderr, flush=True)


def mend() -> None:
    """Replace in Flower's connection what this module is about."""
    from flwr.common.constant import HEARTBEAT_PATIENCE
    from flwr.supernode import fleet_http_connection as connection

    make = connection.make_simple_http_retry_invoker
    connection.make_simple_http_retry_invoker = lambda: patient(make())
    # What is promised to the SuperLink, which waits for twice that; how often the heart beats stands elsewhere.
    connection.HEARTBEAT_DEFAULT_INTERVAL = AWAY_SECONDS // HEARTBEAT_PATIENCE


def main() -> None:
    """Run the SuperNode with the arguments of `flower-supernode`."""
    if version("flwr") != FLWR:
        sys.exit(f"flwr is {version('flwr')}, this version of Afya needs {FLWR}; run pip install flwr=={FLWR}")
    mend()
    from flwr.supernode.cli import flower_supernode

    flower_supernode()


if __name__ == "__main__":
    main()
