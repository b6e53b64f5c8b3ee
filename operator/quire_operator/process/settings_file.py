"""The settings as they are now: read from a file, and read again when the file changes.

A changed file that cannot be used is said once, and what was read before goes on counting. Knows no setting's meaning.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from quire_operator.spec.settings import Settings, SettingsError, load_settings

logger = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 3.0

_Stamp = tuple[int, int, int] | None


class SettingsFile:
    """One file, watched by its time stamp: a mounted ConfigMap changes by a link that is swapped.

    Args:
        path: the file; None or an absent one that was not asked for explicitly: defaults.

    Raises:
        SettingsError: the file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp = self._look()
        self.current = Settings() if path is None else load_settings(path)

    def reload(self) -> bool:
        """Read the file if it has changed; return whether there are other settings now."""
        stamp = self._look()
        if self._path is None or stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            new = load_settings(self._path)
        except SettingsError as error:
            logger.error("Settings cannot be used, the old ones stay err=%s", error)
            return False
        if new == self.current:
            return False
        self.current = new
        logger.info("Settings changed file=%s", self._path)
        return True

    async def watch(self, on_change: Callable[[], None], interval_s: float = POLL_INTERVAL_S) -> None:
        """Call back after each change, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            if self.reload():
                on_change()

    def _look(self) -> _Stamp:
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
