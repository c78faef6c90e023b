"""The compiled core, whose functions and classes csrc/bindings*.h describe."""

from typing import Any

def __getattr__(name: str) -> Any: ...
