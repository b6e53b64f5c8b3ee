"""How clients may write a truth value in JSON besides `true` and `false`: the words of pydantic's lax mode.

The server reads every flag so, and the gateway the one that it looks at: both must take a body for the same.
"""

from collections.abc import Mapping
from typing import Final

WORD_TO_BOOL: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "off", "f", "false", "n", "no"), False),
}
"""Words are compared in lower case."""
