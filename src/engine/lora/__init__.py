"""A client's adapter file, read whole: every tensor is applied, or named in a warning or a refusal.

names.py knows how trainers call a model's layers, tensors.py what stands in a file for a layer, deltas.py what that
adds to the layer, and reading.py puts them together.
"""

from src.engine.lora.reading import AdapterFile, AdapterWeights, Networks

__all__ = ["AdapterFile", "AdapterWeights", "Networks"]
