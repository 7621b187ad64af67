"""The one exception a user of the data room meets."""

from __future__ import annotations


class DataError(ValueError):
    """Bad data or data settings: one line with the place (`file:row`, rows from 1), the
    numbers that disagree and what to change."""


class EndOfData(DataError):
    """Every sample of a finite run of phases was trained on."""
