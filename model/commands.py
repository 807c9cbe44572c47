"""The group that every command line of a clinic is: what any of its commands may meet becomes one plain sentence."""

from typing import Any

import click

from model.files import HomeError


class Commands(click.Group):
    """A click group whose commands may ask for the clinic's folder where there can be none."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; HomeError becomes a sentence and exit code 1."""
        try:
            return super().invoke(ctx)
        except HomeError as error:
            raise click.ClickException(str(error)) from error
