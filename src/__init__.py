"""The worker, a room to a folder; pyproject.toml holds who may import whom."""

__version__ = "1.0.0"
