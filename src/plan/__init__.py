"""A request and a model's row -> everything that the engine needs to know. All decisions, and no torch."""
