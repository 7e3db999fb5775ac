"""What the measures return."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """A number or a curve, with all it depends on."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, by the names of the attributes; tuples become lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
