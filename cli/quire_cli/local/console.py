"""What a person sees of `quire up`: one line per state change, and a bar while something is fetched or loaded."""

import sys
import time
from types import TracebackType
from typing import Never, TextIO

from tqdm import tqdm


class Console:
    """Writes lines that do not tear the bars. Bars are drawn only on a terminal; elsewhere lines alone appear."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._is_terminal = self._stream.isatty()

    def line(self, subject: str, text: str) -> None:
        """Print one state change, with the seconds since the start."""
        tqdm.write(f"{time.monotonic() - self._started:7.1f}s  {subject}: {text}", file=self._stream)
        self._stream.flush()

    def bar(self, label: str) -> "Bar":
        return Bar(label, self._stream, is_shown=self._is_terminal)


class Bar:
    """A bar from 0 to 100 percent that vanishes when it is closed."""

    def __init__(self, label: str, stream: TextIO, *, is_shown: bool) -> None:
        self._bar: tqdm[Never] = tqdm(
            total=100.0,
            desc=label,
            file=stream,
            leave=False,
            disable=not is_shown,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}",
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def show(self, percent: float, label: str | None = None) -> None:
        """Move to `percent`; a smaller value than before starts a new stage."""
        if label is not None:
            self._bar.set_description_str(label, refresh=False)
        self._bar.n = percent
        self._bar.refresh()
