"""Errors that a user is meant to read."""


class ProcessLostError(RuntimeError):
    """A process that this one works with ended before its time; what was finished before is written down."""


class SettingError(ValueError):
    """A setting that cannot be used.

    Args:
        setting: dotted name of the setting as a user types it, e.g. ``probe.batches``.
        given: the value that was given.
        possible: what could be given instead, as a phrase.
    """

    def __init__(self, setting: str, given: object, possible: str) -> None:
        super().__init__(f"{setting}={given}: {possible}")
        self.setting = setting
        self.given = given
        self.possible = possible

    def under(self, node: str) -> "SettingError":
        """The same error with the setting's name seen from one level higher."""
        return SettingError(f"{node}.{self.setting}" if node else self.setting, self.given, self.possible)

    def __reduce__(self) -> tuple[type["SettingError"], tuple[str, object, str]]:
        """Keep the three parts when a launcher pickles the error."""
        return SettingError, (self.setting, self.given, self.possible)
