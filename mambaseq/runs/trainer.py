"""Lightning's trainer for a run: settings checked, our checkpoint writer and progress bars added."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator

import lightning
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mambaseq.checkpoints.lightning_plugin import AtomicCheckpointIO
from mambaseq.errors import ConfigError, cut_list
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.config import RunConfig
from mambaseq.runs.processes import check_devices
from mambaseq.tasks.bar import Bar
from mambaseq.tasks.callbacks import NEVER
from mambaseq.tasks.replicated import Replicated

_DECIDED = (  # settings of the trainer that a run needs for itself: the value that is refused (None: any), and why
    ("default_root_dir", None, "a run writes to its own folder, --out"),
    ("logger", False, "a run draws its curves from its logs"),
    ("enable_checkpointing", False, "a run writes checkpoints of its own, so that it can always be resumed"),
)


def make_trainer(
    settings: RunConfig,
    folder: RunFolder,
    callbacks: list[lightning.Callback],
    loggers: list[Logger],
    progress: bool,
) -> lightning.Trainer:
    """Lightning's trainer as configured, with our callbacks, loggers and checkpoint writer added.

    Raises ConfigError when Lightning refuses the settings, or would train in copies of this process.
    """
    options = dict(settings.trainer)
    for key, taken, why in _DECIDED:
        if (options.get(key) is False) if taken is False else options.get(key) is not None:
            raise ConfigError(f"trainer.{key} is {options[key]}, but {why}. Leave trainer.{key} out.")
    if isinstance(every := options.get("accumulate_grad_batches"), int) and every < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches must be at least 1; it is {every}.")
    options |= check_devices(options)
    given = options.pop("logger", None)
    given = [] if given in (None, True, False) else list(given) if isinstance(given, list | tuple) else [given]
    own = options.pop("callbacks", None) or []
    own = own if isinstance(own, list) else [own]
    plugins = options.pop("plugins", None) or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if options.get("enable_progress_bar") is None:
        options["enable_progress_bar"] = progress
    if options["enable_progress_bar"]:
        callbacks = [*callbacks, Bar()]
    # the user's callbacks come first, so that checkpoints hold their current state
    options |= {"logger": [*loggers, *given] or False, "callbacks": [*own, *callbacks]}
    if settings.settings["checkpoint"]["val_every_n_tokens"]:  # `RunCheckpoints` says when
        options |= {"val_check_interval": NEVER, "check_val_every_n_epoch": None}
    options |= {"plugins": [*plugins, AtomicCheckpointIO()], "default_root_dir": str(folder.path)}
    defaults = inspect.signature(lightning.Trainer).parameters
    given = [f"trainer.{key}" for key, value in settings.trainer.items() if value != defaults[key].default]
    with explained("The settings under trainer cannot be used here", f" Given are {cut_list(given)}."), _our_ddp():
        trainer = lightning.Trainer(**options)
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # Lightning's choice in a notebook with GPUs
        raise ConfigError(
            "trainer.strategy would train in copies of this process (spawn or fork), whose weights never come back to "
            "it. Set trainer.strategy to ddp or fsdp2, which start the command again on each device; in a notebook set "
            "trainer.devices to 1, or run `mambaseq fit` in a terminal."
        )
    return trainer


@contextlib.contextmanager
def _our_ddp() -> Iterator[None]:
    """Lightning's names of DDP, one of which it takes for several devices if none is given, make ours."""
    theirs = {name: entry for name, entry in StrategyRegistry.items() if entry["strategy"] is DDPStrategy}
    StrategyRegistry.update({name: entry | {"strategy": Replicated} for name, entry in theirs.items()})
    try:
        yield
    finally:
        StrategyRegistry.update(theirs)


@contextlib.contextmanager
def explained(what: str, more: str = "") -> Iterator[None]:
    """Turn the errors of Lightning and torch about a setting into ConfigError."""
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split()).rstrip('.')}.{more}") from error


@contextlib.contextmanager
def misconfigured(what: str) -> Iterator[None]:
    """Turn Lightning's MisconfigurationException, which names the setting, into ConfigError; no other error."""
    try:
        yield
    except MisconfigurationException as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split()).rstrip('.')}. See trainer in config.yaml.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Lightning's advice that does not apply here."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*ended before the epoch ended and your dataloader is not resumable.*",  # ours is, by its sampler
            ".*is smaller than the logging interval.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*Experiment logs directory .* exists and is not empty.*",
            ".*treespec, LeafSpec.*",
            ".*isinstance.treespec.*",
            ".*GPU available but not used.*",
            ".*have no `val_dataloader`.*",  # `fit` says so itself
            ".*across ranks is zero.*",
            ".*returned a view tensor.*",  # of sharded layers, whose outputs nothing is added to in place
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
