"""Which files a model is made of, and where each of its weights is to live. No torch."""
