"""The pure functions of the methods, without state."""

__all__: list[str] = []
