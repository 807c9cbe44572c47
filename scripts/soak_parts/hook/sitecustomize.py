"""Python reads this at its start in a soak's clinics, whose PYTHONPATH names this folder; ClientApps alone mind it."""

import os
import sys

if os.environ.get("AFYA_SOAK_CLINIC") and any(word.endswith("flwr-clientapp") for word in sys.orig_argv):
    from scripts.soak_parts import clinic

    clinic.take_over()
