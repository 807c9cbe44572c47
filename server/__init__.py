"""The coordinator: central training with DeepSpeed, and the federated rounds with Flower.

Imports `model`, never `client` or `kiosk`. It never sees an image or a case of a clinic: only adapter factors arrive.
"""
