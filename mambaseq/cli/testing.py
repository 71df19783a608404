"""The work of `mambaseq test` and `mambaseq validate`."""

from __future__ import annotations

import logging
from typing import Any

from mambaseq.checkpoints.export import load_model
from mambaseq.cli.config import RunConfig
from mambaseq.cli.training import make_trainer
from mambaseq.errors import UserError
from mambaseq.reporting.pictures import confusion_matrix, save_png
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.task import Task


def evaluate_run(settings: RunConfig, folder: RunFolder, command: str, progress: bool) -> dict[str, Any]:
    """See `mambaseq.cli.evaluate.evaluate`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    loaded = load_model(folder.path)
    data = settings.make_data()
    data.setup()
    if (data.validation() if command == "validate" else data.test()) is None:
        raise UserError(
            f"The dataset {settings.settings['data']['name']!r} has no {command} set; nothing was evaluated."
        )
    task = Task(loaded.model, metrics=settings.make_metrics(data))
    trainer = make_trainer(settings, folder, [], [], progress)
    if trainer.is_global_zero:
        step = "an unknown step" if loaded.card.step is None else f"step {loaded.card.step}"
        print(f"{folder.path}: the weights of {step} ({loaded.source.relative_to(folder.path)})", flush=True)
    method = trainer.validate if command == "validate" else trainer.test
    method(task, datamodule=settings.make_datamodule(data), verbose=False)
    results: dict[str, Any] = {**task.results, **task.tables}
    if not trainer.is_global_zero:
        return results
    folder.update_results(**results)
    for name, table in task.tables.items():
        if len(table) != len(data.class_names):
            continue  # not a table of classes
        save_png(folder.path / f"{name.replace('/', '_')}.png", confusion_matrix(table, data.class_names))
    return results
