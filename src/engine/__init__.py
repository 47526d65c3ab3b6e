"""The only home of torch and diffusers: loads the model, holds it, runs a Plan.

Importing this package imports torch; whoever wants to stay light imports it late.
"""

from src.engine.run import Engine, Generation
from src.engine.weights import check_device, load_engine

__all__ = ["Engine", "Generation", "check_device", "load_engine"]
