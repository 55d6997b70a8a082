"""`rayndom export TARGET --to DIR`: a folder for use elsewhere."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UserError
from models.file_content import folder_here
from orchestration import console
from orchestration.commands.command import Command

if TYPE_CHECKING:
    from orchestration.trained_models.targets import Target

SCHEME = "hf://"


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="trained recipe, run (16 digits), MLflow run id (32 digits), exported folder, or models:/NAME@ALIAS")
    parser.add_argument("--to", required=True, help="folder to export to, or hf://OWNER/NAME of the Hugging Face hub")
    parser.add_argument("--force", action="store_true", help="replace another exported model in that folder")
    parser.add_argument("--register", metavar="NAME[@ALIAS]", help="also register the model in MLflow under this name")


def _run(arguments: argparse.Namespace) -> None:
    from orchestration.exporting.export import export_target
    from orchestration.home import Home
    from orchestration.recipes import is_recipe
    from orchestration.trained_models.targets import refuse_external, resolve_target

    if arguments.register is not None:
        from orchestration.exporting.registration import checked_registration

        checked_registration(arguments.register)  # before anything is made
    if arguments.to.startswith(SCHEME):
        from orchestration.trained_models.hub import repository_of

        repository_of(arguments.to)
        if arguments.register is not None:
            raise UserError("--register is for a folder: export to the hub and to a folder one after the other")
    home = Home.locate(arguments.home)
    refuse_external(
        arguments.target,
        home,
        "an export is weights with a configuration that the network is built from, and it has none; its code and weights are enough",
    )
    target = resolve_target(arguments.target, home)
    if arguments.to.startswith(SCHEME):
        _push(arguments, target)
        return
    folder = export_target(target, folder_here(arguments.to, "--to"), replace=arguments.force)
    registered = None
    if arguments.register is not None:
        from orchestration.exporting.registration import register_model

        registered = register_model(home, target, folder, arguments.register)
        console.say(f"registered as {registered}")
    if is_recipe(arguments.to):
        console.warn(f"{arguments.to} is a recipe too: a command that names it here now means this folder")
    console.result({"folder": str(folder), "registered": registered})
    console.say(f"exported to {folder}: weights, configuration, card; checked that it loads and predicts")


def _push(arguments: argparse.Namespace, target: Target) -> None:
    """Put a model on the Hugging Face hub, after the checks that every export has."""
    from orchestration.exporting.export import export_target
    from orchestration.exporting.hub_upload import push_model

    with tempfile.TemporaryDirectory() as scratch:
        address = push_model(export_target(target, Path(scratch, "model")), arguments.to)
    console.result({"address": address})
    console.say(f"exported to {address}: weights, configuration, card; checked that it loads and predicts")
    console.say(f"next:  rayndom evaluate {arguments.to}")


EXPORT = Command(
    "export",
    "export a trained model to a folder that loads without Ray or MLflow",
    (
        "rayndom export 5a632dea00def935 --to exports/ctrw",
        "rayndom export RUN_ID --to DIR --register ctrw@champion",
        "rayndom export RUN_ID --to hf://OWNER/NAME",
    ),
    _add,
    _run,
)
