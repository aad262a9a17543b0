"""What one round of a watchtower did. No chain, node or file access here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """Counts by name, for logs and metrics."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Count one."""
        self.counts[name] = self.counts.get(name, 0) + 1
