"""The only home of torch and diffusers: loads the model, holds it, runs a Plan.

Importing this package imports torch; whoever wants to stay light imports it late.
"""

from src.engine.engine import Engine
from src.engine.engines import Engines, load_engines
from src.engine.loading import load_engine
from src.engine.machine import check_device

__all__ = ["AnyEngine", "Engine", "Engines", "check_device", "load_engine", "load_engines"]

AnyEngine = Engine | Engines  # what draws a plan
