"""The worker's rooms; handler.py shows the road through them."""
