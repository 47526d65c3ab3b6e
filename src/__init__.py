"""The worker, a room to a folder; pyproject.toml holds who may import whom."""

from src import settings as settings  # first of all: it reads .env, and huggingface_hub freezes HF_HOME at its import

__version__ = "1.0.0"
