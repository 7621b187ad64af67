"""The one exception a user of the RL room meets."""

from __future__ import annotations


class RLError(ValueError):
    """A reward function, skill map or group that cannot be used: one line with the place, the
    numbers that disagree and what to change."""
