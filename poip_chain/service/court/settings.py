"""How a program takes part in the court: the section `court` of a node's or watchtower's settings. Values only."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator


class CourtSettings(BaseModel):
    """Money in wei of the network's token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="contest false accusations; needs `model`")
    model: Path | None = Field(None, description="directory of the model, for canonical execution; its memory is used "
                               "only while there is an accusation to look at")  # fmt: skip
    keep_open: bool = Field(False, description="open the canonical engine at the start and keep its memory: saves "
                            "seconds before each accusation, for networks with short windows (watchtower)")  # fmt: skip
    threads: int = Field(1, ge=1, le=256, description="threads of canonical execution")
    defence_budget: int = Field(
        0, ge=0, description="most that may stand in bonds of contests at one time, beside a node's free ones"
    )

    @field_validator("model")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @property
    def active(self) -> bool:
        """Whether there is anything to play with."""
        return self.enabled and self.model is not None
