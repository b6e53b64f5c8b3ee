"""Compiles the CPU kernels where torch is not installed: in the image's build stage, whose wheel all images share.

`quire_kernels` imports torch; its builder needs none. So the package is entered here without its `__init__`.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("quire_kernels")
package.__path__ = [str(Path("kernels/quire_kernels").resolve())]
sys.modules["quire_kernels"] = package
sys.exit(importlib.import_module("quire_kernels.build").main())
