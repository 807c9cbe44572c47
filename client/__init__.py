"""A clinic's side of the federation: trains the adapter on what the clinic agreed to and sends back its factors.

Imports `model`, never `server` or `kiosk`. It reads `$AFYA_HOME/training`, and never the case database.
"""
