"""Quantization methods: one technique, one file. `recipe.METHODS` lists them."""
