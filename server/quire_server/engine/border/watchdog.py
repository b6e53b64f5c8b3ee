"""How long the engine has been silent, and whether it may. Pure: time is what `tick` is told.

Counted in ticks of who watches, so that a suspended machine is not taken for a hung engine. Every message says how
long the silence after it may be; what says nothing of it means a heartbeat's.
"""


class Watchdog:
    """Hears of each message, and of each tick. Asleep until the engine is ready: loading has words of its own."""

    def __init__(self, heartbeat_timeout_s: float) -> None:
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._patience_s = heartbeat_timeout_s
        self._activity = ""
        self._has_heard = False
        self.is_awake = False
        self.silence_s = 0.0

    def hear(self, max_silence_s: float = 0.0, activity: str = "") -> None:
        """Take note of a message, after which the engine may be silent for so long, since it does `activity`."""
        self._patience_s = max(self._heartbeat_timeout_s, max_silence_s)
        self._activity = activity
        self._has_heard = True

    def tick(self, elapsed_s: float) -> bool:
        """Say whether the engine has now been silent for longer than it may be."""
        is_silent = self.is_awake and not self._has_heard
        self._has_heard = False
        self.silence_s = self.silence_s + elapsed_s if is_silent else 0.0
        return self.silence_s >= self._patience_s

    @property
    def verdict(self) -> str:
        """What to say of an engine that has been silent for too long."""
        meanwhile = f" (in {self._activity})" if self._activity else ""
        return f"The engine loop has said nothing for {self.silence_s:.0f} s{meanwhile}."
