"""One sequence whose text goes out while it is generated, and that is continued turn by turn from the state it has."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mambaseq.checkpoints import LoadedModel
from mambaseq.errors import ConfigError
from mambaseq.generation.checks import NotFinite
from mambaseq.generation.decode import stream
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.states import Begun, save_state
from mambaseq.generation.stopping import Search, StopStrings

_PATIENCE = 0.05  # seconds after which text is given out


class Conversation:
    """A sequence and its state.

    settings: those of `mambaseq.generation.decode.stream`. count: tokens of an answer, at most.
    """

    def __init__(self, loaded: LoadedModel, begun: Begun, count: int, settings: dict[str, Any]) -> None:
        assert loaded.tokenizer is not None
        self.loaded, self.begun, self.count, self.settings = loaded, begun, count, settings
        self.tokenizer = loaded.tokenizer
        self._stop: StopStrings = settings.get("stop") or StopStrings([], loaded.tokenizer)

    def say(self, ids: np.ndarray) -> None:
        """The next ids are given."""
        self.begun = self.begun.on(self.loaded.model, ids)

    def answer(self, is_enough: Callable[[], bool] | None = None) -> Iterator[str]:
        """The text that the model adds, as it comes, in whole characters, up to a stop. Ctrl-C ends it, or `is_enough`,
        which is asked after each piece; the sequence then goes on from there."""
        begun = self.begun
        search, told, added = Search(self._stop, begun.ids), 0, []
        stops = list(self.settings.get("stop_ids", ()))
        try:
            for piece in stream(
                self.loaded.model,
                Prompts([begun.ids], begun.told.device),
                self.count,
                condition=begun.under(),
                read=(begun.state, begun.told),
                patience=_PATIENCE,
                **self.settings,
            ):
                ids = piece[0].cpu().numpy()
                if len(ends := np.flatnonzero(np.isin(ids, stops))):
                    ids = ids[: ends[0]]
                added.append(ids)
                search.add(ids.tolist())
                end = len(search.text) - search.held if search.at is None else search.at
                if end > told:
                    yield search.text[told:end]
                    told = end
                if search.at is not None or len(ends) or (is_enough is not None and is_enough()):
                    break
        except NotFinite as error:
            raise NotFinite(f"The model of {self.loaded.source} cannot go on from here. {error}") from error
        except KeyboardInterrupt:
            pass
        search.finish()
        rest = search.text[told : search.at]
        if rest:
            yield rest
        if added:
            # what was generated is read once more, in parts of many tokens: no step had to give its state away
            self.say(self._stop.cut(begun.ids, np.concatenate(added)))


def check_text(loaded: LoadedModel, what: str, remedy: str = "Leave it out.") -> None:
    """Raise ConfigError unless the model generates text, one token at each position."""
    tokenizer, head = loaded.tokenizer, loaded.model.head
    several = bool(getattr(head, "codes", False))
    if tokenizer is None or several or not isinstance(tokenizer.decode(np.zeros(0, dtype=np.int64)), str):
        raise ConfigError(f"{what} is for models of text, and that of {loaded.source.parent} is none. {remedy}")


def keep(begun: Begun, path: str | Path, loaded: LoadedModel) -> None:
    """Save a state for `begin`."""
    save_state(begun, Path(path), digest_of(loaded))


def digest_of(loaded: LoadedModel) -> str:
    """SHA-256 of a model's weights, of all files beside each other."""
    found = hashlib.sha256()
    for path in sorted(loaded.source.parent.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def unmarked(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """The ids of a text that goes on: without a mark of where a document begins."""
    mark = getattr(tokenizer, "bos_id", None)
    return ids[1:] if mark is not None and len(ids) and ids[0] == mark else ids


def converse(conversation: Conversation, lines: Iterable[str], write: Callable[[str], None], begun: bool) -> None:
    """Take turns: each line is given, then the model adds. An empty line lets it go on. Ctrl-C ends an answer, wherever
    in it the program is, and all while a line is waited for.

    begun: whether there is a prompt that is answered first.
    """

    def turn(text: str) -> None:
        with _ctrl_c_asks() as is_asked:
            if text:
                ids = np.asarray(conversation.tokenizer.encode(f"{text}\n"))
                conversation.say(unmarked(conversation.tokenizer, ids))
            last = "\n"
            for piece in () if is_asked() else conversation.answer(is_asked):
                write(piece)
                last = piece
            if is_asked() or not last.endswith("\n"):  # the terminal shows ^C
                write("\n")

    if begun:
        turn("")
    for line in lines:
        turn(line.removesuffix("\n"))


@contextlib.contextmanager
def _ctrl_c_asks() -> Iterator[Callable[[], bool]]:
    """Have Ctrl-C only noted, since it would leave a state half changed; the second one is a KeyboardInterrupt. Where
    others handle it, or Python is not in its main thread, it stays what it is."""
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
