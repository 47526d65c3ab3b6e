"""What a client sent: its fields under their own names, its pictures and adapters fetched and checked.

Knows no model: what fits one is decided by the plan and the engine.
"""
