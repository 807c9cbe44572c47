"""The model: images, data, base models, adapters, quantization, inference and scores.

The bottom layer. `server`, `client` and `kiosk` import it; it imports none of them. Importing this package loads
nothing heavy: torch and transformers are imported inside the functions that need them.
"""
