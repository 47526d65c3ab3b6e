"""What made models/flux-shapes: the scenes, the tokenizers, the networks and their training."""
