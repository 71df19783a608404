"""The thread in which an engine steps."""

from __future__ import annotations

import logging
import threading
import time

from mambaseq.serving.engine import Engine

_PATIENCE = 1.0  # seconds between looks where nothing is asked


class Worker:
    """Steps an engine while there is something to do, in a thread of its own, until it is closed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mambaseq-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def close(self, patience: float = 0.0) -> None:
        """Wait for at most so many seconds until all that was asked is answered; then cancel the rest and end."""
        until = time.monotonic() + patience
        while self.alive and self.engine.busy and time.monotonic() < until:
            time.sleep(0.01)
        self._closing.set()
        self.engine.wake()
        self._thread.join()

    def _work(self) -> None:
        reason = "The server has ended. Ask another one."
        try:
            while not self._closing.is_set():
                try:
                    if self.engine.fault is not None and not self.engine.busy:
                        self.engine.probe()
                    more = self.engine.step()
                except Exception as error:  # a fault of ours: those who wait are told, and others can be answered
                    self.engine.failed(error)  # which logs it
                    logging.getLogger(__name__).error("A step failed; all requests are cancelled.")
                    self.engine.end_all()
                    more = False  # where steps go on to fail, they do so about once a second
                if not more:
                    self.engine.wait(_PATIENCE)
        except BaseException as error:
            reason = f"The engine's thread has ended by {type(error).__name__}. Start the server again."
            raise
        finally:  # nobody waits for a thread that is gone
            self.engine.close(reason)
