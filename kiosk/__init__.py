"""The clinic's screen: ask about an image, read the answer, correct it, consent; every case in one SQLite file.

Imports `model`, never `server` or `client`. Meets the client only on disk, under `$AFYA_HOME`.
"""
