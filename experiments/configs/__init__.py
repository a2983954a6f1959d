"""One frozen dataclass instance per setting."""
